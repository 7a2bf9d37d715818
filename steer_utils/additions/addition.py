"""Activation additions: steer with the activations that the model itself computes for a short text.

Run a text and keep one activation, h_s at each position s; by default the residual stream entering block l.
When the model then processes a prompt, add c · h_s to the same activation at position s. Two additions with
opposite coefficients, c · (h⁺_s − h⁻_s), make an x-vector. Source: Turner et al. 2023, arXiv:2308.10248.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch

from .. import hf, hooks
from ..checkpoint import weights_of
from ..generation import Arithmetic, all_on
from ..models import Model, Tokenizer, batch_of, model_id, own_tokenizer, require_readable, token_ids
from ..types import require, several
from .vector import SteeringVector, hook_name, require_where


class _Additions(Arithmetic):
    """What one addition and a sum of additions share: arithmetic on their `terms`."""

    sums_as: ClassVar[str] = "activation additions"
    terms: "tuple[ActivationAddition, ...]"

    @contextmanager
    def on(self, model: Model, tokenizer: Tokenizer = None) -> Iterator[None]:
        """Run all texts in one pass, then steer inside the context. Errors as in `SteeringVector.on`."""
        with all_on(_vectors(model, tokenizer, self.terms), model, tokenizer):
            yield

    def __add__(self, other: "_Additions") -> "AdditionSum":
        return AdditionSum((*self.terms, *other.terms)) if isinstance(other, _Additions) else NotImplemented


@dataclass(frozen=True)
class ActivationAddition(_Additions):
    """A text, a coefficient and the activation to add to. Creating one does not run the model.

    ValueError unless either prompt or tokens is given, coeff is finite, and hook and location are known.
    """

    coeff: float
    act_name: str | int  # "blocks.6.hook_resid_pre" (resid_post, attn_out, mlp_out), or just the layer, 6
    prompt: str | None = None  # the text, or
    tokens: Sequence[int] | None = None  # its token ids with BOS
    addition_location: str = "front"  # which tokens are steered; see `SteeringVector`
    positions: str = "own"
    res_stream_slice: slice | Sequence[int | None] | None = None  # which columns of the width

    def __post_init__(self) -> None:
        tokens = None if self.tokens is None else tuple(map(int, self.tokens))
        if (self.prompt is None) == (tokens is None) or tokens == ():
            raise ValueError(f"give a prompt or tokens, not prompt={self.prompt!r}, tokens={tokens!r}")
        require(math.isfinite(self.coeff), "a finite number", coeff=self.coeff)
        require_where(self.addition_location, self.positions)
        object.__setattr__(self, "act_name", hook_name(self.act_name))
        object.__setattr__(self, "tokens", tokens)
        if isinstance(columns := self.res_stream_slice, slice):  # Python before 3.12 cannot hash a slice
            columns = columns.start, columns.stop, columns.step
        require(columns is None or 1 <= len(columns) <= 3, "(start, stop, step)", res_stream_slice=columns)
        object.__setattr__(self, "res_stream_slice", None if columns is None else tuple(columns))

    @property
    def terms(self) -> "tuple[ActivationAddition, ...]":
        return (self,)

    def token_ids(self, tokenizer: Tokenizer) -> list[int]:
        """Token ids of the text, BOS first. Raises ValueError if the prompt needs a tokenizer."""
        if self.tokens is not None:
            return list(self.tokens)
        if tokenizer is None:
            raise ValueError(f"the addition of {self.prompt!r} needs the tokenizer: .on(model, tokenizer)")
        return token_ids(tokenizer, self.prompt)

    def __mul__(self, factor: float) -> "ActivationAddition":
        return replace(self, coeff=self.coeff * factor)


Additions = several(lambda one: isinstance(one, ActivationAddition), "a list of ActivationAdditions")


@dataclass(frozen=True)
class AdditionSum(_Additions):
    """Several additions as one steer. Iterating gives them in the order given."""

    terms: Additions

    def __iter__(self) -> Iterator[ActivationAddition]:
        return iter(self.terms)

    def __mul__(self, factor: float) -> "AdditionSum":
        return AdditionSum(tuple(term * factor for term in self.terms))


def apply_activation_additions(
    model: Model, additions: Additions, tokenizer: Tokenizer = None
) -> AbstractContextManager[None]:
    """Steer a model or a TransformerLens `TransformerBridge` with several additions inside a context."""
    return AdditionSum(tuple(additions)).on(model, tokenizer)


def get_x_vector(
    prompt1: str,
    prompt2: str,
    coeff: float,
    act_name: str | int,
    model: Model | None = None,
    tokenizer: Tokenizer = None,
    pad_method: str | None = None,
    custom_pad_id: int | None = None,
    **where: Any,
) -> tuple[ActivationAddition, ActivationAddition]:
    """The pair of additions (prompt1, +coeff) and (prompt2, −coeff).

    pad_method: None keeps both lengths; "tokens_right" and "tokens_left" pad the shorter prompt as `padded`
    does. Padding needs the tokenizer, or as `model` a `TransformerBridge`, which has one. where: settings of
    both additions, such as positions. ValueError for a custom_pad_id without a pad_method.
    """
    if pad_method is None and custom_pad_id is not None:
        raise ValueError(f"custom_pad_id={custom_pad_id} pads nothing: give a pad_method as well")
    plus = ActivationAddition(coeff, act_name, prompt1, **where)
    pair = plus, replace(-plus, prompt=prompt2)
    tokenizer = own_tokenizer(model, tokenizer)
    return pair if pad_method is None else padded(pair, tokenizer, pad_method, custom_pad_id)


def padded(
    additions: Additions,
    tokenizer: Tokenizer,
    pad_method: str = "tokens_right",
    custom_pad_id: int | None = None,
) -> tuple[ActivationAddition, ...]:
    """Pad all texts to the length of the longest; the additions returned hold token ids.

    pad_method: "tokens_right" pads after the text, "tokens_left" between BOS and the text. custom_pad_id: the
    id to pad with, by default the tokenizer's pad token; the id of a space works best. Raises ValueError for
    an unknown method, or if there is no pad token.
    """
    known = pad_method in ("tokens_right", "tokens_left")
    require(known, "None, 'tokens_right' or 'tokens_left'", pad_method=pad_method)
    additions = list(additions)
    texts = [addition.token_ids(tokenizer) for addition in additions]
    pad_id = tokenizer.pad_token_id if custom_pad_id is None and tokenizer else custom_pad_id
    if pad_id is None:
        raise ValueError("the tokenizer has no pad token; give custom_pad_id, e.g. the id of a space")
    for ids in texts:
        start = len(ids) if pad_method == "tokens_right" else 1
        ids[start:start] = [pad_id] * (max(map(len, texts)) - len(ids))
    return tuple(replace(one, prompt=None, tokens=ids) for one, ids in zip(additions, texts, strict=True))


def steering_vectors(model: Model, tokenizer: Tokenizer, additions: Additions) -> list[SteeringVector]:
    """Run the texts; rows that are added to the same tokens of one hook are summed into one vector.

    All run in one unsteered pass. ValueError for an unknown token id or layer, and a slice without columns.
    """
    found, weights = _vectors(model, tokenizer, additions), weights_of(model)  # as long as a short text
    return [replace(one, weights=weights) for one in found]


@hf.no_grad
def _vectors(model: Model, tokenizer: Tokenizer, additions: Additions) -> list[SteeringVector]:
    if not (additions := list(additions)):
        return []
    tokenizer, model = own_tokenizer(model, tokenizer), hf.unwrapped(model)
    name = model_id(model)
    texts = [tuple(one.token_ids(tokenizer)) for one in additions]
    require_readable(model, texts)
    number = {text: i for i, text in enumerate(dict.fromkeys(texts))}  # equal texts run once
    batch = batch_of(model, list(number), "right")
    seen = hooks.activations(model, **batch, act_names={one.act_name for one in additions})
    found: dict[tuple, SteeringVector] = {}
    for one, text in zip(additions, texts, strict=True):
        rows, columns = seen[one.act_name][number[text], : len(text)], slice(*one.res_stream_slice or (None,))
        if rows[:, columns].numel() == 0:
            raise ValueError(f"res_stream_slice={one.res_stream_slice}: none of the {len(rows.T)} columns")
        scaled = torch.zeros_like(rows)
        scaled[:, columns] = one.coeff * rows[:, columns]
        vector = SteeringVector(one.act_name, scaled, one.addition_location, one.positions, name)
        found[vector.where] = found[vector.where] + vector if vector.where in found else vector
    return list(found.values())
