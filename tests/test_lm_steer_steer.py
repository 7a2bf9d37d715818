"""Steers at the LM head: formulas, values for each text, folding, arithmetic, files, and what they refuse."""

import argparse
import functools
import json
from collections.abc import Callable
from dataclasses import FrozenInstanceError, replace
from itertools import cycle
from pathlib import Path

import pytest
import torch
from conftest import (
    CONFIGS,
    HEAD_KINDS,
    MAIN,
    assert_same_up_to_rounding,
    head_by_hand,
    head_input,
    head_steer,
    hook_count,
    log_prob_gains,
    logits,
    new_model,
    padded,
    random_ids,
    tiny,
)
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

import steer_utils as su
from steer_utils import hooks
from steer_utils.lm_steer.steer import LMHeadSteer
from steer_utils.measure.metrics import next_token_logits, token_log_probs
from steer_utils.measure.strength import kl_along
from steer_utils.pplm.classifier import ClassifierHead

CLOSE = {"atol": 1e-4, "rtol": 1e-4}
JSON, TENSORS = "lm_steer.json", "lm_steer.safetensors"
PROMPTS = ["I hate you because", "abc", "Good day"]  # longer ones are not written first
VALUES = [2.0, -1.0]
EACH = [[4.0, 0.0], [0.0, -4.0], [-4.0, 2.0]]
kinds = pytest.mark.parametrize("kind", HEAD_KINDS)
models_and_kinds = pytest.mark.parametrize(
    ("model", "kind"),
    [*zip(MAIN, ("multiply", "add", "offset", "multiply"), strict=True)],
    indirect=["model"],
)
vectors = pytest.mark.parametrize("kind", ["add", "offset"])
one_or_each = pytest.mark.parametrize("values", [VALUES, EACH[:2]], ids=["for all", "for each"])


@pytest.fixture
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    return tiny(request.param)


def strong(kind: str = "multiply", num_steers: int = 2, **facts) -> LMHeadSteer:
    return head_steer(kind, num_steers, epsilon=0.1 if kind == "multiply" else 1.0, **facts)


def steered(model: PreTrainedModel, steer: LMHeadSteer, ids: Tensor, mask: Tensor | None = None) -> Tensor:
    with steer.on(model):
        return logits(model, ids, mask)


def by_hand(model: PreTrainedModel, steer: LMHeadSteer, ids: Tensor, mask: Tensor | None = None) -> Tensor:
    """Logits by the formulas, at the steer's values for all texts or for each."""
    values = steer.values().tolist()
    return head_by_hand(model, steer, values if steer.values().ndim == 2 else [values] * len(ids), ids, mask)


@functools.cache
def biased() -> PreTrainedModel:
    """A model of its own whose LM head has a bias far from zero."""
    model = new_model(CONFIGS["gptj"]())
    bias = 3 * torch.randn(97, generator=torch.Generator().manual_seed(9))
    model.lm_head.bias = torch.nn.Parameter(bias, requires_grad=False)
    return model


# --- the formulas -----------------------------------------------------------------------------------------

CASES = [("multiply", VALUES, "left"), ("add", EACH[:2], "right"), ("offset", VALUES, "left")]


@pytest.mark.parametrize(("architecture", "case"), [*zip(CONFIGS, cycle(range(3)), strict=False)])
def test_logits_are_those_of_the_formula(architecture, case):
    kind, values, side = CASES[case]
    model, steer, (ids, mask) = tiny(architecture), head_steer(kind).at(values), padded([11, 6], side)
    before, inputs = logits(model, ids, mask), model(ids, output_hidden_states=True).hidden_states
    found, real = steered(model, steer, ids, mask), mask.bool()
    torch.testing.assert_close(found[real], by_hand(model, steer, ids, mask)[real], **CLOSE)
    assert (found - before).abs().amax(dim=-1)[real].min() > 0.03
    with steer.on(model):  # tied input embeddings give what they gave
        inside = model(ids, output_hidden_states=True).hidden_states
    assert all(map(torch.equal, inside, inputs))


@pytest.mark.parametrize(
    ("model", "kind", "side"),
    [*zip(MAIN, cycle(HEAD_KINDS), cycle(("left", "right")), strict=False)],
    indirect=["model"],
)
def test_rows_of_a_padded_batch_have_values_of_their_own(model, kind, side):
    steer, (ids, mask) = strong(kind).at(EACH), padded([11, 4, 7], side)
    found, real = steered(model, steer, ids, mask), mask.bool()
    torch.testing.assert_close(found[real], by_hand(model, steer, ids, mask)[real], **CLOSE)


@pytest.mark.parametrize(("rank", "values"), [(1, VALUES), (7, EACH[:2]), (40, VALUES), (40, EACH[:2])])
def test_a_steer_of_any_rank_is_its_formula(rank, values):
    model, ids, steer = tiny("llama"), random_ids(2, 9), head_steer(rank=rank).at(values)
    torch.testing.assert_close(steered(model, steer, ids), by_hand(model, steer, ids), **CLOSE)


@kinds
def test_the_bias_of_the_lm_head_stays(kind):
    model, ids, steer = biased(), random_ids(2, 9), head_steer(kind)
    zero = [[0.0, 0.0], [0.0, 3.0]]
    assert torch.equal(steered(model, steer.at([0.0, 0.0]), ids), logits(model, ids))
    found = steered(model, steer.at(zero), ids)
    torch.testing.assert_close(found, by_hand(model, steer.at(zero), ids), **CLOSE)
    assert torch.equal(found[0], logits(model, ids)[0])  # beside a text that is steered


