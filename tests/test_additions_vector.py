"""Steering vectors: which tokens of which activation they reach, arithmetic, and what they refuse."""

import itertools
from dataclasses import FrozenInstanceError, replace

import numpy as np
import pytest
import torch
from conftest import (
    CONFIGS,
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
from steer_utils import hooks
from steer_utils.additions.vector import add_rows
from steer_utils.generation import all_on

LENGTH = WINDOW + 5
CLOSE = {"atol": 2e-5, "rtol": 2e-5}
HOOK = "blocks.1.hook_resid_pre"
GENERATE = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None}
OUTPUTS = {"return_dict_in_generate": True, "output_logits": True}
EVERYWHERE = list(itertools.product(("front", "mid", "back"), ("own", "all")))
# Every pair of model, kind of activation and place.
PAIRWISE = [
    (MAIN[(k + i) % 4], kind, *place) for k, kind in enumerate(KINDS) for i, place in enumerate(EVERYWHERE)
]
everywhere = pytest.mark.parametrize(
    ("architecture", "location", "positions"), [(MAIN[i % 4], *place) for i, place in enumerate(EVERYWHERE)]
)


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


@pytest.mark.parametrize(
    ("architecture", "tokens", "size", "location", "places"),
    [
        ("gpt2", 10, 4, "front", [0, 1, 2, 3]),
        ("llama", 10, 4, "mid", [3, 4, 5, 6]),
        ("gemma3_text", 10, 4, "back", [6, 7, 8, 9]),
        ("gpt_neox", 9, 4, "mid", [2, 3, 4, 5]),
        ("gpt2", 10, 3, "mid", [4, 5, 6]),
        ("llama", 9, 3, "mid", [3, 4, 5]),
        ("gemma3_text", 4, 4, "mid", [0, 1, 2, 3]),
        ("gpt_neox", 1, 1, "mid", [0]),
        ("llama", 1, 1, "back", [0]),
    ],
)
def test_the_activation_changes_at_the_rows_of_the_location_and_nowhere_else(
    architecture, tokens, size, location, places
):
    model, ids, others = (
        tiny(architecture),
        random_ids(1, tokens),
        [t for t in range(tokens) if t not in places],
    )
    for kind in KINDS:
        steer, seen = vector(size, kind, location), []
        with kept_by_hand(model, steer.act_name, seen):
            logits(model, ids)
        with steer.on(model), kept_by_hand(model, steer.act_name, seen):
            logits(model, ids)
        before, after = seen[0][0], seen[1][0]
        assert torch.equal(after[others], before[others])
        torch.testing.assert_close(after[places], before[places] + steer.rows, **CLOSE)


@pytest.mark.parametrize(("architecture", "kind", "location", "positions"), PAIRWISE)
def test_written_tokens_have_the_logits_of_the_whole_text_with_the_rows_added_by_hand(
    architecture, kind, location, positions
):
    model, steer, lengths = tiny(architecture), vector(4, kind, location, positions), [LENGTH, 5]
    ids, mask = padded(lengths, "left")
    for use_cache in (True, False):
        with steer.on(model):
            written = model.generate(
                ids, attention_mask=mask, max_new_tokens=3, use_cache=use_cache, **OUTPUTS, **GENERATE
            )
        for row, length in enumerate(lengths):
            text = written.sequences[row, -length - 3 :]
            by_hand = expected(model, steer, text, length)[-4:-1]
            torch.testing.assert_close(torch.stack(written.logits, dim=1)[row], by_hand, **CLOSE)


@pytest.mark.parametrize(
    ("architecture", "kind", "location", "positions"),
    [(name, *PAIRWISE[(5 * i + 1) % 24][1:]) for i, name in enumerate(CONFIGS)],
)
def test_in_every_architecture_decoding_is_the_same_with_padding_cache_and_chunks(
    architecture, kind, location, positions
):
    model, lengths = tiny(architecture), [LENGTH, 6]
    ids, mask = padded(lengths, "left")

    def written(rows: slice = slice(None), tokens: slice = slice(None), **kwargs) -> Tensor:
        kwargs |= {"attention_mask": mask[rows, tokens], "max_new_tokens": 2} | OUTPUTS | GENERATE
        return torch.stack(model.generate(ids[rows, tokens], **kwargs).logits, dim=1)

    unsteered, steer = written(), vector(3, kind, location, positions, layer=0)
    with steer.on(model):
        batch = written()
        uncached = written(use_cache=False)
        with hooks.batch(prompt_lengths=torch.tensor(lengths)):
            chunked = written(prefill_chunk_size=5)
        alone = [written(slice(i, i + 1), slice(-n, None)) for i, n in enumerate(lengths)]
    assert not torch.allclose(batch, unsteered, atol=1e-2)
    for other in (uncached, chunked, torch.cat(alone)):
        torch.testing.assert_close(batch, other, **CLOSE)


