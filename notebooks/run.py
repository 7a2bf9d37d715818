"""Execute the notebooks, render them as HTML pages, and print a table of results.

python notebooks/run.py [00 03 …] [-p NAME VALUE …] [--jobs N] [--build DIR]
                        [--answers | --in-place | --shard I/N]

Each notebook runs in a kernel of its own, in an empty folder, as on Colab. Several run side by side, a job to
each processor and a processor to each job; with parameters, as for a GPU, one after the other unless --jobs
says otherwise. --in-place renews a notebook and its figures once it has ended well, each written beside the
old file and renamed, and records the minutes in figures/minutes.json. --shard executes each N-th notebook,
for one of N machines with a common disk; a notebook that has ended well is not executed again, so the same
command goes on after a stop, with --shard 0/1 on one machine.
"""

import argparse
import difflib
import hashlib
import json
import math
import os
import re
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import nbformat
import papermill
import psutil
import yaml
from joblib import Parallel, delayed
from pages import page
from rich.console import Console
from rich.table import Table

HERE = Path(__file__).parent
ROOT = HERE.parent
GB_EACH = 4  # of memory that a notebook may take
# YAML 1.1 reads 1e-3 as a text.
number = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$")
yaml.SafeLoader.add_implicit_resolver("tag:yaml.org,2002:float", number, [*"-+.0123456789"])
MINUTES = "minutes.json"  # in figures/: {"00_start_here": {"seconds": …, "GB": …}, …}


@dataclass(frozen=True)
class Run:
    """One notebook's seconds, its kernel's peak memory in GB, and the error that stopped it, if any."""

    seconds: float
    memory: float
    error: str


def execute(source: Path, out: Path, parameters: dict[str, object], *, answers: bool = False) -> Run:
    """Execute a notebook in a new kernel; write it to `out` and as an HTML page, even if it fails."""
    start, error = time.perf_counter(), ""
    for stale in (out, out.with_suffix(".html")):
        stale.unlink(missing_ok=True)
    with peak_memory() as peak, tempfile.TemporaryDirectory() as empty:
        try:
            require_known(source, parameters)
            source = with_answers(source, out.parent) if answers else source
            quiet = {"progress_bar": False, "kernel_name": "python3"}
            papermill.execute_notebook(source, out, parameters, cwd=empty, **quiet)
        except Exception as raised:  # the other notebooks still run
            error = str(raised) or repr(raised)
    if out.exists():
        write(tidy(nbformat.read(out, as_version=4)), out)
    return Run(time.perf_counter() - start, peak[0] / 1e9, error)


def write(notebook: nbformat.NotebookNode, out: Path) -> None:
    """Write a notebook and its page."""
    nbformat.write(notebook, out)
    out.with_suffix(".html").write_text(page(notebook), encoding="utf-8")


class Failed(Exception):
    """Brings a run that failed past the store of those that ended well."""


def execute_once(
    kept: Any, number: int, source: Path, out: Path, parameters: dict[str, object]
) -> Run | None:
    """`execute` as a numbered chunk of a `checkpoint.Run`, which keeps it; None for one of another shard."""

    def make() -> dict[str, object]:
        run = execute(source, out, parameters)
        if run.error:
            raise Failed(run)
        return asdict(run) | {"notebook": out.read_text(encoding="utf-8")}

    try:
        done = kept.chunk(number, make)
    except Failed as failed:
        return failed.args[0]
    if done is None:
        return None
    write(nbformat.reads(done.pop("notebook"), as_version=4), out)
    return Run(**done)


def begun(folder: Path, chosen: list[Path], parameters: dict[str, object], shard: str) -> Any:
    """A `checkpoint.Run` of these notebooks; ValueError if the folder holds one that would show others."""
    from steer_utils import checkpoint  # with torch, which other runs do not wait for

    package = b"".join(path.read_bytes() for path in sorted((ROOT / "steer_utils").rglob("*.py")))
    code = {path.name: path.read_bytes() for path in chosen} | {"steer_utils": package}
    hashes = {name: hashlib.sha256(content).hexdigest() for name, content in code.items()}
    return checkpoint.Run(folder, hashes | {"parameters": parameters}, shard)


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
    """Remove what differs from run to run or between machines: times, paths, versions, widgets' state."""
    for key in ("papermill", "widgets"):
        notebook.metadata.pop(key, None)
    notebook.metadata.get("language_info", {}).pop("version", None)
    for cell in notebook.cells:
        for key in ("papermill", "execution"):
            cell.metadata.pop(key, None)
    return notebook