@models_and_kinds
def test_logits_are_affine_in_the_values_and_additive_over_the_steers(model, kind):
    ids, steer = random_ids(2, 9), head_steer(kind, 3)
    unsteered = logits(model, ids)

    def change(*values: float) -> Tensor:
        return steered(model, steer.at(values), ids) - unsteered

    one, two, three = change(1, 0, 0), change(0, 1, 0), change(0, 0, 1)
    torch.testing.assert_close(change(-3, 0.5, 2), -3 * one + 0.5 * two + 2 * three, **CLOSE)
    assert min((a - b).abs().max() for a, b in ((one, two), (two, three), (three, one))) > 0.1


def test_the_matrix_is_what_the_last_hidden_state_gains_and_word_vectors_become_what_the_paper_says(
    main_model,
):
    ids, steer = random_ids(2, 9), head_steer(rank=3).at([2.0, -1.0])
    hidden, words = head_input(main_model, ids), main_model.get_output_embeddings().weight
    products = [p1 @ p2.T for p1, p2 in zip(steer.projector1, steer.projector2, strict=True)]
    torch.testing.assert_close(steer.matrix(), 0.2 * products[0] - 0.1 * products[1])
    torch.testing.assert_close(steer.matrix([0.0, 1.0]), 0.1 * products[1])
    found = steered(main_model, steer, ids)
    torch.testing.assert_close(found, (hidden + hidden @ steer.matrix()) @ words.T, **CLOSE)
    changed = torch.stack([(torch.eye(32) + steer.matrix()) @ word for word in words])
    torch.testing.assert_close(found, hidden @ changed.T, **CLOSE)
    assert torch.linalg.matrix_rank(steer.matrix()) == 6


@kinds
def test_epsilon_may_move_into_the_first_tensor(kind):
    model, ids, steer = tiny("gpt2"), random_ids(2, 9), head_steer(kind).at(VALUES)
    name = steer.parameters[0]
    other = replace(steer, epsilon=steer.epsilon / 7, **{name: 7 * getattr(steer, name)})
    torch.testing.assert_close(steered(model, other, ids), steered(model, steer, ids), **CLOSE)


@kinds
@one_or_each
def test_a_model_in_bfloat16_is_steered_and_folded_in_bfloat16(kind, values):
    model, ids = biased().__class__(biased().config).bfloat16().eval(), random_ids(2, 9)
    model.load_state_dict(biased().state_dict())
    steer = head_steer(kind, epsilon=0.2 if kind == "multiply" else 4.0)
    expected = by_hand(biased(), steer.at(values), ids) - logits(biased(), ids)
    found = {model: steered(model, steer.at(values), ids)}
    if values is VALUES:
        folded = steer.fold(model, values)
        found[folded] = logits(folded, ids)
    for one, given in found.items():
        change = given - logits(model, ids)
        assert change.dtype == torch.bfloat16
        assert {weight.dtype for weight in one.parameters()} == {torch.bfloat16}
        assert (change - expected).norm() < 0.03 * expected.norm()


@pytest.mark.parametrize(
    ("kind", "values"),
    [("multiply", VALUES), ("add", EACH[:2]), ("offset", [0.0, 0.0]), ("multiply", EACH[:2])],
    ids=["multiply all", "add each", "offset zero", "multiply each"],
)
def test_the_gradient_reaches_the_tensors_of_the_steer_alone(kind, values):
    model, ids, steer = tiny("gpt2"), random_ids(2, 9), head_steer(kind).at(values)
    steer = replace(steer, **{name: t.clone().requires_grad_() for name, t in steer.tensors().items()})
    tensors, weights = list(steer.tensors().values()), torch.randn(2, 9, 97)
    expected = torch.autograd.grad((weights * by_hand(model, steer, ids)).sum(), tensors)
    with steer.on(model):
        found = torch.autograd.grad((weights * model(ids).logits).sum(), tensors)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-3, rtol=1e-3)
    assert all((one != 0).any() == (values != [0.0, 0.0]) for one in found)
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_the_width_that_counts_is_that_of_the_last_hidden_state():
    """OPT-350m's LM head is narrower than its residual stream."""
    config = CONFIGS["opt"]()
    config.word_embed_proj_dim = 16
    model, ids, steer = new_model(config), random_ids(2, 9), head_steer(width=16).at(VALUES)
    expected = by_hand(model, steer, ids)
    torch.testing.assert_close(steered(model, steer, ids), expected, **CLOSE)
    torch.testing.assert_close(logits(steer.fold(model), ids), expected, **CLOSE)
    with pytest.raises(ValueError, match=r"32.*16"):
        head_steer().fold(model, 1.0)


# --- values -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (2, [2.0, 0.0, 0.0]),
        (torch.tensor(-0.5), [-0.5, 0.0, 0.0]),
        ((1, 2, 3), [1.0, 2.0, 3.0]),
        ([[1, 2, 3]], [[1.0, 2.0, 3.0]]),
        (torch.ones(2, 3, dtype=torch.float64), [[1.0] * 3] * 2),
    ],
    ids=["number", "tensor number", "one each", "one text", "texts"],
)
def test_values_are_a_number_for_the_first_steer_or_one_for_each_or_those_of_each_text(given, expected):
    steer = head_steer(num_steers=3)
    found = steer.at(given).values()
    assert found.dtype == torch.float32
    assert found.tolist() == expected
    assert steer.steer_values is None


@pytest.mark.parametrize("shape", [(0,), (1,), (4,), (1, 0), (3, 1), (0, 3), (1, 1, 3)], ids=str)
def test_values_of_another_shape_are_a_value_error_that_names_the_steers(shape):
    with pytest.raises(ValueError, match=r"3 steers \(joy, anger, 2\).*\[3\] or \[B, 3\]"):
        head_steer(num_steers=3, names=("joy", "anger", "2")).at(torch.ones(shape))


