"""Sweeps: every cell against `generate`, what is computed, and files of sweeps that were stopped."""

import json
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import assert_same_up_to_rounding, hook_count, logits, random_ids, tiny
from torch import Tensor
from transformers import LogitsProcessor, PreTrainedModel

import steer_utils as su
from steer_utils import hf
from steer_utils.additions import sweep as sweeps

PROMPTS = ["I hate you because", "abcdefg", "Once upon a time"]
SHORT = ["", "a", "Once upon a time", ""]
HOOKS = [2, "blocks.0.hook_mlp_out", "blocks.2.hook_resid_post", 0]
COEFFS = [2.0, 0.0, -1.5]
PAIR = su.get_x_vector("Love", "Hatred", coeff=1.5, act_name=5)  # hooks are the sweep's business
FROM_BOS = [su.ActivationAddition(2.0, 0, "", positions="all")]
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
    "prompts of one token": (SHORT, FROM_BOS),
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


def own_attributes(model: PreTrainedModel) -> list[set[str]]:
    return [set(vars(module)) for module in model.modules()]


# --- the table --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS_OF_ADDITION)
def test_each_cell_is_what_generate_gives_with_its_steer_whatever_the_batches(main_model, tokenizer, kind):
    (prompts, additions), given = KINDS_OF_ADDITION[kind], GIVEN | {"coeffs": [2.0, -1.5]}
    expected = cell_by_cell(main_model, tokenizer, prompts, additions, **given)
    assert len(expected) == len(HOOKS) * 2 * len(prompts) * 2
    for batch_size in (64, 5):
        found = su.sweep(main_model, tokenizer, prompts, additions, batch_size=batch_size, **given)
        assert_same_up_to_rounding(found, expected)


def test_a_batch_may_hold_one_prompt_in_one_cell(tokenizer):
    model, given = tiny("gpt_neox"), GIVEN | {"act_names": [1, 0], "coeffs": [1.0, -1.0]}
    found = su.sweep(model, tokenizer, PROMPTS, PAIR, batch_size=1, **given)
    assert_same_up_to_rounding(found, cell_by_cell(model, tokenizer, PROMPTS, PAIR, **given))


def test_each_cell_is_what_generate_gives_in_every_architecture(any_model, tokenizer):
    given = {
        "act_names": [1, "blocks.0.hook_attn_out"],
        "coeffs": [1.0, -2.0],
        "max_new_tokens": 5,
        "seed": 0,
    }
    found = su.sweep(any_model, tokenizer, PROMPTS, PAIR, **given)
    assert_same_up_to_rounding(found, cell_by_cell(any_model, tokenizer, PROMPTS, PAIR, **given))


@pytest.mark.parametrize(
    "sampling",
    [
        {},
        {"temperature": 0.6, "freq_penalty": 1.0, "top_p": 0.7},
        {"repetition_penalty": 1.3, "top_k": 9},
        {"do_sample": False},
    ],
    ids=str,
)
def test_settings_of_sampling_are_those_of_generate(main_model, tokenizer, sampling):
    given = {
        "act_names": [1],
        "coeffs": [1.0, 3.0],
        "num_samples": 2,
        "max_new_tokens": 8,
        "seed": 1,
        **sampling,
    }
    found = su.sweep(main_model, tokenizer, PROMPTS, PAIR, **given)
    assert_same_up_to_rounding(found, cell_by_cell(main_model, tokenizer, PROMPTS, PAIR, **given))


def test_the_cells_differ_unless_the_coefficient_is_zero(main_model, tokenizer):
    given = GIVEN | {"act_names": HOOKS[:2] + HOOKS[3:]}  # what leaves the last block no later token looks at
    table = su.sweep(main_model, tokenizer, PROMPTS, PAIR, **given)
    texts = table.groupby(["act_name", "coeff"])["completion"].agg(tuple)
    assert texts.xs(0.0, level="coeff").nunique() == 1
    others = texts[texts.index.get_level_values("coeff") != 0]
    assert others.nunique() == len(others) == 6
    plain = su.generate(main_model, tokenizer, PROMPTS, num_samples=2, max_new_tokens=5, seed=3, top_p=1.0)
    assert texts.xs(0.0, level="coeff").iloc[0] == tuple(plain["completion"])


