"""Trials: what a steer writes after some prompts, what judges say of it, and how surprising it is.

    write = partial(trial, model, tokenizer, prompts, judges={"VADER": su.judges.vader()}, num_samples=4)
    trials = {"unsteered": write(), "love − hate": write(pair), "a prompt": write(shown="Smile. {}".format)}
    outcomes(trials)

Trials with one seed draw from the same random numbers, so their completions are matched pairs, and the
difference of two trials has a narrower interval than each of them. Intervals are over prompts.
"""

import math
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import pandas as pd

from ..generation import Steers, generate
from ..models import Messages, Model, Tokenizer
from ..types import by_name, require, require_columns
from .metrics import Interval, bootstrap, perplexity

Judges = by_name(callable, "judges by name")
Trials = by_name(lambda value: isinstance(value, pd.DataFrame), "tables by name")
LOSS = "log perplexity"


def trial(
    model: Model,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    steer: Steers | Callable[[int], Steers] = None,
    *,
    judges: Judges,
    shown: Callable[[str], str | Messages] = str,
    num_samples: int = 1,
    seed: int = 0,
    **settings: Any,
) -> pd.DataFrame:
    """Completions of each prompt, their log perplexity under the unsteered model, and each judge's scores.

    steer: one or several as for `generate`, or a function from a sample's number to them, which gives each
    sample another random steer; these samples are no matched pairs. shown: what the model reads in place of
    a prompt, for a baseline that says in words what to write. Judges see the completion alone, and its
    perplexity is that after the prompt itself. settings: those of `generate`.
    Returns its table with the columns "log perplexity", NaN for an empty completion, and one for each judge.
    """
    read = [shown(prompt) for prompt in prompts]
    write = partial(generate, model, tokenizer, read, **settings)
    if callable(steer) and not hasattr(steer, "on"):
        draws = [write(steer=steer(i), seed=seed + i).assign(sample=i) for i in range(num_samples)]
        table = pd.concat(draws).sort_index(kind="stable", ignore_index=True)
    else:
        table = write(steer=steer, num_samples=num_samples, seed=seed)
    return scored(model, tokenizer, table.assign(prompt=np.repeat(list(prompts), num_samples)), judges)


def scored(model: Model, tokenizer: Tokenizer, table: pd.DataFrame, judges: Judges) -> pd.DataFrame:
    """A table of completions, such as a sweep's, with their log perplexity and each judge's scores."""
    texts = table["completion"].tolist()
    table = table.assign(**{LOSS: np.log(perplexity(model, tokenizer, table["prompt"].tolist(), texts))})
    return table.assign(**{name: np.asarray(judge(texts), dtype=float) for name, judge in judges.items()})


def cells(table: pd.DataFrame, baseline: pd.DataFrame, by: Sequence[str]) -> pd.DataFrame:
    """The `outcome` of each cell of a scored sweep beside an unsteered trial of the same prompts.

    by: the columns that name a cell, such as ["act_name", "coeff"]; the index of the table of intervals.
    """
    found = {key: outcome(part, baseline) for key, part in table.groupby(list(by), sort=False)}
    index = pd.MultiIndex.from_tuples(found, names=by)
    return pd.DataFrame(found.values(), index=index)


def best_cell(cells: pd.DataFrame, bound: float) -> Any:
    """The name of the cell that judges count most often, on average, of those up to a perplexity ratio.

    cells: from `cells`, or `outcomes`. ValueError if no cell has a ratio of `bound` or less, with the least.
    """
    means = cells.map(lambda one: one.mean if isinstance(one, Interval) else math.nan)
    ratios = means.pop("perplexity ratio")
    if not (ratios <= bound).any():
        least = f"{ratios.min():.2f}, of {ratios.idxmin()}"
        raise ValueError(f"no cell has a perplexity ratio of {bound} or less: the least is {least}")
    return means[ratios <= bound].mean(axis=1).idxmax()


def by_prompt(table: pd.DataFrame, column: str) -> np.ndarray:
    """The mean of a column over each prompt's completions, [prompts]; of a judge, the share above one half.

    A score of exactly one half counts as half. The log perplexity is averaged as it is, without NaN.
    """
    require_columns(table, "sample", column)
    said = table[column] if column == LOSS else np.heaviside(table[column] - 0.5, 0.5)
    starts = table["sample"].diff().fillna(-1) <= 0  # a prompt given twice is two
    return said.groupby(starts.cumsum()).mean().to_numpy()


def outcome(table: pd.DataFrame, baseline: pd.DataFrame) -> dict[str, Interval | int]:
    """The share that each judge counts, and "perplexity ratio" to the baseline (geometric mean), by name.

    "NAME: missing" counts the completions that a judge gave no score, if any; they are left out.
    """
    require_columns(table, LOSS)
    judges = table.columns[table.columns.get_loc(LOSS) + 1 :]
    shares = {name: _mean(by_prompt(table, name)) for name in judges}
    more = by_prompt(table, LOSS) - by_prompt(baseline, LOSS)
    missing = {f"{name}: missing": n for name in judges if (n := int(table[name].isna().sum()))}
    return shares | {"perplexity ratio": Interval(*np.exp(_mean(more)))} | missing


def _mean(values: np.ndarray) -> Interval:
    """The mean over prompts; those that no judge answered for, or with empty completions, are left out."""
    return bootstrap(values[~np.isnan(values)])


def outcomes(trials: Trials) -> pd.DataFrame:
    """The `outcome` of each trial as a table of intervals; the first trial is the baseline of all."""
    baseline = next(iter(trials.values()))
    return pd.DataFrame.from_dict({k: outcome(v, baseline) for k, v in trials.items()}, orient="index")


def difference(table: pd.DataFrame, other: pd.DataFrame, column: str) -> Interval:
    """The mean of `by_prompt` of one trial less that of another, with the interval of matched pairs."""
    more = by_prompt(table, column) - by_prompt(other, column)
    if column != LOSS and (missing := int(np.isnan(more).sum())):
        what = f"no score for {missing} of {len(more)} prompts, which are left out"
        warnings.warn(f"in a trial {column!r} has {what}", stacklevel=3)
    return _mean(more)


def differences(trials: Trials, baseline: str) -> pd.DataFrame:
    """The `difference` of each other trial less the baseline, a row each, with a column for each judge."""
    require(baseline in trials, f"one of {', '.join(trials)}", baseline=baseline)
    table = trials[baseline]
    judges = table.columns[table.columns.get_loc(LOSS) + 1 :]
    found = {k: [difference(v, table, one) for one in judges] for k, v in trials.items() if k != baseline}
    return pd.DataFrame.from_dict(found, orient="index", columns=judges)
