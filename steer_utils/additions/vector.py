"""Steering vectors: matrices that are added to an activation at fixed token positions.

Row s of a vector [S, D] is added at absolute position start + s of each sequence. BOS has position 0 whatever
the padding, the KV cache and the chunks of the prefill; start is 0 or depends on the length of the prompt.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from numbers import Integral
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from .. import hf, hooks
from ..checkpoint import Saved
from ..generation import Arithmetic
from ..models import Model, Tokenizer
from ..types import holds, require


@dataclass(frozen=True, eq=False)
class SteeringVector(Saved, Arithmetic):
    """Rows [S, D] to add to one activation. Vectors can be added, subtracted, scaled, saved and loaded.

    act_name: the hook; see `ActivationAddition`. addition_location: "front" adds row 0 to BOS, "back" the
    last row to the last token of the prompt; "mid" centres the rows in the prompt. positions: "own" adds each
    row once, "all" also the last row at all later positions, generated tokens included. "last" adds only the
    last row, to the prompt's last token, "generated" to the tokens after the prompt. model_id and
    weights, see `weights_of`: of the model that made them, or "". ValueError for anything else, and for rows
    that are not finite.
    """

    file_name: ClassVar[str] = "steering_vector"
    facts: ClassVar[tuple[str, ...]] = ("act_name", "addition_location", "positions", "weights")

    act_name: str | int
    rows: Tensor
    addition_location: str = "front"
    positions: str = "own"
    model_id: str = ""
    weights: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "act_name", hook_name(self.act_name))
        require_where(self.addition_location, self.positions)
        if self.rows.ndim != 2 or len(self.rows) == 0:
            raise ValueError(f"rows must have the shape [S, D], not {tuple(self.rows.shape)}")
        require(holds("float", self.rows), "floating-point numbers", rows=self.rows)
        if not self.rows.isfinite().all():
            raise ValueError("the rows hold inf or NaN: lower the coefficient, or load with dtype='float32'")

    @contextmanager
    def on(self, model: Model, tokenizer: Tokenizer = None, *, scale: Tensor | float = 1.0) -> Iterator[None]:
        """Steer the model inside the context. With a tokenizer, a text that lacks BOS gives a warning.

        scale: one factor, or one for each batch row, [B]. Raises ValueError for a layer beyond the model, for
        rows of another width and a scale that is not finite; inside, for a prompt shorter than the rows.
        """
        model = hf.unwrapped(model)
        self.require_fit(model)
        known = not isinstance(scale, Tensor) or holds("int|float", scale)
        require(known, "real numbers", scale=scale)
        scales = torch.as_tensor(scale, dtype=torch.float32).reshape(-1, 1, 1)
        require(scales.isfinite().all(), "finite", scale=scale)
        on_device = cache(lambda device: (self.rows.to(device, model.dtype), scales.to(device)))

        def edit(hidden, positions, lengths):
            return add_rows(hidden, self.places(positions, lengths[:, None]), *on_device(hidden.device))

        own = self.positions in ("own", "all")
        how = {"shortest": len(self.rows) if own else 1, "in_prompt": self.positions in ("own", "last")}
        how["by_length"] = self.addition_location != "front" or self.positions in ("last", "generated")
        begins = tokenizer.all_special_ids if own and tokenizer and self.addition_location == "front" else ()
        with hooks.edit_activation(model, self.act_name, edit, **how, begins=begins):
            yield

    def places(self, positions: Tensor, lengths: Tensor) -> Tensor:
        """The row for each position [B, T] at prompt lengths [B, 1]; below 0 and beyond the last, none."""
        last = len(self.rows) - 1
        if self.positions == "last":
            return torch.where(positions == lengths - 1, last, -1)
        if self.positions == "generated":
            return torch.where(positions >= lengths, last, -1)
        size = len(self.rows)
        starts = {"front": 0, "back": lengths - size, "mid": lengths // 2 - size // 2}
        places = positions - starts[self.addition_location]
        return places.clamp(max=last) if self.positions == "all" else places

    def randomized(self, seed: int) -> Self:
        """A baseline: rows of the same norms in random directions, added to the same tokens."""
        noise = torch.randn(self.rows.shape, generator=torch.Generator().manual_seed(seed)).to(self.rows)
        scale = self.rows.norm(dim=1, keepdim=True) / noise.norm(dim=1, keepdim=True)
        return replace(self, rows=noise * scale)

    def __mul__(self, factor: float) -> Self:
        return replace(self, rows=factor * self.rows)

    def __add__(self, other: "SteeringVector") -> Self:
        if not isinstance(other, SteeringVector):
            return NotImplemented
        if self.where != other.where:
            raise ValueError(f"not one place: {self.where}, {other.where}; for both, steer=[one, other]")
        return replace(self, rows=pad_sequence([self.rows, other.rows.to(self.rows)]).sum(dim=1))

    @property
    def where(self) -> tuple:
        """What two vectors must share to be added; at the front, each with its "own" rows, not the length."""
        how = self.addition_location, self.positions
        length = "any" if how == ("front", "own") else len(self.rows)
        return self.act_name, *how, length, self.rows.shape[1], self.model_id

    def to_vllm_lens(self, prompt_tokens: int) -> dict[str, Any]:
        """Arguments of `vllm_lens.SteeringVector`, for one request of so many tokens, BOS included.

        Activations are [1, D], a row for all tokens, or [1, P, D], rows at P positions of the prompt. See
        `serving.vllm_request`, which keeps vLLM's prefix cache apart as well. ValueError for other places,
        and for rows that vllm-lens 1.3.0 would repeat: it takes each token that it writes for position 0.
        """
        rows, layers = self.rows.float().cpu(), [self.after_block("vllm-lens")]
        if self.is_constant:
            return {"activations": rows, "layer_indices": layers}
        if self.positions not in ("own", "last"):
            what = f"positions={self.positions!r} with {len(rows)} rows at the {self.addition_location}"
            raise ValueError(f"vllm-lens cannot add {what} while it writes: give each token the same row")
        if prompt_tokens < len(rows) and self.positions == "own":
            raise ValueError(f"a prompt of {prompt_tokens} tokens is shorter than the {len(rows)} rows")
        places = self.places(torch.arange(prompt_tokens), torch.tensor(prompt_tokens))
        at = [i for i, s in enumerate(places.tolist()) if 0 <= s < len(rows) and rows[s].any()]
        if 0 in at:
            what = "the row of BOS to each token written"
            raise ValueError(f"vllm-lens would add {what}: take a pair, whose is 0")
        return {"activations": rows[places[at]][None], "layer_indices": layers, "position_indices": at}

    @property
    def is_constant(self) -> bool:
        """Whether one row is added to every token."""
        return (len(self.rows), self.addition_location, self.positions) == (1, "front", "all")

    def to_gguf(self, path: str | Path, model: Model) -> Path:
        """Write a llama.cpp control vector: one row for every token after a block; ValueError for others."""
        if not self.is_constant:
            what = f"{len(self.rows)} rows, {self.addition_location!r}, {self.positions!r}"
            raise ValueError(f"a control vector is one row at every token ('front', 'all'), not {what}")
        self.require_fit(hf.unwrapped(model))
        layer, count = self.after_block("llama.cpp"), len(hf.blocks(hf.unwrapped(model)))
        if not 0 < layer < count:
            raise ValueError(f"llama.cpp adds after blocks 1 to {count - 1}, not after block {layer}")
        from gguf import GGUFWriter  # slow to import

        writer = GGUFWriter(path, "controlvector")
        writer.add_string("controlvector.model_hint", model.config.model_type)
        writer.add_uint32("controlvector.layer_count", count)
        writer.add_tensor(f"direction.{layer}", self.rows[0].float().cpu().numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return Path(path)

    def after_block(self, engine: str) -> int:
        """The block whose output the rows are added to; ValueError for any other place."""
        layer, kind = hooks.place(self.act_name)
        if kind not in ("resid_pre", "resid_post") or (layer, kind) == (0, "resid_pre"):
            raise ValueError(f"{engine} adds to what a block leaves, not at {self.act_name!r}")
        return layer - (kind == "resid_pre")

    def to_files(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        facts = {name: getattr(self, name) for name in self.facts}
        return {"rows": self.rows}, facts | {"model": self.model_id, "width": self.rows.shape[1]}

    @classmethod
    def from_files(cls, tensors: dict[str, Tensor], facts: dict[str, Any]) -> Self:
        return cls(rows=tensors["rows"], model_id=facts["model"], **{name: facts[name] for name in cls.facts})

    def require_fit(self, model: Model) -> None:
        if self.rows.shape[1] != (width := hf.width(model)):
            raise ValueError(f"rows {tuple(self.rows.shape)} do not fit: this model takes [S, {width}]")


def add_rows(hidden: Tensor, places: Tensor, rows: Tensor, scales: Tensor | float = 1.0) -> Tensor:
    """hidden [B, T, D] + scales · rows[places]; places [B, T] outside 0..S−1 add nothing."""
    inside = (places >= 0) & (places < len(rows))
    chosen = rows[places.clamp(0, len(rows) - 1)] * inside[..., None]
    return hidden + (scales * chosen).to(hidden.dtype)


def hook_name(act_name: str | int) -> str:
    """The full name of a hook; a layer stands for its resid_pre. Raises ValueError for an unknown name."""
    name = f"blocks.{act_name}.hook_resid_pre" if isinstance(act_name, Integral) else act_name
    hooks.place(name)
    return name


def require_where(addition_location: str, positions: str) -> None:
    """Raise ValueError for a location or a choice of positions that does not exist."""
    locations, choices = ("front", "mid", "back"), ("own", "all", "last", "generated")
    require(addition_location in locations, "front, mid or back", addition_location=addition_location)
    require(positions in choices, "own, all, last or generated", positions=positions)