@everywhere
def test_prompts_in_chunks_are_steered_like_whole_ones_once_their_lengths_are_told(
    architecture, location, positions
):
    model, steer = tiny(architecture), vector(4, "mlp_out", location, positions)
    ids, mask = padded([LENGTH, 6], "left")
    whole, places = steered(model, steer, ids, mask), (mask.cumsum(1) - 1).clamp(min=0)
    for size in (1, 4):
        cache, found = DynamicCache(config=model.config), []
        with steer.on(model), hooks.batch(prompt_lengths=mask.sum(dim=1)):
            for start in range(0, LENGTH, size):
                end = min(start + size, LENGTH)
                given = {"attention_mask": mask[:, :end], "position_ids": places[:, start:end]}
                found.append(model(ids[:, start:end], past_key_values=cache, **given).logits)
        torch.testing.assert_close(torch.cat(found, dim=1)[mask.bool()], whole[mask.bool()], **CLOSE)


@everywhere
def test_beams_on_the_cache_are_the_beams_without(architecture, location, positions):
    model, (ids, mask) = tiny(architecture), padded([LENGTH, 5], "left")
    kwargs = {"attention_mask": mask, "num_beams": 3, "max_new_tokens": 6} | GENERATE
    kwargs |= {"return_dict_in_generate": True, "output_scores": True}
    unsteered = model.generate(ids, **kwargs)
    with vector(4, "resid_pre", location, positions).on(model):
        cached, uncached = (model.generate(ids, use_cache=use, **kwargs) for use in (True, False))
    assert torch.equal(cached.sequences, uncached.sequences)
    torch.testing.assert_close(cached.sequences_scores, uncached.sequences_scores, **CLOSE)
    assert not torch.allclose(cached.sequences_scores, unsteered.sequences_scores)


@everywhere
def test_each_beam_is_scored_as_the_text_with_the_rows_added_by_hand(architecture, location, positions):
    model, steer = tiny(architecture), vector(4, "attn_out", location, positions)
    ids = random_ids(1, 7)
    kwargs = {
        "num_beams": 3,
        "num_return_sequences": 3,
        "max_new_tokens": 5,
        "length_penalty": 0.0,
    } | GENERATE
    kwargs |= {"attention_mask": torch.ones_like(ids), "return_dict_in_generate": True, "output_scores": True}
    with steer.on(model):
        found = model.generate(ids, **kwargs)
    for text, score in zip(found.sequences, found.sequences_scores, strict=True):
        each = expected(model, steer, text, 7).log_softmax(-1)[6:-1]
        torch.testing.assert_close(score, each.gather(1, text[7:, None]).sum(), atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("location", "positions", "settings"),
    [("mid", "all", {}), ("back", "all", {"batch_size": 2}), ("back", "own", {"use_cache": False})],
)
def test_every_sample_of_generate_is_steered_like_its_prompt_alone(tokenizer, location, positions, settings):
    model, steer = tiny("llama"), vector(4, "resid_post", location, positions)
    prompts, greedy = ["I hate you because", "abc", "Good day"], {"max_new_tokens": 5, "do_sample": False}
    found = su.generate(model, tokenizer, prompts, steer=steer, num_samples=3, **greedy, **settings)
    for prompt in prompts:
        ids = torch.tensor([[0, *tokenizer(prompt)["input_ids"]]])
        with steer.on(model):
            row = model.generate(ids, attention_mask=torch.ones_like(ids), pad_token_id=0, **greedy)[0]
        by_hand = tokenizer.decode(row[ids.shape[1] :], skip_special_tokens=True)
        assert found[found["prompt"] == prompt]["completion"].tolist() == [by_hand] * 3


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_vector_on_any_batch_is_the_rows_added_by_hand(data):
    architecture, kind, *where = data.draw(st.sampled_from(PAIRWISE))
    model, size = tiny(architecture), data.draw(st.integers(1, 6))
    lengths = data.draw(st.lists(st.integers(size, 16), min_size=1, max_size=4))
    side, seed = data.draw(st.sampled_from(["left", "right"])), data.draw(st.integers(0, 99))
    ids, mask = padded(lengths, side, seed=seed)
    steer = vector(size, kind, *where, layer=data.draw(st.integers(0, 2)))
    found = steered(model, steer, ids, mask)
    for row, text in enumerate(mask.bool()):
        by_hand = expected(model, steer, ids[row, text])
        torch.testing.assert_close(found[row][text], by_hand, atol=1e-4, rtol=1e-4)


