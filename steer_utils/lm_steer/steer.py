"""LM-Steer: a learned linear map of the output word embeddings steers what a model writes.

With h the last hidden state, W the output embeddings and b the head's bias, if it has one, the logits become

    multiply:  (h + ε Σ_s v_s (h P1_s) P2_sᵀ) Wᵀ + b,
    add:       (h + ε Σ_s v_s a_s) Wᵀ + b,
    offset:    h Wᵀ + b + ε Σ_s v_s o_s,

affine in the steer values v. The first is the paper's: each word vector e, as a column, becomes
(I + ε Σ_s v_s P1_s P2_sᵀ) e. No weight of the model changes, and input embeddings tied to W stay as they are.
The original leaves b out; here it is kept, so that v = 0 is the plain model. Training: `lm_steer_fit`;
reading: `lm_steer_words`, `lm_steer_analysis`; for other models: `lm_steer_transfer`.
Shapes: B texts, D width, V vocabulary, S steers, R rank.
Source: Han et al., "Word Embeddings Are Steers for Language Models", ACL 2024, section 3.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .. import hf
from .head_steer import HeadSteer, Values


@dataclass(frozen=True, eq=False)
class LMSteer(HeadSteer):
    """S steers of rank R as two tensors [S, D, R] ("multiply"): the paper's.

    With M_s = P1_s P2_sᵀ, a hidden state h (a row) gains ε Σ_s v_s h M_s.
    """

    adaptor_class = "multiply"
    parameters = ("projector1", "projector2")

    projector1: Tensor
    projector2: Tensor

    def __post_init__(self) -> None:
        if self.projector1.ndim != 3 or self.projector1.shape != self.projector2.shape:
            shapes = " and ".join(str(tuple(tensor.shape)) for tensor in self.tensors().values())
            raise ValueError(f"projectors must both have the shape [S, D, R], not {shapes}")
        super().__post_init__()

    @property
    def rank(self) -> int:
        """R."""
        return self.projector1.shape[2]

    def matrix(self, values: Values | None = None) -> Tensor:
        """ε Σ_s v_s M_s, [D, D], at values [S], by default those of `at`: h gains h times this matrix."""
        left, right, weights = self._factors((self if values is None else self.at(values)).values())
        return (left * weights) @ right

    def _factors(self, values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """ε P1 [D, S·R], P2ᵀ [S·R, D] and the values of their columns, [S·R] or [B, S·R]."""
        left, right = (tensor.to(values).transpose(0, 1).flatten(1) for tensor in self.tensors().values())
        return self.epsilon * left, right.T, values.repeat_interleave(self.rank, dim=-1)

    def _edit(self, values: Tensor, model: PreTrainedModel) -> Callable[[Tensor], Tensor]:
        left, right, weights = self._factors(values)
        if values.ndim == 2:
            return lambda h: h + ((h.float() @ left * _of_rows(weights, h)) @ right).to(h.dtype)
        thin = 2 * len(right) < len(left)  # two thin products are then cheaper than one of [D, D]
        factors = (left * weights, right) if thin else ((left * weights) @ right,)
        return lambda h: h + reduce(torch.matmul, factors, h.float()).to(h.dtype)

    def require_fit(self, model: PreTrainedModel) -> None:
        _require_same("width", self.projector1.shape[1], hf.last_width(model))

    def fold(self, model: PreTrainedModel, values: Values | None = None) -> PreTrainedModel:
        model, values = self._to_fold(model, values)
        head = hf.lm_head(model)
        weight = head.weight.float()
        steered = weight + weight @ self.matrix(values).T.to(weight)
        head.weight = nn.Parameter(steered.to(head.weight.dtype), requires_grad=False)
        return model


@dataclass(frozen=True, eq=False)
class AddSteer(HeadSteer):
    """S steers as vectors [S, D], which last hidden states gain ("add")."""

    adaptor_class = "add"
    parameters = ("add_vec",)

    add_vec: Tensor

    def __post_init__(self) -> None:
        _require_vectors("add_vec", self.add_vec, "[S, D]")
        super().__post_init__()

    def _edit(self, values: Tensor, model: PreTrainedModel) -> Callable[[Tensor], Tensor]:
        return _adds(self.epsilon * values @ self.add_vec.to(values), model)

    def require_fit(self, model: PreTrainedModel) -> None:
        _require_same("width", self.add_vec.shape[1], hf.last_width(model))

    def fold(self, model: PreTrainedModel, values: Values | None = None) -> PreTrainedModel:
        model, values = self._to_fold(model, values)
        weight = hf.lm_head(model).weight.float()
        return _with_bias(model, weight @ (self.epsilon * values @ self.add_vec.to(values)))


@dataclass(frozen=True, eq=False)
class OffsetSteer(HeadSteer):
    """S steers as vectors [S, V], which the logits gain ("offset")."""

    adaptor_class = "offset"
    parameters = ("offset_vec",)

    offset_vec: Tensor

    def __post_init__(self) -> None:
        _require_vectors("offset_vec", self.offset_vec, "[S, V]")
        super().__post_init__()

    def _edit(self, values: Tensor, model: PreTrainedModel) -> Callable[[Tensor], Tensor]:
        return _adds(self.epsilon * values @ self.offset_vec.to(values), model)

    def require_fit(self, model: PreTrainedModel) -> None:
        _require_same("vocabulary", self.offset_vec.shape[1], len(hf.lm_head(model).weight))

    def fold(self, model: PreTrainedModel, values: Values | None = None) -> PreTrainedModel:
        model, values = self._to_fold(model, values)
        return _with_bias(model, self.epsilon * values @ self.offset_vec.to(values))


def _of_rows(values: Tensor, given: Tensor) -> Tensor:
    """Values [B, C] for the rows of something [N, …, D], as [N, 1, …, C]."""
    rows = hf.for_batch_rows(values, len(given))
    return rows.reshape(len(rows), *[1] * (given.ndim - 2), -1)


def _adds(terms: Tensor, model: PreTrainedModel) -> Callable[[Tensor], Tensor]:
    """What adds a vector [C], or one for each text, [B, C]."""
    terms = terms.to(model.dtype)
    return lambda given: given + (terms if terms.ndim == 1 else _of_rows(terms, given))


def _with_bias(model: PreTrainedModel, bias: Tensor) -> PreTrainedModel:
    """The model with so much more bias [V] at its head."""
    head = hf.lm_head(model)
    if head.bias is None:
        raise ValueError(
            f"a {model.config.model_type} model has no bias at its output head to fold this steer into: use "
            f"steer.on(model), or a steer of adaptor_class 'multiply'"
        )
    head.bias = nn.Parameter((head.bias.float() + bias).to(head.bias.dtype), requires_grad=False)
    return model


def _require_vectors(name: str, tensor: Tensor, shape: str) -> None:
    if tensor.ndim != 2:
        raise ValueError(f"{name} must have the shape {shape}, not {tuple(tensor.shape)}")


def _require_same(what: str, steers: int, models: int) -> None:
    if steers != models:
        raise ValueError(
            f"this steer is for a {what} of {steers}; the model's is {models}: train one for it, or transfer "
            f"this one with steer_utils.transfer"
        )
