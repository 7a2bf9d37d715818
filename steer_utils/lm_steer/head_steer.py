"""Steers at a model's output head: S learned directions, a value for each, and what they have in common.

Their effect on the logits is affine in the values, so steers can be scaled, added and put side by side.
Shapes: B texts, D width, V vocabulary, S steers, R rank. The kinds, and their source: `lm_steer`.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import chain, count
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .. import checkpoint, data, hf

Values = float | Sequence[float] | Sequence[Sequence[float]] | Tensor


@dataclass(frozen=True, eq=False, kw_only=True)
class HeadSteer(ABC):
    """S steers at the output head, their values, arithmetic and files.

    epsilon: what the tensors are multiplied by. steer_values: [S], or [B, S] with a row for each text; None
    until `at` says. names: of the steers, by default "0", "1", …; model_id: the model that they were trained
    for, "" if none; card: whatever is known of the training. ValueError for shapes that do not belong
    together, numbers that are not finite, epsilon ≤ 0, or not S different names.
    """

    adaptor_class: ClassVar[str]
    parameters: ClassVar[tuple[str, ...]]  # the names of the tensors, whose first axis is S
    kinds: ClassVar[dict[str, type["HeadSteer"]]] = {}

    epsilon: float = 1e-3
    steer_values: Tensor | None = None
    names: tuple[str, ...] = ()
    model_id: str = ""
    card: Mapping[str, Any] = field(default_factory=dict)

    def __init_subclass__(cls) -> None:
        cls.kinds[cls.adaptor_class] = cls

    def __post_init__(self) -> None:
        if not (math.isfinite(self.epsilon) and self.epsilon > 0):
            raise ValueError(f"epsilon must be above 0 and finite, not {self.epsilon!r}")
        for name, tensor in self.tensors().items():
            if not tensor.isfinite().all():
                raise ValueError(f"{name} holds inf or NaN: train again with a lower learning rate")
        if not self.num_steers:
            raise ValueError("give at least one steer")
        names = tuple(map(str, self.names or range(self.num_steers)))
        if not len(names) == len(set(names)) == self.num_steers:
            raise ValueError(f"{self.num_steers} steers need as many different names, not {self.names}")
        object.__setattr__(self, "names", names)
        if self.steer_values is not None:
            object.__setattr__(self, "steer_values", self._checked(self.steer_values))

    def tensors(self) -> dict[str, Tensor]:
        """The learned tensors by name."""
        return {name: getattr(self, name) for name in self.parameters}

    @property
    def num_steers(self) -> int:
        """S."""
        return len(getattr(self, self.parameters[0]))

    # --- steering -----------------------------------------------------------------------------------------

    def at(self, values: Values) -> Self:
        """The same steers at these values: a number for the first (the others 0), [S], or [B, S].

        With [B, S], each of B texts has values of its own: those of `generate`, or the rows of a batch.
        ValueError for another shape, or values that are not finite.
        """
        return replace(self, steer_values=values)

    @contextmanager
    def on(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None = None) -> Iterator[None]:
        """While inside, all logits are steered; afterwards the model is as it was.

        It needs no tokenizer; it takes one as every steer does. ValueError without steer values, for a model
        of another width, and inside for a batch that does not fit values [B, S].
        """
        model = hf.unwrapped(model)
        self.require_fit(model)
        edit = self._edit(self.values().to(model.device), model)
        with hf.edit_lm_head(model, edit, output=self.adaptor_class == "offset"):
            yield

    def values(self) -> Tensor:
        """The steer values; ValueError before `at`."""
        if self.steer_values is None:
            raise ValueError("say how strongly to steer: steer.at(3.0) sets the first steer's value")
        return self.steer_values

    @abstractmethod
    def _edit(self, values: Tensor, model: PreTrainedModel) -> Callable[[Tensor], Tensor]:
        """What changes the head's input, or its output, for values [S] or [B, S]."""

    @abstractmethod
    def require_fit(self, model: PreTrainedModel) -> None:
        """ValueError if the tensors do not fit the model's output head."""

    @abstractmethod
    def fold(self, model: PreTrainedModel, values: Values | None = None) -> PreTrainedModel:
        """A plain model that gives the steered logits with no hook, at values [S], by default those of `at`.

        It shares every other weight with the given model, and has an output head of its own, not tied to the
        input embeddings; `save_pretrained` writes a checkpoint that AutoModelForCausalLM loads. ValueError
        for values [B, S], and for "add" and "offset" if the head has no bias to fold them into.
        """

    def _to_fold(self, model: PreTrainedModel, values: Values | None) -> tuple[PreTrainedModel, Tensor]:
        """The new model, its head still that of the old one, and the values [S]."""
        model = hf.unwrapped(model)
        self.require_fit(model)
        values = (self if values is None else self.at(values)).values()
        if values.ndim != 1:
            raise ValueError(f"one model takes one row of values, not {tuple(values.shape)}: fold each")
        return hf.untied(model), values.to(model.device)

    def _checked(self, values: Values) -> Tensor:
        """Values as a tensor, [S] or [B, S]."""
        given = torch.as_tensor(values, dtype=torch.float32, device="cpu")
        if given.ndim == 0:
            given = pad(given[None], (0, self.num_steers - 1))
        if given.ndim > 2 or given.shape[-1] != self.num_steers or not given.numel():
            raise ValueError(
                f"{self.num_steers} steers ({', '.join(self.names)}) take a number for the first, or values "
                f"[{self.num_steers}] or [B, {self.num_steers}], not {values!r}"
            )
        if not given.isfinite().all():
            raise ValueError(f"steer values must be finite, not {values!r}")
        return given

    # --- arithmetic ---------------------------------------------------------------------------------------

    def __mul__(self, factor: float) -> Self:
        return replace(self, steer_values=factor * self.values())

    __rmul__ = __mul__

    def __neg__(self) -> Self:
        return -1 * self

    def __add__(self, other: "HeadSteer") -> Self:
        """Both at once, as S₁ + S₂ steers side by side; what they add to the logits adds up."""
        if type(other) is not type(self):
            return NotImplemented
        if self.model_id != other.model_id:
            raise ValueError(f"one is for {self.model_id!r}, the other for {other.model_id!r}: transfer one")
        sizes = [getattr(steer, self.parameters[0]).shape[1] for steer in (self, other)]
        if sizes[0] != sizes[1]:
            raise ValueError(f"{self.parameters[0]} is {sizes[0]} wide in one, {sizes[1]} in the other")
        tensors = {
            name: _joined(tensor, other._scaled(name, self.epsilon))
            for name, tensor in self.tensors().items()
        }
        values = _side_by_side(self.steer_values, other.steer_values)
        return replace(
            self, **tensors, steer_values=values, names=_different(self.names + other.names), card={}
        )

    def __sub__(self, other: "HeadSteer") -> Self:
        return self + -other if type(other) is type(self) else NotImplemented

    def _scaled(self, name: str, epsilon: float) -> Tensor:
        """A tensor as it would be with another epsilon; of two that are multiplied, the first changes."""
        tensor = getattr(self, name)
        return tensor * (self.epsilon / epsilon) if name == self.parameters[0] else tensor

    # --- files --------------------------------------------------------------------------------------------

    def save_pretrained(self, folder: str | Path) -> None:
        """Write `lm_steer.safetensors` and `lm_steer.json` into the folder, the values of `at` included."""
        values = None if self.steer_values is None else self.steer_values.tolist()
        facts = {"adaptor_class": self.adaptor_class, "epsilon": self.epsilon, "names": self.names}
        facts |= {"shapes": {name: list(tensor.shape) for name, tensor in self.tensors().items()}}
        facts |= {"steer_values": values, "card": dict(self.card)}
        checkpoint.save(folder, "lm_steer", self.tensors(), model=self.model_id, **facts)

    @staticmethod
    def from_pretrained(
        source: str | Path, model: PreTrainedModel | None = None, *, any_model: bool = False
    ) -> "HeadSteer":
        """Read a steer that comes with this package ("sentiment"), or the folder of a saved one, of any kind.

        FileNotFoundError or ValueError if it is not there whole. With `model` also ValueError if it does not
        fit, or if it was made for another model and `any_model` does not allow that.
        """
        folder = data.find("steers", source)
        needed = ("adaptor_class", "epsilon", "names", "steer_values", "card")
        tensors, facts = checkpoint.load(folder, "lm_steer", model, any_model=any_model, needed=needed)
        try:
            kind = HeadSteer.kinds[facts["adaptor_class"]]
            tensors = {name: tensors[name].float() for name in kind.parameters}
            settings = {name: facts[name] for name in ("epsilon", "steer_values", "names", "card")}
            steer = kind(**tensors, **settings, model_id=facts["model"])
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"the lm_steer in {str(folder)!r} is damaged ({error})") from error
        if model is not None:
            steer.require_fit(hf.unwrapped(model))
        return steer


