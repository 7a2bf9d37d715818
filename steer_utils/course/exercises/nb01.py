"""Exercises of notebook 01: the bag's loss, the step on the past, fusion, window, and PPLM at one token."""

import torch

from ... import hf, models
from . import exercise

# --- the loss ---------------------------------------------------------------------------------------------

LOG_PROBS = torch.linspace(-2, 2, 21).sin().mul(3).reshape(3, 7).log_softmax(-1)
RARE = LOG_PROBS - torch.tensor([0.0, 0, 0, 0, 0, 150, 150])  # probabilities too small for float32


@exercise(
    lambda: [(LOG_PROBS, torch.tensor([1, 4])), (RARE, torch.tensor([5, 6]))],
    hint="log_probs[:, bag] holds log p of the bag's words, and logsumexp adds them up as probabilities.",
)
def loss_of_bag(log_probs, bag):
    return -log_probs[:, bag].logsumexp(dim=-1)


@loss_of_bag.mistake("The sign is wrong: a loss falls while the bag becomes likelier.")
def _(log_probs, bag):
    return log_probs[:, bag].logsumexp(dim=-1)


@loss_of_bag.mistake(
    "That adds up the logarithms, so every word would have to be likely at once. Add up the probabilities, "
    "and take the logarithm of the sum."
)
def _(log_probs, bag):
    return -log_probs[:, bag].sum(dim=-1)


@loss_of_bag.mistake(
    "Right for likely words. For rare ones exp underflows to 0, and the loss is that of the added constant, "
    "without a gradient. logsumexp needs no constant."
)
def _(log_probs, bag):
    return -(log_probs[:, bag].exp().sum(dim=-1) + 1e-12).log()


@loss_of_bag.mistake("This is one loss for the whole batch, which couples its rows: keep one a row, [B].")
def _(log_probs, bag):
    return -log_probs[:, bag].logsumexp(dim=-1).mean()


@loss_of_bag.mistake("This is the loss of batch row 0 alone. Index the batch with a colon.")
def _(log_probs, bag):
    return -log_probs[0, bag].logsumexp(dim=-1)


# --- the step on the past ---------------------------------------------------------------------------------

SHAPE = (2, 1, 3, 2)  # B, H, P, D/H
TARGETS = [torch.linspace(-1, 2 + i, 12).cos().mul(1 + i).reshape(SHAPE) for i in range(4)]
ZEROS = [(torch.zeros(SHAPE), torch.zeros(SHAPE)) for _ in range(2)]
MOVED = [(0.1 * TARGETS[0], 0.2 * TARGETS[1]), (0.3 * TARGETS[2], 0.4 * TARGETS[3])]


def distance(deltas):
    """Half the squared distance of the Δ from fixed targets, a loss for each batch row, [B]."""
    flat = [tensor for pair in deltas for tensor in pair]
    pairs = zip(flat, TARGETS, strict=True)
    return sum((one - other).square().flatten(1).sum(1) for one, other in pairs) / 2


def _stepped(loss_of, deltas, change):
    """The Δ after `change` of each block's gradients; each mistake is another change."""
    leaves = [tensor.clone().requires_grad_() for pair in deltas for tensor in pair]
    found = torch.autograd.grad(loss_of(list(zip(leaves[::2], leaves[1::2], strict=True))).sum(), leaves)
    blocks = [tuple(pair) for pair in zip(found[::2], found[1::2], strict=True)]
    return [
        tuple(old + move for old, move in zip(pair, change(block, blocks), strict=True))
        for pair, block in zip(deltas, blocks, strict=True)
    ]


def _norm(tensors):
    return sum(tensor.square().sum(dim=(1, 2, 3), keepdim=True) for tensor in tensors).sqrt()


@exercise(
    lambda: [(distance, ZEROS, 0.5, 1.0), (distance, MOVED, 0.5, 1.5)],
    hint="For each block: the squares of both gradients, summed over all axes but the batch, give ‖g‖² [B]; "
    "with keepdim=True it divides the gradients.",
)
def step_on_past(loss_of, deltas, alpha, gamma):
    leaves = [tensor.clone().requires_grad_() for pair in deltas for tensor in pair]
    pairs = list(zip(leaves[::2], leaves[1::2], strict=True))
    gradients = torch.autograd.grad(loss_of(pairs).sum(), leaves)
    stepped = []
    for i, (dk, dv) in enumerate(deltas):
        gk, gv = gradients[2 * i : 2 * i + 2]
        norm = sum(g.square().sum(dim=(1, 2, 3), keepdim=True) for g in (gk, gv)).sqrt()  # [B, 1, 1, 1]
        stepped.append((dk - alpha * gk / norm**gamma, dv - alpha * gv / norm**gamma))
    return stepped


