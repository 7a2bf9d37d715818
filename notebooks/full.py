"""Count what the full profile costs, without the papers' models: `make full` writes figures/full.json.

python notebooks/full.py [00 03 …]

Each notebook runs to its end with PROFILE="full" and an eighth of its prompts, samples and steps, but every
model that it loads is a random one with the paper's number of blocks and a width of 32. The seconds of this
run are everything but the arithmetic. The arithmetic is counted, pass by pass, and multiplied by the paper's
sizes: a pass takes as long as its products at half of the device's peak, or as long as reading the weights
once, whichever is longer. Both are multiplied by eight.
"""

import json
import os
import sys
import tempfile
import time
from contextlib import ExitStack, chdir
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
import nbformat
import torch
import transformers
from IPython.core.interactiveshell import InteractiveShell

import steer_utils as su
from steer_utils.checkpoint import write_atomically
from steer_utils.measure.costs import Count, counted

HERE = Path(__file__).resolve().parent
FILE = HERE.parent / "figures" / "full.json"
SIZES = {"gpt2-xl": (48, 1600), "gpt2-large": (36, 1280), "gpt2-medium": (24, 1024)}  # blocks, width
VOCABULARY = 50257
WIDTH, HEADS = 32, 4  # of the stand-ins
SCALE = 1 / 8  # of the profile's sizes


@dataclass(frozen=True)
class Device:
    """Products and sums a second in float32 and in half precision, and bytes a second from memory."""

    float32: float
    half: float
    memory: float


# NVIDIA's data sheets; bfloat16 is emulated on a T4, so `su.load` takes float32 there.
DEVICES = {"T4": Device(8.1e12, 8.1e12, 320e9), "A100": Device(19.5e12, 312e12, 1555e9)}


@dataclass
class Model:
    """A stand-in: the model whose place it takes, the precision asked for, and what was done with it."""

    name: str
    dtype: str | None
    count: Count
    positions: int = 0  # of the largest batch, over its rows, with what is cached

    def gigabytes(self) -> float:
        """Weights in float32, and the keys and values of the largest batch."""
        blocks, width = SIZES[self.name]
        weights = 12 * blocks * width**2 + VOCABULARY * width
        return 4e-9 * (weights + 2 * blocks * width * self.positions)

    def note(self, module: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """Before a pass: keep the size of its attention mask if it is the largest so far."""
        if isinstance(mask := kwargs.get("attention_mask"), torch.Tensor):
            self.positions = max(self.positions, len(mask) * mask.shape[-1])

    def seconds(self, device: Device) -> float:
        """The time of all passes, one after the other."""
        blocks, width = SIZES[self.name]
        exact = self.dtype == "float32" or device.half == device.float32
        size, peak = (4, device.float32) if exact else (2, device.half)

        def of(parameters: int, passes: list[int]) -> float:
            limits = ((2 * parameters * n / (peak / 2), parameters * size / device.memory) for n in passes)
            return sum(map(max, limits))

        decoder = of(12 * blocks * width**2, self.count.forward + self.count.backward)
        return decoder + 2 * of(VOCABULARY * width, self.count.head)  # there and, in training, back


def this_cpu() -> Device:
    """What this machine's processor does, measured on products of the sizes of a large model."""
    x, weight = torch.randn(640, 1280), torch.randn(1280, 5120)

    def rate(work: Any, amount: float) -> float:
        work()
        start = time.perf_counter()
        for _ in range(5):
            work()
        return 5 * amount / (time.perf_counter() - start)

    products = rate(lambda: x @ weight, 2 * x.numel() * 5120)
    memory = rate(lambda: x[:1] @ weight, weight.nbytes)
    return Device(2 * products, 2 * products, memory)  # `Model.seconds` takes half of the peak


def spent(path: Path) -> tuple[float, list[Model]]:
    """Run a notebook; its seconds with stand-ins for models, and what it did with each."""
    models, load = [], su.models.load

    def stand_in(name: str | Path = "smollm2-135m", *, dtype: str | None = None, **more: Any) -> tuple:
        if str(name) not in SIZES:
            return load(name, dtype=dtype, **more)
        _, tokenizer = load()
        ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
        ids["initializer_range"] = 0.2  # so that steers move it
        sizes = {"n_embd": WIDTH, "n_head": HEADS, "n_layer": SIZES[name][0], "vocab_size": len(tokenizer)}
        torch.manual_seed(0)  # a copy that is loaded again is the same
        model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, **ids))
        model = model.eval().requires_grad_(False).to(torch.float32)
        model.config.name_or_path = model.name_or_path = name
        models.append(Model(name, dtype, opened.enter_context(counted(model))))
        su.hf.decoder(model).register_forward_pre_hook(models[-1].note, with_kwargs=True)
        return model, tokenizer

    shell, start = InteractiveShell(), time.perf_counter()
    with ExitStack() as opened:
        su.models.load = stand_in
        opened.callback(setattr, su.models, "load", load)
        for cell in nbformat.read(path, as_version=4).cells:
            if cell.cell_type == "code":
                shell.run_cell(cell.source).raise_error()
                if "parameters" in cell.metadata.get("tags", []):
                    shell.user_ns |= {"PROFILE": "full", "SCALE": SCALE}
    return time.perf_counter() - start, models


def main() -> None:
    mpl.use("agg")
    chosen = tuple(sys.argv[1:]) or ("",)
    found = json.loads(FILE.read_text(encoding="utf-8")) if FILE.is_file() else {}
    devices = DEVICES | {"CPU": this_cpu()}
    for path in sorted(HERE.glob("0[0-8]*.ipynb")):  # 09 to 11 start processes that no stand-in reaches
        if path.name.startswith(chosen):
            with tempfile.TemporaryDirectory() as scratch, chdir(scratch):  # random models' figures
                os.environ |= {"STEER_UTILS_FIGURES": scratch, "STEER_UTILS_STATIC": "1"}
                seconds, models = spent(path)
            minutes = {
                name: (seconds + sum(model.seconds(device) for model in models)) / SCALE / 60
                for name, device in devices.items()
            }
            largest = {
                model.name: max(m.gigabytes() for m in models if m.name == model.name) for model in models
            }
            found[path.stem] = {"minutes": minutes, "without arithmetic": seconds / SCALE / 60, "GB": largest}
            write_atomically(FILE, json.dumps(dict(sorted(found.items())), indent=1) + "\n")


if __name__ == "__main__":
    main()
