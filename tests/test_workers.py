"""Shards and workers: whoever makes the chunks, the same bytes come out, and nothing done is lost."""

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import joblib
import pytest
from conftest import CONFIGS, new_model
from transformers import PreTrainedModel

import steer_utils as su
from steer_utils.measure.evaluate import generate_file

SUBJECTS = ("The cat", "A man", "Once", "I", "She", "No one", "It", "The dog", "He", "They")
PROMPTS = [f"{one} said that" for one in SUBJECTS] * 3
PAIR = su.get_x_vector("Love", "Hatred", coeff=1.5, act_name=1)
SHORT = {"num_samples": 2, "max_new_tokens": 3, "seed": 1}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory, tokenizer) -> tuple[PreTrainedModel, Path]:
    """A tiny model that workers can load by its folder."""
    folder = tmp_path_factory.mktemp("model")
    new_model(CONFIGS["llama"]()).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return su.load(folder, device="cpu")[0], folder


def swept(model: PreTrainedModel, tokenizer, folder: Path, **how) -> bytes:
    given = {"act_names": [0, 1, 2], "coeffs": [1.0, -2.0], "batch_size": 7, "folder": folder} | SHORT
    table = su.sweep(model, tokenizer, PROMPTS, PAIR, **given, **how)
    return table.to_csv(index=False).encode()


def generated(model: PreTrainedModel, tokenizer, folder: Path, **how) -> bytes:
    path = folder / "out.jsonl"
    generate_file(model, tokenizer, PROMPTS, path, steer=PAIR, batch_size=2, **SHORT, **how)
    return path.read_bytes() if path.exists() else b""


JOBS = {"sweep": swept, "generate_file": generated}


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(params=JOBS)
def job(request: pytest.FixtureRequest, saved, tokenizer) -> Callable[..., bytes]:
    """One of JOBS: a function of the folder."""
    return partial(JOBS[request.param], saved[0], tokenizer)


def test_two_workers_and_two_shards_leave_what_one_call_leaves(job, tmp_path):
    whole = job(tmp_path / "one")
    assert job(tmp_path / "two", workers=2) == whole
    parts = [job(tmp_path / "shards", shard=f"{i}/3") for i in (2, 0, 1)]
    assert parts[2] == whole
    assert whole not in parts[:2]
    assert files(tmp_path / "one") == files(tmp_path / "two") == files(tmp_path / "shards")


class Deadly:
    """A steer that does nothing, and once kills the process in which it acts for the fourth time."""

    def __init__(self, mark: Path) -> None:
        self.mark, self.acts = mark, 0

    def __repr__(self) -> str:
        return "Deadly()"

    @contextmanager
    def on(self, model: PreTrainedModel, tokenizer=None) -> Iterator[None]:
        self.acts += 1  # in the caller, in the worker before its first chunk, in that chunk
        if self.acts == 4 and not self.mark.exists():
            self.mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        yield


def test_a_worker_that_dies_is_reported_and_the_next_call_makes_only_what_is_missing(
    saved, tokenizer, tmp_path
):
    deadly, path = Deadly(tmp_path / "mark"), tmp_path / "out.jsonl"
    given = SHORT | {"steer": deadly, "batch_size": 16, "workers": 2}
    with pytest.raises(RuntimeError, match=r"a worker died.*; \d of 4 chunks are in '.*run': call again"):
        generate_file(saved[0], tokenizer, PROMPTS, path, **given)
    done = files(tmp_path / "out.jsonl.run")
    assert 0 < len([name for name in done if "chunk" in name]) < 4
    generate_file(saved[0], tokenizer, PROMPTS, path, **given)
    assert done.items() <= files(tmp_path / "out.jsonl.run").items()
    unsteered = generate_file(saved[0], tokenizer, PROMPTS, tmp_path / "plain.jsonl", batch_size=16, **SHORT)
    assert path.read_bytes() == unsteered.read_bytes()


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"shard": "2/2", "folder": "f"}, "shard must be I/N with I from 0 to N − 1, such as 0/4, not '2/2'"),
        ({"shard": "half", "folder": "f"}, "such as 0/4, not 'half'"),
        ({"shard": "0/2"}, "shard='0/2' leaves its chunks in files: give a folder"),
        ({"workers": 2}, "workers=2 leave what they make in files: give a folder"),
        ({"workers": 0}, "workers must be at least 1, not 0"),
    ],
    ids=("beyond", "text", "folder", "workers", "none"),
)
def test_what_cannot_be_shared_is_refused_and_leaves_nothing(saved, tokenizer, tmp_path, how, message):
    how |= {"folder": tmp_path / "f"} if "folder" in how else {}
    with pytest.raises(ValueError, match=message):
        su.sweep(saved[0], tokenizer, PROMPTS, PAIR, act_names=[1], coeffs=[1.0], **how)
    assert not files(tmp_path)


def test_a_model_that_was_changed_after_loading_is_refused(tokenizer, saved, tmp_path):
    model, _ = su.load(saved[1], device="cpu")
    model.lm_head.weight.mul_(1.1)
    with pytest.raises(ValueError, match="workers load 'model0', which is not the model given: save it with"):
        swept(model, tokenizer, tmp_path, workers=2)
    assert not files(tmp_path)


# --- other engines ----------------------------------------------------------------------------------------


def test_ray_runs_the_workers_where_the_caller_says_so(saved, tokenizer, tmp_path):
    ray = pytest.importorskip("ray")
    from ray.util.joblib import register_ray

    register_ray()
    ray.init(num_cpus=2, include_dashboard=False, logging_level="error")
    try:
        with joblib.parallel_config("ray"):
            found = swept(saved[0], tokenizer, tmp_path / "ray", workers=2)
    finally:
        ray.shutdown()
    assert found == swept(saved[0], tokenizer, tmp_path / "one")


def shard_of(folder: Path, model: Path, shard: str) -> bytes:
    """What a task of a job array does."""
    return swept(*su.load(model, device="cpu"), folder, shard=shard)


def test_a_job_array_of_submitit_makes_one_table(saved, tokenizer, tmp_path, monkeypatch):
    submitit = pytest.importorskip("submitit")
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))  # where its processes find `shard_of`
    executor = submitit.AutoExecutor(folder=tmp_path / "logs", cluster="local")
    executor.update_parameters(timeout_min=2)
    jobs = executor.map_array(partial(shard_of, tmp_path / "array", saved[1]), ["0/2", "1/2"])
    for one in jobs:
        one.result()
    assert swept(saved[0], tokenizer, tmp_path / "array") == swept(saved[0], tokenizer, tmp_path / "one")
    assert files(tmp_path / "array") == files(tmp_path / "one")