@step_on_past.mistake("The sign is wrong: the loss rises. Step against the gradient.")
def _(loss_of, deltas, alpha, gamma):
    return _stepped(loss_of, deltas, lambda own, _: [alpha * g / _norm(own) ** gamma for g in own])


@step_on_past.mistake("The gradient is not divided by its norm to the power gamma.")
def _(loss_of, deltas, alpha, gamma):
    return _stepped(loss_of, deltas, lambda own, _: [-alpha * g for g in own])


@step_on_past.mistake("Keys and values have a norm each. A block has one, over the keys and values together.")
def _(loss_of, deltas, alpha, gamma):
    return _stepped(loss_of, deltas, lambda own, _: [-alpha * g / _norm([g]) ** gamma for g in own])


@step_on_past.mistake(
    "The norm is taken over the whole batch, so a row's step depends on the other rows. Sum over all axes "
    "but the first."
)
def _(loss_of, deltas, alpha, gamma):
    return _stepped(
        loss_of,
        deltas,
        lambda own, _: [-alpha * g / sum(each.square().sum() for each in own).sqrt() ** gamma for g in own],
    )


@step_on_past.mistake("There is one norm for all blocks. Each block is divided by its own.")
def _(loss_of, deltas, alpha, gamma):
    return _stepped(
        loss_of,
        deltas,
        lambda own, blocks: [
            -alpha * g / _norm([each for block in blocks for each in block]) ** gamma for g in own
        ],
    )


# --- fusion -----------------------------------------------------------------------------------------------

PAIR = torch.linspace(-3, 3, 28).sin().mul(2).reshape(2, 2, 7).log_softmax(-1)


@exercise(
    lambda: [(*PAIR, 0.9), (*PAIR, 0.3)],
    hint="The logarithm of a product of powers is a weighted sum of logarithms; log_softmax normalises it.",
)
def fusion(log_steered, log_unsteered, gm_scale):
    return (gm_scale * log_steered + (1 - gm_scale) * log_unsteered).log_softmax(dim=-1)


@fusion.mistake("The product is not normalised: its probabilities do not add up to 1.")
def _(log_steered, log_unsteered, gm_scale):
    return gm_scale * log_steered + (1 - gm_scale) * log_unsteered


@fusion.mistake("The weights are swapped: gm_scale is the weight of the steered model.")
def _(log_steered, log_unsteered, gm_scale):
    return (gm_scale * log_unsteered + (1 - gm_scale) * log_steered).log_softmax(dim=-1)


@fusion.mistake("That is the arithmetic mean of the probabilities. PPLM takes the geometric mean.")
def _(log_steered, log_unsteered, gm_scale):
    return (gm_scale * log_steered.exp() + (1 - gm_scale) * log_unsteered.exp()).log()


@fusion.mistake("These are probabilities. Return their logarithms.")
def _(log_steered, log_unsteered, gm_scale):
    return (gm_scale * log_steered + (1 - gm_scale) * log_unsteered).softmax(dim=-1)


# --- the window -------------------------------------------------------------------------------------------


@exercise(
    lambda: [(7, 3, False), (7, 3, True), (3, 5, True), (4, 4, True), (6, 0, False)],
    hint="torch.arange(positions) numbers the positions; the newest `length` of them have the largest "
    "numbers, and a window of 0 is all of them.",
)
def window_weights(positions, length, decay):
    if length == 0 or positions <= length:
        return torch.ones(positions)
    place = torch.arange(positions) - (positions - length) + 1.0  # 1 for the oldest position inside
    return (place > 0) * (place / length if decay else 1.0)


@window_weights.mistake("These are the oldest positions. The window holds the newest ones.")
def _(positions, length, decay):
    return window_weights.answer(positions, length, False).flip(0) * (
        torch.cat([torch.arange(1, length + 1) / length, torch.ones(positions - length)])
        if decay and length < positions
        else 1.0
    )


@window_weights.mistake("Off by one: the window is one position too long.")
def _(positions, length, decay):
    if length == 0 or positions <= length:
        return torch.ones(positions)
    place = torch.arange(positions) - (positions - length) + 1.0
    return (place >= 0) * ((place / length).clamp(min=1 / length) if decay else 1.0)


@window_weights.mistake("The decay runs the wrong way: the newest position has the weight 1.")
def _(positions, length, decay):
    if length == 0 or positions <= length:
        return torch.ones(positions)
    place = torch.arange(positions) - (positions - length) + 1.0
    return (place > 0) * ((1 + length - place) / length if decay else 1.0)


