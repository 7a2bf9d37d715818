"""Vectors: which tokens of which activation they reach, arithmetic, and what they refuse."""

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
    hook_count,
    kept_by_hand,
    logits,
    padded,
    random_ids,
    tiny,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

import steer_utils as su
from steer_utils import hf
from steer_utils.additions.vector import LOCATIONS, POSITIONS, add_rows, first_positions

LENGTH = WINDOW + 5
CLOSE = {"atol": 2e-5, "rtol": 2e-5}
HOOK = "blocks.1.hook_resid_pre"
GENERATE = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None}
EVERYWHERE = list(itertools.product(LOCATIONS, POSITIONS))
everywhere = pytest.mark.parametrize(("location", "positions"), EVERYWHERE)


def some_rows(count: int, seed: int = 0) -> Tensor:
    return 3 * torch.randn(count, 32, generator=torch.Generator().manual_seed(seed))


def vector(count: int = 4, kind: str = "resid_pre", *where: str, layer: int = 1) -> su.SteeringVector:
    return su.SteeringVector(f"blocks.{layer}.hook_{kind}", some_rows(count), *where)


def steered(
    model: PreTrainedModel, steer: su.SteeringVector, ids: Tensor, mask: Tensor | None = None
) -> Tensor:
    with steer.on(model):
        return logits(model, ids, mask)


def expected(
    model: PreTrainedModel, steer: su.SteeringVector, ids: Tensor, prompt: int | None = None
) -> Tensor:
    """Logits [T, V] of one text [T] whose first tokens are the prompt, the rows added by hand."""
    what = addend(steer.rows, prompt or len(ids), len(ids), steer.addition_location, steer.positions)
    with added_by_hand(model, steer.act_name, what):
        return logits(model, ids[None])[0]


# --- where the rows go ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("tokens", "size", "location", "places"),
    [
        (10, 4, "front", [0, 1, 2, 3]),
        (10, 4, "mid", [3, 4, 5, 6]),
        (10, 4, "back", [6, 7, 8, 9]),
        (9, 4, "mid", [2, 3, 4, 5]),
        (10, 3, "mid", [4, 5, 6]),
        (9, 3, "mid", [3, 4, 5]),
        (4, 4, "mid", [0, 1, 2, 3]),
        (4, 4, "back", [0, 1, 2, 3]),
        (1, 1, "mid", [0]),
        (1, 1, "back", [0]),
    ],
)
def test_the_activation_changes_at_the_rows_of_the_location_and_nowhere_else(
    main_model, kind, tokens, size, location, places
):
    steer, seen, ids = vector(size, kind, location), [], random_ids(1, tokens)
    plain = hf.activations(main_model, ids, torch.ones_like(ids), [steer.act_name])[steer.act_name][0]
    with steer.on(main_model), kept_by_hand(main_model, steer.act_name, seen):
        logits(main_model, ids)
    others = [t for t in range(tokens) if t not in places]
    assert torch.equal(seen[0][0, others], plain[others])
    torch.testing.assert_close(seen[0][0, places], plain[places] + steer.rows, **CLOSE)


@pytest.mark.parametrize("kind", KINDS)
@everywhere
def test_logits_of_a_padded_batch_are_those_of_each_text_with_the_rows_added_by_hand(
    main_model, kind, location, positions
):
    steer = vector(4, kind, location, positions)
    ids, mask = padded([LENGTH, 5, 4], "left")
    found = steered(main_model, steer, ids, mask)
    assert not torch.allclose(found, logits(main_model, ids, mask), atol=1e-2)
    for row, text in enumerate(mask.bool()):
        torch.testing.assert_close(found[row][text], expected(main_model, steer, ids[row, text]), **CLOSE)


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("kind", KINDS)
@everywhere
def test_written_tokens_have_the_logits_of_the_whole_text_with_the_rows_added_by_hand(
    main_model, kind, location, positions, use_cache
):
    steer, lengths = vector(4, kind, location, positions), [LENGTH, 5]
    ids, mask = padded(lengths, "left")
    outputs = {"return_dict_in_generate": True, "output_logits": True, "use_cache": use_cache}
    with steer.on(main_model):
        written = main_model.generate(ids, attention_mask=mask, max_new_tokens=3, **outputs, **GENERATE)
    for row, length in enumerate(lengths):
        text = written.sequences[row, -length - 3 :]
        by_hand = expected(main_model, steer, text, length)[-4:-1]
        torch.testing.assert_close(torch.stack(written.logits, dim=1)[row], by_hand, **CLOSE)


