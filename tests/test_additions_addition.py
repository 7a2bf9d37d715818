"""Activation additions: the value, padding, what is captured from the texts, and where it is added."""

import copy
import itertools
from dataclasses import FrozenInstanceError, replace

import numpy as np
import pytest
import torch
from conftest import (
    KINDS,
    MAIN,
    WINDOW,
    added_by_hand,
    addend,
    kept_by_hand,
    logits,
    padded,
    random_ids,
    small_tokenizer,
    tiny,
)

import steer_utils as su
from steer_utils import hf, hooks
from steer_utils.models import token_ids

LENGTH = WINDOW + 5
CLOSE = {"atol": 2e-5, "rtol": 2e-5}
LOVE = su.ActivationAddition(2.0, 1, "Love")
HATE = su.ActivationAddition(-0.5, 1, "Hatred")
EVERYWHERE = list(itertools.product(("front", "mid", "back"), ("own", "all")))


def vector(model, tokenizer, *additions: su.ActivationAddition) -> su.SteeringVector:
    (one,) = su.steering_vectors(model, tokenizer, additions)
    return one


# --- the value --------------------------------------------------------------------------------------------


def test_a_layer_is_short_for_the_name_of_its_hook():
    by_layer = su.ActivationAddition(5, 6, "Love")
    for act_name in ("blocks.6.hook_resid_pre", np.int64(6)):
        same = su.ActivationAddition(5, act_name, "Love")
        assert same == by_layer
        assert hash(same) == hash(by_layer)
    assert by_layer.act_name == "blocks.6.hook_resid_pre"


def test_additions_that_differ_in_anything_are_not_equal_and_all_can_be_hashed():
    one = su.ActivationAddition(5, 6, "Love")
    changes = [{}, {"coeff": 4}, {"act_name": 7}, {"act_name": "blocks.6.hook_mlp_out"}, {"prompt": "Hate"}]
    changes += [{"prompt": None, "tokens": tokens} for tokens in ((0, 1), (0, 2))]
    changes += [{"addition_location": "mid"}, {"positions": "all"}]
    changes += [{"res_stream_slice": columns} for columns in (slice(1, 3), slice(1, 4), (2, 5))]
    assert len({replace(one, **change) for change in changes}) == len(changes)


@pytest.mark.parametrize("kind", [list, tuple, torch.tensor, np.array])
def test_tokens_of_any_kind_become_a_tuple_of_numbers(kind):
    tokens = su.ActivationAddition(1.0, 0, tokens=kind([0, 5, 9])).tokens
    assert tokens == (0, 5, 9)
    assert {type(token) for token in tokens} == {int}


def test_an_addition_cannot_be_changed():
    with pytest.raises(FrozenInstanceError):
        LOVE.coeff = 3.0
    with pytest.raises(FrozenInstanceError):
        (LOVE + HATE).terms = ()


@pytest.mark.parametrize(
    ("bad", "quoted"),
    [
        ({"prompt": None}, "a prompt or tokens.*None"),
        ({"tokens": (0, 1)}, "a prompt or tokens.*Love"),
        ({"prompt": None, "tokens": ()}, r"a prompt or tokens.*\(\)"),
        ({"tokens": ()}, r"a prompt or tokens.*\(\)"),
        ({"coeff": float("nan")}, "coeff.*nan"),
        ({"coeff": -float("inf")}, "coeff.*-inf"),
        ({"act_name": "blocks.6.hook_q"}, r"hook_q.*blocks\.6\.hook_resid_pre"),
        ({"act_name": "6"}, r"'6'.*blocks\.6\.hook_resid_pre"),
        ({"act_name": -1}, r"-1.*blocks\.6\.hook_resid_pre"),
        ({"act_name": 1.0}, r"act_name of ActivationAddition must be a text or a whole number, not 1\.0"),
        ({"addition_location": "end"}, "addition_location must be front, mid or back, not 'end'"),
        ({"positions": "later"}, "positions must be own, all, last or generated, not 'later'"),
    ],
)
def test_a_bad_value_is_a_value_error_that_quotes_it(bad, quoted):
    with pytest.raises((TypeError, ValueError), match=quoted):
        su.ActivationAddition(**{"coeff": 1.0, "act_name": 6, "prompt": "Love"} | bad)


# --- arithmetic -------------------------------------------------------------------------------------------


