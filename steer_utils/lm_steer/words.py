"""What an LM-Steer does to words: its strongest directions, and the words that lie far along them.

With the singular value decomposition ε M = Σ_i σ_i u_i v_iᵀ, a hidden state h gains v Σ_i σ_i (h·u_i) v_i at
steer value v, and the logit of a word with the output embedding e gains v Σ_i σ_i (h·u_i) (v_i·e). So words
with a large v_i·e become likelier where h·u_i is positive, and those at the other end where it is negative.
That orders directions as if every h were as likely. Given hidden states that occur, they are ordered by what
these gain: the decomposition of H ε M, whose v_i are the principal axes of the gains.
Shapes: N positions, D width, R rank, V vocabulary, K = min(D, R) directions.
Source: Han et al., ACL 2024, section 4, and the authors' pca_analysis.py, which left the side open.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from pandas import DataFrame
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .. import hf
from ..models import encode, own_tokenizer
from .steer import LMSteer
from .vocabulary import is_word, token_texts

BATCH = 16  # of texts read at once, and, times 1024, of embeddings


class Directions(NamedTuple):
    """ε M_s as u diag(values) vᵀ: what it reads, how much it multiplies, and what it writes."""

    u: Tensor  # [D, K], in columns
    values: Tensor  # [K], descending
    v: Tensor  # [D, K]; the largest entry of each column is positive, as its sign is arbitrary


def directions(steer: LMSteer, s: int = 0, hidden: Tensor | None = None) -> Directions:
    """The singular value decomposition of ε M_s, from two QR decompositions and one SVD of size K.

    hidden: last hidden states [N, D]; then v and the values come from H ε M_s / √N instead, so that σ_i² is
    the mean square of what a state gains along v_i. The columns of u are no longer orthogonal, ε M_s still is
    u diag(values) vᵀ wherever the states lie, and directions along which none of them gains are left out.
    On the CPU, in float32. ValueError for a steer that is not there.
    """
    if not 0 <= s < steer.num_steers:
        raise ValueError(f"s must be 0 to {steer.num_steers - 1} ({', '.join(steer.names)}), not {s!r}")
    left, right = (tensor[s].cpu().double() for tensor in steer.tensors().values())
    (q1, r1), (q2, r2) = (torch.linalg.qr(tensor) for tensor in (left, right))
    if hidden is None:
        u, values, vt = torch.linalg.svd(r1 @ r2.T)
        u, v = q1 @ u, q2 @ vt.T
    else:
        read = torch.linalg.qr(hidden.cpu().double() @ q1, mode="r").R / len(hidden) ** 0.5
        _, values, vt = torch.linalg.svd(read @ r1 @ r2.T, full_matrices=False)
        kept = values > 1e-9 * values[0]
        values, v = values[kept], q2 @ vt.T[:, kept]
        u = left @ (right.T @ v) / values
    signs = v.gather(0, v.abs().argmax(dim=0)[None]).sign()
    return Directions((u * signs).float(), (steer.epsilon * values).float(), (v * signs).float())


@torch.no_grad()
def word_lists(
    steer: LMSteer,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    s: int = 0,
    *,
    texts: Sequence[str] | None = None,
    num_directions: int = 10,
    num_words: int = 20,
    whole_words: bool = True,
) -> DataFrame:
    """The words at both ends of each direction of steer s, two rows a direction.

    texts: neutral ones; their last hidden states tell which end a positive steer value makes likelier, side
    "more" or "less"; without them the sides are "high" and "low". whole_words: only tokens that are a space
    and three letters or more, one of those that differ in case; otherwise all tokens, as they are written.

    Columns: direction, singular_value (ε included), push (σ_i times the mean of h·u_i: what a word with
    e·v_i = 1 gains at steer value 1, NaN without texts), agreement (the share of the texts' positions where
    h·u_i has the sign of its mean: near a half, the side means little), side, words (a list) and score (their
    mean e·v_i). ValueError if the steer does not fit, if no token is a whole word, or for a number below 1.
    """
    model, tokenizer = hf.unwrapped(model), own_tokenizer(model, tokenizer)
    steer.require_fit(model)
    if min(num_directions, num_words) < 1:
        raise ValueError(f"give 1 or more directions and words, not {num_directions} and {num_words}")
    found = Directions(*(tensor[..., :num_directions] for tensor in directions(steer, s)))
    read = None if texts is None else _readings(model, tokenizer, texts, found.u)
    scores, texts_of = word_scores(model, found.v), token_texts(tokenizer)
    keys = _whole_words(texts_of) if whole_words else texts_of
    rows = []
    for i, value in enumerate(found.values.tolist()):
        push, agreement = (torch.nan, torch.nan) if read is None else _push(read[:, i], value)
        facts = {"direction": i, "singular_value": value, "push": push, "agreement": agreement}
        for side, sign in _sides(push):
            ids = top(sign * scores[:, i], keys, num_words)
            words = [texts_of[j][whole_words:] for j in ids]  # a whole word without its space
            rows.append(facts | {"side": side, "words": words, "score": scores[ids, i].mean().item()})
    return DataFrame(rows)


def map_of_words(
    steer: LMSteer,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    words: Sequence[str] | None = None,
    s: int = 0,
    *,
    num_words: int = 20,
) -> DataFrame:
    """Where words lie along the two strongest directions of steer s: columns word, direction 0, direction 1.

    words: each a token of the model, with a space in front or without; by default the `num_words` at each end
    of both directions. ValueError for a steer of rank 1, and for words of several tokens.
    """
    model, tokenizer = hf.unwrapped(model), own_tokenizer(model, tokenizer)
    if steer.rank < 2:
        raise ValueError(f"a map needs two directions; this steer has rank {steer.rank}")
    if words is None:
        lists = word_lists(steer, model, tokenizer, s, num_directions=2, num_words=num_words)["words"]
        words = list(dict.fromkeys(word for row in lists for word in row))
    ids = _ids_of(tokenizer, words)
    scores = word_scores(model, directions(steer, s).v[:, :2])[ids]
    return DataFrame({"word": list(words), "direction 0": scores[:, 0], "direction 1": scores[:, 1]})


@torch.no_grad()
def word_scores(model: PreTrainedModel, v: Tensor) -> Tensor:
    """e·v_i of every output embedding with directions v [D, K], [V, K], on the CPU in float32."""
    parts = hf.lm_head(hf.unwrapped(model)).weight.split(1024 * BATCH)
    return torch.cat([(part.float() @ v.to(part.device)).cpu() for part in parts])


def top(scores: Tensor, keys: dict[int, str], count: int) -> list[int]:
    """The `count` ids with the highest scores [V] of those with a key; of several with one key, the first."""
    ids = torch.tensor([i for i in keys if i < len(scores)])
    found: dict[str, int] = {}
    for i in ids[scores[ids].argsort(descending=True, stable=True)].tolist():
        if len(found) == count:
            break
        found.setdefault(keys[i], i)
    return list(found.values())


def _readings(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], u: Tensor
) -> Tensor:
    """h·u_i at every position of the texts under the plain model, [N, K]."""
    found = []
    for i in range(0, max(1, len(texts)), BATCH):
        batch = encode(tokenizer, texts[i : i + BATCH], device=model.device)
        with hf.unsteered():
            hidden = hf.forward(model, **batch).last_hidden_state
        found.append(hidden[batch["attention_mask"].bool()].float().cpu() @ u)
    return torch.cat(found)


def _push(readings: Tensor, value: float) -> tuple[float, float]:
    """σ_i times the mean of h·u_i [N], and the share of them that have its sign."""
    mean = readings.mean()
    return value * mean.item(), (readings.sign() == mean.sign()).float().mean().item()


def _sides(push: float) -> list[tuple[str, int]]:
    """The names of the two ends, with the sign that the scores have there."""
    if push != push:  # NaN: nothing was read
        return [("high", 1), ("low", -1)]
    sign = 1 if push > 0 else -1
    return [("more", sign), ("less", -sign)]


def _whole_words(texts: dict[int, str]) -> dict[int, str]:
    """{id: text in lower case} of the tokens that are whole words; ValueError if none is."""
    words = {i: text.lower() for i, text in texts.items() if is_word(text)}
    if not words:
        raise ValueError("no token of this tokenizer is a whole word: give whole_words=False")
    return words


def _ids_of(tokenizer: PreTrainedTokenizerBase, words: Sequence[str]) -> list[int]:
    """The id of each word, with a space in front if there is such a token."""
    ids = {text: i for i, text in reversed(token_texts(tokenizer).items())}
    found = [ids.get(f" {word}", ids.get(word)) for word in words]
    if unknown := [word for word, i in zip(words, found, strict=True) if i is None]:
        raise ValueError(f"{', '.join(map(repr, unknown))}: not one token of this model; leave them out")
    return found
