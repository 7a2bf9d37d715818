"""What PPLM moves at one token: cached keys and values, last hidden states, or probabilities.

Each function starts from where a model stands, takes `num_iterations` steps against the losses, and says by
how much it moved what; the model itself stays as it is.
Shapes: B rows, T positions, P cached positions, D width, V vocabulary, H heads, L layers, G groups.
Source: as for `pplm`, whose settings are given here as `steer`.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import Cache, PreTrainedModel

from .. import hf
from .classifier import masked_mean
from .descent import (
    Groups,
    Losses,
    Rule,
    bag_loss,
    class_loss,
    descend,
    divergence,
    log_of,
    window_weights,
)

if TYPE_CHECKING:
    from .steer import PPLM


class Begun(NamedTuple):
    """The plain logits as the first step on hidden states needs them: gradients go back through once."""

    deltas: Tensor  # zeros to begin with, [B, T, D] as `Moment.hidden`; the steps change them
    logits: Tensor  # of the next token, [B, V]


class Moment(NamedTuple):
    """Where the plain model stands before it writes a token."""

    last: Tensor  # the last token, [B, 1]
    mask: Tensor  # [B, P + 1]
    before: Cache  # of the P positions before it
    after: Cache  # of P + 1 positions
    hidden: Tensor  # last hidden states, float32: [B, P + 1, D], or [B, 1, D] where no head asks for more
    log_probs: Tensor  # of the next token, [B, V]
    # For each bag, its ids [K] and which of them count, [B, K]; None: those that count after the last token.
    wanted: Sequence[tuple[Tensor, Tensor | None]] | None = None
    begun: Begun | None = None  # of `begin_hidden`: saves a product with the output head


class Perturbed(NamedTuple):
    """Where the steps led: by how much each tensor was moved, the losses before each step, and the rule."""

    deltas: Groups
    losses: list[Losses]
    rule: Rule


def perturb_past(
    steer: "PPLM",
    model: PreTrainedModel,
    moment: Moment,
    *,
    past: Cache | None = None,
    norms: Tensor | None = None,
) -> Perturbed:
    """Move cached keys and values: a group [B, H, P or window, D/H] × 2 for each layer.

    past: what to start from, P positions; `moment.before` if None. norms: see `PPLM.rule`.
    """
    past = moment.before if past is None else past
    movable, rule = movable_past(steer, past), steer.rule(norms)
    trace = move_past(steer, model, moment, movable, rule)
    pairs = zip(movable.moved, hf.cached(past), strict=True)
    return Perturbed([tuple(map(_difference, *pair)) for pair in pairs], trace, rule)


def movable_past(steer: "PPLM", past: Cache) -> hf.MovablePast:
    """A copy of a cache of which the positions can be moved that the settings let move."""
    return hf.MovablePast(past, steer.window_length if steer.window == "newest" else 0)


def move_past(
    steer: "PPLM", model: PreTrainedModel, moment: Moment, past: hf.MovablePast, rule: Rule
) -> list[Losses]:
    """The steps of `perturb_past`, in place; the losses before each."""
    window = window_weights(moment.mask[:, :-1], steer.window_length, window=steer.window, decay=steer.decay)

    def losses(_: Groups) -> Losses:
        hidden, logits = next_token(model, moment, past.reading())
        log_probs = logits.log_softmax(dim=-1)
        features = None if steer.head is None else _look_ahead(steer, model, moment, hidden, log_probs)
        return attribute_losses(steer, moment, log_probs, features)

    weights = None if window is None else lambda g: g * window[:, None, -g.shape[2] :, None].to(g.device)
    return descend(past.moved, losses, rule, steer.num_iterations, weights)


def _difference(moved: Tensor, cached: Tensor) -> Tensor:
    return moved - cached[:, :, -moved.shape[2] :]


def perturb_hidden(
    steer: "PPLM", model: PreTrainedModel, moment: Moment, *, norms: Tensor | None = None
) -> Perturbed:
    """Move the last hidden states, one group [B, T, D]: all that `moment` holds, the last alone for bags."""
    window = window_weights(moment.mask, steer.window_length, window=steer.window, decay=steer.decay)
    mask = moment.mask[:, -moment.hidden.shape[1] :]
    begun = moment.begun or begin_hidden(model, moment.hidden)
    known = [begun.logits]  # where nothing is moved yet, they are the plain ones

    def losses(deltas: Groups) -> Losses:
        hidden = moment.hidden + deltas[0][0]
        features = None if steer.head is None else masked_mean(hidden, mask)
        logits = known.pop() if known else last_logits(model, hidden[:, -1])
        return attribute_losses(steer, moment, logits.log_softmax(dim=-1), features)

    deltas, rule = [(begun.deltas,)], steer.rule(norms)
    weights = None if window is None else lambda g: g * window[:, -g.shape[1] :, None]
    trace = descend(deltas, losses, rule, steer.num_iterations, weights)
    return Perturbed(deltas, trace, rule)


@torch.enable_grad()
def begin_hidden(model: PreTrainedModel, hidden: Tensor) -> Begun:
    """The plain logits after last hidden states [B, T, D], and what `perturb_hidden` moves from there."""
    deltas = torch.zeros_like(hidden, requires_grad=True)
    return Begun(deltas, last_logits(model, hidden[:, -1] + deltas[:, -1]))


def perturb_probs(steer: "PPLM", moment: Moment, *, norms: Tensor | None = None) -> Perturbed:
    """Move the next-token probabilities, one group [B, V], without regard for their sum. Bags only."""
    probs = moment.log_probs.exp()

    def losses(deltas: Groups) -> Losses:
        return attribute_losses(steer, moment, log_of(probs + deltas[0][0]), None)

    deltas, rule = [(torch.zeros_like(probs),)], steer.rule(norms)
    return Perturbed(deltas, descend(deltas, losses, rule, steer.num_iterations), rule)


def attribute_losses(steer: "PPLM", moment: Moment, log_probs: Tensor, features: Tensor | None) -> Losses:
    """The losses by name, [B] each: "bag" (the sum over bags), "class", and "kl", times its weight.

    log_probs: of the steered next token, [B, V]. features: mean hidden states for the head, [B, D].
    """
    found = {}
    if steer.bags:
        wanted = moment.wanted or [bag.wanted(moment.last) for bag in steer.bags]
        found["bag"] = sum(bag_loss(log_probs, *of_bag) for of_bag in wanted)
    if steer.head is not None:
        found["class"] = class_loss(steer.head(features), steer.target_class_id)
    if steer.kl_scale > 0:
        found["kl"] = steer.kl_scale * divergence(log_probs, moment.log_probs)
    return found


def moved(past: Cache, deltas: Groups) -> Cache:
    """A cache whose newest positions are moved; deltas: for each layer, of its keys and of its values."""
    pairs = zip(hf.cached(past), deltas, strict=True)
    return hf.with_cached(past, [tuple(map(_add_to_end, pair, by)) for pair, by in pairs])


def _add_to_end(tensor: Tensor, delta: Tensor) -> Tensor:
    start = tensor.shape[2] - delta.shape[2]
    newest = (tensor[:, :, start:] + delta).to(tensor.dtype)
    return newest if start == 0 else torch.cat([tensor[:, :, :start], newest], dim=2)


def next_token(model: PreTrainedModel, moment: Moment, past: Cache) -> tuple[Tensor, Tensor]:
    """Read the last token on a cache, which grows: its last hidden state [B, D], the next's logits [B, V]."""
    hidden = newest_state(model, moment, past)
    return hidden, last_logits(model, hidden)