@pytest.mark.parametrize(
    ("kind", "location", "positions"),
    [
        ("resid_pre", "mid", "all"),
        ("attn_out", "back", "all"),
        ("mlp_out", "front", "all"),
        ("resid_post", "back", "own"),
    ],
)
def test_in_every_architecture_decoding_is_the_same_with_padding_cache_and_chunks(
    any_model, kind, location, positions
):
    lengths, outputs = [LENGTH, 6], {"return_dict_in_generate": True, "output_logits": True}
    ids, mask = padded(lengths, "left")

    def written(rows: slice, tokens: slice = slice(None), **kwargs) -> Tensor:
        found = any_model.generate(
            ids[rows, tokens],
            attention_mask=mask[rows, tokens],
            max_new_tokens=2,
            **outputs,
            **GENERATE,
            **kwargs,
        )
        return torch.stack(found.logits, dim=1)

    everything, plain = slice(None), written(slice(None))
    with vector(3, kind, location, positions).on(any_model):
        batch = written(everything)
        uncached = written(everything, use_cache=False)
        with hf.prompt_length(torch.tensor(lengths)):
            chunked = written(everything, prefill_chunk_size=5)
        alone = [written(slice(i, i + 1), slice(-n, None)) for i, n in enumerate(lengths)]
    assert not torch.allclose(batch, plain, atol=1e-2)
    for other in (uncached, chunked, torch.cat(alone)):
        torch.testing.assert_close(batch, other, **CLOSE)


@pytest.mark.parametrize("size", [1, 4])
@everywhere
def test_prompts_in_chunks_are_steered_like_whole_ones_once_their_lengths_are_told(
    main_model, location, positions, size
):
    steer, cache, found = (
        vector(4, "mlp_out", location, positions),
        DynamicCache(config=main_model.config),
        [],
    )
    ids, mask = padded([LENGTH, 6], "left")
    with steer.on(main_model), hf.prompt_length(mask.sum(dim=1)):
        for start in range(0, LENGTH, size):
            end = min(start + size, LENGTH)
            place = (mask.cumsum(1) - 1).clamp(min=0)[:, start:end]
            output = main_model(
                ids[:, start:end], attention_mask=mask[:, :end], position_ids=place, past_key_values=cache
            )
            found.append(output.logits)
    whole = steered(main_model, steer, ids, mask)
    torch.testing.assert_close(torch.cat(found, dim=1)[mask.bool()], whole[mask.bool()], **CLOSE)


@everywhere
def test_beams_on_the_cache_are_the_beams_without(main_model, location, positions):
    ids, mask = padded([LENGTH, 5], "left")
    kwargs = {"attention_mask": mask, "num_beams": 3, "max_new_tokens": 6} | GENERATE
    kwargs |= {"return_dict_in_generate": True, "output_scores": True}
    plain = main_model.generate(ids, **kwargs)
    with vector(4, "resid_pre", location, positions).on(main_model):
        cached, uncached = (main_model.generate(ids, use_cache=use, **kwargs) for use in (True, False))
    assert torch.equal(cached.sequences, uncached.sequences)
    torch.testing.assert_close(cached.sequences_scores, uncached.sequences_scores, **CLOSE)
    assert not torch.allclose(cached.sequences_scores, plain.sequences_scores)