@pytest.mark.parametrize("given", [float("nan"), [1.0, float("inf")], [[1.0, 1.0], [-float("inf"), 0.0]]])
def test_values_that_are_not_finite_are_a_value_error(given):
    with pytest.raises(ValueError, match=r"steer_values must be finite.*(nan|inf)"):
        head_steer().at(given)


def test_a_steer_without_values_does_not_steer(tokenizer):
    model, steer, hooks = tiny("gpt2"), head_steer(), hook_count(tiny("gpt2"))
    for use in (
        steer.on(model).__enter__,
        lambda: 2 * steer,
        lambda: -steer,
        lambda: steer.fold(model),
        lambda: su.generate(model, tokenizer, "a", steer=[steer, steer]),
    ):
        with pytest.raises(ValueError, match=r"steer\.at\(3\.0\)"):
            use()
    assert hook_count(model) == hooks


def test_a_steer_cannot_be_changed_and_its_use_does_not_change_it(main_model):
    steer, ids = head_steer().at(EACH[:2]), random_ids(2, 9)
    kept = [steer.projector1.clone(), steer.projector2.clone(), steer.steer_values.clone()]
    assert torch.equal(steered(main_model, steer, ids), steered(main_model, steer, ids))
    assert all(map(torch.equal, kept, [steer.projector1, steer.projector2, steer.steer_values]))
    with pytest.raises(FrozenInstanceError):
        steer.epsilon = 1.0


# --- values for each text ---------------------------------------------------------------------------------


@kinds
def test_several_rows_of_a_text_stand_in_succession(kind):
    model, steer, ids = tiny("llama"), strong(kind), random_ids(6, 7)
    rows = [EACH[0], EACH[0], EACH[1], EACH[1], EACH[2], EACH[2]]
    expected = head_by_hand(model, steer, rows, ids)
    torch.testing.assert_close(steered(model, steer.at(EACH), ids), expected, **CLOSE)


@pytest.mark.parametrize(("kind", "rows"), [("multiply", 1), ("add", 4), ("offset", 4)])
def test_a_batch_that_does_not_fit_the_values_is_a_value_error_with_both_numbers(kind, rows):
    model, hooks = tiny("gpt2"), hook_count(tiny("gpt2"))
    with pytest.raises(ValueError, match=f"values for 3 texts do not fit a batch of {rows} rows"):
        steered(model, head_steer(kind).at(EACH), random_ids(rows, 5))
    assert hook_count(model) == hooks


SETTINGS = {
    "samples": {"num_samples": 2},
    "samples in parts": {"num_samples": 3, "batch_size": 2},
    "no cache": {"use_cache": False, "batch_size": 1},
    "beams": {"num_beams": 2, "do_sample": False, "batch_size": 2},
}


@pytest.mark.parametrize(("kind", "settings"), [*zip(cycle(HEAD_KINDS), SETTINGS, strict=False)])
def test_every_sample_of_a_prompt_has_its_values(kind, tokenizer, settings):
    model, steer = tiny("llama"), strong(kind)
    kwargs = {"max_new_tokens": 4, "seed": 5} | SETTINGS[settings]
    together = su.generate(model, tokenizer, PROMPTS, steer=steer.at(EACH), **kwargs)
    unsteered = su.generate(model, tokenizer, PROMPTS, **kwargs)
    size = kwargs.get("num_samples", 1)
    for i, (prompt, values) in enumerate(zip(PROMPTS, EACH, strict=True)):
        alone = su.generate(model, tokenizer, prompt, steer=steer.at(values), **kwargs)
        of_prompt = together[i * size : (i + 1) * size].reset_index(drop=True)
        assert_same_up_to_rounding(of_prompt, alone)
        assert of_prompt["completion"].tolist() != unsteered["completion"].tolist()[i * size : (i + 1) * size]


def test_the_same_prompt_may_stand_several_times_with_values_of_its_own(main_model, tokenizer):
    steer, settings = strong(), {"max_new_tokens": 6, "do_sample": False}
    values = [[-6.0, 0.0], [0.0, 0.0], [6.0, 0.0]]
    found = su.generate(main_model, tokenizer, ["ab"] * 3, steer=steer.at(values), **settings)
    alone = (su.generate(main_model, tokenizer, "ab", steer=steer.at(row), **settings) for row in values)
    expected = [table["completion"][0] for table in alone]
    assert found["completion"].tolist() == expected
    assert len(set(expected)) == 3


@models_and_kinds
def test_texts_are_scored_with_their_values(model, tokenizer, kind):
    batch_size = {"multiply": 1, "add": 2, "offset": 64}[kind]
    steer, texts = strong(kind), [*PROMPTS[:2], [0, 5, 17, 40]]
    with steer.at(EACH).on(model):
        found = token_log_probs(model, tokenizer, texts, batch_size=batch_size)
        following = next_token_logits(model, tokenizer, PROMPTS)
    gains = log_prob_gains(model, tokenizer, texts, steer.at(EACH), skip=1)
    for text, values, log_probs, gain in zip(texts, EACH, found, gains, strict=True):
        ids = torch.tensor([[0, *tokenizer(text)["input_ids"]] if isinstance(text, str) else text])
        pair = head_by_hand(model, steer, [values], ids), logits(model, ids)
        with_it, without = (one[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0] for one in pair)
        torch.testing.assert_close(log_probs, with_it, **CLOSE)
        torch.testing.assert_close(gain, (with_it - without)[1:], **CLOSE)
    for prompt, values, row in zip(PROMPTS, EACH, following, strict=True):
        ids = torch.tensor([[0, *tokenizer(prompt)["input_ids"]]])
        torch.testing.assert_close(row, head_by_hand(model, steer, [values], ids)[0, -1], **CLOSE)


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


