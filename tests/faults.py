"""Kill jobs and damage files, and count what comes of it: python tests/faults.py [N] [--keep], N = 200.

N kills are spread over the jobs below. Each strikes a child process at a random moment or at a new file; the
job is then called again, until it ends, and must leave what an undisturbed one leaves. N files of finished
jobs are damaged, and the job is called again. Verdicts: "right" where the result is the same, perhaps because
a piece was made again; "clear" for an error that names the file or its folder; "wrong" for anything else. Two
processes in one folder must both end well. Wrong ones are printed; then the status is 1. With --keep, the
counts go to figures/reliability.json, and from there to the README.
"""

import contextlib
import hashlib
import importlib.util
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import nbformat
import torch
from conftest import GOLDEN_MODELS, head_steer, keep_reliability, tiny
from test_models import use_small_embedded_model
from tqdm.auto import tqdm
from transformers import AutoTokenizer
from transformers.utils.logging import disable_progress_bar

import steer_utils as su
from steer_utils import embedded
from steer_utils.measure.evaluate import evaluate_file, generate_file
from steer_utils.measure.judges import Judge

MODEL, TOKENIZER = tiny("llama"), AutoTokenizer.from_pretrained(GOLDEN_MODELS / "T1")
PROMPTS = ["The cat said", "A dog barked", "Once upon a time", "I said that", "The cat said", "No, she said"]
PAIR = su.get_x_vector("Love", "Hatred", coeff=1.5, act_name=1)
NOISE = random.Random(1)
TEXTS = ["".join(NOISE.choices("abcdefgh ", k=NOISE.randrange(5, 40))) for _ in range(150)]
LENGTH = Judge("length", None, lambda texts: [min(1.0, len(text) / 40) for text in texts])
RUN = Path(__file__).parents[1] / "notebooks" / "run.py"
LEFTOVER = (".tmp", ".lock")  # endings of what a killed process may leave beside the files


# --- the jobs: from a folder to the bytes of their results ------------------------------------------------


def sweep(folder: Path) -> bytes:
    grid = {"act_names": [0, 1, 2], "coeffs": [1.0, -2.0], "num_samples": 2, "batch_size": 6}
    table = su.sweep(MODEL, TOKENIZER, PROMPTS, PAIR, folder=folder, max_new_tokens=8, **grid)
    return table.to_csv().encode()


def generations(folder: Path) -> bytes:
    how = {"steer": PAIR, "num_samples": 3, "batch_size": 6, "max_new_tokens": 12}
    return generate_file(MODEL, TOKENIZER, PROMPTS, folder / "out.jsonl", **how).read_bytes()


def evaluation(folder: Path) -> bytes:
    if not (folder / "out.jsonl").exists():
        generations(folder)
    return repr(evaluate_file(folder / "out.jsonl", LENGTH, MODEL, TOKENIZER)).encode()


def training(folder: Path) -> bytes:
    labels, how = [(-1) ** len(text) for text in TEXTS], {"n_steps": 30, "batch_tokens": 64, "rank": 4}
    steer = su.train_lm_steer(MODEL, TOKENIZER, TEXTS, labels, folder=folder, **how)
    return bytes_of(steer.tensors()) + repr(steer.card).encode()


def head(folder: Path) -> bytes:
    labels = [len(text) % 2 for text in TEXTS]
    found = su.train_classifier_head(MODEL, TOKENIZER, TEXTS, labels, folder=folder)
    return bytes_of(found.state_dict()) + repr(found.metadata).encode()


def bytes_of(tensors: dict[str, torch.Tensor]) -> bytes:
    return b"".join(tensor.numpy().tobytes() for tensor in tensors.values())


STEERS = [head_steer(seed=seed, card={"lr": 0.1 + seed}).at([1.5, seed]) for seed in (0, 1)]


def saved(folder: Path) -> bytes:
    """What is read; a steer is saved first if there is none. While it is being killed, two take turns."""
    if not (folder / "lm_steer.json").exists():
        STEERS[0].save_pretrained(folder)
    found = su.LMSteer.from_pretrained(folder)
    return bytes_of(found.tensors()) + repr((found.card, found.names, found.steer_values)).encode()


def turns(folder: Path) -> bytes:
    for i in range(100):
        STEERS[i % 2].save_pretrained(folder)
    return saved(folder)


def unpacked(folder: Path) -> bytes:
    os.environ["STEER_UTILS_CACHE"] = str(folder / "cache")
    found = {path.name: path.read_bytes() for path in embedded.unpacked(embedded.DEFAULT).iterdir()}
    return b"".join(hashlib.sha256(found[name]).digest() for name in sorted({*found} - {embedded.CHECKED}))


