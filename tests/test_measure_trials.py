"""Trials: what is written, judged and compared, against the calls that they are made of."""

from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import tiny

import steer_utils as su
from steer_utils.course import tables
from steer_utils.measure import metrics, trials

UP = su.OffsetSteer(3 * torch.arange(97.0).sin()[None], epsilon=1.0).at(1)
PROMPTS = ["abc", "a", "abc"]
JUDGES = {"vowels": lambda texts: [np.mean([c in "aeiou" for c in one] or [0.5]) for one in texts]}
HOW = {"judges": JUDGES, "num_samples": 3, "max_new_tokens": 6, "seed": 4, "top_p": 1.0}


@pytest.fixture
def write(tokenizer):
    return partial(trials.trial, tiny("llama"), tokenizer, PROMPTS, **HOW)


def test_a_trial_is_what_generate_writes_with_scores_and_the_unsteered_perplexity(write, tokenizer):
    found = write(UP)
    settings = {"num_samples": 3, "max_new_tokens": 6, "seed": 4, "top_p": 1.0}
    wanted = su.generate(tiny("llama"), tokenizer, PROMPTS, steer=UP, **settings)
    assert found["completion"].tolist() == wanted["completion"].tolist()
    assert found["vowels"].tolist() == JUDGES["vowels"](wanted["completion"])
    texts = wanted["prompt"].tolist(), wanted["completion"].tolist()
    assert np.allclose(found[trials.LOSS], np.log(metrics.perplexity(tiny("llama"), tokenizer, *texts)))


def test_a_function_gives_each_sample_its_own_steer_and_seed(write, tokenizer):
    found = write(lambda i: UP.at(i))
    for i in range(3):
        settings = {"max_new_tokens": 6, "seed": 4 + i, "top_p": 1.0}
        one = su.generate(tiny("llama"), tokenizer, PROMPTS, steer=UP.at(i), **settings)
        assert found.loc[found["sample"] == i, "completion"].tolist() == one["completion"].tolist()
    assert found["prompt"].tolist() == list(np.repeat(PROMPTS, 3))
    assert found["sample"].tolist() == [0, 1, 2] * 3


def test_what_is_shown_is_read_and_the_prompt_is_kept(write, tokenizer):
    found = write(shown="xyz {}".format)
    wanted = su.generate(
        tiny("llama"),
        tokenizer,
        [f"xyz {one}" for one in PROMPTS],
        num_samples=3,
        max_new_tokens=6,
        seed=4,
        top_p=1.0,
    )
    assert found["completion"].tolist() == wanted["completion"].tolist()
    assert found["prompt"].tolist() == list(np.repeat(PROMPTS, 3))
    texts = found["prompt"].tolist(), found["completion"].tolist()
    assert np.allclose(found[trials.LOSS], np.log(metrics.perplexity(tiny("llama"), tokenizer, *texts)))


def test_outcomes_average_prompts_and_compare_with_the_first_trial(write):
    found = {"unsteered": write(), "up": write(UP)}
    table, scores = trials.outcomes(found), found["up"]["vowels"].to_numpy().reshape(3, 3)
    shares = np.where(scores == 0.5, 0.5, scores > 0.5).mean(axis=1)
    assert table.loc["up", "vowels"] == metrics.bootstrap(shares)
    losses = [one[trials.LOSS].to_numpy().reshape(3, 3).mean(axis=1) for one in found.values()]
    assert np.allclose(table.loc["up", "perplexity ratio"].mean, np.exp(np.mean(losses[1] - losses[0])))
    assert table.loc["unsteered", "perplexity ratio"] == (1, 1, 1)
    paired = trials.difference(found["up"], found["unsteered"], "vowels")
    both = [
        np.where(one["vowels"] == 0.5, 0.5, one["vowels"] > 0.5).reshape(3, 3).mean(axis=1)
        for one in found.values()
    ]
    assert paired == metrics.bootstrap(both[1] - both[0])
    less = trials.differences(
        found | {"again": found["unsteered"].assign(vowels=1 - found["up"]["vowels"])}, "up"
    )
    assert less.loc["unsteered", "vowels"].mean == pytest.approx(-paired.mean)
    assert list(less.index) == ["unsteered", "again"]
    assert list(less.columns) == ["vowels"]