@everywhere
def test_each_beam_is_scored_as_the_text_with_the_rows_added_by_hand(main_model, location, positions):
    steer, length, new = vector(4, "attn_out", location, positions), 7, 5
    ids = random_ids(1, length)
    with steer.on(main_model):
        found = main_model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            num_beams=3,
            num_return_sequences=3,
            max_new_tokens=new,
            length_penalty=0.0,
            return_dict_in_generate=True,
            output_scores=True,
            **GENERATE,
        )
    for text, score in zip(found.sequences, found.sequences_scores, strict=True):
        each = expected(main_model, steer, text, length).log_softmax(-1)[length - 1 : -1]
        by_hand = each.gather(1, text[length:, None]).sum()
        torch.testing.assert_close(score, by_hand, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("location", "positions", "settings"),
    [("mid", "all", {}), ("back", "all", {"batch_size": 2}), ("back", "own", {"use_cache": False})],
)
def test_every_sample_of_generate_is_steered_like_its_prompt_alone(
    main_model, tokenizer, location, positions, settings
):
    steer, prompts = vector(4, "resid_post", location, positions), ["I hate you because", "abc", "Good day"]
    greedy = {"max_new_tokens": 5, "do_sample": False}
    found = su.generate(main_model, tokenizer, prompts, steer=steer, num_samples=3, **greedy, **settings)
    for prompt in prompts:
        ids = torch.tensor([[0, *tokenizer(prompt)["input_ids"]]])
        with steer.on(main_model):
            row = main_model.generate(ids, attention_mask=torch.ones_like(ids), pad_token_id=0, **greedy)[0]
        by_hand = tokenizer.decode(row[ids.shape[1] :], skip_special_tokens=True)
        assert found[found["prompt"] == prompt]["completion"].tolist() == [by_hand] * 3


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_vector_on_any_batch_is_the_rows_added_by_hand(data):
    model = tiny(data.draw(st.sampled_from(MAIN)))
    size = data.draw(st.integers(1, 6))
    lengths = data.draw(st.lists(st.integers(size, 16), min_size=1, max_size=4))
    ids, mask = padded(
        lengths, data.draw(st.sampled_from(["left", "right"])), seed=data.draw(st.integers(0, 99))
    )
    steer = vector(
        size,
        data.draw(st.sampled_from(KINDS)),
        *data.draw(st.sampled_from(EVERYWHERE)),
        layer=data.draw(st.integers(0, 2)),
    )
    found = steered(model, steer, ids, mask)
    for row, text in enumerate(mask.bool()):
        by_hand = expected(model, steer, ids[row, text])
        torch.testing.assert_close(found[row][text], by_hand, atol=1e-4, rtol=1e-4)


@settings(max_examples=60, deadline=None)
@given(count=st.integers(1, 9), more=st.lists(st.integers(0, 9), min_size=1, max_size=5))
def test_first_positions_leave_room_for_all_rows(count, more):
    lengths = torch.tensor(more) + count
    for location in LOCATIONS:
        starts = first_positions(count, lengths, location)
        assert starts.shape == lengths.shape
        assert ((starts >= 0) & (starts + count <= lengths)).all()


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_add_rows_adds_row_p_to_the_token_at_place_p(data):
    batch, length, size = (data.draw(st.integers(1, 6)) for _ in range(3))
    place = st.integers(-3, 8)
    row = st.lists(place, min_size=length, max_size=length)
    places = torch.tensor(data.draw(st.lists(row, min_size=batch, max_size=batch)))
    scales = torch.tensor(data.draw(st.lists(st.floats(-2, 2), min_size=batch, max_size=batch)))
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(batch, length, 3, generator=generator)
    rows = torch.randn(size, 3, generator=generator)
    once, scaled = hidden.clone(), hidden.clone()
    for b in range(batch):
        for t in range(length):
            if 0 <= places[b, t] < size:
                once[b, t] += rows[places[b, t]]
                scaled[b, t] += scales[b] * rows[places[b, t]]
    before = hidden.clone()
    assert torch.equal(add_rows(hidden, places, rows), once)
    torch.testing.assert_close(add_rows(hidden, places, rows, scales.reshape(-1, 1, 1)), scaled)
    assert torch.equal(hidden, before)


