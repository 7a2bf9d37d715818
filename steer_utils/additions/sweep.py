"""Try additions at many hooks and strengths in one table, for little more than the cost of decoding it.

The additions' texts are run once for all hooks, since a coefficient only multiplies what they gave. The
prompts are read once by the plain model; each cell (a hook, a coefficient) takes that pass up at the block
where it steers. Cells are decoded side by side, each row of a large batch with its own hook and strength.
"""

import copy
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import groupby, product
from operator import attrgetter, itemgetter
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from transformers import BatchEncoding, Cache, PreTrainedModel, PreTrainedTokenizerBase

from .. import hf
from ..generation import (
    can_share,
    chunks,
    continue_batch,
    prefill,
    progress,
    random_streams,
    require_settings,
)
from ..models import encode, model_id, own_tokenizer, token_ids
from .addition import ActivationAddition, steering_vectors
from .vector import SteeringVector, hook_name

Vectors = Mapping[str, Sequence[SteeringVector]]


class Cell(NamedTuple):
    """One hook and one coefficient of a sweep."""

    act_name: str
    coeff: float


class Row(NamedTuple):
    """One line of the table; `number` counts the prompts."""

    act_name: str
    coeff: float
    number: int
    prompt: str
    sample: int
    completion: str
    loss: float


@torch.no_grad()
def sweep(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    prompts: str | Sequence[str],
    additions: Iterable[ActivationAddition],
    *,
    act_names: Iterable[str | int],
    coeffs: Iterable[float],
    num_samples: int = 1,
    max_new_tokens: int = 40,
    seed: int = 0,
    batch_size: int = 64,
    path: str | Path | None = None,
    **sampling: Any,
) -> pd.DataFrame:
    """Continue each prompt under the additions, moved to each hook and multiplied by each coefficient.

    The other settings are those of `generate`, and a cell's completions are what it gives with that seed.
    path: a file (JSON lines) that keeps finished batches; a sweep that was stopped goes on after the last.
    batch_size: completions computed at a time, at least those of one prompt in one cell.

    Returns a DataFrame with columns act_name, coeff, prompt, sample, completion, loss, ordered by hook,
    coefficient, prompt. Raises ValueError as `generate` does, for an empty sweep, for settings that allow no
    shared cache, and if the file belongs to another sweep.
    """
    tokenizer, model = own_tokenizer(model, tokenizer), hf.unwrapped(model)
    prompts = [prompts] if isinstance(prompts, str) else list(prompts)
    additions, names = list(additions), list(dict.fromkeys(map(hook_name, act_names)))
    cells = [Cell(*cell) for cell in product(names, dict.fromkeys(map(float, coeffs)))]
    sampling |= {"max_new_tokens": max_new_tokens}
    require_settings(prompts, seed, sampling, num_samples=num_samples, batch_size=batch_size)
    if bad := [cell.coeff for cell in cells if not math.isfinite(cell.coeff)]:
        raise ValueError(f"coefficients must be finite numbers, not {bad[0]!r}")
    if not cells or not additions:
        raise ValueError(f"nothing to try: {len(additions)} additions, {len(cells)} hooks × coefficients")
    if not can_share(model, sampling):
        raise ValueError("a sweep shares cached passes: leave out use_cache, cache_implementation, num_beams")
    job = _Job(model, tokenizer, prompts, cells, num_samples, seed, batch_size, sampling)
    log = _Log(path, {"model": model_id(model), "additions": list(map(asdict, additions))} | job.settings())
    vectors = _vectors(model, tokenizer, additions, names)
    with progress(len(cells) * len(prompts) * num_samples) as bar:
        bar.update(len(log.rows))
        for chosen, batches in groupby(job.plan()[log.batches :], key=itemgetter(0)):
            prompts_read = job.read(chosen)
            for _, group in batches:
                log.add(rows := job.run(prompts_read, vectors, group))
                bar.update(len(rows))
    return _table(log.rows, cells, prompts)


def _vectors(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    additions: Sequence[ActivationAddition],
    names: Sequence[str],
) -> dict[str, list[SteeringVector]]:
    """What to add at each hook at coefficient 1; every text is run once."""
    moved = [replace(addition, act_name=name) for name in names for addition in additions]
    vectors: dict[str, list[SteeringVector]] = {name: [] for name in names}
    for vector in steering_vectors(model, tokenizer, moved):
        vectors[vector.act_name].append(vector)
    return vectors


def _table(rows: Sequence[Row], cells: Sequence[Cell], prompts: Sequence[str]) -> pd.DataFrame:
    """The rows as a table, in the order of the cells, prompts and samples."""
    table = pd.DataFrame(rows, columns=Row._fields)
    at = {cell: i for i, cell in enumerate(cells)}
    keys = [(at[Cell(*row[:2])], row.number, row.sample) for row in rows]
    return (
        table.iloc[sorted(range(len(keys)), key=keys.__getitem__)]
        .drop(columns="number")
        .reset_index(drop=True)
    )


# --- the work ---------------------------------------------------------------------------------------------


class _Read(NamedTuple):
    """Some prompts, left-padded, [P, T] each, and the plain pass over all but their last tokens."""

    numbers: tuple[int, ...]
    inputs: BatchEncoding
    reading: hf.Reading | None