def old_notebook(folder: Path) -> None:
    """A notebook that was executed, with two figures, in build/; and an older one, with its own, in place."""
    for home, text, figures in (
        (folder / "notebooks", "old", "figures"),
        (folder / "build", "new", "renewed"),
    ):
        pictures = (folder if text == "old" else home) / figures
        for place in (home, pictures):
            place.mkdir(parents=True)
        cells = [nbformat.v4.new_markdown_cell(f"{text} " * 20_000, id="0")]
        (home / "07_x.ipynb").write_text(nbformat.writes(nbformat.v4.new_notebook(cells=cells)))
        for name in ("07_a.png", "07_b.json"):
            (pictures / name).write_text(text * 100_000)


def renewed(folder: Path) -> bytes:
    """What `renew` of run.py leaves."""
    runner, source = notebook_runner(), folder / "notebooks" / "07_x.ipynb"
    runner.ROOT = folder
    os.environ["STEER_UTILS_FIGURES"] = str(folder / "build" / "renewed")
    runner.renew(source, folder / "build" / "07_x.ipynb", runner.Run(1.0, 1.0, ""))
    return in_place(folder)


def in_place(folder: Path) -> bytes:
    return b"".join(path.read_bytes() for path in sorted(files(folder)) if path.parent.name in KEPT)


KEPT = ("notebooks", "figures")
DRAW = """import os, pathlib
figures = pathlib.Path(os.environ["STEER_UTILS_FIGURES"])
figures.mkdir(exist_ok=True)
for name in ("07_a.png", "07_b.json"):
    (figures / name).write_text("new" * 100_000)
print("new")"""


def old_repository(folder: Path) -> None:
    """As `old_notebook`, but with run.py, and nothing has been executed."""
    old_notebook(folder)
    shutil.rmtree(folder / "build")
    for name in ("run.py", "pages.py"):
        shutil.copy(RUN.with_name(name), folder / "notebooks")
    cells = [nbformat.v4.new_markdown_cell("old", id="0"), nbformat.v4.new_code_cell(DRAW, id="1")]
    path = folder / "notebooks" / "07_x.ipynb"
    path.write_text(nbformat.writes(nbformat.v4.new_notebook(cells=cells)))


def runner(folder: Path) -> bytes:
    """What run.py leaves, the minutes aside."""
    command = [sys.executable, str(folder / "notebooks" / "run.py"), "--in-place"]
    subprocess.run(command, check=True, capture_output=True, cwd=folder)
    (folder / "figures" / "minutes.json").unlink()
    return in_place(folder)


@contextlib.contextmanager
def in_path(folder: Path) -> Iterator[None]:
    sys.path.insert(0, str(folder))
    yield
    sys.path.remove(str(folder))


RUNNER: list[ModuleType] = []


def notebook_runner() -> ModuleType:
    """run.py as a module, imported once."""
    if not RUNNER:
        spec = importlib.util.spec_from_file_location("runner", RUN)
        RUNNER.append(importlib.util.module_from_spec(spec))
        sys.modules["runner"] = RUNNER[0]
        with in_path(RUN.parent):
            spec.loader.exec_module(RUNNER[0])
    return RUNNER[0]


def is_old_or_new(folder: Path) -> bool:
    """Whether the notebook, both its figures and the minutes can be read, each as it was or renewed."""
    pictures = {(folder / "figures" / name).read_text() for name in ("07_a.png", "07_b.json")}
    text = nbformat.read(folder / "notebooks" / "07_x.ipynb", as_version=4).cells[0].source
    minutes = folder / "figures" / "minutes.json"
    readable = not minutes.exists() or json.loads(minutes.read_text())
    return bool(readable) and pictures <= {"old" * 100_000, "new" * 100_000} and len({*text.split()}) == 1


def is_one_of_both(folder: Path) -> bool:
    """Whether a steer can be read where two take turns, if there is one."""
    if not (folder / "lm_steer.json").exists():
        return True
    with quiet():
        found = su.LMSteer.from_pretrained(folder)
    return any(bytes_of(found.tensors()) == bytes_of(one.tensors()) for one in STEERS)


@dataclass(frozen=True)
class Job:
    """What is killed and called again, its share of the kills, and what must hold after each of them."""

    run: Callable[[Path], bytes]
    share: float
    holds: Callable[[Path], bool] = lambda folder: True
    before: Callable[[Path], None] = lambda folder: None  # makes what the job begins with
    again: Callable[[Path], bytes] | None = None  # what is called after damage, if not `run`
    shared: bool = True  # whether two may do it in one folder at once

    def new(self, folder: Path) -> Path:
        folder.mkdir(parents=True)
        self.before(folder)
        return folder


