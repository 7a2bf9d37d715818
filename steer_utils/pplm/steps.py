"""What PPLM computes at one token: losses, and gradient steps against them.

The steps move x: the keys and values of each layer, the last hidden states h, or the probabilities p̃.

    x ← x − stepsize · g / ‖g‖^gamma,   g = ∂loss/∂x,
    loss = −log Σ_{w in bag} p̃(w) − log p(class | mean h) + kl_scale · KL(p̃ ‖ p)

Each batch row has its own losses and norms. Source: Dathathri et al. 2020, section 3, and their program.
Shapes: B batch rows, T tokens, P cached positions, D width, V vocabulary, H heads, G groups of tensors.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import Cache, PreTrainedModel

from .. import hf
from .classifier import masked_mean

Groups = list[tuple[Tensor, ...]]  # tensors [B, …]; the norm of a gradient is taken over one group
Losses = dict[str, Tensor]  # name -> [B], in nats


def bag_loss(log_probs: Tensor, ids: Tensor, wanted: Tensor | None = None) -> Tensor:
    """−log of the probability that the next token is in a bag, [B]; always finite.

    log_probs: [B, V]. ids: token ids [K]; duplicates count twice. wanted: which of them count, [B, K].
    """
    of_bag = log_probs[:, ids]
    if wanted is not None:
        of_bag = of_bag.masked_fill(~wanted, torch.finfo(of_bag.dtype).min)
    return -of_bag.logsumexp(dim=-1)


def log_of(probabilities: Tensor) -> Tensor:
    """Logarithm of probabilities [B, V]; those below 10⁻¹², negative ones too, count as 10⁻¹²."""
    return probabilities.clamp(min=1e-12).log()


@dataclass
class Normalized:
    """A step of −stepsize · g / ‖g‖^gamma: with gamma = 1, each group of each batch row moves by stepsize."""

    stepsize: float
    gamma: float
    running: bool = False  # whether ‖g‖ is the largest norm so far, of earlier tokens too
    norms: Tensor | None = None  # ‖g‖ of the latest step, [G, B]; give those of the token before
    trace: list[Tensor] = field(default_factory=list)  # each step's own gradient norms

    def step(self, moved: Groups, gradients: Groups) -> None:
        """Change the tensors in place."""
        device = gradients[0][0].device  # the layers of a large model may be on several
        norms = [torch.stack([each.flatten(1).norm(dim=1) for each in group]) for group in gradients]
        norms = torch.stack([of_group.norm(dim=0).to(device) for of_group in norms])
        self.trace.append(norms)
        self.norms = norms if not self.running or self.norms is None else torch.maximum(norms, self.norms)
        scales = (self.norms + 1e-15) ** -self.gamma  # as in the authors' program
        scales = scales.clamp(max=torch.finfo(scales.dtype).max)  # 0 · inf would be NaN
        for factor, group, of_group in zip(-self.stepsize * scales, moved, gradients, strict=True):
            for tensor, gradient in zip(group, of_group, strict=True):
                tensor.addcmul_(factor.to(tensor.device).reshape(-1, *[1] * (tensor.ndim - 1)), gradient)


@dataclass
class Adam:
    """A step of Adam: each number moves by about the step size, however small its gradient is."""

    stepsize: float
    norms: Tensor | None = None  # it needs none of the token before
    optimizer: torch.optim.Adam | None = None

    def step(self, moved: Groups, gradients: Groups) -> None:
        """Change the tensors in place."""
        flat = list(chain(*moved))
        self.optimizer = self.optimizer or torch.optim.Adam(flat, lr=self.stepsize)
        for tensor, gradient in zip(flat, chain(*gradients), strict=True):
            tensor.grad = gradient
        self.optimizer.step()
        self.optimizer.zero_grad()


class StepInputs(NamedTuple):
    """What the unsteered model computed before a token is written. Each kind of step reads some of it."""

    ids: Tensor | None = None  # token ids so far, [B, T]; only the last one is not in `past`
    mask: Tensor | None = None  # 1 for tokens, 0 for padding, [B, P + 1]
    past: Cache | None = None  # KV cache of the P positions before the last token; the steps start here
    past_and_last: Cache | None = None  # KV cache of P + 1 positions, for soft tokens
    hidden: Tensor | None = None  # last hidden states, [B, T, D]; without a head [B, 1, D]
    logits: Tensor | None = None  # next-token logits or log probabilities, [B, V]
    start: tuple[Tensor, Tensor] | None = None  # from `start_hidden`, if it was called before

    @property
    def log_probs(self) -> Tensor:
        return self.logits.detach().log_softmax(dim=-1)


class Descent(NamedTuple):
    """How many steps are taken, by which rule, where, and against which loss."""

    rule: Normalized | Adam
    num_iterations: int = 1
    bags: Sequence[tuple[Tensor, Tensor | None]] = ()  # ids and wanted of each, see `bag_loss`
    head: Callable[[Tensor], Tensor] | None = None  # class logits [B, C] from mean hidden states [B, D]
    target: int | None = None  # the class
    kl_scale: float = 0.0
    window_length: int = 0  # how many positions move; all with 0 and in shorter texts
    window: str = "newest"  # which ones; or the "oldest"
    decay: bool = False  # multiply the gradient by 1/length, 2/length, … 1 from the first to the last of them
    horizon_length: int = 1  # see `look_ahead`

    def losses(self, log_probs: Tensor, unsteered: Tensor, features: Tensor | None = None) -> Losses:
        """The terms "bag", "class" and "kl"; features: mean hidden states [B, D]."""
        found = {}
        if self.bags:
            found["bag"] = sum(bag_loss(log_probs, *bag) for bag in self.bags)
        if self.head is not None:
            found["class"] = -self.head(features).log_softmax(dim=-1)[:, self.target]
        if self.kl_scale > 0:
            found["kl"] = self.kl_scale * (log_probs.exp() * (log_probs - unsteered)).sum(dim=-1)
        return found

    def weights(self, mask: Tensor) -> Tensor | None:
        """The factor of the gradient at each position, [B, P], from a mask [B, P]; None if all are 1."""
        length, tokens = self.window_length, mask.sum(dim=1, keepdim=True)
        if length == 0 or mask.shape[1] <= length:
            return None
        place = mask.cumsum(dim=1) - (tokens - length if self.window == "newest" else 0)
        inside = (place >= 1) & (place <= length)
        weights = inside * (place / length if self.decay else 1.0)
        return torch.where(tokens > length, weights, 1.0)


class Perturbed(NamedTuple):
    """The moved tensors, what they were before, the losses before each step, and the update rule."""

    moved: Groups
    start: Groups
    losses: list[Losses]
    rule: Normalized | Adam

    @property
    def deltas(self) -> Groups:
        """By how much each tensor was moved."""
        groups = zip(self.moved, self.start, strict=True)
        return [tuple(new - old for new, old in zip(*pair, strict=True)) for pair in groups]


def perturb_past(model: PreTrainedModel, inputs: StepInputs, descent: Descent) -> Perturbed:
    """Move keys and values of `inputs.past`: for each layer a group of two tensors [B, H, P or window, D/H].

    They are moved in float32, whatever the model's dtype. ValueError for an empty KV cache.
    """
    if inputs.past.get_seq_length() == 0:
        raise ValueError("the KV cache is empty: a text of one token has no past to move")
    size = descent.window_length if descent.window == "newest" else 0
    start = [tuple(tensor[:, :, -size:] for tensor in pair) for pair in hf.cached(inputs.past)]
    moved, unsteered = [tuple(map(_leaf, pair)) for pair in start], inputs.log_probs

    def losses(step):
        hidden, logits = read_last(model, inputs, with_newest(inputs.past, moved))
        log_probs, features = logits.log_softmax(dim=-1), None
        if descent.head is not None:
            features = look_ahead(model, inputs, hidden, log_probs, descent.horizon_length)
        return descent.losses(log_probs, unsteered, features)

    with hf.gradients_through(inputs.past):
        trace = gradient_steps(moved, losses, descent, descent.weights(inputs.mask[:, :-1]))
    return Perturbed(moved, start, trace, descent.rule)


def perturb_hidden(model: PreTrainedModel, inputs: StepInputs, descent: Descent) -> Perturbed:
    """Move `inputs.hidden`, one group [B, T, D]. A bag moves the last state only, a head all of them."""
    hidden, first_logits = inputs.start or start_hidden(model, inputs.hidden)
    unsteered = inputs.log_probs

    def losses(step):
        logits = first_logits if step == 0 else last_logits(model, hidden[:, -1])
        features = None if descent.head is None else masked_mean(hidden, inputs.mask)
        return descent.losses(logits.log_softmax(dim=-1), unsteered, features)

    trace = gradient_steps([(hidden,)], losses, descent, descent.weights(inputs.mask))
    return Perturbed([(hidden,)], [(inputs.hidden,)], trace, descent.rule)


def perturb_probs(model: PreTrainedModel, inputs: StepInputs, descent: Descent) -> Perturbed:
    """Move the next-token probabilities, one group [B, V]. Their sum changes. For bags only."""
    unsteered = inputs.log_probs
    probs = _leaf(unsteered.exp())
    trace = gradient_steps([(probs,)], lambda step: descent.losses(log_of(probs), unsteered), descent)
    return Perturbed([(probs,)], [(unsteered.exp(),)], trace, descent.rule)


def gradient_steps(
    moved: Groups, losses: Callable[[int], Losses], descent: Descent, weights: Tensor | None = None
) -> list[Losses]:
    """Steps on `moved`, in place, by the sum of its losses(step), which are returned as before each step."""
    trace = []
    flat = [tensor.requires_grad_() for tensor in chain(*moved)]
    for step in range(descent.num_iterations):
        with torch.enable_grad():
            found = losses(step)
            gradients = torch.autograd.grad(sum(found.values()).sum(), flat)
        gradients = iter(gradients if weights is None else [_weighed(each, weights) for each in gradients])
        with torch.no_grad():
            descent.rule.step(moved, [tuple(next(gradients) for _ in group) for group in moved])
        trace.append({name: loss.detach() for name, loss in found.items()})
    for tensor in flat:
        tensor.requires_grad_(False)
    return trace


def _weighed(gradient: Tensor, weights: Tensor) -> Tensor:
    """A gradient [B, T, D] or [B, H, P, D/H] times weights [B, P or more]."""
    weights = weights[:, -gradient.shape[-2] :, None].to(gradient.device)
    return gradient * (weights if gradient.ndim == 3 else weights[:, None])


def _leaf(tensor: Tensor) -> Tensor:
    """A copy in float32, or in float64 if the tensor is."""
    return tensor.detach().to(torch.promote_types(tensor.dtype, torch.float32), copy=True)


def with_newest(past: Cache, moved: Groups) -> Cache:
    """A KV cache whose newest positions are the moved ones; gradients flow to them."""

    def joined(old, new):
        kept, new = old[:, :, : old.shape[2] - new.shape[2]], new.to(old.dtype)
        return torch.cat([kept, new], dim=2) if kept.shape[2] else new

    pairs = zip(hf.cached(past), moved, strict=True)
    return hf.with_cached(past, [tuple(map(joined, *pair)) for pair in pairs])


def read_last(model: PreTrainedModel, inputs: StepInputs, past: Cache) -> tuple[Tensor, Tensor]:
    """One pass over the last token on a KV cache, which grows: hidden state [B, D], logits [B, V]."""
    last = inputs.ids[:, -1:].clamp(min=0)  # a chunk of a prompt may end with padding
    found = hf.forward(model, last, inputs.mask, past_key_values=past, use_cache=True)
    hidden = found.last_hidden_state[:, -1]
    return hidden, last_logits(model, hidden)


def last_logits(model: PreTrainedModel, hidden: Tensor) -> Tensor:
    """Logits [B, V] in float32 from last hidden states [B, D]."""
    return hf.logits(model, hidden.to(model.dtype)).float()


@torch.enable_grad()
def start_hidden(model: PreTrainedModel, hidden: Tensor) -> tuple[Tensor, Tensor]:
    """A copy of hidden states [B, T, D] to move, and its logits [B, V] with the graph for the first step."""
    hidden = _leaf(hidden).requires_grad_()
    return hidden, last_logits(model, hidden[:, -1])


def look_ahead(
    model: PreTrainedModel, inputs: StepInputs, hidden: Tensor, log_probs: Tensor, horizon_length: int
) -> Tensor:
    """The mean hidden state [B, D] of the text and of `horizon_length` soft tokens after it.

    A soft token is the mean input embedding under the next-token probabilities. It is processed on the
    unsteered KV cache: gradients flow through log_probs [B, V] only, without a horizon through hidden [B, D].
    """
    newest = hidden.detach() if horizon_length else hidden
    states = [inputs.hidden[:, :-1], newest[:, None].float()]
    past, mask = hf.forked(inputs.past_and_last), inputs.mask
    for _ in range(horizon_length):
        likeliest, mask = log_probs.argmax(dim=-1, keepdim=True), pad(mask, (0, 1), value=1)
        with soft_token(model, log_probs.exp()):
            found = hf.forward(model, likeliest, mask, past_key_values=past, use_cache=True)
        states.append(found.last_hidden_state.float())
        log_probs = last_logits(model, found.last_hidden_state[:, -1]).log_softmax(dim=-1)
    text = torch.cat(states, dim=1)
    return masked_mean(text, mask[:, -text.shape[1] :])


@contextmanager
def soft_token(model: PreTrainedModel, probabilities: Tensor) -> Iterator[None]:
    """While inside, any token [B, 1] is embedded as the mean of all under probabilities [B, V]."""
    if getattr(model.config.get_text_config(), "hidden_size_per_layer_input", 0):
        kind = model.config.model_type
        raise ValueError(f"a {kind!r} model looks up tokens in every block: no soft tokens, horizon_length=0")
    embedding = model.get_input_embeddings()

    def mean(module, args, found):
        row = embedding.weight[args[0]]
        scale = found.float().norm(dim=-1) / row.float().norm(dim=-1)  # Gemma scales what it looks up
        return scale.to(found)[..., None] * (probabilities.to(found) @ embedding.weight)[:, None]

    with embedding.register_forward_hook(mean):
        yield
