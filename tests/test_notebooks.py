"""Every notebook: executed in a new kernel with its exercises answered, and as it is stored."""

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
PARTS = ("You will be able to", "Time and memory", "fails", "Exercise 1", "Summary", "References")

each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def cells(path: Path, kind: str = "code") -> list[nbformat.NotebookNode]:
    return [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == kind]


def printed(path: Path) -> str:
    """All text that the stored outputs show."""
    outputs = [output for cell in cells(path) for output in cell.outputs]
    texts = [one.get("text", "") + "".join(one.get("data", {}).get("text/plain", "")) for one in outputs]
    return "\n".join(texts)


@pytest.mark.notebook
@each_notebook
def test_runs_in_a_new_kernel_with_the_exercises_answered(path: Path, tmp_path: Path):
    command = [sys.executable, ROOT / "notebooks" / "run.py", path.name, "--answers", "--build", tmp_path]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    text = printed(tmp_path / path.name)
    assert "not yet" not in text
    assert text.count("✔") == sum("notebook.check(" in cell.source for cell in cells(path))
    assert "Warning" not in text
    assert (tmp_path / path.name).with_suffix(".html").stat().st_size > 100_000


@each_notebook
def test_is_stored_as_executed_in_order_with_a_picture_and_without_errors_or_warnings(path: Path):
    stored = [cell for cell in cells(path) if cell.source.strip()]
    assert [cell.execution_count for cell in stored] == list(range(1, len(stored) + 1))
    outputs = [output for cell in stored for output in cell.outputs]
    assert not [one for one in outputs if one.output_type == "error" or one.get("name") == "stderr"]
    assert not re.search(r"Warning|%\||(?<![\w.])/(home|root|tmp|work|usr|Users)/", printed(path))
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert path.stat().st_size < 1_000_000


@each_notebook
def test_begins_with_the_same_cells_and_opens_a_gpu_runtime_in_colab(path: Path):
    setup, parameters, *_ = cells(path)
    assert setup.source == SETUP
    assert len([line for line in SETUP.splitlines() if line]) <= 5
    assert REPOSITORY in SETUP
    assert parameters.metadata.tags == ["parameters"]
    assert re.search(r'^PROFILE = "fast"', parameters.source, re.MULTILINE)
    notebook = nbformat.read(path, as_version=4)
    assert notebook.metadata.accelerator == "GPU"
    assert notebook.metadata.kernelspec.name == "python3"
    place = f"{REPOSITORY.removeprefix('https://github.com/')}/blob/main/notebooks/{path.name}"
    assert f"(https://colab.research.google.com/github/{place})" in notebook.cells[0].source


@each_notebook
def test_has_all_parts_of_a_lesson_short_cells_and_links_that_resolve(path: Path):
    prose = "\n".join(cell.source for cell in cells(path, "markdown"))
    exercises = [cell for cell in cells(path) if "exercise" in cell.metadata.get("tags", [])]
    assert [part for part in PARTS if part not in prose] == []
    assert 1 <= len(exercises) <= prose.count("<details>")
    assert [cell.source for cell in cells(path) if len(cell.source.splitlines()) > 25] == []
    targets = re.findall(r"\]\((?!https?:|#)([^)]+)\)", prose)
    assert [target for target in targets if not (path.parent / target).exists()] == []


@each_notebook
def test_the_numbers_it_wrote_are_on_file(path: Path):
    kept = re.findall(r'notebook\.keep\(\s*"(\w+)"', "\n".join(cell.source for cell in cells(path)))
    assert kept
    for name in kept:
        assert name.startswith(path.stem[:2])
        files = sorted((ROOT / "figures").glob(f"{name}.*"))
        assert files, f"figures/ lacks {name}; type: make figures NB={path.stem[:2]}"
        assert all(json.loads(file.read_text(encoding="utf-8")) for file in files if file.suffix == ".json")
