"""The best few spans of a row of numbers: disjoint, none too long, with the greatest sum.

With prefix sums c, the best score of j spans of which the last ends before i is c[i] plus the maximum, over
its possible starts a, of the best score of j − 1 spans before a less c[a]: a maximum over a moving window.
All i of one j are found at once, so a row of L numbers takes O(L · spans), whatever the spans' length.
"""

import numpy as np
from numpy.typing import ArrayLike
from scipy.ndimage import maximum_filter1d


def best_spans(
    evidence: ArrayLike, max_spans: int = 4, max_length: int = 10, *, gap: int = 1
) -> list[tuple[int, int]]:
    """The spans [start, end) of evidence [L] whose sum is greatest, from left to right; each sum is above 0.

    max_spans: how many at most. max_length: of each. gap: how many numbers lie between two spans at least; 0
    lets them touch, 1 makes neighbours one span. Of several best choices, it takes one with few spans that
    end early and start late. ValueError for numbers that are not finite or not in a row, max_spans or
    max_length below 1, or a negative gap.
    """
    evidence = np.asarray(evidence, dtype=float)
    if evidence.ndim != 1 or not np.isfinite(evidence).all():
        raise ValueError(f"evidence must be finite numbers in a row, [L], not {evidence!r}")
    for name, value, least in (("max_spans", max_spans, 1), ("max_length", max_length, 1), ("gap", gap, 0)):
        if value < least:
            raise ValueError(f"{name} must be at least {least}, not {value!r}")
    size = len(evidence)
    max_spans, max_length = min(max_spans, size), min(max_length, size)
    return _traced(*_scores(np.append(0, evidence.cumsum()), max_spans, max_length, gap), max_length, gap)


def _scores(sums: np.ndarray, max_spans: int, max_length: int, gap: int) -> tuple[np.ndarray, np.ndarray]:
    """For j spans at most before i: the best score [J + 1, L + 1]; and, by starts of span j, [J, L]."""
    best, starts = [np.zeros_like(sums)], []
    for _ in range(max_spans):
        before = best[-1][np.maximum(np.arange(len(sums) - 1) - gap, 0)]
        starts.append(before - sums[:-1])
        ending = sums[1:] + _trailing_maximum(starts[-1], max_length)
        best.append(np.maximum.accumulate(np.append(0, np.maximum(ending, best[-1][1:]))))
    return np.array(best), np.array(starts)


def _trailing_maximum(row: np.ndarray, size: int) -> np.ndarray:
    """The maximum of each number and the size − 1 before it, [L] -> [L]."""
    return maximum_filter1d(row, size, origin=(size - 1) // 2, mode="constant", cval=-np.inf)


def _traced(best: np.ndarray, starts: np.ndarray, max_length: int, gap: int) -> list[tuple[int, int]]:
    """The spans that reach best[-1, -1], from the right: fewest spans, then earliest end, then latest start.

    The numbers compared are copies of each other, so equality is exact.
    """
    j, end, found = len(best) - 1, best.shape[1] - 1, []
    while best[j, end] > 0:
        j = int((best[: j + 1, end] == best[j, end]).argmax())
        end = int((best[j] == best[j, end]).argmax())
        window = starts[j - 1, max(0, end - max_length) : end]
        start = end - 1 - int(window[::-1].argmax())
        found.append((start, end))
        j, end = j - 1, max(start - gap, 0)
    return found[::-1]
