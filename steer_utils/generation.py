"""Sample many completions, steered and unsteered, on top of `model.generate`.

A prompt is prefilled once for all its samples, and prompts of unequal length share a left-padded batch.
Each completion has its own stream of random numbers, made from the seed, its prompt and its sample number. So
it does not depend on its batch, up to rounding, and torch's global random state stays as it is. The steered
and the unsteered completion with the same sample number share a stream, which makes them a matched pair.
"""

import math
import os
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from itertools import groupby
from typing import Any, Protocol, runtime_checkable

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import BatchEncoding, Cache, GenerationConfig

from . import hf, hooks, probing
from .models import Model, Tokenizer, batch_of, own_tokenizer, prompt_texts, require_readable, text_ids
from .sampling import SAMPLING, Draw, TokenLosses, sampling_processors
from .types import Prompts, require, several


@runtime_checkable
class Steer(Protocol):
    """A value that changes what a model writes, inside the context manager `on`.

    Optional members: `factor * steer`, the steer at another strength; `sums_as`, a kind whose steers in a
    list are summed with `+`; `reads_prompt`, true if it must see the prompt, so that no prefill is shared;
    `uncut()`, the steer without its own top-k and top-p.
    """

    def on(self, model: Model, tokenizer: Tokenizer = None) -> AbstractContextManager[None]: ...


class Arithmetic:
    """−a, a − b and factor · a of steers that have a · factor and a + b."""

    def __rmul__(self, factor: float) -> Any:
        return self * factor

    def __neg__(self) -> Any:
        return self * -1

    def __sub__(self, other: Any) -> Any:
        return self + -other


Steers = Steer | several(lambda one: hasattr(one, "on"), "a flat list of steers") | None
NO_SETTINGS = ("transformers_version", "_from_model_config", "_original_object_hash")  # of a GenerationConfig