# --- together with other mechanisms -----------------------------------------------------------------------

BAG = {"bags": su.Bag("test", entries=((5,), (17,), (40, 41)))}
HEAD = {"head": ClassifierHead(32, 3, seed=1), "target_class_id": 1}
OTHERS = {
    "PPLM past": su.PPLM(**BAG, stepsize=0.05, gamma=1.0, top_k=0),
    "PPLM hidden": su.PPLM(**HEAD, stepsize=0.05, gamma=1.0, top_k=0, perturb="hidden"),
    "PPLM probs": su.PPLM(**BAG, stepsize=0.05, gamma=1.0, top_k=0, perturb="probs"),
    "addition": su.ActivationAddition(10.0, 1, "Lov"),
}
others = pytest.mark.parametrize("name", OTHERS)


@pytest.mark.parametrize(("model", "name"), [*zip(MAIN, OTHERS, strict=True)], indirect=["model"])
def test_another_mechanism_acts_on_the_steered_model_as_on_the_folded_one(model, tokenizer, name):
    steer, other = strong().at([1.0, -1.0]), OTHERS[name]
    kwargs = {"num_samples": 2, "max_new_tokens": 3, "seed": 2}
    both = su.generate(model, tokenizer, PROMPTS, steer=[steer, other], **kwargs)
    expected = su.generate(steer.fold(model), tokenizer, PROMPTS, steer=other, **kwargs)
    assert_same_up_to_rounding(both, expected)
    for alone in (steer, other):
        table = su.generate(model, tokenizer, PROMPTS, steer=alone, **kwargs)
        assert (table["loss"] - both["loss"]).abs().max() > 1e-3


@others
def test_beside_another_mechanism_every_prompt_has_its_values(tokenizer, name):
    model, steer, other = tiny("gpt2"), strong(), OTHERS[name]
    kwargs = {"num_samples": 2, "max_new_tokens": 3, "seed": 2, "batch_size": 4}
    together = su.generate(model, tokenizer, PROMPTS, steer=[other, steer.at(EACH)], **kwargs)
    for i, (prompt, values) in enumerate(zip(PROMPTS, EACH, strict=True)):
        alone = su.generate(model, tokenizer, prompt, steer=[other, steer.at(values)], **kwargs)
        assert_same_up_to_rounding(together[2 * i : 2 * i + 2].reset_index(drop=True), alone)


