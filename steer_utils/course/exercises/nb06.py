"""Exercises of notebook 06: fit a map of words, move a steer by it, map states, recover a planted map."""

import torch
from torch.nn.functional import normalize

from . import exercise


def _noise(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


SOURCE, TARGET = _noise(0, 60, 5), _noise(1, 60, 7)  # word vectors of 60 shared tokens
P1, P2 = _noise(2, 5, 2), _noise(3, 5, 2)
SQUARE_SOURCE, SQUARE_TARGET = _noise(4, 40, 5), _noise(5, 40, 5)


@exercise(
    lambda: [(TARGET, SOURCE), (SQUARE_TARGET, SQUARE_SOURCE)],
    hint="torch.linalg.lstsq(A, Y).solution is the X with the least ‖A X − Y‖. What are A and Y here?",
)
def word_map(target_words, source_words):
    return torch.linalg.lstsq(target_words, source_words).solution


@word_map.mistake("That is the map from the source to the target. B turns a target word into a source word.")
def _(target_words, source_words):
    return torch.linalg.lstsq(source_words, target_words).solution


@word_map.mistake("The result is transposed: B is [D_t, D_s], so that target_words @ B is [n, D_s].")
def _(target_words, source_words):
    return torch.linalg.lstsq(target_words, source_words).solution.T


@word_map.mistake("Leave the length of the rows as it is: scaling is a step of its own.")
def _(target_words, source_words):
    return normalize(torch.linalg.lstsq(target_words, source_words).solution, dim=1)


@word_map.mistake("EₜᵀEₛ is a product, no fit: solve (EₜᵀEₜ) B = EₜᵀEₛ.")
def _(target_words, source_words):
    return target_words.T @ source_words


@exercise(
    lambda: [(P1, P2, TARGET, SOURCE), (P1, P2, SQUARE_TARGET, SQUARE_SOURCE)],
    hint="B by least squares, its rows scaled to length 1 (normalize(B, dim=1)), then B @ p1 and B @ p2.",
)
def papers_transfer(p1, p2, target_words, source_words):
    b = torch.linalg.lstsq(target_words, source_words).solution
    b = torch.nn.functional.normalize(b, dim=1)
    return b @ p1, b @ p2


@papers_transfer.mistake("The paper scales each row of B to length 1 before it maps the factors.")
def _(p1, p2, target_words, source_words):
    b = torch.linalg.lstsq(target_words, source_words).solution
    return b @ p1, b @ p2


@papers_transfer.mistake("You scaled the columns of B. Scale its rows: dim=1.")
def _(p1, p2, target_words, source_words):
    b = normalize(torch.linalg.lstsq(target_words, source_words).solution, dim=0)
    return b @ p1, b @ p2


@papers_transfer.mistake("The two factors are swapped: P1' comes first.")
def _(p1, p2, target_words, source_words):
    b = normalize(torch.linalg.lstsq(target_words, source_words).solution, dim=1)
    return b @ p2, b @ p1


@papers_transfer.mistake("You scaled the moved factors. Scale the rows of B.")
def _(p1, p2, target_words, source_words):
    b = torch.linalg.lstsq(target_words, source_words).solution
    return normalize(b @ p1, dim=1), normalize(b @ p2, dim=1)


@exercise(
    lambda: [(P1, P2, TARGET, SOURCE), (P1, P2, SQUARE_TARGET, SQUARE_SOURCE)],
    hint="Fit A with Eₛ A ≈ Eₜ for the side that reads, B with Eₜ B ≈ Eₛ for the side that writes.",
)
def dual_transfer(p1, p2, target_words, source_words):
    a = torch.linalg.lstsq(source_words, target_words).solution
    b = torch.linalg.lstsq(target_words, source_words).solution
    return a.T @ p1, b @ p2


@dual_transfer.mistake("That is the paper's way: one map on both sides. States need the other map, Aᵀ.")
def _(p1, p2, target_words, source_words):
    b = torch.linalg.lstsq(target_words, source_words).solution
    return b @ p1, b @ p2


@dual_transfer.mistake("The sides are swapped: P1 reads a state (Aᵀ), P2 writes what words see (B).")
def _(p1, p2, target_words, source_words):
    a = torch.linalg.lstsq(source_words, target_words).solution
    b = torch.linalg.lstsq(target_words, source_words).solution
    return b @ p1, a.T @ p2


@dual_transfer.mistake("Both sides have Aᵀ. It is right for P1 alone.")
def _(p1, p2, target_words, source_words):
    a = torch.linalg.lstsq(source_words, target_words).solution
    return a.T @ p1, a.T @ p2


STATES_S = _noise(8, 80, 5)
STATES_T = _noise(9, 80, 7)


def _moved(p1, p2, target_states, source_states, target_words, source_words):
    c = torch.linalg.lstsq(target_states, source_states).solution
    b = torch.linalg.lstsq(target_words, source_words).solution
    return c, b


@exercise(
    lambda: [
        (P1, P2, STATES_T, STATES_S, TARGET, SOURCE),
        (P1, P2, STATES_T[:, :5], STATES_S, SQUARE_TARGET, SQUARE_SOURCE),
    ],
    hint="C with Hₜ C ≈ Hₛ for the side that reads, B with Eₜ B ≈ Eₛ for the side that writes.",
)
def states_transfer(p1, p2, target_states, source_states, target_words, source_words):
    c = torch.linalg.lstsq(target_states, source_states).solution
    b = torch.linalg.lstsq(target_words, source_words).solution
    return c @ p1, b @ p2


@states_transfer.mistake("The states' map is on the wrong side: P1 reads states, P2 writes what words see.")
def _(p1, p2, *tables):
    c, b = _moved(p1, p2, *tables)
    return b @ p1, c @ p2


@states_transfer.mistake("The states' map serves for reading only. P2 takes the words' map.")
def _(p1, p2, *tables):
    c, _ = _moved(p1, p2, *tables)
    return c @ p1, c @ p2


@states_transfer.mistake("You did not use the states: P1 takes the map of states.")
def _(p1, p2, *tables):
    _, b = _moved(p1, p2, *tables)
    return b @ p1, b @ p2


@states_transfer.mistake("The states' map goes the wrong way: fit it from the target to the source.")
def _(p1, p2, target_states, source_states, target_words, source_words):
    c = torch.linalg.lstsq(source_states, target_states).solution.T
    return c @ p1, torch.linalg.lstsq(target_words, source_words).solution @ p2


Q = _noise(10, 5, 5)
SKEW = torch.diag(torch.tensor([0.5, 2.0, 1.0, 3.0, 0.25], dtype=torch.float64))


@exercise(
    lambda: [(SQUARE_SOURCE, SQUARE_SOURCE @ Q, P1 @ P2.T), (SQUARE_SOURCE, SQUARE_SOURCE @ SKEW, P2 @ P1.T)],
    hint="Recover Q from Eₛ Q = Eₜ by least squares. States become h Q⁻ᵀ, so M' = Qᵀ M Q⁻ᵀ.",
)
def planted(source_words, target_words, matrix):
    q = torch.linalg.lstsq(source_words, target_words).solution
    return q.T @ matrix @ torch.linalg.inv(q).T


@planted.mistake("That is Q⁻¹ M Q⁻ᵀ, the paper's way, right only if Q is a rotation.")
def _(source_words, target_words, matrix):
    b = torch.linalg.lstsq(target_words, source_words).solution
    return b @ matrix @ b.T


@planted.mistake("Q and its inverse are swapped: you moved the steer from the target to the source.")
def _(source_words, target_words, matrix):
    q = torch.linalg.lstsq(source_words, target_words).solution
    return torch.linalg.inv(q).T @ matrix @ q.T


@planted.mistake("The left side is not transposed: h' = h Q⁻ᵀ, so it takes Qᵀ to get h back.")
def _(source_words, target_words, matrix):
    q = torch.linalg.lstsq(source_words, target_words).solution
    return q @ matrix @ torch.linalg.inv(q).T


@planted.mistake("The right side is not transposed: words are W Q, so the change needs Q⁻ᵀ.")
def _(source_words, target_words, matrix):
    q = torch.linalg.lstsq(source_words, target_words).solution
    return q.T @ matrix @ torch.linalg.inv(q)
