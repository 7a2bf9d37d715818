"""Measure what the project promises about speed, as ratios within one run: `make bench`.

Each row is a median over runs in which the two things compared took turns. Written row by row to
figures/bench.json, on a GPU to figures/bench_cuda.json, and from there to docs/speed.md. With --quick, a row
runs once on a tiny model, and nothing is written: the numbers mean nothing, but what broke shows. With words,
such as `python tests/bench.py PPLM`, only the rows with such a word in their names are measured and renewed.
`make notebooks` says itself how long each notebook took; it has no row here.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import torch
import transformers
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import steer_utils as su
from steer_utils.checkpoint import write_atomically
from steer_utils.lm_steer.training import Training, new_steer, token_states, update

FIGURES = Path(__file__).parents[1] / "figures"


def random_batches(batches: int, size: int) -> list[list[str]]:
    """Sentences of films, in batches that a shuffling loader could give."""
    texts = su.data.rated_sentences("movie")["text"].sample(batches * size, random_state=0).tolist()
    return [texts[start : start + size] for start in range(0, len(texts), size)]


def gpt2_large() -> PreTrainedModel:
    """The model of LM-Steer's paper by its sizes; weights are random, as time does not depend on them."""
    config = transformers.GPT2Config(n_embd=1280, n_layer=36, n_head=20)
    return transformers.GPT2LMHeadModel(config).requires_grad_(False).eval()


@dataclass(frozen=True)
class Bench:
    """What is measured, and on how much of it; the defaults are those of the numbers that count."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    runs: int = 15  # short ones, since another process may disturb some
    few: int = 3  # runs of what takes minutes
    layer: int = 6  # where activations are added
    batch: int = 8
    tokens: int = 25
    lengths: tuple[int, int] = (25, 250)  # of the texts that PPLM goes on with
    samples: int = 25
    prompts: int = 64
    alone: int = 8  # of the prompts of a run, those whose samples are written one at a time too
    steps: int = 20  # tokens of PPLM that are timed against their passes
    batches: Sequence[Sequence[str]] = field(default_factory=lambda: random_batches(5, 32))  # to train on
    large: Callable[[], PreTrainedModel] = gpt2_large


def quick() -> Bench:
    """The least of everything, on a tiny random Llama."""
    from conftest import GOLDEN_MODELS, tiny

    tokenizer = transformers.AutoTokenizer.from_pretrained(GOLDEN_MODELS / "T1")
    least = {"runs": 1, "few": 1, "layer": 1, "batch": 2, "tokens": 3, "lengths": (5, 20), "steps": 2}
    least |= {"samples": 2, "prompts": 2, "alone": 1, "batches": [su.data.prompts()[:2]]}
    return Bench(tiny("llama"), tokenizer, **least, large=lambda: tiny("gpt2"))


class Row(NamedTuple):
    """A promise: what `measure` gives, in the median, is at most `bound`."""

    name: str
    bound: float
    measure: Callable[[Bench], list[float]]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("words", nargs="*", help="measure the rows with one of these in their names")
    parser.add_argument("--quick", action="store_true", help="only see whether every row runs")
    given = parser.parse_args(arguments)
    chosen = [row for row in ROWS if not given.words or any(word in row.name for word in given.words)]
    if not chosen:
        parser.error(f"no row has {' or '.join(given.words)} in its name: {'; '.join(r.name for r in ROWS)}")
    os.environ["TQDM_DISABLE"] = "1"  # bars would be timed as well
    bench = quick() if given.quick else Bench(*su.load())
    result = {"machine": machine(bench.model), "versions": versions(), "rows": []}
    for number, row in enumerate(chosen, 1):
        result["rows"].append(measured(row, bench))
        print(f"{number} of {len(chosen)}: {row.name}: {result['rows'][-1]['ratio']:.3f}", flush=True)
        if not given.quick:
            write(result, bench.model)
    show(result)


def write(result: dict, model: PreTrainedModel) -> None:
    """Put what was measured so far into the file of the model's kind of device.

    Rows that it has from the same machine and versions stay until they are measured again.
    """
    name = "bench" if model.device.type == "cpu" else f"bench_{model.device.type}"
    path, about = FIGURES / f"{name}.json", {key: result[key] for key in ("machine", "versions")}
    known = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    kept = known["rows"] if about.items() <= known.items() else []
    rows = {row["name"]: row for row in [*kept, *result["rows"]]}
    found = about | {"rows": [rows[row.name] for row in ROWS if row.name in rows]}
    write_atomically(path, (json.dumps(found, indent=1, ensure_ascii=False) + "\n").encode())


def machine(model: PreTrainedModel) -> str:
    device = model.device.type
    name = torch.cuda.get_device_name() if device == "cuda" else f"{platform.machine()}, {cpu_name()}"
    return f"{device}, {torch.get_num_threads()} threads, {name}"


def cpu_name() -> str:
    """The processor's name, where the system tells it."""
    told = Path("/proc/cpuinfo")
    lines = told.read_text().splitlines() if told.is_file() else []
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), "")