def test_what_stands_before_the_first_changed_row_stays_as_it_was(any_model):
    rows = torch.zeros(6, 32)
    rows[3:] = torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
    ids = random_ids(2, LENGTH)
    plain = logits(any_model, ids)
    changed = steered(any_model, su.SteeringVector(HOOK, rows), ids)
    assert torch.equal(changed[:, :3], plain[:, :3])
    assert ((changed[:, 3:6] - plain[:, 3:6]).abs().amax(dim=-1) > 1e-3).all()


@pytest.mark.parametrize("positions", POSITIONS)
def test_in_the_middle_and_at_the_back_what_stands_before_stays_as_it_was(any_model, positions):
    ids = random_ids(2, 10)
    plain = logits(any_model, ids)
    for location, first in (("mid", 3), ("back", 6)):
        for kind in KINDS:
            changed = steered(any_model, vector(4, kind, location, positions, layer=0), ids)
            assert torch.equal(changed[:, :first], plain[:, :first])
            assert ((changed[:, first:] - plain[:, first:]).abs().amax(dim=-1) > 1e-4).all()


@pytest.mark.parametrize("layer", [1, np.int64(1)])
def test_a_layer_is_short_for_the_name_of_its_hook(any_model, layer):
    by_layer, by_name = su.SteeringVector(layer, some_rows(3)), su.SteeringVector(HOOK, some_rows(3))
    assert by_layer.act_name == by_name.act_name == HOOK
    ids = random_ids(2, LENGTH)
    found = steered(any_model, by_layer, ids)
    assert torch.equal(found, steered(any_model, by_name, ids))
    assert not torch.allclose(found, logits(any_model, ids))


def test_a_constant_on_all_columns_goes_unnoticed_by_layer_norms_and_not_by_rms_norms():
    ids = random_ids(2, LENGTH)
    constant = su.SteeringVector(HOOK, torch.full((LENGTH, 32), 2.5))
    changes = {}
    for architecture in ("gpt2", "gpt_neox", "opt", "llama", "gemma3_text"):
        model = tiny(architecture)
        changes[architecture] = (steered(model, constant, ids) - logits(model, ids)).abs().max()
    assert max(changes[name] for name in ("gpt2", "gpt_neox", "opt")) < 1e-4
    assert min(changes[name] for name in ("llama", "gemma3_text")) > 0.1


# --- a strength for each row ------------------------------------------------------------------------------


@everywhere
def test_a_scale_multiplies_the_rows_of_each_text_by_its_own_number(main_model, location, positions):
    steer, scale = vector(4, "mlp_out", location, positions), [0.0, -1.5, 2.0]
    ids, mask = padded([LENGTH, 5, 8], "left")
    with steer.on(main_model, scale=torch.tensor(scale)):
        found = logits(main_model, ids, mask)
    for row, (text, factor) in enumerate(zip(mask.bool(), scale, strict=True)):
        torch.testing.assert_close(
            found[row][text], expected(main_model, factor * steer, ids[row, text]), **CLOSE
        )
    assert torch.equal(found[0], logits(main_model, ids, mask)[0])


def test_one_scale_is_for_all_texts(main_model):
    steer, ids = vector(), random_ids(3, LENGTH)
    with steer.on(main_model, scale=0.5):
        found = logits(main_model, ids)
    torch.testing.assert_close(found, steered(main_model, 0.5 * steer, ids), **CLOSE)


# --- arithmetic -------------------------------------------------------------------------------------------


def test_multiples_sums_and_differences_are_those_of_the_rows():
    one, other = vector(4), replace(vector(2), rows=some_rows(2, seed=1))
    longer = torch.cat([other.rows, torch.zeros(2, 32)])
    assert torch.equal((2.5 * one).rows, 2.5 * one.rows)
    assert torch.equal((one * 2.5).rows, 2.5 * one.rows)
    assert torch.equal((-one).rows, -one.rows)
    for total in (one + other, other + one):
        torch.testing.assert_close(total.rows, one.rows + longer)
    torch.testing.assert_close((one - other).rows, one.rows - longer)
    torch.testing.assert_close((other - one).rows, longer - one.rows)
    assert torch.equal((one - one).rows, torch.zeros(4, 32))


