"""Steers at the output head: their values, a row for each text, arithmetic, files, and what they refuse."""

import json
from collections.abc import Callable
from dataclasses import FrozenInstanceError, replace
from pathlib import Path

import pytest
import torch
from conftest import (
    CONFIGS,
    HEAD_KINDS,
    assert_same_up_to_rounding,
    head_by_hand,
    head_input,
    head_steer,
    hook_count,
    logits,
    new_model,
    padded,
    random_ids,
    tiny,
)
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

import steer_utils as su
from steer_utils import hf
from steer_utils.lm_steer.head_steer import HeadSteer
from steer_utils.measure.metrics import log_prob_gains, next_token_logits, token_log_probs
from steer_utils.pplm.classifier import ClassifierHead

CLOSE = {"atol": 1e-4, "rtol": 1e-4}
JSON, TENSORS = "lm_steer.json", "lm_steer.safetensors"
PROMPTS = ["I hate you because", "abc", "Good day"]  # longer ones are not written first
EACH = [[4.0, 0.0], [0.0, -4.0], [-4.0, 2.0]]
kinds = pytest.mark.parametrize("kind", HEAD_KINDS)


def strong(kind: str = "multiply", num_steers: int = 2, **facts) -> HeadSteer:
    return head_steer(kind, num_steers, epsilon=0.1 if kind == "multiply" else 1.0, **facts)


def steered(model: PreTrainedModel, steer: HeadSteer, ids: Tensor, mask: Tensor | None = None) -> Tensor:
    with steer.on(model):
        return logits(model, ids, mask)


# --- values -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (2, [2.0, 0.0, 0.0]),
        (-0.5, [-0.5, 0.0, 0.0]),
        (torch.tensor(2.0), [2.0, 0.0, 0.0]),
        ((1, 2, 3), [1.0, 2.0, 3.0]),
        (torch.tensor([1, 2, 3]), [1.0, 2.0, 3.0]),
        ([[1, 2, 3]], [[1.0, 2.0, 3.0]]),
        (torch.ones(2, 3, dtype=torch.float64), [[1.0] * 3] * 2),
    ],
    ids=str,
)
def test_values_are_a_number_for_the_first_steer_or_one_for_each_or_a_row_for_each_text(given, expected):
    steer = head_steer(num_steers=3)
    found = steer.at(given).values()
    assert found.dtype == torch.float32
    assert found.tolist() == expected
    assert replace(steer, steer_values=given).values().tolist() == expected
    assert steer.steer_values is None


@pytest.mark.parametrize(
    "given",
    [[], [1.0], [1.0] * 4, [[]], [[1.0], [1.0], [1.0]], torch.ones(0, 3), torch.ones(1, 1, 3)],
    ids=str,
)
def test_values_of_another_shape_are_a_value_error_that_names_the_steers(given):
    with pytest.raises(ValueError, match=r"3 steers \(joy, anger, 2\).*\[3\] or \[B, 3\]"):
        head_steer(num_steers=3, names=("joy", "anger", 2)).at(given)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("place", [lambda v: v, lambda v: [1.0, v], lambda v: [[1.0, 1.0], [v, 0.0]]])
def test_values_that_are_not_finite_are_a_value_error(bad, place):
    with pytest.raises(ValueError, match=f"steer values must be finite.*{bad}"):
        head_steer().at(place(bad))


@kinds
def test_a_steer_without_values_does_not_steer(main_model, tokenizer, kind):
    steer, hooks = head_steer(kind), hook_count(main_model)
    for use in (
        steer.values,
        steer.on(main_model).__enter__,
        lambda: 2 * steer,
        lambda: -steer,
        lambda: su.generate(main_model, tokenizer, "a", steer=[steer, steer]),
    ):
        with pytest.raises(ValueError, match=r"steer\.at\(3\.0\)"):
            use()
    assert hook_count(main_model) == hooks


def test_a_steer_cannot_be_changed_and_its_use_does_not_change_it(main_model):
    steer, ids = head_steer().at(EACH[:2]), random_ids(2, 9)
    kept = [steer.projector1.clone(), steer.projector2.clone(), steer.steer_values.clone()]
    assert torch.equal(steered(main_model, steer, ids), steered(main_model, steer, ids))
    assert all(map(torch.equal, kept, [steer.projector1, steer.projector2, steer.steer_values]))
    with pytest.raises(FrozenInstanceError):
        steer.epsilon = 1.0


