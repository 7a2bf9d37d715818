"""Costs of a piece of work: passes through the model, products with its LM head, and seconds.

with costs.counted(model) as count:
    table = su.generate(model, tokenizer, prompts, steer=space, max_new_tokens=20)
count.per_token(len(table) * 20)
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from .. import hf
from ..models import Model


@dataclass
class Count:
    """Tokens (batch rows × positions, padding included) of each pass; seconds are set at the end."""

    forward: list[int] = field(default_factory=list)  # through the decoder: the model without its LM head
    backward: list[int] = field(default_factory=list)  # back through such a pass
    head: list[int] = field(default_factory=list)  # products of hidden states with the LM head
    seconds: float = 0.0

    def per_token(self, tokens: int) -> dict[str, float]:
        """Sums of forward, backward and head, and seconds, over the number of generated tokens (above 0)."""
        if tokens < 1:
            raise ValueError(f"give the number of generated tokens, at least 1, not {tokens!r}")
        totals = {name: sum(getattr(self, name)) for name in ("forward", "backward", "head")}
        return {name: total / tokens for name, total in (totals | {"seconds": self.seconds}).items()}


@contextmanager
def counted(model: Model) -> Iterator[Count]:
    """Count what is done with a model inside; a pass that ends early counts in full."""
    model, count, finished = hf.unwrapped(model), Count(), False
    decoder, start = hf.decoder(model), _now(model)

    def before(module, args, kwargs):
        ids = args[0] if args else kwargs.get("input_ids")
        count.forward.append((kwargs["inputs_embeds"] if ids is None else ids).shape[:2].numel())

    def went_back(gradient):
        if not finished:
            count.backward.append(gradient.shape[:2].numel())

    def after(module, args, output):
        if output[0].requires_grad:
            output[0].register_hook(went_back)

    def multiplied(module, args, logits):
        count.head.append(logits.shape[:-1].numel())

    first, last = hf.hooked(decoder, before, before=True, with_kwargs=True), hf.hooked(decoder, after)
    with first, last, hf.hooked(hf.lm_head(model), multiplied):
        try:
            yield count
        finally:
            finished, count.seconds = True, _now(model) - start


def _now(model: Model) -> float:
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)  # waits for all queued work
    return time.perf_counter()
