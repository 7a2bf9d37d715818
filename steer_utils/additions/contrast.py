"""Directions from labelled texts: the difference of two means of activations, to add or to take out.

Where an activation addition runs one pair of texts, these average over many: with h the activation at a hook,
d = mean of h over the tokens of one set of texts − the same over another. `mean_difference` adds c · d at
every token; `Ablation` removes what activations have along d, h ← h − (h · d̂) d̂ with d̂ = d / ‖d‖.
Sources: Marks & Tegmark 2023, arXiv:2310.06824 (means); Arditi et al. 2024, arXiv:2406.11717 (ablation).
Shapes: D width, T tokens.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from .. import hf, hooks
from ..checkpoint import weights_of
from ..generation import chunks
from ..models import Model, Texts, Tokenizer, batch_of, model_id, own_tokenizer, require_readable, text_ids
from ..types import holds, require
from .vector import SteeringVector, hook_name

TEXTS_PER_PASS = 32


def mean_difference(
    model: Model, tokenizer: Tokenizer, texts: Texts, other_texts: Texts, act_name: str | int
) -> SteeringVector:
    """The mean activation over the tokens of texts less that of others, to add at all positions.

    BOS is left out, as it is the same in all texts. act_name: as for `ActivationAddition`. ValueError if one
    of the two sets is empty, for texts too long for the model, and a layer beyond it.
    """
    if not len(texts) or not len(other_texts):
        raise ValueError(f"give texts of both kinds, not {len(texts)} and {len(other_texts)}")
    model, tokenizer, name = hf.unwrapped(model), own_tokenizer(model, tokenizer), hook_name(act_name)
    rows = (text_ids(tokenizer, some, as_data=True) for some in (texts, other_texts))
    one, other = (_mean_activation(model, some, name) for some in rows)
    of = {"model_id": model_id(model), "weights": weights_of(model)}
    return SteeringVector(name, (one - other)[None], positions="all", **of)


@hf.no_grad
def _mean_activation(model: Model, rows: list[list[int]], act_name: str) -> Tensor:
    """The unsteered model's mean activation over all tokens but the first of texts, [D] in float32."""
    require_readable(model, rows)
    total, count = 0.0, 0
    for some in chunks(sorted(rows, key=len), TEXTS_PER_PASS):
        batch = batch_of(model, some, "right")
        found = hooks.activations(model, **batch, act_names=[act_name])[act_name][:, 1:].float()
        mask = batch["attention_mask"][:, 1:, None].to(found.device).bool()
        total, count = total + found.where(mask, 0).sum(dim=(0, 1)), count + int(mask.sum())
    if not count:
        raise ValueError("the texts have no tokens after BOS: give texts with words in them")
    return total / count


@dataclass(frozen=True, eq=False)
class Ablation:
    """A steer that takes a direction [D] out of what enters each block.

    ValueError for a direction of length 0.
    """

    direction: Tensor

    def __post_init__(self) -> None:
        fits = holds("float", self.direction) and self.direction.ndim == 1
        fits = fits and 0 < float(self.direction.norm()) < torch.inf
        require(fits, "numbers [D] with a finite length above 0", direction=self.direction)

    @contextmanager
    def on(self, model: Model, tokenizer: Tokenizer = None) -> Iterator[None]:
        """Steer the model inside the context; the tokenizer is not used."""
        model = hf.unwrapped(model)
        if len(self.direction) != (width := hf.width(model)):
            raise ValueError(f"the direction has {len(self.direction)} numbers; this model takes {width}")
        unit = self.direction.float() / self.direction.float().norm()

        def edit(hidden, positions, lengths):
            along = unit.to(hidden.device)
            return (hidden.float() - (hidden.float() @ along)[..., None] * along).to(hidden.dtype)

        names = [hook_name(layer) for layer in range(len(hf.blocks(model)))]
        with hf.nested([partial(hooks.edit_activation, model, name, edit) for name in names]):
            yield
