"""Exercises of notebook 02: the head's feature and loss, a gradient step, the fusion, the best of r."""

import torch

from . import exercise

HIDDEN = torch.linspace(-2, 3, 3 * 5 * 4).reshape(3, 5, 4).sin()
LEFT = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1], [0, 0, 0, 1, 1]])


@exercise(
    lambda: [(HIDDEN, LEFT), (HIDDEN[:, 1:], LEFT.flip(1)[:, :-1])],
    hint="Multiply by mask[..., None], sum over positions, and divide by each text's own number of tokens.",
)
def mean_state(hidden, mask):
    weights = mask[..., None].to(hidden)
    return (hidden * weights).sum(dim=1) / weights.sum(dim=1)


@mean_state.mistake("The states of the padding count too: leave them out with the mask.")
def _(hidden, mask):
    return hidden.mean(dim=1)


@mean_state.mistake(
    "The padding still counts in the divisor: divide by the number of tokens, mask.sum(dim=1)."
)
def _(hidden, mask):
    return (hidden * mask[..., None]).mean(dim=1)


@mean_state.mistake("That is the sum over the tokens, which grows with the text. The head reads their mean.")
def _(hidden, mask):
    return (hidden * mask[..., None]).sum(dim=1)


@mean_state.mistake("Every text is divided by the length of the first one: divide each by its own length.")
def _(hidden, mask):
    return (hidden * mask[..., None]).sum(dim=1) / mask[0].sum()


@mean_state.mistake("That is the mean over the batch. Take the mean over positions, dim=1.")
def _(hidden, mask):
    return (hidden * mask[..., None]).sum(dim=0) / mask.sum(dim=0)[:, None].clamp(min=1)


FEATURES = torch.linspace(-1, 2, 3 * 4).reshape(3, 4).cos()
WEIGHT = torch.linspace(-3, 2, 2 * 4).reshape(2, 4).sin()
BIAS = torch.tensor([0.3, -0.5])


@exercise(
    lambda: [(FEATURES, WEIGHT, BIAS, target) for target in (0, 1)],
    hint="logits = features @ weight.T + bias; then log_softmax over the classes, and the target's column.",
)
def class_loss(features, weight, bias, target):
    logits = features @ weight.T + bias
    return -logits.log_softmax(dim=-1)[:, target]


@class_loss.mistake("The bias is missing: logits = features @ weight.T + bias.")
def _(features, weight, bias, target):
    return -(features @ weight.T).log_softmax(dim=-1)[:, target]


@class_loss.mistake("Wrong sign: a loss falls as the probability rises.")
def _(features, weight, bias, target):
    return (features @ weight.T + bias).log_softmax(dim=-1)[:, target]


@class_loss.mistake("That is the logit with a minus sign. Normalise over the classes: log_softmax(dim=-1).")
def _(features, weight, bias, target):
    return -(features @ weight.T + bias)[:, target]


@class_loss.mistake("The softmax runs over the texts of the batch. It belongs over the classes, dim=-1.")
def _(features, weight, bias, target):
    return -(features @ weight.T + bias).log_softmax(dim=0)[:, target]


@class_loss.mistake("That is one number for the whole batch. Each text needs a loss of its own: [B].")
def _(features, weight, bias, target):
    return -(features @ weight.T + bias).log_softmax(dim=-1)[:, target].mean()


@exercise(
    lambda: [
        (FEATURES, WEIGHT, BIAS, target, stepsize) for target, stepsize in ((0, 0.1), (1, 0.1), (1, 0.5))
    ],
    hint="With p the head's probabilities and y 1 for the target and 0 elsewhere, the gradient is "
    "(p − y) @ weight. Divide each row of it by its own norm.",
)
def gradient_step(hidden, weight, bias, target, stepsize):
    probabilities = (hidden @ weight.T + bias).softmax(dim=-1)
    wanted = torch.eye(len(weight))[target]
    gradient = (probabilities - wanted) @ weight
    return hidden - stepsize * gradient / gradient.norm(dim=-1, keepdim=True)


@gradient_step.mistake("Wrong sign: this step raises the loss. Go against the gradient.")
def _(hidden, weight, bias, target, stepsize):
    gradient = ((hidden @ weight.T + bias).softmax(dim=-1) - torch.eye(len(weight))[target]) @ weight
    return hidden + stepsize * gradient / gradient.norm(dim=-1, keepdim=True)


@gradient_step.mistake(
    "The gradient is not normalised: divide it by its norm, so that every state moves by stepsize."
)
def _(hidden, weight, bias, target, stepsize):
    gradient = ((hidden @ weight.T + bias).softmax(dim=-1) - torch.eye(len(weight))[target]) @ weight
    return hidden - stepsize * gradient


@gradient_step.mistake("The norm is taken over the whole batch. Each batch row has its own: norm(dim=-1).")
def _(hidden, weight, bias, target, stepsize):
    gradient = ((hidden @ weight.T + bias).softmax(dim=-1) - torch.eye(len(weight))[target]) @ weight
    return hidden - stepsize * gradient / gradient.norm()


@gradient_step.mistake("That is Adam's first step, which moves every number equally. Divide by the norm.")
def _(hidden, weight, bias, target, stepsize):
    gradient = ((hidden @ weight.T + bias).softmax(dim=-1) - torch.eye(len(weight))[target]) @ weight
    return hidden - stepsize * gradient.sign()


