"""Additions to the residual stream: what is captured, where it is added, and what stays as it was."""

import copy
import itertools
from dataclasses import FrozenInstanceError, replace

import numpy as np
import pytest
import torch
from conftest import (
    KINDS,
    WINDOW,
    added_by_hand,
    addend,
    assert_same_up_to_rounding,
    hook_count,
    kept_by_hand,
    logits,
    padded,
    random_ids,
    small_tokenizer,
    tiny,
)
from torch import Tensor
from transformers import DynamicCache

import steer_utils as su
from steer_utils import hf
from steer_utils.additions.vector import LOCATIONS, POSITIONS
from steer_utils.models import token_ids

LENGTH = WINDOW + 5
CLOSE = {"atol": 2e-5, "rtol": 2e-5}
HOOK = "blocks.1.hook_resid_pre"
LOVE = su.ActivationAddition(2.0, 1, "Love")
HATE = su.ActivationAddition(-0.5, 1, "Hatred")
EVERYWHERE = list(itertools.product(LOCATIONS, POSITIONS))
GENERATE = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None}


def vector(model, tokenizer, *additions: su.ActivationAddition) -> su.SteeringVector:
    (one,) = su.steering_vectors(model, tokenizer, additions)
    return one


def steered(model, steer: su.SteeringVector, ids: Tensor, mask: Tensor | None = None) -> Tensor:
    with steer.on(model):
        return logits(model, ids, mask)


# --- the value --------------------------------------------------------------------------------------------


def test_a_layer_is_short_for_the_name_of_its_hook():
    by_layer = su.ActivationAddition(5, 6, "Love")
    by_name = su.ActivationAddition(5, "blocks.6.hook_resid_pre", "Love")
    assert by_layer == by_name
    assert hash(by_layer) == hash(by_name)
    assert by_layer.act_name == "blocks.6.hook_resid_pre"


def test_additions_that_differ_in_anything_are_not_equal():
    additions = {
        su.ActivationAddition(5, 6, "Love"),
        su.ActivationAddition(4, 6, "Love"),
        su.ActivationAddition(5, 7, "Love"),
        su.ActivationAddition(5, 6, "Hate"),
        su.ActivationAddition(5, 6, tokens=(0, 1)),
        su.ActivationAddition(5, 6, tokens=(0, 2)),
        su.ActivationAddition(5, "blocks.6.hook_mlp_out", "Love"),
        su.ActivationAddition(5, 6, "Love", addition_location="mid"),
        su.ActivationAddition(5, 6, "Love", positions="all"),
        su.ActivationAddition(5, 6, "Love", res_stream_slice=slice(1, 3)),
        su.ActivationAddition(5, 6, "Love", res_stream_slice=slice(1, 4)),
    }
    assert len(additions) == 11


def test_a_slice_and_its_start_and_stop_are_the_same_columns():
    one = su.ActivationAddition(5, 6, "Love", res_stream_slice=slice(1, 3))
    assert one == su.ActivationAddition(5, 6, "Love", res_stream_slice=(1, 3))
    assert hash(one) == hash(su.ActivationAddition(5, 6, "Love", res_stream_slice=(1, 3)))


@pytest.mark.parametrize("tokens", [[0, 5, 9], (0, 5, 9), torch.tensor([0, 5, 9]), np.array([0, 5, 9])])
def test_tokens_of_any_kind_become_a_tuple_of_numbers(tokens):
    addition = su.ActivationAddition(1.0, 0, tokens=tokens)
    assert addition.tokens == (0, 5, 9)
    assert {type(token) for token in addition.tokens} == {int}
    assert hash(addition) == hash(su.ActivationAddition(1.0, 0, tokens=(0, 5, 9)))


def test_an_addition_cannot_be_changed():
    with pytest.raises(FrozenInstanceError):
        LOVE.coeff = 3.0
    with pytest.raises(FrozenInstanceError):
        (LOVE + HATE).terms = ()
    with pytest.raises(FrozenInstanceError):
        vector(tiny("gpt2"), None, su.ActivationAddition(1.0, 1, tokens=(0, 1))).rows = torch.zeros(1, 32)


@pytest.mark.parametrize("texts", [{}, {"prompt": "Love", "tokens": (0, 1)}])
def test_both_or_neither_of_prompt_and_tokens_is_a_value_error(texts):
    with pytest.raises(ValueError, match="a prompt or tokens"):
        su.ActivationAddition(1.0, 6, **texts)