# --- a row of values for each text ------------------------------------------------------------------------


@kinds
@pytest.mark.parametrize("side", ["left", "right"])
def test_rows_of_a_padded_batch_have_values_of_their_own(main_model, kind, side):
    steer, (ids, mask) = strong(kind), padded([11, 4, 7], side)
    found = steered(main_model, steer.at(EACH), ids, mask)
    expected = head_by_hand(main_model, steer, EACH, ids, mask)
    torch.testing.assert_close(found[mask.bool()], expected[mask.bool()], **CLOSE)


@kinds
def test_several_rows_of_a_text_stand_in_succession(kind):
    model, steer, ids = tiny("llama"), strong(kind), random_ids(6, 7)
    rows = [EACH[0], EACH[0], EACH[1], EACH[1], EACH[2], EACH[2]]
    found = steered(model, steer.at(EACH), ids)
    torch.testing.assert_close(found, head_by_hand(model, steer, rows, ids), **CLOSE)


@kinds
@pytest.mark.parametrize("rows", [1, 2, 4])
def test_a_batch_that_does_not_fit_the_values_is_a_value_error_with_both_numbers(kind, rows):
    model, hooks = tiny("gpt2"), hook_count(tiny("gpt2"))
    with pytest.raises(ValueError, match=f"values for 3 texts do not fit a batch of {rows} rows"):
        steered(model, head_steer(kind).at(EACH), random_ids(rows, 5))
    assert hook_count(model) == hooks


@kinds
@pytest.mark.parametrize(
    "settings",
    [
        {"num_samples": 2},
        {"num_samples": 3, "batch_size": 2},
        {"num_samples": 2, "batch_size": 4},
        {"batch_size": 1},
        {"use_cache": False},
        {"num_beams": 2, "do_sample": False},
        {"num_beams": 2, "do_sample": False, "batch_size": 2},
    ],
    ids=str,
)
def test_every_sample_of_a_prompt_has_its_values(kind, tokenizer, settings):
    model, steer, kwargs = tiny("llama"), strong(kind), {"max_new_tokens": 4, "seed": 5} | settings
    together = su.generate(model, tokenizer, PROMPTS, steer=steer.at(EACH), **kwargs)
    plain = su.generate(model, tokenizer, PROMPTS, **kwargs)
    size = settings.get("num_samples", 1)
    for i, (prompt, values) in enumerate(zip(PROMPTS, EACH, strict=True)):
        alone = su.generate(model, tokenizer, prompt, steer=steer.at(values), **kwargs)
        of_prompt = together[i * size : (i + 1) * size].reset_index(drop=True)
        assert_same_up_to_rounding(of_prompt, alone)
        assert of_prompt["completion"].tolist() != plain["completion"].tolist()[i * size : (i + 1) * size]


def test_the_same_prompt_may_stand_several_times_with_values_of_its_own(main_model, tokenizer):
    steer, settings = strong(), {"max_new_tokens": 6, "do_sample": False}
    values = [[-6.0, 0.0], [0.0, 0.0], [6.0, 0.0]]
    found = su.generate(main_model, tokenizer, ["ab"] * 3, steer=steer.at(values), **settings)
    expected = [
        su.generate(main_model, tokenizer, "ab", steer=steer.at(row), **settings)["completion"][0]
        for row in values
    ]
    assert found["completion"].tolist() == expected
    assert len(set(expected)) == 3


@kinds
@pytest.mark.parametrize("batch_size", [1, 2, 64])
def test_texts_are_scored_with_their_values(main_model, tokenizer, kind, batch_size):
    steer = strong(kind)
    texts = [*PROMPTS[:2], [0, 5, 17, 40]]
    with steer.at(EACH).on(main_model):
        found = token_log_probs(main_model, tokenizer, texts, batch_size=batch_size)
    gains = log_prob_gains(main_model, tokenizer, texts, steer.at(EACH), skip=1, batch_size=batch_size)
    for text, values, log_probs, gain in zip(texts, EACH, found, gains, strict=True):
        ids = torch.tensor([[0, *tokenizer(text)["input_ids"]] if isinstance(text, str) else text])
        pair = head_by_hand(main_model, steer, [values], ids), logits(main_model, ids)
        with_it, without = (one[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0] for one in pair)
        torch.testing.assert_close(log_probs, with_it, **CLOSE)
        torch.testing.assert_close(gain, (with_it - without)[1:], **CLOSE)