def versions() -> dict[str, str]:
    return {"python": platform.python_version()} | {
        module.__name__: module.__version__ for module in (torch, transformers)
    }


def measured(row: Row, bench: Bench) -> dict[str, str | float | bool | int | list[float]]:
    """A row of the table. interval: lowest and highest run."""
    values = row.measure(bench)
    middle = statistics.median(values)
    return {
        "name": row.name,
        "ratio": round(middle, 4),
        "interval": [round(min(values), 4), round(max(values), 4)],
        "bound": row.bound,
        "holds": middle <= row.bound,
        "runs": len(values),
    }


def show(result: dict) -> None:
    table = Table("what", "measured", "runs from, to", "bound", "holds", "runs", title=result["machine"])
    for one in result["rows"]:
        numbers = (f"{one['ratio']:.3f}", "{:.3f}, {:.3f}".format(*one["interval"]), f"{one['bound']}")
        table.add_row(one["name"], *numbers, "yes" if one["holds"] else "no", str(one["runs"]))
    Console().print(table)


# --- clocks -----------------------------------------------------------------------------------------------


def seconds(work: Callable[[], object]) -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def balanced_ratio(one: Callable[[], object], other: Callable[[], object]) -> float:
    """Seconds of one over seconds of the other, each run twice in mirrored order: one, other, other, one."""
    first, *others, last = [seconds(work) for work in (one, other, other, one)]
    return (first + last) / sum(others)


# --- what the rows measure --------------------------------------------------------------------------------


def import_seconds(bench: Bench) -> list[float]:
    """What a new process spends on our import after transformers', several times."""
    code = "import transformers, time; t = time.time(); import steer_utils; print(time.time() - t)"
    command = [sys.executable, "-c", code]
    return [float(subprocess.run(command, capture_output=True, check=True).stdout) for _ in range(bench.few)]


def load_seconds(bench: Bench) -> list[float]:
    su.load()  # unpacks the model if need be
    return [seconds(su.load) for _ in range(bench.few)]


def decoding_ratios(bench: Bench) -> list[float]:
    """`model.generate` with an x-vector on, its texts run each time, over the same without: 8 × 25 tokens."""
    model, tokenizer, tokens = bench.model, bench.tokenizer, bench.tokens
    batch = su.encode(tokenizer, su.data.prompts()[: bench.batch], device=model.device)
    pair = su.get_x_vector("Love", "Hate", coeff=2, act_name=bench.layer)

    def plain() -> None:
        model.generate(**batch, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False)

    def steered() -> None:
        with su.apply_activation_additions(model, pair, tokenizer):
            plain()

    plain()  # warm up
    return [balanced_ratio(steered, plain) for _ in range(bench.runs)]


SPACE = su.PPLM(bags="space", stepsize=0.05, gamma=1.0, num_iterations=3)


def decoded(model: PreTrainedModel, steer: su.PPLM | None, ids: Tensor, tokens: int) -> Callable[[], object]:
    """Work: greedy search for so many tokens, steered or plain."""
    settings = {"attention_mask": torch.ones_like(ids), "min_new_tokens": tokens, "max_new_tokens": tokens}
    return lambda: model.generate(ids, **settings, do_sample=False, custom_generate=steer)