@pytest.mark.parametrize("coeff", [float("nan"), float("inf"), -float("inf")])
def test_a_coefficient_that_is_not_finite_is_a_value_error_that_quotes_it(coeff):
    with pytest.raises(ValueError, match=f"coeff.*{coeff}"):
        su.ActivationAddition(coeff, 6, "Love")


@pytest.mark.parametrize(
    "name", ["blocks.6.hook_q", "blocks.-1.hook_resid_pre", "resid_pre", "6", -1, True, None, 1.0]
)
def test_an_unknown_hook_is_a_value_error_that_quotes_it_and_shows_a_good_one(name):
    with pytest.raises(ValueError, match=rf"{name}.*blocks\.6\.hook_resid_pre"):
        su.ActivationAddition(1.0, name, "Love")


@pytest.mark.parametrize(
    "bad", [{"addition_location": "end"}, {"addition_location": None}, {"positions": "later"}], ids=str
)
def test_an_unknown_location_or_choice_of_positions_is_a_value_error_that_quotes_it(bad):
    ((name, value),) = bad.items()
    with pytest.raises(ValueError, match=f"{name} must be one of .*not {value!r}"):
        su.ActivationAddition(1.0, 6, "Love", **bad)


def test_a_layer_may_be_a_numpy_integer():
    assert su.ActivationAddition(1.0, np.int64(6), "Love") == su.ActivationAddition(1.0, 6, "Love")


def test_no_tokens_at_all_are_a_value_error():
    with pytest.raises(ValueError, match="token"):
        vector(tiny("gpt2"), None, su.ActivationAddition(1.0, 1, tokens=()))


def test_an_addition_given_as_text_asks_for_the_tokenizer():
    with pytest.raises(ValueError, match=r"'Love'.*tokenizer"), LOVE.on(tiny("gpt2")):
        pass


# --- arithmetic -------------------------------------------------------------------------------------------


def test_multiples_have_the_multiple_of_the_coefficient_and_keep_the_rest():
    given = {"act_name": "blocks.6.hook_mlp_out", "prompt": "Love", "addition_location": "back"}
    given |= {"positions": "all", "res_stream_slice": (1, 3)}
    one = su.ActivationAddition(2.0, **given)
    assert 2.5 * one == one * 2.5 == np.float64(2.5) * one == su.ActivationAddition(5.0, **given)
    assert -one == su.ActivationAddition(-2.0, **given)


def test_sums_and_differences_list_their_terms_in_order():
    third = su.ActivationAddition(1.0, 2, tokens=(0, 5))
    assert (LOVE + HATE).terms == (LOVE, HATE)
    assert (LOVE - HATE).terms == (LOVE, -HATE)
    assert (LOVE + HATE + third).terms == (LOVE + (HATE + third)).terms == (LOVE, HATE, third)
    assert (LOVE - (HATE + third)).terms == (LOVE, -HATE, -third)
    assert ((LOVE + HATE) - (third + LOVE)).terms == (LOVE, HATE, -third, -LOVE)
    assert (-(LOVE + HATE)).terms == (-LOVE, -HATE)
    assert (3 * (LOVE + HATE)).terms == ((LOVE + HATE) * 3).terms == (3 * LOVE, 3 * HATE)
    assert [*(LOVE + HATE)] == [LOVE, HATE]


def test_sums_of_equal_terms_are_equal_and_hash_alike():
    assert su.AdditionSum((LOVE, HATE)) == LOVE + HATE
    assert hash(LOVE + HATE) == hash(su.AdditionSum((LOVE, HATE)))
    assert LOVE + HATE != HATE + LOVE


def test_a_pair_is_a_difference():
    pair = su.get_x_vector("Love", "Hate", coeff=5, act_name=6)
    one, other = (su.ActivationAddition(1, 6, text) for text in ("Love", "Hate"))
    assert su.AdditionSum(pair) == 5 * (one - other)


@pytest.mark.parametrize("steer", [LOVE, LOVE + HATE], ids=["addition", "sum"])
@pytest.mark.parametrize("other", [1, None, "Love", [1], torch.zeros(2, 32)], ids=str)
def test_an_addition_and_something_else_do_not_add_up(steer, other):
    for join in (lambda: steer + other, lambda: steer - other):
        with pytest.raises(TypeError):
            join()


@pytest.mark.parametrize("factor", [float("nan"), float("inf")])
def test_a_factor_that_is_not_finite_is_a_value_error(factor):
    for steer in (LOVE, LOVE + HATE):
        with pytest.raises(ValueError, match="finite"):
            factor * steer