@models_and_kinds
def test_beams_of_every_text_have_its_values(model, kind):
    steer, (ids, mask) = strong(kind), padded([9, 5, 7], "left")
    kwargs = {"num_beams": 2, "max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    kwargs |= {"return_dict_in_generate": True, "output_scores": True, "eos_token_id": None}
    with steer.at(EACH).on(model):
        found = model.generate(ids, attention_mask=mask, **kwargs)
    for i, values in enumerate(EACH):
        with steer.at(values).on(model):
            alone = model.generate(ids[i : i + 1], attention_mask=mask[i : i + 1], **kwargs)
        assert torch.equal(found.sequences[i], alone.sequences[0])
        torch.testing.assert_close(found.sequences_scores[i], alone.sequences_scores[0], **CLOSE)


@kinds
def test_a_pass_that_must_be_unsteered_is(kind):
    model, ids, unsteered = tiny("llama"), random_ids(2, 9), logits(tiny("llama"), random_ids(2, 9))
    with strong(kind).at(3.0).on(model):
        with hooks.unsteered():
            assert torch.equal(logits(model, ids), unsteered)
        assert not torch.allclose(logits(model, ids), unsteered, atol=0.1)


# --- folding ----------------------------------------------------------------------------------------------


def test_a_folded_model_gives_the_steered_logits_and_shares_every_weight_but_its_lm_head(any_model):
    steer, (ids, mask) = head_steer().at(VALUES), padded([11, 6], "left")
    before = {name: weight.clone() for name, weight in any_model.state_dict().items()}
    ties, config, unsteered = (
        dict(any_model.all_tied_weights_keys),
        any_model.config.to_dict(),
        logits(any_model, ids, mask),
    )
    folded, real = steer.fold(any_model), mask.bool()
    expected = steered(any_model, steer, ids, mask)
    torch.testing.assert_close(logits(folded, ids, mask)[real], expected[real], **CLOSE)
    assert type(folded) is type(any_model)
    head = any_model.get_output_embeddings()
    assert folded.get_output_embeddings().weight.data_ptr() != head.weight.data_ptr()
    shared = {weight.data_ptr() for weight in any_model.parameters()}
    own = [weight for weight in folded.parameters() if weight.data_ptr() not in shared]
    assert [weight.shape for weight in own] == [head.weight.shape]

    assert any_model.config.to_dict() == config
    assert any_model.all_tied_weights_keys == ties
    assert all(torch.equal(weight, before[name]) for name, weight in any_model.state_dict().items())
    assert torch.equal(logits(any_model, ids, mask), unsteered)


def test_a_folded_model_survives_saving_and_nothing_ties_its_lm_head_again(
    main_model, tmp_path, transformers_warnings
):
    ids, folded = random_ids(2, 9), head_steer().at(VALUES).fold(main_model)
    expected = logits(folded, ids)
    folded.save_pretrained(tmp_path)
    for model in (folded, AutoModelForCausalLM.from_pretrained(tmp_path).eval()):
        model.tie_weights()
        assert torch.equal(logits(model, ids), expected)
        assert model.config.tie_word_embeddings is False
    assert not transformers_warnings


@vectors
def test_vectors_are_folded_into_a_bias(kind, tmp_path):
    model, ids, steer = biased(), random_ids(2, 9), head_steer(kind, epsilon=1.0).at(VALUES)
    unsteered, folded = logits(model, ids), steer.fold(model)
    torch.testing.assert_close(logits(folded, ids), steered(model, steer, ids), **CLOSE)
    folded.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(logits(loaded, ids), logits(folded, ids))
    assert torch.equal(logits(model, ids), unsteered)
    assert folded.lm_head.weight.data_ptr() == model.lm_head.weight.data_ptr()


@vectors
def test_vectors_without_a_bias_to_fold_them_into_are_a_value_error(kind):
    with pytest.raises(ValueError, match=r"no bias to fold this steer into.*steer\.on"):
        head_steer(kind).at(1.0).fold(tiny("llama"))


@kinds
def test_the_values_to_fold_may_be_given_and_are_those_of_one_text(kind):
    model, ids, steer = biased(), random_ids(2, 9), head_steer(kind)
    for given in (VALUES, 2.0):
        found, expected = steer.at(9.0).fold(model, given), steered(model, steer.at(given), ids)
        torch.testing.assert_close(logits(found, ids), expected, **CLOSE)
    for refused in (lambda: steer.fold(model, EACH), lambda: steer.at(EACH).fold(model)):
        with pytest.raises(ValueError, match=r"one row of values, not \(3, 2\)"):
            refused()


OTHERS_ON = {"a steer": head_steer().at(1.0), "an addition": su.ActivationAddition(9.0, 1, "Love")}


@pytest.mark.parametrize(("model", "other"), [*zip(MAIN, cycle(OTHERS_ON), strict=False)], indirect=["model"])
def test_what_is_on_while_folding_is_not_on_in_the_folded_model(model, tokenizer, other):
    """And transformers' own hooks, by which a model gives its hidden states, are copied."""
    ids, steer = random_ids(2, 9), head_steer(seed=1).at(VALUES)
    hidden = model(ids, output_hidden_states=True).hidden_states  # leaves hooks of transformers' own behind
    expected, count = steered(model, steer, ids), hook_count(model)
    with OTHERS_ON[other].on(model, tokenizer):
        folded = steer.fold(model)
        torch.testing.assert_close(logits(folded, ids), expected, **CLOSE)
    torch.testing.assert_close(logits(folded, ids), expected, **CLOSE)
    assert hook_count(folded) == hook_count(model) == count
    assert all(map(torch.equal, folded(ids, output_hidden_states=True).hidden_states, hidden))


def test_a_folded_model_may_be_steered_and_folded_again(main_model):
    ids, one, two = random_ids(2, 9), head_steer().at(VALUES), head_steer(seed=1).at(1.0)
    expected = head_input(main_model, ids) @ (torch.eye(32) + two.matrix()) @ (torch.eye(32) + one.matrix())
    expected = expected @ main_model.get_output_embeddings().weight.T
    close = {"atol": 1e-3, "rtol": 1e-4}
    torch.testing.assert_close(logits(two.fold(one.fold(main_model)), ids), expected, **close)
    torch.testing.assert_close(steered(one.fold(main_model), two, ids), expected, **close)


@kinds
def test_a_folded_lm_head_asks_for_no_gradient_though_the_tensors_do(kind):
    steer = head_steer(kind)
    steer = replace(steer, **{name: tensor.requires_grad_() for name, tensor in steer.tensors().items()})
    assert not any(weight.requires_grad for weight in steer.fold(biased(), 1.0).parameters())


# --- arithmetic -------------------------------------------------------------------------------------------


@models_and_kinds
@one_or_each
def test_a_sum_adds_up_what_each_adds_whatever_the_epsilons_and_ranks(model, kind, values):
    ids = random_ids(2, 9)
    one = head_steer(kind, 1, rank=3, epsilon=0.5).at([3.0])
    two = head_steer(kind, 2, rank=5, epsilon=0.02, seed=1).at(values)
    unsteered = logits(model, ids)
    changes = [steered(model, steer, ids) - unsteered for steer in (one, two)]
    for total in (one + two, two + one):
        assert total.num_steers == 3
        torch.testing.assert_close(steered(model, total, ids) - unsteered, sum(changes), **CLOSE)
    difference = steered(model, one - two, ids) - unsteered
    torch.testing.assert_close(difference, changes[0] - changes[1], **CLOSE)


def test_matrices_in_nested_contexts_act_one_after_the_other_and_vectors_add_up(main_model):
    ids, one, two = random_ids(2, 9), head_steer().at(1.0), head_steer(seed=1).at([1.0, -1.0])
    with one.on(main_model):
        nested = steered(main_model, two, ids)
    product = head_input(main_model, ids) @ one.matrix() @ two.matrix()
    both = product @ main_model.get_output_embeddings().weight.T + steered(main_model, one + two, ids)
    torch.testing.assert_close(nested, both, atol=1e-3, rtol=1e-4)
    for kind in ("add", "offset"):
        one, two = strong(kind).at(2.0), strong(kind, seed=1).at([1.0, -1.0])
        with one.on(main_model):
            nested = steered(main_model, two, ids)
        torch.testing.assert_close(nested, steered(main_model, one + two, ids), **CLOSE)


@models_and_kinds
def test_generate_takes_the_sum_of_several(model, tokenizer, kind):
    one, two = strong(kind, 1).at(2.0), strong(kind, seed=1).at(EACH)
    kwargs = {"num_samples": 2, "max_new_tokens": 4, "seed": 4}
    found = su.generate(model, tokenizer, PROMPTS, steer=[one, two], **kwargs)
    assert found.equals(su.generate(model, tokenizer, PROMPTS, steer=one + two, **kwargs))


@pytest.mark.parametrize(
    ("kind", "values"), [("multiply", VALUES), ("add", EACH[:2]), ("offset", VALUES)], ids=HEAD_KINDS
)
def test_a_factor_scales_what_a_steer_adds(kind, values):
    model, ids, steer = tiny("llama"), random_ids(2, 9), strong(kind).at(values)
    unsteered = logits(model, ids)
    change = steered(model, steer, ids) - unsteered
    for scaled, factor in ((3 * steer, 3), (steer * -0.5, -0.5), (-steer, -1), (steer - 2 * steer, -1)):
        torch.testing.assert_close(steered(model, scaled, ids) - unsteered, factor * change, **CLOSE)
    with pytest.raises(ValueError, match="finite"):
        float("nan") * steer


# --- only what is plausible without the steer -------------------------------------------------------------


@models_and_kinds
def test_a_filtered_steer_keeps_to_the_nucleus_of_the_model_without_it(model, kind):
    ids = random_ids(3, 7)
    plain, steer = logits(model, ids), head_steer(kind).at([2.0, -1.0])
    with steer.on(model):
        steered = logits(model, ids)
    probs, order = plain.softmax(dim=-1).sort(descending=True)
    kept = torch.zeros_like(plain).scatter(-1, order, (probs.cumsum(-1) - probs < 0.6).float()).bool()
    with steer.at([2.0, -1.0], filter_p=0.6).on(model):
        found = logits(model, ids)
        with hooks.unsteered():
            torch.testing.assert_close(logits(model, ids), plain)
    assert 0 < kept.float().mean() < 1
    torch.testing.assert_close(found[kept], steered[kept], atol=1e-5, rtol=1e-5)
    assert (found.softmax(dim=-1)[~kept] == 0).all()
    assert torch.equal(logits(model, ids), plain)


@pytest.mark.parametrize("first", [True, False])
def test_a_filtered_steer_beside_another_keeps_to_the_nucleus_without_both(first):
    model, ids = tiny("llama"), random_ids(3, 7)
    plain, other = logits(model, ids), head_steer("add").at([2.0, -1.0]).on(model)
    filtered = head_steer(seed=1).at([2.0, -1.0], filter_p=0.01).on(model)  # one token is left
    with other if first else filtered, filtered if first else other:
        assert torch.equal(logits(model, ids).argmax(-1), plain.argmax(-1))


@pytest.mark.parametrize("perturb", ["past", "hidden", "probs"])
def test_beside_pplm_a_filtered_steer_keeps_to_the_nucleus_of_the_state_that_pplm_moved(tokenizer, perturb):
    model, filtered = tiny("llama"), head_steer().at([1.0, 0.5], filter_p=0.01)  # one token is left
    bag = su.Bag("test", entries=((5,), (17,), (40, 41)))
    pplm = su.PPLM(bag, perturb=perturb, stepsize=0.1, gamma=1.0, top_k=0)
    how = {"max_new_tokens": 5, "seed": 0}
    both = su.generate(model, tokenizer, ["abc", "de"], steer=[pplm, filtered], top_p=1.0, **how)
    assert both["loss"].notna().all()
    if perturb == "probs":  # which moves no state
        greedy = su.generate(model, tokenizer, ["abc", "de"], do_sample=False, **how)
        assert both["completion"].tolist() == greedy["completion"].tolist()


def test_filter_p_stays_with_a_steer_in_files_and_sums_and_weights_cannot_hold_it(tmp_path):
    one, other = head_steer().at([1.0, 2.0], filter_p=0.9), head_steer(seed=1).at([0.0, 1.0], filter_p=0.5)
    one.save_pretrained(tmp_path)
    assert su.LMSteer.from_pretrained(tmp_path).filter_p == 0.9
    assert ((one + other).filter_p, (-one).filter_p, one.at(3.0).filter_p) == (0.5, 0.9, 0.9)
    assert one.uncut().filter_p == 1
    with pytest.raises(ValueError, match=r"weights cannot keep to filter_p=0\.9: fold steer\.uncut\(\)"):
        one.fold(tiny("llama"))
    for wrong in (0.0, 1.5, -1.0, float("nan")):
        with pytest.raises(ValueError, match="filter_p must be above 0 and at most 1"):
            one.at(1.0, filter_p=wrong)


def test_a_filtered_steer_at_zero_samples_as_top_p_does_and_its_strength_is_that_without(tokenizer):
    model, steer = tiny("llama"), head_steer()
    how = {"num_samples": 8, "max_new_tokens": 8, "seed": 0}
    plain = su.generate(model, tokenizer, ["abc", "de"], top_p=0.7, **how)
    filtered = su.generate(model, tokenizer, ["abc", "de"], steer=steer.at(0.0, 0.7), top_p=1.0, **how)
    assert filtered["completion"].tolist() == plain["completion"].tolist()
    both = [kl_along(steer.at(1.0, p), model, tokenizer, ["abc"]) for p in (0.7, 1.0)]
    assert torch.equal(*both)


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
        with pytest.raises(ValueError, match=r"steer\.at\(3\.0\)"):
            pair[0] + pair[1]
    with pytest.raises(ValueError, match="values for 2 texts, the other for 3"):
        one.at([[1.0]] * 2) + one.at([[1.0]] * 3)


def test_the_steers_of_a_sum_have_different_names_however_it_came_about():
    a, b = (head_steer(num_steers=1, names=(name,)).at(1.0) for name in ("joy", "anger"))
    assert (a + b).names == ("joy", "anger")
    assert (a + a + a).names == ("joy", "joy (1)", "joy (2)")
    assert len(set(((a + a) + (a + a)).names)) == 4


def test_a_steer_made_by_hand_fits_any_model_and_two_models_do_not_add_up():
    one, other, by_hand = (head_steer(model_id=name).at(1.0) for name in ("one", "two", ""))
    assert (one + by_hand).model_id == (by_hand + one).model_id == "one"
    assert (by_hand + by_hand).model_id == ""
    for join in (lambda a, b: a + b, lambda a, b: a - b):
        with pytest.raises(ValueError, match=r"'one', the other for 'two'"):
            join(one, other)


@kinds
def test_steers_of_different_widths_or_kinds_do_not_add_up(kind, tokenizer):
    one, others = head_steer(kind).at(1.0), [name for name in HEAD_KINDS if name != kind]
    narrow = replace(one, **{name: tensor[:, :31] for name, tensor in one.tensors().items()})
    with pytest.raises(ValueError, match="wide, the other 31"):
        one + narrow
    for other in (head_steer(name).at(1.0) for name in others):
        for join in (lambda a, b: a + b, lambda a, b: a - b):
            with pytest.raises(
                TypeError, match=f"{one.adaptor_class} and {other.adaptor_class} steers have an order"
            ):
                join(one, other)
    for other in (1, None, torch.zeros(2, 32), su.ActivationAddition(1.0, 1, "L")):
        with pytest.raises(TypeError):
            one + other
        with pytest.raises(TypeError):
            one - other


# --- files ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "values"), [("multiply", None), ("add", [3.0, -1 / 3]), ("offset", EACH[:2])], ids=HEAD_KINDS
)
def test_a_saved_steer_comes_back_with_all_that_is_known_of_it(kind, values, tmp_path):
    card = {"data": "Größe ☕", "steps": [1, 2], "lr": 1e-3}
    facts = {"epsilon": 1 / 3, "names": ("joy", "名"), "model_id": "some/model", "card": card}
    steer = replace(head_steer(kind, **facts), steer_values=values)
    steer.save_pretrained(tmp_path / "new" / "folder")
    loaded = LMHeadSteer.from_pretrained(str(tmp_path / "new" / "folder"))
    assert type(loaded) is type(steer)
    other = su.AddSteer if kind == "multiply" else su.LMSteer
    with pytest.raises(ValueError, match=f"holds an {type(steer).__name__}, not an {other.__name__}"):
        other.from_pretrained(tmp_path / "new" / "folder")
    assert {name: getattr(loaded, name) for name in facts} == facts
    assert loaded.tensors().keys() == steer.tensors().keys()
    assert all(map(torch.equal, loaded.tensors().values(), steer.tensors().values()))
    assert (loaded.steer_values is None) == (values is None)
    if values is not None:
        assert torch.equal(loaded.values(), steer.values())


