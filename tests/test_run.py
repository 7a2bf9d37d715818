"""The notebook runner: what it leaves on disk, what it prints, and that one failure stops nothing else."""

import contextlib
import importlib.util
import json
import re
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import ModuleType, SimpleNamespace

import nbformat
import psutil
import pytest
from conftest import disk_of
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

RUN = Path(__file__).parents[1] / "notebooks" / "run.py"
pytestmark = pytest.mark.filterwarnings("default")  # those of the libraries that talk to kernels

KERNEL = {"display_name": "Python 3", "language": "python", "name": "python3"}
FINE = "print('two and two is', 2 + 2)"
PARAMETERS = "COUNT = 0\nNAME = ''"
FAILS = "raise ValueError('on purpose')"
BROKEN = "this is no notebook"
STALE = [new_output("stream", text="from an earlier run")]


def cell(source: str, *tags: str, **more) -> nbformat.NotebookNode:
    return new_code_cell(source, metadata={"tags": list(tags)} if tags else {}, **more)


def answer(code: str) -> nbformat.NotebookNode:
    return new_markdown_cell(f"<details><summary>Answer</summary>\n\n```python\n{code}\n```\n\n</details>")


def write(path: Path, *cells: nbformat.NotebookNode | str) -> Path:
    """A notebook of these cells; a string stands for a code cell."""
    whole = [cell(one) if isinstance(one, str) else one for one in cells]
    nbformat.write(new_notebook(cells=whole, metadata={"kernelspec": KERNEL}), path)
    return path


def printed(path: Path) -> str:
    cells = nbformat.read(path, as_version=4).cells
    return "".join(output.get("text", "") for one in cells for output in one.get("outputs", []))


def rows(out: str) -> dict[str, list[str]]:
    """The cells of the printed table's rows, by the name of the notebook."""
    lines = [re.split(r"\s*[│┃]\s*", line.strip(" │┃")) for line in out.splitlines() if "│" in line]
    return {name: rest for name, *rest in lines}


def command(root: Path, *arguments: object, cwd: Path | None = None) -> subprocess.CompletedProcess:
    """run.py as a command, from a copy in root/notebooks."""
    for file in (RUN, RUN.with_name("pages.py")):
        shutil.copy(file, root / "notebooks")
    whole = [sys.executable, str(root / "notebooks" / "run.py"), *map(str, arguments)]
    return subprocess.run(whole, cwd=cwd or root, capture_output=True, text=True)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "notebooks").mkdir()
    return tmp_path


@pytest.fixture
def runner(root: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """run.py as a module that stands in root/notebooks; it notes which notebooks it would execute."""
    spec = importlib.util.spec_from_file_location("runner", RUN)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "runner", module)
    monkeypatch.syspath_prepend(RUN.parent)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "HERE", root / "notebooks")
    monkeypatch.setattr(module, "ROOT", root)
    for name in ("TQDM_DISABLE", "STEER_UTILS_FIGURES"):
        monkeypatch.setenv(name, "as before")  # the runner sets them, and here that must not outlast a test
    module.started = []

    def execute(source: Path, out: Path, parameters: dict, *, answers: bool) -> SimpleNamespace:
        module.started.append(SimpleNamespace(name=source.stem, out=out, parameters=parameters))
        return module.Run(1.0, 1.0, "")

    monkeypatch.setattr(module, "execute", execute)
    return module


def main(runner: ModuleType, monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["run.py", "--jobs", "1", *map(str, arguments)])
    try:
        return runner.main()
    except SystemExit as left:
        return left.code


