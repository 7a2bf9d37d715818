"""Figures that more than one notebook shows."""

from collections.abc import Callable, Mapping, Sequence
from itertools import cycle, pairwise

import seaborn
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch
from matplotlib.ticker import FixedLocator, NullLocator
from pandas import DataFrame
from torch import Tensor

from ..measure.metrics import Interval

# Okabe and Ito's colours, told apart by colour-blind readers; the hatches by readers of grey prints.
ADDITION, PPLM, LM_STEER, PLAIN = "#0072B2", "#D55E00", "#009E73", "#777777"


def levers() -> Figure:
    """The path from tokens to the next token's probabilities, and where each of the three levers acts."""
    figure, axes = plt.subplots(figsize=(11, 4.6))
    axes.set(xlim=(0, 24.4), ylim=(0, 9))
    axes.axis("off")
    boxes = [
        (0.1, 1.9, "tokens\n$t_0 … t_n$"),
        (2.9, 2.7, "input\nembeddings"),
        (6.6, 1.8, "block 0"),
        (10.2, 1.8, "block $l$"),
        (13.6, 2.3, "block $L{-}1$"),
        (17.0, 2.4, "last hidden\nstate $h$"),
        (20.5, 3.7, "probabilities\nsoftmax$(E h)$"),
    ]
    for x, wide, text in boxes:
        _box(axes, x, 4.0, wide, 1.6, text)
    for (x, wide, _), (following, _, _) in pairwise(boxes):
        arrow = {"arrowstyle": "->", "color": PLAIN, "lw": 1.6}
        axes.annotate("", (following, 4.8), (x + wide, 4.8), arrowprops=arrow)
    _box(axes, 6.6, 2.2, 9.3, 0.9, "cached keys and values of every block")
    for x in (9.3, 12.8):
        axes.text(x, 4.8, "…", ha="center", va="center", backgroundcolor="white", color=PLAIN)
    stream = "residual stream: a row of width $D$ for each token"
    axes.text(10.2, 5.8, stream, va="bottom", color=PLAIN, fontsize=9)
    added = "rows of another text, added to the rows\nof the first tokens, before block $l$"
    _lever(axes, "Activation addition", added, ADDITION, (6.2, 8.0), (10.0, 4.95))
    steps = "gradient steps at every token: on cached keys\nand values, on $h$, or on the probabilities"
    _lever(axes, "PPLM", steps, PPLM, (18.2, 1.0), (14.0, 2.15), (18.2, 3.95), (22.0, 3.95))
    learned = "a learned linear map\nof the output embeddings $E$"
    _lever(axes, "LM-Steer", learned, LM_STEER, (20.2, 8.0), (22.6, 5.65))
    return figure


def _box(axes: Axes, x: float, y: float, wide: float, high: float, text: str) -> None:
    shape = FancyBboxPatch(
        (x, y), wide, high, boxstyle="round,pad=0.02,rounding_size=0.15", facecolor="#f2f2f2", edgecolor=PLAIN
    )
    axes.add_patch(shape)
    axes.text(x + wide / 2, y + high / 2, text, ha="center", va="center", fontsize=10)


def _lever(
    axes: Axes, name: str, what: str, colour: str, place: tuple[float, float], *targets: tuple[float, float]
) -> None:
    """A name at a place, what it does beneath, and an arrow to each spot where it acts."""
    x, y = place
    axes.text(x, y + 0.35, name, color=colour, weight="bold", ha="center", va="center", fontsize=12)
    axes.text(x, y - 0.6, what, color=colour, ha="center", va="center", fontsize=9)
    for target in targets:
        start = (x, y + 0.8) if target[1] > y else (x, y - 1.2)
        axes.annotate("", target, start, arrowprops={"arrowstyle": "-|>", "color": colour, "lw": 2})


def shares(rows: Mapping[str, Interval], *, xlabel: str, colours: Sequence[str]) -> Figure:
    """A share with its interval for each condition, one bar a row, from the top."""
    figure, axes = plt.subplots(figsize=(7, 0.6 * len(rows) + 0.9))
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


