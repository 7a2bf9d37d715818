"""LM-Steer's formulas against explicit matrices, and models with a steer folded into them."""

import functools
from dataclasses import replace

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

CLOSE = {"atol": 1e-4, "rtol": 1e-4}
kinds = pytest.mark.parametrize("kind", HEAD_KINDS)
VALUES = [2.0, -1.0]
FOR_EACH = [[2.0, -1.0], [0.0, 3.0]]


@functools.cache
def biased(architecture: str) -> PreTrainedModel:
    """A model of its own whose output head has a bias far from zero."""
    model = new_model(CONFIGS[architecture]())
    bias = 3 * torch.randn(97, generator=torch.Generator().manual_seed(9))
    model.lm_head.bias = torch.nn.Parameter(bias, requires_grad=False)
    return model


def steered(model: PreTrainedModel, steer, ids: Tensor, mask: Tensor | None = None) -> Tensor:
    with steer.on(model):
        return logits(model, ids, mask)


def assert_near(found: Tensor, expected: Tensor, mask: Tensor) -> None:
    torch.testing.assert_close(found[mask.bool()], expected[mask.bool()], **CLOSE)


# --- the formulas -----------------------------------------------------------------------------------------


@kinds
@pytest.mark.parametrize("values", [VALUES, FOR_EACH], ids=["for all", "for each"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_logits_are_those_of_the_formula(any_model, kind, values, side):
    steer, (ids, mask) = head_steer(kind).at(values), padded([11, 6], side)
    each = values if values is FOR_EACH else [values] * 2
    found = steered(any_model, steer, ids, mask)
    assert_near(found, head_by_hand(any_model, steer, each, ids, mask), mask)
    assert (found - logits(any_model, ids, mask)).abs().amax(dim=-1)[mask.bool()].min() > 0.03


@pytest.mark.parametrize("rank", [1, 7, 8, 40])  # from 8 on, two steers are no thinner than a [D, D] matrix
@pytest.mark.parametrize("values", [VALUES, FOR_EACH], ids=["for all", "for each"])
def test_a_steer_of_any_rank_is_its_formula(rank, values):
    model, ids = tiny("llama"), random_ids(2, 9)
    steer = head_steer(rank=rank).at(values)
    assert steer.rank == rank
    each = values if values is FOR_EACH else [values] * 2
    expected = head_by_hand(model, steer, each, ids)
    torch.testing.assert_close(steered(model, steer, ids), expected, **CLOSE)


@kinds
@pytest.mark.parametrize("architecture", ["gptj", "gpt2", "gpt_neox"])
def test_the_bias_of_the_head_stays(kind, architecture):
    model, ids = biased(architecture), random_ids(2, 9)
    steer = head_steer(kind)
    assert torch.equal(steered(model, steer.at([0.0, 0.0]), ids), logits(model, ids))
    expected = head_by_hand(model, steer, FOR_EACH, ids)
    torch.testing.assert_close(steered(model, steer.at(FOR_EACH), ids), expected, **CLOSE)


@kinds
@pytest.mark.parametrize("values", [[0.0, 0.0], [[0.0, 0.0], [0.0, 0.0]]], ids=["for all", "for each"])
def test_values_of_zero_give_the_plain_logits_bit_for_bit(any_model, kind, values):
    ids, mask = padded([11, 6], "left")
    plain = logits(any_model, ids, mask)
    assert torch.equal(steered(any_model, head_steer(kind).at(values), ids, mask), plain)


def test_a_text_with_values_of_zero_beside_another_is_not_steered(main_model):
    ids = random_ids(2, 9)
    found = steered(main_model, head_steer().at([[0.0, 0.0], [1.0, 1.0]]), ids)
    plain = logits(main_model, ids)
    assert torch.equal(found[0], plain[0])
    assert not torch.allclose(found[1], plain[1], atol=0.1)


@kinds
def test_tied_input_embeddings_give_what_they_gave(any_model, kind):
    ids = random_ids(2, 9)
    plain = any_model(ids, output_hidden_states=True).hidden_states
    with head_steer(kind).at(3.0).on(any_model):
        found = any_model(ids, output_hidden_states=True).hidden_states
    assert all(map(torch.equal, found, plain))


@kinds
def test_logits_are_affine_in_the_values_and_additive_over_the_steers(main_model, kind):
    ids, steer = random_ids(2, 9), head_steer(kind, 3)
    plain = logits(main_model, ids)

    def change(*values: float) -> Tensor:
        return steered(main_model, steer.at(values), ids) - plain

    one, two, three = change(1, 0, 0), change(0, 1, 0), change(0, 0, 1)
    torch.testing.assert_close(change(-3, 0.5, 2), -3 * one + 0.5 * two + 2 * three, **CLOSE)
    assert min((a - b).abs().max() for a, b in ((one, two), (two, three), (three, one))) > 0.1


def test_the_matrix_is_what_the_last_hidden_state_gains(main_model):
    ids, steer = random_ids(2, 9), head_steer(rank=3).at([2.0, -1.0])
    hidden, head = head_input(main_model, ids), main_model.get_output_embeddings()
    products = [p1 @ p2.T for p1, p2 in zip(steer.projector1, steer.projector2, strict=True)]
    torch.testing.assert_close(steer.matrix(), 0.2 * products[0] - 0.1 * products[1])
    torch.testing.assert_close(steer.matrix([0.0, 1.0]), 0.1 * products[1])
    by_hand = (hidden + hidden @ steer.matrix()) @ head.weight.T
    torch.testing.assert_close(steered(main_model, steer, ids), by_hand, **CLOSE)
    assert torch.linalg.matrix_rank(steer.matrix()) == 6


def test_word_vectors_become_what_the_paper_says(main_model):
    ids, steer, v = random_ids(2, 9), head_steer(num_steers=1), 2.0
    hidden, words = head_input(main_model, ids), main_model.get_output_embeddings().weight
    change = torch.eye(32) + 0.1 * v * steer.projector1[0] @ steer.projector2[0].T
    by_hand = hidden @ torch.stack([change @ word for word in words]).T
    torch.testing.assert_close(steered(main_model, steer.at(v), ids), by_hand, **CLOSE)


@kinds
@pytest.mark.parametrize("factor", [0.01, 7.0])
def test_epsilon_may_move_into_the_first_tensor(kind, factor):
    model, ids, steer = tiny("gpt2"), random_ids(2, 9), head_steer(kind).at(VALUES)
    name = steer.parameters[0]
    other = replace(steer, epsilon=steer.epsilon / factor, **{name: factor * getattr(steer, name)})
    torch.testing.assert_close(steered(model, other, ids), steered(model, steer, ids), **CLOSE)


# --- dtypes and gradients ---------------------------------------------------------------------------------


@kinds
@pytest.mark.parametrize("values", [VALUES, FOR_EACH], ids=["for all", "for each"])
def test_a_model_in_bfloat16_is_steered_in_bfloat16(kind, values):
    model, ids = new_model(CONFIGS["llama"]()).bfloat16(), random_ids(2, 9)
    steer = head_steer(kind, epsilon=0.1 if kind == "multiply" else 2.0)
    change = steered(model, steer.at(values), ids) - logits(model, ids)
    assert change.dtype == torch.bfloat16
    exact = new_model(CONFIGS["llama"]())
    each = values if values is FOR_EACH else [values] * 2
    expected = head_by_hand(exact, steer, each, ids) - logits(exact, ids)
    assert (change - expected).norm() < 0.03 * expected.norm()


@kinds
@pytest.mark.parametrize("values", [VALUES, FOR_EACH, [0.0, 0.0]], ids=["for all", "for each", "zero"])
def test_the_gradient_reaches_the_tensors_of_the_steer_alone(kind, values):
    model, ids = tiny("gpt2"), random_ids(2, 9)
    steer = head_steer(kind)
    steer = replace(steer, **{name: t.clone().requires_grad_() for name, t in steer.tensors().items()})
    tensors, weights = list(steer.tensors().values()), torch.randn(2, 9, 97)
    each = values if values is FOR_EACH else [values] * 2
    expected = torch.autograd.grad((weights * head_by_hand(model, steer, each, ids)).sum(), tensors)
    with steer.at(values).on(model):
        found = torch.autograd.grad((weights * model(ids).logits).sum(), tensors)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-3, rtol=1e-3)
    assert all((one != 0).any() == (values != [0.0, 0.0]) for one in found)
    assert not any(parameter.requires_grad for parameter in model.parameters())


# --- folding ----------------------------------------------------------------------------------------------


def test_a_folded_model_gives_the_steered_logits_and_survives_saving(any_model, tmp_path):
    steer, (ids, mask) = head_steer().at(VALUES), padded([11, 6], "left")
    before = {name: weight.clone() for name, weight in any_model.state_dict().items()}
    ties, expected = dict(any_model.all_tied_weights_keys), steered(any_model, steer, ids, mask)
    config, plain = any_model.config.to_dict(), logits(any_model, ids, mask)
    folded = steer.fold(any_model)
    assert type(folded) is type(any_model)
    assert_near(logits(folded, ids, mask), expected, mask)
    folded.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(logits(loaded, ids, mask), logits(folded, ids, mask))

    assert any_model.config.to_dict() == config
    assert any_model.all_tied_weights_keys == ties
    assert all(torch.equal(weight, before[name]) for name, weight in any_model.state_dict().items())
    assert torch.equal(logits(any_model, ids, mask), plain)


def test_nothing_ties_the_head_of_a_folded_model_again(any_model, tmp_path, transformers_warnings):
    ids, folded = random_ids(2, 9), head_steer().at(VALUES).fold(any_model)
    expected = logits(folded, ids)
    folded.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    for model in (folded, loaded):
        model.tie_weights()
        assert torch.equal(logits(model, ids), expected)
        assert model.config.tie_word_embeddings is False
    assert not transformers_warnings


def test_a_folded_model_shares_every_weight_but_its_head(any_model):
    folded = head_steer().at(3.0).fold(any_model)
    pairs = list(zip(folded.named_parameters(), any_model.named_parameters(), strict=False))
    own = dict(folded.named_parameters()).keys() - dict(any_model.named_parameters()).keys()
    tied = any_model.get_output_embeddings().weight is any_model.get_input_embeddings().weight
    assert own == ({"lm_head.weight"} if tied else set())
    changed = [name for (name, new), (_, old) in pairs if new.data_ptr() != old.data_ptr()]
    head = [name for name, module in any_model.named_modules() if module is any_model.get_output_embeddings()]
    assert changed == ([] if tied else [f"{head[0]}.weight"])
    assert not torch.equal(folded.get_output_embeddings().weight, any_model.get_output_embeddings().weight)


@pytest.mark.parametrize("kind", ["add", "offset"])
@pytest.mark.parametrize("architecture", ["gptj"])
def test_vectors_are_folded_into_a_bias(kind, architecture, tmp_path):
    model, ids, steer = biased(architecture), random_ids(2, 9), head_steer(kind, epsilon=1.0).at(VALUES)
    plain = logits(model, ids)
    folded = steer.fold(model)
    torch.testing.assert_close(logits(folded, ids), steered(model, steer, ids), **CLOSE)
    folded.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(logits(loaded, ids), logits(folded, ids))
    assert torch.equal(logits(model, ids), plain)
    assert folded.lm_head.weight.data_ptr() == model.lm_head.weight.data_ptr()


@pytest.mark.parametrize("kind", ["add", "offset"])
def test_vectors_without_a_bias_to_fold_them_into_are_a_value_error(main_model, kind):
    with pytest.raises(ValueError, match=rf"{main_model.config.model_type} model has no bias.*'multiply'"):
        head_steer(kind).at(1.0).fold(main_model)


@kinds
def test_the_values_to_fold_may_be_given_and_are_one_row(kind):
    model, ids, steer = biased("gptj"), random_ids(2, 9), head_steer(kind)
    found = logits(steer.at(9.0).fold(model, VALUES), ids)
    torch.testing.assert_close(found, steered(model, steer.at(VALUES), ids), **CLOSE)
    torch.testing.assert_close(
        logits(steer.fold(model, 2.0), ids), steered(model, steer.at(2.0), ids), **CLOSE
    )
    for refused in (lambda: steer.fold(model, FOR_EACH), lambda: steer.at(FOR_EACH).fold(model)):
        with pytest.raises(ValueError, match=r"one row of values, not \(2, 2\)"):
            refused()
    with pytest.raises(ValueError, match=r"steer\.at"):
        steer.fold(model)


@pytest.mark.parametrize("other", [head_steer().at(1.0), su.ActivationAddition(9.0, 1, "Love")], ids=type)
def test_what_is_on_while_folding_is_not_on_in_the_folded_model(main_model, tokenizer, other):
    ids, steer = random_ids(2, 9), head_steer(seed=1).at(VALUES)
    expected, hooks = steered(main_model, steer, ids), hook_count(main_model)
    with other.on(main_model, tokenizer):
        folded = steer.fold(main_model)
        inside = logits(folded, ids)
    torch.testing.assert_close(inside, expected, **CLOSE)
    torch.testing.assert_close(logits(folded, ids), expected, **CLOSE)
    assert hook_count(folded) == hook_count(main_model) == hooks


def test_a_folded_model_still_tells_its_hidden_states(main_model):
    """transformers leaves hooks of its own on a model, which a copy needs as well."""
    ids = random_ids(2, 9)
    plain = main_model(ids, output_hidden_states=True).hidden_states
    with head_steer().at(1.0).on(main_model):
        folded = head_steer().fold(main_model, VALUES)
    assert all(map(torch.equal, folded(ids, output_hidden_states=True).hidden_states, plain))


def test_a_folded_model_may_be_steered_and_folded_again(main_model):
    ids, one, two = random_ids(2, 9), head_steer().at(VALUES), head_steer(seed=1).at(1.0)
    again = two.fold(one.fold(main_model))
    expected = head_input(main_model, ids) @ (torch.eye(32) + two.matrix()) @ (torch.eye(32) + one.matrix())
    expected = expected @ main_model.get_output_embeddings().weight.T
    torch.testing.assert_close(logits(again, ids), expected, atol=1e-3, rtol=1e-4)
    torch.testing.assert_close(steered(one.fold(main_model), two, ids), expected, atol=1e-3, rtol=1e-4)


def test_a_folded_model_writes_what_the_steered_one_writes(main_model, tokenizer):
    steer, kwargs = head_steer().at(VALUES), {"num_samples": 2, "max_new_tokens": 5, "seed": 3}
    prompts = ["I hate you because", "abc"]
    found = su.generate(steer.fold(main_model), tokenizer, prompts, **kwargs)
    expected = su.generate(main_model, tokenizer, prompts, steer=steer, **kwargs)
    assert_same_up_to_rounding(found.drop(columns="steered"), expected.drop(columns="steered"))


def test_a_model_in_bfloat16_is_folded_in_bfloat16():
    model, ids, steer = new_model(CONFIGS["gpt2"]()).bfloat16(), random_ids(2, 9), head_steer().at(VALUES)
    folded = steer.fold(model)
    assert {weight.dtype for weight in folded.parameters()} == {torch.bfloat16}
    found, expected, plain = logits(folded, ids), steered(model, steer, ids), logits(model, ids)
    assert (found - expected).float().norm() < 0.02 * (expected - plain).float().norm()


def test_a_folded_head_asks_for_no_gradient_though_the_projectors_do(main_model):
    steer = head_steer()
    steer = replace(steer, projector1=steer.projector1.requires_grad_())
    folded = steer.fold(main_model, 1.0)
    assert not any(weight.requires_grad for weight in folded.parameters())


# --- errors -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shapes", [((1, 32, 4), (1, 32, 5)), ((32, 4), (32, 4)), ((2, 32, 4), (1, 32, 4))])
def test_projectors_of_other_shapes_are_a_value_error_that_quotes_them(shapes):
    with pytest.raises(ValueError, match=r"\[S, D, R\]") as caught:
        su.LMSteer(*map(torch.zeros, shapes))
    assert all(str(shape) in str(caught.value) for shape in shapes)


@pytest.mark.parametrize(("kind", "shape"), [(su.AddSteer, r"\[S, D\]"), (su.OffsetSteer, r"\[S, V\]")])
@pytest.mark.parametrize("given", [(32,), (1, 1, 32)])
def test_vectors_of_another_shape_are_a_value_error_that_quotes_it(kind, shape, given):
    with pytest.raises(ValueError, match=shape) as caught:
        kind(torch.zeros(given))
    assert str(given) in str(caught.value)


@pytest.mark.parametrize(
    ("steer", "what"),
    [
        (head_steer(width=31), "width of 31.*32"),
        (head_steer("add", width=31), "width of 31.*32"),
        (su.OffsetSteer(torch.zeros(2, 96)), "vocabulary of 96.*97"),
    ],
    ids=HEAD_KINDS,
)
def test_a_steer_for_another_size_is_a_value_error_with_both_sizes(main_model, steer, what):
    hooks = hook_count(main_model)
    for use in (steer.at(1.0).on(main_model).__enter__, lambda: steer.fold(main_model, 1.0)):
        with pytest.raises(ValueError, match=what):
            use()
    assert hook_count(main_model) == hooks


def test_the_width_that_counts_is_that_of_the_last_hidden_state(tmp_path):
    """OPT-350m's output head is narrower than its residual stream."""
    config = CONFIGS["opt"]()
    config.word_embed_proj_dim = 16
    model, ids = new_model(config), random_ids(2, 9)
    steer = head_steer(width=16).at(VALUES)
    expected = head_by_hand(model, steer, [VALUES] * 2, ids)
    torch.testing.assert_close(steered(model, steer, ids), expected, **CLOSE)
    torch.testing.assert_close(logits(steer.fold(model), ids), expected, **CLOSE)
    with pytest.raises(ValueError, match=r"32.*16"):
        head_steer().fold(model, 1.0)


def test_an_architecture_without_an_entry_is_steered_as_well(monkeypatch):
    """Nothing but the output head is needed."""
    monkeypatch.delitem(hf.BLOCKS, "llama")
    model, ids, steer = tiny("llama"), random_ids(2, 9), head_steer().at(VALUES)
    expected = head_by_hand(model, steer, [VALUES] * 2, ids)
    torch.testing.assert_close(steered(model, steer, ids), expected, **CLOSE)
    torch.testing.assert_close(logits(steer.fold(model), ids), expected, **CLOSE)