def test_hooks_and_coefficients_that_come_twice_are_one_cell_and_any_iterable_will_do(main_model, tokenizer):
    given = {"max_new_tokens": 3, "seed": 0}
    once = su.sweep(main_model, tokenizer, "a long prompt", PAIR, act_names=[1, 0], coeffs=[1, 2], **given)
    twice = su.sweep(
        main_model,
        tokenizer,
        ["a long prompt"],
        iter(PAIR),
        act_names=iter([1, "blocks.1.hook_resid_pre", 0, np.int64(1)]),
        coeffs=(c for c in np.array([1, 2, 1.0])),
        **given,
    )
    assert twice.equals(once)
    assert once["act_name"].unique().tolist() == ["blocks.1.hook_resid_pre", "blocks.0.hook_resid_pre"]


def test_a_sum_of_additions_is_swept_like_its_terms(main_model, tokenizer):
    found = su.sweep(main_model, tokenizer, PROMPTS, PAIR[0] + PAIR[1], **GIVEN)
    assert found.equals(su.sweep(main_model, tokenizer, PROMPTS, PAIR, **GIVEN))


def test_no_global_random_state_moves(main_model, tokenizer):
    before = torch.get_rng_state(), np.random.get_state()[1], random.getstate()  # noqa: NPY002
    su.sweep(main_model, tokenizer, PROMPTS, PAIR, **GIVEN)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.array_equal(np.random.get_state()[1], before[1])  # noqa: NPY002
    assert random.getstate() == before[2]


# --- what is computed -------------------------------------------------------------------------------------


