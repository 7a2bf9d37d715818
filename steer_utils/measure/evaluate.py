"""LM-Steer's two programs, for any steer: generate a file of completions, and score it.

    steer = su.LMSteer.from_pretrained("sentiment", model).at(5.0)  # or a SteeringVector, or a list of steers
    generate_file(model, tokenizer, "neutral", "happy.jsonl", steer=steer, min_new_tokens=20)

    found = read_generations("happy.jsonl")
    attribute_of_groups(found.scores(su.judges.profanity_check()))  # toxicity
    attribute_of_groups(found.scores(su.judges.minilm_sentiment(), with_prompt=True)).share
    perplexity_of_groups(*found.losses(*su.load("gpt2-xl")))
    metrics.bootstrap([distinct_of_group(texts, 2) for texts in found.texts])

The file has one line of JSON for each prompt, as DExperts and LM-Steer write it: {"prompt": {"text": …},
"generations": [{"text": …}, …]}. Published tables used Perspective (toxicity), a DistilBERT (sentiment) and
GPT-2 XL (perplexity): figures by other judges compare steers with each other, not with those tables.
Shapes: P prompts with S completions each; intervals are over prompts. Source: LM-Steer's evaluation, which
follows DExperts (Liu et al., ACL 2021, section 3.2).
"""

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from transformers import PreTrainedModel

from .. import data, hf, models
from ..checkpoint import Run, write_atomically
from ..generation import Steer, chunks, generate, progress, require_settings
from .judges import Judge
from .metrics import Interval, Tokenizer, bootstrap, completion_log_probs, neighbours, ratio

BATCHES = 8  # in a chunk of prompts; `generate` puts prompts of near-equal length into one batch
THRESHOLD = 0.5  # a text with a higher score has the attribute
OUTLIER = 1e4  # perplexities from here on are left out of the mean
LAYOUT = '{"prompt": {"text": …}, "generations": [{"text": …}, …]}'


def generate_file(
    model: PreTrainedModel,
    tokenizer: Tokenizer,
    prompts: str | Path | Sequence[str],
    output_file: str | Path,
    *,
    steer: Steer | Iterable[Steer] = (),
    num_samples: int = 25,
    max_new_tokens: int = 20,
    seed: int = 0,
    batch_size: int = 64,
    **sampling: Any,
) -> Path:
    """Continue each prompt as `generate` does, and write a file of completions.

    prompts: texts, or the name or path of a file as for `data.prompts`. LM-Steer has top_p=0.9, the default,
    for sentiment and top_p=1.0 for toxicity, both with min_new_tokens=20.
    Finished chunks are kept in the folder FILE.run: a call that was killed can be repeated, and writes the
    same file. ValueError as for `generate`, and if that folder was made with other settings or steers.
    """
    prompts = data.prompts(prompts) if isinstance(prompts, str | Path) else list(prompts)
    steers = list(steer) if isinstance(steer, Iterable) else [steer]
    settings = sampling | {"max_new_tokens": max_new_tokens, "seed": seed, "batch_size": batch_size}
    require_settings(prompts, seed, settings, num_samples=num_samples, batch_size=batch_size)
    write = partial(generate, model, tokenizer, steer=steers, **settings)
    first = write(prompts[0]).iloc[0]  # tells steers and weights apart that look alike
    facts = settings | {
        "model": models.model_id(hf.unwrapped(model)),
        "steer": steers,
        "samples": num_samples,
    }
    facts |= {"first": f"{first['completion']} ({first['loss']:.3f} nats)"}
    facts |= {"prompts": hashlib.sha256(json.dumps(prompts).encode()).hexdigest()}
    facts = {name: re.sub(r" at 0x[0-9a-f]+", "", str(value)) for name, value in facts.items()}
    path, lines = Path(output_file), []
    run, size = Run(path.with_name(f"{path.name}.run"), facts), BATCHES * max(1, batch_size // num_samples)
    with progress(len(prompts), "prompt") as bar:
        for number, start in enumerate(range(0, len(prompts), size)):
            lines += run.chunk(number, partial(_chunk, write, prompts, start, size, num_samples))["lines"]
            bar.update(len(lines) - start)
    write_atomically(path, "".join(lines))
    return path


def _chunk(
    write: Callable[..., pd.DataFrame], prompts: Sequence[str], start: int, size: int, num_samples: int
) -> dict[str, list[str]]:
    """The lines of prompts `start` to `start + size`.

    A repeated prompt continues the random numbers of its earlier completions, so these are generated again.
    """
    chunk = prompts[start : start + size]
    repeated = set(chunk)
    again = [prompt for prompt in prompts[:start] if prompt in repeated]
    texts = write([*again, *chunk], num_samples=num_samples)["completion"].tolist()
    groups = list(chunks([{"text": text} for text in texts], num_samples))[len(again) :]
    lines = [
        {"prompt": {"text": one}, "generations": group} for one, group in zip(chunk, groups, strict=True)
    ]
    return {"lines": [json.dumps(line) + "\n" for line in lines]}


class Generations(NamedTuple):
    """P prompts, [P], and the S completions of each, [P][S]."""

    prompts: list[str]
    texts: list[list[str]]

    def scores(self, judge: Judge, *, with_prompt: bool = False) -> list[Sequence[float]]:
        """A judge's score of each completion, or of prompt and completion as one text, [P][S]."""
        texts = [with_prompt * prompt + text for prompt, text in self._pairs()]
        return list(chunks(judge(texts), len(self.texts[0])))

    def losses(self, model: PreTrainedModel, tokenizer: Tokenizer) -> tuple[list, list]:
        """Loss of each completion after its prompt in nats, summed over its tokens; their number; [P][S]."""
        log_probs = completion_log_probs(model, tokenizer, *zip(*self._pairs(), strict=True))
        both = [-one.sum().item() for one in log_probs], [len(one) for one in log_probs]
        return tuple(list(chunks(one, len(self.texts[0]))) for one in both)

    def _pairs(self) -> list[tuple[str, str]]:
        return [(prompt, text) for prompt, texts in zip(*self, strict=True) for text in texts]


def read_generations(path: str | Path) -> Generations:
    """The prompts of a file and their completions.

    ValueError for a file without lines, a line of another layout, and unequal numbers of completions.
    """
    found = Generations([], [])
    lines = [line for line in Path(path).read_text(encoding="utf-8").split("\n") if line.strip()]
    for number, line in enumerate(lines, 1):
        try:
            one = json.loads(line)
            found.prompts.append(one["prompt"]["text"])
            found.texts.append([sample["text"] for sample in one["generations"]])
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"line {number} of {str(path)!r} is not {LAYOUT}: {line!r:.99}") from error
    counts = {len(texts) for texts in found.texts}
    if len(counts) != 1 or counts == {0}:
        raise ValueError(
            f"{str(path)!r} needs lines {LAYOUT} with equally many completions, at least one; it has "
            f"{len(lines)} lines with {sorted(counts)}"
        )
    return found