def _joined(one: Tensor, other: Tensor) -> Tensor:
    """Tensors [S₁, …] and [S₂, …] as [S₁ + S₂, …]; the one of lower rank is filled with zeros."""
    rank = max(one.shape[-1], other.shape[-1])
    return torch.cat([pad(tensor.to(one), (0, rank - tensor.shape[-1])) for tensor in (one, other)])


def _side_by_side(one: Tensor | None, other: Tensor | None) -> Tensor | None:
    """Values [S₁] or [B, S₁], and [S₂] or [B, S₂], as [S₁ + S₂] or [B, S₁ + S₂]."""
    if one is None and other is None:
        return None
    if one is None or other is None:
        raise ValueError("give both steers values, or neither")
    texts = {len(values) for values in (one, other) if values.ndim == 2}
    if len(texts) > 1:
        raise ValueError(f"one steer has values for {len(one)} texts, the other for {len(other)}")
    return torch.cat([values.expand(*texts, -1) if texts else values for values in (one, other)], dim=-1)


def _different(names: Sequence[str]) -> tuple[str, ...]:
    """The names, those that came before with a number after them."""
    found: list[str] = []
    for name in names:
        numbered = (f"{name} ({i})" for i in count(1))
        found.append(next(n for n in chain([name], numbered) if n not in found))
    return tuple(found)
