"""Metrics of texts and of next-token distributions: topic words, perplexity, KL, and their intervals.

Samples of one prompt resemble each other, so every interval is a 95 % bootstrap over prompts.
Shapes: N texts or prompts, B batch, T tokens, P cached positions, V vocabulary.
"""

import math
import re
from collections.abc import Callable, Collection, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from scipy import stats
from torch import Tensor
from transformers import Cache

from .. import hf, hooks, models
from ..generation import by_length
from ..models import Model, Prompts, Texts, Tokenizer, own_tokenizer, text_ids, token_ids
from ..types import holds, require, require_columns, shown

_words = re.compile(r"\w+").findall


def word_count(texts: Sequence[str], words: Collection[str], *, case_sensitive: bool = False) -> np.ndarray:
    """How often each text contains an entry of `words`, [N].

    Words are runs of letters, digits and "_". An entry of several words ("black hole") counts where they
    follow each other, whatever punctuation is between them. Duplicate entries count once.
    ValueError for an entry without a letter or digit.
    """
    fold = str if case_sensitive else str.lower
    entries = {tuple(_words(fold(entry))) for entry in words}
    if () in entries:
        raise ValueError(f"every entry needs a letter or a digit: {list(words)!r}")
    lengths = set(map(len, entries))
    runs = ([run for n in lengths for run in neighbours(_words(fold(text)), n)] for text in texts)
    return np.array([sum(run in entries for run in one) for one in runs], dtype=int)


def distinct(text: str, n: int) -> float:
    """Distinct-n of one text: the share of different runs of n words, in any case; 1 for fewer words.

    Source: Li et al., NAACL 2016. LM-Steer's dist-n is another number, `evaluate.distinct_of_group`.
    """
    runs = neighbours(_words(text.lower()), n)
    return len(set(runs)) / len(runs) if runs else 1.0


def neighbours(words: Sequence[str], n: int) -> list[tuple[str, ...]]:
    """All runs of n neighbouring words; ValueError for n below 1."""
    require(n >= 1, "at least 1", n=n)
    return list(zip(*(words[i:] for i in range(n)), strict=False))


class Interval(NamedTuple):
    """A mean and its 95 % confidence interval."""

    mean: float
    low: float
    high: float

    def __format__(self, spec: str) -> str:
        return f"{self.mean:{spec}} [{self.low:{spec}}, {self.high:{spec}}]"


def bootstrap(values: Sequence[float] | Sequence[bool]) -> Interval:
    """Mean of values, one for each prompt (average its samples first); ValueError for NaN, fewer than two."""
    require(not np.isnan(np.asarray(values, dtype=float)).any(), "without NaN", values=values)
    return bootstrapped((np.asarray(values, dtype=float),), np.mean)


