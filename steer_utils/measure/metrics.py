"""Numbers about texts and next-token distributions: topic words, perplexity, KL, and intervals for them."""

import re
from collections.abc import Callable, Collection, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from scipy import stats
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .. import hf
from ..generation import Steer
from ..models import encode, own_tokenizer, pad, token_ids

ROOM = 2**25  # logits computed at a time: 128 MB in float32


def word_count(text: str, words: Collection[str], *, case_sensitive: bool = False) -> int:
    """How many of the text's words (runs of letters, digits and "_") are in `words`."""
    fold = str if case_sensitive else str.lower
    wanted = {fold(word) for word in words}
    return sum(word in wanted for word in re.findall(r"\w+", fold(text)))


def topic_hits(texts: Sequence[str], words: Collection[str]) -> np.ndarray:
    """Which texts have at least one of the words in them, in any case; [N] of bool.

    An entry of several words ("black hole") is there if these follow each other, whatever stands between.
    ValueError for no words, or one without a letter or digit.
    """
    wanted = [_spaced(word) for word in words]
    if not wanted or not all(map(str.strip, wanted)):
        raise ValueError(f"a topic needs words, each with letters or digits, not {list(words)!r}")
    return np.array([any(word in _spaced(text) for word in wanted) for text in texts], dtype=bool)


def _spaced(text: str) -> str:
    """The words of a text, in lower case, one space before, between and after."""
    return " ".join(["", *re.findall(r"\w+", text.lower()), ""])


def distinct(text: str, n: int) -> float:
    """Distinct-n of one text: different runs of n words, over all such runs; 1 for a text of fewer words.

    Words are runs of letters, digits and "_" in lower case. Source: Li et al., NAACL 2016. What LM-Steer's
    tables call dist-n is another number: `group_metrics.distinct_of_group`.
    """
    words = re.findall(r"\w+", text.lower())
    runs = list(zip(*(words[i:] for i in range(n)), strict=False))
    return len(set(runs)) / len(runs) if runs else 1.0


def repetition(text: str, n: int = 4) -> float:
    """Share of the runs of n words that stood in the text before; 0 for a text of fewer words.

    It is 1 − `distinct`, there under the name seq-rep-n for runs of tokens. Source: Welleck et al., Neural
    Text Generation with Unlikelihood Training, ICLR 2020, section 6.1, whose n is 4 as well.
    """
    return 1 - distinct(text, n)


class Interval(NamedTuple):
    """A mean and the interval that holds it."""

    mean: float
    low: float
    high: float

    def __format__(self, spec: str) -> str:
        return f"{self.mean:{spec}} [{self.low:{spec}}, {self.high:{spec}}]"


def bootstrap(values: Sequence[float], *, level: float = 0.95, seed: int = 0) -> Interval:
    """Mean of independent values, one for each prompt, with its percentile bootstrap interval.

    Samples of one prompt resemble each other, so average them first. ValueError for fewer than two values.
    """
    return bootstrapped((values,), np.mean, level=level, seed=seed)


