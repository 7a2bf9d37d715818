"""Several processes for one run: each makes the chunks of its shard, with a model of its own.

joblib starts the processes, so the caller's `joblib.parallel_config("ray")`, say, decides where they run.
"""

import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import Any

import torch
from joblib import Parallel, delayed

from . import hf
from .checkpoint import Run, fingerprint
from .generation import progress
from .models import Model, load, model_id
from .types import require


def spread(job: Callable[..., Any], model: Model, run: Run, workers: int, chunks: int) -> None:
    """Call `job(model, shard="I/N")` in N processes, until all chunks of the run are in its folder.

    With one worker it does nothing, since the caller makes the chunks itself. Each process loads the model by
    its name or folder, on the accelerator of number I where there are several. ValueError for no worker,
    without a folder, or if that model is another one; RuntimeError if a process dies. What is done is kept.
    """
    require(workers >= 1, "at least 1", workers=workers)
    if workers == 1:
        return
    if run.folder is None:
        raise ValueError(f"workers={workers} leave what they make in files: give a folder")
    name, mark = hf.inner(model).name_or_path, fingerprint(model)
    shards = [f"{i}/{workers}" for i in range(workers)]
    try:
        with _watched(run, chunks):
            Parallel(n_jobs=workers)(delayed(_work)(job, name, model.dtype, mark, shard) for shard in shards)
    except BrokenProcessPool as error:
        kept = f"{run.done()} of {chunks} chunks are in {str(run.folder)!r}"
        raise RuntimeError(f"a worker died, out of memory perhaps; {kept}: call again to go on") from error


def _work(job: Callable[..., Any], name: str, dtype: torch.dtype, mark: str, shard: str) -> None:
    os.environ["TQDM_DISABLE"] = "1"  # the caller has a bar
    gpu = torch.accelerator.current_accelerator(check_available=True)
    number = int(shard.split("/")[0]) % max(1, torch.accelerator.device_count())
    model, _ = load(name, dtype=dtype, device=torch.device(gpu.type, number) if gpu else None)
    if fingerprint(model) != mark:
        advice = "save it with save_pretrained and load it from there, or leave workers away"
        raise ValueError(f"workers load {model_id(model)!r}, which is not the model given: {advice}")
    job(model, shard=shard)


@contextmanager
def _watched(run: Run, chunks: int) -> Iterator[None]:
    """While inside, a progress bar counts the chunks in the run's folder."""
    ended = threading.Event()

    def watch() -> None:
        with progress(chunks, "chunk") as bar:
            while not ended.wait(0.5):
                bar.update(run.done() - bar.n)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield
    finally:
        ended.set()
        watcher.join()