def heat_maps(tables: Mapping[str, DataFrame], *, xlabel: str, ylabel: str) -> Figure:
    """Tables side by side as squares with their numbers in them; a light square holds a low number."""
    figure, axes = plt.subplots(1, len(tables), figsize=(5.2 * len(tables), 4.2), squeeze=False)
    for at, (title, table) in zip(axes[0], tables.items(), strict=True):
        shares = table.to_numpy().max() <= 1
        seaborn.heatmap(
            table,
            ax=at,
            cmap="cividis_r",
            annot=True,
            fmt=".0%" if shares else ".1f",
            norm=None if shares else LogNorm(),
            cbar=False,
        )
        at.set(title=title, xlabel=xlabel, ylabel=ylabel)
    figure.tight_layout()
    return figure


def judged_shares(rows: Mapping[str, Mapping[str, Interval]], *, xlabel: str) -> Figure:
    """Shares with intervals: a row for each condition, from the top, and a mark in it for each judge."""
    judges = list(next(iter(rows.values())))
    figure, axes = plt.subplots(figsize=(7, 0.65 * len(rows) + 1.1))
    for j, (judge, mark) in enumerate(zip(judges, "osD^", strict=False)):
        places = [y + 0.22 * (j - (len(judges) - 1) / 2) for y in range(len(rows))]
        found = [row[judge] for row in rows.values()]
        errors = [[one.mean - one.low for one in found], [one.high - one.mean for one in found]]
        means = [one.mean for one in found]
        axes.errorbar(means, places, xerr=errors, fmt=mark, capsize=3, label=judge)
    axes.set_yticks(range(len(rows)), rows)
    axes.invert_yaxis()
    axes.set(xlabel=xlabel, xlim=(0, 1))
    axes.xaxis.set_major_formatter("{x:.0%}")
    axes.legend(title="judge", loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def columns(heights: Sequence[float], *, xlabel: str, ylabel: str) -> Figure:
    """A column for each number, from 0 on."""
    figure, axes = plt.subplots(figsize=(7, 2.6))
    axes.bar(range(len(heights)), heights, color=PPLM)
    axes.set(xlabel=xlabel, ylabel=ylabel)
    return figure


def reliability(table: DataFrame, confusion: DataFrame) -> Figure:
    """Left, how often a head is right when it is so sure (confidence, accuracy, n); right, its confusions."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6), width_ratios=(1.3, 1))
    left.plot([0, 1], [0, 1], ":", color=PLAIN, label="calibrated")
    left.scatter(
        table["confidence"], table["accuracy"], s=table["n"], color=PPLM, label="area: number of texts"
    )
    left.set(
        xlabel="probability of the likeliest class", ylabel="share right", xlim=(0.45, 1), ylim=(0.3, 1.02)
    )
    left.legend(loc="lower right")
    seaborn.heatmap(confusion, ax=right, cmap="cividis_r", annot=True, fmt="d", cbar=False)
    right.set(xlabel="taken for", ylabel="rated")
    figure.tight_layout()
    return figure


def small_multiples(panels: Mapping[str, DataFrame], *, ylabel: str) -> Figure:
    """A panel for each table, named below: a line for each of its columns, over its index as categories.

    The vertical axis is logarithmic, and shared.
    """
    across = min(3, len(panels))
    down = -(-len(panels) // across)
    figure, axes = plt.subplots(down, across, figsize=(3.4 * across, 2.5 * down), sharey=True, squeeze=False)
    for at, (name, table) in zip(axes.flat, panels.items(), strict=False):
        for column, style in zip(table, cycle(("o-", "s--", "D:", "^-."))):
            at.plot([str(value) for value in table.index], table[column], style, label=column)
        at.set(xlabel=name)
    for at in axes[:, 0]:
        at.set(ylabel=ylabel, yscale="log")
    axes[0, 0].legend()
    figure.tight_layout()
    return figure


def alignment(rows: Mapping[str, Sequence[str]], *, fill: str) -> Figure:
    """Texts above each other, a box for each token, a column for each position; `fill` is the padding."""
    columns = max(map(len, rows.values()))
    figure, axes = plt.subplots(figsize=(1.05 * columns + 2, 0.45 * len(rows) + 0.6))
    for y, tokens in enumerate(rows.values()):
        for x, token in enumerate(tokens):
            edge = {"facecolor": "#dddddd" if token == fill else "white", "edgecolor": PLAIN}
            axes.add_patch(FancyBboxPatch((x + 0.05, y + 0.1), 0.9, 0.8, boxstyle="round,pad=0.02", **edge))
            axes.text(x + 0.5, y + 0.5, repr(token)[1:-1], ha="center", va="center", fontsize=8)
    axes.set_yticks([y + 0.5 for y in range(len(rows))], rows)
    axes.set_xticks([x + 0.5 for x in range(columns)], range(columns))
    axes.set(xlim=(0, columns), ylim=(len(rows), 0), xlabel="position (grey: padding)")
    axes.grid(visible=False)
    for side in axes.spines.values():
        side.set_visible(False)
    axes.tick_params(length=0)
    return figure


def by_layer(tables: Mapping[str, DataFrame], *, mark: int) -> Figure:
    """A line over the blocks for each column of each table, a panel a table; `mark` is the block in use."""
    figure, axes = plt.subplots(1, len(tables), figsize=(5.2 * len(tables), 3.6), squeeze=False)
    for at, (title, table) in zip(axes[0], tables.items(), strict=True):
        for column, style in zip(table, cycle(("-", "--", ":", "-."))):
            at.plot(table.index, table[column], style, label=column)
        at.axvline(mark, color=PLAIN, lw=1)
        at.set(xlabel="block", title=title, ylim=(min(0, 1.1 * table.to_numpy().min()), None))
        at.legend()
    figure.tight_layout()
    return figure


def before_and_after(
    before: Tensor, after: Tensor, names: Callable[[int], str], *, count: int = 10
) -> Figure:
    """The next-token probabilities [V] that changed most, as pairs of bars; `names` turns an id into text."""
    ids = (after - before).abs().topk(count).indices.tolist()
    figure, axes = plt.subplots(figsize=(7, 0.38 * count + 0.8))
    places = range(count)
    axes.barh([y - 0.2 for y in places], before[ids], height=0.4, color=PLAIN, label="plain")
    axes.barh([y + 0.2 for y in places], after[ids], height=0.4, color=ADDITION, hatch="//", label="steered")
    axes.set_yticks(list(places), [repr(names(i)) for i in ids])
    axes.set(xlabel="probability of the next token")
    axes.invert_yaxis()
    axes.legend()
    return figure


# --- methods beside each other ------------------------------------------------------------------------------

LOOKS = {  # a mark and a line for readers of grey prints, a colour for the mechanism
    "activation addition": ("o-", ADDITION),
    "PPLM, head": ("s-", PPLM),
    "PPLM, bag": ("^--", PPLM),
    "LM-Steer": ("D-", LM_STEER),
    "random vector": ("x:", PLAIN),
    "shuffled labels": ("v:", PLAIN),
    "a prompt": ("P", "black"),
    "no steering": ("*", "black"),
}


def frontiers(
    panels: Mapping[str, Mapping[str, Sequence[tuple[Interval, Interval]]]], *, xlabel: str
) -> Figure:
    """A panel for each share, named as its axis is: a line for each of the methods in `LOOKS`.

    A line goes through points (price, share), both with intervals; prices are ratios, on a logarithmic axis.
    """
    down = -(-len(panels) // 2)
    figure, axes = plt.subplots(down, 2, figsize=(11, 4 * down), squeeze=False)
    for at, (ylabel, lines) in zip(axes.flat, panels.items(), strict=False):
        for method, points in lines.items():
            _frontier(at, method, points)
        at.set(xscale="log", ylim=(-0.03, 1.03), ylabel=ylabel)
        at.xaxis.set_major_locator(FixedLocator([0.5, 0.7, 1, 1.5, 2, 3, 4, 6, 8]))
        at.xaxis.set_minor_locator(NullLocator())
        at.xaxis.set_major_formatter("{x:g}")
        at.yaxis.set_major_formatter("{x:.0%}")
    for at in axes[-1]:
        at.set(xlabel=xlabel)
    figure.tight_layout()
    known = dict(zip(*reversed(axes[0, 0].get_legend_handles_labels()), strict=True))
    figure.legend(known.values(), known, loc="upper center", ncols=4, bbox_to_anchor=(0.5, 0.0))
    return figure


def _frontier(axes: Axes, method: str, points: Sequence[tuple[Interval, Interval]]) -> None:
    mark, colour = LOOKS[method]
    means, errors = zip(*(_errors(intervals) for intervals in zip(*points, strict=True)), strict=True)
    bars = {"elinewidth": 0.8, "alpha": 0.45, "ecolor": colour, "fmt": "none"}
    axes.errorbar(*means, xerr=errors[0], yerr=errors[1], **bars)
    axes.plot(*means, mark, color=colour, label=method, ms=6 if len(points) > 1 else 10)


def _errors(intervals: Sequence[Interval]) -> tuple[list[float], list[list[float]]]:
    """The means, and how far the intervals reach below and above them."""
    below = [one.mean - one.low for one in intervals]
    return [one.mean for one in intervals], [below, [one.high - one.mean for one in intervals]]


def strips(panels: Mapping[str, Mapping[str, Sequence[float]]]) -> Figure:
    """A panel for each kind of change, named as its axis is: a dot for each prompt, a row for each method.

    A bar marks the mean, a line 0; dots are spread a little up and down, to be seen.
    """
    figure, axes = plt.subplots(1, len(panels), figsize=(5.5 * len(panels), 3.6), squeeze=False)
    for at, (xlabel, rows) in zip(axes[0], panels.items(), strict=True):
        for y, (method, changes) in enumerate(rows.items()):
            spread = [y + 0.06 * (i % 7 - 3) for i in range(len(changes))]
            at.scatter(changes, spread, s=18, color=LOOKS[method][1], alpha=0.7)
            at.plot([sum(changes) / len(changes)] * 2, [y - 0.35, y + 0.35], color="black", lw=2)
        at.axvline(0, color=PLAIN, lw=1)
        at.set_yticks(range(len(rows)), rows)
        at.invert_yaxis()
        at.set(xlabel=xlabel)
    figure.tight_layout()
    return figure


def sums(panels: Mapping[str, Mapping[str, tuple[float, Interval]]]) -> Figure:
    """A panel for each outcome: for each pair of steers, the sum of their effects and the effect of both."""
    rows = list(next(iter(panels.values())))
    size = (3.3 * len(panels) + 2, 0.8 * len(rows) + 1)
    figure, axes = plt.subplots(1, len(panels), figsize=size, sharey=True, squeeze=False)
    for at, (xlabel, effects) in zip(axes[0], panels.items(), strict=True):
        places = range(len(rows))
        totals = [total for total, _ in effects.values()]
        at.plot(
            totals, [y - 0.15 for y in places], "D", mfc="white", color=PLAIN, label="sum of the two alone"
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
        at.axvline(0, color=PLAIN, lw=1)
        at.set(xlabel=xlabel)
    axes[0, 0].set_yticks(range(len(rows)), rows)
    axes[0, 0].set(ylim=(len(rows) - 0.5, -0.5))
    figure.tight_layout()
    figure.legend(
        *axes[0, 0].get_legend_handles_labels(), loc="upper center", ncols=2, bbox_to_anchor=(0.5, 0)
    )
    return figure