@everywhere
def test_the_sum_of_two_vectors_steers_like_both(main_model, location, positions):
    one = vector(4, "attn_out", location, positions)
    other = replace(one, rows=some_rows(4, seed=1))
    ids, mask = padded([LENGTH, 6], "left")
    with one.on(main_model), (-0.5 * other).on(main_model):
        both = logits(main_model, ids, mask)
    torch.testing.assert_close(steered(main_model, one - 0.5 * other, ids, mask), both, **CLOSE)


def test_arithmetic_keeps_hook_place_and_model_and_changes_no_operand():
    one = su.SteeringVector("blocks.2.hook_mlp_out", some_rows(3), "mid", "all", "some/model")
    other = replace(one, rows=some_rows(3, seed=1))
    kept = one.rows.clone(), other.rows.clone()
    for result in (3 * one, -one, one + other, one - other):
        assert (result.act_name, result.addition_location, result.positions, result.model_id) == (
            "blocks.2.hook_mlp_out",
            "mid",
            "all",
            "some/model",
        )
    assert torch.equal(one.rows, kept[0])
    assert torch.equal(other.rows, kept[1])


@pytest.mark.parametrize(
    "change",
    [
        {"act_name": 2},
        {"act_name": "blocks.1.hook_mlp_out"},
        {"addition_location": "back"},
        {"positions": "all"},
        {"model_id": "another"},
    ],
    ids=str,
)
def test_vectors_of_different_places_or_models_do_not_add_up(change):
    for join in (lambda a, b: a + b, lambda a, b: a - b):
        with pytest.raises(ValueError, match=r"one place.*steer=\[one, other\]"):
            join(vector(), replace(vector(), **change))


@pytest.mark.parametrize("where", [("back", "own"), ("mid", "own"), ("front", "all")])
def test_vectors_of_unequal_lengths_add_up_only_where_their_rows_meet_the_same_tokens(where):
    with pytest.raises(ValueError, match="one place"):
        vector(4, "resid_pre", *where) + vector(3, "resid_pre", *where)


def test_rows_of_another_width_do_not_add_up():
    with pytest.raises(ValueError, match="31"):
        vector(2) + su.SteeringVector(HOOK, torch.zeros(2, 31))


@pytest.mark.parametrize(
    "other", [1, 0.5, None, "Love", torch.zeros(4, 32), su.ActivationAddition(1.0, 1, "Love")]
)
def test_a_vector_and_something_else_do_not_add_up(other):
    for join in (lambda a, b: a + b, lambda a, b: a - b):
        with pytest.raises(TypeError):
            join(vector(), other)


def test_sum_rows_lets_the_shorter_matrices_end_earlier():
    total = sum_rows([torch.ones(1, 2), 10 * torch.ones(3, 2), 100 * torch.ones(2, 2)])
    assert total.tolist() == [[111, 111], [110, 110], [10, 10]]


# --- what stays as it was ---------------------------------------------------------------------------------


def test_the_model_is_restored_after_the_context_and_after_an_exception(any_model):
    ids, hooks = random_ids(2, LENGTH), hook_count(any_model)
    plain = logits(any_model, ids)
    for kind, location in itertools.product(KINDS, ("mid", "back")):
        steer = vector(4, kind, location)
        assert not torch.allclose(steered(any_model, steer, ids), plain)
        with pytest.raises(RuntimeError, match="inside"), steer.on(any_model):
            raise RuntimeError("inside")
        assert hook_count(any_model) == hooks
    assert torch.equal(logits(any_model, ids), plain)


def test_a_vector_cannot_be_changed():
    with pytest.raises(FrozenInstanceError):
        vector().rows = torch.zeros(1, 32)


