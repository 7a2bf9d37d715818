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
    """Perplexity of each completion given its prompt under the plain model, [N]; NaN for an empty one.

    Prompt and completion are tokenised as one text; what counts are the tokens after their common beginning
    with the prompt's own. ValueError for different numbers of prompts and completions.
    """
    if isinstance(prompts, str) or isinstance(completions, str) or len(prompts) != len(completions):
        sizes = (
            f"{type(prompts).__name__} of {len(prompts)}, {type(completions).__name__} of {len(completions)}"
        )
        raise ValueError(f"give a prompt for each completion, in two lists of equal length, not {sizes}")
    found, pairs = [], list(zip(prompts, completions, strict=True))
    for i in range(0, len(pairs), batch_size):
        chunk = pairs[i : i + batch_size]
        rows = [token_ids(tokenizer, prompt + completion) for prompt, completion in chunk]
        starts = [
            _common(row, token_ids(tokenizer, prompt)) for row, (prompt, _) in zip(rows, chunk, strict=True)
        ]
        batch = pad(rows, rows[0][0], padding_side="right", device=model.device)
        with hf.unsteered():
            hidden = hf.forward(model, **batch).last_hidden_state
        for row, start, states in zip(rows, starts, hidden, strict=True):
            logits = hf.logits(model, states[start - 1 : len(row) - 1]).float()
            target = torch.tensor(row[start:], dtype=torch.long, device=logits.device)
            found.append(torch.nn.functional.cross_entropy(logits, target).exp().item())
    return np.array(found)


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """The length of the common beginning of two rows of token ids."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(one), len(other)))