@hf.no_grad
def generate(
    model: Model,
    tokenizer: Tokenizer,
    prompts: Prompts,
    *,
    steer: Steers = None,
    num_samples: int = 1,
    seed: int | None = None,
    batch_size: int = 64,
    special_tokens: bool = True,
    earlier: Mapping[str, int] | None = None,
    **sampling: Any,
) -> pd.DataFrame:
    """Continue each prompt `num_samples` times, with one steer, several or none.

    prompts: a text or several; for a chat model also messages, [{"role": "user", "content": …}], or several
    such lists. special_tokens: as for `encode`. sampling: max_new_tokens=40, temperature=1.0, top_p=0.9,
    top_k=0 (off), repetition_penalty=1.0, freq_penalty=0.0, do_sample=True; the rest (stopping_criteria,
    stop_strings, num_beams with do_sample=False, generation_config, …) goes to `model.generate`. Settings
    stored with the model, other than lengths, take the place of these defaults. seed: None draws one from
    torch's global random state. batch_size: completions computed at a time. earlier: how many
    completions of a prompt other calls have made; this one uses the random numbers after theirs. Other
    threads wait until it ends. A TransformerLens `TransformerBridge` needs no tokenizer.
    Returns a DataFrame with columns prompt, sample, completion, steered and loss, in the order of the
    prompts. loss: mean negative log probability of the completion's tokens (nats) under the steered model,
    before temperature, penalties, top-k and top-p; NaN for beams and guidance_scale.
    Raises ValueError for no prompts, a prompt that is too long for the model, a count below 1 or an
    impossible setting, and what the steers raise.
    """
    tokenizer, model = own_tokenizer(model, tokenizer), hf.unwrapped(model)
    hf.require_evaluation(model)
    prompts, steers = prompt_texts(tokenizer, prompts, special_tokens=special_tokens), as_list(steer)
    seed = int(torch.randint(2**31, ())) if seed is None else seed
    reads_prompt = any(getattr(one, "reads_prompt", False) for one in steers)
    if reads_prompt and model.generation_config.cache_implementation:  # PPLM needs one that grows
        sampling = {"cache_implementation": "dynamic"} | sampling
    sampling = all_settings(model, sampling)
    require_settings(prompts, num_samples=num_samples, batch_size=batch_size, seed=seed, **sampling)
    if steers and sampling.get("guidance_scale") not in (None, 1):
        raise ValueError("guidance_scale reads texts without their prompts, where no steer knows its place")
    rows = text_ids(tokenizer, prompts, as_data=not special_tokens)
    require_readable(model, rows, sampling["max_new_tokens"])
    streams, done = random_streams(prompts, num_samples, seed, earlier), {}
    bar = progress(len(prompts) * num_samples)
    with all_on(steers, model, tokenizer), bar:
        for chosen in by_length(model, rows, max(1, batch_size // num_samples)):
            batch = batch_of(model, [rows[i] for i in chosen], "left")
            with hooks.batch(prompt_lengths=batch["attention_mask"].sum(1), texts=chosen, of=len(prompts)):
                cache = None if reads_prompt else prefill(model, batch, sampling)
                for samples in chunks(range(num_samples), max(1, batch_size // len(chosen))):
                    keys = [(i, s) for i in chosen for s in samples]
                    own = [streams[key] for key in keys]
                    found = continue_batch(model, tokenizer, batch, cache, own, **sampling)
                    done |= zip(keys, found, strict=True)
                    bar.update(len(found))
    table = [(prompts[i], s, text, bool(steers), loss) for (i, s), (text, loss) in sorted(done.items())]
    return pd.DataFrame(table, columns=["prompt", "sample", "completion", "steered", "loss"])


def compare(
    model: Model,
    tokenizer: Tokenizer,
    prompts: Prompts,
    *,
    steer: Steers,
    seed: int | None = None,
    **how: Any,
) -> pd.DataFrame:
    """`generate` without, then with the steer, from the same random numbers; see the column `steered`."""
    seed = int(torch.randint(2**31, ())) if seed is None else seed
    sides = [generate(model, tokenizer, prompts, steer=one, seed=seed, **how) for one in (None, steer)]
    return pd.concat(sides, ignore_index=True)


def as_list(steer: Steers) -> list[Steer]:
    """One steer, several or none, as a list."""
    return [] if steer is None else list(steer) if isinstance(steer, Iterable) else [steer]


@contextmanager
def all_on(steer: Steers, model: Model, tokenizer: Tokenizer) -> Iterator[None]:
    """While inside, the model is steered, by one steer or by several at once.

    Steers that share a `sums_as` are summed, and what their `+` raises is raised. Others act at different
    places, or add to what is there, so that their order makes no difference.
    """
    sums: dict[Any, Steer] = {}
    for i, one in enumerate(as_list(steer)):
        key = getattr(one, "sums_as", i)
        sums[key] = sums[key] + one if key in sums else one
    each = [partial(one.on, model, tokenizer) for one in sums.values()]
    with hooks.alone(hf.unwrapped(model)), hf.nested(each):
        yield


def random_streams(
    prompts: Sequence[str], num_samples: int, seed: int, earlier: Mapping[str, int] | None = None
) -> dict[tuple[int, int], np.random.Generator]:
    """A random generator for sample s of prompt i, seeded by the seed, the prompt, and its samples so far."""
    seen, streams = Counter(earlier), {}
    for i, prompt in enumerate(prompts):
        for s in range(num_samples):
            streams[i, s] = np.random.default_rng([seed, zlib.crc32(prompt.encode()), seen[prompt]])
            seen[prompt] += 1
    return streams


def all_settings(model: Model, given: Mapping[str, Any]) -> dict[str, Any]:
    """The settings by name: those given, then those of a given generation_config, then the model's own."""
    given = dict(given)
    configs = model.generation_config, given.pop("generation_config", GenerationConfig())
    stored, own = (
        {k: v for k, v in vars(one).items() if v is not None and k not in NO_SETTINGS} for one in configs
    )
    for name in ("max_length", "max_new_tokens"):
        stored.pop(name, None)
    if hf.new_cache(model) is None:  # RWKV, with its own kind of cache, mixes up the rows of a batch
        stored["use_cache"] = False
    found = {"max_new_tokens": 40} | stored | own | given
    greedy = found.get("do_sample") is False  # then transformers, too, takes no account of these
    unused = {name for name in ("temperature", "top_k", "top_p") if greedy and name not in given | own}
    return {name: value for name, value in found.items() if name not in unused}


def by_length(model: Model, rows: Sequence[Sequence[int]], size: int) -> Iterator[Sequence[int]]:
    """Indices of texts [N] in batches of near-equal lengths; of equal ones where padding changes a text."""
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    with hooks.alone(model), hooks.unsteered():
        apart = len({len(row) for row in rows}) > 1 and probing.padding_changes(model)
    same = groupby(order, key=lambda i: len(rows[i])) if apart else [(None, order)]
    return (batch for _, group in same for batch in chunks(list(group), size))


@hf.no_grad
def prefill(model: Model, batch: BatchEncoding, settings: Mapping[str, Any]) -> Cache | None:
    """The KV cache after all but the last token of each prompt, which `model.generate` needs as input.

    None where samples cannot share it: a text of one token, beams, and caches without keys.
    """
    ids, mask, cache = batch["input_ids"], batch["attention_mask"], hf.new_cache(model)
    ours = settings.get("cache_implementation") is None and settings.get("use_cache") is not False
    if not ours or (settings.get("num_beams") or 1) > 1 or ids.shape[1] == 1 or not hf.counts_tokens(cache):
        return None
    hf.forward(model, ids[:, :-1], mask[:, :-1], past_key_values=cache, use_cache=True)
    return cache


def continue_batch(
    model: Model,
    tokenizer: Tokenizer,
    batch: BatchEncoding,
    cache: Cache | None,
    streams: Sequence[np.random.Generator],
    *,
    max_new_tokens: int,
    do_sample: bool = True,
    logits_processor: several(callable, "a list of logits processors") = (),
    **settings: Any,
) -> list[tuple[str, float]]:
    """Text and loss of the completions of B prompts, `len(streams) / B` of each, prompt by prompt."""
    times = len(streams) // len(batch["input_ids"])
    ids, mask = (batch[name].repeat_interleave(times, dim=0) for name in ("input_ids", "attention_mask"))
    sampling = {name: settings.pop(name) for name in list(settings) if name in SAMPLING}
    processors = sampling_processors(mask, **({} if do_sample else {"top_p": 1.0}) | sampling)
    processors.extend(logits_processor)
    if do_sample:
        uniforms = np.stack([stream.random(max_new_tokens, dtype=np.float32) for stream in streams])
        processors.append(Draw(torch.from_numpy(uniforms).to(ids.device), ids.shape[1]))
    processors.append(losses := TokenLosses())
    if cache is not None:
        settings[hf.cache_name(model)] = hf.repeated(cache, len(batch["input_ids"]), times)
    settings = {"repetition_penalty": 1.0} | settings  # else one stored with the model comes on top of ours
    if settings.get("stop_strings"):
        settings["tokenizer"] = tokenizer
    with hf.hooked(model, losses.note):
        rows = model.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=max_new_tokens,
            do_sample=False,  # greedy search takes the token that `Draw` has sampled
            logits_processor=processors,
            **settings,
        )
    if not losses.finite:
        raise ValueError("the logits are not finite: lower the steer's strength or load with dtype='float32'")
    texts = _new_text(tokenizer, rows, ids.shape[1])
    # Beams change places at every step, so their losses mix; guidance mixes two distributions.
    if (settings.get("num_beams") or 1) > 1 or settings.get("guidance_scale") not in (None, 1):
        return [(text, math.nan) for text in texts]
    ends = settings.get("eos_token_id", model.generation_config.eos_token_id)
    return list(zip(texts, losses.means(rows[:, ids.shape[1] :], ends).tolist(), strict=True))


def _new_text(tokenizer: Tokenizer, rows: Tensor, prompt_tokens: int) -> list[str]:
    """The text after the prompt in token ids [B, T], without special tokens at its end and padding."""
    special, nothing = set(tokenizer.all_special_ids), {tokenizer.pad_token_id, tokenizer.unk_token_id}
    texts = []
    for row in rows.tolist():
        while len(row) > prompt_tokens and row[-1] in special:
            row.pop()
        new = [token for token in row[prompt_tokens:] if token not in nothing]
        prompt, whole = (tokenizer.decode(row[:prompt_tokens] + ids) for ids in ([], new))
        texts.append(whole[len(prompt) :])  # decoded alone, it could lose its first space
    return texts


def chunks(items: Sequence, size: int) -> Iterator[Sequence]:
    require(size >= 1, "at least 1", batch_size=size)
    return (items[i : i + size] for i in range(0, len(items), size))


def progress(total: int, unit: str = "completion") -> tqdm:
    """A progress bar that disappears at the end; none in continuous integration or with TQDM_DISABLE=1."""
    quiet = any(os.environ.get(name, "0") != "0" for name in ("CI", "TQDM_DISABLE"))
    return tqdm(total=total, unit=unit, leave=False, disable=quiet)


def require_settings(
    prompts: Sequence[str],
    *,
    num_samples: int,
    batch_size: int,
    seed: int,
    max_new_tokens: int,
    do_sample: bool = True,
    **sampling: Any,
) -> None:
    """ValueError for no prompts, a count below 1, a negative seed, or a setting that does not fit a table."""
    require(len(prompts) >= 1, "at least one", prompts=prompts)
    counts = {"num_samples": num_samples, "batch_size": batch_size, "max_new_tokens": max_new_tokens}
    for name, number in counts.items():
        require(number >= 1, "at least 1", **{name: number})
    require(seed >= 0, "at least 0", seed=seed)
    instead = {
        "num_return_sequences": "give num_samples",
        "return_dict_in_generate": "call model.generate inside steer.on(model)",
        "max_length": "give max_new_tokens",
    }
    speculative = ("assistant_model", "prompt_lookup_num_tokens", "assistant_early_exit", "use_mtp")
    instead |= dict.fromkeys(speculative, "each pass writes one token, with its own random number")
    if do_sample:
        own = "give its class in logits_processor=[…]"
        instead |= dict.fromkeys(("min_p", "typical_p", "top_h", "epsilon_cutoff", "eta_cutoff"), own)
        instead["num_beams"] = "beams search instead of sampling, so add do_sample=False"
    neutral = {"num_return_sequences": 1, "num_beams": 1, "typical_p": 1.0}
    for name, what in instead.items():
        if sampling.get(name) not in (None, False, 0, neutral.get(name)):
            raise ValueError(f"{name}={sampling[name]!r} does not fit a table of sampled texts: {what}")
