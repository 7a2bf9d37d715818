"""Read a text with a steer: which tokens speak for one steer value against another, and which value fits.

A steer changes the output head only. So the transformer reads the text once, without it; each value then
costs one evaluation of the head, and any range of values two, since word scores are affine in the value:
what lies between the ends is interpolated, which, unlike a slope times a value, adds no rounding error.
Shapes: N tokens after BOS, T = N + 1 ids, V vocabulary. All log probabilities in nats.
Source: Han et al., ACL 2024, section 4, and `evidence_words` and `steer_analysis` of the authors' program.
"""

import html
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .. import hf
from ..models import own_tokenizer, token_ids
from .head_steer import HeadSteer, Values
from .spans import best_spans
from .vocabulary import pieces, word_starts

SHARPNESS = 10.0  # the authors' factor on losses, before the softmax over values, and on words' evidence
LOGITS_AT_ONCE = 2**23  # so that memory does not grow with the text


class Evidence(NamedTuple):
    """How much each token, or word, of a text speaks for one setting of a steer against another."""

    tokens: list[str]  # N texts, which together are the text
    evidence: np.ndarray  # [N]
    spans: list[tuple[int, int]]  # [start, end) over tokens


def evidence_spans(
    steer: HeadSteer,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    text: str,
    values_a: Values,
    values_b: Values,
    *,
    max_spans: int = 4,
    max_length: int = 10,
) -> Evidence:
    """log p(token | a) − log p(token | b) of each token, and the spans of tokens that speak most for a.

    values_a, values_b: as for `steer.at`, one row each. max_spans, max_length: as for `best_spans`; spans do
    not touch, and are none where every token speaks for b. ValueError for a text without a token.
    """
    tokenizer = own_tokenizer(model, tokenizer)
    ids = token_ids(tokenizer, text)
    evidence = token_evidence(steer, model, ids, values_a, values_b)
    return Evidence(pieces(tokenizer, ids[1:]), evidence, best_spans(evidence, max_spans, max_length))


@torch.no_grad()
def token_evidence(
    steer: HeadSteer, model: PreTrainedModel, ids: Sequence[int], values_a: Values, values_b: Values
) -> np.ndarray:
    """The same for token ids [T], from the second on, [N]: the first is BOS, or just the first."""
    model = hf.unwrapped(model)
    steers = [_for_one_text(steer, values) for values in (values_a, values_b)]
    found = []
    for hidden, following in _read(model, ids):
        scores = [_scores(one, model, hidden) for one in steers]
        of_a, of_b = (_log_probs(hf.capped(model, given), following) for given in scores)
        found.append(of_a - of_b)
    return torch.cat(found).double().cpu().numpy()


class SteerAnalysis(NamedTuple):
    """How well each value of a steer explains a text."""

    values: np.ndarray  # [bins]
    losses: np.ndarray  # [bins], the mean over tokens of −log p
    distribution: np.ndarray  # [bins], softmax of 10 · (mean of the losses − loss); its sum is 1
    best_value: float  # with the least loss
    unsteered_loss: float  # at value 0
    words: Evidence  # of each word, 10 · mean of log p(token | best value) − log p(token | 0); no spans