@dataclass(frozen=True)
class _Job:
    """What is to be written, cut into batches."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    prompts: Sequence[str]
    cells: Sequence[Cell]
    num_samples: int
    seed: int
    batch_size: int
    sampling: Mapping[str, Any]

    def settings(self) -> dict[str, Any]:
        """What decides the table and its batches, for the file."""
        names = ("prompts", "cells", "num_samples", "seed", "batch_size")
        return {name: getattr(self, name) for name in names} | self.sampling

    def plan(self) -> list[tuple[tuple[int, ...], Sequence[Cell]]]:
        """Batches, each some prompts (by number, of near-equal length) under some cells."""
        lengths = [len(token_ids(self.tokenizer, prompt)) for prompt in self.prompts]
        by_length = sorted(range(len(lengths)), key=lengths.__getitem__)
        batches = []
        for chosen in chunks(by_length, max(1, self.batch_size // self.num_samples)):
            at_a_time = max(1, self.batch_size // (len(chosen) * self.num_samples))
            batches += [(tuple(chosen), group) for group in chunks(self.cells, at_a_time)]
        return batches

    def read(self, numbers: tuple[int, ...]) -> _Read:
        """Read some of the prompts with the plain model."""
        batch = encode(self.tokenizer, [self.prompts[i] for i in numbers], device=self.model.device)
        ids, mask = batch["input_ids"][:, :-1], batch["attention_mask"][:, :-1]
        return _Read(numbers, batch, hf.read(self.model, ids, mask) if ids.shape[1] else None)

    def run(self, prompts: _Read, vectors: Vectors, cells: Sequence[Cell]) -> list[Row]:
        """The completions of some prompts under some cells, decoded in one batch."""
        parts = [
            self._prefill(prompts, name, vectors[name], [cell.coeff for cell in group])
            for name, group in groupby(cells, key=attrgetter("act_name"))
        ]
        batch = {key: torch.cat([part.inputs[key] for part in parts]) for key in prompts.inputs}
        cache = hf.joined([part.cache for part in parts]) if prompts.reading else None
        rows = [(part.act_name, coeff, i) for part in parts for i, coeff in part.rows]
        with ExitStack() as stack:
            for part in parts:
                scale = torch.tensor([coeff if name == part.act_name else 0.0 for name, coeff, _ in rows])
                scale = scale.repeat_interleave(self.num_samples)
                stack.enter_context(_all_on(self.model, vectors[part.act_name], scale))
            streams = self._streams(i for *_, i in rows)
            found = continue_batch(self.model, self.tokenizer, batch, cache, streams, **self.sampling)
        written = chunks(found, self.num_samples)
        return [
            Row(name, coeff, i, self.prompts[i], sample, *completion)
            for (name, coeff, i), samples in zip(rows, written, strict=True)
            for sample, completion in enumerate(samples)
        ]

    def _prefill(
        self, prompts: _Read, act_name: str, vectors: Sequence[SteeringVector], coeffs: Sequence[float]
    ) -> "_Part":
        """The prompts under each of the coefficients at one hook, all but their last tokens in the cache."""
        inputs = BatchEncoding(
            {key: one.repeat_interleave(len(coeffs), 0) for key, one in prompts.inputs.items()}
        )
        rows, cache = list(product(prompts.numbers, coeffs)), None
        if prompts.reading is not None:
            layer, scale = hf.place(act_name).layer, torch.tensor([coeff for _, coeff in rows])
            with (
                hf.batch(prompt_lengths=inputs["attention_mask"].sum(dim=1)),
                _all_on(self.model, vectors, scale),
                hf.resumed(self.model, prompts.reading, layer, len(coeffs)),
            ):
                cache = prefill(self.model, inputs)
        return _Part(act_name, rows, inputs, cache)

    def _streams(self, numbers: Iterable[int]) -> list[np.random.Generator]:
        """Random numbers for the samples of some prompts, the same whenever asked for."""
        streams = random_streams(self.prompts, self.num_samples, self.seed)
        return [copy.deepcopy(streams[i, sample]) for i in numbers for sample in range(self.num_samples)]


class _Part(NamedTuple):
    """The rows of a batch that are steered at one hook: prompt numbers and coefficients, ids, cache."""

    act_name: str
    rows: list[tuple[int, float]]
    inputs: BatchEncoding
    cache: Cache | None


@contextmanager
def _all_on(model: PreTrainedModel, vectors: Sequence[SteeringVector], scale: Tensor) -> Iterator[None]:
    with ExitStack() as stack:
        for vector in vectors:
            stack.enter_context(vector.on(model, scale=scale))
        yield


# --- the file ---------------------------------------------------------------------------------------------


class _Log:
    """Finished batches, in memory and, if there is a path, as lines of JSON: first the settings."""

    def __init__(self, path: str | Path | None, settings: Mapping[str, Any]) -> None:
        self.path = None if path is None else Path(path)
        self.rows: list[Row] = []
        self.batches = 0
        head = json.dumps(settings, default=lambda value: type(value).__name__) + "\n"
        if self.path is None:
            return
        if not self.path.exists() or self.path.stat().st_size == 0:
            self._replace([head])
        first, *lines = self.path.read_text(encoding="utf-8").splitlines(keepends=True)
        if first != head:
            raise ValueError(
                f"{str(path)!r} holds a sweep with other settings: give another path, or delete the file"
            )
        whole = [line for line in lines if line.endswith("\n")]  # the last may have been cut off
        if whole != lines:
            self._replace([first, *whole])
        self.batches = len(whole)
        self.rows = [Row(*row) for line in whole for row in json.loads(line)]

    def add(self, rows: Sequence[Row]) -> None:
        """Keep a batch."""
        self.rows += rows
        if self.path is not None:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(rows) + "\n")

    def _replace(self, lines: Iterable[str]) -> None:
        scratch = self.path.with_name(f".{self.path.name}.tmp")
        scratch.write_text("".join(lines), encoding="utf-8")
        scratch.replace(self.path)
