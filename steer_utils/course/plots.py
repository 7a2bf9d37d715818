"""The figures of the notebooks, one function each; the numbers come from the notebook."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import seaborn
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import FixedLocator, NullLocator
from pandas import DataFrame
from torch import Tensor

from ..measure.metrics import Interval

# Okabe and Ito's colours, which colour-blind readers can tell apart; markers and hatches serve grey prints.
ADDITION, PPLM, LM_STEER, UNSTEERED = "#0072B2", "#D55E00", "#009E73", "#777777"


def shares(rows: Mapping[str, Interval], *, xlabel: str, colours: Sequence[str]) -> Figure:
    """Draw a horizontal bar with its interval for each condition, from top to bottom."""
    figure, axes = plt.subplots(figsize=(5.5, 0.45 * len(rows) + 0.9))
    for (name, share), colour in zip(rows.items(), colours, strict=True):
        errors = [[share.mean - share.low], [share.high - share.mean]]
        axes.barh(name, share.mean, xerr=errors, color=colour, capsize=4, height=0.6)
        axes.annotate(
            f"{share.mean:.0%}", (share.high, name), (6, 0), textcoords="offset points", va="center"
        )
    axes.invert_yaxis()
    axes.set(xlabel=xlabel, xlim=(0, 1))
    axes.xaxis.set_major_formatter("{x:.0%}")
    return figure


def judged_shares(
    rows: Mapping[Any, Mapping[str, Interval]], *, xlabel: str, xlim: tuple[float, float] = (0, 1)
) -> Figure:
    """Draw shares with intervals: a line for each condition, from the top, with a marker for each judge.

    xlim: the ends of the axis; if it begins below 0, zero is marked.
    """
    judges = list(next(iter(rows.values())))
    figure, axes = plt.subplots(figsize=(5.5, 0.5 * len(rows) + 1.2))
    for j, (judge, mark) in enumerate(zip(judges, "osD^", strict=False)):
        places = [y + 0.22 * (j - (len(judges) - 1) / 2) for y in range(len(rows))]
        found = [row[judge] for row in rows.values()]
        errors = [[one.mean - one.low for one in found], [one.high - one.mean for one in found]]
        means = [one.mean for one in found]
        axes.errorbar(means, places, xerr=errors, fmt=mark, capsize=3, label=judge, clip_on=False)
    axes.set_yticks(range(len(rows)), rows)
    axes.invert_yaxis()
    axes.set(xlabel=xlabel, xlim=xlim)
    if xlim[0] < 0:
        axes.axvline(0, color=UNSTEERED, lw=1)
    axes.xaxis.set_major_formatter("{x:.0%}")
    axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=len(judges))
    return figure


def reliability(table: DataFrame, confusion: DataFrame) -> Figure:
    """Draw a classifier head's reliability diagram (columns confidence, accuracy, n) and confusion matrix."""
    figure, (top, below) = plt.subplots(2, 1, figsize=(5.5, 6.4), height_ratios=(1.2, 1))
    top.plot([0, 1], [0, 1], ":", color=UNSTEERED, label="calibrated")
    top.scatter(
        table["confidence"], table["accuracy"], s=table["n"], color=PPLM, label="area: number of texts"
    )
    top.set(
        xlabel="probability of the likeliest class", ylabel="share right", xlim=(0.45, 1), ylim=(0.3, 1.02)
    )
    top.legend(loc="lower right")
    seaborn.heatmap(confusion, ax=below, cmap="cividis_r", annot=True, fmt="d", cbar=False)
    below.set(xlabel="taken for", ylabel="rated")
    figure.tight_layout()
    return figure


def before_and_after(
    before: Tensor, after: Tensor, names: Callable[[int], str], *, count: int = 10
) -> Figure:
    """Draw the `count` next-token probabilities [V] that changed most; `names` turns a token id into text."""
    change = (after - before).abs()
    ids = (change if change.max() > 1e-6 else before).topk(count).indices.tolist()  # else the likeliest
    figure, axes = plt.subplots(figsize=(5.5, 0.34 * count + 0.8))
    places = range(count)
    axes.barh([y - 0.2 for y in places], before[ids].tolist(), height=0.4, color=UNSTEERED, label="unsteered")
    axes.barh(
        [y + 0.2 for y in places],
        after[ids].tolist(),
        height=0.4,
        color=ADDITION,
        hatch="//",
        label="steered",
    )
    axes.set_yticks(list(places), [repr(names(i)) for i in ids])
    axes.set(xlabel="probability of the next token")
    axes.invert_yaxis()
    axes.legend()
    return figure