JOBS = {
    "sweep": Job(sweep, 0.2),
    "generations": Job(generations, 0.15),
    "evaluation": Job(evaluation, 0.1),
    "training": Job(training, 0.2),
    "head": Job(head, 0.1),
    "saved": Job(turns, 0.1, is_one_of_both, again=saved),
    "unpacked": Job(unpacked, 0.05),
    # The rest works on files that it is given.
    "renewed": Job(renewed, 0.09, is_old_or_new, old_notebook),
    "runner": Job(runner, 0.01, is_old_or_new, old_repository, shared=False),
}
DAMAGED = 7  # so many of them keep files to go on from


# --- kills ------------------------------------------------------------------------------------------------


def started(job: Callable[[Path], bytes], folder: Path) -> int:
    """The id of a child process that does the job; its status is 0 if it ended well."""
    if child := os.fork():
        with contextlib.suppress(OSError):  # it was faster
            os.setpgid(child, child)
        return child
    os.setpgid(0, 0)  # so that what it starts can be killed with it
    status = 1
    try:
        with quiet():
            job(folder)
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """While inside, no warnings, and nothing is printed but errors."""
    with (
        warnings.catch_warnings(),
        Path(os.devnull).open("w") as nowhere,
        contextlib.redirect_stdout(nowhere),
    ):
        warnings.simplefilter("ignore")
        yield


def files(folder: Path) -> set[Path]:
    paths = (Path(place) / name for place, _, names in os.walk(folder) for name in names)
    return {path for path in paths if path.suffix not in LEFTOVER}


def killed(job: Callable[[Path], bytes], folder: Path, chance: random.Random, seconds: float) -> bool:
    """Kill a child at a random moment, or soon after a new file; False if it ended by itself."""
    before, child = files(folder), started(job, folder)
    at_file, end = chance.random() < 0.5, time.monotonic() + chance.random() * seconds
    while True:
        found, status = os.waitpid(child, os.WNOHANG)
        if found:
            assert status == 0, f"{job.__name__} failed by itself"
            return False
        if time.monotonic() > end or (at_file and files(folder) != before):
            os.killpg(child, signal.SIGKILL)
            return os.WIFSIGNALED(os.waitpid(child, 0)[1])
        time.sleep(0.001)


def kills(job: Job, count: int, scratch: Path, chance: random.Random) -> int:
    """Kill a job so many times; the number of wrong results."""
    start = time.monotonic()
    expected, done, wrong = result(job.run, job.new(scratch / "whole")), 0, 0
    seconds, tries = time.monotonic() - start, 0
    while done < count:
        folder, tries, here = job.new(scratch / f"killed{tries}"), tries + 1, 0
        while done < count and here < 8:
            if not killed(job.run, folder, chance, seconds):
                seconds *= 0.8  # the first run took longer than others do
                break
            done, here = done + 1, here + 1
            wrong += not job.holds(folder)
        wrong += result(job.run, folder) != expected
        if tries > 3 * count + 20:
            raise RuntimeError(f"{job.run.__name__} ends before it can be killed")
    return wrong


def result(run: Callable[[Path], bytes], folder: Path) -> bytes:
    with quiet():
        return run(folder)


# --- two at once ------------------------------------------------------------------------------------------


def pairs(job: Job, scratch: Path) -> int:
    """Let two processes do a job in one folder at once; the number of wrong results."""
    folder = job.new(scratch / "pair")
    children = [started(job.run, folder) for _ in range(2)]
    wrong = 0
    while children:
        wrong += not job.holds(folder)
        found, status = os.waitpid(-1, os.WNOHANG)
        if found in children:
            children.remove(found)
            wrong += status != 0
    return wrong + (result(job.run, folder) != result(job.run, scratch / "whole"))


# --- damage -----------------------------------------------------------------------------------------------


def flipped(content: bytes, other: bytes, chance: random.Random) -> bytes:
    place = chance.randrange(len(content))
    return content[:place] + bytes([content[place] ^ 1 << chance.randrange(8)]) + content[place + 1 :]


