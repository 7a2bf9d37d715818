"""The notebook runner: what it leaves on disk, what it says, and that one failure stops nothing else."""

import contextlib
import importlib.util
import io
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import NamedTuple

import nbformat
import psutil
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

RUN = Path(__file__).parents[1] / "notebooks" / "run.py"
pytestmark = pytest.mark.filterwarnings("default")  # those of the libraries that talk to kernels

KERNEL = {"display_name": "Python 3", "language": "python", "name": "python3"}
FINE = "print('two and two is', 2 + 2)"
FAILS = "raise ValueError('on purpose')"
BROKEN = "this is no notebook"
STALE = [new_output("stream", text="from an earlier run")]


def cell(source: str, *tags: str, **more) -> nbformat.NotebookNode:
    return new_code_cell(source, metadata={"tags": list(tags)} if tags else {}, **more)


def write(path: Path, *cells: nbformat.NotebookNode | str) -> Path:
    """A notebook of these cells; text stands for a code cell."""
    whole = [cell(one) if isinstance(one, str) else one for one in cells]
    path.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(new_notebook(cells=whole, metadata={"kernelspec": KERNEL}), path)
    return path


def printed(path: Path) -> str:
    cells = nbformat.read(path, as_version=4).cells
    return "".join(output.get("text", "") for one in cells for output in one.get("outputs", []))


def load_runner(root: Path, patch: pytest.MonkeyPatch) -> ModuleType:
    """run.py, as if it stood in root/notebooks."""
    spec = importlib.util.spec_from_file_location("runner", RUN)
    runner = importlib.util.module_from_spec(spec)
    patch.setitem(sys.modules, "runner", runner)
    spec.loader.exec_module(runner)
    patch.setattr(runner, "HERE", root / "notebooks")
    patch.setattr(runner, "ROOT", root)
    patch.setenv("COLUMNS", "120")
    for name in ("TQDM_DISABLE", "STEER_UTILS_FIGURES"):
        patch.setenv(name, "as before")  # the runner sets them, and here that must not outlast a test
    (root / "notebooks").mkdir(exist_ok=True)
    return runner


class Done(NamedTuple):
    root: Path
    status: int
    out: str
    err: str

    @property
    def rows(self) -> dict[str, list[str]]:
        """The cells of the table's rows, by the name of the notebook."""
        lines = [re.split(r"\s*[│┃]\s*", line.strip(" │┃")) for line in self.out.splitlines() if "│" in line]
        return {name: rest for name, *rest in lines}


def call(runner: ModuleType, *arguments: object) -> Done:
    out, err = io.StringIO(), io.StringIO()
    before, sys.argv = sys.argv, ["run.py", *map(str, arguments)]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            status = runner.main()
    except SystemExit as left:
        status = left.code
    finally:
        sys.argv = before
    return Done(runner.ROOT, status, out.getvalue(), err.getvalue())


@pytest.fixture
def runner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return load_runner(tmp_path, monkeypatch)


@pytest.fixture
def started(runner: ModuleType, monkeypatch: pytest.MonkeyPatch) -> list[SimpleNamespace]:
    """Notebooks are not executed, only noted, with the parameters that they would have had."""
    calls = []

    def execute(source: Path, out: Path, parameters: dict, *, answers: bool) -> SimpleNamespace:
        calls.append(SimpleNamespace(name=source.name, out=out, parameters=parameters))
        return runner.Run(1.0, 1.0, "")

    monkeypatch.setattr(runner, "execute", execute)
    return calls