def bootstrapped(
    columns: Sequence[Sequence[float]],
    statistic: Callable[..., np.ndarray],
    *,
    level: float = 0.95,
    seed: int = 0,
) -> Interval:
    """A statistic of columns [N], whose rows are independent, with its percentile bootstrap interval.

    statistic: of the columns, along an axis given as `axis`. ValueError for fewer than two rows.
    """
    columns = [np.asarray(column, dtype=float) for column in columns]
    if len(columns[0]) < 2:
        raise ValueError(f"an interval needs at least two prompts, not {len(columns[0])}")
    found = stats.bootstrap(
        columns,
        statistic,
        paired=len(columns) > 1,
        confidence_level=level,
        method="percentile",
        n_resamples=10_000,
        batch=max(1, 10**7 // len(columns[0])),  # all at once, 100,000 values would need 16 GB
        rng=seed,
    )
    return Interval(float(statistic(*columns, axis=0)), *map(float, found.confidence_interval))


# --- next-token distributions -----------------------------------------------------------------------------


def next_token_kl(steered: Tensor, plain: Tensor) -> Tensor:
    """KL(steered ‖ plain) of next-token distributions given as logits [..., V], in nats, [...]."""
    return kl_contributions(steered, plain).sum(dim=-1)


def kl_contributions(steered: Tensor, plain: Tensor) -> Tensor:
    """What each token adds to the KL, p · log(p / q) with p steered and q plain, [..., V] -> [..., V].

    Tokens that were cut, with steered logits of −inf, add nothing.
    """
    log_p, log_q = steered.log_softmax(dim=-1), plain.log_softmax(dim=-1)
    return torch.where(log_p == -torch.inf, 0.0, log_p.exp() * (log_p - log_q))


def effectiveness(steered: Tensor, plain: Tensor, tokens: Collection[int]) -> Tensor:
    """By how many nats steering raises the probability of a set of tokens; logits [..., V] -> [...].

    0 for an empty set. Source: the analysis of OpenWebText in Turner et al. 2023.
    """
    if not tokens:
        return steered.new_zeros(steered.shape[:-1])
    ids = torch.tensor(list(tokens), device=steered.device)
    log_p, log_q = (logits.log_softmax(dim=-1)[..., ids].logsumexp(dim=-1) for logits in (steered, plain))
    return log_p - log_q


def disruption(steered: Tensor, plain: Tensor, tokens: Collection[int]) -> Tensor:
    """The KL that a higher or lower probability of the set of tokens does not explain; [..., V] -> [...].

    It is the KL inside the set and the KL outside of it, each weighted by its steered probability. Source:
    as for `effectiveness`, whose companion it is.
    """
    log_p, log_q = steered.log_softmax(dim=-1), plain.log_softmax(dim=-1)
    inside = torch.zeros(steered.shape[-1], dtype=torch.bool, device=steered.device)
    inside[list(tokens)] = True
    total = steered.new_zeros(steered.shape[:-1])
    for part in (inside, ~inside):
        if part.any():
            p, q = log_p[..., part], log_q[..., part]
            total += (p.exp() * (p.log_softmax(dim=-1) - q.log_softmax(dim=-1))).sum(dim=-1)
    return total


@torch.no_grad()
def next_token_logits(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, prompts: Sequence[str]
) -> Tensor:
    """Logits [N, V] of the token after each prompt, in float32; steers that are on are felt."""
    batch = encode(own_tokenizer(model, tokenizer), prompts, device=model.device)
    model = hf.unwrapped(model)
    return hf.logits(model, hf.forward(model, **batch).last_hidden_state[:, -1]).float()


# --- texts ------------------------------------------------------------------------------------------------


@torch.no_grad()
def token_log_probs(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    texts: Sequence[str | Sequence[int]],
    *,
    batch_size: int = 64,
) -> list[Tensor]:
    """Log probability in nats of each token after BOS, [T_i − 1] for each text; steers that are on are felt.

    texts: strings, or token ids with BOS in front.
    """
    tokenizer, model = own_tokenizer(model, tokenizer), hf.unwrapped(model)
    rows = [token_ids(tokenizer, text) if isinstance(text, str) else list(text) for text in texts]
    found: list[Tensor] = []
    for i in range(0, len(rows), batch_size):
        batch = pad(rows[i : i + batch_size], rows[i][0], padding_side="right", device=model.device)
        hidden = hf.forward(model, **batch).last_hidden_state
        width = hidden.shape[1] * len(hf.lm_head(model).weight)
        for part in torch.arange(len(hidden)).split(max(1, ROOM // width)):
            with hf.batch(texts=(part + i).tolist(), of=len(rows)):
                log_probs = hf.logits(model, hidden[part, :-1]).float().log_softmax(dim=-1)
            of_next = log_probs.gather(2, batch["input_ids"][part, 1:, None])[..., 0].cpu()
            found += [of_row[: len(rows[i + j]) - 1] for j, of_row in zip(part, of_next, strict=True)]
    return found


def log_prob_gains(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    texts: Sequence[str | Sequence[int]],
    steer: Steer,
    *,
    skip: int = 0,
    batch_size: int = 64,
) -> list[Tensor]:
    """By how many nats a steer raises the log probability of each token, [T_i − 1 − skip] for each text.

    skip: predictions to leave out at the start; with the length of an activation addition, those made where
    it was added. exp(−mean of the gains) is the perplexity ratio, steered over plain, of Turner et al. 2023.
    """
    with hf.unsteered():
        before = token_log_probs(model, tokenizer, texts, batch_size=batch_size)
    with steer.on(model, tokenizer):
        after = token_log_probs(model, tokenizer, texts, batch_size=batch_size)
    return [(with_it - without)[skip:] for with_it, without in zip(after, before, strict=True)]


def completion_log_probs(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    prompts: Sequence[str | Sequence[int]],
    completions: Sequence[str | Sequence[int]],
    *,
    batch_size: int = 64,
) -> list[Tensor]:
    """Log probability (nats) of each token of each completion after its prompt, under the plain model, [T_i].

    Strings are tokenised as one text, and what counts are the tokens after their common beginning with the
    prompt's own. Token ids are taken as they are, BOS in front of a prompt if it should have one.
    ValueError for different numbers of prompts and completions.
    """
    tokenizer = own_tokenizer(model, tokenizer)
    pairs = rows_of_ids(tokenizer, prompts, completions)
    with hf.unsteered():
        found = token_log_probs(model, tokenizer, [row for row, _ in pairs], batch_size=batch_size)
    return [log_probs[start - 1 :] for log_probs, (_, start) in zip(found, pairs, strict=True)]


def perplexity(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    prompts: Sequence[str | Sequence[int]],
    completions: Sequence[str | Sequence[int]],
    *,
    batch_size: int = 64,
) -> np.ndarray:
    """Perplexity of each completion given its prompt under the plain model, [N]; NaN for an empty one.

    Arguments, and which tokens count, as for `completion_log_probs`.
    """
    found = completion_log_probs(model, tokenizer, prompts, completions, batch_size=batch_size)
    return np.array([(-log_probs.mean()).exp().item() for log_probs in found])


def rows_of_ids(
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str | Sequence[int]],
    completions: Sequence[str | Sequence[int]],
) -> list[tuple[list[int], int]]:
    """The token ids of each prompt and completion as one row, and at which of them the completion begins.

    Arguments and errors as for `completion_log_probs`.
    """
    if isinstance(prompts, str) or isinstance(completions, str) or len(prompts) != len(completions):
        sizes = (
            f"{type(prompts).__name__} of {len(prompts)}, {type(completions).__name__} of {len(completions)}"
        )
        raise ValueError(f"give a prompt for each completion, in two lists of equal length, not {sizes}")
    return [_joined(tokenizer, *pair) for pair in zip(prompts, completions, strict=True)]


def _joined(
    tokenizer: PreTrainedTokenizerBase, prompt: str | Sequence[int], completion: str | Sequence[int]
) -> tuple[list[int], int]:
    """The token ids of prompt and completion as one row, and at which of them the completion begins."""
    if not isinstance(prompt, str):
        return [*prompt, *completion], len(prompt)
    row = token_ids(tokenizer, prompt + completion)
    return row, _common(row, token_ids(tokenizer, prompt))


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """The length of the common beginning of two rows of token ids."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(one), len(other)))


def best_of(
    table: pd.DataFrame, scores: Sequence[float], *, min_distinct: float = 0.0, r: int | None = None
) -> pd.DataFrame:
    """For each prompt, the completion with the highest score among its first r that do not repeat themselves.

    table: from `su.generate`; a prompt's rows are consecutive samples, so a prompt given twice counts as two.
    scores: one for each row, such as `su.attribute_scores`; NaN is missing and never the best. min_distinct:
    the least mean of distinct-1, -2 and -3; where no completion of a prompt reaches it, the most distinct wins.
    Returns one row for each prompt, in order, with columns `score` and `distinct` added. ValueError for another
    number of scores, for r below 1, and for a prompt whose scores are all missing.
    Source: Dathathri et al. 2020, section 4.
    """
    if len(scores) != len(table):
        raise ValueError(f"{len(scores)} scores for {len(table)} completions: give one for each")
    if r is not None and r < 1:
        raise ValueError(f"r must be at least 1, not {r}")
    starts = (table["sample"].diff() <= 0) | (table["prompt"] != table["prompt"].shift())
    spread = [np.mean([distinct(text, n) for n in (1, 2, 3)]) for text in table["completion"]]
    ranked = table.assign(score=np.asarray(scores, dtype=float), distinct=spread, group=starts.cumsum())
    ranked = ranked[ranked["sample"] < (r or np.inf)]
    if missing := ranked.loc[ranked.groupby("group")["score"].transform("count") == 0, "prompt"].tolist():
        raise ValueError(f"no completion of the prompt {missing[0]!r} has a score: all are NaN")
    ranked = ranked.dropna(subset=["score"])
    order = np.where(ranked["distinct"] >= min_distinct, np.inf, ranked["distinct"])
    ranked = ranked.assign(order=order).sort_values(["order", "score"], ascending=False, kind="stable")
    best = ranked.groupby("group").head(1).sort_values("group")
    return best.drop(columns=["order", "group"]).reset_index(drop=True)
