"""Analyse a text with a steer: which tokens favour one steer value over another, and which value fits best.

A steer changes the LM head only, so one pass of the unsteered model is enough. Each value then costs one
evaluation of the LM head, and a range of values two: word scores are affine in the value, so those between
the ends are interpolated (a slope times a value would add rounding error).
Shapes: N tokens after BOS, T = N + 1 ids, V vocabulary. Log probabilities are in nats.
Source: Han et al., ACL 2024, section 4, and `evidence_words` and `steer_analysis` of the authors' program.
"""

import html
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .. import hf
from ..models import own_tokenizer, token_ids
from .steer import LMHeadSteer, Values
from .words import pieces, word_starts

SHARPNESS = 10.0  # the authors' factor on losses, before the softmax over values, and on words' evidence
LOGITS_AT_ONCE = 2**23  # so that memory does not grow with the text


class Evidence(NamedTuple):
    """How much each token, or word, of a text favours one setting of a steer over another."""

    tokens: list[str]  # N; joined, they are the text
    evidence: np.ndarray  # [N]
    spans: list[tuple[int, int]]  # [start, end) over tokens


def evidence_spans(
    steer: LMHeadSteer,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    text: str,
    values_a: Values,
    values_b: Values,
    *,
    max_spans: int = 4,
    max_length: int = 10,
) -> Evidence:
    """log p(token | a) − log p(token | b) of each token, and the spans of tokens that favour a most.

    values_a, values_b: as for `steer.at`, for one text. max_spans, max_length: as for `best_spans`; there are
    no spans if every token favours b. ValueError for a text without a token.
    """
    tokenizer = own_tokenizer(model, tokenizer)
    ids = token_ids(tokenizer, text)
    evidence = token_evidence(steer, model, ids, values_a, values_b)
    return Evidence(pieces(tokenizer, ids[1:]), evidence, best_spans(evidence, max_spans, max_length))


@torch.no_grad()
def token_evidence(
    steer: LMHeadSteer, model: PreTrainedModel, ids: Sequence[int], values_a: Values, values_b: Values
) -> np.ndarray:
    """The same for token ids [T], from the second on, [N]."""
    model, found = hf.unwrapped(model), []
    steers = [steer.at(values) for values in (values_a, values_b)]
    if many := [one for one in steers if one.values().ndim > 1]:
        raise ValueError(f"one text takes one row of values, not {tuple(many[0].values().shape)}")
    for hidden, next_ids in _last_states(model, ids):
        a, b = (_log_probs(hf.capped(model, _scores(one, model, hidden)), next_ids) for one in steers)
        found.append(a - b)
    return torch.cat(found).double().cpu().numpy()


def best_spans(
    evidence: ArrayLike, max_spans: int = 4, max_length: int = 10, *, gap: int = 1
) -> list[tuple[int, int]]:
    """The spans [start, end) of evidence [L] with the greatest sum, from left to right; each sum is above 0.

    max_spans: number of spans at most. max_length: of each. gap: numbers between two spans at least; with 0
    they may touch. Among equally good choices it takes few spans that end early and start late. ValueError
    for numbers that are not finite or not [L], max_spans or max_length below 1, or a negative gap.
    """
    evidence = np.asarray(evidence, dtype=float)
    if evidence.ndim != 1 or not np.isfinite(evidence).all():
        raise ValueError(f"evidence must be finite numbers in a row, [L], not {evidence!r}")
    for name, value, least in (("max_spans", max_spans, 1), ("max_length", max_length, 1), ("gap", gap, 0)):
        if value < least:
            raise ValueError(f"{name} must be at least {least}, not {value!r}")
    sums = np.append(0, evidence.cumsum()).tolist()
    before = [(0.0, [])] * len(sums)  # the best score of at most j spans in evidence[:end], and these spans
    for _ in range(max_spans):
        best = [(0.0, [])]
        for end in range(1, len(sums)):
            options = [before[end], best[-1]]
            for start in range(end - 1, max(end - max_length, 0) - 1, -1):
                score, spans = before[max(start - gap, 0)]
                options.append((score + sums[end] - sums[start], [*spans, (start, end)]))
            best.append(max(options, key=lambda option: option[0]))  # the first of equals
        before = best
    return before[-1][1]


class SteerAnalysis(NamedTuple):
    """How well each value of a steer explains a text."""

    values: np.ndarray  # [bins]
    losses: np.ndarray  # [bins], the mean over tokens of −log p
    distribution: np.ndarray  # [bins], softmax of 10 · (mean of the losses − loss)
    best_value: float  # with the lowest loss
    unsteered_loss: float  # at value 0
    words: Evidence  # of each word, 10 · mean of log p(token | best value) − log p(token | 0); no spans


def steer_analysis(
    steer: LMHeadSteer,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    text: str,
    *,
    dim: int = 0,
    min_value: float = -3,
    max_value: float = 3,
    bins: int = 7,
) -> SteerAnalysis:
    """Losses of a text at `bins` even values of steer `dim` from min_value to max_value; the others are 0.

    ValueError for a steer that does not exist, an empty range, fewer than 2 bins, or an empty text.
    """
    if not (-math.inf < min_value < max_value < math.inf and bins >= 2):
        raise ValueError(
            f"give at least 2 bins from a value to a higher one, not {bins} from {min_value} to {max_value}"
        )
    tokenizer = own_tokenizer(model, tokenizer)
    ids, values = token_ids(tokenizer, text), np.linspace(min_value, max_value, bins)
    return analysed(values, token_losses(steer, model, ids, dim, values), pieces(tokenizer, ids[1:]))


