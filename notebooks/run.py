"""Execute the notebooks, render them as HTML pages, and print a table of results.

python notebooks/run.py [00 03 …] [-p NAME VALUE …] [--build DIR] [--answers | --in-place]
"""

import argparse
import os
import re
import shutil
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import nbformat
import papermill
import psutil
import yaml
from nbconvert import HTMLExporter
from rich.console import Console
from rich.table import Table

HERE = Path(__file__).parent
ROOT = HERE.parent


@dataclass(frozen=True)
class Run:
    """One notebook's seconds, its kernel's peak memory in GB, and the error that stopped it, if any."""

    seconds: float
    memory: float
    error: str


def execute(source: Path, out: Path, parameters: dict[str, object], *, answers: bool = False) -> Run:
    """Execute a notebook in a new kernel; write it to `out` and as an HTML page, even if it fails."""
    start, error = time.perf_counter(), ""
    page = out.with_suffix(".html")
    for stale in (out, page):
        stale.unlink(missing_ok=True)
    with peak_memory() as peak:
        try:
            source = with_answers(source, out.parent) if answers else source
            quiet = {"progress_bar": False, "kernel_name": "python3"}
            papermill.execute_notebook(source, out, parameters, cwd=HERE, **quiet)
        except Exception as raised:  # the other notebooks still run
            error = str(raised) or repr(raised)
    if out.exists():
        notebook = tidy(nbformat.read(out, as_version=4))
        nbformat.write(notebook, out)
        page.write_text(HTMLExporter().from_notebook_node(notebook)[0], encoding="utf-8")
    return Run(time.perf_counter() - start, peak[0] / 1e9, error)


@contextmanager
def peak_memory() -> Iterator[list[int]]:
    """Record the peak resident memory of all child processes together, in bytes, as the list's one item."""
    peak, done = [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.2):
            peak[0] = max(peak[0], sum(memory(child) for child in psutil.Process().children(recursive=True)))

    def memory(process: psutil.Process) -> int:
        try:
            return process.memory_info().rss
        except psutil.NoSuchProcess:
            return 0

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield peak
    finally:
        done.set()
        watcher.join()


def tidy(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """Remove what differs from run to run or between machines: times, paths, the kernel's version."""
    notebook.metadata.pop("papermill", None)
    notebook.metadata.get("language_info", {}).pop("version", None)
    for cell in notebook.cells:
        for key in ("papermill", "execution"):
            cell.metadata.pop(key, None)
    return notebook


def with_answers(source: Path, folder: Path) -> Path:
    """Write a copy in which each cell tagged "exercise" is replaced by the folded answer after it."""
    notebook = nbformat.read(source, as_version=4)
    for i, cell in enumerate(notebook.cells):
        if "exercise" in cell.metadata.get("tags", []):
            following = "\n".join(later.source for later in notebook.cells[i + 1 : i + 4])
            answer = re.search(r"<details>.*?```python\n(.*?)```", following, re.DOTALL)
            if answer is None:
                raise ValueError(f"no folded answer within three cells of the exercise {cell.source!r}")
            cell.source = answer[1]
    copy = folder / f".{source.name}"
    nbformat.write(notebook, copy)
    return copy


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("notebooks", nargs="*", help="beginnings of file names, such as 03; all by default")
    parser.add_argument("-p", "--parameter", nargs=2, action="append", default=[], metavar=("NAME", "VALUE"))
    parser.add_argument(
        "--build", type=Path, default=ROOT / "build", help="where executed notebooks and pages go"
    )
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--answers", action="store_true", help="with the exercises answered")
    how.add_argument("--in-place", action="store_true", help="renew the notebooks' own outputs and figures/")
    given = parser.parse_args()

    sources = sorted(HERE.glob("[0-9]*.ipynb"))
    unknown = [name for name in given.notebooks if not any(path.name.startswith(name) for path in sources)]
    if unknown or not sources:
        parser.error(f"no notebook begins with {' or '.join(unknown)}")
    if given.build.resolve() == HERE.resolve():
        parser.error("--build must be another folder than the notebooks' own")
    if given.in_place and given.parameter:
        parser.error("--in-place renews the notebooks with the parameters that stand in them: leave -p away")
    chosen = [path for path in sources if path.name.startswith(tuple(given.notebooks) or ("",))]
    given.build.mkdir(parents=True, exist_ok=True)
    os.environ["TQDM_DISABLE"] = "1"
    os.environ["STEER_UTILS_FIGURES"] = str((ROOT if given.in_place else given.build.resolve()) / "figures")

    parameters = {name: yaml.safe_load(value) for name, value in given.parameter}
    table = Table("notebook", "seconds", "peak memory", "result", title="Notebooks")
    failed = []
    for source in chosen:
        out = given.build / source.name
        run = execute(source, out, parameters, answers=given.answers)
        table.add_row(
            source.stem, f"{run.seconds:.0f}", f"{run.memory:.1f} GB", "failed" if run.error else "ok"
        )
        if run.error:
            failed.append(source.stem)
            print(f"{source.stem}: {run.error}", file=sys.stderr)
        elif given.in_place:
            shutil.copyfile(out, source)
    Console().print(table)
    print(f"Pages: {given.build}/*.html")
    return len(failed)


if __name__ == "__main__":
    sys.exit(main())