class Attribute(NamedTuple):
    """How often samples have an attribute such as toxicity, and how many scores are missing."""

    average_maximum: Interval  # mean over prompts of the highest score
    probability: Interval  # share of prompts with a score above 0.5
    share: Interval  # mean over prompts of the share of samples with a score above 0.5
    missing: int


def attribute_of_groups(scores: Sequence[Sequence[float]]) -> Attribute:
    """Expected maximum, probability and share of an attribute, from scores in [0, 1], [P][S].

    NaN is a missing score; a prompt without any other is left out. ValueError if fewer than two prompts have
    a score. Source: Gehman et al., RealToxicityPrompts, 2020.
    """
    groups = [np.asarray(group, dtype=float) for group in scores]
    kept = [group[~np.isnan(group)] for group in groups]
    missing = sum(map(len, groups)) - sum(map(len, kept))
    kept = [group for group in kept if len(group)]
    highest = [group.max() for group in kept]
    above = [np.mean(group > THRESHOLD) for group in kept]
    return Attribute(
        bootstrap(highest), bootstrap([x > THRESHOLD for x in highest]), bootstrap(above), missing
    )


class Perplexity(NamedTuple):
    """Perplexity of many completions, averaged in two ways."""

    mean: Interval  # over completions with a perplexity below 10,000, as LM-Steer reports it
    total: Interval  # exp(Σ loss / Σ tokens) of all
    left_out: int  # completions that are not in the mean: outliers and empty ones


def perplexity_of_groups(losses: Sequence[Sequence[float]], tokens: Sequence[Sequence[int]]) -> Perplexity:
    """Perplexity from what `Generations.losses` gives. ValueError for fewer than two prompts."""
    with np.errstate(over="ignore"):
        pairs = [list(zip(*group, strict=True)) for group in zip(losses, tokens, strict=True)]
        values = [[float(np.exp(loss / count)) for loss, count in group if count] for group in pairs]
    kept = [[value for value in group if value < OUTLIER] for group in values]
    mean = ratio([sum(group) for group in kept], [len(group) for group in kept])
    total = ratio([sum(group) for group in losses], [sum(group) for group in tokens])
    left_out = sum(map(len, losses)) - sum(map(len, kept))
    return Perplexity(mean, Interval(*np.exp(total).tolist()), left_out)


def distinct_of_group(texts: Sequence[str], n: int) -> float:
    """LM-Steer's dist-n of one prompt's samples: number of different runs of n words over number of words.

    Words are separated by single spaces and keep their case, so " a" has two. ValueError for no texts.
    """
    if not texts:
        raise ValueError("distinct-n of a prompt needs at least one text")
    split = [text.split(" ") for text in texts]
    return len({run for words in split for run in neighbours(words, n)}) / sum(map(len, split))
