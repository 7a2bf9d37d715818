"""The arithmetic of PPLM: losses of a next-token distribution, gradient steps against them, and fusion.

Everything here takes and returns tensors; nothing knows of models. What is moved are groups of tensors, the
keys and values of a layer for one, and a step is measured for each group and each row alone, so a batch is
nothing but its rows. Losses are natural logarithms, one number for each row.
Shapes: B rows, T positions, P cached positions, D width, V vocabulary, K bag words, C classes, G groups.
Source: Dathathri et al. 2020, section 3, and their program; Adam in its place: PPLM.jl.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
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
    """Changes what is moved, in place, along its gradients, both [B, …]; one group, at `index`, at a time."""

    norms: Tensor | None  # [G, B], what the next token's rule is to know

    def step(self, index: int, moved: Sequence[Tensor], gradients: Sequence[Tensor]) -> None: ...


class Normalized:
    """A step of −α · g / ‖g‖^γ: the original's. With γ = 1 each group of each row moves by exactly α.

    running: the norms are the largest so far, of this and of earlier tokens; else those of the step itself.
    norms: [G, B] of earlier tokens.
    """

    def __init__(
        self, stepsize: float, gamma: float, *, running: bool = False, norms: Tensor | None = None
    ) -> None:
        self.stepsize, self.gamma, self.running = stepsize, gamma, running
        self._norms: dict[int, Tensor] = {} if norms is None else dict(enumerate(norms))
        self._found: dict[int, list[Tensor]] = {}

    @property
    def norms(self) -> Tensor | None:
        """The norms that the latest step of each group was taken with, [G, B]; None without any."""
        return _by_index(self._norms)

    @property
    def trace(self) -> Tensor | None:
        """The gradients' own norms at each step, [G, iterations, B]; None without any."""
        return _by_index({index: torch.stack(norms) for index, norms in self._found.items()})

    @torch.no_grad()
    def step(self, index: int, moved: Sequence[Tensor], gradients: Sequence[Tensor]) -> None:
        found = row_norms(gradients)
        self._found.setdefault(index, []).append(found)
        known = self.running and index in self._norms
        norms = torch.maximum(found, self._norms[index].to(found.device)) if known else found
        self._norms[index] = norms
        scale = (norms + TINY) ** -self.gamma
        factors = self.stepsize * scale.clamp(max=torch.finfo(scale.dtype).max)  # 0 · inf would be no number
        for tensor, gradient in zip(moved, gradients, strict=True):
            tensor.addcmul_(factors.reshape(-1, *[1] * (tensor.ndim - 1)), gradient, value=-1)


def _by_index(tensors: dict[int, Tensor]) -> Tensor | None:
    """Tensors of groups, which may be on several devices, as one."""
    device = next((tensor.device for tensor in tensors.values()), None)
    return torch.stack([tensors[index].to(device) for index in sorted(tensors)]) if tensors else None


class Adam:
    """A step of Adam, PPLM.jl's choice: each number moves by about the step size, however small g is."""

    norms: Tensor | None = None

    def __init__(self, stepsize: float) -> None:
        self.stepsize = stepsize
        self._optimizers: dict[int, torch.optim.Adam] = {}

    def step(self, index: int, moved: Sequence[Tensor], gradients: Sequence[Tensor]) -> None:
        if index not in self._optimizers:
            self._optimizers[index] = torch.optim.Adam(moved, lr=self.stepsize)
        for tensor, gradient in zip(moved, gradients, strict=True):
            tensor.grad = gradient
        self._optimizers[index].step()
        self._optimizers[index].zero_grad()


def row_norms(group: Sequence[Tensor]) -> Tensor:
    """The norm of the rows of a group of tensors [B, …], all taken together, [B]."""
    norms = [torch.linalg.vector_norm(tensor, dim=tuple(range(1, tensor.ndim))) for tensor in group]
    return torch.linalg.vector_norm(torch.stack(norms), dim=0)


# --- descent ----------------------------------------------------------------------------------------------


def descend(
    moved: Groups,
    losses: Callable[[Groups], Losses],
    rule: Rule,
    iterations: int,
    weights: Callable[[Tensor], Tensor] | None = None,
) -> list[Losses]:
    """Move tensors against the gradient of the sum of losses; what the losses were before each step.

    moved: changed in place, each group as soon as its gradients are there: where a model uses the groups in
    turn, their gradients do not stand in memory together. So no loss may need the numbers of one group for
    the gradient of another.
    weights: what a gradient [B, …] becomes before the step, such as its window.
    """
    trace = []
    flat = [tensor.requires_grad_() for group in moved for tensor in group]
    with ExitStack() as stack:
        for tensor in flat:
            stack.callback(tensor.requires_grad_, False)
        for index, group in enumerate(moved):
            stack.enter_context(_stepping(index, group, rule, weights))
        for _ in range(iterations):
            with torch.enable_grad():
                found = losses(moved)
                torch.autograd.grad(sum(found.values()).sum(), flat)
            trace.append({name: loss.detach() for name, loss in found.items()})
    return trace


@contextmanager
def _stepping(
    index: int, group: tuple[Tensor, ...], rule: Rule, weights: Callable[[Tensor], Tensor] | None
) -> Iterator[None]:
    """While inside, a group steps when a backward pass has given all of its gradients, which are not kept."""
    arrived: dict[int, Tensor] = {}

    def arrive(place: int, gradient: Tensor) -> Tensor:
        arrived[place] = gradient if weights is None else weights(gradient)
        if len(arrived) == len(group):
            rule.step(index, group, [arrived[i] for i in range(len(group))])
            arrived.clear()
        return gradient.new_zeros(()).expand_as(gradient)  # what the pass goes on to collect

    with ExitStack() as stack:
        for place, tensor in enumerate(group):
            stack.callback(tensor.register_hook(partial(arrive, place)).remove)
        yield
