"""Measure how much of an LM-Steer's effect arrives on another model: figures/06_gemma.json, 06_anchors.json.

python data/make/transfer_effects.py          log-odds, random steers and a few completions: minutes
python data/make/transfer_effects.py --all    trains on the target, sweeps anchors, samples: two hours

Notebook 06 shows these numbers. The source is the embedded model with the course's sentiment steer, the
target Gemma 3 with 270 million parameters; `su.load("gemma3-270m")` says how to install it. All steers are
compared at one strength: 0.2 nats of KL on the first token after 32 tuning prompts. Without --all, what
takes long keeps the numbers that are in the files.
"""

import argparse
import functools
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

import steer_utils as su
from steer_utils.lm_steer.transfer import shared_tokens
from steer_utils.lm_steer.words import token_texts
from steer_utils.measure.metrics import Interval, bootstrap, next_token_kl
from steer_utils.measure.strength import factor_at

FIGURES = Path(__file__).parents[2] / "figures"
SOURCE, TARGET, GOAL, EXAMPLES = "smollm2-135m", "gemma3-270m", 0.2, 0.5  # nats; of what is shown
TRAINED, RANDOM, DRAWS = "trained on the target", "random", 10
WAYS: dict[str, dict[str, Any]] = {
    "closed form, unit rows (the paper's)": {"method": "closed_form"},
    "closed form, own scale": {"method": "closed_form", "normalize": "none"},
    "logits": {"method": "logits"},
    "states": {"method": "states"},
}
AUTHORS, LEARNED = 10_000, (400, 5000)  # the authors' anchors, and steps of Adam; theirs are 5,000
SAMPLED = ("closed form, unit rows (the paper's)", "states")
SAMPLING = {"max_new_tokens": 20, "top_p": 0.9, "seed": 0}
PROMPTS, UNIT = 100, [1.0, 0.0]  # the second steer of the source is a dummy
SHOWN = 8  # completions of each trial that are kept

Pair = tuple[Any, Any]  # a model and its tokenizer


def news(count: int) -> list[str]:
    """Sentences that both models read; their ratings are not used."""
    return su.data.rated_sentences("news")["text"].sample(count, random_state=0).tolist()


def moved(steer: su.LMSteer, source: Pair, target: Pair, how: dict[str, Any], **more: Any) -> su.LMSteer:
    read = {"texts": news(100)} if how["method"] == "states" else {}
    return su.transfer(steer, *source, *target, **read, **how, **more)


def random_like(steer: su.LMSteer, seed: int) -> su.LMSteer:
    """A steer of the same shape with random numbers."""
    noise = torch.Generator().manual_seed(seed)
    return replace(steer, **{k: torch.randn(t.shape, generator=noise) for k, t in steer.tensors().items()})


def at_goal(steer: su.LMSteer, pair: Pair, sign: int, nats: float = GOAL) -> su.LMSteer:
    """The steer at the value of this sign at which the first token's KL is so large."""
    hidden = last_states(*pair, "choose")[:32]
    plain, change = (su.hf.logits(pair[0], one) for one in (hidden, hidden @ steer.matrix(UNIT)))

    def kl(factor: float) -> float:
        return next_token_kl(plain + 8 * sign * factor * change, plain).mean().item()

    return steer.at(8 * sign * factor_at(kl, nats))


def gain(steer: su.LMSteer, pair: Pair) -> Interval:
    """Log-odds of VADER's good against its bad words as the next token, at +v less at −v, in nats."""
    ids, odds, hidden = good_and_bad(pair[1]), [], last_states(*pair, "test")[:PROMPTS]
    for sign in (1, -1):
        logits = su.hf.logits(pair[0], hidden + hidden @ at_goal(steer, pair, sign).matrix())
        good, bad = (logits[:, some].logsumexp(dim=-1) for some in ids)
        odds.append(good - bad)
    return bootstrap((odds[0] - odds[1]).tolist())


