"""Numbers about texts: topic words, perplexity, and intervals for all of them."""

import re
from collections.abc import Collection, Sequence
from typing import NamedTuple

import numpy as np
import torch
from scipy import stats
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from . import hf
from .models import pad, token_ids


def word_count(text: str, words: Collection[str], *, case_sensitive: bool = False) -> int:
    """How many of the text's words (runs of letters, digits and "_") are in `words`."""
    fold = str if case_sensitive else str.lower
    wanted = {fold(word) for word in words}
    return sum(word in wanted for word in re.findall(r"\w+", fold(text)))


class Interval(NamedTuple):
    """A mean and the interval that holds it."""

    mean: float
    low: float
    high: float

    def __format__(self, spec: str) -> str:
        return f"{self.mean:{spec}} [{self.low:{spec}}, {self.high:{spec}}]"


def bootstrap(values: Sequence[float], *, level: float = 0.95, seed: int = 0) -> Interval:
    """Mean of independent values, one for each prompt, with its percentile bootstrap interval.

    Samples of one prompt resemble each other, so average them first. ValueError for fewer than two values.
    """
    values = np.asarray(values, dtype=float)
    if len(values) < 2:
        raise ValueError(f"an interval needs at least two prompts, not {len(values)}")
    found = stats.bootstrap(
        (values,), np.mean, confidence_level=level, method="percentile", n_resamples=10_000, rng=seed
    )
    return Interval(float(values.mean()), *map(float, found.confidence_interval))


@torch.no_grad()
def perplexity(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    completions: Sequence[str],
    *,
    batch_size: int = 64,
) -> np.ndarray:
    """Perplexity of each completion given its prompt under the plain model, [N]; NaN for an empty one."""
    found = []
    for i in range(0, len(prompts), batch_size):
        starts = [token_ids(tokenizer, prompt) for prompt in prompts[i : i + batch_size]]
        ends = [token_ids(tokenizer, text)[1:] for text in completions[i : i + batch_size]]
        rows = [start + end for start, end in zip(starts, ends, strict=True)]
        batch = pad(rows, rows[0][0], padding_side="right", device=model.device)
        with hf.unsteered():
            hidden = hf.forward(model, **batch).last_hidden_state
        for row, start, states in zip(rows, starts, hidden, strict=True):
            logits = hf.output_head(model)(states[len(start) - 1 : len(row) - 1]).float()
            target = torch.tensor(row[len(start) :], device=logits.device)
            found.append(torch.nn.functional.cross_entropy(logits, target).exp().item())
    return np.array(found)
