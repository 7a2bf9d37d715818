"""Every notebook: executed from a fresh kernel with its exercises answered, and as it is stored."""

import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("[0-9]*.ipynb"))
REPOSITORY = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["urls"]["Repository"]
SETUP = nbformat.read(NOTEBOOKS[0], as_version=4).cells[1].source

each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def cells(path: Path, kind: str = "code") -> list[nbformat.NotebookNode]:
    return [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == kind]


def printed(path: Path) -> str:
    """All text that the stored outputs show."""
    outputs = [output for cell in cells(path) for output in cell.outputs]
    texts = [
        output.get("text", "") + "".join(output.get("data", {}).get("text/plain", "")) for output in outputs
    ]
    return "\n".join(texts)


@pytest.mark.notebook
@each_notebook
def test_runs_from_a_fresh_kernel_with_the_exercises_answered(path: Path, tmp_path: Path):
    command = [sys.executable, ROOT / "notebooks" / "run.py", path.name, "--answers", "--build", tmp_path]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    text = printed(tmp_path / path.name)
    assert "not yet" not in text
    assert text.count("✔") == sum("notebook.check(" in cell.source for cell in cells(path))
    assert "Warning" not in text
    assert (tmp_path / path.name).with_suffix(".html").stat().st_size > 100_000


@each_notebook
def test_is_stored_as_executed_in_order_without_errors_or_warnings(path: Path):
    stored = [cell for cell in cells(path) if cell.source.strip()]
    assert [cell.execution_count for cell in stored] == list(range(1, len(stored) + 1))
    outputs = [output for cell in stored for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "error"]
    assert not [output for output in outputs if output.get("name") == "stderr"]
    assert not re.search(r"Warning|%\||(?<![\w.])/(home|root|tmp|work|usr|Users)/", printed(path))


@each_notebook
def test_is_under_a_megabyte_and_shows_a_picture(path: Path):
    assert path.stat().st_size < 1_000_000
    assert any("image/png" in output.get("data", {}) for cell in cells(path) for output in cell.outputs)


@each_notebook
def test_has_the_set_up_cell_first_then_parameters(path: Path):
    setup, parameters, *_ = cells(path)
    assert setup.source == SETUP
    assert len([line for line in SETUP.splitlines() if line]) <= 5
    assert parameters.metadata.tags == ["parameters"]
    assert re.search(r'^PROFILE = "fast"', parameters.source, re.MULTILINE)
    assert REPOSITORY in SETUP


@each_notebook
def test_opens_a_gpu_runtime_in_colab_by_a_badge_that_points_to_itself(path: Path):
    notebook = nbformat.read(path, as_version=4)
    assert notebook.metadata.accelerator == "GPU"
    assert notebook.metadata.kernelspec.name == "python3"
    place = f"{REPOSITORY.removeprefix('https://github.com/')}/blob/main/notebooks/{path.name}"
    assert f"(https://colab.research.google.com/github/{place})" in notebook.cells[0].source


@each_notebook
def test_links_resolve_and_cells_are_short(path: Path):
    for cell in cells(path, "markdown"):
        for target in re.findall(r"\]\((?!https?:|#)([^)]+)\)", cell.source):
            assert (path.parent / target).exists(), f"{path.name} links to {target}"
    for cell in cells(path):
        assert len(cell.source.splitlines()) <= 25, cell.source


@each_notebook
def test_says_what_it_teaches_when_it_fails_and_has_exercises_with_answers(path: Path):
    prose = "\n".join(cell.source for cell in cells(path, "markdown"))
    for part in ("You will be able to", "Time and memory", "fails", "Exercise 1", "Summary", "References"):
        assert part in prose, f"{path.name} lacks {part!r}"
    exercises = [cell for cell in cells(path) if "exercise" in cell.metadata.get("tags", [])]
    assert exercises
    assert prose.count("<details>") >= len(exercises)


@each_notebook
def test_the_numbers_it_wrote_are_on_file(path: Path):
    kept = re.findall(r'notebook\.keep\(\s*"(\w+)"', "\n".join(cell.source for cell in cells(path)))
    assert kept
    for name in kept:
        assert name.startswith(path.stem[:2])
        files = sorted((ROOT / "figures").glob(f"{name}.*"))
        assert files, f"figures/ lacks {name}; type: make figures NB={path.stem[:2]}"
        assert all(json.loads(file.read_text(encoding="utf-8")) for file in files if file.suffix == ".json")