def test_the_next_tokens_of_prompts_are_those_at_their_values(main_model, tokenizer):
    steer = strong()
    with steer.at(EACH).on(main_model):
        found = next_token_logits(main_model, tokenizer, PROMPTS)
    for prompt, values, row in zip(PROMPTS, EACH, found, strict=True):
        with steer.at(values).on(main_model):
            alone = next_token_logits(main_model, tokenizer, [prompt])[0]
        torch.testing.assert_close(row, alone, **CLOSE)


@pytest.mark.parametrize("count", [1, 2, 4])
def test_values_for_fewer_or_more_texts_are_a_value_error_with_both_numbers(tokenizer, count):
    model, hooks = tiny("gpt2"), hook_count(tiny("gpt2"))
    steer, what = head_steer(num_steers=1).at([[1.0]] * count), rf"values for {count} texts.* 3 texts"
    for use in (
        lambda: su.generate(model, tokenizer, PROMPTS, steer=steer, max_new_tokens=2),
        lambda: su.generate(model, tokenizer, PROMPTS, steer=steer, max_new_tokens=2, batch_size=1),
        lambda: log_prob_gains(model, tokenizer, PROMPTS, steer),
    ):
        with pytest.raises(ValueError, match=what):
            use()
        assert hook_count(model) == hooks


def test_steers_with_values_for_different_numbers_of_texts_are_a_value_error(tokenizer):
    one, two = (head_steer(num_steers=1).at([[1.0]] * count) for count in (2, 3))
    with pytest.raises(ValueError, match="values for 2 texts, the other for 3"):
        one + two
    with pytest.raises(ValueError, match="values for 2 texts do not fit 3 texts"):
        su.generate(tiny("gpt2"), tokenizer, PROMPTS, steer=[one, two], max_new_tokens=2)


# --- together with other mechanisms -----------------------------------------------------------------------

BAG = {"bags": su.Bag("test", entries=((5,), (17,), (40, 41)))}
HEAD = {"head": ClassifierHead(32, 3, seed=1), "target_class_id": 1}
OTHERS = {
    "PPLM past, bag": su.PPLM(**BAG, stepsize=0.05, gamma=1.0, top_k=0),
    "PPLM past, head": su.PPLM(**HEAD, stepsize=0.05, gamma=1.0, top_k=0),
    "PPLM hidden, bag": su.PPLM(**BAG, stepsize=0.05, gamma=1.0, top_k=0, perturb="hidden"),
    "PPLM hidden, head": su.PPLM(**HEAD, stepsize=0.05, gamma=1.0, top_k=0, perturb="hidden"),
    "PPLM probs": su.PPLM(**BAG, stepsize=0.05, gamma=1.0, top_k=0, perturb="probs"),
    "addition": su.ActivationAddition(10.0, 1, "Lov"),
}
others = pytest.mark.parametrize("name", OTHERS)


@others
def test_another_mechanism_acts_on_the_steered_model_as_on_the_folded_one(main_model, tokenizer, name):
    steer, other = strong().at([1.0, -1.0]), OTHERS[name]
    kwargs = {"num_samples": 2, "max_new_tokens": 3, "seed": 2}
    both = su.generate(main_model, tokenizer, PROMPTS, steer=[steer, other], **kwargs)
    expected = su.generate(steer.fold(main_model), tokenizer, PROMPTS, steer=other, **kwargs)
    assert_same_up_to_rounding(both, expected)
    for alone in (steer, other):
        table = su.generate(main_model, tokenizer, PROMPTS, steer=alone, **kwargs)
        assert (table["loss"] - both["loss"]).abs().max() > 1e-3


@others
@kinds
def test_beside_another_mechanism_every_prompt_has_its_values(tokenizer, kind, name):
    model, steer, other = tiny("gpt2"), strong(kind), OTHERS[name]
    kwargs = {"num_samples": 2, "max_new_tokens": 3, "seed": 2, "batch_size": 4}
    together = su.generate(model, tokenizer, PROMPTS, steer=[other, steer.at(EACH)], **kwargs)
    for i, (prompt, values) in enumerate(zip(PROMPTS, EACH, strict=True)):
        alone = su.generate(model, tokenizer, prompt, steer=[other, steer.at(values)], **kwargs)
        assert_same_up_to_rounding(together[2 * i : 2 * i + 2].reset_index(drop=True), alone)


