"""Measure what the project promises about speed, as ratios within one run: `make bench`.

Each row is a median over runs in which the two things compared took turns. Written to figures/bench.json.
"""

import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
import transformers
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import steer_utils as su
from steer_utils.lm_steer_fit import Training
from steer_utils.lm_steer_run import new_steer, update
from steer_utils.token_states import token_states

OUT = Path(__file__).parents[1] / "figures" / "bench.json"


def main() -> None:
    model, tokenizer = su.load()
    rows = [
        row("import steer_utils beyond transformers, seconds", import_seconds(), 0.2),
        row("load() once unpacked, seconds", [seconds(su.load) for _ in range(5)], 1.0),
        row("decoding with an activation addition ÷ plain", decoding_ratios(model, tokenizer), 1.03),
        row("PPLM past, a token ÷ its passes alone, batch 8", past_ratios(model, tokenizer), 1.15),
        row("PPLM past, a token after 250 ÷ after 25", length_ratios(model, tokenizer), 1.3),
        row("PPLM hidden ÷ plain decoding, batch 8", hidden_ratios(model, tokenizer), 2.0),
        row("PPLM past, 16 samples × 60 ÷ the original's order", schedule_ratios(model, tokenizer), 1 / 8),
        row("decoding with an LM-Steer ÷ plain, batch 8", lm_steer_ratios(model), 1.03),
        row("decoding with a folded LM-Steer ÷ plain, batch 8", folded_ratios(model), 1.0),
        row("LM-Steer training, a step ÷ one that runs the model", training_ratios(model, tokenizer), 0.1),
        row("sweep of every block × 8 coefficients ÷ cell by cell", sweep_ratios(model, tokenizer), 0.2),
    ]
    versions = {"python": platform.python_version()} | {
        m.__name__: m.__version__ for m in (torch, transformers)
    }
    machine = f"{model.device.type}, {torch.get_num_threads()} threads, {platform.machine()}"
    OUT.write_text(json.dumps({"machine": machine, "versions": versions, "rows": rows}, indent=1) + "\n")
    table = Table("what", "measured", "bound", "holds", "runs", title=machine)
    for one in rows:
        table.add_row(
            one["name"], f"{one['ratio']:.3f}", f"{one['bound']}", str(one["holds"]), str(one["runs"])
        )
    Console().print(table)


def row(name: str, values: list[float], bound: float) -> dict[str, str | float | bool | int]:
    middle = statistics.median(values)
    return {
        "name": name,
        "ratio": round(middle, 4),
        "bound": bound,
        "holds": middle <= bound,
        "runs": len(values),
    }


def seconds(work: Callable[[], object]) -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def import_seconds() -> list[float]:
    """What a new process spends on our import after transformers', several times."""
    code = "import transformers, time; t = time.time(); import steer_utils; print(time.time() - t)"
    command = [sys.executable, "-c", code]
    return [float(subprocess.run(command, capture_output=True, check=True).stdout) for _ in range(5)]


