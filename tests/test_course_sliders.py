"""Sliders: beside a kernel they draw a frame when a reader moves there; on a page all frames are stored."""

import json
import re

import ipywidgets as widgets
import pytest
from IPython.display import HTML
from matplotlib import pyplot as plt

from steer_utils.course import sliders


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> list:
    """What is displayed."""
    found: list = []
    monkeypatch.setattr(sliders, "display", found.append)
    return found


def stored(page: str) -> dict:
    """The labels and frames in a page."""
    (found,) = re.findall(r'<script type="application/json">(.*?)</script>', page, re.DOTALL)
    return json.loads(found)


@pytest.fixture
def drawn() -> list[tuple]:
    return []


@pytest.fixture
def draw(drawn: list[tuple]):
    def draw(text: str, rank: int) -> HTML:
        drawn.append((text, rank))
        return HTML(f"<p>{text} {rank}</p>")

    return draw


def test_a_page_stores_every_frame_and_shows_that_of_the_start(shown, draw, drawn, monkeypatch):
    monkeypatch.setenv("STEER_UTILS_STATIC", "1")
    sliders.show("99", draw, "alt", start=[1, 0], text=["a", "b"], rank=[1, 2, 3])
    page = shown[0].data
    assert drawn == [(text, rank) for text in "ab" for rank in (1, 2, 3)]
    assert stored(page)["labels"] == [["a", "b"], ["1", "2", "3"]]
    assert stored(page)["frames"] == [f"<p>{text} {rank}</p>" for text, rank in drawn]
    assert re.findall(r'max="(\d)" value="(\d)" disabled', page) == [("1", "1"), ("2", "0")]
    assert '<div aria-live="polite"><p>b 1</p></div>' in page


def test_what_a_model_writes_can_neither_end_the_script_nor_be_one(shown, monkeypatch):
    monkeypatch.setenv("STEER_UTILS_STATIC", "1")
    text = "</script><!--<script> <b>"
    sliders.show("99", lambda x: HTML(text), "alt", **{"x": [text]})
    assert stored(shown[0].data)["frames"] == [text]
    assert "&lt;/script&gt;" in shown[0].data  # the value beside the slider
    assert "<!--" not in shown[0].data.replace(f'<div aria-live="polite">{text}', "")


def test_a_figure_becomes_a_picture_with_its_text_and_is_closed(shown, monkeypatch):
    monkeypatch.setenv("STEER_UTILS_STATIC", "1")

    def draw(x: int):
        figure, axes = plt.subplots(figsize=(2, 1))
        axes.plot([0, x])
        return figure, HTML(f"<b>{x}</b>")

    sliders.show("99", draw, 'a "line" that rises', x=[1, 2])
    frames = stored(shown[0].data)["frames"]
    assert plt.get_fignums() == []
    assert len(set(frames)) == 2
    assert all(
        one.startswith('<img alt="a &quot;line&quot; that rises" src="data:image/png;base64,')
        for one in frames
    )
    assert frames[1].endswith("<b>2</b>")


def test_beside_a_kernel_a_frame_is_drawn_once_when_a_reader_moves_there(shown, draw, drawn, monkeypatch):
    monkeypatch.delenv("STEER_UTILS_STATIC", raising=False)
    sliders.show("99", draw, "alt", start=[0, 1], free=["text"], text=["a", "b"], rank=[1, 2.5])
    text, rank, _ = shown[-1].children
    assert isinstance(text, widgets.Combobox)
    assert [label for label, _ in rank.options] == ["1", "2.5"]
    assert (text.continuous_update, rank.continuous_update) == (False, False)
    assert drawn == [("a", 2.5)]
    rank.value = 1
    text.value = "a text of one's own"
    rank.value = 2.5
    text.value = ""  # the first of the list again
    assert drawn == [("a", 2.5), ("a", 1), ("a text of one's own", 1), ("a text of one's own", 2.5)]


@pytest.mark.parametrize(("choices", "what"), [({}, "a control"), ({"y": [1], "x": []}, "x")])
def test_a_slider_without_values_is_refused(choices, what):
    with pytest.raises(ValueError, match=f"values to choose from for {what}$"):
        sliders.show("99", lambda **_: HTML(""), "alt", **choices)
