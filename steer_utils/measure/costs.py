"""What a piece of work costs: passes through the decoder, forward and back, output heads, seconds, memory.

    with costs.counted(model) as count:
        table = su.generate(model, tokenizer, prompts, steer=space, max_new_tokens=20, num_samples=5)
    count.per_token(len(table) * 20)

Passes are the same on every machine; seconds and memory are this machine's.
"""

import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import psutil
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .. import hf

INTERVAL = 0.01  # seconds between two looks at the process's memory


@dataclass
class Count:
    """What was counted; seconds and peak_bytes are there once the work is done.

    forward, backward: how often the decoder, the network without its output head, was read through, and how
    often gradients went back through such a pass. head: products of last hidden states with the output
    embeddings. …_tokens: how many tokens these were of, rows × positions, padding included.
    peak_bytes: the most memory in use at a time beyond what was in use at the start. On a GPU, what torch had
    allocated. On a CPU, resident memory of the whole process, looked at every 10 ms: memory that was free to
    be used again counts as nothing, so there it is a lower bound, and 0 for work that was done before.
    """

    forward: int = 0
    forward_tokens: int = 0
    backward: int = 0
    backward_tokens: int = 0
    head: int = 0
    head_tokens: int = 0
    seconds: float = 0.0
    peak_bytes: int = 0

    def per_token(self, tokens: int) -> dict[str, float]:
        """Forward, backward and head, each the tokens that went through, and seconds, for one token written.

        tokens: how many were written, in all rows together. Reading the prompts is shared out among them.
        ValueError for fewer than one.
        """
        if tokens < 1:
            raise ValueError(f"costs are shared out among tokens: at least 1, not {tokens!r}")
        through = {name: getattr(self, f"{name}_tokens") for name in ("forward", "backward", "head")}
        return {name: total / tokens for name, total in (through | {"seconds": self.seconds}).items()}


@contextmanager
def counted(model: PreTrainedModel) -> Iterator[Count]:
    """Count what is done with a model while inside; the hooks come off at the end, after an exception too.

    A pass that ends early counts from its start. On a GPU, one inside another spoils the outer peak_bytes.
    ValueError for an architecture that is not in `hf.BLOCKS`.
    """
    model, count = hf.unwrapped(model), Count()
    with ExitStack() as stack:
        stack.enter_context(_hooked(model, count))
        stack.enter_context(_peak(model.device, count))
        start = _now(model.device)
        try:
            yield count
        finally:
            count.seconds = _now(model.device) - start


@contextmanager
def _hooked(model: PreTrainedModel, count: Count) -> Iterator[None]:
    done = False

    def before(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        ids = args[0] if args else kwargs.get("input_ids")
        count.forward += 1
        count.forward_tokens += _tokens(kwargs["inputs_embeds"] if ids is None else ids)

    def back(gradient: Tensor) -> None:
        if not done:
            count.backward += 1
            count.backward_tokens += _tokens(gradient)

    def after(module: nn.Module, args: tuple, output: Any) -> None:
        if output[0].requires_grad:
            output[0].register_hook(back)

    def head(module: nn.Module, args: tuple[Tensor], scores: Tensor) -> None:
        count.head += 1
        count.head_tokens += scores.shape[:-1].numel()

    decoder = hf.decoder(model)
    with (
        decoder.register_forward_pre_hook(before, with_kwargs=True),
        decoder.register_forward_hook(after),
        hf.lm_head(model).register_forward_hook(head),
    ):
        try:
            yield
        finally:
            done = True


def _tokens(batch: Tensor) -> int:
    """Rows × positions of [B, T] or [B, T, D]."""
    return batch.shape[:2].numel()


def _now(device: torch.device) -> float:
    """Seconds, once all that was asked of the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


@contextmanager
def _peak(device: torch.device, count: Count) -> Iterator[None]:
    if device.type != "cuda":
        with _resident_peak(count):
            yield
        return
    torch.cuda.reset_peak_memory_stats(device)
    start = torch.cuda.memory_allocated(device)
    try:
        yield
    finally:
        count.peak_bytes = torch.cuda.max_memory_allocated(device) - start


@contextmanager
def _resident_peak(count: Count) -> Iterator[None]:
    process, done = psutil.Process(), threading.Event()
    start = process.memory_info().rss

    def look() -> None:
        count.peak_bytes = max(count.peak_bytes, process.memory_info().rss - start)

    def watch() -> None:
        while not done.wait(INTERVAL):
            look()

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        done.set()
        watcher.join()
        look()