def test_multiples_have_the_multiple_of_the_coefficient_and_keep_the_rest():
    given = {"act_name": "blocks.6.hook_mlp_out", "prompt": "Love", "addition_location": "back"}
    given |= {"positions": "all", "res_stream_slice": (1, 3)}
    one = su.ActivationAddition(2.0, **given)
    assert 2.5 * one == one * 2.5 == np.float64(2.5) * one == su.ActivationAddition(5.0, **given)
    assert -one == su.ActivationAddition(-2.0, **given)


def test_sums_and_differences_list_their_terms_in_order():
    third = su.ActivationAddition(1.0, 2, tokens=(0, 5))
    assert LOVE + HATE == su.AdditionSum((LOVE, HATE)) != HATE + LOVE
    assert (LOVE - HATE).terms == (LOVE, -HATE)
    assert (LOVE + HATE + third).terms == (LOVE + (HATE + third)).terms == (LOVE, HATE, third)
    assert (LOVE - (HATE + third)).terms == (LOVE, -HATE, -third)
    assert ((LOVE + HATE) - (third + LOVE)).terms == (LOVE, HATE, -third, -LOVE)
    assert (-(LOVE + HATE)).terms == (-LOVE, -HATE)
    assert (3 * (LOVE + HATE)).terms == ((LOVE + HATE) * 3).terms == (3 * LOVE, 3 * HATE)
    assert [*(LOVE + HATE)] == [LOVE, HATE]


@pytest.mark.parametrize("steer", [LOVE, LOVE + HATE], ids=["addition", "sum"])
def test_an_addition_and_something_else_do_not_add_up(steer):
    for other in (1, None, "Love", [1], torch.zeros(2, 32), su.SteeringVector(1, torch.ones(2, 32))):
        with pytest.raises(TypeError):
            steer + other
        with pytest.raises(TypeError):
            steer - other
    with pytest.raises(ValueError, match="finite"):
        float("nan") * steer


def test_a_sum_steers_like_its_terms_one_inside_the_other_in_any_order(main_model, tokenizer):
    third = su.ActivationAddition(1.5, "blocks.0.hook_mlp_out", "b", addition_location="back")
    ids, mask = padded([LENGTH, 8], "left")
    with LOVE.on(main_model, tokenizer), HATE.on(main_model, tokenizer), third.on(main_model, tokenizer):
        nested = logits(main_model, ids, mask)
    for terms in itertools.permutations([LOVE, HATE, third]):
        with su.AdditionSum(terms).on(main_model, tokenizer):
            torch.testing.assert_close(logits(main_model, ids, mask), nested, **CLOSE)


# --- pairs ------------------------------------------------------------------------------------------------


def test_a_pair_has_opposite_coefficients_at_one_place():
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
def test_padding_fills_the_shorter_prompt_behind_its_text_or_behind_bos(tokenizer, method, plus, minus):
    given = {"tokenizer": tokenizer, "pad_method": method, "custom_pad_id": 7}
    for texts, expected in ((("Love", "Hi"), [plus, minus]), (("Hi", "Love"), [minus, plus])):
        pair = su.get_x_vector(*texts, 3, 6, **given)
        assert [one.tokens for one in pair] == expected
        assert [one.coeff for one in pair] == [3, -3]


def test_a_pad_id_of_zero_is_honoured_and_the_default_is_the_pad_token():
    gemma, gpt2 = small_tokenizer("gemma"), small_tokenizer("gpt2")  # gemma: 0 is <pad>, 2 <bos>; gpt2: none
    given = {"coeff": 1, "act_name": 6, "pad_method": "tokens_right"}
    assert su.get_x_vector("abc", "d", tokenizer=gpt2, custom_pad_id=0, **given)[1].tokens[2:] == (0, 0)
    assert su.get_x_vector("abc", "d", tokenizer=gemma, custom_pad_id=1, **given)[1].tokens[2:] == (1, 1)
    assert su.get_x_vector("abc", "d", tokenizer=gemma, **given)[1].tokens[2:] == (0, 0)
    with pytest.raises(ValueError, match="custom_pad_id"):
        su.get_x_vector("a", "bc", tokenizer=gpt2, **given)


def test_a_pad_id_without_a_method_is_a_value_error_that_quotes_it():
    with pytest.raises(ValueError, match="custom_pad_id=7 pads nothing: give a pad_method"):
        su.get_x_vector("Love", "Hi", 3, 6, custom_pad_id=7)


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