def test_a_sum_steers_like_its_terms_one_inside_the_other_in_any_order(main_model, tokenizer):
    third = su.ActivationAddition(1.5, "blocks.0.hook_mlp_out", "b", addition_location="back")
    ids, mask = padded([LENGTH, 8], "left")
    with LOVE.on(main_model, tokenizer), HATE.on(main_model, tokenizer), third.on(main_model, tokenizer):
        nested = logits(main_model, ids, mask)
    for terms in itertools.permutations([LOVE, HATE, third]):
        with su.AdditionSum(terms).on(main_model, tokenizer):
            torch.testing.assert_close(logits(main_model, ids, mask), nested, **CLOSE)


def test_multiplying_a_sum_multiplies_what_it_adds(main_model, tokenizer):
    one, six = (vector(main_model, tokenizer, *steer).rows for steer in (LOVE + HATE, -3 * (LOVE + HATE)))
    torch.testing.assert_close(-3 * one, six, **CLOSE)


# --- pairs ------------------------------------------------------------------------------------------------


def test_a_pair_has_opposite_coefficients():
    love, hate = su.get_x_vector("Love", "Hate", coeff=5, act_name=6)
    assert love == su.ActivationAddition(5, 6, "Love")
    assert hate == su.ActivationAddition(-5, 6, "Hate")


def test_both_of_a_pair_act_at_the_place_that_is_asked_for():
    where = {"addition_location": "back", "positions": "all", "res_stream_slice": (1, 3)}
    love, hate = su.get_x_vector("Love", "Hate", 5, "blocks.6.hook_mlp_out", **where)
    assert love == su.ActivationAddition(5, "blocks.6.hook_mlp_out", "Love", **where)
    assert hate == su.ActivationAddition(-5, "blocks.6.hook_mlp_out", "Hate", **where)


@pytest.mark.parametrize(
    ("method", "plus", "minus"),
    [
        ("tokens_right", (0, 45, 80, 87, 70), (0, 41, 74, 7, 7)),
        ("tokens_left", (0, 45, 80, 87, 70), (0, 7, 7, 41, 74)),
    ],
)
@pytest.mark.parametrize("swapped", [False, True])
def test_padding_fills_the_shorter_prompt_behind_its_text_or_behind_bos(
    tokenizer, method, plus, minus, swapped
):
    texts = ("Hi", "Love") if swapped else ("Love", "Hi")
    pair = su.get_x_vector(*texts, 3, 6, tokenizer=tokenizer, pad_method=method, custom_pad_id=7)
    assert [one.tokens for one in pair] == ([minus, plus] if swapped else [plus, minus])
    assert [one.coeff for one in pair] == [3, -3]


@pytest.mark.parametrize("method", ["tokens_right", "tokens_left"])
def test_a_pad_id_of_zero_is_honoured(method):
    gemma = small_tokenizer("gemma")  # 0 is <pad>, 1 <eos>, 2 <bos>
    gpt2 = small_tokenizer("gpt2")  # no padding token
    assert (
        0
        in su.get_x_vector("abc", "d", 1, 6, tokenizer=gpt2, pad_method=method, custom_pad_id=0)[1].tokens[1:]
    )
    one, other = su.get_x_vector("abc", "d", 1, 6, tokenizer=gemma, pad_method=method, custom_pad_id=1)
    assert (one.tokens.count(1), other.tokens.count(1), other.tokens.count(0)) == (0, 2, 0)
    default = su.get_x_vector("abc", "d", 1, 6, tokenizer=gemma, pad_method=method)[1]
    assert default.tokens.count(gemma.pad_token_id) == 2


def test_prompts_of_equal_length_are_not_padded(tokenizer):
    pair = su.get_x_vector(
        "Love", "Hate", 1, 6, tokenizer=tokenizer, pad_method="tokens_right", custom_pad_id=1
    )
    assert [one.tokens for one in pair] == [tuple(token_ids(tokenizer, text)) for text in ("Love", "Hate")]