def decoding_ratios(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[float]:
    """`model.generate` with an x-vector on, its texts run each time, over the same without: 8 × 50 tokens."""
    batch = su.encode(tokenizer, su.data.prompts()[:8], device=model.device)
    pair = su.get_x_vector("Love", "Hate", coeff=2, act_name=6)

    def plain() -> None:
        model.generate(**batch, max_new_tokens=50, min_new_tokens=50, do_sample=False)

    def steered() -> None:
        with su.apply_activation_additions(model, pair, tokenizer):
            plain()

    plain()  # warm up
    return [balanced_ratio(steered, plain) for _ in range(5)]


SPACE = su.PPLM(bags="space", stepsize=0.05, gamma=1.0, num_iterations=3)


def decoded(model: PreTrainedModel, steer: su.PPLM | None, ids: Tensor, tokens: int) -> Callable[[], object]:
    """Work: greedy search for so many tokens, steered or plain."""
    settings = {"attention_mask": torch.ones_like(ids), "min_new_tokens": tokens, "max_new_tokens": tokens}
    return lambda: model.generate(ids, **settings, do_sample=False, custom_generate=steer)


def past_ratios(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[float]:
    """A token of PPLM over m + 2 forward passes of one token and m backward ones, at 30 cached positions."""
    steer, (ids, long) = SPACE.with_tokenizer(tokenizer), (random_ids(model, 8, n) for n in (20, 30))
    one, many = decoded(model, steer, ids, 1), decoded(model, steer, ids, 21)
    with torch.no_grad():
        past = model(long).past_key_values
    last, m = long[:, -1:], steer.num_iterations

    def passes() -> None:
        with torch.no_grad():
            for _ in range(2):
                model(last, past_key_values=su.hf.forked(past))
        for _ in range(m):
            pairs = [tuple(t.clone().requires_grad_() for t in pair) for pair in su.hf.cached(past)]
            logits = model(last, past_key_values=su.hf.with_cached(past, pairs)).logits
            torch.autograd.grad(logits.logsumexp(-1).sum(), [t for pair in pairs for t in pair])

    for work in (one, passes):
        work()  # warm up
    return [(seconds(many) - seconds(one)) / sum(seconds(passes) for _ in range(20)) for _ in range(3)]


def length_ratios(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[float]:
    """A token of PPLM behind 250 tokens over one behind 25."""
    steer = SPACE.with_tokenizer(tokenizer)
    pairs = [[decoded(model, steer, random_ids(model, 8, n), k) for k in (9, 1)] for n in (250, 25)]
    for more, _ in pairs:
        more()  # warm up
    found = [[seconds(more) - seconds(less) for more, less in pairs] for _ in range(3)]
    return [long / short for long, short in found]


def hidden_ratios(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[float]:
    steer, ids = replace(SPACE, perturb="hidden").with_tokenizer(tokenizer), random_ids(model, 8, 10)
    steered, plain = decoded(model, steer, ids, 30), decoded(model, None, ids, 30)
    plain()  # warm up
    return [balanced_ratio(steered, plain) for _ in range(5)]


def schedule_ratios(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[float]:
    """16 samples in a batch over 16 times one whose plain pass reads all of the text at each token."""
    steer, ids, tokens = SPACE.with_tokenizer(tokenizer), random_ids(model, 1, 5), 60
    batch = decoded(model, steer, ids.repeat(16, 1), tokens)
    one = decoded(model, steer, ids, tokens)
    with torch.no_grad():  # the original's order: one sample, and the whole text once more for each token
        texts = [random_ids(model, 1, 5 + n) for n in range(tokens)]

    def again() -> None:
        with torch.no_grad():
            for text in texts:
                model(text, use_cache=False)

    again()  # warm up
    return [seconds(batch) / (16 * (seconds(one) + seconds(again)))]


def lm_steer_ratios(model: PreTrainedModel) -> list[float]:
    """`model.generate` with a steer of rank 64 on over the same without: 8 × 50 tokens."""
    plain = decoded(model, None, random_ids(model, 8, 10), 50)

    def steered() -> None:
        with random_steer(model).on(model):
            plain()

    plain()  # warm up
    return [balanced_ratio(steered, plain) for _ in range(5)]


def folded_ratios(model: PreTrainedModel) -> list[float]:
    """The same with the steer folded into a plain model."""
    ids, folded = random_ids(model, 8, 10), random_steer(model).fold(model)
    plain, steered = decoded(model, None, ids, 50), decoded(folded, None, ids, 50)
    plain(), steered()  # warm up
    return [balanced_ratio(steered, plain) for _ in range(5)]


def random_steer(model: PreTrainedModel) -> su.LMSteer:
    shape = 2, 1, su.hf.last_width(model), 64
    return su.LMSteer(*torch.randn(shape, generator=torch.Generator().manual_seed(0))).at(1.0)


def training_ratios(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[float]:
    """A step on the stored states of 32 texts over one that runs the model on them, as the original does."""
    texts = su.data.rated_sentences("movie")["text"][:32].tolist()
    rows = [su.models.token_ids(tokenizer, text) for text in texts]
    states, how = token_states(model, rows), Training(rank=64)
    values = torch.ones(len(rows), 2)
    batch = states.hidden, states.next_ids, values[states.text]
    steer = new_steer(model, how)
    steer = replace(steer, **{name: tensor.requires_grad_() for name, tensor in steer.tensors().items()})
    optimizer = torch.optim.Adam(steer.tensors().values(), lr=1e-6)
    padded = su.models.pad(rows, rows[0][0], padding_side="right", device=model.device)
    ends = padded["input_ids"].masked_fill(padded["attention_mask"] == 0, tokenizer.eos_token_id)

    def with_model() -> None:  # labels are the ids, padding included
        with torch.no_grad():
            hidden = su.hf.forward(model, **padded, use_cache=False).last_hidden_state[:, :-1]
        targets = ends[:, 1:].flatten()
        update(model, steer, optimizer, (hidden.flatten(0, 1), targets, values[:1].expand(len(targets), -1)))

    def from_states() -> None:
        update(model, steer, optimizer, batch)

    with_model(), from_states()  # warm up
    return [balanced_ratio(from_states, with_model) for _ in range(5)]


def random_ids(model: PreTrainedModel, rows: int, tokens: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    size = model.config.vocab_size
    return torch.randint(size, (rows, tokens), generator=generator).to(model.device)


def sweep_ratios(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[float]:
    """`su.sweep` over a `generate` for each cell: one prompt, 10 tokens; every 20th cell is timed."""
    pair = su.get_x_vector("Love", "Hate", coeff=1, act_name=0)
    prompt, settings = su.data.prompts()[0], {"max_new_tokens": 10, "seed": 0}
    names, coeffs = range(len(su.hf.blocks(model))), [0.5 * c for c in range(1, 9)]
    cells = [(name, coeff) for name in names for coeff in coeffs][::20]

    def swept() -> None:
        su.sweep(model, tokenizer, prompt, pair, act_names=names, coeffs=coeffs, **settings)

    def one_by_one() -> None:
        for name, coeff in cells:
            steer = [coeff * replace(addition, act_name=name) for addition in pair]
            su.generate(model, tokenizer, prompt, steer=steer, **settings)

    one_by_one()  # warm up
    return [balanced_ratio(swept, one_by_one) * len(cells) / (len(names) * len(coeffs)) for _ in range(3)]


def balanced_ratio(one: Callable[[], object], other: Callable[[], object]) -> float:
    """Seconds of one over seconds of the other, each run twice in mirrored order: one, other, other, one."""
    first, *others, last = [seconds(work) for work in (one, other, other, one)]
    return (first + last) / sum(others)


if __name__ == "__main__":
    main()