# --- four notebooks, of which two fail --------------------------------------------------------------------


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Done]:
    with pytest.MonkeyPatch.context() as patch:
        root = tmp_path_factory.mktemp("four")
        runner = load_runner(root, patch)
        here, build = root / "notebooks", root / "build"
        fine = [
            cell("COUNT, NAME = 0, ''", "parameters"),
            "print(type(COUNT).__name__, COUNT, type(NAME).__name__, NAME)",
            "import os, pathlib\nfigures = pathlib.Path(os.environ['STEER_UTILS_FIGURES'])\n"
            "figures.mkdir()\n_ = (figures / 'made').write_text(pathlib.Path.cwd().name)",
        ]
        write(here / "00_fine.ipynb", *fine)
        write(here / "01_fails.ipynb", "print('before')", FAILS, "print('afterwards')")
        (here / "02_broken.ipynb").write_text(BROKEN)
        write(here / "03_last.ipynb", cell(FINE, outputs=STALE))
        write(here / "draft.ipynb", FAILS)
        build.mkdir()
        (build / "02_broken.ipynb").write_text("{}")
        (build / "02_broken.html").write_text("a page of an earlier run")
        shutil.copytree(here, root / "sources")
        yield call(runner, "-p", "COUNT", "1", "--parameter", "NAME", "smollm2")


def test_a_failing_and_an_unreadable_notebook_do_not_stop_the_others(four):
    assert [(name, row[-1]) for name, row in four.rows.items()] == [
        ("00_fine", "ok"),
        ("01_fails", "failed"),
        ("02_broken", "failed"),
        ("03_last", "ok"),
    ]
    assert printed(four.root / "build" / "03_last.ipynb") == "two and two is 4\n"


def test_the_status_is_the_number_of_failures(four):
    assert four.status == 2


def test_the_table_has_seconds_and_memory_and_the_output_says_where_the_pages_are(four):
    for seconds, memory, _ in (four.rows[name] for name in ("00_fine", "03_last")):
        assert 0 <= int(seconds) < 60
        assert 0 < float(memory.removesuffix(" GB")) < 10
    assert f"{four.root}/build/*.html" in four.out


def test_each_error_is_told_behind_the_name_of_its_notebook(four):
    assert re.search(r"01_fails: (.|\n)*ValueError: on purpose", four.err)
    assert "02_broken: " in four.err
    assert "00_fine" not in four.err
    assert "03_last" not in four.err


def test_notebooks_are_written_as_far_as_they_went_with_a_page_for_each(four):
    build = four.root / "build"
    assert "before" in printed(build / "01_fails.ipynb")
    assert "afterwards" not in printed(build / "01_fails.ipynb")
    assert "on purpose" in (build / "01_fails.html").read_text()
    assert "two and two is 4" in (build / "03_last.html").read_text()
    assert {path.stem for path in build.glob("*.ipynb")} == {"00_fine", "01_fails", "03_last"}


def test_a_notebook_that_could_not_be_read_keeps_no_page_of_an_earlier_run(four):
    assert {path.stem for path in (four.root / "build").glob("*.html")} == {"00_fine", "01_fails", "03_last"}


def test_parameters_reach_the_notebook_with_their_types(four):
    assert printed(four.root / "build" / "00_fine.ipynb") == "int 1 str smollm2\n"


def test_notebooks_run_in_their_own_folder_and_put_figures_beside_the_pages(four):
    assert (four.root / "build" / "figures" / "made").read_text() == "notebooks"


def test_the_notebooks_themselves_stay_as_they_were(four):
    names = sorted(path.name for path in (four.root / "sources").iterdir())
    assert sorted(path.name for path in (four.root / "notebooks").iterdir()) == names
    for name in names:
        stored = (four.root / "notebooks" / name).read_bytes()
        assert stored == (four.root / "sources" / name).read_bytes()


@pytest.mark.parametrize("suffix", [".ipynb", ".html"])
def test_what_was_written_names_no_folder_and_no_time_of_this_run(four, suffix):
    for name in ("00_fine", "01_fails", "03_last"):
        text = (four.root / "build" / name).with_suffix(suffix).read_text()
        assert str(four.root) not in text
        assert time.strftime("%Y-%m-%dT") not in text


# --- which notebooks, with which parameters ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ([], ["00_a", "01_b", "02_c", "10_d"]),
        (["01"], ["01_b"]),
        (["10", "00"], ["00_a", "10_d"]),
        (["0"], ["00_a", "01_b", "02_c"]),
        (["02_c.ipynb"], ["02_c"]),
    ],
)
def test_names_begin_alike_and_all_notebooks_with_a_number_are_the_default(runner, started, names, expected):
    for name in ("02_c", "00_a", "10_d", "01_b", "draft"):
        write(runner.HERE / f"{name}.ipynb", FINE)
    done = call(runner, *names)
    assert done.status == 0
    assert [one.name.removesuffix(".ipynb") for one in started] == list(done.rows) == expected
    assert {one.out.parent for one in started} == {runner.ROOT / "build"}