def good_and_bad(tokenizer: Any) -> list[list[int]]:
    """Ids of the tokens that are a space and a word rated above 1.5, and of those below −1.5."""
    ids = {text[1:]: i for i, text in token_texts(tokenizer).items() if text[0] == " "}
    rated = SentimentIntensityAnalyzer().lexicon.items()
    return [[ids[w] for w, rating in rated if w in ids and sign * rating > 1.5] for sign in (1, -1)]


def effect(steer: Callable[[int], Any], write: Callable, unsteered: pd.DataFrame, draws: int) -> dict:
    """Share judged positive at +v less at −v, the perplexity ratio at each side, and some completions.

    steer: a function of the sign to a steer, or to one for each draw.
    """
    up, down = (write(steer(sign), num_samples=draws) for sign in (1, -1))
    found = {judge: su.trials.difference(up, down, judge) for judge in ("VADER", "MiniLM")}
    sides = [su.trials.by_prompt(side, "log perplexity") for side in (up, down)]
    more = np.nanmean(sides, axis=0) - su.trials.by_prompt(unsteered, "log perplexity")
    found["perplexity ratio"] = Interval(*np.exp(bootstrap(more[~np.isnan(more)])))
    found["texts"] = [side.loc[side["sample"] == 0, "completion"].tolist()[:SHOWN] for side in (up, down)]
    return found


def trained_on(pair: Pair) -> su.LMSteer:
    """A steer towards positive film reviews, trained for the target."""
    table = su.data.rated_sentences("movie").sample(1500, random_state=0)
    how = {"rank": 64, "batch_tokens": 512, "validation": 0.03, "n_steps": 120, "max_length": 64}
    return su.train_lm_steer(*pair, table["text"].tolist(), (table["rating"] / 2).clip(-1, 1).tolist(), **how)


def what_is_read(steer: su.LMSteer, steers: dict[str, su.LMSteer], source: Pair, target: Pair) -> dict:
    """The mean's share of a state's length in both models; the cosine of what is read in it, by method."""
    states = [last_states(*pair, "choose") for pair in (source, target)]
    mine, theirs = (one.mean(0) for one in states)
    shares = [(one.mean(0).norm() / one.norm(dim=1).mean()).item() for one in states]
    read = {name: theirs @ one.projector1[0] for name, one in steers.items()}
    near = partial(torch.nn.functional.cosine_similarity, mine @ steer.projector1[0], dim=0)
    return {
        "share": shares[0],
        "other_share": shares[1],
        "cosine": {k: near(r).item() for k, r in read.items()},
    }


@functools.cache
@torch.no_grad()
def last_states(model: Any, tokenizer: Any, split: str) -> torch.Tensor:
    """Last hidden states after the neutral prompts of a split, [N, D]."""
    batch = su.encode(tokenizer, su.data.prompts("neutral", split), device=model.device)
    return su.hf.forward(model, **batch).last_hidden_state[:, -1].float()


def anchors_file(steer, steers, source, target, prompts, trained, old, *, sweep: bool) -> dict[str, Any]:
    """Gains by method and anchors, by texts, by steps of Adam, of the original, and of random steers."""
    beside = {"original, on its model": gain(steer, source), TRAINED: old["beside"][TRAINED]}
    beside |= {TRAINED: gain(trained, target)} if trained else {}
    random = [gain(random_like(steers["states"], seed), target) for seed in range(DRAWS)]
    found = {"mean": what_is_read(steer, steers, source, target), "beside": beside, "n": len(prompts)}
    found["random"] = random
    ways = {f"Adam, {n:,} steps": {"method": "learned", "n_steps": n} for n in LEARNED}
    ways["closed form"] = {"method": "closed_form"}
    by_way = {name: moved(steer, source, target, how, anchors=AUTHORS) for name, how in ways.items()}
    found["learned"] = {
        name: {"residual": one.card["transfer"]["residual"], "gain": gain(one, target)}
        for name, one in by_way.items()
    }
    if not sweep:
        return found | {name: old[name] for name in ("lines", "by_texts")}
    lines, by_texts, shared = {name: [] for name in WAYS}, [], len(shared_tokens(source[1], target[1]))
    for n in (1000, 2000, 4000, 16000, shared):
        for name, how in WAYS.items():
            one = moved(steer, source, target, how, anchors=n)
            facts = {"anchors": n, "residual": one.card["transfer"]["residual"]}
            lines[name].append(facts | {"gain": gain(one, target)})
    for n in (50, 100, 200, 400):
        one = su.transfer(steer, *source, *target, method="states", texts=news(n))
        facts = {"texts": n, "states": one.card["transfer"]["states"]}
        by_texts.append(facts | {"gain": gain(one, target)})
    return found | {"lines": lines, "by_texts": by_texts}


