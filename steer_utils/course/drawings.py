"""Pictures of the mechanisms, drawn in one style: what each lever takes, what it changes, and when."""

from collections.abc import Sequence
from itertools import pairwise

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

from .plots import ADDITION, LM_STEER, PPLM, UNSTEERED

GREY = "#f2f2f2"


def levers() -> Figure:
    """Draw the path from tokens to the next token's probabilities and where each of the three steers acts."""
    figure, axes = plt.subplots(figsize=(8.6, 4.6))
    axes.set(xlim=(0, 24.4), ylim=(0, 9))
    axes.axis("off")
    boxes = [
        (0.1, 1.9, "tokens\n$t_0 … t_n$"),
        (2.6, 3.2, "input\nembeddings"),
        (6.5, 2.0, "block 0"),
        (10.1, 2.0, "block $l$"),
        (13.6, 2.6, "block $L{-}1$"),
        (16.9, 2.9, "last hidden\nstate $h$"),
        (20.5, 3.7, "probabilities\nsoftmax$(E h)$"),
    ]
    for x, wide, text in boxes:
        _box(axes, x, 4.0, wide, 1.6, text, size=9)
    for (x, wide, _), (following, _, _) in pairwise(boxes):
        arrow = {"arrowstyle": "->", "color": UNSTEERED, "lw": 1.6}
        axes.annotate("", (following, 4.8), (x + wide, 4.8), arrowprops=arrow)
    _box(axes, 6.5, 2.2, 9.7, 0.9, "cached keys and values of every block", size=9)
    for x in (9.3, 12.8):
        axes.text(x, 4.8, "…", ha="center", va="center", backgroundcolor="white", color=UNSTEERED)
    stream = "residual stream: a vector of width $D$ for each token"
    axes.text(9.0, 5.8, stream, va="bottom", color=UNSTEERED, fontsize=9)
    added = "vectors of another text, added to those\nof the first tokens, before block $l$"
    _lever(axes, "Activation addition", added, ADDITION, (6.2, 8.0), (10.0, 4.95))
    steps = "gradient steps at every token: on cached keys\nand values, on $h$, or on the probabilities"
    _lever(axes, "PPLM", steps, PPLM, (18.2, 1.0), (14.0, 2.15), (18.2, 3.95), (22.0, 3.95))
    learned = "a learned linear map\nof the output embeddings $E$"
    _lever(axes, "LM-Steer", learned, LM_STEER, (20.2, 8.0), (22.6, 5.65))
    return figure


def _box(
    axes: Axes,
    x: float,
    y: float,
    wide: float,
    high: float,
    text: str,
    *,
    edge: str = UNSTEERED,
    fill: str = GREY,
    hatch: str = "",
    size: int = 10,
) -> None:
    shape = {"boxstyle": "round,pad=0.02,rounding_size=0.15", "facecolor": fill, "edgecolor": edge}
    axes.add_patch(FancyBboxPatch((x, y), wide, high, hatch=hatch, **shape))
    axes.text(x + wide / 2, y + high / 2, text, ha="center", va="center", fontsize=size)


def _lever(
    axes: Axes, name: str, what: str, colour: str, place: tuple[float, float], *targets: tuple[float, float]
) -> None:
    """Write a steer's name and what it does at `place`, with an arrow to each target."""
    x, y = place
    axes.text(x, y + 0.35, name, color=colour, weight="bold", ha="center", va="center", fontsize=12)
    axes.text(x, y - 0.6, what, color=colour, ha="center", va="center", fontsize=9)
    for target in targets:
        start = (x, y + 0.8) if target[1] > y else (x, y - 1.2)
        axes.annotate("", target, start, arrowprops={"arrowstyle": "-|>", "color": colour, "lw": 2})