def past_ratios(bench: Bench) -> list[float]:
    """A token of PPLM over m + 2 forward passes of one token and m backward ones, at 30 cached positions."""
    model, steer, steps = bench.model, SPACE.with_tokenizer(bench.tokenizer), bench.steps
    ids, long = (random_ids(model, bench.batch, n) for n in (20, 30))
    one, many = decoded(model, steer, ids, 1), decoded(model, steer, ids, 1 + steps)
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
    return [
        (seconds(many) - seconds(one)) / sum(seconds(passes) for _ in range(steps)) for _ in range(bench.few)
    ]


def length_ratios(bench: Bench) -> list[float]:
    """A token of PPLM behind 250 tokens over one behind 25."""
    model, steer = bench.model, SPACE.with_tokenizer(bench.tokenizer)
    texts = [random_ids(model, bench.batch, length) for length in reversed(bench.lengths)]
    pairs = [[decoded(model, steer, ids, tokens) for tokens in (9, 1)] for ids in texts]
    for more, _ in pairs:
        more()  # warm up
    found = [[seconds(more) - seconds(less) for more, less in pairs] for _ in range(bench.few)]
    return [long / short for long, short in found]


def hidden_ratios(bench: Bench) -> list[float]:
    """A token of PPLM over an unsteered one and m products with the LM head, forward and backward."""
    model, steer = bench.model, replace(SPACE, perturb="hidden").with_tokenizer(bench.tokenizer)
    ids, tokens = random_ids(model, bench.batch, 10), min(30, bench.tokens)
    steered, plain = (decoded(model, one, ids, tokens) for one in (steer, None))
    hidden = torch.randn(bench.batch, su.hf.last_width(model), device=model.device)

    def passes() -> None:
        plain()
        for _ in range(steer.num_iterations * tokens):
            state = hidden.clone().requires_grad_()
            torch.autograd.grad(su.hf.lm_head(model)(state).logsumexp(-1).sum(), state)

    passes()  # warm up
    return [balanced_ratio(steered, passes) for _ in range(bench.few)]


def schedule_ratios(bench: Bench) -> list[float]:
    """16 samples in a batch over 16 times one whose plain pass reads all of the text at each token."""
    model, steer, rows = bench.model, SPACE.with_tokenizer(bench.tokenizer), 2 * bench.batch
    ids, tokens = random_ids(model, 1, 5), 2 * bench.tokens + 10
    batch = decoded(model, steer, ids.repeat(rows, 1), tokens)
    one = decoded(model, steer, ids, tokens)
    with torch.no_grad():  # the original's order: one sample, and the whole text once more for each token
        texts = [random_ids(model, 1, 5 + n) for n in range(tokens)]

    def again() -> None:
        with torch.no_grad():
            for text in texts:
                model(text, use_cache=False)

    again()  # warm up
    return [seconds(batch) / (rows * (seconds(one) + seconds(again))) for _ in range(bench.few)]


def lm_steer_ratios(bench: Bench) -> list[float]:
    """`model.generate` with a steer of rank 64 on over the same without: 8 × 25 tokens."""
    model = bench.model
    plain = decoded(model, None, random_ids(model, bench.batch, 10), bench.tokens)

    def steered() -> None:
        with random_steer(model).on(model):
            plain()

    plain()  # warm up
    return [balanced_ratio(steered, plain) for _ in range(bench.runs)]


def folded_ratios(bench: Bench) -> list[float]:
    """The same with the steer folded into a plain model."""
    ids, folded = random_ids(bench.model, bench.batch, 10), random_steer(bench.model).fold(bench.model)
    plain, steered = (decoded(model, None, ids, bench.tokens) for model in (bench.model, folded))
    plain(), steered()  # warm up
    return [balanced_ratio(steered, plain) for _ in range(bench.runs)]


def random_steer(model: PreTrainedModel) -> su.LMSteer:
    shape = 2, 1, su.hf.last_width(model), 64
    return su.LMSteer(*torch.randn(shape, generator=torch.Generator().manual_seed(0))).at(1.0)


