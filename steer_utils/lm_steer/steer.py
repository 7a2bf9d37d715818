"""LM-Steer: a learned linear map of the output word embeddings steers what a model writes.

Let h be the last hidden state, W the unembedding and b the bias of the LM head, if it has one. The logits are

    multiply:  (h + ε Σ_s v_s (h P1_s) P2_sᵀ) Wᵀ + b     LMSteer, the paper's
    add:       (h + ε Σ_s v_s a_s) Wᵀ + b                AddSteer
    offset:    h Wᵀ + b + ε Σ_s v_s o_s                  OffsetSteer

They are affine in the steer values v. "multiply" turns each word vector e into (I + ε Σ_s v_s P1_s P2_sᵀ) e.
The authors' program drops b; here it stays, so v = 0 gives the unsteered logits. The model's weights stay.
With filter_p a steer only chooses among tokens that the model finds plausible without it: those in its
nucleus (top-p). DExperts does so, with this name; it costs a second product with W.
Shapes: B texts, D width, V vocabulary, S steers, R rank.
Sources: Han et al., "Word Embeddings Are Steers for Language Models", ACL 2024, section 3;
Liu et al., "DExperts", ACL 2021, section 2.2.
"""

import math
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import PreTrainedModel

from .. import hf, hooks
from ..checkpoint import Saved
from ..generation import Arithmetic
from ..models import Model, Tokenizer
from ..types import holds, require, shown

Values = float | Sequence[float] | Sequence[Sequence[float]] | Tensor