@contextmanager
def runs(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[int, int, int]]]:
    """(block, rows, tokens) of each time that a block computes; one that is stood in for does not."""
    found, kind = [], type(hf.block(model, 0))
    number = {id(block): i for i, block in enumerate(hf.blocks(model))}
    forward = kind.forward

    def noted(self, hidden_states: Tensor, *args, **kwargs):
        found.append((number[id(self)], *hidden_states.shape[:2]))
        return forward(self, hidden_states, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(kind, "forward", noted)
        yield found


def test_prompts_are_read_once_and_blocks_below_the_hook_are_not_run_for_the_cells(
    main_model, tokenizer, monkeypatch
):
    given = {"act_names": [2, "blocks.1.hook_mlp_out", 0], "coeffs": COEFFS, "max_new_tokens": 1, "seed": 0}
    with runs(main_model, monkeypatch) as found:
        su.sweep(main_model, tokenizer, "x" * 19, PAIR, **given)
    texts = [(0, 2, 7), (1, 2, 7)]  # Love and Hatred at all hooks, up to what enters block 2
    read = [(0, 1, 19), (1, 1, 19), (2, 1, 19)]  # all but the last of 20 tokens
    cells = [(2, 3, 19), (1, 3, 19), (2, 3, 19), (0, 3, 19), (1, 3, 19), (2, 3, 19)]
    decoding = [(0, 9, 1), (1, 9, 1), (2, 9, 1)]
    assert found == texts + read + cells + decoding


@pytest.mark.parametrize(("batch_size", "num_samples"), [(64, 2), (12, 2), (5, 2), (1, 1), (2, 3)])
def test_a_batch_is_never_larger_than_batch_size_or_the_samples_of_one_cell(
    tokenizer, monkeypatch, batch_size, num_samples
):
    model = tiny("llama")
    given = GIVEN | {"num_samples": num_samples, "max_new_tokens": 1}
    with runs(model, monkeypatch) as found:
        su.sweep(model, tokenizer, PROMPTS, PAIR, batch_size=batch_size, **given)
    decoded = [rows for block, rows, tokens in found if tokens == 1 and block == 0]
    assert max(decoded) <= max(batch_size, num_samples)
    assert sum(decoded) == len(HOOKS) * len(COEFFS) * len(PROMPTS) * num_samples


def test_the_model_is_as_before(any_model, tokenizer):
    ids, hooks, attributes = random_ids(2, 9), hook_count(any_model), own_attributes(any_model)
    plain = logits(any_model, ids)
    su.sweep(any_model, tokenizer, PROMPTS, PAIR, act_names=[0, 1], coeffs=[1.0], max_new_tokens=2)
    assert (hook_count(any_model), own_attributes(any_model)) == (hooks, attributes)
    assert torch.equal(logits(any_model, ids), plain)


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


@pytest.mark.parametrize("where", ["decoding", "a later batch", "reading", "resuming", "the file"])
def test_an_exception_leaves_no_hook_and_no_forward_of_ours(main_model, tokenizer, monkeypatch, where):
    def stop(*args, **kwargs):
        raise Stop

    hooks, attributes, ids = hook_count(main_model), own_attributes(main_model), random_ids(2, 9)
    plain, given = logits(main_model, ids), dict(GIVEN)
    if where in ("decoding", "a later batch"):
        given["logits_processor"] = [Stopping(3 if where == "decoding" else 7)]
    elif where == "reading":
        handle = hf.block(main_model, 2).register_forward_pre_hook(stop)
    elif where == "resuming":
        monkeypatch.setattr(sweeps, "prefill", stop)
    else:
        monkeypatch.setattr(sweeps._Log, "add", stop)
    with pytest.raises(Stop):
        su.sweep(main_model, tokenizer, PROMPTS, PAIR, batch_size=6, **given)
    if where == "reading":
        handle.remove()
    assert (hook_count(main_model), own_attributes(main_model)) == (hooks, attributes)
    assert torch.equal(logits(main_model, ids), plain)


# --- the file ---------------------------------------------------------------------------------------------

SMALL = GIVEN | {"batch_size": 6, "act_names": HOOKS[:2], "max_new_tokens": 3}


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of rows of each batch that is decoded."""
    sizes, real = [], sweeps.continue_batch

    def counted(*args, **kwargs):
        found = real(*args, **kwargs)
        sizes.append(len(found))
        return found

    monkeypatch.setattr(sweeps, "continue_batch", counted)
    return sizes


def stopped(model: PreTrainedModel, tokenizer, path, batches: int, *, written: bool) -> None:
    """A sweep that is stopped at a batch, before or after that is in the file."""
    real, count = sweeps._Log.add, [0]

    def add(self, rows) -> None:
        last = count[0] == batches
        if written or not last:
            real(self, rows)
        if last:
            raise Stop
        count[0] += 1

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sweeps._Log, "add", add)
        with pytest.raises(Stop):
            su.sweep(model, tokenizer, PROMPTS, PAIR, path=path, **SMALL)


@pytest.mark.parametrize("written", [True, False])
def test_a_stopped_sweep_goes_on_after_its_last_batch_to_the_same_table(
    tokenizer, tmp_path, decoded, written
):
    model = tiny("gemma3_text")
    expected = su.sweep(model, tokenizer, PROMPTS, PAIR, **SMALL)
    total = list(decoded)
    assert len(total) == 6
    for batches in (0, 1, 5):
        path = tmp_path / f"sweep-{batches}.jsonl"
        decoded.clear()
        stopped(model, tokenizer, path, batches, written=written)
        assert decoded == total[: batches + 1]
        decoded.clear()
        found = su.sweep(model, tokenizer, PROMPTS, PAIR, path=path, **SMALL)
        assert found.equals(expected)
        assert decoded == total[batches + written :]


def test_a_sweep_may_be_stopped_again_and_again(tokenizer, tmp_path, decoded):
    model, path = tiny("llama"), tmp_path / "sweep.jsonl"
    expected = su.sweep(model, tokenizer, PROMPTS, PAIR, **SMALL)
    decoded.clear()
    for _ in range(3):
        stopped(model, tokenizer, path, 1, written=True)
    assert len(decoded) == 6
    assert su.sweep(model, tokenizer, PROMPTS, PAIR, path=path, **SMALL).equals(expected)
    assert len(decoded) == 6


@pytest.mark.parametrize("cut", [1, 2, 40, -1])
def test_a_line_that_was_not_finished_is_decoded_again_and_nothing_else(tokenizer, tmp_path, decoded, cut):
    path, model = tmp_path / "sweep.jsonl", tiny("gpt2")
    expected = su.sweep(model, tokenizer, PROMPTS, PAIR, path=path, **SMALL)
    whole, total = path.read_bytes(), list(decoded)
    lines = whole.splitlines(keepends=True)
    assert len(lines) == 7
    for finished in (0, 3, 5):
        path.write_bytes(b"".join(lines[: 1 + finished]) + lines[1 + finished][:cut])
        decoded.clear()
        found = su.sweep(model, tokenizer, PROMPTS, PAIR, path=path, **SMALL)
        assert found.equals(expected)
        assert decoded == total[finished:]
        assert path.read_bytes() == whole


def test_a_finished_sweep_is_read_and_not_run(tokenizer, tmp_path, decoded):
    path = tmp_path / "sweep.jsonl"
    expected = su.sweep(tiny("gpt_neox"), tokenizer, PROMPTS, PAIR, path=str(path), **SMALL)
    decoded.clear()
    whole = path.read_bytes()
    assert su.sweep(tiny("gpt_neox"), tokenizer, PROMPTS, PAIR, path=path, **SMALL).equals(expected)
    assert decoded == []
    assert path.read_bytes() == whole


def test_the_table_does_not_depend_on_the_file(tokenizer, tmp_path):
    kept = su.sweep(tiny("gpt_neox"), tokenizer, SHORT, FROM_BOS, path=tmp_path / "sweep.jsonl", **SMALL)
    again = su.sweep(tiny("gpt_neox"), tokenizer, SHORT, FROM_BOS, path=tmp_path / "sweep.jsonl", **SMALL)
    for table in (kept, again):
        assert table.equals(su.sweep(tiny("gpt_neox"), tokenizer, SHORT, FROM_BOS, **SMALL))
        assert table.dtypes.equals(kept.dtypes)


@pytest.mark.parametrize(
    "change",
    [
        {"prompts": [*PROMPTS, "another prompt"]},
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
        {"temperature": 0.5},
        {"do_sample": False},
        {"eos_token_id": 5},
    ],
    ids=str,
)
def test_a_file_of_another_sweep_is_refused_and_left_alone(tokenizer, tmp_path, change):
    path, model = tmp_path / "sweep.jsonl", tiny("gpt2")
    given = {"prompts": PROMPTS, "additions": PAIR, "path": path} | SMALL
    su.sweep(model, tokenizer, **given)
    before = path.read_bytes()
    with pytest.raises(ValueError, match=r"sweep\.jsonl.*other settings.*another path"):
        su.sweep(model, tokenizer, **given | change)
    assert path.read_bytes() == before


def test_a_file_of_another_model_is_refused(tokenizer, tmp_path):
    path = tmp_path / "sweep.jsonl"
    models = [tiny("gpt2"), tiny("llama")]
    with pytest.MonkeyPatch.context() as patch:
        for name, model in zip(("one", "two"), models, strict=True):
            patch.setattr(model, "name_or_path", name)
        su.sweep(models[0], tokenizer, PROMPTS, PAIR, path=path, **SMALL)
        with pytest.raises(ValueError, match="other settings"):
            su.sweep(models[1], tokenizer, PROMPTS, PAIR, path=path, **SMALL)


@pytest.mark.parametrize("content", ["\n", "{}\n", "notes\n", "a,b\n1,2\n"], ids=repr)
def test_a_file_of_something_else_is_refused_by_name_and_left_alone(tokenizer, tmp_path, content):
    path = tmp_path / "sweep.jsonl"
    path.write_text(content)
    with pytest.raises(ValueError, match=r"sweep\.jsonl"):
        su.sweep(tiny("gpt2"), tokenizer, PROMPTS, PAIR, path=path, **SMALL)
    assert path.read_text() == content


def test_an_empty_file_is_a_new_one(tokenizer, tmp_path):
    path = tmp_path / "sweep.jsonl"
    path.touch()
    expected = su.sweep(tiny("gpt2"), tokenizer, PROMPTS, PAIR, **SMALL)
    for _ in range(2):
        assert su.sweep(tiny("gpt2"), tokenizer, PROMPTS, PAIR, path=path, **SMALL).equals(expected)


LINE_ENDS = ["\n", "\r", "\r\n", "\x0b", "\x0c", "\x1c", "\x1d", "\x1e", "\x85", "\u2028", "\u2029"]


@pytest.mark.parametrize("end", LINE_ENDS, ids=ascii)
def test_prompts_and_completions_may_hold_anything_that_ends_a_line(tmp_path, end):
    prompt = f"ab{end}cd"
    row = sweeps.Row("blocks.1.hook_resid_pre", 1.0, 0, prompt, 0, f"x{end}y", 2.5)
    sweeps._Log(tmp_path / "log", {"prompts": [prompt]}).add([row])
    again = sweeps._Log(tmp_path / "log", {"prompts": [prompt]})
    assert (again.batches, again.rows) == (1, [row])


@pytest.mark.parametrize("end", LINE_ENDS, ids=ascii)
def test_a_sweep_over_a_prompt_that_holds_the_end_of_a_line_can_be_taken_up(tokenizer, tmp_path, end):
    given = {"act_names": [1], "coeffs": [1.0], "max_new_tokens": 2, "path": tmp_path / "sweep.jsonl"}
    first = su.sweep(tiny("gpt2"), tokenizer, f"ab{end}cdefgh", PAIR, **given)
    assert su.sweep(tiny("gpt2"), tokenizer, f"ab{end}cdefgh", PAIR, **given).equals(first)


def test_the_file_is_lines_of_json_first_the_settings(tokenizer, tmp_path):
    path = tmp_path / "sweep.jsonl"
    table = su.sweep(tiny("gpt2"), tokenizer, PROMPTS, PAIR, path=path, **SMALL)
    head, *batches = [json.loads(line) for line in path.read_text().split("\n")[:-1]]
    assert (head["prompts"], head["seed"], head["max_new_tokens"]) == (PROMPTS, 3, 3)
    rows = [row for batch in batches for row in batch]
    assert sorted(row[5] for row in rows) == sorted(table["completion"])


# --- errors -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bad", "quoted"),
    [
        ({"act_names": []}, "nothing to try.*0 hooks"),
        ({"coeffs": []}, "nothing to try.*0 hooks"),
        ({"additions": []}, "nothing to try: 0 additions"),
        ({"prompts": []}, "prompts"),
        ({"use_cache": False}, "use_cache"),
        ({"cache_implementation": "static"}, "cache_implementation"),
        ({"num_beams": 3, "do_sample": False}, "num_beams"),
        ({"num_beams": 3}, "num_beams.*3"),
        ({"coeffs": [1.0, float("nan")]}, "coeff.*nan"),
        ({"coeffs": [float("inf")]}, "coeff.*inf"),
        ({"coeffs": [-float("inf"), 0.0]}, "coeff.*-inf"),
        ({"act_names": [1, 3]}, "layer 3 .*0 to 2"),
        ({"act_names": ["blocks.1.hook_q"]}, "blocks.1.hook_q"),
        ({"act_names": "blocks.1.hook_resid_pre"}, "unknown hook 'b'"),
        ({"num_samples": 0}, "num_samples.*0"),
        ({"batch_size": 0}, "batch_size.*0"),
        ({"max_new_tokens": 0}, "max_new_tokens.*0"),
        ({"seed": -1}, "seed.*-1"),
        ({"temperature": 0}, "0"),
        ({"top_p": 1.5}, r"1\.5"),
        ({"min_p": 0.1}, r"min_p.*0\.1"),
        ({"prompts": ["a prompt", "short"]}, "prompt of 6 tokens.*addition of 7"),
        ({"prompts": [""]}, "prompt of 1 tokens.*addition of 7"),
        ({"additions": [su.ActivationAddition(1.0, 1, tokens=(0, 97))]}, "token id 97"),
    ],
    ids=str,
)
def test_a_bad_setting_is_a_value_error_that_names_it_and_leaves_no_hook(tokenizer, bad, quoted):
    model = tiny("gpt2")
    hooks, attributes = hook_count(model), own_attributes(model)
    with pytest.raises(ValueError, match=quoted):
        su.sweep(model, tokenizer, **{"prompts": PROMPTS, "additions": PAIR} | GIVEN | bad)
    assert (hook_count(model), own_attributes(model)) == (hooks, attributes)


def test_an_unknown_setting_is_an_error_that_names_it(tokenizer):
    with pytest.raises((TypeError, ValueError), match="temprature"):
        su.sweep(tiny("gpt2"), tokenizer, PROMPTS, PAIR, temprature=0.5, **GIVEN)


def test_a_strength_that_overflows_is_a_value_error(main_model, tokenizer):
    with pytest.raises(ValueError, match="not finite"):
        su.sweep(main_model, tokenizer, PROMPTS, PAIR, **GIVEN | {"coeffs": [1e38]})