def steer_analysis(
    steer: HeadSteer,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    text: str,
    *,
    dim: int = 0,
    min_value: float = -3,
    max_value: float = 3,
    bins: int = 7,
) -> SteerAnalysis:
    """Losses of a text at `bins` values of steer `dim`, evenly from min_value to max_value; the others at 0.

    ValueError for a steer that is not there, a range without length, fewer than 2 bins, or an empty text.
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
    steer: HeadSteer, model: PreTrainedModel, ids: Sequence[int], dim: int, values: np.ndarray
) -> np.ndarray:
    """−log p of all tokens but the first at each value of steer `dim`, last at 0, [len(values) + 1, N]."""
    model, values = hf.unwrapped(model), np.append(values, 0.0)
    if not 0 <= dim < steer.num_steers:
        raise ValueError(f"dim must be 0 to {steer.num_steers - 1} ({', '.join(steer.names)}), not {dim!r}")
    unit = torch.eye(steer.num_steers)[dim]
    low, high = float(values.min()), float(values.max())
    ends = [steer.at(end * unit) for end in (low, high)]
    shares = (values - low) / (high - low)
    found = []
    for hidden, following in _read(model, ids):
        at_low, at_high = (_scores(one, model, hidden) for one in ends)
        scores = (hf.capped(model, at_low.lerp(at_high, share)) for share in shares.tolist())
        found.append(torch.stack([-_log_probs(one, following) for one in scores]))
    return torch.cat(found, dim=1).double().cpu().numpy()


def analysed(values: np.ndarray, losses: np.ndarray, tokens: list[str]) -> SteerAnalysis:
    """What token losses at each value and at 0, [len(values) + 1, N], say of values and of words."""
    *means, unsteered = losses.mean(axis=1)
    best, sharp = int(np.argmin(means)), np.exp(SHARPNESS * (np.min(means) - means))
    starts = word_starts(tokens)
    words = ["".join(tokens[i:j]) for i, j in zip(starts, [*starts[1:], None], strict=True)]
    evidence = SHARPNESS * means_between(losses[-1] - losses[best], starts)
    return SteerAnalysis(
        values=values,
        losses=np.array(means),
        distribution=sharp / sharp.sum(),
        best_value=float(values[best]),
        unsteered_loss=float(unsteered),
        words=Evidence(words, evidence, []),
    )


def means_between(numbers: np.ndarray, starts: Sequence[int]) -> np.ndarray:
    """The mean of the numbers from each start to the next, or to the end."""
    return np.add.reduceat(numbers, starts) / np.diff([*starts, len(numbers)])


# --- one pass, and evaluations of the head ----------------------------------------------------------------


def _read(model: PreTrainedModel, ids: Sequence[int]) -> Iterator[tuple[Tensor, Tensor]]:
    """Last hidden states [n, D] of the plain model, and the token after each [n], in parts."""
    if len(ids) < 2:
        raise ValueError("an empty text has no token to explain: give at least one word")
    row = torch.tensor([list(ids)], device=model.device)
    with hf.unsteered():
        hidden = hf.forward(model, row, torch.ones_like(row)).last_hidden_state[0, :-1]
    size = max(1, LOGITS_AT_ONCE // len(hf.lm_head(model).weight))
    yield from zip(hidden.split(size), row[0, 1:].to(hidden.device).split(size), strict=True)


def _for_one_text(steer: HeadSteer, values: Values) -> HeadSteer:
    """The steer at these values; ValueError if they are for several texts."""
    steer = steer.at(values)
    if steer.values().ndim != 1:
        raise ValueError(f"one text takes one row of values, not {tuple(steer.values().shape)}")
    return steer


def _scores(steer: HeadSteer, model: PreTrainedModel, hidden: Tensor) -> Tensor:
    """Steered word scores [n, V] of last hidden states [n, D], in float32, before the soft cap."""
    with steer.on(model):
        return hf.lm_head(model)(hidden).float()


def _log_probs(logits: Tensor, ids: Tensor) -> Tensor:
    """log p of ids [n] under logits [n, V], [n]."""
    ids = ids.to(logits.device)[:, None]
    return logits.gather(1, ids)[:, 0] - logits.logsumexp(dim=-1)


# --- as a notebook shows it -------------------------------------------------------------------------------


class Html(str):
    """HTML as a string, which a notebook renders."""

    def _repr_html_(self) -> str:
        return str(self)


def highlight(evidence: Evidence) -> Html:
    """The text, tokens with positive evidence on blue, with negative on orange, and spans underlined.

    The stronger the evidence, of the strongest in this text, the less transparent the colour, which so goes
    with dark text on light and with light on dark; a token's number shows when the mouse is on it.
    """
    strongest = max(np.abs(evidence.evidence).max(initial=0), np.finfo(float).tiny)
    before, after = {start for start, _ in evidence.spans}, {end - 1 for _, end in evidence.spans}
    parts = []
    for i, (token, number) in enumerate(zip(evidence.tokens, evidence.evidence.tolist(), strict=True)):
        shown = _coloured(token, number, 0.55 * abs(number) / strongest)
        parts.append(f"{'<u>' if i in before else ''}{shown}{'</u>' if i in after else ''}")
    # Notebooks would typeset what stands between two dollar signs as mathematics.
    return Html(
        f'<div class="tex2jax_ignore" style="white-space:pre-wrap;line-height:1.8">{"".join(parts)}</div>'
    )


def _coloured(token: str, number: float, opacity: float) -> str:
    """A token on blue or orange, which colour-blind readers can tell apart, with its number as a title."""
    red, green, blue = (0, 114, 178) if number > 0 else (213, 94, 0)
    style = f"background:rgba({red},{green},{blue},{opacity:.2f})"
    return f'<span style="{style}" title="{number:+.2f}">{html.escape(token)}</span>'