@models_and_kinds
def test_a_saved_steer_gives_identical_logits(model, kind, tmp_path):
    steer, ids = strong(kind).at([3.0, -1 / 3]), random_ids(2, 9)
    steer.save_pretrained(tmp_path)
    loaded = LMHeadSteer.from_pretrained(tmp_path, any_model=True, model=model)
    assert torch.equal(steered(model, loaded, ids), steered(model, steer, ids))


def test_tensors_that_share_memory_or_ask_for_a_gradient_are_saved_without(tmp_path):
    both = torch.randn(2, 1, 32, 4)
    for folder, pair in (("same", (both[0], both[0])), ("parts", both)):
        su.LMSteer(*pair).save_pretrained(tmp_path / folder)
        loaded = su.LMSteer.from_pretrained(tmp_path / folder)
        assert all(map(torch.equal, loaded.tensors().values(), pair))
        assert (tmp_path / folder / TENSORS).stat().st_size < 2000
    steer = su.AddSteer(torch.randn(2, 32, requires_grad=True))
    steer.save_pretrained(tmp_path)
    loaded = su.AddSteer.from_pretrained(tmp_path).add_vec
    assert torch.equal(loaded, steer.add_vec)
    assert not loaded.requires_grad


def test_a_steer_of_another_model_is_refused_unless_any_model_allows_it(tmp_path):
    models = {}
    for name in ("one", "two"):
        tiny("llama").save_pretrained(tmp_path / name)
        models[name] = AutoModelForCausalLM.from_pretrained(tmp_path / name).eval()
    head_steer(model_id="one").save_pretrained(tmp_path)
    assert su.LMSteer.from_pretrained(tmp_path, models["one"]).model_id == "one"
    with pytest.raises(ValueError, match=r"made with 'one', not with 'two'.*any_model=True"):
        su.LMSteer.from_pretrained(tmp_path, models["two"])
    assert su.LMSteer.from_pretrained(tmp_path, models["two"], any_model=True).model_id == "one"