@settings(max_examples=60, deadline=None)
@given(count=st.integers(1, 9), more=st.lists(st.integers(0, 9), min_size=1, max_size=5))
def test_every_row_has_a_place_in_a_prompt_that_is_long_enough(count, more):
    lengths = torch.tensor(more)[:, None] + count
    positions = torch.arange(int(lengths.max())).expand(len(more), -1)
    for location in ("front", "mid", "back"):
        places = su.SteeringVector(1, torch.ones(count, 4), location).places(positions, lengths)
        inside = (places >= 0) & (places < count) & (positions < lengths)
        assert (inside.sum(dim=1) == count).all()


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_add_rows_adds_row_p_to_the_token_at_place_p(data):
    batch, length, size = (data.draw(st.integers(1, 6)) for _ in range(3))
    row = st.lists(st.integers(-3, 8), min_size=length, max_size=length)
    places = torch.tensor(data.draw(st.lists(row, min_size=batch, max_size=batch)))
    scales = torch.tensor(data.draw(st.lists(st.floats(-2, 2), min_size=batch, max_size=batch)))
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(batch, length, 3, generator=generator)
    rows = torch.randn(size, 3, generator=generator)
    once, scaled, before = hidden.clone(), hidden.clone(), hidden.clone()
    for b, t in itertools.product(range(batch), range(length)):
        if 0 <= places[b, t] < size:
            once[b, t] += rows[places[b, t]]
            scaled[b, t] += scales[b] * rows[places[b, t]]
    assert torch.equal(add_rows(hidden, places, rows), once)
    torch.testing.assert_close(add_rows(hidden, places, rows, scales.reshape(-1, 1, 1)), scaled)
    assert torch.equal(hidden, before)


@pytest.mark.parametrize("positions", ["own", "all"])
def test_what_stands_before_the_first_row_stays_as_it_was(main_model, positions):
    ids = random_ids(2, 10)
    before = logits(main_model, ids)
    for (location, first), kind in itertools.product((("mid", 3), ("back", 6)), KINDS):
        changed = steered(main_model, vector(4, kind, location, positions, layer=0), ids)
        assert torch.equal(changed[:, :first], before[:, :first])
        assert ((changed[:, first:] - before[:, first:]).abs().amax(dim=-1) > 1e-4).all()


def test_a_layer_is_short_for_the_name_of_its_hook():
    assert {su.SteeringVector(layer, some_rows(3)).act_name for layer in (1, np.int64(1), HOOK)} == {HOOK}


def test_a_constant_on_all_columns_goes_unnoticed_by_layer_norms_and_not_by_rms_norms():
    ids, changes = random_ids(2, LENGTH), {}
    constant = su.SteeringVector(HOOK, torch.full((LENGTH, 32), 2.5))
    for architecture in ("gpt2", "gpt_neox", "opt", "llama", "gemma3_text"):
        model = tiny(architecture)
        changes[architecture] = (steered(model, constant, ids) - logits(model, ids)).abs().max()
    assert max(changes[name] for name in ("gpt2", "gpt_neox", "opt")) < 1e-4
    assert min(changes[name] for name in ("llama", "gemma3_text")) > 0.1


# --- a strength for each batch row ------------------------------------------------------------------------