def test_only_text_needs_the_tokenizer(tokenizer):
    pair = su.ActivationAddition(1.0, 1, tokens=(0, 3)), su.ActivationAddition(1.0, 1, tokens=(0, 4, 5))
    assert [one.tokens for one in su.padded(pair, None, custom_pad_id=9)] == [(0, 3, 9), (0, 4, 5)]
    with pytest.raises(ValueError, match="custom_pad_id"):
        su.padded(pair, None)
    with pytest.raises(ValueError, match=r"'a'.*tokenizer"):
        su.get_x_vector("a", "bc", 1, 6, pad_method="tokens_left")
    with pytest.raises(ValueError, match=r"'Love'.*tokenizer"), LOVE.on(tiny("gpt2")):
        pass
    with pytest.raises(ValueError, match="'tokens_middle'"):
        su.get_x_vector("a", "bc", 1, 6, tokenizer=tokenizer, pad_method="tokens_middle")


# --- what is captured -------------------------------------------------------------------------------------


def test_a_vector_is_the_coefficient_times_the_activation_at_its_hook(main_model, tokenizer):
    texts = itertools.cycle({"Love": 2.0, "a much longer text": -0.5, "": 1.5}.items())
    for layer, kind in itertools.product(range(3), KINDS):
        name, (text, coeff), seen = f"blocks.{layer}.hook_{kind}", next(texts), []
        with kept_by_hand(main_model, name, seen):
            logits(main_model, torch.tensor([token_ids(tokenizer, text)]))
        found = vector(main_model, tokenizer, su.ActivationAddition(coeff, name, text))
        assert (found.act_name, found.rows.shape) == (name, seen[0][0].shape)
        torch.testing.assert_close(found.rows, coeff * seen[0][0], **CLOSE)