def test_errors_of_padding(tokenizer):
    with pytest.raises(ValueError, match="'tokens_middle'"):
        su.get_x_vector("a", "bc", 1, 6, tokenizer=tokenizer, pad_method="tokens_middle")
    with pytest.raises(ValueError, match=r"tokens_left.*tokenizer"):
        su.get_x_vector("a", "bc", 1, 6, pad_method="tokens_left")
    with pytest.raises(ValueError, match="custom_pad_id"):
        su.get_x_vector("a", "bc", 1, 6, tokenizer=small_tokenizer("gpt2"), pad_method="tokens_right")


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        ("tokens_right", [(0, 45, 80, 87, 70), (0, 7, 7, 7, 7), (0, 41, 74, 7, 7), (0, 9, 7, 7, 7)]),
        ("tokens_left", [(0, 45, 80, 87, 70), (0, 7, 7, 7, 7), (0, 7, 7, 41, 74), (0, 7, 7, 7, 9)]),
    ],
)
def test_padded_makes_any_number_of_texts_as_long_as_the_longest_and_keeps_the_rest(
    tokenizer, method, expected
):
    additions = [
        LOVE,
        su.ActivationAddition(1.0, 2, ""),
        su.ActivationAddition(-3.0, "blocks.0.hook_mlp_out", "Hi", addition_location="mid", positions="all"),
        su.ActivationAddition(0.5, 1, tokens=(0, 9), res_stream_slice=(1, 3)),
    ]
    found = su.padded(iter(additions), tokenizer, method, custom_pad_id=7)
    assert [one.tokens for one in found] == expected
    assert [replace(one, tokens=None, prompt="x") for one in found] == [
        replace(one, tokens=None, prompt="x") for one in additions
    ]


def test_token_ids_need_no_tokenizer_to_be_padded():
    pair = su.ActivationAddition(1.0, 1, tokens=(0, 3)), su.ActivationAddition(1.0, 1, tokens=(0, 4, 5))
    assert [one.tokens for one in su.padded(pair, None, custom_pad_id=9)] == [(0, 3, 9), (0, 4, 5)]
    with pytest.raises(ValueError, match="custom_pad_id"):
        su.padded(pair, None)


# --- what is captured -------------------------------------------------------------------------------------


def test_a_vector_is_the_coefficient_times_the_residual_stream_of_the_text(any_model, tokenizer):
    texts = {"Love": 2.0, "a much longer text": -0.5, "": 1.5}
    for layer in range(any_model.config.num_hidden_layers):
        name = f"blocks.{layer}.hook_resid_pre"
        for text, coeff in texts.items():
            ids = torch.tensor([token_ids(tokenizer, text)])
            expected = coeff * hf.activations(any_model, ids, torch.ones_like(ids), [name])[name][0]
            found = vector(any_model, tokenizer, su.ActivationAddition(coeff, layer, text))
            assert found.act_name == name
            torch.testing.assert_close(found.rows, expected, **CLOSE)


@pytest.mark.parametrize("kind", KINDS)
def test_a_vector_is_the_coefficient_times_the_activation_at_its_hook(main_model, tokenizer, kind):
    texts = {"Love": 2.0, "a much longer text": -0.5, "": 1.5}
    for layer, (text, coeff) in itertools.product(range(3), texts.items()):
        name, seen = f"blocks.{layer}.hook_{kind}", []
        with kept_by_hand(main_model, name, seen):
            logits(main_model, torch.tensor([token_ids(tokenizer, text)]))
        found = vector(main_model, tokenizer, su.ActivationAddition(coeff, name, text))
        assert (found.act_name, found.rows.shape) == (name, seen[0][0].shape)
        torch.testing.assert_close(found.rows, coeff * seen[0][0], **CLOSE)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("location", "positions"), EVERYWHERE)
