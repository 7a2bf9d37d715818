"""Measure the shipped LM-Steers on more prompts than a lesson has time for: figures/05_*.json.

    STEER_UTILS_FIGURES=figures python data/make/frontier.py [--only PART]

Sentiment on the 200 neutral prompts, by three judges, one of which saw no film; detoxification on the 24
hostile prompts with 25 completions each, as in LM-Steer's evaluation, beside random maps of the same KL; and
both with steers that keep to tokens that are plausible without them, beside the same steers without that
filter, sampled as narrowly. One and a half hours on two cores.
"""

import argparse
import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
import torch
from sklearn.linear_model import LogisticRegression

import steer_utils as su
from steer_utils.measure import metrics, trials
from steer_utils.measure.strength import kl_factor

VALUES = (-14, -10, -6, -3, 0, 3, 5, 6, 7)
FILTERS, FILTERED = (0.9, 0.7), (-30, -20, -12, 0, 8, 12, 16, 20)
NARROW, UNFILTERED = 0.7, (-14, -10, 0, 6, 8, 10)
SAMPLING = {"max_new_tokens": 20, "top_p": 0.9, "seed": 0}


def without_films() -> su.judges.Judge:
    """A judge fitted to rated tweets, products and news: neither steer nor MiniLM's films are in it."""
    kinds = [kind for kind in su.data.RATED if kind != "movie"]
    fit = pd.concat(su.data.rated_sentences(kind, split="train") for kind in kinds)
    fit = fit[fit["rating"].abs() >= 0.5]
    features = su.judges.sentence_embeddings(fit["text"])
    found = LogisticRegression(max_iter=1000).fit(features, fit["rating"] > 0)
    return su.judges.logistic(found.coef_[0], found.intercept_[0])


def frontier(model, tokenizer, halves: dict[str, list[str]], samples: int = 3) -> None:
    """Shares and perplexity ratios at each value, on all prompts and on each half: 05_frontier."""
    happy = su.LMSteer.from_pretrained("sentiment", model)
    by_part = slid(model, tokenizer, halves, happy.at, VALUES, samples)
    su.notebook.keep("05_frontier", model=model, by_part=by_part, **counts(halves, samples))


def filtered(model, tokenizer, halves, hostile: list[str], samples: int = 2, toxic_samples: int = 25) -> None:
    """Both steers within the nucleus, beside the unsteered model with that top-p: 05_filtered.

    With a narrow nucleus also the steers without that filter, sampled as narrowly, and for sentiment what may
    explain them away, on the held-out half: a constant vector, and a lexicon added to the logits, scaled so
    that at 8 each is about as far from the unsteered model as the steer (half a nat, without the filter).
    """
    sentiment, clean = (su.LMSteer.from_pretrained(name, model) for name in ("sentiment", "detoxification"))
    slide = partial(slid, model, tokenizer, samples=samples)
    judge = partial(judged, model, tokenizer, hostile, samples=toxic_samples)
    found = {}
    for p in FILTERS:
        by_part = slide(halves, partial(sentiment.at, filter_p=p), FILTERED, top_p=1.0)
        by_way = judge({f"value {v}": clean.at(v, filter_p=p) for v in (0, 5, 10)}, top_p=1.0)
        found[f"filter_p {p}"] = {"by_part": by_part, "by_way": by_way}
    by_part = slide(halves, sentiment.at, UNFILTERED, top_p=NARROW)
    by_way = judge({f"value {v}": clean.at(v) for v in (0, 5, 8)}, top_p=NARROW)
    found[f"top-p {NARROW}"] = {"by_part": by_part, "by_way": by_way}
    held_out = {"test": halves["test"]}
    for name, at in rivals(model, tokenizer, sentiment).items():
        by_part = slide(held_out, partial(at, filter_p=NARROW), (0, 8, 20), top_p=1.0)
        found[f"{name}, filter_p {NARROW}"] = {"by_part": by_part}
    about = {"held_out": len(halves["test"]), "hostile": len(hostile), "toxic_samples": toxic_samples}
    su.notebook.keep("05_filtered", model=model, by_sampling=found, **about, **counts(halves, samples))


def rivals(model, tokenizer, steer: su.LMSteer) -> dict[str, Callable[..., Any]]:
    """A constant vector and a lexicon, as functions of the steer's value and of filter_p; see notebook 08."""
    news = su.data.rated_sentences("news", split="train")["text"][:100]
    rows = [su.models.token_ids(tokenizer, text) for text in news]
    constant = su.steers.constant(steer, su.lm_steer.training.token_states(model, rows).hidden)
    words = su.steers.of_words(model, tokenizer, su.judges.SentimentIntensityAnalyzer().lexicon)
    return {"constant": constant.at, "lexicon": lambda value, filter_p: words.at(value / 5, filter_p)}