# --- four notebooks, of which two fail --------------------------------------------------------------------


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    root = tmp_path_factory.mktemp("four")
    here, build = root / "notebooks", root / "build"
    here.mkdir()
    build.mkdir()
    fine = [
        cell(PARAMETERS, "parameters"),
        "print(type(COUNT).__name__, COUNT, type(NAME).__name__, NAME)",
        "import os, pathlib\nfigures = pathlib.Path(os.environ['STEER_UTILS_FIGURES'])\n"
        "figures.mkdir()\n_ = (figures / 'made').write_text(str(list(pathlib.Path.cwd().iterdir())))",
    ]
    write(here / "00_fine.ipynb", *fine)
    write(
        here / "01_fails.ipynb",
        cell(PARAMETERS, "parameters"),
        "print('before')",
        FAILS,
        "print('afterwards')",
    )
    (here / "02_broken.ipynb").write_text(BROKEN)
    write(here / "03_last.ipynb", cell(PARAMETERS, "parameters"), cell(FINE, outputs=STALE))
    write(here / "draft.ipynb", FAILS)
    (build / "02_broken.html").write_text("a page of an earlier run")
    before = {path.name: path.read_bytes() for path in here.iterdir()}
    done = command(root, "-p", "COUNT", "1", "--parameter", "NAME", "smollm2")
    return SimpleNamespace(root=root, build=build, done=done, before=before)


def test_a_failing_and_an_unreadable_notebook_are_reported_and_do_not_stop_the_others(four):
    table = rows(four.done.stdout)
    assert {name: row[-1] for name, row in table.items()} == {
        "00_fine": "ok",
        "01_fails": "failed",
        "02_broken": "failed",
        "03_last": "ok",
    }
    assert four.done.returncode == 2
    assert 0 <= int(table["03_last"][0]) < 100
    assert 0 < float(table["03_last"][1].removesuffix(" GB")) < 10
    assert re.search(r"01_fails: (.|\n)*ValueError: on purpose", four.done.stderr)
    assert "02_broken: " in four.done.stderr
    assert not re.search("00_fine: |03_last: ", four.done.stderr)
    assert f"{four.root}/build/*.html" in four.done.stdout


def test_notebooks_are_written_as_far_as_they_went_with_a_page_for_each(four):
    pages = {path.stem: path.read_text() for path in four.build.glob("*.html")}
    assert pages.keys() == {"00_fine", "01_fails", "03_last"}
    assert {path.stem for path in four.build.glob("*.ipynb")} == pages.keys()
    assert "before" in printed(four.build / "01_fails.ipynb")
    assert "afterwards" not in printed(four.build / "01_fails.ipynb")
    assert "on purpose" in pages["01_fails"]
    assert printed(four.build / "03_last.ipynb") == "two and two is 4\n"
    assert "two and two is 4" in pages["03_last"]


def test_parameters_have_types_and_notebooks_run_in_an_empty_folder_with_figures_beside_the_pages(four):
    assert printed(four.build / "00_fine.ipynb") == "int 1 str smollm2\n"
    assert (four.build / "figures" / "made").read_text() == "[]"


def test_the_notebooks_themselves_stay_as_they_were_and_pages_name_no_folder_and_no_time(four):
    here = four.root / "notebooks"
    assert {path.name: path.read_bytes() for path in here.glob("*.ipynb")} == four.before
    for path in [*four.build.glob("*.ipynb"), *four.build.glob("*.html")]:
        assert str(four.root) not in path.read_text()
        assert time.strftime("%Y-%m-%dT") not in path.read_text()


@pytest.mark.slow
def test_a_misspelt_parameter_is_an_error_with_the_nearest_name_and_1e_3_is_a_number(root):
    write(root / "notebooks" / "00_a.ipynb", cell("RATE = 0.1\nSEED = 0", "parameters"), "print(repr(RATE))")
    done = command(root, "-p", "SEDE", "3")
    assert done.returncode == 1
    assert "00_a.ipynb has no parameter 'SEDE': did you mean SEED?" in done.stderr
    assert command(root, "-p", "RATE", "1e-3").returncode == 0
    assert printed(root / "build" / "00_a.ipynb") == "0.001\n"