def renew(source: Path, out: Path, run: Run) -> None:
    """Put an executed notebook and its figures in place; its first cell says how long it took."""
    from steer_utils.checkpoint import write_atomically  # with torch, which other runs do not wait for

    notebook = nbformat.read(out, as_version=4)
    halves = math.ceil(run.seconds / 30) / 2
    took = f"{halves:g} {'minute' if halves == 1 else 'minutes'} and {math.ceil(run.memory)} GB"
    head = notebook.cells[0]
    head.source = re.sub(r"(?<=\(fast profile\): ).*?(?= on two CPU cores)", took, head.source)
    known = minutes() | {source.stem: {"seconds": round(run.seconds), "GB": round(run.memory, 1)}}
    for figure in sorted(Path(os.environ["STEER_UTILS_FIGURES"]).glob(f"{source.stem[:2]}_*")):
        write_atomically(ROOT / "figures" / figure.name, figure.read_bytes())
    write_atomically(source, f"{nbformat.writes(notebook).rstrip()}\n")
    text = json.dumps(dict(sorted(known.items())), indent=1)
    write_atomically(ROOT / "figures" / MINUTES, f"{text}\n")


def minutes() -> dict[str, dict[str, float]]:
    """What `renew` has recorded, by notebook."""
    path = ROOT / "figures" / MINUTES
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def require_known(source: Path, parameters: dict[str, object]) -> None:
    """ValueError for a parameter that the notebook does not have; papermill would run it without."""
    known = papermill.inspect_notebook(source)
    if unknown := [name for name in parameters if name not in known]:
        near = difflib.get_close_matches(unknown[0], known, n=1) or known
        raise ValueError(f"{source.name} has no parameter {unknown[0]!r}: did you mean {' or '.join(near)}?")


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
    parser.add_argument("--jobs", type=int, help="how many run side by side; by default one a processor")
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--answers", action="store_true", help="with the exercises answered")
    how.add_argument("--in-place", action="store_true", help="renew the notebooks' own outputs and figures/")
    how.add_argument("--shard", metavar="I/N", help="each N-th that is not done yet, from number I")
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
    os.environ |= {"TQDM_DISABLE": "1", "STEER_UTILS_STATIC": "1"}  # no bars, and sliders as stored frames
    figures = given.build.resolve() / ("renewed" if given.in_place else "figures")
    if given.in_place:
        shutil.rmtree(figures, ignore_errors=True)
    os.environ["STEER_UTILS_FIGURES"] = str(figures)

    parameters = {name: yaml.safe_load(value) for name, value in given.parameter}
    by_memory = psutil.virtual_memory().available // GB_EACH // 10**9
    jobs = given.jobs or (1 if parameters else max(1, min(os.cpu_count() or 1, by_memory, len(chosen))))
    job = dict.fromkeys(chosen, partial(execute, answers=given.answers))
    if given.shard:
        try:
            kept = begun(given.build / "run", chosen, parameters, given.shard)
        except ValueError as error:
            parser.error(str(error))
        job = {source: partial(execute_once, kept, number) for number, source in enumerate(chosen)}
    if jobs > 1:  # the longest first, so that the jobs end together
        known = minutes()
        chosen.sort(key=lambda path: known.get(path.stem, {}).get("seconds", math.inf), reverse=True)
    pairs = [(source, given.build / source.name) for source in chosen]
    each = (delayed(job[source])(source, out, parameters) for source, out in pairs)
    start, table, failed = time.perf_counter(), Table("notebook", "seconds", "peak memory", "result"), 0
    runs = Parallel(n_jobs=jobs, return_as="generator")(each)
    for (source, out), run in zip(pairs, runs, strict=True):
        if run is None:
            continue
        ended = "failed" if run.error else "ok"
        table.add_row(source.stem, f"{run.seconds:.0f}", f"{run.memory:.1f} GB", ended)
        if run.error:
            failed += 1
            print(f"{source.stem}: {run.error}", file=sys.stderr)
        elif given.in_place:
            renew(source, out, run)
    Console().print(table)
    print(f"{time.perf_counter() - start:.0f} seconds in all. Pages: {given.build}/*.html")
    return failed


if __name__ == "__main__":
    sys.exit(main())
