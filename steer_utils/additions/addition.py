"""Activation additions: add what the model thinks of one text to what it thinks of another.

Run a short text through the model and keep an activation, by default the residual stream that enters block l,
one row h_p of width D for each position p. While the model reads a prompt, add c · h_p to the row of the
prompt's token p. Two additions with opposite coefficients, c · (h⁺_p − h⁻_p), make an x-vector.

Turner et al. 2023, "Activation Addition: Steering Language Models Without Optimization", arXiv:2308.10248.
"""

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .. import hf
from ..models import model_id, own_tokenizer, pad, token_ids
from .vector import SteeringVector, hook_name, require_where, sum_rows


@dataclass(frozen=True)
class ActivationAddition:
    """A text (or its token ids, BOS included), a coefficient, a place in the network. Nothing is run yet.

    act_name: a TransformerLens hook name, "blocks.6.hook_resid_pre" (or resid_post, attn_out, mlp_out), or
    just the layer, 6. addition_location and positions: which tokens meet the rows, as for `SteeringVector`.
    res_stream_slice: columns of the width to add to, as a slice or its (start, stop).
    ValueError for both or neither of prompt and tokens, a coefficient that is not finite, an unknown hook.
    """

    coeff: float
    act_name: str | int
    prompt: str | None = None
    tokens: tuple[int, ...] | None = None
    addition_location: str = "front"
    positions: str = "own"
    res_stream_slice: slice | tuple[int | None, ...] | None = None

    def __post_init__(self) -> None:
        if (self.prompt is None) == (self.tokens is None):
            raise ValueError(
                f"give a prompt or tokens, one of the two, not prompt={self.prompt!r}, tokens={self.tokens!r}"
            )
        if self.tokens is not None and len(self.tokens) == 0:
            raise ValueError("tokens=() is no text: give at least the BOS id")
        if not math.isfinite(self.coeff):
            raise ValueError(f"coeff must be a finite number, not {self.coeff!r}")
        require_where(self.addition_location, self.positions)
        object.__setattr__(self, "act_name", hook_name(self.act_name))
        if self.tokens is not None:
            object.__setattr__(self, "tokens", tuple(int(token) for token in self.tokens))
        if (columns := self.res_stream_slice) is not None:  # Python before 3.12 cannot hash a slice
            columns = columns if isinstance(columns, slice) else slice(*columns)
            bounds = columns.start, columns.stop, columns.step
            object.__setattr__(self, "res_stream_slice", bounds)

    def token_ids(self, tokenizer: PreTrainedTokenizerBase | None) -> list[int]:
        """The token ids to run, BOS first."""
        if self.tokens is not None:
            return list(self.tokens)
        if tokenizer is None:
            raise ValueError(
                f"the addition of the text {self.prompt!r} needs a tokenizer: .on(model, tokenizer)"
            )
        return token_ids(tokenizer, self.prompt)

    def on(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None = None
    ) -> AbstractContextManager[None]:
        """While inside, every text that the model reads is steered; afterwards the model is as it was.

        Errors as for `SteeringVector.on`. The text is run once, on entering.
        """
        return apply_activation_additions(model, [self], tokenizer)

    def __mul__(self, factor: float) -> "ActivationAddition":
        return replace(self, coeff=self.coeff * factor)

    __rmul__ = __mul__

    def __neg__(self) -> "ActivationAddition":
        return replace(self, coeff=-self.coeff)

    def __add__(self, other: "ActivationAddition | AdditionSum") -> "AdditionSum":
        return AdditionSum((self,)) + other

    def __sub__(self, other: "ActivationAddition | AdditionSum") -> "AdditionSum":
        return AdditionSum((self,)) - other


