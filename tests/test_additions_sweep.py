"""Sweeps: every cell against `generate`, what is computed, and sweeps that were stopped."""

import copy
import random
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import CONFIGS, assert_same_up_to_rounding, hook_count, logits, new_model, random_ids, tiny
from torch import Tensor
from transformers import LogitsProcessor, PreTrainedModel

import steer_utils as su
from steer_utils import generation, hf

PROMPTS = ["I hate you because", "abcdefg", "Once upon a time"]
SHORT = ["", "a", "Once upon a time", ""]
HOOKS = [2, "blocks.0.hook_mlp_out", "blocks.2.hook_resid_post", 0]
COEFFS = [2.0, 0.0, -1.5]
PAIR = su.get_x_vector("Love", "Hatred", coeff=1.5, act_name=5)  # the sweep moves it to its hooks
KINDS_OF_ADDITION = {
    "front": (PROMPTS, PAIR),
    "back and mid": (
        PROMPTS,
        [
            su.ActivationAddition(1.0, 1, "Love", addition_location="back", positions="all"),
            su.ActivationAddition(-2.0, 1, "Hi", addition_location="mid"),
            su.ActivationAddition(1.0, 1, "Hate", res_stream_slice=(3, 20)),
        ],
    ),
    "prompts of one token": (SHORT, [su.ActivationAddition(2.0, 0, "", positions="all")]),
}
GIVEN = {"act_names": HOOKS, "coeffs": COEFFS, "num_samples": 2, "max_new_tokens": 5, "seed": 3, "top_p": 1.0}


def cell_by_cell(
    model: PreTrainedModel, tokenizer, prompts, additions, act_names, coeffs, **settings
) -> pd.DataFrame:
    """The table of a sweep, made of one call of `generate` for each cell."""
    parts = []
    for hook in act_names:
        name = f"blocks.{hook}.hook_resid_pre" if isinstance(hook, int) else hook
        for coeff in coeffs:
            steer = [coeff * replace(addition, act_name=name) for addition in additions]
            table = su.generate(model, tokenizer, prompts, steer=steer, **settings)
            parts.append(table.drop(columns="steered").assign(act_name=name, coeff=float(coeff)))
    columns = ["act_name", "coeff", "prompt", "sample", "completion", "loss"]
    return pd.concat(parts, ignore_index=True)[columns]


class Stop(Exception):
    pass


class Stopping(LogitsProcessor):
    """Stops the sweep at a step of decoding."""

    def __init__(self, step: int) -> None:
        self.left = step

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.left -= 1
        if self.left < 0:
            raise Stop
        return scores


# --- the table --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS_OF_ADDITION)
def test_each_cell_is_what_generate_gives_with_its_steer_whatever_the_batches(main_model, tokenizer, kind):
    (prompts, additions), given = KINDS_OF_ADDITION[kind], GIVEN | {"coeffs": [2.0, -1.5]}
    expected = cell_by_cell(main_model, tokenizer, prompts, additions, **given)
    assert len(expected) == len(HOOKS) * 2 * len(prompts) * 2
    for batch_size in (64, 5):
        found = su.sweep(main_model, tokenizer, prompts, additions, batch_size=batch_size, **given)
        assert_same_up_to_rounding(found, expected)


@pytest.mark.parametrize(
    "sampling",
    [
        {},
        {"temperature": 0.6, "freq_penalty": 1.0, "top_p": 0.7},
        {"repetition_penalty": 1.3, "top_k": 9},
        {"do_sample": False},
    ],
)
def test_settings_of_sampling_are_those_of_generate(tokenizer, sampling):
    given = {"act_names": [1], "coeffs": [1.0, 3.0], "num_samples": 2, "max_new_tokens": 8, "seed": 1}
    found = su.sweep(tiny("gpt2"), tokenizer, PROMPTS, PAIR, **given, **sampling)
    expected = cell_by_cell(tiny("gpt2"), tokenizer, PROMPTS, PAIR, **given, **sampling)
    assert_same_up_to_rounding(found, expected)


def test_without_a_seed_it_is_that_of_the_documentation(tokenizer):
    (prompts, additions), given = KINDS_OF_ADDITION["front"], {n: v for n, v in GIVEN.items() if n != "seed"}
    zero, default = (
        su.sweep(tiny("gpt2"), tokenizer, prompts, additions, **given, **seed) for seed in ({"seed": 0}, {})
    )
    pd.testing.assert_frame_equal(zero, default)