def test_an_empty_completion_has_no_perplexity_and_is_left_out_of_the_ratio(write):
    found = write()
    found.loc[0, trials.LOSS] = np.nan
    assert np.isfinite(trials.outcome(found, write())["perplexity ratio"]).all()


def test_a_prompt_without_a_score_is_left_out_of_the_mean(tokenizer):
    judges = {"half": lambda texts: [np.nan if i == 0 else 0.9 for i in range(len(texts))]}
    table = trials.trial(tiny("gpt2"), tokenizer, ["a", "b", "c"], judges=judges, max_new_tokens=2)
    assert trials.outcome(table, table)["half"] == (1.0, 1.0, 1.0)
    assert trials.outcome(table, table)["half: missing"] == 1
    whole = table.assign(half=[0.9, 0.1, 0.2])
    assert "half: missing" not in trials.outcome(whole, table)
    both = trials.outcomes({"whole": whole, "some": table})
    assert tables.intervals(both)["half: missing"].tolist() == ["–", "1"]
    cells = trials.cells(table.assign(cell=1), whole, ["cell"])
    assert cells["half: missing"].tolist() == [1]
    assert trials.best_cell(cells, 2.0) == (1,)
    for compare in (
        trials.difference,
        lambda *pair: trials.differences(dict(zip("ab", pair, strict=False)), "b"),
    ):
        with pytest.warns(UserWarning, match="'half' has no score for 1 of 3 prompts, which are left out"):
            compare(table, whole, "half")
    with pytest.raises(ValueError, match="values must be without NaN"):
        metrics.bootstrap(table["half"])


# --- sweeps -----------------------------------------------------------------------------------------------


def test_a_cell_of_a_sweep_has_the_outcome_of_its_own_trial(write, tokenizer):
    pair, settings = (
        su.get_x_vector("b", "c", coeff=1.0, act_name=0),
        {k: HOW[k] for k in HOW if k != "judges"},
    )
    prompts = ["abc", "acb", "bca"]
    table = su.sweep(
        tiny("llama"), tokenizer, prompts, pair, act_names=[2, 1], coeffs=[3.0, -1.0], **settings
    )
    unsteered = trials.trial(tiny("llama"), tokenizer, prompts, **HOW)
    found = trials.cells(
        trials.scored(tiny("llama"), tokenizer, table, JUDGES), unsteered, ["act_name", "coeff"]
    )
    assert found.index.tolist() == [(f"blocks.{n}.hook_resid_pre", c) for n in (2, 1) for c in (3.0, -1.0)]
    steer = [-1.0 * su.ActivationAddition(c, 1, text) for c, text in ((1.0, "b"), (-1.0, "c"))]
    alone = trials.outcome(trials.trial(tiny("llama"), tokenizer, prompts, steer, **HOW), unsteered)
    for name, interval in found.loc[("blocks.1.hook_resid_pre", -1.0)].items():
        assert np.allclose(interval, alone[name])


def test_the_best_cell_is_the_one_judged_most_often_within_the_bound():
    rows = {(6, 1.0): (0.5, 0.7, 1.1), (6, 2.0): (0.8, 0.8, 1.3), (9, 1.0): (0.9, 0.9, 1.31)}
    rows |= {(9, 2.0): (0.9, 0.5, 1.0), (9, 3.0): (1.0, 1.0, float("nan"))}
    frame = pd.DataFrame(rows, index=["VADER", "MiniLM", "perplexity ratio"]).T
    cells = frame.map(lambda mean: metrics.Interval(mean, mean, mean))
    assert trials.best_cell(cells, 1.3) == (6, 2.0)
    assert trials.best_cell(cells, 1.0) == (9, 2.0)
    assert trials.best_cell(cells, 1.31) == (9, 1.0)
    with pytest.raises(
        ValueError, match=r"no cell has a perplexity ratio of 0.9 or less: the least is 1.00, of \("
    ):
        trials.best_cell(cells, 0.9)
