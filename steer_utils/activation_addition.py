"""Activation additions: add what the model thinks of one text to what it thinks of another.

Run a short text through the model and keep the residual stream that enters block l, one row h_p of width D
for each position p. While the model reads a prompt, add c · h_p to the row of the prompt's token p. Two
additions with opposite coefficients, c · (h⁺_p − h⁻_p), make an x-vector.

Turner et al. 2023, "Activation Addition: Steering Language Models Without Optimization", arXiv:2308.10248.
"""

import math
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from numbers import Integral

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from . import hf
from .models import pad, token_ids


@dataclass(frozen=True)
class ActivationAddition:
    """A text (or its token ids, BOS included), a coefficient, a place in the network. Nothing is run yet.

    act_name: a TransformerLens hook name such as "blocks.6.hook_resid_pre", or just the layer, 6.
    ValueError for both or neither of prompt and tokens, a coefficient that is not finite, an unknown hook.
    """

    coeff: float
    act_name: str | int
    prompt: str | None = None
    tokens: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if (self.prompt is None) == (self.tokens is None):
            raise ValueError(
                f"give a prompt or tokens, one of the two, not prompt={self.prompt!r}, tokens={self.tokens!r}"
            )
        if self.tokens is not None and len(self.tokens) == 0:
            raise ValueError("tokens=() is no text: give at least the BOS id")
        if not math.isfinite(self.coeff):
            raise ValueError(f"coeff must be a finite number, not {self.coeff!r}")
        object.__setattr__(self, "act_name", _hook_name(self.act_name))
        if self.tokens is not None:
            object.__setattr__(self, "tokens", tuple(int(token) for token in self.tokens))

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


@dataclass(frozen=True, eq=False)
class SteeringVector:
    """Rows [S, D] to add to the residual stream at a hook: row p to the token at position p (BOS is 0)."""

    act_name: str | int
    rows: Tensor

    def __post_init__(self) -> None:
        object.__setattr__(self, "act_name", _hook_name(self.act_name))
        if not self.rows.isfinite().all():
            raise ValueError("the rows hold inf or NaN: lower the coefficient, or load with dtype='float32'")

    @contextmanager
    def on(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None = None) -> Iterator[None]:
        """While inside, every text that the model reads is steered; afterwards the model is as it was.

        ValueError for a layer beyond the model or rows of another width than its residual stream, and inside
        for a text shorter than the rows. A vector needs no tokenizer; it takes one as every steer does.
        """
        if self.rows.ndim != 2 or self.rows.shape[1] != hf.width(model):
            raise ValueError(
                f"rows of shape {tuple(self.rows.shape)} do not fit; this model takes [S, {hf.width(model)}]"
            )
        rows = self.rows.to(model.device, model.dtype)
        edit = partial(add_rows, rows=rows)
        with hf.edit_block_input(model, _layer(self.act_name), edit, shortest=len(rows)):
            yield


@contextmanager
def apply_activation_additions(
    model: PreTrainedModel,
    additions: Sequence[ActivationAddition],
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> Iterator[None]:
    """While inside, all the additions are on; their texts run in one pass, and each hook adds their sum."""
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
) -> tuple[ActivationAddition, ActivationAddition]:
    """The pair (prompt1, +coeff) and (prompt2, −coeff).

    pad_method: None leaves the lengths as they are. "tokens_right" pads the shorter prompt behind its text,
    "tokens_left" between BOS and text, with `custom_pad_id` (a space works best) or the tokenizer's pad
    token; padding needs the tokenizer. ValueError for another method or without a pad token. `model` is taken
    as everywhere and not needed.
    """
    if pad_method is None:
        return ActivationAddition(coeff, act_name, prompt1), ActivationAddition(-coeff, act_name, prompt2)
    if pad_method not in ("tokens_right", "tokens_left"):
        raise ValueError(f"pad_method must be None, 'tokens_right' or 'tokens_left', not {pad_method!r}")
    if tokenizer is None:
        raise ValueError(f"pad_method={pad_method!r} counts tokens, so it needs tokenizer=…")
    pad_id = tokenizer.pad_token_id if custom_pad_id is None else custom_pad_id
    if pad_id is None:
        raise ValueError("the tokenizer has no pad token; give custom_pad_id, e.g. the id of a space")
    plus, minus = (token_ids(tokenizer, prompt) for prompt in (prompt1, prompt2))
    length = max(len(plus), len(minus))
    plus, minus = (_padded(ids, length, pad_id, pad_method) for ids in (plus, minus))
    added = ActivationAddition(coeff, act_name, tokens=plus)
    return added, ActivationAddition(-coeff, act_name, tokens=minus)


def steering_vectors(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, additions: Sequence[ActivationAddition]
) -> list[SteeringVector]:
    """Run the additions' texts in one right-padded pass of the plain model; sum them at each hook.

    Rows of additions at one hook are added from position 0; the shorter ones end earlier.
    """
    if not additions:
        return []
    texts = [addition.token_ids(tokenizer) for addition in additions]
    batch = pad(texts, texts[0][0], padding_side="right", device=model.device)
    inputs = hf.block_inputs(model, **batch, layers={_layer(addition.act_name) for addition in additions})
    terms = defaultdict(list)
    for i, (addition, text) in enumerate(zip(additions, texts, strict=True)):
        terms[addition.act_name].append(addition.coeff * inputs[_layer(addition.act_name)][i, : len(text)])
    return [SteeringVector(name, sum_rows(rows)) for name, rows in terms.items()]


# --- tensors ----------------------------------------------------------------------------------------------


def add_rows(hidden: Tensor, positions: Tensor, rows: Tensor) -> Tensor:
    """hidden [B,T,D] + rows [S,D] at positions [B,T], where they are below S; elsewhere hidden as it is."""
    nothing = rows.new_zeros(1, rows.shape[1])  # what the index S adds and, for padding, −1
    with_zero = torch.cat([rows, nothing])
    return hidden + with_zero[positions.clamp(max=len(rows))]


def sum_rows(terms: Sequence[Tensor]) -> Tensor:
    """Sum of matrices [S_i, D], each filled with zero rows to the longest, [max S_i, D]."""
    return pad_sequence(list(terms)).sum(dim=1)


# --- names and padding ------------------------------------------------------------------------------------


def _hook_name(act_name: str | int) -> str:
    """The name of a hook, of which a layer is the short form. ValueError for an unknown one."""
    name = f"blocks.{act_name}.hook_resid_pre" if isinstance(act_name, Integral) else act_name
    _layer(name)
    return name


def _layer(act_name: str) -> int:
    """The block l of "blocks.{l}.hook_resid_pre"."""
    match = re.fullmatch(r"blocks\.(\d+)\.hook_resid_pre", str(act_name))
    if match is None:
        raise ValueError(f"unknown hook {act_name!r}: give a layer such as 6, or 'blocks.6.hook_resid_pre'")
    return int(match[1])


def _padded(ids: list[int], length: int, pad_id: int, pad_method: str) -> tuple[int, ...]:
    """Ids with BOS in front, filled to `length` behind the text or between BOS and text."""
    filling = [pad_id] * (length - len(ids))
    return (*ids, *filling) if pad_method == "tokens_right" else (ids[0], *filling, *ids[1:])
