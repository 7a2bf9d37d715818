"""Additions to the residual stream: what is captured, where it is added, and what stays as it was."""

from dataclasses import FrozenInstanceError

import numpy as np
import pytest
import torch
from conftest import WINDOW, hook_count, logits, padded, random_ids, small_tokenizer, tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import DynamicCache

import steer_utils as su
from steer_utils import hf
from steer_utils.activation_addition import add_rows, sum_rows
from steer_utils.models import token_ids

LENGTH = WINDOW + 5
CLOSE = {"atol": 2e-5, "rtol": 2e-5}
HOOK = "blocks.1.hook_resid_pre"
LOVE = su.ActivationAddition(2.0, 1, "Love")
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
    }
    assert len(additions) == 6


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
    "name", ["blocks.6.hook_resid_post", "blocks.-1.hook_resid_pre", "resid_pre", "6", -1, True, None, 1.0]
)
def test_an_unknown_hook_is_a_value_error_that_quotes_it_and_shows_a_good_one(name):
    with pytest.raises(ValueError, match=rf"{name}.*blocks\.6\.hook_resid_pre"):
        su.ActivationAddition(1.0, name, "Love")


def test_a_layer_may_be_a_numpy_integer():
    assert su.ActivationAddition(1.0, np.int64(6), "Love") == su.ActivationAddition(1.0, 6, "Love")


def test_no_tokens_at_all_are_a_value_error():
    with pytest.raises(ValueError, match="token"):
        vector(tiny("gpt2"), None, su.ActivationAddition(1.0, 1, tokens=()))


def test_an_addition_given_as_text_asks_for_the_tokenizer():
    with pytest.raises(ValueError, match=r"'Love'.*tokenizer"), LOVE.on(tiny("gpt2")):
        pass


@pytest.mark.parametrize("layer", [1, np.int64(1)])
def test_a_layer_is_short_for_the_name_of_its_hook_in_a_vector_too(any_model, layer):
    rows = torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
    by_layer, by_name = su.SteeringVector(layer, rows), su.SteeringVector(HOOK, rows)
    assert by_layer.act_name == by_name.act_name == HOOK
    ids = random_ids(2, LENGTH)
    found = steered(any_model, by_layer, ids)
    assert torch.equal(found, steered(any_model, by_name, ids))
    assert not torch.allclose(found, logits(any_model, ids))


@pytest.mark.parametrize("name", ["blocks.1.hook_resid_post", "1", -1, True, None])
def test_a_vector_at_an_unknown_hook_is_a_value_error_that_quotes_it(name):
    with pytest.raises(ValueError, match=rf"{name}.*blocks\.6\.hook_resid_pre"):
        su.SteeringVector(name, torch.zeros(2, 32))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_vector_with_one_number_that_is_not_finite_is_a_value_error(bad, dtype):
    rows = torch.zeros(4, 32, dtype=dtype)
    rows[3, 31] = bad
    with pytest.raises(ValueError, match="hold inf or NaN"):
        su.SteeringVector(1, rows)


# --- pairs ------------------------------------------------------------------------------------------------


def test_a_pair_has_opposite_coefficients():
    love, hate = su.get_x_vector("Love", "Hate", coeff=5, act_name=6)
    assert love == su.ActivationAddition(5, 6, "Love")
    assert hate == su.ActivationAddition(-5, 6, "Hate")


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


# --- what is captured -------------------------------------------------------------------------------------


def test_a_vector_is_the_coefficient_times_the_residual_stream_of_the_text(any_model, tokenizer):
    texts = {"Love": 2.0, "a much longer text": -0.5, "": 1.5}
    for layer in range(any_model.config.num_hidden_layers):
        for text, coeff in texts.items():
            ids = torch.tensor([token_ids(tokenizer, text)])
            expected = coeff * hf.block_inputs(any_model, ids, torch.ones_like(ids), [layer])[layer][0]
            found = vector(any_model, tokenizer, su.ActivationAddition(coeff, layer, text))
            assert found.act_name == f"blocks.{layer}.hook_resid_pre"
            torch.testing.assert_close(found.rows, expected, **CLOSE)


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