@everywhere
def test_a_scale_multiplies_the_rows_of_each_text_by_its_own_number(architecture, location, positions):
    model, steer, scale = tiny(architecture), vector(4, "mlp_out", location, positions), [0.0, -1.5, 2.0]
    ids, mask = padded([LENGTH, 5, 8], "left")
    with steer.on(model, scale=torch.tensor(scale)):
        found = logits(model, ids, mask)
    for row, (text, factor) in enumerate(zip(mask.bool(), scale, strict=True)):
        torch.testing.assert_close(found[row][text], expected(model, factor * steer, ids[row, text]), **CLOSE)
    assert torch.equal(found[0], logits(model, ids, mask)[0])
    with steer.on(model, scale=-1.5):
        torch.testing.assert_close(logits(model, ids, mask)[1], found[1], **CLOSE)


# --- arithmetic -------------------------------------------------------------------------------------------


def test_multiples_sums_and_differences_are_those_of_the_rows():
    one, other = vector(4), replace(vector(2), rows=some_rows(2, seed=1))
    longer = torch.cat([other.rows, torch.zeros(2, 32)])
    for product in (2.5 * one, one * 2.5):
        assert torch.equal(product.rows, 2.5 * one.rows)
    assert torch.equal((-one).rows, -one.rows)
    for total in (one + other, other + one):
        torch.testing.assert_close(total.rows, one.rows + longer)
    torch.testing.assert_close((one - other).rows, one.rows - longer)
    torch.testing.assert_close((other - one).rows, longer - one.rows)
    assert torch.equal((one - one).rows, torch.zeros(4, 32))
    assert (one + replace(other, rows=other.rows.double())).rows.dtype == torch.float32


@everywhere
def test_the_sum_of_two_vectors_steers_like_both_nested_or_in_a_list(architecture, location, positions):
    model, one = tiny(architecture), vector(4, "attn_out", location, positions)
    other = -0.5 * replace(one, rows=some_rows(4, seed=1))
    ids, mask = padded([LENGTH, 6], "left")
    together = steered(model, one + other, ids, mask)
    with one.on(model), other.on(model):
        torch.testing.assert_close(logits(model, ids, mask), together, **CLOSE)
    for steers in ([one, other], [other, one]):
        with all_on(steers, model, None):
            torch.testing.assert_close(logits(model, ids, mask), together, **CLOSE)


@pytest.mark.parametrize("where", [("back", "own"), ("mid", "all"), ("front", "all")])
def test_vectors_in_a_list_at_one_hook_add_up_though_their_sum_is_refused(main_model, where):
    one, other, ids = vector(4, "resid_pre", *where), vector(3, "resid_pre", *where), random_ids(1, LENGTH)
    what = sum(addend(steer.rows, LENGTH, LENGTH, *where) for steer in (one, other))
    with pytest.raises(ValueError, match="one place"):
        one + other
    with added_by_hand(main_model, one.act_name, what):
        by_hand = logits(main_model, ids)
    with all_on([one, other], main_model, None):
        torch.testing.assert_close(logits(main_model, ids), by_hand, **CLOSE)


def test_arithmetic_keeps_hook_place_and_model_and_changes_no_operand():
    one = su.SteeringVector("blocks.2.hook_mlp_out", some_rows(3), "mid", "all", "some/model")
    other = replace(one, rows=some_rows(3, seed=1))
    for result in (3 * one, -one, one + other, one - other):
        assert result.where == one.where == ("blocks.2.hook_mlp_out", "mid", "all", 3, 32, "some/model")
    assert torch.equal(one.rows, some_rows(3))
    assert torch.equal(other.rows, some_rows(3, seed=1))


@pytest.mark.parametrize(
    "change",
    [
        {"act_name": 2},
        {"act_name": "blocks.1.hook_mlp_out"},
        {"addition_location": "back"},
        {"positions": "all"},
        {"model_id": "another"},
        {"rows": torch.zeros(4, 31)},
    ],
)
def test_vectors_of_different_places_models_or_widths_do_not_add_up(change):
    for join in (lambda a, b: a + b, lambda a, b: a - b):
        with pytest.raises(ValueError, match=r"one place.*steer=\[one, other\]"):
            join(vector(), replace(vector(), **change))


