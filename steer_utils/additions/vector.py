"""A steering vector: rows to add to a model's activations at fixed positions of every text it reads.

Row s goes to the token at absolute position start + s, where BOS has position 0, whatever the padding, the
cache or the cutting of the prompt into chunks; start is 0 ("front") or counted from the prompt's length. How
the rows come about is the business of others: `activation_addition` makes them from texts.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from numbers import Integral
from pathlib import Path
from typing import Self

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .. import checkpoint, hf

LOCATIONS = ("front", "mid", "back")
POSITIONS = ("own", "all")


@dataclass(frozen=True, eq=False)
class SteeringVector:
    """Rows [S, D] for an activation. They can be added, subtracted, multiplied by numbers, saved and loaded.

    act_name: the hook, as for `ActivationAddition`. addition_location: "front" puts row 0 at BOS, "back" the
    last row at the prompt's last token, "mid" the rows in the prompt's middle. positions: "own" adds each row
    once; "all" goes on adding the last row at every later position, written ones included. model_id: the
    model that the rows were read from, "" if none. ValueError for anything else, or rows that are not finite.
    """

    act_name: str | int
    rows: Tensor
    addition_location: str = "front"
    positions: str = "own"
    model_id: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "act_name", hook_name(self.act_name))
        require_where(self.addition_location, self.positions)
        if self.rows.ndim != 2 or len(self.rows) == 0:
            raise ValueError(f"rows must have the shape [S, D], not {tuple(self.rows.shape)}")
        if not self.rows.isfinite().all():
            raise ValueError("the rows hold inf or NaN: lower the coefficient, or load with dtype='float32'")

    @contextmanager
    def on(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        scale: Tensor | float = 1.0,
    ) -> Iterator[None]:
        """While inside, every text that the model reads is steered; afterwards the model is as it was.

        scale: a number for each row of the batch, [B], or one for all. A vector needs no tokenizer; it takes
        one as every steer does. ValueError for a layer beyond the model or rows of another width, and inside
        for a prompt shorter than the rows.
        """
        model = hf.unwrapped(model)
        self.require_width(model)
        rows = self.rows.to(model.device, model.dtype)
        scales = torch.as_tensor(scale, device=rows.device, dtype=torch.float32).reshape(-1, 1, 1)
        edit = partial(self._edit, rows=rows, scales=scales)
        with hf.edit_activation(model, self.act_name, edit, shortest=len(rows)):
            yield

    def require_width(self, model: PreTrainedModel) -> None:
        """ValueError if the rows do not fit the model's residual stream."""
        width = hf.width(hf.unwrapped(model))
        if self.rows.shape[1] != width:
            raise ValueError(
                f"rows of shape {tuple(self.rows.shape)} do not fit; this model takes [S, {width}]"
            )

    def _edit(
        self, hidden: Tensor, positions: Tensor, lengths: Tensor, *, rows: Tensor, scales: Tensor
    ) -> Tensor:
        starts = first_positions(len(rows), lengths, self.addition_location)
        places = positions - starts[:, None]
        if self.positions == "all":
            places = places.clamp(max=len(rows) - 1)
        return add_rows(hidden, places, rows, scales)

    # --- arithmetic ---------------------------------------------------------------------------------------

    def __mul__(self, factor: float) -> Self:
        return replace(self, rows=factor * self.rows)

    __rmul__ = __mul__

    def __neg__(self) -> Self:
        return -1 * self

    def __add__(self, other: "SteeringVector") -> Self:
        if not isinstance(other, SteeringVector):
            return NotImplemented
        if self._where() != other._where():
            raise ValueError(
                f"vectors add up at one place and of one model only, not {self._where()} and "
                f"{other._where()}; to steer with both, give both: steer=[one, other]"
            )
        return replace(self, rows=sum_rows([self.rows, other.rows.to(self.rows)]))

    def __sub__(self, other: "SteeringVector") -> Self:
        return self + -other if isinstance(other, SteeringVector) else NotImplemented

    def _where(self) -> tuple:
        """What two vectors share if their rows meet the same tokens of the same activation."""
        aligned = (self.addition_location, self.positions) == ("front", "own")
        length = "any" if aligned else len(self.rows)
        width = self.rows.shape[1]
        return self.act_name, self.addition_location, self.positions, length, width, self.model_id

    # --- files --------------------------------------------------------------------------------------------

    def save_pretrained(self, folder: str | Path) -> None:
        """Write `steering_vector.safetensors` and `steering_vector.json` into the folder."""
        facts = {name: getattr(self, name) for name in ("act_name", "addition_location", "positions")}
        facts |= {"model": self.model_id, "width": self.rows.shape[1]}
        checkpoint.save(folder, "steering_vector", {"rows": self.rows}, **facts)

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, model: PreTrainedModel | None = None, *, any_model: bool = False
    ) -> Self:
        """Read a saved vector.

        FileNotFoundError or ValueError if it is not there whole. With `model` also ValueError if its rows
        have another width, or if it was made with another model and `any_model` does not allow that.
        """
        needed = ("act_name", "addition_location", "positions")
        tensors, facts = checkpoint.load(folder, "steering_vector", model, any_model=any_model, needed=needed)
        where = {name: facts[name] for name in needed}
        vector = cls(rows=tensors["rows"], model_id=facts["model"], **where)
        if model is not None:
            vector.require_width(model)
        return vector


# --- tensors ----------------------------------------------------------------------------------------------


def add_rows(hidden: Tensor, places: Tensor, rows: Tensor, scales: Tensor | float = 1.0) -> Tensor:
    """hidden [B,T,D] + scales · rows [S,D]: each token's row by `places` [B,T], none outside 0..S−1."""
    nothing = rows.new_zeros(1, rows.shape[1])
    outside = (places < 0) | (places >= len(rows))
    chosen = torch.cat([rows, nothing])[places.masked_fill(outside, len(rows))]
    return hidden + (scales * chosen).to(hidden.dtype)


def first_positions(count: int, lengths: Tensor, addition_location: str) -> Tensor:
    """The position of row 0 of `count` rows in prompts of given lengths, [B] -> [B]."""
    if addition_location == "front":
        return torch.zeros_like(lengths)
    return lengths - count if addition_location == "back" else lengths // 2 - count // 2


def sum_rows(terms: Sequence[Tensor]) -> Tensor:
    """Sum of matrices [S_i, D], each filled with zero rows to the longest, [max S_i, D]."""
    return pad_sequence(list(terms)).sum(dim=1)


# --- names ------------------------------------------------------------------------------------------------


def hook_name(act_name: str | int) -> str:
    """The name of a hook, of which a layer is the short form. ValueError for an unknown one."""
    name = f"blocks.{act_name}.hook_resid_pre" if isinstance(act_name, Integral) else act_name
    hf.place(name)
    return name


def require_where(addition_location: str, positions: str) -> None:
    """ValueError for a location or a choice of positions that does not exist."""
    for name, value, known in (
        ("addition_location", addition_location, LOCATIONS),
        ("positions", positions, POSITIONS),
    ):
        if value not in known:
            raise ValueError(f"{name} must be one of {', '.join(known)}, not {value!r}")