def test_the_cells_differ_unless_the_coefficient_is_zero(main_model, tokenizer):
    given = GIVEN | {"act_names": HOOKS[:2] + HOOKS[3:]}  # what leaves the last block no later token looks at
    table = su.sweep(main_model, tokenizer, PROMPTS, PAIR, **given)
    texts = table.groupby(["act_name", "coeff"])["completion"].agg(tuple)
    assert texts.xs(0.0, level="coeff").nunique() == 1
    others = texts[texts.index.get_level_values("coeff") != 0]
    assert others.nunique() == len(others) == 6
    settings = {"num_samples": 2, "max_new_tokens": 5, "seed": 3, "top_p": 1.0}
    unsteered = su.generate(main_model, tokenizer, PROMPTS, **settings)
    assert texts.xs(0.0, level="coeff").iloc[0] == tuple(unsteered["completion"])


def test_hooks_and_coefficients_that_come_twice_are_one_cell_and_any_iterable_will_do(tokenizer):
    model, given = tiny("llama"), {"max_new_tokens": 3, "seed": 0}
    once = su.sweep(model, tokenizer, "a long prompt", PAIR, act_names=[1, 0], coeffs=[1, 2], **given)
    places = iter([1, "blocks.1.hook_resid_pre", 0, np.int64(1)])
    given |= {"act_names": places, "coeffs": (c for c in np.array([1, 2, 1.0]))}
    twice = su.sweep(model, tokenizer, ["a long prompt"], iter(PAIR[0] + PAIR[1]), **given)
    assert twice.equals(once)
    assert once["act_name"].unique().tolist() == ["blocks.1.hook_resid_pre", "blocks.0.hook_resid_pre"]


def test_no_global_random_state_moves(tokenizer):
    before = torch.get_rng_state(), np.random.get_state()[1], random.getstate()  # noqa: NPY002
    su.sweep(tiny("gpt2"), tokenizer, PROMPTS, PAIR, **GIVEN)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.array_equal(np.random.get_state()[1], before[1])  # noqa: NPY002
    assert random.getstate() == before[2]


# --- what is computed -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("batch_size", "sizes"), [(64, [36]), (16, [16, 16, 4]), (1, [1] * 36)])
def test_texts_run_once_and_each_batch_is_prefilled_once(tokenizer, batch_size, sizes):
    model, shapes = tiny("llama"), []
    given = {"act_names": [2, "blocks.1.hook_mlp_out", 0], "coeffs": COEFFS, "num_samples": 2, "seed": 0}
    prompts = ["x" * 19, "y" * 19]
    see = hf.block(model, 0).register_forward_pre_hook(
        lambda _, args: shapes.append(tuple(args[0].shape[:2]))
    )
    with see:
        su.sweep(model, tokenizer, prompts, PAIR, max_new_tokens=1, batch_size=batch_size, **given)
    texts = (2, 7)  # Love and Hatred, for all hooks
    assert shapes == [texts, *((size, tokens) for size in sizes for tokens in (19, 1))]


@pytest.mark.parametrize("step", [2, 7])
def test_an_exception_leaves_the_model_as_it_was(main_model, tokenizer, step):
    count, ids, names = hook_count(main_model), random_ids(2, 9), dict(vars(main_model))
    before = logits(main_model, ids)
    with pytest.raises(Stop):
        su.sweep(
            main_model, tokenizer, PROMPTS, PAIR, batch_size=6, logits_processor=[Stopping(step)], **GIVEN
        )
    assert (hook_count(main_model), vars(main_model)) == (count, names)
    assert torch.equal(logits(main_model, ids), before)


# --- the folder -------------------------------------------------------------------------------------------

SMALL = GIVEN | {"batch_size": 6, "act_names": HOOKS[:2], "max_new_tokens": 3}