def bootstrapped(columns: Sequence[Sequence[float]], statistic: Callable[..., np.ndarray]) -> Interval:
    """A statistic of columns [N] and its percentile bootstrap interval; position i of each is prompt i.

    statistic: a function of the columns that reduces the axis `axis`. ValueError for fewer than two prompts.
    """
    columns = [np.asarray(column, dtype=float) for column in columns]
    if (count := len(columns[0]) if columns else 0) < 2:
        raise ValueError(f"an interval needs at least two prompts, not {count}")
    batch = max(1, 10**7 // len(columns[0]))  # all at once, 100,000 values would need 16 GB
    how = {"method": "percentile", "n_resamples": 10_000, "batch": batch, "rng": 0}
    found = stats.bootstrap(columns, statistic, paired=len(columns) > 1, **how)
    return Interval(float(statistic(*columns, axis=0)), *map(float, found.confidence_interval))


def ratio(sums: Sequence[float], counts: Sequence[float]) -> Interval:
    """Σ sums / Σ counts, one of each for a prompt; ValueError for fewer than two prompts.

    Prompts with a count of 0 are left out. If one prompt remains, the ends of the interval are NaN.
    """
    if len(sums) != len(counts):
        raise ValueError(f"give as many sums as counts, not {len(sums)} and {len(counts)}")
    kept = [(one, count) for one, count in zip(sums, counts, strict=True) if count]
    if len(kept) < 2 <= len(sums):
        return Interval(kept[0][0] / kept[0][1] if kept else math.nan, math.nan, math.nan)
    columns = np.reshape(kept, (-1, 2)).T
    return bootstrapped(columns, lambda a, b, axis: a.sum(axis) / b.sum(axis))


def wrong_way(unsteered: Sequence[float], steered: Sequence[float]) -> Interval:
    """Share of prompts whose score [N] fell although the steer was to raise it; ValueError for NaN.

    For a steer that is to lower a score, give negatives. Source: Tan et al. 2024.
    """
    before, after = np.asarray(unsteered, dtype=float), np.asarray(steered, dtype=float)
    if before.shape != after.shape or np.isnan(before + after).any():
        given = f"{before.tolist()} and {after.tolist()}"
        raise ValueError(f"give two scores of each prompt, none of them NaN, not {given}")
    return bootstrap(after < before)


def next_token_kl(steered: Tensor, unsteered: Tensor) -> Tensor:
    """KL(steered ‖ unsteered) in nats, [...], from logits [..., V]; tokens cut to −inf add nothing."""
    fits = steered.shape == unsteered.shape and holds("float", steered) and holds("float", unsteered)
    require(fits, f"logits like the unsteered ones, {shown(unsteered)}", steered=steered)
    log_p, log_q = steered.log_softmax(dim=-1), unsteered.log_softmax(dim=-1)
    return torch.where(log_p == -torch.inf, 0.0, log_p.exp() * (log_p - log_q)).sum(dim=-1)


@hf.no_grad
def next_token_logits(model: Model, tokenizer: Tokenizer, prompts: Prompts) -> Tensor:
    """Logits [N, V] of the token after each prompt, in float32, with all steers that are on."""
    tokenizer, model = own_tokenizer(model, tokenizer), hf.unwrapped(model)
    rows, found = text_ids(tokenizer, models.prompt_texts(tokenizer, prompts)), {}
    require(len(rows) >= 1, "at least one", prompts=rows)
    models.require_readable(model, rows)
    for chosen in by_length(model, rows, len(rows)):
        batch = models.batch_of(model, [rows[i] for i in chosen], "left")
        with hooks.alone(model), hooks.batch(texts=chosen, of=len(rows)):
            found |= zip(chosen, last_logits(model, *batch.values(), hf.new_cache(model)), strict=True)
    return torch.stack([found[i] for i in range(len(rows))])


def last_logits(model: Model, ids: Tensor, attention_mask: Tensor, cache: Cache | None) -> Tensor:
    """Logits [B, V] after ids [B, T], with all steers that are on; extends the cache. Mask: [B, P + T]."""
    how = {"attention_mask": attention_mask, "past_key_values": cache, "use_cache": cache is not None}
    if hooks.has_stand_in(model):  # only a call of the model itself gives PPLM's distribution
        return model(ids, **how).logits[:, -1].float()
    return hf.logits(model, hf.forward(model, ids, **how).last_hidden_state[:, -1]).float()


@hf.no_grad
def token_log_probs(
    model: Model, tokenizer: Tokenizer, texts: Texts, *, batch_size: int = 64
) -> list[Tensor]:
    """Log probability (nats) of each token after BOS, [T − 1] for each text, with all steers that are on.

    Errors of `models.text_ids`; ValueError inside `PPLM.on`, which `strength.forced` follows token by token.
    """
    tokenizer, model = own_tokenizer(model, tokenizer), hf.unwrapped(model)
    if hooks.has_stand_in(model):
        raise ValueError("PPLM is on, and cannot score a text in one pass: use measure.strength.forced")
    rows, found = text_ids(tokenizer, texts), {}
    models.require_readable(model, rows)
    for chosen in by_length(model, rows, batch_size):
        batch = models.batch_of(model, [rows[i] for i in chosen], "right")
        with hooks.alone(model):
            hidden = hf.forward(model, **batch).last_hidden_state
        per_row = hidden.shape[1] * len(hf.lm_head(model).weight)
        for part in torch.arange(len(hidden)).split(max(1, hf.LOGITS_AT_ONCE // per_row)):
            some = [chosen[j] for j in part]
            with hooks.alone(model), hooks.batch(texts=some, of=len(rows)):
                log_probs = hf.logits(model, hidden[part, :-1]).float().log_softmax(dim=-1)
            of_next = log_probs.gather(2, batch["input_ids"][part, 1:, None])[..., 0].cpu()
            found |= {i: one[: len(rows[i]) - 1] for i, one in zip(some, of_next, strict=True)}
    return [found[i] for i in range(len(rows))]


def completion_log_probs(
    model: Model, tokenizer: Tokenizer, prompts: Texts, completions: Texts, *, batch_size: int = 64
) -> list[Tensor]:
    """Log probability (nats) of each token of a completion after its prompt, unsteered, [T] for each.

    Both are tokenised as one text; the completion begins at the first token that the prompt alone does not
    have. Token ids are used as they are. ValueError for unequal numbers of both and a prompt without ids.
    """
    rows = joined_ids(own_tokenizer(model, tokenizer), prompts, completions)
    with hooks.unsteered():
        found = token_log_probs(model, tokenizer, [ids for ids, _ in rows], batch_size=batch_size)
    return [one[start - 1 :] for one, (_, start) in zip(found, rows, strict=True)]


def perplexity(model: Model, tokenizer: Tokenizer, prompts: Texts, completions: Texts) -> np.ndarray:
    """Perplexity of each completion after its prompt under the unsteered model, [N]; NaN for an empty one."""
    found = completion_log_probs(model, tokenizer, prompts, completions)
    return np.array([(-log_probs.mean()).exp().item() for log_probs in found])


def joined_ids(tokenizer: Tokenizer, prompts: Texts, completions: Texts) -> list[tuple[list[int], int]]:
    """Token ids of each prompt with its completion, and the index at which the completion begins."""
    if len(prompts) != len(completions):
        sizes = f"{len(prompts)} and {len(completions)}"
        raise ValueError(f"give a prompt for each completion, in two lists of equal length, not {sizes}")
    found = []
    for prompt, completion, start in zip(prompts, completions, text_ids(tokenizer, prompts), strict=True):
        ids = token_ids(tokenizer, prompt + completion) if isinstance(prompt, str) else [*prompt, *completion]
        same = [one == other for one, other in zip(ids, start, strict=False)]
        found.append((ids, [*same, False].index(False)))
    return found


def best_of(table: pd.DataFrame, scores: Sequence[float], *, min_distinct: float = 0.0) -> pd.DataFrame:
    """For each prompt, the completion with the highest score among those that do not repeat themselves.

    table: from `su.generate`; a prompt given twice counts as two. scores: one for each completion; NaN is
    never the best. min_distinct: the least mean of distinct-1, -2 and -3; where no completion reaches it, the
    most distinct one wins. Adds columns `score` and `distinct`. ValueError for another number of scores and a
    prompt whose scores are all NaN. Source: Dathathri et al. 2020, section 4.
    """
    require_columns(table, "prompt", "sample", "completion")
    require(0 <= min_distinct <= 1, "at least 0 and at most 1", min_distinct=min_distinct)
    if len(scores) != len(table):
        raise ValueError(f"give {len(table)} scores, one for each completion, not {len(scores)}")
    starts = (table["sample"].diff() <= 0) | (table["prompt"] != table["prompt"].shift())
    spread = [np.mean([distinct(text, n) for n in (1, 2, 3)]) for text in table["completion"]]
    ranked = table.assign(score=np.asarray(scores, dtype=float), distinct=spread, group=starts.cumsum())
    if missing := ranked.loc[ranked.groupby("group")["score"].transform("count") == 0, "prompt"].tolist():
        raise ValueError(f"no completion of the prompt {missing[0]!r} has a score: all are NaN")
    ranked = ranked.assign(enough=ranked["distinct"].clip(upper=min_distinct)).dropna(subset="score")
    ranked = ranked.sort_values(["group", "enough", "score"], ascending=[True, False, False])
    return ranked.drop_duplicates("group").drop(columns=["enough", "group"]).reset_index(drop=True)