@torch.no_grad()
def token_losses(
    steer: LMHeadSteer, model: PreTrainedModel, ids: Sequence[int], dim: int, values: np.ndarray
) -> np.ndarray:
    """−log p of all tokens but the first at each value of steer `dim`, last at 0, [len(values) + 1, N]."""
    model, values = hf.unwrapped(model), np.append(values, 0.0)
    if not 0 <= dim < steer.num_steers:
        raise ValueError(f"dim must be 0 to {steer.num_steers - 1} ({', '.join(steer.names)}), not {dim!r}")
    unit, low, high = torch.eye(steer.num_steers)[dim], float(values.min()), float(values.max())
    shares, found = (values - low) / (high - low), []
    for hidden, next_ids in _last_states(model, ids):
        at_low, at_high = (_scores(steer.at(end * unit), model, hidden) for end in (low, high))
        scores = (hf.capped(model, at_low.lerp(at_high, share)) for share in shares.tolist())
        found.append(torch.stack([-_log_probs(one, next_ids) for one in scores]))
    return torch.cat(found, dim=1).double().cpu().numpy()


def analysed(values: np.ndarray, losses: np.ndarray, tokens: list[str]) -> SteerAnalysis:
    """The analysis of token losses at each value and, last, at 0, [len(values) + 1, N]."""
    *means, unsteered = losses.mean(axis=1)
    best, sharp = int(np.argmin(means)), np.exp(SHARPNESS * (np.min(means) - means))
    starts = word_starts(tokens)
    words = ["".join(tokens[i:j]) for i, j in zip(starts, [*starts[1:], None], strict=True)]
    evidence = Evidence(words, SHARPNESS * means_between(losses[-1] - losses[best], starts), [])
    distribution = sharp / sharp.sum()
    return SteerAnalysis(
        values, np.array(means), distribution, float(values[best]), float(unsteered), evidence
    )


def means_between(numbers: np.ndarray, starts: Sequence[int]) -> np.ndarray:
    """The mean of the numbers from each start to the next, or to the end."""
    return np.add.reduceat(numbers, starts) / np.diff([*starts, len(numbers)])


def _last_states(model: PreTrainedModel, ids: Sequence[int]) -> Iterator[tuple[Tensor, Tensor]]:
    """The unsteered model's last hidden states [n, D] and the ids that follow [n], in parts."""
    if len(ids) < 2:
        raise ValueError("an empty text has no token to explain: give at least one word")
    batch = torch.tensor([list(ids)], device=model.device)
    with hf.unsteered():
        hidden = hf.forward(model, batch, torch.ones_like(batch)).last_hidden_state[0, :-1]
    size = max(1, LOGITS_AT_ONCE // len(hf.lm_head(model).weight))
    yield from zip(hidden.split(size), batch[0, 1:].to(hidden.device).split(size), strict=True)


def _scores(steer: LMHeadSteer, model: PreTrainedModel, hidden: Tensor) -> Tensor:
    """Steered word scores [n, V] of last hidden states [n, D], in float32, before a softcap."""
    with steer.on(model):
        return hf.lm_head(model)(hidden).float()


def _log_probs(logits: Tensor, ids: Tensor) -> Tensor:
    """log p of ids [n] under logits [n, V], [n]."""
    return logits.gather(1, ids.to(logits.device)[:, None])[:, 0] - logits.logsumexp(dim=-1)


class Html(str):
    """HTML as a string, which a notebook renders."""

    def _repr_html_(self) -> str:
        return str(self)


def highlight(evidence: Evidence) -> Html:
    """The text with positive evidence on blue, negative on orange, and the spans underlined.

    The colour's opacity is the evidence divided by the strongest in this text, so it suits dark and light
    themes. A tooltip shows a token's number.
    """
    strongest = max(np.abs(evidence.evidence).max(initial=0), np.finfo(float).tiny)
    starts, ends = {start for start, _ in evidence.spans}, {end - 1 for _, end in evidence.spans}
    parts = []
    for i, (token, number) in enumerate(zip(evidence.tokens, evidence.evidence.tolist(), strict=True)):
        colour = "0,114,178" if number > 0 else "213,94,0"  # colour-blind readers can tell these apart
        style = f"background:rgba({colour},{0.55 * abs(number) / strongest:.2f})"
        shown = f'<span style="{style}" title="{number:+.2f}">{html.escape(token)}</span>'
        parts.append(f"{'<u>' if i in starts else ''}{shown}{'</u>' if i in ends else ''}")
    # "tex2jax_ignore": a notebook would typeset what stands between two dollar signs as mathematics.
    style = "white-space:pre-wrap;line-height:1.8"
    return Html(f'<div class="tex2jax_ignore" style="{style}">{"".join(parts)}</div>')
