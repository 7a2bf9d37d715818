"""Sweeps: continue prompts under the same additions at many hooks and strengths.

The texts of the additions run once for all hooks, and a coefficient only scales the resulting vectors. Many
hooks and coefficients share a batch: each batch row is steered at its own hook, by its own coefficient.
"""

import copy
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from .. import generation, hf, hooks
from ..checkpoint import Run, fingerprint
from ..models import Model, Tokenizer, batch_of, own_tokenizer, prompt_texts, require_readable, text_ids
from ..types import Prompts, require
from ..workers import spread
from .addition import Additions, steering_vectors
from .vector import hook_name


@hf.no_grad
def sweep(
    model: Model,
    tokenizer: Tokenizer,
    prompts: Prompts,
    additions: Additions,
    *,
    act_names: Iterable[str | int],
    coeffs: Iterable[float],
    num_samples: int = 1,
    seed: int = 0,
    batch_size: int = 64,
    folder: str | Path | None = None,
    workers: int = 1,
    shard: str = "0/1",
    **sampling: Any,
) -> pd.DataFrame:
    """Continue each prompt under the additions, moved to each hook and multiplied by each coefficient.

    Completions are those of `generate` with the same settings. batch_size: completions computed at a time.
    folder: where finished batches are kept, so that a stopped sweep can go on; settings must be JSON values.
    workers: processes that share the batches, see `workers.spread`. shard: "I/N" for each N-th batch from
    number I only; the last of N such calls with one folder, anywhere, has the whole table.
    Returns a DataFrame with columns act_name, coeff, prompt, sample, completion, loss, ordered by hook,
    coefficient, prompt. Raises ValueError as `generate` does, and for nothing to try, a coefficient that is
    not finite, or a folder that holds another sweep.
    """
    tokenizer, model = own_tokenizer(model, tokenizer), hf.unwrapped(model)
    prompts = prompt_texts(tokenizer, prompts)
    names, coeffs = list(dict.fromkeys(map(hook_name, act_names))), list(dict.fromkeys(map(float, coeffs)))
    additions = list(additions)
    moved = [replace(addition, act_name=name) for addition in additions for name in names]
    sizes = {"num_samples": num_samples, "batch_size": batch_size, "seed": seed}
    used = generation.all_settings(model, sampling)
    generation.require_settings(prompts, **sizes, **used)
    if not moved or not coeffs:
        raise ValueError(f"nothing to try: {len(moved)} additions × hooks, {len(coeffs)} coefficients")
    require(all(map(math.isfinite, coeffs)), "finite numbers", coeffs=coeffs)
    ids = text_ids(tokenizer, prompts)
    require_readable(model, ids, used["max_new_tokens"])
    settings = {"model": fingerprint(model), "additions": list(map(asdict, moved))}
    grid = {"coeffs": coeffs, "prompts": prompts} | sizes | sampling
    run = Run(folder, settings | grid, shard)
    vectors = steering_vectors(model, tokenizer, moved)
    streams = generation.random_streams(prompts, num_samples, seed)
    rows = list(product(names, coeffs, range(len(prompts)), range(num_samples)))

    def batch(some: Sequence[tuple[str, float, int, int]]) -> dict[str, list]:
        """Complete some rows of the table together; each of them is one batch row."""
        inputs = batch_of(model, [ids[i] for _, _, i, _ in some], "left")
        own = [copy.deepcopy(streams[i, sample]) for _, _, i, sample in some]
        each = []
        for vector in vectors:
            if any(name == vector.act_name for name, *_ in some):
                scale = [coeff * (name == vector.act_name) for name, coeff, *_ in some]
                each.append(partial(vector.on, model, scale=torch.tensor(scale)))
        with hooks.batch(prompt_lengths=inputs["attention_mask"].sum(dim=1)), hf.nested(each):
            cache = generation.prefill(model, inputs, used)
            found = generation.continue_batch(model, tokenizer, inputs, cache, own, **used)
        return {"completions": found}

    with hooks.alone(model):
        batches = list(generation.by_length(model, [ids[i] for _, _, i, _ in rows], batch_size))
        what = {"additions": additions, "act_names": names, "folder": folder}
        spread(partial(sweep, tokenizer=tokenizer, **what, **grid), model, run, workers, len(batches))
        done = {}
        with generation.progress(len(rows)) as bar:
            for number, some in enumerate(batches):
                found = run.chunk(number, partial(batch, [rows[j] for j in some]))
                done |= zip(some, found["completions"], strict=True) if found else ()
                bar.update(len(some))
    table = [(*row[:2], prompts[row[2]], row[3], *done[j]) for j, row in enumerate(rows) if j in done]
    return pd.DataFrame(table, columns=["act_name", "coeff", "prompt", "sample", "completion", "loss"])