@dataclass(frozen=True, eq=False, kw_only=True)
class LMHeadSteer(Saved, Arithmetic):
    """S steers at the LM head: what all three kinds share. ValueError for a setting that does not fit."""

    adaptor_class: ClassVar[str]
    parameters: ClassVar[tuple[str, ...]]  # names of the learned tensors, whose first axis is S
    shape: ClassVar[str]  # of each learned tensor
    sums_as: ClassVar[str] = "LM head"
    file_name, shipped = "lm_steer", "steers"
    facts = ("adaptor_class", "epsilon", "names", "steer_values", "card")

    epsilon: float = 1e-3  # factor on the learned tensors
    steer_values: Values | None = None  # [S], or [B, S] with values for each text; None until `at` sets them
    filter_p: float = 1.0  # top-p of the model without LM-head steers; other tokens get probability 0
    names: Sequence[str] = ()  # one for each steer, by default "0", "1", …
    model_id: str = ""  # the model they were trained for
    card: Mapping[str, Any] = field(default_factory=dict)  # facts about the training

    def __post_init__(self) -> None:
        require(0 < self.epsilon < math.inf, "above 0 and finite", epsilon=self.epsilon)
        require(0 < self.filter_p <= 1, "above 0 and at most 1", filter_p=self.filter_p)
        shapes = [tuple(tensor.shape) for tensor in self.tensors().values()]
        if len(set(shapes)) > 1 or len(shapes[0]) != len(self.shape.split(",")) or not shapes[0][0]:
            what = " and ".join(self.parameters)
            raise ValueError(f"{what} must have the shape {self.shape}, with a steer at least, not {shapes}")
        for name, tensor in self.tensors().items():
            require(holds("float", tensor), "floating-point numbers", **{name: tensor})
            if not tensor.isfinite().all():
                raise ValueError(f"{name} holds inf or NaN: train again with a lower learning rate")
        names = tuple(self.names) or tuple(map(str, range(self.num_steers)))
        if not len(names) == len(set(names)) == self.num_steers:
            raise ValueError(f"{self.num_steers} steers need as many different names, not {self.names}")
        object.__setattr__(self, "names", names)
        if self.steer_values is not None:
            object.__setattr__(self, "steer_values", self._as_tensor(self.steer_values))

    def tensors(self) -> dict[str, Tensor]:
        """The learned tensors by name."""
        return {name: getattr(self, name) for name in self.parameters}

    @property
    def num_steers(self) -> int:
        """S."""
        return len(getattr(self, self.parameters[0]))

    def at(self, values: Values, filter_p: float | None = None) -> Self:
        """The same steers at a number for the first (others get 0), at values [S], or [B, S] for B texts.

        filter_p: the share of the unsteered model's next tokens to keep to, such as 0.9; None as before.
        """
        return replace(self, steer_values=values, filter_p=self.filter_p if filter_p is None else filter_p)

    def uncut(self) -> Self:
        """The steer without its filter_p."""
        return replace(self, filter_p=1.0)

    def values(self) -> Tensor:
        """The steer values. ValueError if `at` has not set them."""
        if self.steer_values is None:
            raise ValueError("say how strongly to steer: steer.at(3.0) sets the first steer's value")
        return self.steer_values

    def _as_tensor(self, values: Values) -> Tensor:
        known = not isinstance(values, Tensor) or holds("int|float", values)
        require(known, "real numbers", steer_values=values)
        given = torch.as_tensor(values, dtype=torch.float32, device="cpu")
        if given.ndim == 0:
            given = pad(given[None], (0, self.num_steers - 1))
        count = self.num_steers
        if given.ndim > 2 or given.shape[-1] != count or not given.numel():
            sizes = f"a number for the first, or values [{count}] or [B, {count}]"
            raise ValueError(f"{count} steers ({', '.join(self.names)}) take {sizes}, not {shown(values)}")
        require(given.isfinite().all(), "finite", steer_values=values)
        return given

    @contextmanager
    def on(self, model: Model, tokenizer: Tokenizer = None) -> Iterator[None]:
        """Steer the model's logits inside the context; the tokenizer is not used."""
        model = hf.unwrapped(model)
        self.require_fit(model)
        values, output = self.values(), self.adaptor_class == "offset"
        edit = cache(lambda device: self._edit(values.to(device), model.dtype))
        edits = hooks.edit_lm_head(model, lambda given: edit(given.device)(given), output=output)
        with hooks.plausible(model, self.filter_p), edits:
            yield

    def fold(self, model: Model, values: Values | None = None) -> PreTrainedModel:
        """A model that gives the steered logits without a hook, at values [S], by default those of `at`.

        It shares all other weights with the given model. ValueError for a filter_p, which weights cannot
        express, and for an AddSteer or OffsetSteer where the LM head has no bias.
        """
        model = hf.unwrapped(model)
        self.require_fit(model)
        values, folded = (self if values is None else self.at(values)).values(), hf.untied(model)
        if self.filter_p < 1:
            raise ValueError(f"weights cannot keep to filter_p={self.filter_p}: fold steer.uncut()")
        if values.ndim != 1:
            raise ValueError(f"one model takes one row of values, not {tuple(values.shape)}: fold each")
        head = hf.lm_head(folded)
        if hasattr(head, "base_layer") or hasattr(head, "modules_to_save"):  # of PEFT
            raise ValueError("an adapter is on the LM head: merge it into the model first")
        if type(head.weight.data) is not Tensor or head.weight.device.type == "meta":
            raise ValueError("the LM head is quantised or offloaded: use steer.on(model) instead")
        self._fold_into(head, values.to(head.weight.device))
        return folded

    def require_fit(self, model: Model) -> None:
        """ValueError if the tensors do not fit the model's LM head."""
        offset, ours = self.adaptor_class == "offset", getattr(self, self.parameters[0]).shape[1]
        theirs = len(hf.lm_head(model).weight) if offset else hf.last_width(model)
        if ours != theirs:
            what, advice = "vocabulary" if offset else "width", "train one for it, or transfer this one"
            raise ValueError(f"this steer is for a {what} of {ours}; the model's is {theirs}: {advice}")

    def _vector(self, values: Tensor) -> Tensor:
        """ε Σ_s v_s times vector s of an AddSteer or OffsetSteer, [C] or [B, C]."""
        return self.epsilon * values @ getattr(self, self.parameters[0]).to(values)

    def _edit(self, values: Tensor, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
        """What edits the LM head's input ("offset": its output), at values [S] or [B, S]."""
        vector = self._vector(values).to(dtype)
        return lambda given: given + _for_batch(vector, given)

    def _fold_into(self, head: nn.Module, values: Tensor) -> None:
        """Give an LM head of its own the weights or the bias that steer at values [S]."""
        if head.bias is None:
            raise ValueError("the LM head has no bias to fold this steer into: use steer.on(model)")
        vector = self._vector(values)
        change = vector if self.adaptor_class == "offset" else head.weight.float() @ vector
        head.bias = nn.Parameter((head.bias.float() + change).to(head.bias.dtype), requires_grad=False)

    def __mul__(self, factor: float) -> Self:
        return replace(self, steer_values=factor * self.values())

    def __add__(self, other: "LMHeadSteer") -> Self:
        """S₁ + S₂ steers side by side; TypeError for two kinds, ValueError for two models or widths."""
        if not isinstance(other, LMHeadSteer):
            return NotImplemented
        if type(other) is not type(self):
            raise TypeError(f"{self.adaptor_class} and {other.adaptor_class} steers have an order: nest them")
        if len(ids := {self.model_id, other.model_id} - {""}) > 1:
            raise ValueError(f"one is for {self.model_id!r}, the other for {other.model_id!r}: transfer one")
        first, *_ = self.parameters  # of P1 and P2, P1 takes up the other epsilon
        given = other.tensors() | {first: getattr(other, first) * (other.epsilon / self.epsilon)}
        sums: dict[str, Any] = {name: _stacked(one, given[name]) for name, one in self.tensors().items()}
        if self.steer_values is not None or other.steer_values is not None:
            sums["steer_values"] = _side_by_side(self.values(), other.values())
        sums["filter_p"] = min(self.filter_p, other.filter_p)
        card = {key: one for key, one in {**other.card, **self.card}.items() if key == "weights"}
        return replace(
            self, **sums, card=card, names=_unique(self.names + other.names), model_id="".join(ids)
        )

    def to_files(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        facts = {name: getattr(self, name) for name in (*self.facts, "filter_p")}
        facts["model"] = self.model_id
        if self.steer_values is not None:
            facts["steer_values"] = self.steer_values.tolist()
        return self.tensors(), facts | {"shapes": {name: list(t.shape) for name, t in self.tensors().items()}}

    @classmethod
    def from_files(cls, tensors: dict[str, Tensor], facts: dict[str, Any]) -> "LMHeadSteer":
        """A steer of the kind that was saved."""
        kind, settings = ADAPTORS[facts["adaptor_class"]], {name: facts[name] for name in cls.facts[1:]}
        given = {name: tensors[name].float() for name in kind.parameters}
        kept_to = facts.get("filter_p", 1.0)  # older files have none
        return kind(**given, **settings, filter_p=kept_to, model_id=facts["model"])


@dataclass(frozen=True, eq=False)
class LMSteer(LMHeadSteer):
    """S steers of rank R. With M_s = P1_s P2_sᵀ, a hidden state h gains ε Σ_s v_s h M_s."""

    adaptor_class, parameters, shape = "multiply", ("projector1", "projector2"), "[S, D, R]"
    projector1: Tensor
    projector2: Tensor

    @classmethod
    def from_checkpoint(cls, path: str | Path) -> Self:
        """Read a checkpoint.pt of the authors' program; no code in it is run.

        FileNotFoundError for no file, ValueError for one that holds anything but settings, projectors, steps.
        """
        try:
            with torch.serialization.safe_globals([Namespace]):
                settings, tensors, _ = torch.load(path, map_location="cpu", weights_only=True)
            tensors = {name: tensors[name].float() for name in cls.parameters}
        except (UnpicklingError, RuntimeError, EOFError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{str(path)!r} is no checkpoint of LM-Steer's program: {error}") from error
        return cls(**tensors, epsilon=getattr(settings, "epsilon", 1e-3))  # that program's default

    @property
    def rank(self) -> int:
        """R."""
        return self.projector1.shape[2]

    def matrix(self, values: Values | None = None) -> Tensor:
        """ε Σ_s v_s M_s, [D, D], at values [S], by default those of `at`."""
        left, right, weights = self._factors((self if values is None else self.at(values)).values())
        return (left * weights) @ right

    def _factors(self, values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """ε P1 [D, S·R], P2ᵀ [S·R, D], and the value of each of their columns, [S·R] or [B, S·R]."""
        left, right = (tensor.to(values).transpose(0, 1).flatten(1) for tensor in self.tensors().values())
        return self.epsilon * left, right.T, values.repeat_interleave(self.rank, dim=-1)

    def _edit(self, values: Tensor, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
        left, right, weights = self._factors(values)
        return lambda h: h + ((h.float() @ left * _for_batch(weights, h)) @ right).to(h.dtype)

    def _fold_into(self, head: nn.Module, values: Tensor) -> None:
        steered = head.weight.float() + head.weight.float() @ self.matrix(values).T.to(head.weight.device)
        head.weight = nn.Parameter(steered.to(head.weight.dtype), requires_grad=False)


@dataclass(frozen=True, eq=False)
class AddSteer(LMHeadSteer):
    """S steers as vectors that the last hidden state gains."""

    adaptor_class, parameters, shape = "add", ("add_vec",), "[S, D]"
    add_vec: Tensor


@dataclass(frozen=True, eq=False)
class OffsetSteer(LMHeadSteer):
    """S steers as vectors that the logits gain."""

    adaptor_class, parameters, shape = "offset", ("offset_vec",), "[S, V]"
    offset_vec: Tensor


ADAPTORS: dict[str, type[LMHeadSteer]] = {"multiply": LMSteer, "add": AddSteer, "offset": OffsetSteer}


def _for_batch(values: Tensor, batch: Tensor) -> Tensor:
    """Values [B, C] for the rows of a batch [N, …, D], as [N, 1, …, C]; those for all, [C], as they are."""
    if values.ndim == 1:
        return values
    return hooks.for_batch_rows(values, len(batch)).reshape(len(batch), *[1] * (batch.ndim - 2), -1)


def _stacked(one: Tensor, other: Tensor) -> Tensor:
    """Tensors [S₁, …] and [S₂, …] as [S₁ + S₂, …]; the projectors of lower rank are filled with zeros."""
    if one.shape[1] != other.shape[1]:
        raise ValueError(f"one steer is {one.shape[1]} wide, the other {other.shape[1]}")
    rank = max(one.shape[-1], other.shape[-1])
    return torch.cat([pad(tensor.to(one), (0, rank - tensor.shape[-1])) for tensor in (one, other)])


def _side_by_side(one: Tensor, other: Tensor) -> Tensor:
    """Values [S₁] or [B, S₁], and [S₂] or [B, S₂], as [S₁ + S₂] or [B, S₁ + S₂]."""
    if len(texts := {len(values) for values in (one, other) if values.ndim == 2}) > 1:
        raise ValueError(f"one steer has values for {len(one)} texts, the other for {len(other)}")
    return torch.cat([values.expand(*texts, -1) for values in (one, other)], dim=-1)


def _unique(names: Sequence[str]) -> tuple[str, ...]:
    """The names; one that is taken gets a number after it."""
    found: list[str] = []
    for name in names:
        taken = [name, *(f"{name} ({i})" for i in range(1, len(names)))]
        found.append(next(new for new in taken if new not in found))
    return tuple(found)
