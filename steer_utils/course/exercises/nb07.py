"""Exercises of notebook 07: singular values, sides, the constant part, evidence of tokens, the best span."""

import torch

from . import exercise


def _noise(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _factors(seed):
    return _noise(seed, 12, 3), _noise(seed + 1, 12, 3)


@exercise(
    lambda: [(*_factors(0), 0.1), (*_factors(7), 2.0)],
    hint="With P1 = Q1 R1 and P2 = Q2 R2, P1 P2ᵀ = Q1 (R1 R2ᵀ) Q2ᵀ. Q1 and Q2 change no singular value.",
)
def singular_values(p1, p2, epsilon):
    r1, r2 = (torch.linalg.qr(factor).R for factor in (p1, p2))
    return epsilon * torch.linalg.svdvals(r1 @ r2.T)


@singular_values.mistake("epsilon is missing: the steer adds ε h P1 P2ᵀ.")
def _(p1, p2, epsilon):
    return torch.linalg.svdvals(torch.linalg.qr(p1).R @ torch.linalg.qr(p2).R.T)


@singular_values.mistake("The product is R1 R2ᵀ: the second factor is transposed.")
def _(p1, p2, epsilon):
    return epsilon * torch.linalg.svdvals(torch.linalg.qr(p1).R @ torch.linalg.qr(p2).R)


@singular_values.mistake("You formed the D × D matrix. Take the SVD of the small R × R product.")
def _(p1, p2, epsilon):
    return epsilon * torch.linalg.svdvals(p1 @ p2.T)


@singular_values.mistake("These are the singular values of P1 alone: both factors count.")
def _(p1, p2, epsilon):
    return epsilon * torch.linalg.svdvals(p1)


HIDDEN = _noise(1, 9, 4) + torch.tensor([0.3, -0.5, 0.2, 0.4])
U = torch.linalg.qr(_noise(2, 4, 3)).Q
V = torch.linalg.qr(_noise(3, 4, 3)).Q
SKEWED = torch.cat(
    [HIDDEN, -30 * (U @ (HIDDEN @ U).mean(dim=0).sign())[None]]
)  # one state outweighs the others


@exercise(
    lambda: [(HIDDEN, U, V), (SKEWED, U, V), (HIDDEN, -U, V)],
    hint="hidden @ u is [N, K]. The sign of column i is that of its mean over the N states.",
)
def turned(hidden, u, v):
    return v * (hidden @ u).mean(dim=0).sign()


@turned.mistake("The sign is reversed: where h·u is positive, a positive steer value adds +v.")
def _(hidden, u, v):
    return -v * (hidden @ u).mean(dim=0).sign()


@turned.mistake("You counted states. Take the sign of the mean of h·u, in which a large h·u counts more.")
def _(hidden, u, v):
    return v * (hidden @ u).sign().mean(dim=0).sign()


@turned.mistake("A state is read along u. You projected it on v, along which the steer writes.")
def _(hidden, u, v):
    return v * (hidden @ v).mean(dim=0).sign()


@turned.mistake("Return unit vectors: multiply by the sign of the mean alone.")
def _(hidden, u, v):
    return v * (hidden @ u).mean(dim=0)


MATRIX = _noise(4, 4, 4)


@exercise(
    lambda: [(HIDDEN, MATRIX), (3 * HIDDEN + 1, MATRIX)],
    hint="What a state gains is gain = hidden @ matrix, [N, D]. Compare the mean gain with the gains.",
)
def constant_share(hidden, matrix):
    gain = hidden @ matrix
    return (gain.mean(dim=0).square().sum() / gain.square().sum(dim=1).mean()).item()


@constant_share.mistake("Take squared lengths: shares of squares add up to 1, shares of lengths do not.")
def _(hidden, matrix):
    gain = hidden @ matrix
    return (gain.mean(dim=0).norm() / gain.norm(dim=1).mean()).item()


@constant_share.mistake("That is the share in the states. Multiply by the matrix first.")
def _(hidden, matrix):
    return (hidden.mean(dim=0).square().sum() / hidden.square().sum(dim=1).mean()).item()


@constant_share.mistake("That is the other part, which varies from state to state.")
def _(hidden, matrix):
    gain = hidden @ matrix
    return 1 - (gain.mean(dim=0).square().sum() / gain.square().sum(dim=1).mean()).item()


@constant_share.mistake("The mean gain must be compared with the mean of the squares, not with their sum.")
def _(hidden, matrix):
    gain = hidden @ matrix
    return (gain.mean(dim=0).square().sum() / gain.square().sum()).item()


EMBEDDINGS = _noise(5, 7, 4)
NEXT = torch.tensor([3, 0, 6, 6, 1, 2, 5, 4, 0])


@exercise(
    lambda: [
        (HIDDEN, NEXT, EMBEDDINGS, MATRIX, 3.0, -3.0),
        (HIDDEN[:4], NEXT[:4], EMBEDDINGS, MATRIX, 1.0, 0.0),
    ],
    hint="At steer value v the logits are (h + v h M) Eᵀ. Take log_softmax, pick next_ids, and subtract.",
)
def token_evidence(hidden, next_ids, embeddings, matrix, a, b):
    def log_p(value):
        logits = (hidden + value * hidden @ matrix) @ embeddings.T
        return logits.log_softmax(dim=-1).gather(1, next_ids[:, None])[:, 0]

    return log_p(a) - log_p(b)


@token_evidence.mistake("These are logits. Other words gain too: take log_softmax before you compare.")
def _(hidden, next_ids, embeddings, matrix, a, b):
    gain = (a - b) * hidden @ matrix @ embeddings.T
    return gain.gather(1, next_ids[:, None])[:, 0]


@token_evidence.mistake("The sign is reversed: evidence for a is log p at a less log p at b.")
def _(hidden, next_ids, embeddings, matrix, a, b):
    return token_evidence(hidden, next_ids, embeddings, matrix, b, a)


@token_evidence.mistake("These are differences of probabilities. Take their logarithms.")
def _(hidden, next_ids, embeddings, matrix, a, b):
    both = [((hidden + v * hidden @ matrix) @ embeddings.T).softmax(dim=-1) for v in (a, b)]
    return (both[0] - both[1]).gather(1, next_ids[:, None])[:, 0]


@token_evidence.mistake("The state itself is missing: the steered state is h + v h M, not v h M.")
def _(hidden, next_ids, embeddings, matrix, a, b):
    both = [(v * hidden @ matrix @ embeddings.T).log_softmax(dim=-1) for v in (a, b)]
    return (both[0] - both[1]).gather(1, next_ids[:, None])[:, 0]


@token_evidence.mistake("The matrix is transposed: a state is a row, and gains h M.")
def _(hidden, next_ids, embeddings, matrix, a, b):
    return token_evidence(hidden, next_ids, embeddings, matrix.T, a, b)


NUMBERS = [-2.0, 1.5, -0.5, 1.0, 0.75, -3.0, 2.25, -1.0, 0.5]


@exercise(
    lambda: [(NUMBERS, 10), (NUMBERS, 2), (NUMBERS, 1), ([-1.0, -2.0], 3)],
    hint="Two loops: start, and end from start + 1 to start + max_length. Begin with (0, 0), whose sum is 0.",
)
def best_span(evidence, max_length):
    best, most = (0, 0), 0.0
    for start in range(len(evidence)):
        for end in range(start + 1, min(start + max_length, len(evidence)) + 1):
            if (found := sum(evidence[start:end])) > most:
                best, most = (start, end), found
    return best


def _all_spans(evidence, max_length):
    found = [(0, 0)]
    for start in range(len(evidence)):
        found += [(start, end) for end in range(start + 1, min(start + max_length, len(evidence)) + 1)]
    return found


@best_span.mistake("The end is exclusive: evidence[start:end] is the span.")
def _(evidence, max_length):
    start, end = max(_all_spans(evidence, max_length), key=lambda span: sum(evidence[slice(*span)]))
    return start, max(end - 1, 0)


@best_span.mistake("Spans may have at most max_length tokens.")
def _(evidence, max_length):
    return max(_all_spans(evidence, len(evidence)), key=lambda span: sum(evidence[slice(*span)]))


@best_span.mistake("Off by one: a span of max_length tokens is allowed.")
def _(evidence, max_length):
    return max(_all_spans(evidence, max_length - 1), key=lambda span: sum(evidence[slice(*span)]))


@best_span.mistake("If every token speaks against a, no span does: return (0, 0).")
def _(evidence, max_length):
    return max(_all_spans(evidence, max_length)[1:], key=lambda span: sum(evidence[slice(*span)]))


@best_span.mistake("That is the span with the greatest mean. Take the greatest sum.")
def _(evidence, max_length):
    spans = _all_spans(evidence, max_length)
    return max(spans, key=lambda span: sum(evidence[slice(*span)]) / max(1, span[1] - span[0]))