@pytest.mark.parametrize(
    ("architecture", "kind", "location", "positions"),
    [(MAIN[i % 4], KINDS[(i + i // 6) % 4], *place) for i, place in enumerate(2 * EVERYWHERE)],
)
def test_additions_of_unequal_lengths_each_keep_to_their_own_tokens(
    tokenizer, architecture, kind, location, positions
):
    model, name = tiny(architecture), f"blocks.1.hook_{kind}"
    texts = {"Love": 2.0, "Hatred": -1.0, "Hope": 0.5, "": 1.0}
    additions = [su.ActivationAddition(c, name, text, None, location, positions) for text, c in texts.items()]
    ids, what = random_ids(1, LENGTH), torch.zeros(LENGTH, 32)
    for text, coeff in texts.items():
        seen = []
        with kept_by_hand(model, name, seen):
            logits(model, torch.tensor([token_ids(tokenizer, text)]))
        what += addend(coeff * seen[0][0], LENGTH, LENGTH, location, positions)
    with added_by_hand(model, name, what):
        by_hand = logits(model, ids)
    with su.apply_activation_additions(model, additions, tokenizer):
        torch.testing.assert_close(logits(model, ids), by_hand, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("kind", "columns", "kept"),
    [
        ("resid_pre", slice(1, 3), [1, 2]),
        ("attn_out", (1, 3), [1, 2]),
        ("mlp_out", slice(None, 2), [0, 1]),
        ("resid_post", (30, None), [30, 31]),
        ("resid_pre", slice(0, 32, 8), [0, 8, 16, 24]),
        ("mlp_out", slice(None), list(range(32))),
    ],
)
def test_a_slice_reaches_its_columns_and_no_others(tokenizer, kind, columns, kept):
    model = tiny("gemma3_text")
    steer = su.ActivationAddition(2.0, f"blocks.1.hook_{kind}", "Love", res_stream_slice=columns)
    before, seen, ids = [], [], random_ids(2, LENGTH)
    with kept_by_hand(model, steer.act_name, before):
        logits(model, ids)
    with steer.on(model, tokenizer), kept_by_hand(model, steer.act_name, seen):
        logits(model, ids)
    rows = vector(model, tokenizer, replace(steer, res_stream_slice=None)).rows
    others = [column for column in range(32) if column not in kept]
    assert torch.equal(seen[0][..., others], before[0][..., others])
    assert torch.equal(seen[0][:, 5:], before[0][:, 5:])
    torch.testing.assert_close(seen[0][:, :5, kept], before[0][:, :5, kept] + rows[:, kept], **CLOSE)


@pytest.mark.parametrize("columns", [slice(3, 3), (100, 200)])
def test_a_slice_without_columns_is_a_value_error(tokenizer, columns):
    with pytest.raises(ValueError, match=r"res_stream_slice=\(.*none of the 32 columns"):
        vector(tiny("gpt2"), tokenizer, replace(LOVE, res_stream_slice=columns))


def test_the_vectors_know_their_hook_place_and_model(tokenizer):
    model = copy.deepcopy(tiny("gpt2"))
    model.name_or_path = "some/model"
    steer = su.ActivationAddition(2.0, "blocks.1.hook_mlp_out", "Love", None, "mid", "all")
    found = vector(model, tokenizer, steer)
    where = found.act_name, found.addition_location, found.positions, found.model_id
    assert where == ("blocks.1.hook_mlp_out", "mid", "all", "some/model")


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


@pytest.mark.parametrize("method", ["tokens_right", "tokens_left"])
def test_the_bos_row_of_a_padded_pair_cancels_exactly(main_model, tokenizer, method):
    given = {"tokenizer": tokenizer, "pad_method": method, "custom_pad_id": 1}
    for hook in (0, 1, 2, *(f"blocks.1.hook_{kind}" for kind in KINDS[1:])):
        rows = vector(main_model, tokenizer, *su.get_x_vector("Hat", "Loving", 5, hook, **given)).rows
        assert rows.shape == (7, 32)
        assert (rows[0] == 0).all()
        assert (rows[1:].abs().sum(dim=1) > 0.1).all()
        nothing = vector(main_model, tokenizer, *su.get_x_vector("Love", "Love", 5, hook, **given)).rows
        assert torch.equal(nothing, torch.zeros(5, 32))


def test_capturing_while_another_steer_is_on_sees_the_unsteered_model(main_model, tokenizer):
    expected = vector(main_model, tokenizer, LOVE).rows
    with su.ActivationAddition(20.0, 0, "Hatred").on(main_model, tokenizer):
        assert torch.equal(vector(main_model, tokenizer, LOVE).rows, expected)


def test_no_additions_make_no_vectors(tokenizer):
    assert su.steering_vectors(tiny("gpt2"), tokenizer, []) == []


# --- what is added ----------------------------------------------------------------------------------------


def test_the_block_receives_its_input_plus_the_rows(any_model, tokenizer):
    ids, steer, seen = random_ids(2, LENGTH), vector(any_model, tokenizer, LOVE), []

    def see(module, args, kwargs):
        seen.append(args[0] if args else kwargs["hidden_states"])

    for on in (False, True):
        with LOVE.on(any_model, tokenizer) if on else hooks.unsteered():
            handle = hf.block(any_model, 1).register_forward_pre_hook(see, with_kwargs=True)
            logits(any_model, ids)
            handle.remove()
    before, after = seen
    assert torch.equal(after[:, 5:], before[:, 5:])
    torch.testing.assert_close(after[:, :5], before[:, :5] + steer.rows, **CLOSE)


def test_a_coefficient_of_zero_changes_no_bit_anywhere(main_model, tokenizer):
    ids, mask = padded([LENGTH, 6], "left")
    before = logits(main_model, ids, mask)
    for kind, place in itertools.product(KINDS, EVERYWHERE):
        for coeff in (0.0, 1e-3):
            steer = su.ActivationAddition(coeff, f"blocks.1.hook_{kind}", "Love", None, *place)
            with steer.on(main_model, tokenizer):
                assert torch.equal(logits(main_model, ids, mask), before) == (coeff == 0)


def test_a_static_cache_changes_nothing(main_model, tokenizer):
    ids, mask = padded([LENGTH, 6], "left")
    given = {"return_dict_in_generate": True, "output_logits": True, "max_new_tokens": 4, "do_sample": False}
    given |= {"attention_mask": mask, "pad_token_id": 0, "eos_token_id": None, "disable_compile": True}
    with LOVE.on(main_model, tokenizer):
        found = [
            main_model.generate(ids, cache_implementation=kind, **given) for kind in ("dynamic", "static")
        ]
    torch.testing.assert_close(*(torch.stack(one.logits) for one in found), **CLOSE)


def test_at_layer_zero_a_space_padded_phrase_is_the_prompt_with_the_phrase_in_front(any_model, tokenizer):
    phrase, prompt = "I love", "the rain"
    given = {"tokenizer": tokenizer, "pad_method": "tokens_right", "custom_pad_id": 1}
    pair = su.get_x_vector(phrase, "", coeff=1, act_name=0, **given)
    with_spaces = torch.tensor([token_ids(tokenizer, " " * len(phrase) + prompt)])
    with_phrase = torch.tensor([token_ids(tokenizer, phrase + prompt)])
    with su.apply_activation_additions(any_model, pair):
        found = logits(any_model, with_spaces)
    expected = logits(any_model, with_phrase)
    assert (logits(any_model, with_spaces) - expected).abs().max() > 0.1
    torch.testing.assert_close(found[:, -len(prompt) :], expected[:, -len(prompt) :], atol=1e-5, rtol=0)


def test_a_prompt_of_one_token_is_steered_by_an_addition_of_one(main_model, tokenizer):
    bos, only_bos = torch.tensor([[0]]), su.ActivationAddition(1.0, "blocks.0.hook_mlp_out", "")
    seen = []
    with kept_by_hand(main_model, only_bos.act_name, seen):
        logits(main_model, bos)
    with added_by_hand(main_model, only_bos.act_name, seen[0][0]):
        expected = logits(main_model, bos)
    with only_bos.on(main_model, tokenizer):
        torch.testing.assert_close(logits(main_model, bos), expected, **CLOSE)
    assert (expected - logits(main_model, bos)).abs().max() > 1e-3


def test_the_texts_of_all_additions_run_in_one_pass_up_to_the_deepest_hook(main_model, tokenizer):
    shapes = [[] for _ in hf.blocks(main_model)]

    def shape_of(output) -> tuple[int, ...]:
        return tuple((output[0] if isinstance(output, tuple) else output).shape[:2])

    handles = [
        block.register_forward_hook(lambda _, args, out, seen=seen: seen.append(shape_of(out)))
        for block, seen in zip(hf.blocks(main_model), shapes, strict=True)
    ]
    additions = [
        LOVE,
        2 * LOVE,
        su.ActivationAddition(1.0, "blocks.0.hook_mlp_out", "Love"),
        su.ActivationAddition(1.0, "blocks.0.hook_resid_post", "Hatred", addition_location="back"),
        su.ActivationAddition(1.0, 0, tokens=token_ids(tokenizer, "Hatred"), positions="all"),
    ]
    with su.apply_activation_additions(main_model, additions, tokenizer):
        pass
    for handle in handles:
        handle.remove()
    assert shapes == [[(2, 7)]] + [[]] * (len(shapes) - 1)  # "Love" and "Hatred", in block 0 alone


# --- errors on entering, and generate ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("steer", "quoted"),
    [
        (su.ActivationAddition(1.0, 3, "Love"), r"layer 3 .*0 to 2"),
        (su.ActivationAddition(1.0, 1, tokens=(0, -1)), r"token id -1, .*96"),
        (su.ActivationAddition(1.0, 1, tokens=(0, 97)), r"token id 97, .*96"),
        (1e38 * LOVE + 1e38 * LOVE, "inf or NaN"),
    ],
    ids=["layer", "negative token", "token", "overflow"],
)
def test_what_the_model_does_not_have_is_a_value_error_that_names_it(tokenizer, steer, quoted):
    with pytest.raises(ValueError, match=quoted), steer.on(tiny("llama"), tokenizer):
        pass


def test_generate_steers_like_the_context_around_model_generate(main_model, tokenizer):
    prompts, greedy = ["I hate you because", "Good day", "abcd"], {"max_new_tokens": 8, "do_sample": False}
    table = su.generate(main_model, tokenizer, prompts, steer=LOVE, num_samples=2, **greedy)
    for prompt in prompts:
        ids = torch.tensor([token_ids(tokenizer, prompt)])
        with LOVE.on(main_model, tokenizer):
            row = main_model.generate(ids, attention_mask=torch.ones_like(ids), pad_token_id=0, **greedy)[0]
        expected = tokenizer.decode(row[ids.shape[1] :], skip_special_tokens=True)
        assert table[table["prompt"] == prompt]["completion"].tolist() == [expected] * 2


def test_generate_refuses_a_prompt_shorter_than_the_addition_and_takes_one_just_as_long(tokenizer):
    model, given = tiny("gpt2"), {"steer": LOVE, "max_new_tokens": 2, "seed": 0}
    with pytest.raises(ValueError, match=r"prompt of 4 tokens.*addition of 5"):
        su.generate(model, tokenizer, ["a long enough prompt", "abc"], **given)
    assert len(su.generate(model, tokenizer, ["a long enough prompt", "abcd"], **given)) == 2