def curves(lines: Mapping[str, Mapping[float, Interval]], *, xlabel: str, ylabel: str) -> Figure:
    """Draw a line for each condition: a mean with its interval at each of some numbers."""
    figure, axes = plt.subplots(figsize=(5.5, 3.6))
    looks = (("o-", ADDITION), ("s--", PPLM), ("^:", "black"), ("D-.", LM_STEER))
    for (name, points), (mark, colour) in zip(lines.items(), looks, strict=False):
        means, errors = _errors(list(points.values()))
        axes.errorbar(list(points), means, errors, fmt=mark, color=colour, capsize=3, label=name)
    axes.set(xlabel=xlabel, ylabel=ylabel)
    axes.legend()
    return figure


def heat_maps(
    panels: Mapping[str, tuple[DataFrame, DataFrame | None, tuple[Any, Any]]], *, xlabel: str, ylabel: str
) -> Figure:
    """Draw panels side by side: shares from 0 to 1 by row and column, with a frame around what was chosen.

    panels: by title, the shares, what to write on them (None for a bar of colours instead), and the labels
    of the row and the column to frame; None for the column frames the whole row.
    """
    figure, axes = plt.subplots(1, len(panels), figsize=(5.5, 3.9), squeeze=False)
    for at, (title, (shares, notes, (row, column))) in zip(axes[0], panels.items(), strict=True):
        written = {} if notes is None else {"annot": notes, "fmt": "", "cbar": False}
        seaborn.heatmap(shares, ax=at, cmap="cividis_r", vmin=0, vmax=1, **written)
        left, width = (0, shares.shape[1]) if column is None else (shares.columns.get_loc(column), 1)
        corner = left, shares.index.get_loc(row)
        at.add_patch(Rectangle(corner, width, 1, fill=False, edgecolor=PPLM, lw=3))
        at.set(title=title, xlabel=xlabel, ylabel=ylabel)
    figure.tight_layout()
    return figure


# --- methods compared -------------------------------------------------------------------------------------

LOOKS = {  # of each method: marker and line style, for grey prints, and the colour of its mechanism
    "activation addition": ("o-", ADDITION),
    "PPLM, head": ("s-", PPLM),
    "PPLM, bag": ("^--", PPLM),
    "LM-Steer": ("D-", LM_STEER),
    "class means": ("o:", "#56B4E9"),
    "constant": ("d:", "#CC79A7"),
    "lexicon": ("h:", "#E69F00"),
    "random head": ("<:", UNSTEERED),
    "random vector": ("x:", UNSTEERED),
    "shuffled labels": ("v:", UNSTEERED),
    "best of five": ("p", UNSTEERED),
    "prompt": ("P", "black"),
    "system prompt": ("X", "black"),
    "unsteered": ("*", "black"),
}


def along(panels: Mapping[str, Mapping[str, Sequence[float]]], *, ylabel: str, goal: float) -> Figure:
    """Draw a panel for each set of methods, keys of `LOOKS`: a line over tokens for each, and the goal."""
    figure, axes = _stacked(len(panels), 3.2, sharey=True)
    for at, (title, lines) in zip(axes, panels.items(), strict=True):
        for method, values in lines.items():
            mark, colour = LOOKS[method]
            style = mark if mark[1:] else "-"  # a mark alone joins no points
            at.plot(range(1, len(values) + 1), values, style, color=colour, label=method, ms=4, lw=1)
        at.axhline(goal, color=UNSTEERED, lw=0.8)
        at.set(title=title, xlabel="token after the prompt", ylabel=ylabel, ylim=(0, None))
    axes[0].legend(ncols=2, fontsize=8)
    figure.tight_layout()
    return figure


def frontiers(
    panels: Mapping[str, Mapping[str, Sequence[tuple[Interval, Interval]]]], *, xlabel: str
) -> Figure:
    """Draw a panel for each share, with a line for each method; a method is a key of `LOOKS`.

    A line joins points (perplexity ratio, share), both with intervals; the x axis is logarithmic.
    """
    figure, axes = _stacked(len(panels), 3.6)
    for at, (ylabel, lines) in zip(axes, panels.items(), strict=True):
        for method, points in lines.items():
            _frontier(at, method, points)
        at.set(xscale="log", ylim=(-0.03, 1.03), ylabel=ylabel)
        at.xaxis.set_major_locator(FixedLocator([0.5, 0.7, 1, 1.5, 2, 3, 4, 6, 8]))
        at.xaxis.set_minor_locator(NullLocator())
        at.xaxis.set_major_formatter("{x:g}")
        at.yaxis.set_major_formatter("{x:.0%}")
    axes[-1].set(xlabel=xlabel)
    figure.tight_layout()
    known = dict(zip(*reversed(axes[0].get_legend_handles_labels()), strict=True))
    figure.legend(known.values(), known, loc="upper center", ncols=3, bbox_to_anchor=(0.5, 0.0))
    return figure