@pytest.mark.parametrize("names", [["07"], ["07", "nothing"], ["00", "07"]], ids=str)
def test_a_name_that_no_notebook_has_is_an_error_that_repeats_it_and_nothing_runs(runner, started, names):
    write(runner.HERE / "00_a.ipynb", FINE)
    done = call(runner, *names)
    assert done.status == 2
    assert re.search("no notebook begins with.*07", done.err)
    assert started == []


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1", 1),
        ("-3", -3),
        ("0.5", 0.5),
        ("true", True),
        ("fast", "fast"),
        ("gpt2-xl", "gpt2-xl"),
        ("EleutherAI/pythia-70m", "EleutherAI/pythia-70m"),
    ],
)
def test_a_parameter_has_the_type_that_its_text_suggests(runner, started, text, value):
    write(runner.HERE / "00_a.ipynb", FINE)
    call(runner, "-p", "X", text, "-p", "Y", "2")
    (found,) = started
    assert found.parameters == {"X": value, "Y": 2}
    assert type(found.parameters["X"]) is type(value)


def test_a_build_folder_among_the_sources_costs_no_notebook(runner):
    source = write(runner.HERE / "00_a.ipynb", cell(FAILS, outputs=STALE))
    before = source.read_bytes()
    call(runner, "--build", runner.HERE)
    assert source.exists()
    assert source.read_bytes() == before


