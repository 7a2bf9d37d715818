"""Equal strength: how far a steer moves a model, in nats, and the strength at which it moves it so far.

A coefficient of 2, a step size of 0.1 and a steer value of 6 have no unit in common. What they do to the next
token has one: KL(steered ‖ plain), in nats. It is measured at T tokens after each of N prompts, and averaged.

Where to measure is a choice. By the chain rule, the KL between two distributions of whole texts is the sum of
the KLs of their next tokens, along texts that the *steered* model writes. The first token alone misleads:
rows added at the front of a prompt fade, PPLM's steps add up from token to token, LM-Steer acts at each.
So T is 20 by default, and `kl_along(…, own_text=True)` is that sum, over T. But it jumps where a little more
strength makes the steered model choose another token. To search for a strength, all steers are instead read
along the same texts, which the plain model wrote: smooth in the strength, and the same test for all. The two
agree while a steer is weak; measure both where it matters.
Shapes: N prompts, T tokens, V vocabulary.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import cache
from typing import Any, NamedTuple

import torch
from scipy.optimize import brentq
from torch import Tensor
from transformers import BatchEncoding, PreTrainedModel, PreTrainedTokenizerBase

from .. import hf
from ..generation import Steer, all_on
from ..models import encode, own_tokenizer
from ..pplm.steer import PPLM
from ..sampling import Draw
from .metrics import next_token_kl
from .teacher_forcing import along

TOLERANCE = 0.02  # of the KL, relative
FLOOR = 1e-20  # a KL of 0 has no logarithm
DOUBLINGS = 12  # from the strength that a steer is given with, up or down


def scaled(steer: Steer | Iterable[Steer], factor: float) -> Any:
    """A steer of any kind at `factor` times its strength; of several, a list, all of them at that.

    What is multiplied: an addition's coefficient, a vector's rows, a head steer's values, PPLM's step size.
    """
    if hasattr(steer, "on"):
        return factor * steer
    return [factor * one for one in steer]


def at_kl(
    steer: Steer | Iterable[Steer],
    nats: float,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    prompts: str | Sequence[str],
    *,
    tokens: int = 20,
    seed: int = 0,
) -> Any:
    """The steer, or a list of several, `scaled` to the strength at which it moves the model by `nats`.

    That is the mean KL(steered ‖ plain) of T = `tokens` next tokens along plain continuations of the prompts,
    to 2 %; tokens=1 is the KL right after the prompts. Signs stay as they are: −3 finds a negative value.
    The KL of PPLM or of a very strong addition need not grow with strength. The search begins at the given
    strength and halves it until the KL is below the goal, or doubles it until it is above, and then looks
    between the last two. So it finds the smallest strength, but for a peak that lies between two doublings.
    Raises ValueError for nats that are not above 0 and finite, no prompts or tokens, a goal that no strength
    from 1/4096 to 4096 times the given one reaches (with the largest KL seen, 0 for a steer of strength 0),
    and what the steer raises.
    """
    if not (math.isfinite(nats) and nats > 0):
        raise ValueError(f"nats must be above 0 and finite, not {nats!r}")
    steer = steer if hasattr(steer, "on") else list(steer)
    plain = _read(model, tokenizer, prompts, tokens, seed)
    return scaled(steer, _factor(lambda factor: _kl(scaled(steer, factor), plain).mean().item(), nats))


def kl_along(
    steer: Steer | Iterable[Steer],
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    prompts: str | Sequence[str],
    *,
    tokens: int = 20,
    own_text: bool = False,
    seed: int = 0,
) -> Tensor:
    """KL(steered ‖ plain) in nats of each of T next tokens after each prompt, [N, T].

    They are read along texts drawn, uncut and without an end, from the plain model; with own_text, from the
    steered one. Of PPLM, the distribution is the fused one, before top_k and top_p cut it. All prompts are
    one batch, and N · T · V numbers are held: 24 prompts are plenty. ValueError for no prompts or tokens.
    """
    if not own_text:
        return _kl(steer, _read(model, tokenizer, prompts, tokens, seed))
    steered = _read(model, tokenizer, prompts, tokens, seed, steer)
    with _on((), steered):
        plain = torch.stack(list(along(steered.model, steered.batch, steered.ids)), dim=1)
    return next_token_kl(steered.log_probs, plain)


def continuations(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    prompts: str | Sequence[str],
    *,
    tokens: int = 20,
    seed: int = 0,
) -> Tensor:
    """The token ids [N, T] along which `at_kl` and `kl_along` measure."""
    return _read(model, tokenizer, prompts, tokens, seed).ids


# --- reading ----------------------------------------------------------------------------------------------


class _Reading(NamedTuple):
    """What a model wrote after some prompts, and its log probabilities of every token at each step."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    batch: BatchEncoding
    ids: Tensor  # [N, T]
    log_probs: Tensor | None = None  # [N, T, V]


