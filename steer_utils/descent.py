"""The arithmetic of PPLM: losses of a next-token distribution, gradient steps against them, and fusion.

Everything here takes and returns tensors; nothing knows of models. What is moved are groups of tensors, the
keys and values of a layer for one, and a step is measured for each group and each row alone, so a batch is
nothing but its rows. Losses are natural logarithms, one number for each row.
Shapes: B rows, T positions, P cached positions, D width, V vocabulary, K bag words, C classes, G groups.
Source: Dathathri et al. 2020, section 3, and their program; Adam in its place: PPLM.jl.
"""

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

Groups = list[tuple[Tensor, ...]]  # tensors [B, …]; the rows of one belong to the rows of the others
Losses = dict[str, Tensor]  # name -> [B]

TINY = 1e-15  # added to a gradient's norm, as in the original
LEAST = 1e-12  # the smallest probability whose logarithm is taken

# --- losses -----------------------------------------------------------------------------------------------


def bag_loss(log_probs: Tensor, ids: Tensor, wanted: Tensor | None = None) -> Tensor:
    """−log of the probability that the next token is one of a bag, [B]; never infinite.

    log_probs: [B, V]. ids: token ids [K]; one that stands twice counts twice. wanted: [B, K], which of them
    count in each row; all if None.
    """
    of_bag = log_probs[:, ids]
    if wanted is not None:
        of_bag = of_bag.masked_fill(~wanted, torch.finfo(of_bag.dtype).min)
    return -of_bag.logsumexp(dim=-1)


def class_loss(class_logits: Tensor, target: int) -> Tensor:
    """Cross-entropy of a class, [B], from a head's logits [B, C]."""
    targets = torch.full_like(class_logits[:, 0], target, dtype=torch.long)
    return cross_entropy(class_logits, targets, reduction="none")


def divergence(log_probs: Tensor, plain: Tensor) -> Tensor:
    """KL(steered ‖ plain) of log probabilities [B, V], in nats, [B]."""
    return (log_probs.exp() * (log_probs - plain)).sum(dim=-1)


def fused(log_probs: Tensor, plain: Tensor, gm_scale: float) -> Tensor:
    """log of p̃^γ · p^(1−γ), normalised, with γ = gm_scale; log probabilities [B, V] -> [B, V]."""
    return (gm_scale * log_probs + (1 - gm_scale) * plain).log_softmax(dim=-1)


def log_of(probabilities: Tensor) -> Tensor:
    """Logarithms [B, V] of what may have been pushed to 0 or below: at least log 10⁻¹²."""
    return probabilities.clamp(min=LEAST).log()


# --- the window -------------------------------------------------------------------------------------------


def window_weights(
    mask: Tensor, length: int, *, window: str = "newest", decay: bool = False
) -> Tensor | None:
    """What the gradient at each cached position is multiplied by, [B, P]; None where that is 1 everywhere.

    mask: [B, P], 1 for text. length: how many positions move, 0 for all; so it is in rows of no more. decay:
    weights 1/length, 2/length, … 1 in the order of the text. window: "newest", or "oldest" as the original.
    """
    if length == 0 or mask.shape[1] <= length:
        return None
    places, lengths = mask.cumsum(dim=1) - 1, mask.sum(dim=1, keepdim=True)
    inside = places - (lengths - length if window == "newest" else 0)  # 0 … length − 1 inside the window
    ramp = (inside + 1) / length if decay else torch.ones_like(inside, dtype=torch.float32)
    weights = torch.where((inside >= 0) & (inside < length), ramp, 0.0)
    return torch.where(lengths > length, weights, 1.0)


# --- steps ------------------------------------------------------------------------------------------------


class Rule(Protocol):
    """Changes what is moved, in place, along its gradients."""

    def step(self, moved: Groups, gradients: Groups) -> None: ...


class Normalized:
    """A step of −α · g / ‖g‖^γ: the original's. With γ = 1 each group of each row moves by exactly α.

    running: the norms are the largest so far, of this and of earlier tokens; else those of the step itself.
    norms: [G, B] of earlier tokens, and then up to date. trace: the norms at each step, before that.
    """

    def __init__(
        self, stepsize: float, gamma: float, *, running: bool = False, norms: Tensor | None = None
    ) -> None:
        self.stepsize, self.gamma, self.running, self.norms = stepsize, gamma, running, norms
        self.trace: list[Tensor] = []

    @torch.no_grad()
    def step(self, moved: Groups, gradients: Groups) -> None:
        found = torch.stack([row_norms(group) for group in gradients])
        self.trace.append(found)
        known = self.running and self.norms is not None
        self.norms = torch.maximum(found, self.norms) if known else found
        scale = (self.norms + TINY) ** -self.gamma
        factors = self.stepsize * scale.clamp(max=torch.finfo(scale.dtype).max)  # 0 · inf would be no number
        for group, of_group, factor in zip(moved, gradients, factors, strict=True):
            for tensor, gradient in zip(group, of_group, strict=True):
                tensor -= factor.reshape(-1, *[1] * (tensor.ndim - 1)) * gradient


class Adam:
    """A step of Adam, PPLM.jl's choice: each number moves by about the step size, however small g is."""

    def __init__(self, stepsize: float) -> None:
        self.stepsize, self.optimizer = stepsize, None
        self.norms = None

    def step(self, moved: Groups, gradients: Groups) -> None:
        flat = [tensor for group in moved for tensor in group]
        self.optimizer = self.optimizer or torch.optim.Adam(flat, lr=self.stepsize)
        for tensor, gradient in zip(flat, (g for group in gradients for g in group), strict=True):
            tensor.grad = gradient
        self.optimizer.step()


def row_norms(group: Sequence[Tensor]) -> Tensor:
    """The norm of the rows of a group of tensors [B, …], all taken together, [B]."""
    return sum(tensor.square().flatten(1).sum(dim=1) for tensor in group).sqrt()


def descend(
    moved: Groups,
    losses: Callable[[Groups], Losses],
    rule: Rule,
    iterations: int,
    weights: Callable[[Tensor], Tensor] | None = None,
) -> list[Losses]:
    """Move tensors against the gradient of the sum of losses; what the losses were before each step.

    moved: changed in place. weights: what a gradient [B, …] becomes before the step, such as its window.
    """
    trace = []
    flat = [tensor.requires_grad_() for group in moved for tensor in group]
    for _ in range(iterations):
        with torch.enable_grad():
            found = losses(moved)
            gradients = iter(torch.autograd.grad(sum(found.values()).sum(), flat))
        trace.append({name: loss.detach() for name, loss in found.items()})
        grouped = [tuple(next(gradients) for _ in group) for group in moved]
        if weights is not None:
            grouped = [tuple(map(weights, group)) for group in grouped]
        rule.step(moved, grouped)
    for tensor in flat:
        tensor.requires_grad_(False)
    return trace
