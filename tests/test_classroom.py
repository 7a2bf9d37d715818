"""The edition without answers, and the marks of a student's notebook."""

import sys
from pathlib import Path

import nbformat
import pytest

NOTEBOOKS = Path(__file__).parents[1] / "notebooks"
sys.path.insert(0, str(NOTEBOOKS))

import classroom  # noqa: E402

ATTEMPTS = {
    "add_at_front": "steered = hidden.clone()\n    steered[:, : len(rows)] += rows\n    return steered",
    "interaction": "return (both - a - b).mean(axis=1)",
    "kl": "raise NotImplementedError",
    "undominated": "return 1 / 0",
}
SIGNATURES = {
    "add_at_front": "hidden, rows",
    "interaction": "both, a, b, none",
    "kl": "a, b",
    "undominated": "points",
}


def test_the_edition_for_students_has_every_task_and_no_answer(tmp_path):
    classroom.student(tmp_path)
    originals = sorted(NOTEBOOKS.glob("[0-9]*.ipynb"))
    assert [path.name for path in sorted(tmp_path.iterdir())] == [path.name for path in originals]
    for path in originals:
        before, after = (nbformat.read(folder / path.name, 4) for folder in (NOTEBOOKS, tmp_path))
        shown = "\n".join(cell.source for cell in after.cells)
        assert "<summary>Answer" not in shown
        assert "<summary>Sample answer" not in shown
        stubs = [
            [cell for cell in nb.cells if "exercise" in cell.metadata.get("tags", [])]
            for nb in (before, after)
        ]
        assert len(stubs[0]) == len(stubs[1])
        assert stubs[0] or "playground" in path.stem


@pytest.mark.slow
def test_a_notebook_of_a_student_is_marked_exercise_by_exercise(tmp_path):
    cells = ["import steer_utils as su"]
    for name, body in ATTEMPTS.items():
        cells += [f"def {name}({SIGNATURES[name]}):\n    {body}"]
        cells += [f'su.exercises.check("{"00" if name == "add_at_front" else "08"}", {name})']
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    nbformat.write(notebook, tmp_path / "a.ipynb")
    assert classroom.grade(tmp_path / "a.ipynb") == {
        "add_at_front": "right",
        "interaction": "not yet",
        "kl": "not tried",
        "undominated": "not yet",
    }