@dataclass(frozen=True)
class AdditionSum:
    """Several additions as one steer, in the order given; iterating gives them back."""

    terms: tuple[ActivationAddition, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "terms", tuple(self.terms))

    def __iter__(self) -> Iterator[ActivationAddition]:
        return iter(self.terms)

    def on(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None = None
    ) -> AbstractContextManager[None]:
        """As for `ActivationAddition`; all texts are run in one pass."""
        return apply_activation_additions(model, self.terms, tokenizer)

    def __mul__(self, factor: float) -> "AdditionSum":
        return AdditionSum(tuple(factor * term for term in self.terms))

    __rmul__ = __mul__

    def __neg__(self) -> "AdditionSum":
        return -1 * self

    def __add__(self, other: "ActivationAddition | AdditionSum") -> "AdditionSum":
        if isinstance(other, ActivationAddition):
            other = AdditionSum((other,))
        return AdditionSum(self.terms + other.terms) if isinstance(other, AdditionSum) else NotImplemented

    def __sub__(self, other: "ActivationAddition | AdditionSum") -> "AdditionSum":
        return self + -other


@contextmanager
def apply_activation_additions(
    model: PreTrainedModel,
    additions: Iterable[ActivationAddition],
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> Iterator[None]:
    """While inside, all the additions are on; their texts run in one pass, and each hook adds their sum.

    model: a transformers model or a TransformerLens `TransformerBridge`.
    """
    with ExitStack() as stack:
        for vector in steering_vectors(model, tokenizer, additions):
            stack.enter_context(vector.on(model))
        yield


def get_x_vector(
    prompt1: str,
    prompt2: str,
    coeff: float,
    act_name: str | int,
    model: PreTrainedModel | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    pad_method: str | None = None,
    custom_pad_id: int | None = None,
    **where: Any,
) -> tuple[ActivationAddition, ActivationAddition]:
    """The pair (prompt1, +coeff) and (prompt2, −coeff).

    pad_method: None leaves the lengths as they are; else the shorter prompt is padded as by `padded`, which
    needs the tokenizer, or a `TransformerBridge` as the model, which has one. where: addition_location,
    positions, res_stream_slice of both.
    """
    plus = ActivationAddition(coeff, act_name, prompt1, **where)
    pair = plus, replace(-plus, prompt=prompt2)
    if pad_method is None:
        return pair
    return padded(pair, own_tokenizer(model, tokenizer), pad_method, custom_pad_id)


def padded(
    additions: Iterable[ActivationAddition],
    tokenizer: PreTrainedTokenizerBase | None,
    pad_method: str = "tokens_right",
    custom_pad_id: int | None = None,
) -> tuple[ActivationAddition, ...]:
    """The additions with all texts as long as the longest; they then hold token ids.

    pad_method: "tokens_right" pads behind the text, "tokens_left" between BOS and text. custom_pad_id: what
    to pad with (a space works best), by default the tokenizer's pad token. ValueError for another method,
    or without a pad token.
    """
    additions = list(additions)
    if pad_method not in ("tokens_right", "tokens_left"):
        raise ValueError(f"pad_method must be None, 'tokens_right' or 'tokens_left', not {pad_method!r}")
    if tokenizer is None and any(addition.tokens is None for addition in additions):
        raise ValueError(f"pad_method={pad_method!r} counts tokens, so it needs tokenizer=…")
    pad_id = tokenizer.pad_token_id if custom_pad_id is None and tokenizer else custom_pad_id
    if pad_id is None:
        raise ValueError("the tokenizer has no pad token; give custom_pad_id, e.g. the id of a space")
    rows = [addition.token_ids(tokenizer) for addition in additions]
    length = max(map(len, rows))
    rows = [_filled(row, length, pad_id, pad_method) for row in rows]
    return tuple(replace(one, prompt=None, tokens=row) for one, row in zip(additions, rows, strict=True))


@torch.no_grad()
def steering_vectors(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    additions: Iterable[ActivationAddition],
) -> list[SteeringVector]:
    """Run the additions' texts in one right-padded pass of the plain model; sum them at each place.

    At the front of one hook, rows are added from position 0, and the shorter ones end earlier. Elsewhere only
    texts of equal length share their tokens, so that each length has a vector of its own.
    ValueError for a token id that the model does not have, and for a layer beyond it.
    """
    additions = list(additions)
    if not additions:
        return []
    terms = defaultdict(list)
    for addition, rows in zip(additions, activations(model, tokenizer, additions), strict=True):
        where = addition.act_name, addition.addition_location, addition.positions
        length = None if where[1:] == ("front", "own") else len(rows)
        terms[where, length].append(addition.coeff * _sliced(rows, addition.res_stream_slice))
    name = model_id(model)
    return [SteeringVector(act, sum_rows(rows), at, on, name) for ((act, at, on), _), rows in terms.items()]


def activations(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    additions: Sequence[ActivationAddition],
) -> list[Tensor]:
    """What the plain model computes at each addition's hook as it reads the text: rows [S_i, D] of each."""
    tokenizer, model = own_tokenizer(model, tokenizer), hf.unwrapped(model)
    texts = [addition.token_ids(tokenizer) for addition in additions]
    _require_ids(texts, model)
    row = {text: i for i, text in enumerate(dict.fromkeys(map(tuple, texts)))}  # a text is run once
    batch = pad(list(row), texts[0][0], padding_side="right", device=model.device)
    found = hf.activations(model, **batch, act_names={addition.act_name for addition in additions})
    pairs = zip(additions, map(tuple, texts), strict=True)
    return [found[one.act_name][row[text], : len(text)] for one, text in pairs]


def relative_norms(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    additions: Iterable[ActivationAddition],
    prompt: str,
) -> Tensor:
    """Norm of the additions' sum over the norm of what they are added to, at each position both have, [S].

    The paper calls it the steering vector's magnitude relative to the prompt's. ValueError unless all are
    added at the front of one hook.
    """
    vectors = steering_vectors(model, tokenizer, additions)
    places = [(one.act_name, one.addition_location, one.positions) for one in vectors]
    if [place[1:] for place in places] != [("front", "own")]:
        raise ValueError(f"give additions at the front of one hook, not at {places}")
    (vector,) = vectors
    (rows,) = activations(model, tokenizer, [ActivationAddition(1, vector.act_name, prompt)])
    length = min(len(rows), len(vector.rows))
    return vector.rows[:length].norm(dim=1) / rows[:length].norm(dim=1)


def make_room(
    text: str | Sequence[int],
    additions: Iterable[ActivationAddition],
    tokenizer: PreTrainedTokenizerBase | None,
    custom_pad_id: int,
) -> list[int]:
    """The text's ids with so many pads after BOS that the additions meet these and none of its own tokens."""
    ids = token_ids(tokenizer, text) if isinstance(text, str) else list(text)
    longest = max(len(addition.token_ids(tokenizer)) for addition in additions)
    return [ids[0], *[custom_pad_id] * (longest - 1), *ids[1:]]


# --- tokens and columns -----------------------------------------------------------------------------------


def _filled(ids: list[int], length: int, pad_id: int, pad_method: str) -> tuple[int, ...]:
    """Ids with BOS in front, filled to `length` behind the text or between BOS and text."""
    filling = [pad_id] * (length - len(ids))
    return (*ids, *filling) if pad_method == "tokens_right" else (ids[0], *filling, *ids[1:])


def _sliced(rows: Tensor, columns: tuple[int | None, ...] | None) -> Tensor:
    """Rows [S, D] with zeros outside the given columns."""
    if columns is None:
        return rows
    kept = torch.zeros_like(rows)
    if kept[:, slice(*columns)].numel() == 0:
        raise ValueError(f"res_stream_slice={columns} holds none of the {rows.shape[1]} columns")
    kept[:, slice(*columns)] = rows[:, slice(*columns)]
    return kept


def _require_ids(texts: Sequence[Sequence[int]], model: PreTrainedModel) -> None:
    size = model.get_input_embeddings().num_embeddings
    for token in {token for text in texts for token in text}:
        if not 0 <= token < size:
            raise ValueError(f"token id {token} is not in the model's vocabulary, which ends at {size - 1}")
