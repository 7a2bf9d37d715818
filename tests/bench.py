"""Measure what the project promises about speed, as ratios within one run: `make bench`.

Each row is a median over runs in which the two things compared took turns. Written to figures/bench.json.
"""

import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
import transformers
from rich.console import Console
from rich.table import Table
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import steer_utils as su

OUT = Path(__file__).parents[1] / "figures" / "bench.json"


def main() -> None:
    model, tokenizer = su.load()
    rows = [
        row("import steer_utils beyond transformers, seconds", import_seconds(), 0.2),
        row("load() once unpacked, seconds", [seconds(su.load) for _ in range(5)], 1.0),
        row("decoding with an activation addition ÷ plain", decoding_ratios(model, tokenizer), 1.03),
        row("sweep of every block × 8 coefficients ÷ cell by cell", sweep_ratios(model, tokenizer), 0.2),
    ]
    versions = {"python": platform.python_version()} | {
        m.__name__: m.__version__ for m in (torch, transformers)
    }
    machine = f"{model.device.type}, {torch.get_num_threads()} threads, {platform.machine()}"
    OUT.write_text(json.dumps({"machine": machine, "versions": versions, "rows": rows}, indent=1) + "\n")
    table = Table("what", "measured", "bound", "holds", "runs", title=machine)
    for one in rows:
        table.add_row(
            one["name"], f"{one['ratio']:.3f}", f"{one['bound']}", str(one["holds"]), str(one["runs"])
        )
    Console().print(table)


def row(name: str, values: list[float], bound: float) -> dict[str, str | float | bool | int]:
    middle = statistics.median(values)
    return {
        "name": name,
        "ratio": round(middle, 4),
        "bound": bound,
        "holds": middle <= bound,
        "runs": len(values),
    }


def seconds(work: Callable[[], object]) -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def import_seconds() -> list[float]:
    """What a new process spends on our import after transformers', several times."""
    code = "import transformers, time; t = time.time(); import steer_utils; print(time.time() - t)"
    command = [sys.executable, "-c", code]
    return [float(subprocess.run(command, capture_output=True, check=True).stdout) for _ in range(5)]


def decoding_ratios(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[float]:
    """`model.generate` with an x-vector on, its texts run each time, over the same without: 8 × 50 tokens."""
    batch = su.encode(tokenizer, su.data.prompts()[:8], device=model.device)
    pair = su.get_x_vector("Love", "Hate", coeff=2, act_name=6)

    def plain() -> None:
        model.generate(**batch, max_new_tokens=50, min_new_tokens=50, do_sample=False)

    def steered() -> None:
        with su.apply_activation_additions(model, pair, tokenizer):
            plain()

    plain()  # warm up
    return [balanced_ratio(steered, plain) for _ in range(5)]


def sweep_ratios(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[float]:
    """`su.sweep` over a `generate` for each cell: one prompt, 10 tokens; every 20th cell is timed."""
    pair = su.get_x_vector("Love", "Hate", coeff=1, act_name=0)
    prompt, settings = su.data.prompts()[0], {"max_new_tokens": 10, "seed": 0}
    names, coeffs = range(len(su.hf.blocks(model))), [0.5 * c for c in range(1, 9)]
    cells = [(name, coeff) for name in names for coeff in coeffs][::20]

    def swept() -> None:
        su.sweep(model, tokenizer, prompt, pair, act_names=names, coeffs=coeffs, **settings)

    def one_by_one() -> None:
        for name, coeff in cells:
            steer = [coeff * replace(addition, act_name=name) for addition in pair]
            su.generate(model, tokenizer, prompt, steer=steer, **settings)

    one_by_one()  # warm up
    return [balanced_ratio(swept, one_by_one) * len(cells) / (len(names) * len(coeffs)) for _ in range(3)]


def balanced_ratio(one: Callable[[], object], other: Callable[[], object]) -> float:
    """Seconds of one over seconds of the other, each run twice in mirrored order: one, other, other, one."""
    first, *others, last = [seconds(work) for work in (one, other, other, one)]
    return (first + last) / sum(others)


if __name__ == "__main__":
    main()