@kinds
def test_a_steer_of_another_size_is_refused_whatever_any_model_says(kind, tmp_path):
    config = CONFIGS["llama"]()
    config.hidden_size, config.vocab_size, config.head_dim = 64, 64, 16
    head_steer(kind).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"(32|97).*64"):
        LMHeadSteer.from_pretrained(tmp_path, new_model(config), any_model=True)


def test_an_unknown_name_and_a_missing_file_are_a_file_not_found_error_that_names_it(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"'sentimnt'.*sentiment"):
        su.LMSteer.from_pretrained("sentimnt")
    for name in (JSON, TENSORS):
        head_steer().save_pretrained(tmp_path)
        (tmp_path / name).unlink()
        with pytest.raises(FileNotFoundError, match=f"holds no lm_steer.*{name}"):
            su.LMSteer.from_pretrained(tmp_path)


IMPOSSIBLE = {
    "epsilon": [float("nan"), "0.1", None],
    "names": [["a"], 5],
    "steer_values": [[1.0], "strong", [[1.0, 2.0], [3.0]]],
    "adaptor_class": ["divide", "add"],
}
FACTS = ("adaptor_class", "epsilon", "names", "steer_values", "card", "model")


@pytest.mark.parametrize(
    ("fact", "value"), [(fact, value) for fact, values in IMPOSSIBLE.items() for value in values]
)
def test_a_checkpoint_with_an_impossible_fact_is_a_value_error(tmp_path, fact, value):
    head_steer().save_pretrained(tmp_path)
    facts = json.loads((tmp_path / JSON).read_text())
    assert fact in facts
    (tmp_path / JSON).write_text(json.dumps(facts | {fact: value}))
    with pytest.raises(ValueError, match="damaged"):
        su.LMSteer.from_pretrained(tmp_path)


