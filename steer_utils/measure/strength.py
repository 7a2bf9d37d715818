"""Equal strength: how far a steer moves a model, in nats, and the strength at which it moves it that far.

The unit is KL(steered ‖ unsteered) of the next token, averaged over T tokens after each of N prompts. One
token is not enough: an addition to the first positions fades, PPLM's steps accumulate, LM-Steer's stay.
`at_kl` measures along texts of the *unsteered* model, where KL is smooth in the strength. Along texts of the
*steered* model its sum over T is the KL of whole texts, but it jumps where a sampled token changes.
Shapes: N prompts or texts, B batch, T tokens, V vocabulary.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from scipy.optimize import brentq
from torch import Tensor
from torch.nn.functional import pad

from .. import hf, hooks, models
from ..generation import Steers, all_on, as_list, by_length
from ..models import Model, Prompts, Texts, Tokenizer, own_tokenizer, prompt_texts, text_ids
from ..sampling import Draw
from ..types import require
from .metrics import Interval, joined_ids, last_logits, next_token_kl, ratio

Act = Callable[[int, Tensor], Any]  # what is done with the log probabilities before token t
TOLERANCE = 0.02  # of the KL, relative
SMALLEST_KL = 1e-20  # stands for a KL of 0, which has no logarithm
DOUBLINGS = 12  # the search covers strengths from 2^−12 to 2^12 times the given one
BATCH_SIZE = 64  # given texts processed at a time


def scaled(steer: Steers, factor: float) -> Any:
    """A steer, or a list of several, at `factor` times its coefficient, rows, steer values or step size."""
    return factor * steer if hasattr(steer, "on") else [factor * one for one in steer]


def at_kl(
    steer: Steers, nats: float, model: Model, tokenizer: Tokenizer, prompts: Prompts, **how: Any
) -> Any:
    """The steer, or a list of several, `scaled` by its `kl_factor`; arguments as there."""
    return scaled(steer, kl_factor(steer, nats, model, tokenizer, prompts, **how))


def kl_factor(
    steer: Steers, nats: float, model: Model, tokenizer: Tokenizer, prompts: Prompts, **how: Any
) -> float:
    """The factor on a steer, or on each of several, at which the mean of `kl_along` is `nats`.

    how: tokens and seed of `continuations`. KL need not grow with strength: the search halves or doubles the
    given strength until it has passed the goal, then looks between the last two, to 2 %. ValueError for nats
    that are not finite and above 0, and a goal that no strength from 1/4096 to 4096 times the given one has.
    """
    require(0 < nats < math.inf, "above 0 and finite", nats=nats)
    require(as_list(steer), "at least one", steer=steer)
    along = model, tokenizer, prompts, continuations(model, tokenizer, prompts, **how)
    unsteered = _along(lambda t, log_probs: log_probs, None, *along)
    return factor_at(lambda factor: _kl(scaled(steer, factor), unsteered, *along).mean().item(), nats)


def kl_along(
    steer: Steers,
    model: Model,
    tokenizer: Tokenizer,
    prompts: Prompts,
    *,
    own_text: bool = False,
    prefix: str = "",
    **how: Any,
) -> Tensor:
    """KL(steered ‖ unsteered) in nats at each of T tokens after each prompt, [N, T].

    The tokens are those of `continuations`, with own_text of the steered model; how: tokens and seed, as
    there. PPLM is measured before top-k and top-p. prefix: text in front of the steered prompts. [N, T, V]
    numbers are kept: give 24 prompts.
    """
    prompts = prompt_texts(own_tokenizer(model, tokenizer), prompts)
    steered, plain = ((model, tokenizer, [start + one for one in prompts]) for start in (prefix, ""))
    writer, where = (steer, steered) if own_text else (None, plain)
    ids = continuations(*where, steer=writer, **how)
    unsteered = _along(lambda t, log_probs: log_probs, None, *plain, ids)
    return _kl(steer, unsteered, *steered, ids)


def continuations(
    model: Model,
    tokenizer: Tokenizer,
    prompts: Prompts,
    *,
    steer: Steers = None,
    tokens: int = 20,
    seed: int = 0,
) -> Tensor:
    """T tokens after each of N prompts, [N, T], from the whole distribution without EOS."""
    tokenizer, model = own_tokenizer(model, tokenizer), hf.unwrapped(model)
    prompts = prompt_texts(tokenizer, prompts)
    require(len(prompts) >= 1, "at least one", prompts=prompts)
    require(tokens >= 1, "at least 1", tokens=tokens)
    eos, device = model.generation_config.eos_token_id, hf.input_device(model)
    uniforms = torch.rand(len(prompts), tokens, generator=torch.Generator().manual_seed(seed))
    draw, ids = Draw(uniforms.to(device), 0), torch.zeros_like(uniforms, dtype=torch.long, device=device)

    def sample(t: int, log_probs: Tensor) -> None:
        log_probs[:, [] if eos is None else eos] = -torch.inf
        ids[:, t] = draw(ids[:, :t], log_probs).argmax(dim=-1)

    _along(sample, steer, model, tokenizer, prompts, ids)
    return ids


def _kl(steer: Steers, unsteered: Sequence[Tensor], *where: Any) -> Tensor:
    """KL(steered ‖ unsteered) [N, T]; unsteered: log probabilities [T][N, V]; where: the rest of `_along`."""
    return torch.stack(_along(lambda t, now: next_token_kl(now, unsteered[t]), steer, *where), dim=1)


@hf.no_grad
def _along(
    act: Act, steer: Steers, model: Model, tokenizer: Tokenizer, prompts: Prompts, ids: Tensor
) -> list[Any]:
    """act(t, log probabilities [N, V]) before each token of ids [N, T]; PPLM without its top-k and top-p."""
    tokenizer, model = own_tokenizer(model, tokenizer), hf.unwrapped(model)
    rows = text_ids(tokenizer, prompt_texts(tokenizer, prompts))
    models.require_readable(model, rows, ids.shape[1])
    if len(list(by_length(model, rows, len(rows)))) > 1:
        what = f"padding changes the states of a {model.config.model_type!r} model"
        raise ValueError(f"{what}: give prompts of one length, not of {sorted(set(map(len, rows)))} tokens")
    batch = models.batch_of(model, rows, "left")
    uncut = [one.uncut() if hasattr(one, "uncut") else one for one in as_list(steer)]
    known = {"prompt_lengths": batch["attention_mask"].sum(dim=1), "texts": range(len(ids)), "of": len(ids)}
    with hooks.batch(**known), all_on(uncut, model, tokenizer):
        return [act(t, log_probs) for t, log_probs in enumerate(log_probs_along(model, batch, ids))]


def factor_at(kl: Callable[[float], float], nats: float) -> float:
    """The factor nearest to 1 with `kl(factor)` = `nats`, to 2 %, or ValueError; inf, NaN are too large."""
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
    seen_kl = f"the largest KL seen is {max(finite):.3g}, the smallest {min(finite):.3g}"
    tried = f"no strength from 1/{2**DOUBLINGS} to {2**DOUBLINGS} times the given one"
    raise ValueError(f"{tried} gives {nats!r} nats: {seen_kl}")


def bracket(function: Callable[[float], float]) -> tuple[int, int] | None:
    """The first two neighbouring integers, going from 0 up or down, between which the sign changes."""
    here = function(0)
    step = 1 if here < 0 else -1
    ends = ((near, near + step * (here != 0)) for near in range(0, step * DOUBLINGS, step))
    return next((pair for pair in ends if function(pair[1]) * here <= 0), None)


@hf.no_grad
def forced(
    model: Model, tokenizer: Tokenizer, prompts: Texts, completions: Texts, steer: Steers
) -> list[Tensor]:
    """By how many nats steers raise the log probability of each token of a completion, [T] for each of N.

    Arguments as for `metrics.completion_log_probs`. A token that PPLM's top-k or top-p cut has
    −inf; one that filter_p cut has about −10,000.
    """
    tokenizer, model = own_tokenizer(model, tokenizer), hf.unwrapped(model)
    rows = joined_ids(tokenizer, prompts, completions)
    models.require_readable(model, [ids for ids, _ in rows])
    starts, ends = [ids[:start] for ids, start in rows], [ids[start:] for ids, start in rows]
    found: dict[int, Tensor] = {}
    with all_on(steer, model, tokenizer):
        for chosen in by_length(model, starts, BATCH_SIZE):
            batch = models.batch_of(model, [starts[i] for i in chosen], "left")
            given = models.batch_of(model, [ends[i] for i in chosen], "right")["input_ids"]
            gains = torch.zeros_like(given, dtype=torch.float)
            with hooks.batch(prompt_lengths=batch["attention_mask"].sum(dim=1), texts=chosen, of=len(rows)):
                both = (log_probs_along(model, batch, given, unsteered=off) for off in (False, True))
                for t, (steered, unsteered) in enumerate(zip(*both, strict=True)):
                    gains[:, t] = (steered - unsteered).gather(1, given[:, t, None])[:, 0]
            found |= {i: gain[: len(ends[i])].cpu() for i, gain in zip(chosen, gains, strict=True)}
    return [found[i] for i in range(len(rows))]


def loss_increase(
    model: Model, tokenizer: Tokenizer, texts: Sequence[str], steer: Steers, *, start: int = 8
) -> Interval:
    """By how many nats a token a steer raises the loss on given texts; the interval is over texts.

    start: tokens, BOS included, that are the prompt. ValueError unless two texts or more are longer.
    """
    rows = [row for row in text_ids(own_tokenizer(model, tokenizer), texts, as_data=True) if len(row) > start]
    if start < 1 or len(rows) < 2:
        raise ValueError(f"{len(rows)} of {len(texts)} texts are longer than start={start} tokens, with BOS")
    found = forced(model, tokenizer, [row[:start] for row in rows], [row[start:] for row in rows], steer)
    return ratio([-one.sum().item() for one in found], [len(one) for one in found])


@hf.no_grad
def log_probs_along(
    model: Model, batch: Mapping[str, Tensor], ids: Tensor, *, unsteered: bool = False
) -> Iterator[Tensor]:
    """Log probabilities [B, V] before each column of ids [B, T], tokens after a left-padded batch of prompts.

    A column may be filled in after its distribution was given. Needs `hooks.batch(prompt_lengths=…)`.
    """
    mask, new, cache = batch["attention_mask"], batch["input_ids"], hf.new_cache(model)
    for token in ids.T:
        with hooks.unsteered() if unsteered else nullcontext():
            logits = last_logits(model, new, mask, cache)
        yield logits.log_softmax(dim=-1).to(new.device)
        new = token[:, None] if cache is not None else torch.cat([new, token[:, None]], dim=1)
        mask = pad(mask, (0, 1), value=1)