def test_the_exit_status_of_the_command_is_the_number_of_failures(tmp_path):
    (tmp_path / "notebooks").mkdir()
    shutil.copy(RUN, tmp_path / "notebooks")
    for name in ("00_a", "01_b", "02_c"):
        (tmp_path / "notebooks" / f"{name}.ipynb").write_text(BROKEN)
    done = subprocess.run([sys.executable, "notebooks/run.py"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 3, done.stderr
    assert done.stdout.count("failed") == 3
    assert "Traceback" not in done.stderr


# --- answers ----------------------------------------------------------------------------------------------


def answer(code: str) -> nbformat.NotebookNode:
    return new_markdown_cell(f"<details><summary>Answer</summary>\n\n```python\n{code}\n```\n\n</details>")


def test_with_answers_each_exercise_holds_the_answer_that_follows_it(runner, tmp_path):
    cells = [
        cell("first = ...", "exercise"),
        answer("first = 1"),
        cell("print(first)", "other"),
        cell("second = ...", "exercise", "slow"),
        cell("assert second == 2"),
        answer("def two():\n    return 2\n\nsecond = two()"),
        new_markdown_cell("```python\nan example\n```"),
    ]
    source = write(runner.HERE / "00_a.ipynb", *cells)
    before = source.read_bytes()
    copy = runner.with_answers(source, tmp_path)
    sources = [one.source.strip() for one in nbformat.read(copy, as_version=4).cells]
    expected = [one.source.strip() for one in cells]
    expected[0], expected[3] = "first = 1", "def two():\n    return 2\n\nsecond = two()"
    assert sources == expected
    assert copy.parent == tmp_path
    assert source.read_bytes() == before


def test_answers_are_executed_into_a_build_folder_given_from_anywhere(runner, tmp_path, monkeypatch):
    cells = [cell("x = ...", "exercise"), answer("x = 6 * 7"), "print('x is', x)"]
    source = write(runner.HERE / "00_a.ipynb", *cells)
    before = source.read_bytes()
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    done = call(runner, "--answers", "--build", "pages/new")
    assert done.status == 0, done.err
    pages = tmp_path / "elsewhere" / "pages" / "new"
    assert printed(pages / "00_a.ipynb") == "x is 42\n"
    assert "x is 42" in (pages / "00_a.html").read_text()
    assert source.read_bytes() == before
    assert [path.name for path in runner.HERE.iterdir()] == ["00_a.ipynb"]


def test_answers_that_cannot_be_put_in_are_failures_that_stop_nothing_else(runner):
    (runner.HERE / "00_broken.ipynb").write_text(BROKEN)
    write(runner.HERE / "01_unanswered.ipynb", cell("x = ...", "exercise"), "print(x)")
    write(runner.HERE / "02_fine.ipynb", FINE)
    done = call(runner, "--answers")
    assert {name: row[-1] for name, row in done.rows.items()} == {
        "00_broken": "failed",
        "01_unanswered": "failed",
        "02_fine": "ok",
    }
    assert done.status == 2
    assert "00_broken: " in done.err
    assert "01_unanswered: " in done.err


def test_answers_in_place_would_give_them_away_and_are_refused(runner, started):
    write(runner.HERE / "00_a.ipynb", FINE)
    done = call(runner, "--answers", "--in-place")
    assert done.status == 2
    assert re.search("--in-place.*not allowed with.*--answers", done.err)
    assert started == []


# --- in place ---------------------------------------------------------------------------------------------


def test_in_place_renews_a_notebook_that_succeeds_and_leaves_one_that_fails(runner):
    mark = "import os\nprint(os.path.relpath(os.environ['STEER_UTILS_FIGURES']))"
    fails = write(runner.HERE / "00_fails.ipynb", cell(FINE, outputs=STALE), FAILS)
    fine = write(runner.HERE / "01_fine.ipynb", cell(FINE, outputs=STALE), mark)
    before = fails.read_bytes(), nbformat.read(fine, as_version=4)
    done = call(runner, "--in-place")
    assert done.status == 1
    assert fails.read_bytes() == before[0]
    assert printed(fine) == "two and two is 4\n../figures\n"
    cells = nbformat.read(fine, as_version=4).cells
    assert [one.execution_count for one in cells] == [1, 2]
    for one, old in zip(cells, before[1].cells, strict=True):
        assert (one.id, one.source) == (old.id, old.source)
    nbformat.validate(nbformat.read(fine, as_version=4))
    once = fine.read_bytes()
    assert call(runner, "01", "--in-place").status == 0
    assert fine.read_bytes() == once  # nothing in it changes from run to run


# --- parts ------------------------------------------------------------------------------------------------


def test_tidy_takes_out_times_and_paths_and_leaves_the_rest(runner):
    spent = {"start_time": "2024-05-06T07:08:09", "duration": 1.5}
    cells = [
        cell(FINE, "kept", outputs=[new_output("stream", text="4")], execution_count=3),
        new_markdown_cell("text", metadata={"papermill": spent}),
    ]
    cells[0].metadata |= {"papermill": spent, "execution": {"iopub.status.busy": "2024-05-06T07:08:09"}}
    metadata = {
        "kernelspec": KERNEL,
        "language_info": {"name": "python", "version": "3.99.0"},
        "papermill": {"input_path": "/home/someone/00.ipynb", **spent},
        "accelerator": "GPU",
    }
    tidied = runner.tidy(new_notebook(cells=cells, metadata=metadata))
    assert not re.search(r"2024|/home|papermill|3\.99", nbformat.writes(tidied))
    assert tidied.metadata == {
        "kernelspec": KERNEL,
        "language_info": {"name": "python"},
        "accelerator": "GPU",
    }
    assert tidied.cells[0].metadata == {"tags": ["kept"]}
    assert tidied.cells[0].outputs[0].text == "4"
    assert tidied.cells[0].execution_count == 3
    assert runner.tidy(new_notebook(cells=[cell(FINE)])).cells[0].source == FINE  # with nothing to take out


def test_peak_memory_is_that_of_the_child_processes_while_they_run(runner):
    size = 200_000_000
    others = sum(child.memory_info().rss for child in psutil.Process().children(recursive=True))
    with runner.peak_memory() as peak:
        subprocess.run([sys.executable, "-c", f"import time; x = b'1' * {size}; time.sleep(0.6)"], check=True)
    assert others + size < peak[0] < others + 2 * size


def test_peak_memory_stops_looking_after_an_exception(runner):
    before = threading.active_count()
    with contextlib.suppress(ArithmeticError), runner.peak_memory():
        assert threading.active_count() == before + 1
        raise ArithmeticError
    assert threading.active_count() == before
