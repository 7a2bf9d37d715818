"""Figures and texts that a reader moves through: ipywidgets beside a kernel, stored frames on a page.

    def draw(coeff):
        return figure_of(coeff), HTML(f"<p>{text_at(coeff)}</p>")

    su.sliders.show("00_coefficient", draw, "The ten likeliest tokens at a coefficient.", coeff=[0, 1, 2, 4])

A frame is what `draw` gives for one choice of each control: a figure, HTML, or several of them. With a kernel
it is drawn when a reader moves there, once for each choice. With $STEER_UTILS_STATIC, as `notebooks/run.py`
sets it, all frames are drawn and stored with range inputs that need no kernel, no network and no library.
"""

import base64
import html
import io
import json
import os
from collections.abc import Callable, Collection, Iterable, Sequence
from functools import cache
from itertools import product
from typing import Any

import ipywidgets as widgets
from IPython.display import HTML, display
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

Piece = Figure | HTML
Draw = Callable[..., Piece | Iterable[Piece]]
DPI = 80  # a grid of frames has to fit into a notebook
SCRIPT = """
(root => {
  const {labels, frames} = JSON.parse(root.querySelector('[type="application/json"]').textContent);
  const inputs = [...root.querySelectorAll("input")];
  const show = () => {
    const at = inputs.reduce((sum, one, i) => sum * labels[i].length + Number(one.value), 0);
    inputs.forEach((one, i) => {
      one.nextElementSibling.value = labels[i][one.value];
      one.setAttribute("aria-valuetext", labels[i][one.value]);
    });
    root.querySelector("[aria-live]").innerHTML = frames[at];
  };
  inputs.forEach(one => { one.disabled = false; one.addEventListener("input", show); });
})(document.getElementById("%s"))
"""


def show(
    name: str, draw: Draw, alt: str, *, start: Sequence[int] = (), free: Collection[str] = (), **choices: Any
) -> None:
    """Show `draw` at one value of each of `choices`, with a control for each.

    name: of the figure, different in each call of a notebook. alt: what its pictures show, for readers who
    cannot see them. start: which value of each control comes first, by index; by default the first. free:
    controls in which a reader with a kernel may type something else. choices: the values of each control, by
    the name that `draw` takes. ValueError for a control without values.
    """
    if not choices or (empty := [one for one, values in choices.items() if not len(values)]):
        raise ValueError(f"give values to choose from for {', '.join(empty) if choices else 'a control'}")
    first = list(start) or [0] * len(choices)
    frame = cache(lambda *values: _frame(draw(**dict(zip(choices, values, strict=True))), alt))
    if os.environ.get("STEER_UTILS_STATIC"):
        frames = [frame(*values) for values in product(*choices.values())]
        display(HTML(twin(name, {k: [*map(_label, v)] for k, v in choices.items()}, frames, first)))
    else:
        display(_live(frame, choices, first, free))


def twin(name: str, choices: dict[str, list[str]], frames: Sequence[str], start: Sequence[int]) -> str:
    """HTML with a range input for each control and the frame of its place, of the product of all choices.

    Where a site takes out scripts, as GitHub does, the frame at `start` is left, and the inputs are off.
    """
    rows, at = [], 0
    for place, (label, values) in zip(start, choices.items(), strict=True):
        at = at * len(values) + place
        rows.append(
            f'<label style="display:block">{html.escape(label)} <input type="range" min="0" '
            f'max="{len(values) - 1}" value="{place}" disabled aria-valuetext="{html.escape(values[place])}" '
            f'style="width:14em;max-width:50%"> '
            f"<output>{html.escape(values[place])}</output></label>"
        )
    stored = json.dumps({"labels": list(choices.values()), "frames": list(frames)}).replace("<", r"\u003c")
    key = f"slider-{name}"
    return (
        f'<div id="{key}">{"".join(rows)}<div aria-live="polite">{frames[at]}</div>'
        f'<script type="application/json">{stored}</script><script>{SCRIPT % key}</script></div>'
    )


def _live(
    frame: Callable[..., str], choices: dict[str, Any], start: Sequence[int], free: Collection[str]
) -> widgets.Widget:
    """The controls as widgets above what they show."""
    controls = [
        _control(name, list(values), place, name in free)
        for place, (name, values) in zip(start, choices.items(), strict=True)
    ]
    typed, output = [one for one in controls if isinstance(one, widgets.Combobox)], widgets.Output()

    @output.capture(clear_output=True, wait=True)
    def update(_: Any = None) -> None:
        display(
            HTML(frame(*(one.value or one.placeholder if one in typed else one.value for one in controls)))
        )

    for control in controls:
        control.observe(update, "value")
    update()
    return widgets.VBox([*controls, output])


def _control(name: str, values: list[Any], place: int, free: bool) -> widgets.Widget:
    shape = {"description": name, "continuous_update": False, "layout": {"width": "min(40em, 95%)"}}
    if free:
        return widgets.Combobox(options=values, placeholder=values[place], ensure_option=False, **shape)
    return widgets.SelectionSlider(options=[(_label(one), one) for one in values], index=place, **shape)


def _label(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _frame(pieces: Piece | Iterable[Piece], alt: str) -> str:
    return "".join(_as_html(one, alt) for one in ([pieces] if isinstance(pieces, Piece) else pieces))


def _as_html(piece: Piece, alt: str) -> str:
    if isinstance(piece, HTML):
        return piece.data
    file = io.BytesIO()
    piece.savefig(file, dpi=DPI, bbox_inches="tight")
    plt.close(piece)
    picture = base64.b64encode(file.getvalue()).decode()
    return f'<img alt="{html.escape(alt)}" src="data:image/png;base64,{picture}" style="max-width:100%">'