def test_a_vector_may_be_used_again_and_is_not_changed_by_its_use(main_model):
    steer, ids = vector(), random_ids(1, LENGTH)
    rows = steer.rows.clone()
    assert torch.equal(steered(main_model, steer, ids), steered(main_model, steer, ids))
    assert torch.equal(steer.rows, rows)


def test_a_vector_follows_the_dtype_of_the_model():
    model, ids = tiny("llama"), random_ids(1, LENGTH)
    found = steered(model, su.SteeringVector(HOOK, some_rows(4).double()), ids)
    assert found.dtype == torch.float32
    assert torch.equal(found, steered(model, su.SteeringVector(HOOK, some_rows(4)), ids))


# --- errors -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["blocks.1.hook_q", "1", -1, True, None])
def test_an_unknown_hook_is_a_value_error_that_quotes_it(name):
    with pytest.raises(ValueError, match=rf"{name}.*blocks\.6\.hook_resid_pre"):
        su.SteeringVector(name, torch.zeros(2, 32))


@pytest.mark.parametrize(
    ("where", "quoted"),
    [
        ({"addition_location": "middle"}, "front, mid, back, not 'middle'"),
        ({"addition_location": 2}, "front, mid, back, not 2"),
        ({"positions": "later"}, "own, all, not 'later'"),
        ({"positions": None}, "own, all, not None"),
    ],
)
def test_an_unknown_place_is_a_value_error_that_quotes_it_and_names_those_there_are(where, quoted):
    with pytest.raises(ValueError, match=f"{next(iter(where))}.*{quoted}"):
        su.SteeringVector(1, torch.zeros(2, 32), **where)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_number_that_is_not_finite_is_a_value_error(bad, dtype):
    rows = torch.zeros(4, 32, dtype=dtype)
    rows[3, 31] = bad
    with pytest.raises(ValueError, match="hold inf or NaN"):
        su.SteeringVector(1, rows)


@pytest.mark.parametrize("factor", [float("nan"), float("inf")])
def test_a_factor_that_is_not_finite_is_a_value_error(factor):
    with pytest.raises(ValueError, match="inf or NaN"):
        factor * vector()


@pytest.mark.parametrize("shape", [(32,), (1, 4, 32), (0, 32), ()])
def test_rows_that_are_no_matrix_are_a_value_error_that_quotes_their_shape(shape):
    with pytest.raises(ValueError, match=r"\[S, D\]") as caught:
        su.SteeringVector(HOOK, torch.zeros(shape))
    assert str(shape) in str(caught.value)


@pytest.mark.parametrize("shape", [(4, 31), (4, 1), (32, 4)])
def test_rows_of_another_width_are_a_value_error_with_both_widths(main_model, shape):
    hooks, steer = hook_count(main_model), su.SteeringVector(HOOK, torch.zeros(shape))
    with pytest.raises(ValueError, match="32") as caught, steer.on(main_model):
        pass
    assert str(shape) in str(caught.value)
    assert hook_count(main_model) == hooks


@pytest.mark.parametrize("kind", KINDS)
def test_a_layer_beyond_the_model_is_a_value_error_that_names_it_and_leaves_no_hook(main_model, kind):
    hooks, steer = hook_count(main_model), vector(2, kind, layer=3)
    with pytest.raises(ValueError, match=r"layer 3 .*0 to 2"), steer.on(main_model):
        pass
    assert hook_count(main_model) == hooks


@everywhere
def test_a_prompt_shorter_than_the_rows_is_a_value_error_with_both_lengths(main_model, location, positions):
    ids, mask = padded([9, 3], "left")
    with vector(4, "resid_post", location, positions).on(main_model):
        with pytest.raises(ValueError, match=r"prompt of 3 tokens.*addition of 4"):
            main_model.generate(ids, attention_mask=mask, max_new_tokens=2, **GENERATE)
        assert logits(main_model, random_ids(1, 4)).shape == (1, 4, 97)