def training_ratios(bench: Bench) -> list[float]:
    """A step on the stored states of 32 texts over one that runs the model on them; other texts in each run.

    By multiplications alone it would be about 0.18 with the embedded model, a fifth of whose numbers are in
    its head: half of the padded tokens are texts', and need the head alone, forward and back.
    """
    return [step_ratio(bench.model, bench.tokenizer, texts, rank=64) for texts in bench.batches]


def large_training_ratios(bench: Bench) -> list[float]:
    """The same with model and rank of the paper's sizes; a twelfth of the model's numbers are in its head."""
    model = bench.large().to(bench.model.device, bench.model.dtype)
    model.loss_type = "ForCausalLM"  # which transformers takes anyway, but with a warning
    return [step_ratio(model, bench.tokenizer, texts, rank=1000) for texts in bench.batches[: bench.few]]


def step_ratio(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], rank: int
) -> float:
    """One training step on texts: from their stored states over as the original makes it.

    The original runs the frozen model, takes its own loss, with padding as labels, and goes backward. The one
    pass that stores the states is left out: it costs what the original spends on a first round of the texts.
    """
    rows = [su.models.token_ids(tokenizer, text) for text in texts]
    padded = su.models.pad(rows, "right", model.device)
    labels = padded["input_ids"].masked_fill(padded["attention_mask"] == 0, tokenizer.eos_token_id)
    states = token_states(model, rows)
    (steer, adam), (beside, its_adam) = learner(model, rank), learner(model, rank)

    def with_model() -> None:
        with beside.at(torch.ones(len(rows), 2)).on(model):
            model(**padded, labels=labels, use_cache=False).loss.backward()
        its_adam.step()
        its_adam.zero_grad()

    def from_states() -> None:
        update(model, steer, adam, (states.hidden, states.next_ids, torch.ones(len(states.hidden), 2)))

    with_model(), from_states()  # warm up
    return balanced_ratio(from_states, with_model)


def learner(model: PreTrainedModel, rank: int) -> tuple[su.LMSteer, torch.optim.Adam]:
    steer = new_steer(model, Training(rank=rank))
    tensors = {name: tensor.to(model.device).requires_grad_() for name, tensor in steer.tensors().items()}
    return replace(steer, **tensors), torch.optim.Adam(tensors.values(), lr=1e-6)


def samples_ratios(bench: Bench) -> list[float]:
    """A sample of 25 of each of 64 prompts, 20 tokens, over one that is written alone.

    Each run has its share of the prompts; one sample of some of them is written alone, before and after.
    """
    prompts = su.data.prompts("neutral")[: bench.prompts]
    settings = {"max_new_tokens": 20, "min_new_tokens": 20, "seed": 0}

    def ratio(some: Sequence[str]) -> float:
        few = some[: bench.alone]

        def together() -> None:
            su.generate(bench.model, bench.tokenizer, some, num_samples=bench.samples, **settings)

        def alone() -> None:
            for prompt in few:
                su.generate(bench.model, bench.tokenizer, prompt, **settings)

        alone()  # warm up
        before, found, after = (seconds(work) for work in (alone, together, alone))
        return 2 * found / (before + after) * len(few) / (bench.samples * len(some))

    return [ratio(prompts[run :: bench.few]) for run in range(bench.few)]


