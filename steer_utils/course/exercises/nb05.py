"""Exercises of notebook 05: steered logits, the loss, the sum of two steers, the folded LM head."""

import torch

from . import exercise


def _normal(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


H, E = _normal(0, 5, 6), _normal(1, 9, 6)
P1, P2 = _normal(2, 6, 2), _normal(3, 6, 2)
IDS, LABELS = torch.tensor([3, 0, 8, 5, 5]), torch.tensor([1.0, -1.0, 0.5, 0.0, -0.25])


@exercise(
    lambda: [(H[0], E, P1, P2, 0.1, 3.0), (H[1], E, P1, P2, 0.5, -1.0)],
    hint="The state gains epsilon · value · (h P1) P2ᵀ before it meets the output embeddings.",
)
def steered_logits(h, E, P1, P2, epsilon, value):
    return (h + epsilon * value * (h @ P1) @ P2.T) @ E.T


@steered_logits.mistake(
    "The two factors are transposed: h meets P1 first, and P2ᵀ brings it back to width D."
)
def _(h, E, P1, P2, epsilon, value):
    return (h + epsilon * value * (h @ P2) @ P1.T) @ E.T


@steered_logits.mistake("epsilon is missing: M = ε P1 P2ᵀ.")
def _(h, E, P1, P2, epsilon, value):
    return (h + value * (h @ P1) @ P2.T) @ E.T


@steered_logits.mistake("The hidden state itself is missing: the map is I + vM.")
def _(h, E, P1, P2, epsilon, value):
    return (epsilon * value * (h @ P1) @ P2.T) @ E.T


@steered_logits.mistake("The sign of the value is wrong.")
def _(h, E, P1, P2, epsilon, value):
    return (h - epsilon * value * (h @ P1) @ P2.T) @ E.T


@exercise(
    lambda: [(H, IDS, LABELS, E, P1, P2, 0.3), (H[:2], IDS[:2], LABELS[:2], E, P1, P2, 0.1)],
    hint="Multiply each token's change by its own label, labels[:, None], then use cross_entropy.",
)
def lm_steer_loss(H, next_ids, labels, E, P1, P2, epsilon):
    change = epsilon * labels[:, None] * (H @ P1) @ P2.T
    return torch.nn.functional.cross_entropy((H + change) @ E.T, next_ids)


@lm_steer_loss.mistake("All tokens are steered at value 1. A token takes its own text's label.")
def _(H, next_ids, labels, E, P1, P2, epsilon):
    return torch.nn.functional.cross_entropy((H + epsilon * (H @ P1) @ P2.T) @ E.T, next_ids)


@lm_steer_loss.mistake("That is the sum over tokens. The loss is their mean.")
def _(H, next_ids, labels, E, P1, P2, epsilon):
    change = epsilon * labels[:, None] * (H @ P1) @ P2.T
    return torch.nn.functional.cross_entropy((H + change) @ E.T, next_ids, reduction="sum")


@lm_steer_loss.mistake(
    "The labels weigh the losses. They are steer values: they weigh the change of the state."
)
def _(H, next_ids, labels, E, P1, P2, epsilon):
    logits = (H + epsilon * (H @ P1) @ P2.T) @ E.T
    return (labels * torch.nn.functional.cross_entropy(logits, next_ids, reduction="none")).mean()


@lm_steer_loss.mistake("epsilon is missing: M = ε P1 P2ᵀ.")
def _(H, next_ids, labels, E, P1, P2, epsilon):
    change = labels[:, None] * (H @ P1) @ P2.T
    return torch.nn.functional.cross_entropy((H + change) @ E.T, next_ids)


Q1, Q2 = _normal(4, 6, 3), _normal(5, 6, 3)


def _product(pair):
    """What the check compares: P1 P2ᵀ, as the split into factors is not unique."""
    return pair[0] @ pair[1].T if isinstance(pair, tuple) and len(pair) == 2 else pair


@exercise(
    lambda: [((P1, P2, 0.1, 2.0), (Q1, Q2, 1.0, -1.0)), ((P1, P2, 0.5, 1.0), (P1, P2, 0.5, 1.0))],
    hint="Concatenate along the rank (dim 1), and multiply one factor of each steer by its epsilon · value.",
    of=_product,
)
def side_by_side(one, other):
    (a1, a2, epsilon_a, value_a), (b1, b2, epsilon_b, value_b) = one, other
    first = torch.cat([epsilon_a * value_a * a1, epsilon_b * value_b * b1], dim=1)
    return first, torch.cat([a2, b2], dim=1)


@side_by_side.mistake("The epsilons are missing: each steer brings its own.")
def _(one, other):
    (a1, a2, _, value_a), (b1, b2, _, value_b) = one, other
    return torch.cat([value_a * a1, value_b * b1], dim=1), torch.cat([a2, b2], dim=1)


@side_by_side.mistake("The factor is in both projectors, so it counts squared: put it into one of them.")
def _(one, other):
    (a1, a2, epsilon_a, value_a), (b1, b2, epsilon_b, value_b) = one, other
    a, b = epsilon_a * value_a, epsilon_b * value_b
    return torch.cat([a * a1, b * b1], dim=1), torch.cat([a * a2, b * b2], dim=1)


@side_by_side.mistake("The values are missing: the new steer is used at value 1.")
def _(one, other):
    (a1, a2, epsilon_a, _), (b1, b2, epsilon_b, _) = one, other
    return torch.cat([epsilon_a * a1, epsilon_b * b1], dim=1), torch.cat([a2, b2], dim=1)


@exercise(
    lambda: [(E, P1, P2, 0.1, 3.0), (E, P1, P2, 0.5, -1.0)],
    hint="h (I + vM) Eᵀ = h E'ᵀ, so E' = E (I + vM)ᵀ.",
)
def folded_head(E, P1, P2, epsilon, value):
    return E + epsilon * value * (E @ P2) @ P1.T


@folded_head.mistake("The map is not transposed: h (I + vM) Eᵀ = h (E (I + vM)ᵀ)ᵀ.")
def _(E, P1, P2, epsilon, value):
    return E + epsilon * value * (E @ P1) @ P2.T


@folded_head.mistake("epsilon is missing: M = ε P1 P2ᵀ.")
def _(E, P1, P2, epsilon, value):
    return E + value * (E @ P2) @ P1.T


@folded_head.mistake("That is only the change. The LM head keeps its old weights as well.")
def _(E, P1, P2, epsilon, value):
    return epsilon * value * (E @ P2) @ P1.T
