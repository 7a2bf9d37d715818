"""Equal strength: how far a steer moves a model, in nats, and the strength at which it moves it that far.

A coefficient, a step size and a steer value have no unit in common. Their effect on the next token has one:
KL(steered ‖ unsteered) in nats, averaged over T tokens after each of N prompts.

Along texts that the *steered* model writes, the sum over T is the KL between the two distributions of whole
texts (chain rule), but it jumps where a little more strength changes a sampled token. `at_kl` therefore
measures all steers along the same texts of the *unsteered* model, where KL is smooth in the strength. For
weak steers both agree. One token is not enough: an addition to the first positions fades, PPLM's steps
accumulate, and LM-Steer acts on every token.

Texts are processed token by token on a KV cache, as in decoding, because PPLM computes one next-token
distribution for each call. Shapes: N prompts or texts, B batch, T tokens, V vocabulary.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from scipy.optimize import brentq
from torch import Tensor
from transformers import BatchEncoding, PreTrainedModel

from .. import hf
from ..generation import Steer, all_on
from ..models import encode, own_tokenizer, pad, token_ids
from ..sampling import Draw
from .metrics import Interval, Texts, Tokenizer, joined_ids, last_logits, next_token_kl, ratio

Steers = Steer | Iterable[Steer]
Prompts = str | Sequence[str]
TOLERANCE = 0.02  # of the KL, relative
SMALLEST_KL = 1e-20  # stands for a KL of 0, which has no logarithm
DOUBLINGS = 12  # the search covers strengths from 2^−12 to 2^12 times the given one
BATCH_SIZE = 64  # given texts processed at a time


def scaled(steer: Steers, factor: float) -> Any:
    """A steer, or a list of several, at `factor` times its coefficient, rows, steer values or step size."""
    return factor * steer if hasattr(steer, "on") else [factor * one for one in steer]


# --- equal KL ---------------------------------------------------------------------------------------------


def at_kl(
    steer: Steers,
    nats: float,
    model: PreTrainedModel,
    tokenizer: Tokenizer,
    prompts: Prompts,
    *,
    tokens: int = 20,
    seed: int = 0,
) -> Any:
    """The steer, or a list of several, `scaled` to the strength at which its mean KL is `nats`, to 2 %.

    The KL is that of `kl_along`; tokens=1 measures right after the prompts. The sign of the strength stays.
    PPLM and very strong additions can have a KL that does not grow with strength: the search halves or
    doubles the given strength until it has passed the goal, then looks between the last two.
    ValueError for nats that are not finite and above 0, no prompts or tokens, and a goal that no strength
    from 1/4096 to 4096 times the given one reaches.
    """
    if not (math.isfinite(nats) and nats > 0):
        raise ValueError(f"nats must be above 0 and finite, not {nats!r}")
    steer = steer if hasattr(steer, "on") else list(steer)
    unsteered = _sample((), model, tokenizer, prompts, tokens, seed)
    factor = factor_at(lambda factor: _kl(scaled(steer, factor), unsteered).mean().item(), nats)
    return scaled(steer, factor)


def kl_along(
    steer: Steers,
    model: PreTrainedModel,
    tokenizer: Tokenizer,
    prompts: Prompts,
    *,
    tokens: int = 20,
    own_text: bool = False,
    seed: int = 0,
) -> Tensor:
    """KL(steered ‖ unsteered) in nats at each of T tokens after each prompt, [N, T].

    The tokens are sampled from the unsteered model's whole distribution without EOS; with own_text, from the
    steered model's. PPLM is measured before top_k and top_p. All prompts are one batch, and [N, T, V] numbers
    are kept: 24 prompts are enough. ValueError for no prompts or tokens.
    """
    sample = _sample(steer if own_text else (), model, tokenizer, prompts, tokens, seed)
    return _kl((), sample, flip=True) if own_text else _kl(steer, sample)


def continuations(
    model: PreTrainedModel, tokenizer: Tokenizer, prompts: Prompts, *, tokens: int = 20, seed: int = 0
) -> Tensor:
    """The token ids [N, T] along which `at_kl` and `kl_along` measure."""
    return _sample((), model, tokenizer, prompts, tokens, seed).ids


class _Sample(NamedTuple):
    """Sampled tokens ids [N, T] after a batch of prompts, and log probabilities [N, T, V] at each of them."""

    model: PreTrainedModel
    tokenizer: Tokenizer
    batch: BatchEncoding
    ids: Tensor
    log_probs: Tensor | None = None


@torch.no_grad()
def _sample(
    steer: Steers, model: PreTrainedModel, tokenizer: Tokenizer, prompts: Prompts, tokens: int, seed: int
) -> _Sample:
    """Sample T tokens after each prompt from the whole distribution without EOS."""
    prompts = [prompts] if isinstance(prompts, str) else list(prompts)
    if not prompts or tokens < 1:
        raise ValueError(f"give at least one prompt and one token, not {len(prompts)} and {tokens}")
    tokenizer, model = own_tokenizer(model, tokenizer), hf.unwrapped(model)
    batch = encode(tokenizer, prompts, device=model.device)
    uniforms = torch.rand(len(prompts), tokens, generator=torch.Generator().manual_seed(seed))
    draw = Draw(uniforms.to(model.device), 0)
    eos = model.generation_config.eos_token_id
    eos = torch.tensor([] if eos is None else eos, dtype=torch.long, device=model.device).reshape(-1)
    sample = _Sample(model, tokenizer, batch, batch["input_ids"].new_zeros(uniforms.shape))
    found = []
    with _on(steer, sample):
        for t, log_probs in enumerate(log_probs_along(model, batch, sample.ids)):
            without_eos = log_probs.index_fill(1, eos, -torch.inf)
            sample.ids[:, t] = draw(sample.ids[:, :t], without_eos).argmax(dim=-1)
            found.append(log_probs)
    return sample._replace(log_probs=torch.stack(found, dim=1))


def _kl(steer: Steers, sample: _Sample, *, flip: bool = False) -> Tensor:
    """KL(under `steer` ‖ as sampled) along a sample, [N, T]; with `flip`, KL(as sampled ‖ under `steer`)."""
    with _on(steer, sample):
        now = torch.stack(list(log_probs_along(sample.model, sample.batch, sample.ids)), dim=1)
    return next_token_kl(sample.log_probs, now) if flip else next_token_kl(now, sample.log_probs)


@contextmanager
def _on(steer: Steers, sample: _Sample) -> Iterator[None]:
    """Switch the steers on for texts with these prompts; PPLM without the cuts after its fusion."""
    steers = [steer] if hasattr(steer, "on") else steer
    uncut = [one.uncut() if hasattr(one, "uncut") else one for one in steers]
    lengths = sample.batch["attention_mask"].sum(dim=1)
    with hf.batch(prompt_lengths=lengths), all_on(uncut, sample.model, sample.tokenizer):
        yield


def factor_at(kl: Callable[[float], float], nats: float) -> float:
    """The factor at which `kl(factor)`, 0 at 0, is `nats`, to 2 %: the nearest to 1 that doublings find.

    A KL that is not finite counts as too large. ValueError if there is none.
    """
    seen: dict[float, float] = {}

    def log_excess(log2_factor: float) -> float:
        """log(KL / nats), which is about linear in the logarithm of the factor."""
        if log2_factor not in seen:
            seen[log2_factor] = kl(2.0**log2_factor)
        if not math.isfinite(seen[log2_factor]):
            return -math.log(SMALLEST_KL)
        excess = math.log(max(seen[log2_factor], SMALLEST_KL) / nats)
        return 0.0 if abs(excess) < TOLERANCE else excess

    if (ends := bracket(log_excess)) is not None:
        return 2.0 ** brentq(log_excess, *ends, xtol=1e-3)
    finite = [value for value in seen.values() if math.isfinite(value)] or [math.nan]
    raise ValueError(
        f"no strength from 1/{2**DOUBLINGS} to {2**DOUBLINGS} times the given one gives {nats!r} nats: the "
        f"largest KL seen is {max(finite):.3g}, the smallest {min(finite):.3g}"
    )


def bracket(function: Callable[[float], float]) -> tuple[int, int] | None:
    """The first two neighbouring integers, going from 0 up or down, between which the sign changes."""
    upwards = function(0) < 0
    for i in range(DOUBLINGS):
        near, far = (i, i + 1) if upwards else (-i, -i - 1)
        if (function(far) < 0) != upwards:
            return near, far
    return None


# --- given texts ------------------------------------------------------------------------------------------


class Forced(NamedTuple):
    """Values of each of the T tokens of a completion in nats, [T]."""

    kl: Tensor  # KL(steered ‖ unsteered) of the distributions before the token
    gain: Tensor  # steered minus unsteered log probability of the token; −inf where it was cut


@torch.no_grad()
def forced(
    model: PreTrainedModel, tokenizer: Tokenizer, prompts: Texts, completions: Texts, steer: Steers
) -> list[Forced]:
    """Teacher forcing: each completion after its prompt, with one steer or several and without, [N].

    Prompts, completions and errors as for `metrics.completion_log_probs`. PPLM is measured with its top_k and
    top_p; top_k=0 measures its steps alone.
    """
    tokenizer, model = own_tokenizer(model, tokenizer), hf.unwrapped(model)
    rows = joined_ids(tokenizer, prompts, completions)
    found: list[Forced] = []
    with all_on(steer, model, tokenizer):
        for i in range(0, len(rows), BATCH_SIZE):
            some = rows[i : i + BATCH_SIZE]
            with hf.batch(texts=range(i, i + len(some)), of=len(rows)):
                found += _forced_batch(model, some)
    return found


def loss_increase(
    model: PreTrainedModel, tokenizer: Tokenizer, texts: Sequence[str], steer: Steers, *, start: int = 8
) -> Interval:
    """By how many nats a token a steer raises the loss on given texts; the interval is over texts.

    start: tokens, BOS included, that are the prompt. ValueError unless two texts or more are longer.
    """
    if start < 1:
        raise ValueError(f"start must be at least 1, for BOS, not {start!r}")
    rows = [token_ids(own_tokenizer(model, tokenizer), text) for text in texts]
    rows = [row for row in rows if len(row) > start]
    if len(rows) < 2:
        raise ValueError(f"{len(rows)} of {len(texts)} texts have more than {start} tokens: give longer ones")
    pairs = [row[:start] for row in rows], [row[start:] for row in rows]
    found = forced(model, tokenizer, *pairs, steer)
    return ratio([-one.gain.sum().item() for one in found], [len(one.gain) for one in found])


def _forced_batch(model: PreTrainedModel, rows: Sequence[tuple[list[int], int]]) -> list[Forced]:
    """`forced` for one batch: prompts padded on the left, completions on the right."""
    padding, device = rows[0][0][0], model.device
    batch = pad([ids[:start] for ids, start in rows], padding, padding_side="left", device=device)
    given = pad([ids[start:] for ids, start in rows], padding, padding_side="right", device=device)[
        "input_ids"
    ]
    found = Forced(*torch.zeros(2, *given.shape, device=device))
    with hf.batch(prompt_lengths=batch["attention_mask"].sum(dim=1)):
        both = (log_probs_along(model, batch, given, unsteered=off) for off in (False, True))
        for t, (steered, unsteered) in enumerate(zip(*both, strict=True)):
            found.kl[:, t] = next_token_kl(steered, unsteered)
            found.gain[:, t] = (steered - unsteered).gather(1, given[:, t, None])[:, 0]
    lengths = [len(ids) - start for ids, start in rows]
    return [Forced(*(values[i, :length].cpu() for values in found)) for i, length in enumerate(lengths)]


@torch.no_grad()
def log_probs_along(
    model: PreTrainedModel, batch: Mapping[str, Tensor], ids: Tensor, *, unsteered: bool = False
) -> Iterator[Tensor]:
    """Log probabilities [B, V] before each column of ids [B, T], the tokens after a batch of prompts.

    batch: input_ids and attention_mask of the prompts, padded on the left. A column may be filled in after
    its distribution was given. `hf.prompt_length` must be set.
    """
    mask, new, cache = batch["attention_mask"], batch["input_ids"], hf.new_cache(model)
    for token in ids.T:
        with hf.unsteered() if unsteered else nullcontext():
            logits = last_logits(model, new, mask, cache)
        yield logits.log_softmax(dim=-1)
        new, mask = token[:, None], torch.nn.functional.pad(mask, (0, 1), value=1)