def test_beams_search_the_steered_model_as_the_folded_one(main_model):
    steer, (ids, mask) = strong().at([3.0, -2.0]), padded([9, 5], "left")
    kwargs = {"attention_mask": mask, "num_beams": 2, "max_new_tokens": 5, "do_sample": False}
    kwargs |= {"pad_token_id": 0, "return_dict_in_generate": True, "output_scores": True}
    expected = steer.fold(main_model).generate(ids, **kwargs)
    with steer.on(main_model):
        found = main_model.generate(ids, **kwargs)
    assert torch.equal(found.sequences, expected.sequences)
    torch.testing.assert_close(found.sequences_scores, expected.sequences_scores, **CLOSE)
    plain = main_model.generate(ids, **kwargs)
    assert not torch.allclose(plain.sequences_scores, found.sequences_scores, atol=1e-2)


@kinds
def test_beams_of_every_text_have_its_values(main_model, kind):
    steer, (ids, mask) = strong(kind), padded([9, 5, 7], "left")
    kwargs = {"num_beams": 2, "max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    kwargs |= {"return_dict_in_generate": True, "output_scores": True, "eos_token_id": None}
    with steer.at(EACH).on(main_model):
        found = main_model.generate(ids, attention_mask=mask, **kwargs)
    for i, values in enumerate(EACH):
        with steer.at(values).on(main_model):
            alone = main_model.generate(ids[i : i + 1], attention_mask=mask[i : i + 1], **kwargs)
        assert torch.equal(found.sequences[i], alone.sequences[0])
        torch.testing.assert_close(found.sequences_scores[i], alone.sequences_scores[0], **CLOSE)


@kinds
def test_a_pass_that_must_see_the_plain_model_does(main_model, kind):
    ids, plain = random_ids(2, 9), logits(main_model, random_ids(2, 9))
    with strong(kind).at(3.0).on(main_model):
        with hf.unsteered():
            assert torch.equal(logits(main_model, ids), plain)
        assert not torch.allclose(logits(main_model, ids), plain, atol=0.1)


# --- arithmetic -------------------------------------------------------------------------------------------


@kinds
@pytest.mark.parametrize("values", [[1.0, -2.0], EACH[:2]], ids=["for all", "for each"])
def test_a_sum_adds_up_what_each_adds_whatever_the_epsilons_and_ranks(main_model, kind, values):
    ids = random_ids(2, 9)
    one = head_steer(kind, 1, rank=3, epsilon=0.5).at([3.0])
    two = head_steer(kind, 2, rank=5, epsilon=0.02, seed=1).at(values)
    plain = logits(main_model, ids)
    changes = [steered(main_model, steer, ids) - plain for steer in (one, two)]
    for total in (one + two, two + one):
        assert total.num_steers == 3
        torch.testing.assert_close(steered(main_model, total, ids) - plain, sum(changes), **CLOSE)
    difference = steered(main_model, one - two, ids) - plain
    torch.testing.assert_close(difference, changes[0] - changes[1], **CLOSE)


def test_the_matrix_of_a_sum_is_the_sum_of_the_matrices():
    one, two = head_steer(num_steers=3, rank=2).at([1.0, 2.0, 3.0]), head_steer(epsilon=7.0, seed=1).at(-1.0)
    torch.testing.assert_close((one + two).matrix(), one.matrix() + two.matrix(), **CLOSE)
    torch.testing.assert_close((two - one).matrix(), two.matrix() - one.matrix(), **CLOSE)
    assert (one + two).rank == 4


@pytest.mark.parametrize("kind", ["add", "offset"])
def test_vectors_in_nested_contexts_are_their_sum(main_model, kind):
    ids, one, two = random_ids(2, 9), strong(kind).at(2.0), strong(kind, seed=1).at([1.0, -1.0])
    with one.on(main_model):
        nested = steered(main_model, two, ids)
    torch.testing.assert_close(nested, steered(main_model, one + two, ids), **CLOSE)


def test_matrices_in_nested_contexts_act_one_after_the_other(main_model):
    """Their sum is without the product of the two; `generate` takes the sum."""
    ids, one, two = random_ids(2, 9), head_steer().at(1.0), head_steer(seed=1).at([1.0, -1.0])
    with one.on(main_model):
        nested = steered(main_model, two, ids)
    product = head_input(main_model, ids) @ one.matrix() @ two.matrix()
    both = product @ main_model.get_output_embeddings().weight.T + steered(main_model, one + two, ids)
    torch.testing.assert_close(nested, both, atol=1e-3, rtol=1e-4)


@kinds
def test_generate_takes_the_sum_of_several(main_model, tokenizer, kind):
    one, two = strong(kind, 1).at(2.0), strong(kind, seed=1).at(EACH)
    kwargs = {"num_samples": 2, "max_new_tokens": 4, "seed": 4}
    found = su.generate(main_model, tokenizer, PROMPTS, steer=[one, two], **kwargs)
    assert found.equals(su.generate(main_model, tokenizer, PROMPTS, steer=one + two, **kwargs))


@kinds
@pytest.mark.parametrize("values", [[1.0, -2.0], EACH[:2]], ids=["for all", "for each"])
def test_a_factor_scales_what_a_steer_adds(kind, values):
    model, ids, steer = tiny("llama"), random_ids(2, 9), strong(kind).at(values)
    plain = logits(model, ids)
    change = steered(model, steer, ids) - plain
    for scaled, factor in ((3 * steer, 3), (steer * -0.5, -0.5), (-steer, -1), (steer - 2 * steer, -1)):
        torch.testing.assert_close(steered(model, scaled, ids) - plain, factor * change, **CLOSE)


@pytest.mark.parametrize("factor", [float("nan"), float("inf")])
def test_a_factor_that_is_not_finite_is_a_value_error(factor):
    with pytest.raises(ValueError, match="finite"):
        factor * head_steer().at(1.0)


def test_arithmetic_keeps_the_model_and_changes_no_operand():
    one = head_steer(model_id="some/model", card={"lr": 0.1}, names=("a", "b")).at(1.0)
    two = head_steer(model_id="some/model", seed=1).at(2.0)
    kept = [tensor.clone() for tensor in (one.projector1, two.projector1, one.steer_values, two.steer_values)]
    for scaled in (3 * one, -one):
        assert (scaled.model_id, scaled.names, scaled.card) == ("some/model", ("a", "b"), {"lr": 0.1})
    for result in (one + two, one - two):
        assert (result.model_id, result.names, result.epsilon) == ("some/model", ("a", "b", "0", "1"), 0.1)
        assert result.card == {}
    assert all(map(torch.equal, kept, [one.projector1, two.projector1, one.steer_values, two.steer_values]))


def test_the_values_of_a_sum_stand_side_by_side():
    one, two = head_steer(num_steers=1), head_steer()
    assert (one + two).steer_values is None
    assert (one.at(3.0) + two.at([1.0, 2.0])).values().tolist() == [3.0, 1.0, 2.0]
    rows = [[1.0, 2.0], [4.0, 5.0]]
    assert (one.at(3.0) + two.at(rows)).values().tolist() == [[3.0, 1.0, 2.0], [3.0, 4.0, 5.0]]
    assert (two.at(rows) + one.at([[3.0], [6.0]])).values().tolist() == [[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]
    for pair in ((one, two.at(1.0)), (one.at(1.0), two)):
        with pytest.raises(ValueError, match="both steers values, or neither"):
            pair[0] + pair[1]


@pytest.mark.parametrize(
    ("join", "names"),
    [
        (lambda a, b: a + b, ["joy", "anger"]),
        (lambda a, b: a + a + a, ["joy", "joy (1)", "joy (2)"]),
        (lambda a, b: a + (a + a), ["joy", "joy (1)", "joy (1) (1)"]),
        (lambda a, b: (a + a) + (a + a), ["joy", "joy (1)", "joy (2)", "joy (1) (1)"]),
    ],
)
def test_the_steers_of_a_sum_have_different_names_however_it_came_about(join, names):
    a, b = (head_steer(num_steers=1, names=(name,)).at(1.0) for name in ("joy", "anger"))
    assert list(join(a, b).names) == names


@kinds
def test_steers_of_different_models_or_widths_do_not_add_up(kind):
    one = head_steer(kind, model_id="one").at(1.0)
    narrow = {name: tensor[:, :31] for name, tensor in one.tensors().items()}
    for join in (lambda a, b: a + b, lambda a, b: a - b):
        with pytest.raises(ValueError, match=r"'one', the other for 'two'"):
            join(one, replace(one, model_id="two"))
        with pytest.raises(ValueError, match=r"31 in the other"):
            join(one, replace(one, **narrow))


@kinds
@pytest.mark.parametrize(
    "other", [1, 0.5, None, "Love", torch.zeros(2, 32), su.ActivationAddition(1.0, 1, "L")]
)
def test_a_steer_and_something_else_do_not_add_up(kind, other):
    steer = head_steer(kind).at(1.0)
    others = [other, *(head_steer(name).at(1.0) for name in HEAD_KINDS if name != kind)]
    for one in others:
        for join in (lambda a, b: a + b, lambda a, b: a - b):
            with pytest.raises(TypeError):
                join(steer, one)


# --- files ------------------------------------------------------------------------------------------------


@kinds
@pytest.mark.parametrize("values", [None, [3.0, -1 / 3], EACH[:2]], ids=["none", "for all", "for each"])
def test_a_saved_steer_comes_back_with_all_that_is_known_of_it(kind, values, tmp_path):
    card = {"data": "Größe ☕", "steps": [1, 2], "lr": 1e-3}
    facts = {"epsilon": 1 / 3, "names": ("joy", "名"), "model_id": "some/model", "card": card}
    steer = replace(head_steer(kind, **facts), steer_values=values)
    steer.save_pretrained(tmp_path / "new" / "folder")
    loaded = su.LMSteer.from_pretrained(str(tmp_path / "new" / "folder"))
    assert type(loaded) is type(steer)
    assert {name: getattr(loaded, name) for name in facts} == facts
    assert loaded.tensors().keys() == steer.tensors().keys()
    assert all(map(torch.equal, loaded.tensors().values(), steer.tensors().values()))
    if values is None:
        assert loaded.steer_values is None
    else:
        assert torch.equal(loaded.values(), steer.values())


@kinds
def test_a_saved_steer_gives_identical_logits(main_model, kind, tmp_path):
    steer, ids = strong(kind).at([3.0, -1 / 3]), random_ids(2, 9)
    steer.save_pretrained(tmp_path)
    loaded = HeadSteer.from_pretrained(tmp_path, any_model=True, model=main_model)
    expected = steered(main_model, steer, ids)
    assert torch.equal(steered(main_model, loaded, ids), expected)
    double = steered(main_model, loaded + steer, ids)
    torch.testing.assert_close(double, steered(main_model, 2 * steer, ids), **CLOSE)


def test_a_symmetric_steer_and_parts_of_one_tensor_may_be_saved(tmp_path):
    both = torch.randn(2, 1, 32, 4)
    for folder, pair in (("same", (both[0], both[0])), ("parts", both)):
        su.LMSteer(*pair).save_pretrained(tmp_path / folder)
        loaded = su.LMSteer.from_pretrained(tmp_path / folder)
        assert torch.equal(loaded.projector1, pair[0])
        assert torch.equal(loaded.projector2, pair[1])
        assert (tmp_path / folder / TENSORS).stat().st_size < 1500


def test_tensors_that_ask_for_a_gradient_are_saved_without(tmp_path):
    steer = su.AddSteer(torch.randn(2, 32, requires_grad=True))
    steer.save_pretrained(tmp_path)
    loaded = su.AddSteer.from_pretrained(tmp_path).add_vec
    assert torch.equal(loaded, steer.add_vec)
    assert not loaded.requires_grad


@pytest.fixture(scope="module")
def two_models(tmp_path_factory: pytest.TempPathFactory) -> list[PreTrainedModel]:
    """Two models of one width that were read from folders of different names."""
    models = []
    for name in ("one", "two"):
        folder = tmp_path_factory.mktemp("models") / name
        tiny("llama").save_pretrained(folder)
        models.append(AutoModelForCausalLM.from_pretrained(folder).eval())
    return models


@kinds
def test_a_steer_of_another_model_is_refused_unless_any_model_allows_it(kind, two_models, tmp_path):
    one, two = two_models
    head_steer(kind, model_id="one").save_pretrained(tmp_path)
    assert su.LMSteer.from_pretrained(tmp_path, one).model_id == "one"
    with pytest.raises(ValueError, match=r"made with 'one', not with 'two'.*any_model=True"):
        su.LMSteer.from_pretrained(tmp_path, two)
    assert su.LMSteer.from_pretrained(tmp_path, two, any_model=True).model_id == "one"


@kinds
def test_a_steer_of_another_size_is_refused_whatever_any_model_says(kind, tmp_path):
    config = CONFIGS["llama"]()
    config.hidden_size, config.vocab_size, config.head_dim = 64, 64, 16
    head_steer(kind).save_pretrained(tmp_path)
    for any_model in (False, True):
        with pytest.raises(ValueError, match=r"(32|97).*64"):
            su.LMSteer.from_pretrained(tmp_path, new_model(config), any_model=any_model)


def test_an_unknown_name_and_a_missing_file_are_a_file_not_found_error_that_names_it(tmp_path):
    with pytest.raises(FileNotFoundError, match="no steer 'sentimnt'"):
        su.LMSteer.from_pretrained("sentimnt")
    for name in (JSON, TENSORS):
        head_steer().save_pretrained(tmp_path)
        (tmp_path / name).unlink()
        with pytest.raises(FileNotFoundError, match=f"holds no lm_steer.*{name}"):
            su.LMSteer.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        {"epsilon": 0},
        {"epsilon": -1},
        {"epsilon": float("nan")},
        {"epsilon": "0.1"},
        {"epsilon": None},
        {"names": ["a"]},
        {"names": ["a", "a"]},
        {"names": 5},
        {"steer_values": [1.0]},
        {"steer_values": [1.0, float("inf")]},
        {"steer_values": "strong"},
        {"steer_values": {"0": 1.0}},
        {"steer_values": [[1.0, 2.0], [3.0]]},
        {"adaptor_class": "divide"},
        {"adaptor_class": "add"},
        {"adaptor_class": ["multiply"]},
        {"sha256": "0"},
    ],
    ids=str,
)
def test_a_checkpoint_with_an_impossible_fact_is_a_value_error(tmp_path, change):
    head_steer().save_pretrained(tmp_path)
    facts = json.loads((tmp_path / JSON).read_text())
    assert facts.keys() >= change.keys()
    (tmp_path / JSON).write_text(json.dumps(facts | change))
    with pytest.raises(ValueError, match="damaged"):
        su.LMSteer.from_pretrained(tmp_path)