# --- which notebooks, with which parameters ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ([], ["00_a", "01_b", "10_d"]),
        (["10", "00"], ["00_a", "10_d"]),
        (["0"], ["00_a", "01_b"]),
        (["01_b.ipynb"], ["01_b"]),
    ],
)
def test_names_begin_alike_and_all_notebooks_with_a_number_are_the_default(
    runner, monkeypatch, names, expected
):
    for name in ("00_a", "10_d", "01_b", "draft"):
        write(runner.HERE / f"{name}.ipynb", FINE)
    assert main(runner, monkeypatch, *names) == 0
    assert [one.name for one in runner.started] == expected
    assert {one.out.parent for one in runner.started} == {runner.ROOT / "build"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["00", "07"], "no notebook begins with 07"),
        (["--answers", "--in-place"], "--in-place: not allowed with argument --answers"),
        (["--in-place", "-p", "SEED", "1"], "leave -p away"),
        (["--build", "notebooks"], "--build must be another folder"),
        (["--shard", "2/2"], "shard must be I/N with I from 0 to N − 1, such as 0/4, not '2/2'"),
    ],
)
def test_what_cannot_be_meant_is_an_error_and_nothing_runs(runner, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(runner.ROOT)
    source = write(runner.HERE / "00_a.ipynb", FINE)
    before = source.read_bytes()
    assert main(runner, monkeypatch, *arguments) == 2
    assert message in capsys.readouterr().err
    assert runner.started == []
    assert source.read_bytes() == before


def test_a_parameter_has_the_type_that_its_text_suggests(runner, monkeypatch):
    write(runner.HERE / "00_a.ipynb", FINE)
    values = {"A": -3, "B": 0.5, "C": True, "D": "gpt2-xl", "E": "EleutherAI/pythia-70m"}
    given = [
        part for name, value in values.items() for part in ("-p", name, str(value).replace("True", "true"))
    ]
    main(runner, monkeypatch, *given)
    assert [one.parameters for one in runner.started] == [values]


# --- answers ----------------------------------------------------------------------------------------------


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
    copy = runner.with_answers(write(runner.HERE / "00_a.ipynb", *cells), tmp_path)
    expected = [one.source.strip() for one in cells]
    expected[0], expected[3] = "first = 1", "def two():\n    return 2\n\nsecond = two()"
    assert [one.source.strip() for one in nbformat.read(copy, as_version=4).cells] == expected


@pytest.mark.slow
def test_answers_are_executed_into_a_folder_given_from_anywhere_and_a_missing_one_is_a_failure(root):
    here, elsewhere = root / "notebooks", root / "elsewhere"
    elsewhere.mkdir()
    (here / "00_broken.ipynb").write_text(BROKEN)
    write(here / "01_unanswered.ipynb", cell("x = ...", "exercise"), "print(x)")
    source = write(
        here / "02_fine.ipynb", cell("x = ...", "exercise"), answer("x = 6 * 7"), "print('x is', x)"
    )
    before = source.read_bytes()
    done = command(root, "--answers", "--build", "pages/new", cwd=elsewhere)
    assert [row[-1] for row in rows(done.stdout).values()] == ["failed", "failed", "ok"]
    assert done.returncode == 2
    assert "01_unanswered: no folded answer" in done.stderr
    assert printed(elsewhere / "pages" / "new" / "02_fine.ipynb") == "x is 42\n"
    assert source.read_bytes() == before
    assert len(list(here.glob("*.ipynb"))) == 3


# --- in place ---------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_in_place_renews_a_notebook_that_succeeds_and_leaves_one_that_fails(root):
    here = root / "notebooks"
    mark = "import os, pathlib\nfigures = pathlib.Path(os.environ['STEER_UTILS_FIGURES'])\n"
    mark += "figures.mkdir(exist_ok=True)\n(figures / '{}.png').write_text('new')\nprint(figures.name)"
    (root / "figures").mkdir()
    for name in ("00_a", "01_b", "02_c"):
        (root / "figures" / f"{name}.png").write_text("old")
    fails = write(here / "00_fails.ipynb", cell(FINE, outputs=STALE), mark.format("00_a"), FAILS)
    mark = mark.format("01_b")
    head = new_markdown_cell(
        "**Time and memory** (fast profile): long and 9 GB on two CPU cores; no network."
    )
    fine = write(here / "01_fine.ipynb", head, cell(FINE, outputs=STALE), mark)
    before = fails.read_bytes(), nbformat.read(fine, as_version=4)
    assert command(root, "--in-place").returncode == 1
    assert fails.read_bytes() == before[0]
    assert printed(fine) == "two and two is 4\nrenewed\n"
    pictures = {path.name: path.read_text() for path in (root / "figures").glob("*.png")}
    assert pictures == {"00_a.png": "old", "01_b.png": "new", "02_c.png": "old"}
    stored = nbformat.read(fine, as_version=4)
    nbformat.validate(stored)
    assert [one.execution_count for one in stored.cells[1:]] == [1, 2]
    kept = [(one.id, one.source) for one in before[1].cells]
    assert [(one.id, one.source) for one in stored.cells[1:]] == kept[1:]
    assert "(fast profile): 0.5 minutes and 1 GB on two CPU cores; no" in stored.cells[0].source
    recorded = json.loads((root / "figures" / "minutes.json").read_text())
    assert list(recorded) == ["01_fine"]
    assert 0 <= recorded["01_fine"]["seconds"] <= 30
    once = fine.read_bytes()
    assert command(root, "01", "--in-place").returncode == 0
    assert fine.read_bytes() == once  # nothing in it changes from run to run


# --- shards -----------------------------------------------------------------------------------------------


def test_shards_share_the_notebooks_and_one_that_ended_well_is_not_executed_again(
    runner, root, monkeypatch, capsys
):
    for number in range(4):
        write(runner.HERE / f"0{number}_a.ipynb", FINE)
    failing, build = {"01_a"}, root / "build"

    def execute(source: Path, out: Path, parameters: dict, *, answers: bool = False):
        runner.started.append(source.stem)
        write(out, f"'{source.stem}', {parameters}")
        return runner.Run(1.0, 1.0, "on purpose" if source.stem in failing else "")

    monkeypatch.setattr(runner, "execute", execute)
    assert main(runner, monkeypatch, "--shard", "0/2") == 0
    assert runner.started == ["00_a", "02_a"]
    assert main(runner, monkeypatch, "--shard", "1/2") == 1
    assert runner.started == ["00_a", "02_a", "01_a", "03_a"]
    (build / "02_a.ipynb").unlink()  # what is left of a run is enough
    failing.clear()
    capsys.readouterr()
    assert main(runner, monkeypatch, "--shard", "0/1") == 0
    assert runner.started[4:] == ["01_a"]
    assert {row[-1] for row in rows(capsys.readouterr().out).values()} == {"ok"}
    assert "02_a" in nbformat.read(build / "02_a.ipynb", as_version=4).cells[0].source
    assert "02_a" in (build / "02_a.html").read_text()
    write(runner.HERE / "00_a.ipynb", FINE, FINE)
    assert main(runner, monkeypatch, "--shard", "0/1") == 2
    assert "holds a run with other settings (00_a.ipynb)" in capsys.readouterr().err


# --- in place, on a full disk -----------------------------------------------------------------------------


def test_a_full_disk_leaves_the_notebook_and_its_figures_as_they_were(runner, root, monkeypatch):
    source, new = write(root / "notebooks" / "01_a.ipynb", "1"), write(root / "01_a.ipynb", "2" * 5000)
    (root / "figures").mkdir()
    (root / "figures" / "01_a.png").write_text("old")
    (root / "renewed").mkdir()
    (root / "renewed" / "01_a.png").write_text("new" * 1000)
    monkeypatch.setenv("STEER_UTILS_FIGURES", str(root / "renewed"))
    before = {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}
    run = runner.Run(1.0, 1.0, "")
    for size, name in ((2000, r"figures/01_a\.png"), (4000, r"notebooks/01_a\.ipynb")):
        said = rf"bytes cannot be written to '.*{name}' \(File too large\): make room"
        with disk_of(size), pytest.raises(OSError, match=said):
            runner.renew(source, new, run)
        left = {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}
        picture = before[root / "renewed" / "01_a.png"] if size == 4000 else b"old"
        assert left == before | {root / "figures" / "01_a.png": picture}  # whole, and nothing beside them


# --- side by side -----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_jobs_run_side_by_side_the_longest_first(root):
    here = root / "notebooks"
    wait = "import time\nprint(time.time())\ntime.sleep(2)\nprint(time.time())"
    for name in ("00_a", "01_b", "02_c"):
        write(here / f"{name}.ipynb", wait)
    (root / "figures").mkdir()
    known = {"00_a": {"seconds": 1}, "01_b": {"seconds": 9}}
    (root / "figures" / "minutes.json").write_text(json.dumps(known))
    assert command(root, "--jobs", "2").returncode == 0
    span = {
        name: [*map(float, printed(root / "build" / f"{name}.ipynb").split())] for name in ("00_a", "01_b")
    }
    assert span["01_b"][0] < span["00_a"][0]  # 02, of which nothing is known, and 01 come first
    other = [*map(float, printed(root / "build" / "02_c.ipynb").split())]
    assert max(other[0], span["01_b"][0]) < min(other[1], span["01_b"][1])


# --- pages ------------------------------------------------------------------------------------------------


def test_a_page_asks_for_nothing_from_elsewhere_and_links_to_pages(runner):
    badge = "[![Open in Colab](https://elsewhere/badge.svg)](https://colab/01_b.ipynb)"
    text = f"{badge} Next: [01](01_b.ipynb#part). $$\\sum_i x_i^2$$ and $\\alpha$; it costs 5."
    page = runner.page(new_notebook(cells=[new_markdown_cell(text), cell(FINE)]))
    assert not re.search(r"<script[^>]+src=|<link|@import|cdn|unpkg|jsdelivr", page)
    assert not re.search(r"<img[^>]+src=.(?!data:)", page)
    assert 'href="01_b.html#part"' in page
    assert 'href="https://colab/01_b.ipynb"' in page
    assert re.search(r'<math[^>]*display="block"[^>]*>.*∑', page, re.DOTALL) or "&#x02211;" in page
    assert page.count("<math") == 2


# --- parts ------------------------------------------------------------------------------------------------


def test_tidy_takes_out_times_and_paths_and_leaves_the_rest(runner):
    spent = {"start_time": "2024-05-06T07:08:09", "duration": 1.5}
    cells = [
        cell(FINE, "kept", outputs=[new_output("stream", text="4")], execution_count=3),
        new_markdown_cell("text", metadata={"papermill": spent}),
    ]
    cells[0].metadata |= {"papermill": spent, "execution": {"iopub.status.busy": "2024-05-06T07:08:09"}}
    language = {"name": "python", "version": "3.99.0"}
    papermill = {"input_path": "/home/someone/00.ipynb", **spent}
    metadata = {"kernelspec": KERNEL, "language_info": language, "papermill": papermill, "accelerator": "GPU"}
    tidied = runner.tidy(new_notebook(cells=cells, metadata=metadata))
    kept = {"kernelspec": KERNEL, "language_info": {"name": "python"}, "accelerator": "GPU"}
    assert not re.search(r"2024|/home|papermill|3\.99", nbformat.writes(tidied))
    assert tidied.metadata == kept
    assert tidied.cells[0].metadata == {"tags": ["kept"]}
    assert tidied.cells[0].outputs[0].text == "4"
    assert tidied.cells[0].execution_count == 3


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
