"""For teachers: the edition without answers, and the marks of a student's notebook.

python notebooks/classroom.py student [FOLDER]    all notebooks without answers, into build/student
python notebooks/classroom.py grade FILE [FILE …]    runs each file, and says which exercises are right
"""

import argparse
import re
import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from rich.console import Console
from rich.table import Table

HERE = Path(__file__).parent
ANSWER = re.compile(r"<details>\s*<summary>(Answer|Sample answer)</summary>.*?</details>\s*", re.DOTALL)


def student(folder: Path) -> None:
    """Write every notebook into a folder, without answers."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in sorted(HERE.glob("[0-9]*.ipynb")):
        notebook = nbformat.read(path, as_version=4)
        for cell in notebook.cells:
            if cell.cell_type == "markdown":
                cell.source = ANSWER.sub("", cell.source)
        notebook.cells = [cell for cell in notebook.cells if cell.source.strip()]
        nbformat.write(notebook, folder / path.name)


def grade(path: Path) -> dict[str, str]:
    """Run a notebook to its end, whatever fails: each exercise is "right", "not yet" or "not tried"."""
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(notebook, kernel_name="python3", timeout=None, allow_errors=True).execute()
    marks = {}
    for cell in notebook.cells:
        if found := re.search(r"su\.exercises\.check\(\s*\"\d+\", (\w+)", cell.source):
            printed = "".join(output.get("text", "") for output in cell.get("outputs", ()))
            failed = any(output.output_type == "error" for output in cell.get("outputs", ()))
            right, wrong = "✔" in printed, "✘" in printed or failed
            marks[found[1]] = "right" if right else "not yet" if wrong else "not tried"
    return marks


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("student").add_argument("folder", nargs="?", type=Path, default="build/student")
    commands.add_parser("grade").add_argument("files", nargs="+", type=Path)
    given = parser.parse_args()
    if given.command == "student":
        student(given.folder)
        return
    if missing := [str(file) for file in given.files if not file.is_file()]:
        sys.exit(f"no such file: {', '.join(missing)}")
    table = Table("file", "exercise", "mark")
    for file in given.files:
        for name, mark in grade(file).items():
            table.add_row(file.name, name, mark)
    Console().print(table)


if __name__ == "__main__":
    main()