def x_vector(plus: Sequence[str], minus: Sequence[str], prompt: Sequence[str], *, fill: str = "") -> Figure:
    """Draw where the rows of an x-vector come from and to which tokens they are added.

    plus, minus, prompt: the tokens of the two texts and of a prompt, BOS first. fill: the padding token.
    """
    columns = max(len(plus), len(minus), len(prompt))
    figure, axes = _canvas(columns + 2.2, 6.2, wide=0.78 * columns + 1.6)
    lines = {5.0: ("plus\n$h^+$", plus, ADDITION), 3.9: ("minus\n$h^-$", minus, ADDITION)}
    for y, (name, tokens, colour) in (lines | {0.2: ("prompt", prompt, UNSTEERED)}).items():
        axes.text(1.0, y + 0.4, name, ha="right", va="center", color=colour, fontsize=11)
        for x, token in enumerate(["BOS", *tokens[1:]], start=1):
            padding = {"hatch": "////"} if token == fill and y > 1 else {}
            _box(axes, x + 0.25, y, 0.9, 0.8, _short(token), edge=colour, **padding)
    axes.text(1.0, 2.6, "$c\\,(h^+ - h^-)$", ha="right", va="center", color=ADDITION, fontsize=11)
    same = next((i for i, pair in enumerate(zip(plus, minus, strict=False)) if pair[0] != pair[1]), 0)
    for x in range(max(len(plus), len(minus))):
        zero = x < same
        _box(
            axes,
            x + 1.25,
            2.2,
            0.9,
            0.8,
            "0" if zero else f"row {x}",
            edge=ADDITION,
            fill="white" if zero else "#cce3f2",
        )
        if x < len(prompt) and not zero:
            arrow = {"arrowstyle": "-|>", "color": ADDITION, "lw": 1.8}
            axes.annotate("", (x + 1.7, 1.05), (x + 1.7, 2.15), arrowprops=arrow)
    axes.text(
        columns / 2 + 1.25,
        1.55,
        "added before block $l$",
        ha="center",
        va="center",
        color=ADDITION,
        fontsize=10,
        backgroundcolor="white",
    )
    return figure


def pplm_loop() -> Figure:
    """Draw what PPLM does for one token: a pass, a loss, a gradient step on the cache, a pass, the fusion."""
    figure, axes = _canvas(10, 8.4, wide=5.4)
    _box(axes, 0.3, 6.7, 3.6, 1.1, "cached keys\nand values")
    _box(axes, 6.0, 6.7, 3.6, 1.1, "next token\n$\\tilde p$")
    _box(axes, 5.1, 4.2, 3.7, 1.1, "loss\n$-\\log\\, \\tilde p(\\mathrm{attribute})$")
    _box(axes, 6.0, 1.2, 3.6, 1.1, "fused\n$\\tilde p^{\\gamma}\\, p^{1-\\gamma}$")
    _box(axes, 0.3, 1.2, 3.6, 1.1, "sampled token")
    _arrow(axes, (3.95, 7.25), (5.95, 7.25), "pass")
    _arrow(axes, (7.0, 6.65), (7.0, 5.4), "compare")
    _arrow(axes, (5.05, 4.75), (2.1, 6.6), "gradient step\n(m times)", PPLM)
    _arrow(axes, (9.35, 6.65), (9.35, 2.4), "")
    axes.text(9.75, 3.5, "then", rotation=90, va="center", color=UNSTEERED, fontsize=10)
    _arrow(axes, (5.95, 1.75), (3.95, 1.75), "draw")
    _arrow(axes, (1.0, 2.4), (1.0, 6.6), "")
    axes.text(0.65, 4.4, "read it, and again", rotation=90, va="center", color=UNSTEERED, fontsize=10)
    return figure