def without(fact: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        facts = json.loads((folder / JSON).read_text())
        del facts[fact]
        (folder / JSON).write_text(json.dumps(facts))

    return damage


def shortened(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:-10])


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


# --- errors -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("epsilon", [0, -0.1, float("nan"), float("inf")])
def test_an_epsilon_that_is_not_above_zero_and_finite_is_a_value_error(epsilon):
    with pytest.raises(ValueError, match=f"epsilon .*not {epsilon}"):
        head_steer(epsilon=epsilon)


@pytest.mark.parametrize("kind", [su.LMSteer, su.AddSteer, su.OffsetSteer])
def test_one_number_that_is_not_finite_is_a_value_error_that_names_its_tensor(kind, tmp_path):
    shape = (2, 32, 4) if kind is su.LMSteer else (2, 32)
    for name in kind.parameters:
        tensors = {one: torch.ones(shape) for one in kind.parameters}
        good = kind(**tensors)
        tensors[name].view(-1)[-1] = float("nan")
        with pytest.raises(ValueError, match=f"{name} holds inf or NaN"):
            kind(**tensors)
        with pytest.raises(ValueError, match=f"{name} holds inf or NaN"):
            good.save_pretrained(tmp_path)


@pytest.mark.parametrize("names", [("a",), ("a", "b", "c"), ("a", "a")])
def test_names_that_are_not_one_for_each_steer_are_a_value_error(names):
    with pytest.raises(ValueError, match="2 steers need as many different names"):
        head_steer(names=names)


WRONG = [
    (su.LMSteer, [(1, 32, 4), (1, 32, 5)]), (su.LMSteer, [(32, 4), (32, 4)]),
    (su.LMSteer, [(2, 32, 4), (1, 32, 4)]), (su.LMSteer, [(0, 32, 4), (0, 32, 4)]),
    (su.AddSteer, [(32,)]), (su.AddSteer, [(0, 32)]), (su.OffsetSteer, [(1, 1, 32)]),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "shapes"), WRONG)
def test_tensors_of_another_shape_are_a_value_error_that_quotes_it(kind, shapes):
    with pytest.raises(ValueError, match=r"must have the shape \[S, [DV](, R)?\]") as caught:
        kind(*map(torch.zeros, shapes))
    assert all(str(shape) in str(caught.value) for shape in shapes)


SIZES = {
    "multiply": (head_steer(width=31), "width of 31.*32"),
    "add": (head_steer("add", width=31), "width of 31.*32"),
    "offset": (su.OffsetSteer(torch.zeros(2, 96)), "vocabulary of 96.*97"),
}


@kinds
def test_a_steer_for_another_size_is_a_value_error_with_both_sizes(kind):
    model, (steer, what), hooks = tiny("gpt2"), SIZES[kind], hook_count(tiny("gpt2"))
    for use in (steer.at(1.0).on(model).__enter__, lambda: steer.fold(model, 1.0)):
        with pytest.raises(ValueError, match=what):
            use()
    assert hook_count(model) == hooks


# --- the authors' checkpoints -----------------------------------------------------------------------------


class Evil:
    def __reduce__(self):
        return (print, ("code of the file runs",))


def test_a_checkpoint_of_the_authors_is_read_with_its_epsilon(tmp_path):
    pair = {name: torch.randn(2, 32, 3) for name in ("projector1", "projector2")}
    torch.save([argparse.Namespace(epsilon=0.02, rank=3), pair, 1000], tmp_path / "checkpoint.pt")
    steer = su.LMSteer.from_checkpoint(tmp_path / "checkpoint.pt")
    assert steer.epsilon == 0.02
    assert all(torch.equal(tensor, pair[name]) for name, tensor in steer.tensors().items())


@pytest.mark.parametrize(
    "content",
    [
        [argparse.Namespace(), {"projector1": torch.ones(1, 2, 1)}, 3],
        {"projector1": 1},
        [1, 2],
        [Evil(), {}, 1],
    ],
)
def test_a_file_that_is_no_checkpoint_is_refused_and_runs_nothing(tmp_path, content, capsys):
    torch.save(content, tmp_path / "checkpoint.pt")
    with pytest.raises(ValueError, match="is no checkpoint of LM-Steer's program"):
        su.LMSteer.from_checkpoint(tmp_path / "checkpoint.pt")
    (tmp_path / "checkpoint.pt").write_bytes(b"not a pickle")
    with pytest.raises(ValueError, match="is no checkpoint"):
        su.LMSteer.from_checkpoint(tmp_path / "checkpoint.pt")
    assert capsys.readouterr().out == ""