@pytest.mark.parametrize("layer", [0, 1, 2])
@pytest.mark.parametrize("method", ["tokens_right", "tokens_left"])
def test_the_bos_row_of_a_padded_pair_cancels_exactly(main_model, tokenizer, layer, method):
    pair = su.get_x_vector("Hat", "Loving", 5, layer, tokenizer=tokenizer, pad_method=method, custom_pad_id=1)
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


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_add_rows_adds_row_p_to_the_token_at_position_p(data):
    batch, length, size = (data.draw(st.integers(1, 6)) for _ in range(3))
    position = st.integers(-1, 8)
    row = st.lists(position, min_size=length, max_size=length)
    positions = torch.tensor(data.draw(st.lists(row, min_size=batch, max_size=batch)))
    generator = torch.Generator().manual_seed(0)
    hidden, rows = (
        torch.randn(batch, length, 3, generator=generator),
        torch.randn(size, 3, generator=generator),
    )
    expected = hidden.clone()
    for b in range(batch):
        for t in range(length):
            if 0 <= positions[b, t] < size:
                expected[b, t] += rows[positions[b, t]]
    before = hidden.clone()
    assert torch.equal(add_rows(hidden, positions, rows), expected)
    assert torch.equal(hidden, before)


def test_sum_rows_lets_the_shorter_matrices_end_earlier():
    total = sum_rows([torch.ones(1, 2), 10 * torch.ones(3, 2), 100 * torch.ones(2, 2)])
    assert total.tolist() == [[111, 111], [110, 110], [10, 10]]


def test_the_block_receives_its_input_plus_the_rows(any_model, tokenizer):
    ids, steer, seen = random_ids(2, LENGTH), vector(any_model, tokenizer, LOVE), []
    plain = hf.block_inputs(any_model, ids, torch.ones_like(ids), [1])[1]
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


def test_what_stands_before_the_first_changed_row_stays_as_it_was(any_model):
    rows = torch.zeros(6, 32)
    rows[3:] = torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
    ids = random_ids(2, LENGTH)
    plain = logits(any_model, ids)
    changed = steered(any_model, su.SteeringVector(HOOK, rows), ids)
    assert torch.equal(changed[:, :3], plain[:, :3])
    assert ((changed[:, 3:6] - plain[:, 3:6]).abs().amax(dim=-1) > 1e-3).all()


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


def test_a_vector_may_be_used_again_and_is_not_changed_by_its_use(main_model, tokenizer):
    steer, ids = vector(main_model, tokenizer, LOVE), random_ids(1, LENGTH)
    rows = steer.rows.clone()
    assert torch.equal(steered(main_model, steer, ids), steered(main_model, steer, ids))
    assert torch.equal(steer.rows, rows)


def test_a_vector_follows_the_dtype_of_the_model(tokenizer):
    model = tiny("llama")
    rows = vector(model, tokenizer, LOVE).rows.double()
    ids = random_ids(1, LENGTH)
    found = steered(model, su.SteeringVector(HOOK, rows), ids)
    assert found.dtype == torch.float32
    assert torch.equal(found, steered(model, su.SteeringVector(HOOK, rows.float()), ids))


# --- errors -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(4, 31), (4, 1), (32,), (1, 4, 32)])
def test_rows_of_another_shape_are_a_value_error_that_quotes_it(main_model, shape):
    steer = su.SteeringVector(HOOK, torch.zeros(shape))
    with (
        pytest.raises(ValueError, match=str(shape).replace("(", r"\(").replace(")", r"\)")) as caught,
        steer.on(main_model),
    ):
        pass
    assert "32" in str(caught.value)


def test_a_layer_beyond_the_model_is_a_value_error_that_names_it(main_model, tokenizer):
    hooks = hook_count(main_model)
    addition = su.ActivationAddition(1.0, 3, "Love")
    with pytest.raises(ValueError, match=r"layer 3 .*0 to 2"), addition.on(main_model, tokenizer):
        pass
    steer = su.SteeringVector("blocks.3.hook_resid_pre", torch.zeros(2, 32))
    with pytest.raises(ValueError, match="layer 3"), steer.on(main_model):
        pass
    assert hook_count(main_model) == hooks


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
        assert su.generate(main_model, tokenizer, prompts, batch_size=batch_size, **settings).equals(expected)