def tilt(words: Sequence[str], before: Sequence[Sequence[float]], after: Sequence[Sequence[float]]) -> Figure:
    """Draw word vectors before and after a linear map, and the hidden state that they are compared with.

    before, after: the words' coordinates (x, y) in a plane in which the hidden state points to the right.
    """
    figure, axes = plt.subplots(figsize=(5.4, 4.2))
    for word, start, end in zip(words, before, after, strict=True):
        axes.plot([0, start[0]], [0, start[1]], color=UNSTEERED, lw=1)
        axes.annotate("", end, start, arrowprops={"arrowstyle": "-|>", "color": LM_STEER, "lw": 1.8})
        axes.annotate(word, end, (4, 4), textcoords="offset points", color=LM_STEER, fontsize=11)
    reach = max(abs(x) for pair in (*before, *after) for x in pair) * 1.25
    axes.annotate("", (reach, 0), (0, 0), arrowprops={"arrowstyle": "-|>", "color": "black", "lw": 2})
    axes.text(-0.03 * reach, 0, "hidden state $h$", ha="right", va="center", fontsize=11)
    axes.set(
        xlim=(-reach, 1.1 * reach),
        ylim=(-reach, reach),
        xlabel="logit: the part along $h$",
        ylabel="the rest",
    )
    return figure


def transfer_map() -> Figure:
    """Draw how a steer moves to another model: word vectors of both, the map, and the steer."""
    figure, axes = _canvas(10, 6.6, wide=5.4)
    clouds = {
        0.1: ("source", "word vectors $E_s$", "steer $M$"),
        6.4: ("target", "word vectors $E_t$", "steer $M'$"),
    }
    for x, (name, words, steer) in clouds.items():
        axes.text(x + 1.75, 6.2, name, ha="center", weight="bold", fontsize=12)
        _box(axes, x, 3.7, 3.5, 1.9, words)
        _box(axes, x, 0.7, 3.5, 1.3, steer, edge=LM_STEER)
        _arrow(axes, (x + 1.75, 2.05), (x + 1.75, 3.6), "tilts", LM_STEER)
    _arrow(axes, (6.35, 4.9), (3.65, 4.9), "map $B$")
    axes.text(5.0, 4.1, "fitted on\nshared tokens", ha="center", va="center", fontsize=10, color=UNSTEERED)
    _arrow(axes, (3.65, 1.35), (6.35, 1.35), "carry", LM_STEER)
    return figure


def prefix_cache() -> Figure:
    """Draw two requests with one prompt, and the cache of an engine without and with a salt."""
    figure, axes = _canvas(10, 7.4, wide=5.4)
    halves = {4.0: ("by tokens alone", False), 0.2: ("by tokens and salt", True)}
    for y, (title, salted) in halves.items():
        axes.text(0.1, y + 2.95, title, weight="bold", fontsize=12)
        _box(axes, 0.1, y + 1.5, 2.8, 1.1, "steered,\n“Dear Sir”", edge=ADDITION)
        _box(axes, 0.1, y, 2.8, 1.1, "unsteered,\n“Dear Sir”")
        _box(axes, 4.9, y + 1.5, 4.9, 1.1, "keys and values,\nwith the steer in them", edge=ADDITION)
        _arrow(axes, (2.95, y + 2.05), (4.85, y + 2.05), "writes", ADDITION)
        if salted:
            _box(axes, 4.9, y, 4.9, 1.1, "keys and values\nof their own")
        end = (4.85, y + 0.55) if salted else (4.85, y + 1.75)
        _arrow(axes, (2.95, y + 0.55), end, "reads")
    return figure


def _canvas(columns: float, lines: float, *, wide: float) -> tuple[Figure, Axes]:
    figure, axes = plt.subplots(figsize=(wide, wide * lines / columns))
    axes.set(xlim=(0, columns), ylim=(0, lines))
    axes.axis("off")
    return figure, axes


def _short(token: str) -> str:
    """A token's text in a box, without the space before a word; long ones are cut."""
    text = (token.strip() or "␣").replace("$", r"\$")
    return text if len(text) <= 7 else f"{text[:6]}…"


def _arrow(
    axes: Axes, start: tuple[float, float], end: tuple[float, float], label: str, colour: str = UNSTEERED
) -> None:
    axes.annotate("", end, start, arrowprops={"arrowstyle": "-|>", "color": colour, "lw": 1.8})
    middle = [(a + b) / 2 for a, b in zip(start, end, strict=True)]
    if label:
        axes.text(
            *middle, label, ha="center", va="center", color=colour, fontsize=10, backgroundcolor="white"
        )