@window_weights.mistake("A window of 0 means that all positions move.")
def _(positions, length, decay):
    return window_weights.answer(positions, length, decay) if length else torch.zeros(positions)


@window_weights.mistake("In a text that is not longer than the window, all weights are 1, decay or not.")
def _(positions, length, decay):
    if length == 0:
        return torch.ones(positions)
    place = torch.arange(positions) - (positions - length) + 1.0
    return (place > 0) * (place / length if decay else 1.0)


# --- one token --------------------------------------------------------------------------------------------


def _case(model, tokenizer, prompt, alpha):
    bag = sorted({models.token_ids(tokenizer, f" {word}")[-1] for word in ("star", "moon", "rocket")})
    ids = models.encode(tokenizer, prompt, device=model.device)["input_ids"]
    return model, ids, torch.tensor(bag, device=model.device), alpha, 0.8


@exercise(
    lambda model, tokenizer: [
        _case(model, tokenizer, "The lake", 0.3),
        _case(model, tokenizer, "Last summer my family", 0.5),
    ],
    hint="The past holds all tokens but the last. A call on a copy of it, `hf.with_cached(past, pairs)`, "
    "with ids[:, -1:] gives the next-token logits: once for the gradient, once more after the step.",
)
def next_token(model, ids, bag, alpha, gm_scale):
    with torch.no_grad():
        past = model(ids[:, :-1], use_cache=True).past_key_values
        unsteered = model(ids).logits[:, -1].log_softmax(-1)
    leaves = [tensor.clone().requires_grad_() for pair in hf.cached(past) for tensor in pair]

    def log_probs(moved):  # a pass of the last token on moved keys and values
        cache = hf.with_cached(past, list(zip(moved[::2], moved[1::2], strict=True)))
        return model(ids[:, -1:], past_key_values=cache).logits[:, -1].log_softmax(-1)

    gradients = torch.autograd.grad(-log_probs(leaves)[0, bag].logsumexp(-1), leaves)
    with torch.no_grad():
        for keys, values, gk, gv in zip(
            leaves[::2], leaves[1::2], gradients[::2], gradients[1::2], strict=True
        ):
            norm = (gk.square().sum() + gv.square().sum()).sqrt()
            keys -= alpha * gk / norm
            values -= alpha * gv / norm
        return (gm_scale * log_probs(leaves) + (1 - gm_scale) * unsteered).log_softmax(-1)[0]


def _next_token(model, ids, bag, alpha, gm_scale, *, per_block=True, end=-1, start=-1):
    """As `next_token`, with a past up to `end` and a pass over the tokens from `start` on."""
    with torch.no_grad():
        past = model(ids[:, :end], use_cache=True).past_key_values
        unsteered = model(ids).logits[:, -1].log_softmax(-1)
    leaves = [tensor.clone().requires_grad_() for pair in hf.cached(past) for tensor in pair]

    def log_probs(moved):
        cache = hf.with_cached(past, list(zip(moved[::2], moved[1::2], strict=True)))
        return model(ids[:, start:], past_key_values=cache).logits[:, -1].log_softmax(-1)

    gradients = torch.autograd.grad(-log_probs(leaves)[0, bag].logsumexp(-1), leaves)
    squares = torch.stack([g.square().sum() for g in gradients]).reshape(-1, 2).sum(1)
    norms = (squares if per_block else squares.sum().expand(len(squares))).sqrt().repeat_interleave(2)
    with torch.no_grad():
        moved = [one - alpha * g / norm for one, g, norm in zip(leaves, gradients, norms, strict=True)]
        return (gm_scale * log_probs(moved) + (1 - gm_scale) * unsteered).log_softmax(-1)[0]


@next_token.mistake("The loss rises: step against its gradient.")
def _(model, ids, bag, alpha, gm_scale):
    return _next_token(model, ids, bag, -alpha, gm_scale)


@next_token.mistake("This is the unsteered model. After the step, process the last token once more.")
def _(model, ids, bag, alpha, gm_scale):
    with torch.no_grad():
        return model(ids).logits[0, -1].log_softmax(-1)


@next_token.mistake("The last token is read twice: the past must hold all tokens but the last.")
def _(model, ids, bag, alpha, gm_scale):
    return _next_token(model, ids, bag, alpha, gm_scale, end=ids.shape[1])


@next_token.mistake("There is one norm for all blocks. Divide each block's gradient by its own norm.")
def _(model, ids, bag, alpha, gm_scale):
    return _next_token(model, ids, bag, alpha, gm_scale, per_block=False)


@next_token.mistake("The fusion is missing: mix p̃ and p, with gm_scale as the weight of p̃.")
def _(model, ids, bag, alpha, gm_scale):
    return _next_token(model, ids, bag, alpha, 1.0)