@torch.no_grad()
def _read(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    prompts: str | Sequence[str],
    tokens: int,
    seed: int,
    steer: Steer | Iterable[Steer] = (),
) -> _Reading:
    """Draw T tokens after each prompt, from the whole distribution; no text ends."""
    prompts = [prompts] if isinstance(prompts, str) else list(prompts)
    if not prompts or tokens < 1:
        raise ValueError(f"give at least one prompt and one token, not {len(prompts)} and {tokens}")
    tokenizer, model = own_tokenizer(model, tokenizer), hf.unwrapped(model)
    batch = encode(tokenizer, prompts, device=model.device)
    uniforms = torch.rand(len(prompts), tokens, generator=torch.Generator().manual_seed(seed))
    draw, found = Draw(uniforms.to(model.device), 0), []
    reading = _Reading(model, tokenizer, batch, batch["input_ids"].new_zeros(uniforms.shape))
    with _on(steer, reading):
        for t, log_probs in enumerate(along(model, batch, reading.ids)):
            chosen = draw(reading.ids[:, :t], _endless(log_probs, model)).argmax(dim=-1)
            reading.ids[:, t] = chosen  # which `along` reads next
            found.append(log_probs)
    return reading._replace(log_probs=torch.stack(found, dim=1))


def _on(steer: Steer | Iterable[Steer], reading: _Reading) -> ExitStack:
    """All of the steers on, what PPLM cuts after the fusion left in, for texts with such prompts."""
    with ExitStack() as stack:
        stack.enter_context(hf.batch(prompt_lengths=reading.batch["attention_mask"].sum(dim=1)))
        steers = [steer] if hasattr(steer, "on") else steer
        uncut = [replace(one, top_k=0, top_p=1.0) if isinstance(one, PPLM) else one for one in steers]
        stack.enter_context(all_on(uncut, reading.model, reading.tokenizer))
        return stack.pop_all()


def _endless(log_probs: Tensor, model: PreTrainedModel) -> Tensor:
    """The same without the tokens that end a text."""
    ends = model.generation_config.eos_token_id
    ends = torch.tensor([] if ends is None else ends, dtype=torch.long, device=log_probs.device)
    return log_probs.index_fill(1, ends.reshape(-1), -torch.inf)


def _kl(steer: Steer | Iterable[Steer], plain: _Reading) -> Tensor:
    """KL(steered ‖ plain) along what the plain model wrote, [N, T]."""
    with _on(steer, plain):
        pairs = zip(along(plain.model, plain.batch, plain.ids), plain.log_probs.unbind(1), strict=True)
        return torch.stack([next_token_kl(*pair) for pair in pairs], dim=1)


# --- searching --------------------------------------------------------------------------------------------


def _factor(kl: Callable[[float], float], nats: float) -> float:
    """Where a function of the factor, 0 at 0, is `nats`, next to 1 as far as doublings can tell."""
    seen: dict[float, float] = {}

    @cache
    def gap(log2: float) -> float:
        found = seen[log2] = kl(2.0**log2)
        gap = math.log(max(found, FLOOR) / nats) if math.isfinite(found) else math.log(1 / FLOOR)
        return 0.0 if abs(gap) < TOLERANCE else gap

    weak = gap(0) < 0
    for i in range(DOUBLINGS):
        near, far = (i, i + 1) if weak else (-i, -i - 1)
        if (gap(far) < 0) != weak:
            return 2.0 ** brentq(gap, near, far, xtol=1e-3)  # KL is about a power of the strength: few steps
    finite = [value for value in seen.values() if math.isfinite(value)] or [math.nan]
    raise ValueError(
        f"no strength from 1/{2**DOUBLINGS} to {2**DOUBLINGS} times the given one gives {nats!r} nats: the "
        f"largest KL seen is {max(finite):.3g}, the smallest {min(finite):.3g}"
    )