def test_a_vector_and_something_else_do_not_add_up():
    for other in (1, 0.5, None, "Love", torch.zeros(4, 32), su.ActivationAddition(1.0, 1, "Love")):
        for join in (lambda a, b: a + b, lambda a, b: a - b):
            with pytest.raises(TypeError):
                join(vector(), other)


def test_a_vector_cannot_be_changed_and_is_not_changed_by_its_use():
    model, ids, steer = tiny("gpt2"), random_ids(1, LENGTH), vector()
    with pytest.raises(FrozenInstanceError):
        steer.rows = torch.zeros(1, 32)
    assert torch.equal(steered(model, steer, ids), steered(model, steer, ids))
    assert torch.equal(steer.rows, some_rows(4))
    assert {steer: "a key"}[steer] == "a key"
    assert steer != vector()  # the same only if it is the same object: comparing rows gives no truth value


def test_a_vector_follows_the_dtype_of_the_model():
    model, ids = tiny("llama"), random_ids(1, LENGTH)
    found = steered(model, su.SteeringVector(HOOK, some_rows(4).double()), ids)
    assert found.dtype == torch.float32
    assert torch.equal(found, steered(model, vector(4), ids))


# --- errors -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bad", "quoted"),
    [
        ({"act_name": "blocks.1.hook_q"}, r"hook_q.*blocks\.6\.hook_resid_pre"),
        ({"act_name": True}, "act_name of SteeringVector must be a text or a whole number, not True"),
        ({"addition_location": "middle"}, "addition_location .*front, mid or back, not 'middle'"),
        ({"addition_location": 2}, "addition_location of SteeringVector must be a text, not 2"),
        ({"positions": None}, "positions of SteeringVector must be a text, not None"),
        ({"rows": torch.zeros(32)}, r"\[S, D\], not \(32,\)"),
        ({"rows": torch.zeros(1, 4, 32)}, r"\[S, D\], not \(1, 4, 32\)"),
        ({"rows": torch.zeros(0, 32)}, r"\[S, D\], not \(0, 32\)"),
    ],
)
def test_a_bad_value_is_a_value_error_that_quotes_it(bad, quoted):
    with pytest.raises((TypeError, ValueError), match=quoted):
        su.SteeringVector(**{"act_name": 1, "rows": torch.zeros(2, 32)} | bad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_number_that_is_not_finite_is_a_value_error(dtype):
    for bad in (float("nan"), float("inf"), -float("inf")):
        rows = torch.zeros(4, 32, dtype=dtype)
        rows[3, 31] = bad
        with pytest.raises(ValueError, match="hold inf or NaN"):
            su.SteeringVector(1, rows)
        with pytest.raises(ValueError, match="hold inf or NaN"):
            bad * vector()


@pytest.mark.parametrize("scale", [float("nan"), torch.tensor([1.0, float("inf")])])
def test_a_scale_that_is_not_finite_is_a_value_error_that_quotes_it(scale):
    steered = vector().on(tiny("gpt2"), scale=scale)
    with pytest.raises(ValueError, match=r"scale must be finite, not .*(nan|inf)"), steered:
        pass


def test_a_layer_beyond_the_model_and_another_width_are_value_errors_that_leave_no_hook(main_model):
    count = hook_count(main_model)
    for kind in KINDS:
        with pytest.raises(ValueError, match=r"layer 3 .*0 to 2"), vector(2, kind, layer=3).on(main_model):
            pass
        narrow = su.SteeringVector(f"blocks.1.hook_{kind}", torch.zeros(4, 31))
        with pytest.raises(ValueError, match=r"\(4, 31\).*32"), narrow.on(main_model):
            pass
    assert hook_count(main_model) == count


@everywhere
def test_a_prompt_shorter_than_the_rows_is_a_value_error_with_both_lengths(architecture, location, positions):
    model, (ids, mask) = tiny(architecture), padded([9, 3], "left")
    with vector(4, "resid_post", location, positions).on(model):
        with pytest.raises(ValueError, match=r"prompt of 3 tokens.*addition of 4"):
            model.generate(ids, attention_mask=mask, max_new_tokens=2, **GENERATE)
        assert logits(model, random_ids(1, 4)).shape == (1, 4, 97)