def gemma_file(steer, steers, source, target, prompts, trained, old) -> dict[str, Any]:
    """A few completions and, with a trained steer, the effects by judges on sampled texts."""
    found = {"examples": examples(steers, target, prompts[:SHOWN]), "n": len(prompts)}
    if trained is None:
        return found | {name: old[name] for name in ("effects", "date")}
    judges = {"VADER": su.judges.vader(), "MiniLM": su.judges.minilm_sentiment()}

    def row(one: Callable[[int], Any], pair: Pair, draws: int = 1) -> dict:
        write = partial(su.trials.trial, *pair, prompts, judges=judges, **SAMPLING)
        return effect(one, write, write(), draws)

    def at(one: su.LMSteer, pair: Pair) -> Callable[[int], su.LMSteer]:
        return lambda sign: at_goal(one, pair, sign)

    def drawn(sign: int) -> Callable[[int], su.LMSteer]:
        return lambda i: at_goal(random_like(steers["states"], i), target, sign)

    effects = {"original, on its model": row(at(steer, source), source)}
    effects |= {name: row(at(one, target), target) for name, one in ({TRAINED: trained} | steers).items()}
    return found | {"effects": effects | {RANDOM: row(drawn, target, draws=3)}}


def examples(steers: dict[str, su.LMSteer], target: Pair, prompts: Sequence[str]) -> dict[str, Any]:
    """The prompts and their completions by the target: unsteered, and at +v moved in two ways."""
    at = {"unsteered": None} | {name: at_goal(steers[name], target, 1, EXAMPLES) for name in SAMPLED}
    found = {k: su.generate(*target, prompts, steer=one, **SAMPLING) for k, one in at.items()}
    return {"nats": EXAMPLES, "prompt": list(prompts)} | {
        name: table["completion"].tolist() for name, table in found.items()
    }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--all", action="store_true", help="measure what takes long, too")
    given = parser.parse_args(arguments)
    source, target = su.load(SOURCE, dtype="float32"), su.load(TARGET, dtype="float32")
    steer = su.LMSteer.from_pretrained("sentiment", source[0])
    steers = {name: moved(steer, source, target, how) for name, how in WAYS.items()}
    trained = trained_on(target) if given.all else None
    prompts = su.data.prompts("neutral", "test")[:PROMPTS]
    about = {"model": su.models.model_id(source[0]), "second": su.models.model_id(target[0])}
    about |= {"date": str(pd.Timestamp.now().date()), "kl": GOAL}
    about["shared"] = steers["states"].card["transfer"]["shared words"]
    for name, measure in (("06_gemma", gemma_file), ("06_anchors", partial(anchors_file, sweep=given.all))):
        file = FIGURES / f"{name}.json"
        old = json.loads(file.read_text(encoding="utf-8"))
        found = about | measure(steer, steers, source, target, prompts, trained, old)
        text = json.dumps(found, indent=1, ensure_ascii=False, default=float)
        file.write_text(f"{text}\n", encoding="utf-8")
        print(f"{name} is written", flush=True)


if __name__ == "__main__":
    main()