def _stacked(panels: int, height: float, **how: bool) -> tuple[Figure, Any]:
    """A figure with panels below each other, since a phone shows side by side what nobody can read."""
    figure, axes = plt.subplots(panels, figsize=(5.5, height * panels), squeeze=False, **how)
    return figure, axes[:, 0]


def _frontier(axes: Axes, method: str, points: Sequence[tuple[Interval, Interval]]) -> None:
    mark, colour = LOOKS[method]
    means, errors = zip(*(_errors(intervals) for intervals in zip(*points, strict=True)), strict=True)
    bars = {"elinewidth": 0.8, "alpha": 0.45, "ecolor": colour, "fmt": "none"}
    axes.errorbar(*means, xerr=errors[0], yerr=errors[1], **bars)
    axes.plot(*means, mark, color=colour, label=method, ms=6 if len(points) > 1 else 10)


def _errors(intervals: Sequence[Interval]) -> tuple[list[float], list[list[float]]]:
    """The means, and the distances from them to both ends of their intervals."""
    below = [one.mean - one.low for one in intervals]
    return [one.mean for one in intervals], [below, [one.high - one.mean for one in intervals]]


def slide(rows: Mapping[float, Mapping[str, Sequence[float]]], *, xlabel: str, ylabel: str) -> Figure:
    """Draw shares against the perplexity ratio: a point for each judge and steer value, the values beside.

    rows: by value, intervals (mean, low, high) by judge and of "perplexity ratio".
    """
    figure, axes = plt.subplots(figsize=(5.5, 4))
    x, bars = _errors([Interval(*row["perplexity ratio"]) for row in rows.values()])
    judges = [name for name in next(iter(rows.values())) if name != "perplexity ratio"]
    for judge, mark in zip(judges, "os^D", strict=False):
        y, upright = _errors([Interval(*row[judge]) for row in rows.values()])
        axes.errorbar(x, y, xerr=bars, yerr=upright, fmt=mark, label=judge, elinewidth=0.6)
    for value, at in zip(rows, zip(x, y, strict=True), strict=True):
        axes.annotate(f"{value:g}", at, (7, -12), textcoords="offset points")
    axes.set(xlabel=xlabel, ylabel=ylabel, ylim=(0, 1))
    axes.legend()
    return figure


def strips(panels: Mapping[str, Mapping[str, Sequence[float]]]) -> Figure:
    """Draw a panel for each kind of change, with a line of dots, one a prompt, for each method.

    A short bar marks the mean. Dots are moved a little up and down so that they do not hide each other.
    """
    figure, axes = _stacked(len(panels), 3.8)
    for at, (xlabel, rows) in zip(axes, panels.items(), strict=True):
        for y, (method, changes) in enumerate(rows.items()):
            spread = [y + 0.06 * (i % 7 - 3) for i in range(len(changes))]
            at.scatter(changes, spread, s=18, color=LOOKS[method][1], alpha=0.7)
            at.plot([sum(changes) / len(changes)] * 2, [y - 0.35, y + 0.35], color="black", lw=2)
        at.axvline(0, color=UNSTEERED, lw=1)
        at.set_yticks(range(len(rows)), rows)
        at.invert_yaxis()
        at.set(xlabel=xlabel)
    figure.tight_layout()
    return figure


def sums(panels: Mapping[str, Mapping[str, tuple[float, Interval]]]) -> Figure:
    """Draw a panel for each outcome: the sum of two steers' effects, and the effect of both at once."""
    rows = list(next(iter(panels.values())))
    figure, axes = _stacked(len(panels), 0.6 * len(rows) + 0.6)
    for at, (xlabel, effects) in zip(axes, panels.items(), strict=True):
        places = range(len(rows))
        totals = [total for total, _ in effects.values()]
        at.plot(
            totals,
            [y - 0.15 for y in places],
            "D",
            mfc="white",
            color=UNSTEERED,
            label="sum of the two alone",
        )
        means, errors = _errors([both for _, both in effects.values()])
        at.errorbar(
            means,
            [y + 0.15 for y in places],
            xerr=errors,
            fmt="o",
            capsize=3,
            color=ADDITION,
            label="both at once",
        )
        at.axvline(0, color=UNSTEERED, lw=1)
        at.set_yticks(range(len(rows)), rows)
        at.set(xlabel=xlabel, ylim=(len(rows) - 0.5, -0.5))
    figure.tight_layout()
    figure.legend(*axes[0].get_legend_handles_labels(), loc="upper center", ncols=2, bbox_to_anchor=(0.5, 0))
    return figure