def random_ids(model: PreTrainedModel, rows: int, tokens: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    size = model.config.vocab_size
    return torch.randint(size, (rows, tokens), generator=generator).to(model.device)


def sweep_ratios(bench: Bench) -> list[float]:
    """`su.sweep` over a `generate` for each cell: one prompt, 10 tokens; every 20th cell is timed."""
    model, tokenizer = bench.model, bench.tokenizer
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
    return [
        balanced_ratio(swept, one_by_one) * len(cells) / (len(names) * len(coeffs)) for _ in range(bench.few)
    ]


def workers_ratios(bench: Bench) -> list[float]:
    """A sweep of 24 chunks in two processes over one process, a thread each; starts are counted."""
    tokenizer, threads = bench.tokenizer, torch.get_num_threads()
    pair = su.get_x_vector("Love", "Hate", coeff=1, act_name=0)
    grid = {"act_names": range(3), "coeffs": [0.5, 1.0], "max_new_tokens": bench.tokens, "seed": 0}
    prompts = (su.data.prompts("neutral") * 2)[: 2 * bench.prompts]

    def seconds_of(workers: int) -> float:
        with TemporaryDirectory() as folder:
            run = partial(su.sweep, model, tokenizer, prompts, pair, folder=folder, batch_size=32, **grid)
            return seconds(lambda: run(workers=workers))

    with TemporaryDirectory() as home:  # from where workers load the model
        for part in (bench.model, tokenizer):
            part.save_pretrained(home)
        model, _ = su.load(home, dtype="float32", device="cpu")
        torch.set_num_threads(1)
        try:
            return [seconds_of(2) / seconds_of(1) for _ in range(bench.few)]
        finally:
            torch.set_num_threads(threads)


def handwritten_ratios(bench: Bench) -> list[float]:
    """`su.generate` over the loop that people write, on four parts of the prompts.

    That loop is sorted by length, padded on the left, with `num_return_sequences`.
    """
    model, tokenizer = bench.model, bench.tokenizer
    all_prompts = su.data.prompts("neutral")[: bench.prompts]
    size = max(1, 64 // bench.samples)  # prompts whose samples make a batch of 64
    how = {"do_sample": True, "top_p": 0.9, "top_k": 0, "max_new_tokens": 20, "min_new_tokens": 20}

    def loop(prompts: list[str]) -> None:
        prompts = sorted(prompts, key=len)
        for i in range(0, len(prompts), size):
            batch = su.encode(tokenizer, prompts[i : i + size], device=model.device)
            rows = model.generate(**batch, num_return_sequences=bench.samples, **how)
            tokenizer.batch_decode(rows[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)

    def ours(prompts: list[str]) -> None:
        settings = {"num_samples": bench.samples, "seed": 0, "max_new_tokens": 20, "min_new_tokens": 20}
        su.generate(model, tokenizer, prompts, **settings)

    parts = [all_prompts[first::4] for first in range(min(4, len(all_prompts)))]
    return [balanced_ratio(partial(ours, part), partial(loop, part)) for part in parts]


# A folded steer runs the same passes: 1 within noise. By multiplications, a training step of the embedded
# model needs 0.176 of one that runs the model; the bound is 1.15 times that.
ROWS = [
    Row("decoding with an activation addition ÷ unsteered", 1.03, decoding_ratios),
    Row("decoding with an LM-Steer ÷ unsteered, batch 8", 1.03, lm_steer_ratios),
    Row("decoding with a folded LM-Steer ÷ unsteered, batch 8", 1.02, folded_ratios),
    Row("PPLM past, a token ÷ its passes alone, batch 8", 1.15, past_ratios),
    Row("PPLM past, a token after 250 ÷ after 25", 1.35, length_ratios),
    Row("PPLM hidden, a token ÷ its products alone, batch 8", 1.15, hidden_ratios),
    Row("LM-Steer training, a step ÷ one that runs the model", 0.2, training_ratios),
    Row("25 samples of each of 64 prompts, a token ÷ one at a time", 0.1, samples_ratios),
    Row("import steer_utils beyond transformers, seconds", 0.2, import_seconds),
    Row("load() once unpacked, seconds", 1.0, load_seconds),
    Row("PPLM past, 16 samples × 60 ÷ the original's order", 1 / 8, schedule_ratios),
    Row("sweep of every block × 8 coefficients ÷ cell by cell", 0.2, sweep_ratios),
    Row("a sweep on two workers ÷ on one, a thread each", 1 / 1.7, workers_ratios),
    Row("64 prompts × 25 samples ÷ the loop that people write", 1.0, handwritten_ratios),
    Row("LM-Steer training, the same at gpt2-large's sizes, rank 1000", 0.1, large_training_ratios),
]

if __name__ == "__main__":
    main()
