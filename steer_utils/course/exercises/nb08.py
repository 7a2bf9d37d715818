"""Exercises of notebook 08: KL, the search for equal strength, an interaction, the Pareto front."""

import numpy as np
import torch

from . import exercise


def _logits(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@exercise(
    lambda: [(2 * _logits(0, 3, 7), _logits(1, 3, 7)), (_logits(2, 4), _logits(3, 4))],
    hint="Both need log_softmax over the last axis; the expectation is under the steered distribution.",
)
def kl(steered, unsteered):
    log_p, log_q = steered.log_softmax(-1), unsteered.log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1)


@kl.mistake("That is KL(unsteered ‖ steered). The expectation must be taken under the steered model.")
def _(steered, unsteered):
    log_p, log_q = steered.log_softmax(-1), unsteered.log_softmax(-1)
    return (log_q.exp() * (log_q - log_p)).sum(-1)


@kl.mistake("Logits are not log probabilities: normalise both with log_softmax first.")
def _(steered, unsteered):
    return (steered.softmax(-1) * (steered - unsteered)).sum(-1)


@kl.mistake("Sum over the vocabulary. A mean makes the KL smaller by a factor of V.")
def _(steered, unsteered):
    log_p, log_q = steered.log_softmax(-1), unsteered.log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).mean(-1)


def _quadratic(strength):
    return 0.3 * strength**2


def _saturating(strength):
    return 4 * strength / (1 + strength)


@exercise(
    lambda: [(_quadratic, 0.5), (_quadratic, 30.0), (_saturating, 2.0), (_saturating, 0.01)],
    hint="Double an upper bound until its KL exceeds the goal, then halve the interval 40 times.",
)
def strength_at(kl_of, nats):
    low, high = 0.0, 1.0
    while kl_of(high) < nats:
        low, high = high, 2 * high
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if kl_of(middle) < nats else (low, middle)
    return high


@strength_at.mistake("The KL is not proportional to the strength, so one division does not find it.")
def _(kl_of, nats):
    return nats / kl_of(1.0)


@strength_at.mistake("The search ends at 1: double the upper bound until its KL exceeds the goal.")
def _(kl_of, nats):
    low, high = 0.0, 1.0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if kl_of(middle) < nats else (low, middle)
    return high


@strength_at.mistake("The KL grows with the square only for weak steers. Search instead of solving.")
def _(kl_of, nats):
    return (nats / kl_of(1.0)) ** 0.5


_scores = np.random.default_rng(0).normal(size=(4, 5, 3))


@exercise(
    lambda: [tuple(_scores), tuple(_scores[::-1])],
    hint="Average the samples of a prompt (axis 1), then y_both − y_a − y_b + y_none.",
)
def interaction(both, a, b, none):
    return (both - a - b + none).mean(axis=1)


@interaction.mistake("The unsteered scores count once too often: both effects are measured from them.")
def _(both, a, b, none):
    return (both - a - b).mean(axis=1)


@interaction.mistake("Average over the samples of each prompt (axis 1), not over the prompts (axis 0).")
def _(both, a, b, none):
    return (both - a - b + none).mean(axis=0)


@interaction.mistake("The sign is wrong: steers that hinder each other have a negative interaction.")
def _(both, a, b, none):
    return (a + b - both - none).mean(axis=1)


POINTS = {"a": (1.0, 0.5), "b": (1.5, 0.9), "c": (1.6, 0.8)}
POINTS |= {"d": (1.5, 0.7), "e": (3.0, 1.0), "f": (2.0, 0.9)}


@exercise(
    lambda: [(POINTS,), ({"x": (1.0, 0.4), "y": (1.0, 0.4), "z": (0.5, 0.1)},)],
    hint="q is dominated by p if p costs no more, controls no less, and the two differ. Compare all pairs.",
)
def undominated(points):
    def beats(p, q):
        return p[0] <= q[0] and p[1] >= q[1] and p != q

    return sorted(name for name, q in points.items() if not any(beats(p, q) for p in points.values()))


@undominated.mistake("A method with the same cost and less control is dominated too: compare with ≤ and ≥.")
def _(points):
    def beats(p, q):
        return p[0] < q[0] and p[1] > q[1]

    return sorted(name for name, q in points.items() if not any(beats(p, q) for p in points.values()))


@undominated.mistake("Less cost is better: p beats q if p[0] ≤ q[0].")
def _(points):
    def beats(p, q):
        return p[0] >= q[0] and p[1] >= q[1] and p != q

    return sorted(name for name, q in points.items() if not any(beats(p, q) for p in points.values()))


@undominated.mistake("Two methods with equal cost and equal control do not dominate each other.")
def _(points):
    found = []
    for name, q in points.items():
        others = [p for other, p in points.items() if other != name]
        if not any(p[0] <= q[0] and p[1] >= q[1] for p in others):
            found.append(name)
    return sorted(found)