@gradient_step.mistake("That is the step alone. Add it to the hidden state.")
def _(hidden, weight, bias, target, stepsize):
    gradient = ((hidden @ weight.T + bias).softmax(dim=-1) - torch.eye(len(weight))[target]) @ weight
    return -stepsize * gradient / gradient.norm(dim=-1, keepdim=True)


UNSTEERED = torch.tensor([[0.5, 0.3, 0.15, 0.05], [0.1, 0.2, 0.3, 0.4]])
STEERED = torch.tensor([[0.05, 0.1, 0.25, 0.6], [0.45, 0.3, 0.2, 0.05]])


@exercise(
    lambda: [(UNSTEERED, STEERED, gm_scale, top_k) for gm_scale, top_k in ((0.9, 2), (0.5, 3), (0.2, 2))],
    hint="steered ** gm_scale * unsteered ** (1 − gm_scale), then zero for all but the top_k largest of each "
    "batch row, then divide by the sum.",
)
def fused(unsteered, steered, gm_scale, top_k):
    mixed = steered**gm_scale * unsteered ** (1 - gm_scale)
    smallest = mixed.topk(top_k, dim=-1).values[:, -1:]
    mixed = mixed.where(mixed >= smallest, 0.0)
    return mixed / mixed.sum(dim=-1, keepdim=True)


@fused.mistake("The exponents are swapped: gm_scale belongs to the steered probabilities.")
def _(unsteered, steered, gm_scale, top_k):
    mixed = unsteered**gm_scale * steered ** (1 - gm_scale)
    mixed = mixed.where(mixed >= mixed.topk(top_k, dim=-1).values[:, -1:], 0.0)
    return mixed / mixed.sum(dim=-1, keepdim=True)


@fused.mistake("That is the arithmetic mean. Multiply powers instead of adding multiples.")
def _(unsteered, steered, gm_scale, top_k):
    mixed = gm_scale * steered + (1 - gm_scale) * unsteered
    mixed = mixed.where(mixed >= mixed.topk(top_k, dim=-1).values[:, -1:], 0.0)
    return mixed / mixed.sum(dim=-1, keepdim=True)


@fused.mistake("The product is not normalised: divide each batch row by its sum, after the cut.")
def _(unsteered, steered, gm_scale, top_k):
    mixed = steered**gm_scale * unsteered ** (1 - gm_scale)
    return mixed.where(mixed >= mixed.topk(top_k, dim=-1).values[:, -1:], 0.0)


@fused.mistake("top_k is ignored: all but the top_k largest entries of each batch row become 0.")
def _(unsteered, steered, gm_scale, top_k):
    mixed = steered**gm_scale * unsteered ** (1 - gm_scale)
    return mixed / mixed.sum(dim=-1, keepdim=True)


@fused.mistake("The steered probabilities are cut before the fusion. Fuse first, then cut.")
def _(unsteered, steered, gm_scale, top_k):
    cut = steered.where(steered >= steered.topk(top_k, dim=-1).values[:, -1:], 0.0)
    mixed = cut**gm_scale * unsteered ** (1 - gm_scale)
    return mixed / mixed.sum(dim=-1, keepdim=True)


SCORES = torch.tensor([[-0.1, -0.5, -0.9], [-0.3, -0.2, -2.0], [-1.0, -0.4, -0.6]])
DISTINCT = torch.tensor([[0.4, 0.95, 0.9], [0.9, 0.92, 0.97], [0.3, 0.5, 0.6]])


@exercise(
    lambda: [(SCORES, DISTINCT, threshold) for threshold in (0.85, 0.2, 0.94)],
    hint="Give completions below the threshold a score of −inf before argmax. Treat prompts where none "
    "reaches it apart: there, argmax of distinct.",
)
def best_of_r(scores, distinct, threshold):
    enough = distinct >= threshold
    best = scores.masked_fill(~enough, -torch.inf).argmax(dim=1)
    return torch.where(enough.any(dim=1), best, distinct.argmax(dim=1))


@best_of_r.mistake("The threshold is ignored: completions that repeat themselves are out of the race.")
def _(scores, distinct, threshold):
    return scores.argmax(dim=1)


@best_of_r.mistake("That is the worst of r. The best has the highest log probability, nearest to 0.")
def _(scores, distinct, threshold):
    enough = distinct >= threshold
    worst = scores.masked_fill(~enough, torch.inf).argmin(dim=1)
    return torch.where(enough.any(dim=1), worst, distinct.argmax(dim=1))


@best_of_r.mistake("Where no completion reaches the threshold, take the most distinct one, not the first.")
def _(scores, distinct, threshold):
    return scores.masked_fill(distinct < threshold, -torch.inf).argmax(dim=1)


@best_of_r.mistake(
    "That is the most distinct completion. Among those above the threshold, the score decides."
)
def _(scores, distinct, threshold):
    return distinct.argmax(dim=1)


@best_of_r.mistake("That chooses the best prompt for each sample. Choose a sample for each prompt, dim=1.")
def _(scores, distinct, threshold):
    enough = distinct >= threshold
    best = scores.masked_fill(~enough, -torch.inf).argmax(dim=0)
    return torch.where(enough.any(dim=0), best, distinct.argmax(dim=0))