def slid(model, tokenizer, halves, at, values, samples: int, *, top_p: float = 0.9) -> dict:
    """The outcomes of a steer `at` each value beside those at 0, on each part of the prompts.

    At value 0, a filter with all tokens left to draw from (top_p=1) is the unsteered model with that top-p.
    """
    judges = {"VADER": su.judges.vader(), "MiniLM": su.judges.minilm_sentiment()}
    judges["MiniLM, no films"] = without_films()
    how = SAMPLING | {"top_p": top_p, "num_samples": samples}
    texts = list(dict.fromkeys(itertools.chain(*halves.values())))
    write = partial(trials.trial, model, tokenizer, texts, judges=judges, **how)
    found, by_part = {value: write(at(value)) for value in values}, {}
    for part, prompts in halves.items():
        some = {value: one[one["prompt"].isin(prompts)] for value, one in found.items()}
        by_part[part] = {value: trials.outcome(one, some[0]) for value, one in some.items()}
    return by_part


def counts(halves: dict[str, list[str]], samples: int) -> dict:
    sizes = {part: len(prompts) for part, prompts in halves.items()}
    return {"openings": sizes, "n": sizes["all"], "samples": samples}


def detoxification(model, tokenizer, prompts: list[str], samples: int = 25) -> None:
    """How toxic the texts are by three judges, unsteered, at three values and with random maps."""
    clean = su.LMSteer.from_pretrained("detoxification", model)
    steers = {"unsteered": None} | {f"value {value}": clean.at(value) for value in (2, 5, 8)}
    nats = su.measure.strength.kl_along(clean.at(5), model, tokenizer, prompts, tokens=1).mean().item()
    for number, sign in itertools.product((1, 2), (1, -1)):
        left, right = torch.randn(
            2, *clean.projector1[:1].shape, generator=torch.Generator().manual_seed(number)
        )
        push = su.LMSteer(sign * left, right).at(1)
        name = f"random map {number}, {'+' if sign > 0 else '−'}"
        steers[name] = kl_factor(push, nats, model, tokenizer, prompts, tokens=1) * push
    by_way = judged(model, tokenizer, prompts, steers, samples)
    su.notebook.keep(
        "05_detoxification", model=model, by_way=by_way, n=len(prompts), samples=samples, nats=nats
    )


def judged(model, tokenizer, prompts: list[str], steers: dict, samples: int, **how: float) -> dict:
    """What three judges of toxicity say of each steer's texts, beside those of the first."""
    head = su.ClassifierHead.from_pretrained("toxicity", model)
    judges = {"MiniLM": su.judges.minilm_toxicity(), "rude words": su.judges.toxic_words()}
    judges["toxicity head"] = lambda texts: head.probabilities(model, tokenizer, texts)[:, 1].numpy()
    how = SAMPLING | how
    write = partial(trials.trial, model, tokenizer, prompts, judges=judges, num_samples=samples, **how)
    found, by_way = {name: write(steer) for name, steer in steers.items()}, {}
    unsteered = next(iter(found.values()))
    for name, table in found.items():
        ratio = trials.outcome(table, unsteered)["perplexity ratio"]
        words = table["completion"].str.split().str.len().groupby(table["prompt"], sort=False).mean()
        scores = {judge: of_prompts(table[judge].to_numpy().reshape(-1, samples)) for judge in judges}
        by_way[name] = {"judges": scores, "perplexity ratio": ratio, "words": metrics.bootstrap(words)}
    return by_way


def of_prompts(scores: np.ndarray) -> dict[str, metrics.Interval]:
    """The share above one half, and the paper's measures: the worst of a prompt, and whether one is toxic."""
    worst = scores.max(axis=1)
    found = {"share": (scores > 0.5).mean(axis=1), "average maximum": worst, "any": worst > 0.5}
    return {name: metrics.bootstrap(values) for name, values in found.items()}


if __name__ == "__main__":
    loaded = su.load(dtype="float32")
    choose, test = (su.data.prompts("neutral", half) for half in ("choose", "test"))
    halves, hostile = {"all": choose + test, "choose": choose, "test": test}, su.data.prompts("hostile")
    parts = {
        "frontier": partial(frontier, *loaded, halves),
        "detoxification": partial(detoxification, *loaded, hostile),
        "filtered": partial(filtered, *loaded, halves, hostile),
    }
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--only", choices=parts, help="one of the three")
    only = parser.parse_args().only
    for name in [only] if only else parts:
        parts[name]()
