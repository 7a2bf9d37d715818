"""Analyse a text with a steer: which tokens favour one steer value over another, and which value fits best.

A steer changes the LM head only, so one pass of the unsteered model is enough.
Shapes: N tokens after BOS, T = N + 1 ids.
Source: Han et al., ACL 2024, section 4; the authors' `evidence_words` and `steer_analysis`.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.nn.functional import cross_entropy

from .. import hf, hooks
from ..checkpoint import last_states
from ..models import Model, Tokenizer, own_tokenizer, text_ids, token_ids
from ..types import require
from .steer import LMHeadSteer, Values
from .words import pieces

SHARPNESS = 10.0  # the authors' factor on losses, before the softmax over values, and on words' evidence


class Evidence(NamedTuple):
    """How much each token, or word, of a text favours one setting of a steer over another."""

    tokens: list[str]  # N; joined, they are the text
    evidence: np.ndarray  # [N]
    spans: list[tuple[int, int]]  # [start, end) over tokens


def evidence_spans(
    steer: LMHeadSteer,
    model: Model,
    tokenizer: Tokenizer,
    text: str,
    values_a: Values,
    values_b: Values,
    **limits: Any,
) -> Evidence:
    """log p(token | a) − log p(token | b) of each token, and the spans of tokens that favour a most.

    values_a, values_b: as for `steer.at`, for one text. limits: max_spans and max_length of `best_spans`.
    """
    ids = token_ids(tokenizer := own_tokenizer(model, tokenizer), text)
    of_a, of_b = losses_at(steer, model, ids, [values_a, values_b])
    return Evidence(pieces(tokenizer, ids[1:]), of_b - of_a, best_spans(of_b - of_a, **limits))


@hf.no_grad
def losses_at(
    steer: LMHeadSteer, model: Model, ids: Sequence[int], settings: Sequence[Values] | np.ndarray
) -> np.ndarray:
    """−log p of all tokens but the first at each of some steer values, [len(settings), N], by one pass.

    filter_p is left out: a token outside the nucleus tells nothing of the steer.
    """
    hooks.require_no_steer(model := hf.unwrapped(model))
    steers, found = [steer.at(values, filter_p=1.0) for values in settings], []
    if many := [tuple(one.values().shape) for one in steers if one.values().ndim > 1]:
        raise ValueError(f"one text takes one row of values, not {many[0]}")
    if len(ids) < 2:
        raise ValueError("an empty text has no token to explain: give at least one word")
    ((_, states),) = last_states(model, [ids])
    hidden, next_ids = (one.to(hf.input_device(model)) for one in (states[:-1], torch.tensor(ids[1:])))
    size = max(1, hf.LOGITS_AT_ONCE // len(hf.lm_head(model).weight))
    for one in steers:
        with one.on(model):
            logits = (hf.logits(model, part).float() for part in hidden.split(size))
            pairs = zip(logits, next_ids.split(size), strict=True)
            found.append(torch.cat([cross_entropy(*pair, reduction="none") for pair in pairs]))
    return torch.stack(found).double().cpu().numpy()


def best_spans(evidence: Sequence[float], max_spans: int = 4, max_length: int = 10) -> list[tuple[int, int]]:
    """The spans [start, end) of evidence [L] with the greatest sum, from left to right; each sum is above 0.

    They are at most max_spans, of max_length numbers at most, and do not touch; among equals, few and short.
    """
    sums = np.append(0.0, np.cumsum(evidence, dtype=float)).tolist()
    require(np.isfinite(sums).all(), "finite numbers", evidence=evidence)
    require(max_spans >= 1, "at least 1", max_spans=max_spans)
    require(max_length >= 1, "at least 1", max_length=max_length)
    before = [(0.0, [])] * len(sums)  # the best score of at most j spans in evidence[:end], and these spans
    for _ in range(max_spans):
        best = [(0.0, [])]
        for end in range(1, len(sums)):
            options = [before[end], best[-1]]
            for start in range(end - 1, max(end - max_length, 0) - 1, -1):
                score, spans = before[max(start - 1, 0)]
                options.append((score + sums[end] - sums[start], [*spans, (start, end)]))
            best.append(max(options, key=lambda option: option[0]))  # the first of equals
        before = best
    return before[-1][1]


class SteerAnalysis(NamedTuple):
    """How well each value of a steer explains a text."""

    values: np.ndarray  # [bins]
    losses: np.ndarray  # [bins], the mean over tokens of −log p
    distribution: np.ndarray  # [bins], softmax of −10 · loss
    best_value: float  # with the lowest loss
    unsteered_loss: float  # at value 0
    words: Evidence  # of each word, 10 · mean of log p(token | best value) − log p(token | 0); no spans


def steer_analysis(
    steer: LMHeadSteer,
    model: Model,
    tokenizer: Tokenizer,
    text: str | Sequence[int],
    *,
    dim: int = 0,
    min_value: float = -3,
    max_value: float = 3,
    bins: int = 7,
) -> SteerAnalysis:
    """Losses of a text at `bins` even values of steer `dim` from min_value to max_value; the others are 0.

    text: a string, or token ids with BOS in front.
    """
    if not (bins >= 2 and -math.inf < min_value < max_value < math.inf):
        raise ValueError(f"give 2 or more bins from low to high, not {bins} from {min_value} to {max_value}")
    require(0 <= dim < steer.num_steers, f"0 to {steer.num_steers - 1} ({', '.join(steer.names)})", dim=dim)
    (ids,) = text_ids(tokenizer := own_tokenizer(model, tokenizer), [text])
    values, tokens = np.linspace(min_value, max_value, bins), pieces(tokenizer, ids[1:])
    *steered, unsteered = losses_at(steer, model, ids, np.outer([*values, 0], np.eye(steer.num_steers)[dim]))
    losses = np.mean(steered, axis=1)
    best, fit = losses.argmin(), torch.from_numpy(-SHARPNESS * losses).softmax(dim=0).numpy()
    starts = [i for i, token in enumerate(tokens) if i == 0 or token[:1].isspace()]  # of words
    words = ["".join(tokens[i:j]) for i, j in zip(starts, [*starts[1:], None], strict=True)]
    gains = np.add.reduceat(unsteered - steered[best], starts) / np.diff([*starts, len(tokens)])
    evidence = Evidence(words, SHARPNESS * gains, [])
    return SteerAnalysis(values, losses, fit, float(values[best]), float(unsteered.mean()), evidence)