def decoded(
    model: PreTrainedModel, tokenizer, folder, *, at_most: int = 99
) -> tuple[int, pd.DataFrame | None]:
    """How many batches a sweep decodes, and its table; None if it is stopped after `at_most`."""
    calls, real = [], generation.continue_batch

    def counted(*args, **kwargs):
        if len(calls) == at_most:
            raise Stop
        calls.append(args)
        return real(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(generation, "continue_batch", counted)
        try:
            table = su.sweep(model, tokenizer, PROMPTS, PAIR, folder=folder, **SMALL)
        except Stop:
            table = None
    return len(calls), table


def test_a_stopped_sweep_goes_on_after_its_last_batch_to_the_same_table(tokenizer, tmp_path):
    model = tiny("gemma3_text")
    batches, expected = decoded(model, tokenizer, None)
    assert batches == 6
    for at_most, left in ((0, 6), (1, 5), (2, 3)):  # it may be stopped again and again
        count, table = decoded(model, tokenizer, tmp_path / "sweep", at_most=at_most)
        assert (count, table) == (at_most, None)
        assert len([*(tmp_path / "sweep").glob("chunk-*")]) == 6 - left
    count, table = decoded(model, tokenizer, tmp_path / "sweep")
    assert count == 3
    pd.testing.assert_frame_equal(table, expected, check_exact=True)
    count, table = decoded(model, tokenizer, str(tmp_path / "sweep"))
    assert count == 0
    pd.testing.assert_frame_equal(table, expected, check_exact=True)


@pytest.mark.parametrize(
    "change",
    [
        {"prompts": PROMPTS[::-1]},
        {"additions": PAIR[:1]},
        {"additions": (PAIR[1], PAIR[0])},
        {"additions": [replace(one, addition_location="back") for one in PAIR]},
        {"act_names": HOOKS[:1]},
        {"coeffs": [*COEFFS, 9.0]},
        {"num_samples": 3},
        {"max_new_tokens": 4},
        {"seed": 4},
        {"batch_size": 7},
        {"top_p": 0.9},
        {"do_sample": False},
        {"model": tiny("llama")},
    ],
    ids=lambda change: "-".join(change),
)
def test_a_folder_of_another_sweep_is_refused_and_left_alone(tokenizer, tmp_path, monkeypatch, change):
    monkeypatch.setattr(tiny("llama"), "name_or_path", "another")
    given = {"model": tiny("gpt2"), "prompts": PROMPTS, "additions": PAIR, "folder": tmp_path} | SMALL
    su.sweep(tokenizer=tokenizer, **given)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(ValueError, match="other settings"):
        su.sweep(tokenizer=tokenizer, **given | change)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_folder_of_another_model_of_the_same_name_is_refused(tokenizer, tmp_path):
    model, tuned = new_model(CONFIGS["gpt2"]()), new_model(CONFIGS["gpt2"]())
    tuned.transformer.h[1].ln_2.bias[3] += 0.5
    given = {"tokenizer": tokenizer, "prompts": PROMPTS, "additions": PAIR, "folder": tmp_path} | SMALL
    table = su.sweep(model, **given)
    with pytest.raises(ValueError, match=r"other settings \(model\)"):
        su.sweep(tuned, **given)
    pd.testing.assert_frame_equal(su.sweep(copy.deepcopy(model), **given), table, check_exact=True)


def test_a_call_that_fails_leaves_its_folder_to_a_corrected_one(tokenizer, tmp_path):
    given = {"additions": PAIR, "folder": tmp_path / "sweep"} | SMALL
    for bad in ({"prompts": ["short"]}, {"prompts": PROMPTS, "act_names": [3]}):
        with pytest.raises(ValueError, match=r"prompt of 6 tokens|layer 3"):
            su.sweep(tiny("gpt2"), tokenizer, **given | bad)
    assert not given["folder"].exists()


# --- errors -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bad", "quoted"),
    [
        ({"act_names": []}, "nothing to try: 0 additions × hooks"),
        ({"coeffs": []}, "nothing to try.*0 coefficients"),
        ({"additions": []}, "nothing to try: 0 additions"),
        ({"prompts": []}, "prompts"),
        ({"coeffs": [1.0, float("nan")]}, "coeff.*nan"),
        ({"coeffs": [-float("inf"), 0.0]}, "coeff.*-inf"),
        ({"coeffs": [1e38]}, "not finite"),
        ({"act_names": [1, 3]}, "layer 3 .*0 to 2"),
        ({"act_names": "blocks.1.hook_resid_pre"}, "act_names of sweep must be a list of hooks, not 'blocks"),
        ({"num_samples": 0}, "num_samples.*0"),
        ({"batch_size": 0}, "batch_size.*0"),
        ({"seed": -1}, "seed.*-1"),
        ({"top_p": 1.5}, r"1\.5"),
        ({"prompts": ["a prompt", "short"]}, "prompt of 6 tokens.*addition of 7"),
        ({"prompts": ["short"], "coeffs": [0.0]}, "prompt of 6 tokens.*addition of 7"),
        ({"prompts": [""]}, "prompt of 1 tokens.*addition of 7"),
        ({"temprature": 0.5}, "temprature"),
    ],
)
def test_a_bad_setting_is_a_value_error_that_names_it_and_leaves_no_hook(tokenizer, bad, quoted):
    model = tiny("gpt2")
    count = hook_count(model)
    with pytest.raises((TypeError, ValueError), match=quoted):
        su.sweep(model, tokenizer, **{"prompts": PROMPTS, "additions": PAIR} | GIVEN | bad)
    assert hook_count(model) == count