def without(fact: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        facts = json.loads((folder / JSON).read_text())
        del facts[fact]
        (folder / JSON).write_text(json.dumps(facts))

    return damage


def shortened(name: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        (folder / name).write_bytes((folder / name).read_bytes()[:-10])

    return damage


FACTS = ("adaptor_class", "epsilon", "names", "steer_values", "card", "model")


@pytest.mark.parametrize(
    "damage",
    [*map(without, FACTS), shortened(JSON), shortened(TENSORS)],
    ids=[*FACTS, "short JSON", "short tensors"],
)
def test_a_checkpoint_that_lacks_a_part_is_a_value_error(tmp_path, damage):
    head_steer().at(1.0).save_pretrained(tmp_path)
    damage(tmp_path)
    with pytest.raises(ValueError, match="damaged"):
        su.LMSteer.from_pretrained(tmp_path)


def test_a_checkpoint_whose_tensors_are_not_finite_is_a_value_error(tmp_path):
    steer = head_steer()
    steer.projector2[1, 2, 3] = float("nan")
    steer.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"damaged.*projector2 holds inf or NaN"):
        su.LMSteer.from_pretrained(tmp_path)


# --- errors -----------------------------------------------------------------------------------------------


@kinds
@pytest.mark.parametrize("epsilon", [0, -0.1, float("nan"), float("inf")])
def test_an_epsilon_that_is_not_above_zero_and_finite_is_a_value_error(kind, epsilon):
    with pytest.raises(ValueError, match=f"epsilon .*not {epsilon}"):
        head_steer(kind, epsilon=epsilon)


@pytest.mark.parametrize("kind", [su.LMSteer, su.AddSteer, su.OffsetSteer])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_one_number_that_is_not_finite_is_a_value_error_that_names_its_tensor(kind, bad):
    shape = (2, 32, 4) if kind is su.LMSteer else (2, 32)
    for name in kind.parameters:
        tensors = {one: torch.ones(shape) for one in kind.parameters}
        tensors[name].view(-1)[-1] = bad
        with pytest.raises(ValueError, match=f"{name} holds inf or NaN"):
            kind(**tensors)


@kinds
@pytest.mark.parametrize("names", [("a",), ("a", "b", "c"), ("a", "a"), (1, "1")])
def test_names_that_are_not_one_for_each_steer_are_a_value_error(kind, names):
    with pytest.raises(ValueError, match="2 steers need as many different names"):
        head_steer(kind, names=names)


@kinds
def test_no_steer_at_all_is_a_value_error(kind):
    with pytest.raises(ValueError, match="at least one"):
        head_steer(kind, num_steers=0)