def test_additions_of_unequal_lengths_each_keep_to_their_own_tokens(
    main_model, tokenizer, kind, location, positions
):
    name, texts = f"blocks.1.hook_{kind}", {"Love": 2.0, "Hatred": -1.0, "Hope": 0.5, "": 1.0}
    additions = [
        su.ActivationAddition(coeff, name, text, None, location, positions) for text, coeff in texts.items()
    ]
    ids, what = random_ids(1, LENGTH), torch.zeros(LENGTH, 32)
    for text, coeff in texts.items():
        seen = []
        with kept_by_hand(main_model, name, seen):
            logits(main_model, torch.tensor([token_ids(tokenizer, text)]))
        what += addend(coeff * seen[0][0], LENGTH, LENGTH, location, positions)
    with added_by_hand(main_model, name, what):
        by_hand = logits(main_model, ids)
    with su.apply_activation_additions(main_model, additions, tokenizer):
        torch.testing.assert_close(logits(main_model, ids), by_hand, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("columns", "kept"),
    [
        (slice(1, 3), [1, 2]),
        ((1, 3), [1, 2]),
        (slice(None, 2), [0, 1]),
        ((30, None), [30, 31]),
        (slice(0, 32, 8), [0, 8, 16, 24]),
        (slice(None), list(range(32))),
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", KINDS)
def test_a_slice_reaches_its_columns_and_no_others(main_model, tokenizer, kind, columns, kept):
    steer = su.ActivationAddition(2.0, f"blocks.1.hook_{kind}", "Love", res_stream_slice=columns)
    plain, seen, ids = [], [], random_ids(2, LENGTH)
    with kept_by_hand(main_model, steer.act_name, plain):
        logits(main_model, ids)
    with steer.on(main_model, tokenizer), kept_by_hand(main_model, steer.act_name, seen):
        logits(main_model, ids)
    rows = vector(main_model, tokenizer, replace(steer, res_stream_slice=None)).rows
    others = [column for column in range(32) if column not in kept]
    assert torch.equal(seen[0][..., others], plain[0][..., others])
    assert torch.equal(seen[0][:, 5:], plain[0][:, 5:])
    torch.testing.assert_close(seen[0][:, :5, kept], plain[0][:, :5, kept] + rows[:, kept], **CLOSE)


@pytest.mark.parametrize("columns", [slice(3, 3), (100, 200)])
def test_a_slice_without_columns_is_a_value_error(main_model, tokenizer, columns):
    with pytest.raises(ValueError, match="none of the 32 columns"):
        vector(main_model, tokenizer, su.ActivationAddition(1.0, 1, "Love", res_stream_slice=columns))


def test_the_vectors_know_their_hook_place_and_model(tokenizer):
    model = copy.deepcopy(tiny("gpt2"))
    model.name_or_path = "some/model"
    steer = su.ActivationAddition(
        2.0, "blocks.1.hook_mlp_out", "Love", addition_location="mid", positions="all"
    )
    found = vector(model, tokenizer, steer)
    assert (found.act_name, found.addition_location, found.positions) == (
        "blocks.1.hook_mlp_out",
        "mid",
        "all",
    )
    assert found.model_id == "some/model"


def test_additions_at_one_hook_are_summed_from_the_first_position_and_hooks_stay_apart(main_model, tokenizer):
    texts = [("Love", 2.0, 1), ("a long text indeed", -1.0, 1), ("Hate", 0.5, 2), ("b", 3.0, 1)]
    additions = [su.ActivationAddition(coeff, layer, text) for text, coeff, layer in texts]
    together = {one.act_name: one.rows for one in su.steering_vectors(main_model, tokenizer, additions)}
    alone = [vector(main_model, tokenizer, addition).rows for addition in additions]
    expected = alone[1].clone()
    for rows in (alone[0], alone[3]):
        expected[: len(rows)] += rows
    assert list(together) == ["blocks.1.hook_resid_pre", "blocks.2.hook_resid_pre"]
    torch.testing.assert_close(together["blocks.1.hook_resid_pre"], expected, **CLOSE)
    torch.testing.assert_close(together["blocks.2.hook_resid_pre"], alone[2], **CLOSE)


@pytest.mark.parametrize("hook", [0, 1, 2, *(f"blocks.1.hook_{kind}" for kind in KINDS[1:])])
@pytest.mark.parametrize("method", ["tokens_right", "tokens_left"])
def test_the_bos_row_of_a_padded_pair_cancels_exactly(main_model, tokenizer, hook, method):
    pair = su.get_x_vector("Hat", "Loving", 5, hook, tokenizer=tokenizer, pad_method=method, custom_pad_id=1)
    rows = vector(main_model, tokenizer, *pair).rows
    assert rows.shape == (7, 32)
    assert (rows[0] == 0).all()
    assert (rows[1:].abs().sum(dim=1) > 0.1).all()


def test_a_pair_of_one_text_is_zero_everywhere(main_model, tokenizer):
    rows = vector(main_model, tokenizer, *su.get_x_vector("Love", "Love", 5, 1)).rows
    assert torch.equal(rows, torch.zeros(5, 32))


def test_capturing_while_another_steer_is_on_sees_the_plain_model(main_model, tokenizer):
    expected = vector(main_model, tokenizer, LOVE).rows
    with su.ActivationAddition(20.0, 0, "Hatred").on(main_model, tokenizer):
        assert torch.equal(vector(main_model, tokenizer, LOVE).rows, expected)
        inside = steered(main_model, vector(main_model, tokenizer, LOVE), random_ids(1, LENGTH))
    both = [su.ActivationAddition(20.0, 0, "Hatred"), LOVE]
    first, second = su.steering_vectors(main_model, tokenizer, both)
    with first.on(main_model):
        torch.testing.assert_close(steered(main_model, second, random_ids(1, LENGTH)), inside, **CLOSE)


def test_no_additions_make_no_vectors(tokenizer):
    assert su.steering_vectors(tiny("gpt2"), tokenizer, []) == []


# --- what is added ----------------------------------------------------------------------------------------


def test_the_block_receives_its_input_plus_the_rows(any_model, tokenizer):
    ids, steer, seen = random_ids(2, LENGTH), vector(any_model, tokenizer, LOVE), []
    plain = hf.activations(any_model, ids, torch.ones_like(ids), [HOOK])[HOOK]
    with steer.on(any_model):
        handle = hf.block(any_model, 1).register_forward_pre_hook(
            lambda module, args, kwargs: seen.append(args[0] if args else kwargs["hidden_states"]),
            with_kwargs=True,
        )
        logits(any_model, ids)
        handle.remove()
    assert torch.equal(seen[0][:, 5:], plain[:, 5:])
    torch.testing.assert_close(seen[0][:, :5], plain[:, :5] + steer.rows, **CLOSE)


def test_a_coefficient_of_zero_leaves_the_logits_as_they_are_to_the_last_bit(any_model, tokenizer):
    ids, mask = padded([LENGTH, 6], "left")
    nothing = vector(any_model, tokenizer, su.ActivationAddition(0.0, 1, "Love"))
    assert torch.equal(steered(any_model, nothing, ids, mask), logits(any_model, ids, mask))
    assert not torch.allclose(
        steered(any_model, vector(any_model, tokenizer, LOVE), ids, mask), logits(any_model, ids, mask)
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("location", "positions"), EVERYWHERE)
def test_a_coefficient_of_zero_changes_no_bit_anywhere(main_model, tokenizer, kind, location, positions):
    ids, mask = padded([LENGTH, 6], "left")
    name = f"blocks.1.hook_{kind}"
    plain = logits(main_model, ids, mask)
    for coeff in (0.0, 1e-3):
        with su.ActivationAddition(coeff, name, "Love", None, location, positions).on(main_model, tokenizer):
            assert torch.equal(logits(main_model, ids, mask), plain) == (coeff == 0)


def test_two_additions_one_inside_the_other_are_their_sum(main_model, tokenizer):
    other, ids = su.ActivationAddition(-1.5, 1, "I hate you"), random_ids(2, LENGTH)
    together = steered(main_model, vector(main_model, tokenizer, LOVE, other), ids)
    with LOVE.on(main_model, tokenizer), other.on(main_model, tokenizer):
        torch.testing.assert_close(logits(main_model, ids), together, **CLOSE)
    swapped = steered(main_model, vector(main_model, tokenizer, other, LOVE), ids)
    torch.testing.assert_close(swapped, together, **CLOSE)


def test_the_vector_is_linear_in_the_coefficient(main_model, tokenizer):
    one, two, three = (
        vector(main_model, tokenizer, su.ActivationAddition(coeff, 1, "Love")).rows
        for coeff in (1.25, -3.0, -1.75)
    )
    torch.testing.assert_close(one + two, three, **CLOSE)


def test_swapping_the_prompts_and_the_sign_changes_nothing(main_model, tokenizer):
    ids = random_ids(1, LENGTH)
    one, other = (
        vector(main_model, tokenizer, *su.get_x_vector(*texts, coeff, 1))
        for texts, coeff in ((("Love", "Hate"), 5), (("Hate", "Love"), -5))
    )
    torch.testing.assert_close(steered(main_model, one, ids), steered(main_model, other, ids), **CLOSE)


def test_a_left_padded_batch_is_steered_like_its_texts_one_by_one(any_model, tokenizer):
    steer = vector(any_model, tokenizer, LOVE)
    for side in ("left", "right"):
        ids, mask = padded([LENGTH, 5, 8], side)
        batch = steered(any_model, steer, ids, mask)
        for row in range(3):
            text = mask[row].bool()
            torch.testing.assert_close(
                batch[row][text], steered(any_model, steer, ids[row, text][None])[0], **CLOSE
            )


def test_decoding_on_the_cache_is_steered_like_decoding_without(any_model, tokenizer):
    ids, mask = padded([LENGTH, 6], "left")
    outputs = {"return_dict_in_generate": True, "output_logits": True, "max_new_tokens": 5}
    with LOVE.on(any_model, tokenizer):
        cached, uncached = (
            any_model.generate(ids, attention_mask=mask, use_cache=use_cache, **outputs, **GENERATE)
            for use_cache in (True, False)
        )
    assert torch.equal(cached.sequences, uncached.sequences)
    torch.testing.assert_close(torch.stack(cached.logits), torch.stack(uncached.logits), **CLOSE)
    whole = torch.cat([mask, torch.ones(2, 5, dtype=torch.long)], dim=1)
    again = steered(any_model, vector(any_model, tokenizer, LOVE), cached.sequences, whole)
    torch.testing.assert_close(torch.stack(cached.logits, dim=1), again[:, -6:-1], **CLOSE)


def test_a_static_cache_changes_nothing(main_model, tokenizer):
    ids, mask = padded([LENGTH, 6], "left")
    outputs = {
        "return_dict_in_generate": True,
        "output_logits": True,
        "max_new_tokens": 4,
        "disable_compile": True,
    }
    with LOVE.on(main_model, tokenizer):
        dynamic, static = (
            main_model.generate(ids, attention_mask=mask, cache_implementation=kind, **outputs, **GENERATE)
            for kind in ("dynamic", "static")
        )
    torch.testing.assert_close(torch.stack(static.logits), torch.stack(dynamic.logits), **CLOSE)


@pytest.mark.parametrize("size", [1, 2, 4, LENGTH])
def test_a_prompt_in_chunks_is_steered_like_the_prompt_in_one(any_model, tokenizer, size):
    ids, cache = random_ids(2, LENGTH), DynamicCache(config=any_model.config)
    with LOVE.on(any_model, tokenizer), hf.prompt_length(LENGTH), torch.no_grad():
        found = [any_model(chunk, past_key_values=cache).logits for chunk in ids.split(size, dim=1)]
    expected = steered(any_model, vector(any_model, tokenizer, LOVE), ids)
    torch.testing.assert_close(torch.cat(found, dim=1), expected, **CLOSE)


def test_at_layer_zero_a_space_padded_phrase_is_the_prompt_with_the_phrase_in_front(any_model, tokenizer):
    phrase, prompt = "I love", "the rain"
    pair = su.get_x_vector(
        phrase, "", coeff=1, act_name=0, tokenizer=tokenizer, pad_method="tokens_right", custom_pad_id=1
    )
    with_spaces = torch.tensor([token_ids(tokenizer, " " * len(phrase) + prompt)])
    with_phrase = torch.tensor([token_ids(tokenizer, phrase + prompt)])
    found = steered(any_model, vector(any_model, tokenizer, *pair), with_spaces)
    expected = logits(any_model, with_phrase)
    assert (logits(any_model, with_spaces) - expected).abs().max() > 0.1
    torch.testing.assert_close(found[:, -len(prompt) :], expected[:, -len(prompt) :], atol=1e-5, rtol=0)


# --- what stays as it was ---------------------------------------------------------------------------------


def test_the_model_is_restored_after_the_context_and_after_an_exception(any_model, tokenizer):
    ids, hooks = random_ids(2, LENGTH), hook_count(any_model)
    weights = {name: tensor.clone() for name, tensor in any_model.state_dict().items()}
    plain = logits(any_model, ids)
    with LOVE.on(any_model, tokenizer):
        assert not torch.allclose(logits(any_model, ids), plain)
    assert torch.equal(logits(any_model, ids), plain)
    with pytest.raises(RuntimeError, match="inside"), LOVE.on(any_model, tokenizer):
        raise RuntimeError("inside")
    assert hook_count(any_model) == hooks
    assert torch.equal(logits(any_model, ids), plain)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in any_model.state_dict().items())


# --- what it costs ----------------------------------------------------------------------------------------


def test_the_texts_of_all_additions_are_read_in_one_pass_up_to_the_deepest_hook(any_model, tokenizer):
    shapes = [[] for _ in hf.blocks(any_model)]
    handles = [
        block.register_forward_hook(lambda _, args, out, seen=seen: seen.append(shape_of(out)))
        for block, seen in zip(hf.blocks(any_model), shapes, strict=True)
    ]
    additions = [
        LOVE,
        2 * LOVE,
        su.ActivationAddition(1.0, "blocks.0.hook_mlp_out", "Love"),
        su.ActivationAddition(1.0, "blocks.0.hook_resid_post", "Hatred", addition_location="back"),
        su.ActivationAddition(1.0, 0, tokens=token_ids(tokenizer, "Hatred"), positions="all"),
    ]
    with su.apply_activation_additions(any_model, additions, tokenizer):
        pass
    for handle in handles:
        handle.remove()
    assert shapes == [[(2, 7)]] + [[]] * (len(shapes) - 1)  # "Love" and "Hatred", in block 0 alone


def shape_of(output: Tensor | tuple) -> tuple[int, ...]:
    return tuple((output[0] if isinstance(output, tuple) else output).shape[:2])


# --- errors -----------------------------------------------------------------------------------------------


def test_a_layer_beyond_the_model_is_a_value_error_that_names_it(main_model, tokenizer):
    hooks = hook_count(main_model)
    addition = su.ActivationAddition(1.0, 3, "Love")
    with pytest.raises(ValueError, match=r"layer 3 .*0 to 2"), addition.on(main_model, tokenizer):
        pass
    steer = su.SteeringVector("blocks.3.hook_resid_pre", torch.zeros(2, 32))
    with pytest.raises(ValueError, match="layer 3"), steer.on(main_model):
        pass
    assert hook_count(main_model) == hooks


@pytest.mark.parametrize("token", [-1, 97, 10**6])
def test_a_token_that_the_model_does_not_have_is_a_value_error_that_names_it(main_model, token):
    with pytest.raises(ValueError, match=rf"token id {token} .*96"):
        vector(main_model, None, su.ActivationAddition(1.0, 1, tokens=(0, token)))


def test_a_sum_that_overflows_is_a_value_error(main_model, tokenizer):
    with pytest.raises(ValueError, match="inf or NaN"), (1e38 * LOVE + 1e38 * LOVE).on(main_model, tokenizer):
        pass


def test_a_prompt_shorter_than_the_addition_is_a_value_error_with_both_lengths(any_model, tokenizer):
    with LOVE.on(any_model, tokenizer):
        with pytest.raises(ValueError, match=r"prompt of 4 tokens.*addition of 5"):
            logits(any_model, random_ids(1, 4))
        ids, mask = padded([9, 3], "left")
        with pytest.raises(ValueError, match=r"prompt of 3 tokens.*addition of 5"):
            any_model.generate(ids, attention_mask=mask, max_new_tokens=2, **GENERATE)
        assert logits(any_model, random_ids(1, 5)).shape == (1, 5, 97)


def test_a_prompt_of_one_token_is_steered_by_an_addition_of_one(any_model, tokenizer):
    only_bos = vector(
        any_model, tokenizer, su.ActivationAddition(1.0, 1, ""), su.ActivationAddition(1.0, 1, "")
    )
    assert only_bos.rows.shape == (1, 32)
    bos = torch.tensor([[0]])
    rows = torch.randn(1, 32, generator=torch.Generator().manual_seed(0))
    changed = steered(any_model, su.SteeringVector(HOOK, rows), bos)
    assert (changed - logits(any_model, bos)).abs().max() > 1e-3


# --- together with generate -------------------------------------------------------------------------------


def test_generate_steers_like_the_context_around_model_generate(main_model, tokenizer):
    prompts = ["I hate you because", "Good day", "abcd"]
    settings = {"steer": LOVE, "num_samples": 2, "max_new_tokens": 8, "do_sample": False}
    table = su.generate(main_model, tokenizer, prompts, **settings)
    for prompt in prompts:
        ids = torch.tensor([token_ids(tokenizer, prompt)])
        with LOVE.on(main_model, tokenizer):
            row = main_model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False, pad_token_id=0
            )[0]
        expected = tokenizer.decode(row[ids.shape[1] :], skip_special_tokens=True)
        assert table[table["prompt"] == prompt]["completion"].tolist() == [expected] * 2