def newest_state(model: PreTrainedModel, moment: Moment, past: Cache) -> Tensor:
    """Read the last token on a cache, which grows: its last hidden state [B, D]."""
    read = hf.forward(model, moment.last, moment.mask, past_key_values=past, use_cache=True)
    return read.last_hidden_state[:, -1]


def last_logits(model: PreTrainedModel, hidden: Tensor) -> Tensor:
    return hf.logits(model, hidden.to(model.dtype)).float()


def _look_ahead(
    steer: "PPLM", model: PreTrainedModel, moment: Moment, hidden: Tensor, log_probs: Tensor
) -> Tensor:
    """The mean hidden state [B, D] of the text so far and of `horizon_length` soft tokens after it.

    A soft token is the mean embedding under the next token's probabilities. It is read on the plain cache, so
    gradients reach the past through the probabilities alone; without a horizon, through the newest state.
    """
    newest = hidden.detach() if steer.horizon_length else hidden
    states = [moment.hidden[:, :-1], newest[:, None].float()]
    cache, mask = hf.forked(moment.after), moment.mask
    for _ in range(steer.horizon_length):
        soft, mask = hf.embed_softly(model, log_probs.exp())[:, None], pad(mask, (0, 1), value=1)
        read = hf.forward(model, None, mask, inputs_embeds=soft, past_key_values=cache, use_cache=True)
        states.append(read.last_hidden_state[:, -1:].float())
        log_probs = last_logits(model, read.last_hidden_state[:, -1]).log_softmax(dim=-1)
    seen = torch.cat(states, dim=1)
    return masked_mean(seen, mask[:, -seen.shape[1] :])