def zeroed(content: bytes, other: bytes, chance: random.Random) -> bytes:
    size = min(4096, len(content) // 2 + 1)
    place = chance.randrange(len(content) // size + 1) * size
    return (content[:place] + bytes(size) + content[place + size :])[: len(content)]


def cut(content: bytes, other: bytes, chance: random.Random) -> bytes:
    return content[: chance.randrange(len(content))]


def swapped(content: bytes, other: bytes, chance: random.Random) -> bytes:
    return other


def line_twice(content: bytes, other: bytes, chance: random.Random) -> bytes:
    lines = content.splitlines(keepends=True)
    place = chance.randrange(len(lines))
    return b"".join([*lines[: place + 1], *lines[place:]])


def line_missing(content: bytes, other: bytes, chance: random.Random) -> bytes:
    lines = content.splitlines(keepends=True)
    del lines[chance.randrange(len(lines))]
    return b"".join(lines)


def edited(content: bytes, other: bytes, chance: random.Random) -> bytes:
    """One value of a JSON file, or of a line of several, is another one of its kind."""
    lines = content.decode().splitlines() if b'"prompt"' in content[:20] else [content.decode()]
    place = chance.randrange(len(lines))
    value = json.loads(lines[place])
    holders = [(value, key) for key in value]
    for holder, key in holders:
        inner = holder[key]
        more = inner if isinstance(inner, dict) else range(len(inner)) if isinstance(inner, list) else ()
        holders += [(inner, one) for one in more]
    holder, key = chance.choice([one for one in holders if not isinstance(one[0][one[1]], dict | list)])
    old = holder[key]
    holder[key] = not old if isinstance(old, bool) else f"{old}x" if isinstance(old, str) else (old or 0) + 1
    lines[place] = json.dumps(value)
    return "\n".join(lines).encode()


BINARY, TEXT = (flipped, zeroed, cut, swapped), (flipped, zeroed, cut, swapped, line_twice, line_missing)


def damages(job: Job, count: int, scratch: Path, chance: random.Random) -> Counter:
    """Damage a file of a finished job so many times, and call the job again; the number of each verdict."""
    whole, again, verdicts = scratch / "whole", job.again or job.run, Counter()
    shutil.rmtree(whole)
    expected = result(again, job.new(whole))
    for _ in range(count):
        folder = scratch / "damaged"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(whole, folder)
        path = chance.choice(sorted(files(folder)))
        alike = sorted(one for one in files(folder) if one.suffix == path.suffix and one != path)
        kinds = (*TEXT, edited) if path.suffix in (".json", ".jsonl") else BINARY
        kind = chance.choice([one for one in kinds if alike or one is not swapped])
        content, other = path.read_bytes(), chance.choice(alike).read_bytes() if alike else b""
        path.write_bytes(kind(content, other, chance))
        verdict = verdict_of(again, folder, path, expected)
        verdicts[verdict] += 1
        if verdict == "wrong":
            print(f"{again.__name__}: {kind.__name__} {path.relative_to(folder)}")
    return verdicts


def verdict_of(run: Callable[[Path], bytes], folder: Path, path: Path, expected: bytes) -> str:
    try:
        return "right" if result(run, folder) == expected else "wrong"
    except (ValueError, OSError) as error:
        return "clear" if str(path.parent) in str(error) else "wrong"
    except Exception:
        traceback.print_exc()
        return "wrong"


# --- all --------------------------------------------------------------------------------------------------


def main(size: int) -> int:
    torch.set_num_threads(1)
    os.environ["CI"] = "1"  # no bars
    disable_progress_bar()
    tqdm.set_lock(threading.RLock())  # its own is shared with children, and stays locked if one is killed
    notebook_runner()
    start, chance, verdicts, wrong, died = time.monotonic(), random.Random(0), Counter(), 0, 0
    with tempfile.TemporaryDirectory() as folder:
        use_small_embedded_model(Path(folder) / "small", setattr)
        for number, (name, job) in enumerate(JOBS.items()):
            scratch, count = Path(folder) / name, round(size * job.share)
            if not count:
                continue
            bad = kills(job, count, scratch, chance) + (pairs(job, scratch) if job.shared else 0)
            if bad:
                print(f"{name}: {bad} wrong results after kills or side by side")
            wrong, died = wrong + bad, died + count
            if number < DAMAGED:
                verdicts += damages(job, (size + number) // DAMAGED, scratch, chance)
    counts = ", ".join(f"{number} {verdict}" for verdict, number in sorted(verdicts.items()))
    seconds = time.monotonic() - start
    print(f"{died} kills, {wrong} wrong; {sum(verdicts.values())} damaged files, {counts}; {seconds:.0f} s")
    if "--keep" in sys.argv:
        keep_reliability(kills={"all": died, "wrong": wrong}, damages=verdicts)
    return int(bool(wrong or verdicts["wrong"]))


if __name__ == "__main__":
    sys.exit(main(next((int(one) for one in sys.argv[1:] if one.isdigit()), 200)))