def test_generate_refuses_a_prompt_shorter_than_the_addition_and_takes_one_just_as_long(
    main_model, tokenizer
):
    with pytest.raises(ValueError, match=r"prompt of 4 tokens.*addition of 5"):
        su.generate(
            main_model, tokenizer, ["a long enough prompt", "abc"], steer=LOVE, max_new_tokens=2, seed=0
        )
    su.generate(main_model, tokenizer, ["a long enough prompt", "abcd"], steer=LOVE, max_new_tokens=2, seed=0)


def test_generate_with_a_coefficient_of_zero_gives_the_plain_text(main_model, tokenizer):
    nothing = su.ActivationAddition(0.0, 1, "Love")
    table = su.compare(
        main_model,
        tokenizer,
        ["I hate", "Good morning"],
        steer=nothing,
        num_samples=3,
        max_new_tokens=9,
        seed=1,
    )
    plain, with_nothing = (table[table["steered"] == side]["completion"].tolist() for side in (False, True))
    assert plain == with_nothing


def test_steered_completions_do_not_depend_on_their_batch(main_model, tokenizer):
    prompts = ["I hate you because you are", "Good day", "abcd"]
    settings = {"steer": [LOVE], "num_samples": 3, "max_new_tokens": 9, "seed": 0}
    expected = su.generate(main_model, tokenizer, prompts, **settings)
    for batch_size in (1, 2, 5):
        found = su.generate(main_model, tokenizer, prompts, batch_size=batch_size, **settings)
        assert_same_up_to_rounding(found, expected)
