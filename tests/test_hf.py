"""Blocks, heads, caches and positions of every known architecture."""

import copy
import itertools
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import pytest
import torch
from conftest import CONFIGS, KINDS, WINDOW, hook_count, logits, new_model, padded, places, random_ids, tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import DynamicCache, GPTBigCodeConfig, OPTConfig, PreTrainedModel

from steer_utils import hf

LENGTH = WINDOW + 5  # prompts that a sliding window does not cover
CLOSE = {"atol": 2e-5, "rtol": 2e-5}
SPECIAL = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}


class Recorder:
    """An edit that changes nothing and keeps the positions and lengths that it is shown."""

    def __init__(self) -> None:
        self.calls: list[Tensor] = []
        self.lengths: list[list[int]] = []

    def __call__(self, hidden: Tensor, positions: Tensor, lengths: Tensor) -> Tensor:
        self.calls.append(positions.expand(hidden.shape[:2]).clone())
        self.lengths.append(lengths.expand(len(hidden)).tolist())
        return hidden

    @property
    def row(self) -> list[list[int]]:
        """The positions of all calls, one after the other, for each row of the batch."""
        return torch.cat(self.calls, dim=1).tolist()


@contextmanager
def recorded(
    model: PreTrainedModel, layer: int = 1, kind: str = "resid_pre", **settings
) -> Iterator[Recorder]:
    recorder = Recorder()
    with hf.edit_activation(model, f"blocks.{layer}.hook_{kind}", recorder, **settings):
        yield recorder


def resid_pre(layer: int) -> str:
    return f"blocks.{layer}.hook_resid_pre"


def block_inputs(
    model: PreTrainedModel, ids: Tensor, mask: Tensor, layers: Iterable[int]
) -> dict[int, Tensor]:
    names = {layer: resid_pre(layer) for layer in layers}
    found = hf.activations(model, ids, mask, names.values())
    assert set(found) == set(names.values())
    return {layer: found[name] for layer, name in names.items()}


def plus_one(hidden: Tensor, positions: Tensor, lengths: Tensor) -> Tensor:
    return hidden + (positions >= 0)[..., None]


def only_the_last_token(hidden: Tensor, positions: Tensor, lengths: Tensor) -> Tensor:
    return hidden + (positions == lengths[:, None] - 1)[..., None]


def turned(hidden: Tensor, positions: Tensor, lengths: Tensor) -> Tensor:
    return hidden.flip(-1)


# --- parts of a model -------------------------------------------------------------------------------------


def test_every_architecture_with_branch_hooks_has_a_tiny_model():
    assert set(CONFIGS) == set(hf.BRANCHES)


@pytest.mark.parametrize("architecture", CONFIGS)
def test_the_tiny_model_is_of_the_architecture_that_it_is_named_after(architecture):
    assert tiny(architecture).config.model_type == architecture


def test_the_blocks_run_once_each_and_in_order(any_model):
    order, handles = [], []
    for i, block in enumerate(hf.blocks(any_model)):
        handles.append(block.register_forward_pre_hook(lambda *_, i=i: order.append(i)))
    logits(any_model, random_ids(1, 5))
    for handle in handles:
        handle.remove()
    assert order == list(range(any_model.config.num_hidden_layers))


def test_block_is_the_one_of_that_number_in_the_list_of_blocks(any_model):
    assert all(hf.block(any_model, i) is block for i, block in enumerate(hf.blocks(any_model)))


@pytest.mark.parametrize("layer", [-1, 3, 100])
def test_a_layer_beyond_the_model_is_a_value_error_with_both_numbers(layer):
    with pytest.raises(ValueError, match=rf"layer {layer} .* blocks 0 to 2"):
        hf.block(tiny("llama"), layer)


def test_another_architecture_has_hooks_between_its_blocks_but_not_inside_them():
    config = GPTBigCodeConfig(vocab_size=97, n_embd=32, n_layer=2, n_head=4, n_positions=64, **SPECIAL)
    model = new_model(config)
    with recorded(model) as recorder:
        logits(model, random_ids(1, 5))
    assert recorder.row == [[0, 1, 2, 3, 4]]
    with pytest.raises(ValueError, match=r"hook_mlp_out' is not known for 'gpt_bigcode'.*resid_pre"):
        hf.edit_activation(model, "blocks.0.hook_mlp_out", turned).__enter__()


def test_a_model_whose_blocks_cannot_be_found_is_a_value_error_that_says_what_is_there():
    model = new_model(CONFIGS["llama"]())
    model.config.num_hidden_layers = 5
    with pytest.raises(ValueError, match=r"'llama' model: expected one ModuleList of 5 .* lists of \[3\]"):
        hf.blocks(model)


def test_the_output_head_maps_the_last_hidden_state_to_the_logits(any_model):
    ids, mask = padded([LENGTH, 4], "left")
    with torch.no_grad():
        ours = hf.lm_head(any_model)(hf.forward(any_model, ids, mask).last_hidden_state)
    cap = getattr(any_model.config, "final_logit_softcapping", None)
    if any_model.config.model_type == "gemma2":
        assert cap == 30.0  # Gemma 2 bends its logits behind the head
    if cap is not None:
        ours = cap * torch.tanh(ours / cap)
    torch.testing.assert_close(ours[mask.bool()], logits(any_model, ids, mask)[mask.bool()], **CLOSE)


def test_logits_of_the_last_hidden_state_are_those_of_the_model(any_model):
    ids, mask = padded([LENGTH, 4], "left")
    with torch.no_grad():
        ours = hf.logits(any_model, hf.forward(any_model, ids, mask).last_hidden_state)
    torch.testing.assert_close(ours[mask.bool()], logits(any_model, ids, mask)[mask.bool()], **CLOSE)


@pytest.mark.parametrize("architecture", ["gemma2", "gemma3_text"])
def test_logits_are_capped_as_the_configuration_says(architecture):
    config = CONFIGS[architecture]()
    config.final_logit_softcapping = 0.5
    model, ids = new_model(config), random_ids(2, LENGTH)
    with torch.no_grad():
        hidden = hf.forward(model, ids, torch.ones_like(ids)).last_hidden_state
        assert hf.lm_head(model)(hidden).abs().max() > 1  # without the cap
        for part in (hidden, hidden[0], hidden[0, -1]):
            assert hf.logits(model, part).shape == (*part.shape[:-1], 97)
        ours = hf.logits(model, hidden)
    assert ours.abs().max() <= 0.5
    torch.testing.assert_close(ours, logits(model, ids), **CLOSE)


def test_width_is_that_of_the_residual_stream_even_where_word_embeddings_are_narrower():
    config = {"hidden_size": 32, "ffn_dim": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = new_model(OPTConfig(**config, vocab_size=97, word_embed_proj_dim=16, max_position_embeddings=64))
    ids = random_ids(1, 6)
    inputs = block_inputs(model, ids, torch.ones_like(ids), [0, 1])
    assert {tensor.shape[-1] for tensor in inputs.values()} == {hf.width(model)} == {32}


def test_width_is_that_of_every_block_input(any_model):
    ids = random_ids(2, 3)
    inputs = block_inputs(any_model, ids, torch.ones_like(ids), [0, 1])
    assert [inputs[layer].shape for layer in (0, 1)] == [(2, 3, hf.width(any_model))] * 2


def test_forward_numbers_positions_by_the_mask(any_model):
    ids, mask = padded([LENGTH, 3, 7], "left")
    with torch.no_grad():
        batch = hf.forward(any_model, ids, mask).last_hidden_state
        for row, hidden in enumerate(batch):
            alone = ids[row : row + 1, mask[row].bool()]
            expected = hf.forward(any_model, alone, torch.ones_like(alone)).last_hidden_state[0]
            torch.testing.assert_close(hidden[mask[row].bool()], expected, **CLOSE)


@pytest.mark.parametrize("size", [1, 4, LENGTH - 1])
@pytest.mark.parametrize("side", ["left", "right"])
def test_forward_on_a_cache_continues_the_positions_of_a_padded_batch(any_model, side, size):
    ids, mask = padded([LENGTH, 5, 9], side)
    cache, parts, read_so_far = DynamicCache(config=any_model.config), [], 0
    with torch.no_grad():
        for chunk in ids.split(size, dim=1):
            read_so_far += chunk.shape[1]
            output = hf.forward(
                any_model, chunk, mask[:, :read_so_far], past_key_values=cache, use_cache=True
            )
            parts.append(output.last_hidden_state)
        whole = hf.forward(any_model, ids, mask).last_hidden_state
    torch.testing.assert_close(torch.cat(parts, dim=1)[mask.bool()], whole[mask.bool()], **CLOSE)


# --- the cache --------------------------------------------------------------------------------------------


def read(model: PreTrainedModel, ids: Tensor, mask: Tensor | None = None) -> DynamicCache:
    mask = torch.ones_like(ids) if mask is None else mask
    with torch.no_grad():
        return hf.forward(model, ids, mask, use_cache=True).past_key_values


def next_logits(model: PreTrainedModel, cache: DynamicCache, token: Tensor, mask: Tensor) -> Tensor:
    """Logits [B, V] of one more token [B, 1] on a copy of the cache; mask [B, P + 1]."""
    position = (places(mask)[:, -1:]).clamp(min=0)
    cache = copy.copy(cache)
    cache.layers = [copy.copy(layer) for layer in cache.layers]
    return model(token, attention_mask=mask, position_ids=position, past_key_values=cache).logits[:, -1]


@pytest.mark.parametrize("length", [WINDOW - 3, LENGTH])
def test_cached_are_keys_and_values_of_each_layer(any_model, length):
    config = any_model.config
    pairs = hf.cached(read(any_model, random_ids(2, length)))
    assert len(pairs) == config.num_hidden_layers
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    for keys, values in pairs:
        assert keys.shape == values.shape
        assert (keys.shape[0], keys.shape[1], keys.shape[3]) == (2, heads, 8)
        assert keys.shape[2] in (
            length,
            min(length, WINDOW - 1),
        )  # a sliding layer keeps what it will look at
        assert not torch.equal(keys, values)


def test_cached_are_the_tensors_themselves(any_model):
    cache = read(any_model, random_ids(1, 4))
    assert all(
        a is b
        for pair, layer in zip(hf.cached(cache), cache.layers, strict=True)
        for a, b in zip(pair, (layer.keys, layer.values), strict=True)
    )


def test_a_cache_with_the_same_tensors_gives_the_same_logits(any_model):
    ids, mask = padded([LENGTH, 4], "left")
    cache = read(any_model, ids[:, :-1], mask[:, :-1])
    same = hf.with_cached(cache, [(k.clone(), v.clone()) for k, v in hf.cached(cache)])
    with torch.no_grad():
        expected = next_logits(any_model, cache, ids[:, -1:], mask)
        assert torch.equal(next_logits(any_model, same, ids[:, -1:], mask), expected)
    torch.testing.assert_close(expected, logits(any_model, ids, mask)[:, -1], **CLOSE)


def test_other_tensors_change_the_logits_and_leave_the_given_cache_as_it_was(any_model):
    ids = random_ids(2, LENGTH)
    mask, cache = torch.ones_like(ids), read(any_model, ids[:, :-1])
    before = [(k.clone(), v.clone()) for k, v in hf.cached(cache)]
    with torch.no_grad():
        expected = next_logits(any_model, cache, ids[:, -1:], mask)
        perturbed = hf.with_cached(cache, [(k + 0.5, v + 0.5) for k, v in before])
        other = any_model(
            ids[:, -1:],
            attention_mask=mask,
            position_ids=mask.sum(1, keepdim=True) - 1,
            past_key_values=perturbed,
        ).logits[:, -1]  # this call also lengthens `perturbed`, and must not lengthen `cache`
        assert (other - expected).abs().max() > 0.01
        assert torch.equal(next_logits(any_model, cache, ids[:, -1:], mask), expected)
    assert cache.get_seq_length() == LENGTH - 1
    assert perturbed.get_seq_length() == LENGTH
    for held, kept in zip(hf.cached(cache), before, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(held, kept, strict=True))


def test_gradients_flow_to_the_tensors_of_every_layer(any_model):
    ids = random_ids(2, LENGTH)
    cache = read(any_model, ids[:, :-1])
    pairs = [(k.clone().requires_grad_(), v.clone().requires_grad_()) for k, v in hf.cached(cache)]
    next_logits(any_model, hf.with_cached(cache, pairs), ids[:, -1:], torch.ones_like(ids)).logsumexp(
        -1
    ).sum().backward()
    assert all(tensor.grad.abs().max() > 0 for pair in pairs for tensor in pair)


def test_the_gradient_with_respect_to_the_cache_is_that_of_finite_differences():
    model = copy.deepcopy(tiny("gpt2")).double()  # RMS norms compute in float32 whatever their input
    ids = random_ids(1, LENGTH)
    cache, mask = read(model, ids[:, :-1]), torch.ones_like(ids)
    tensors = [tensor for pair in hf.cached(cache) for tensor in pair]
    generator = torch.Generator().manual_seed(0)
    direction = [torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype) for tensor in tensors]

    def loss(step: float, *, requires_grad: bool = False) -> tuple[Tensor, list[Tensor]]:
        moved = [
            (t + step * d).requires_grad_(requires_grad) for t, d in zip(tensors, direction, strict=True)
        ]
        changed = hf.with_cached(cache, list(zip(moved[::2], moved[1::2], strict=True)))
        return next_logits(model, changed, ids[:, -1:], mask).log_softmax(-1)[0, 5], moved

    value, leaves = loss(0.0, requires_grad=True)
    gradients = torch.autograd.grad(value, leaves)
    along = sum((g * d).sum() for g, d in zip(gradients, direction, strict=True))
    with torch.no_grad():
        difference = (loss(1e-5)[0] - loss(-1e-5)[0]) / 2e-5
    assert along.abs() > 1e-3
    torch.testing.assert_close(along, difference, rtol=1e-6, atol=0)


def test_tensors_of_another_shape_or_number_are_a_value_error(main_model):
    cache = read(main_model, random_ids(2, 5))
    pairs = hf.cached(cache)
    with pytest.raises(ValueError, match=f"holds {len(pairs)} layers.*given {len(pairs) - 1} layers"):
        hf.with_cached(cache, pairs[:-1])
    with pytest.raises(ValueError, match=r"\(2, \d, 4, 8\)"):
        hf.with_cached(cache, [(k[:, :, 1:], v[:, :, 1:]) for k, v in pairs])
    with pytest.raises(ValueError, match=r"\(1, \d, 5, 8\)"):  # would broadcast
        hf.with_cached(cache, [(k[:1], v[:1]) for k, v in pairs])
    with pytest.raises(ValueError, match="given 0 layers"):
        hf.with_cached(cache, [])
    wrong_last = [*pairs[:-1], (pairs[-1][0][..., :-1], pairs[-1][1])]
    with pytest.raises(ValueError, match="holds"):
        hf.with_cached(cache, wrong_last)


def test_repeated_rows_stand_next_to_each_other_and_the_given_cache_keeps_its_own(any_model):
    cache = read(any_model, random_ids(2, LENGTH))
    before = [(k.clone(), v.clone()) for k, v in hf.cached(cache)]
    three = hf.cached(hf.repeated(cache, 3))
    for new, old, held in zip(three, before, hf.cached(cache), strict=True):
        for new_tensor, old_tensor, held_tensor in zip(new, old, held, strict=True):
            assert torch.equal(new_tensor, old_tensor[[0, 0, 0, 1, 1, 1]])
            assert torch.equal(held_tensor, old_tensor)


def test_a_repeated_cache_continues_like_a_prompt_that_was_repeated_before_reading(any_model):
    ids, mask = padded([LENGTH, 4], "left")
    rows, row_mask = ids.repeat_interleave(3, dim=0), mask.repeat_interleave(3, dim=0)
    token = random_ids(6, 2)[:, 1:]
    row_mask = torch.cat([row_mask, torch.ones_like(token)], dim=1)
    with torch.no_grad():
        ours = next_logits(any_model, hf.repeated(read(any_model, ids, mask), 3), token, row_mask)
        expected = logits(any_model, torch.cat([rows, token], dim=1), row_mask)[:, -1]
    torch.testing.assert_close(ours, expected, **CLOSE)


# --- absolute positions -----------------------------------------------------------------------------------


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_token_positions_count_the_text_before_each_token(data):
    rows, total = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 12))
    past = data.draw(st.integers(0, total - 1))
    mask = torch.zeros(rows, total, dtype=data.draw(st.sampled_from([torch.long, torch.bool, torch.float32])))
    for row in mask:
        start = data.draw(st.integers(0, total - 1))
        row[start : data.draw(st.integers(start + 1, total))] = 1
    found = hf.token_positions(total - past, past=past, attention_mask=mask)
    assert found.tolist() == places(mask.long())[:, past:].tolist()


@pytest.mark.parametrize("past", [0, 3])
def test_without_a_mask_every_token_counts(past):
    assert hf.token_positions(4, past=past).tolist() == [[past, past + 1, past + 2, past + 3]]


def test_position_ids_decide_where_the_mask_says_nothing_of_padding():
    given_ids = torch.tensor([[4, 5], [2, 3]])
    expanded = torch.ones(2, 1, 2, 6)
    for mask in (None, expanded, {"full_attention": expanded}):
        assert torch.equal(hf.token_positions(2, attention_mask=mask, position_ids=given_ids), given_ids)


def test_a_mask_of_two_dimensions_outranks_position_ids():
    mask, given_ids = torch.tensor([[0, 1, 1]]), torch.tensor([[0, 0, 1]])
    assert hf.token_positions(3, attention_mask=mask, position_ids=given_ids).tolist() == [[-1, 0, 1]]


# --- editing the residual stream: what the edit is shown --------------------------------------------------


def test_positions_of_a_plain_call(any_model):
    with recorded(any_model) as recorder, torch.no_grad():
        any_model(random_ids(2, 4))
    assert recorder.row == [[0, 1, 2, 3]] * 2


def test_positions_of_a_call_whose_arguments_have_no_names(main_model):
    ids, mask = padded([4, 2], "left")
    arguments = (ids, None, mask) if main_model.config.model_type == "gpt2" else (ids, mask)
    with recorded(main_model) as recorder, torch.no_grad():
        main_model(*arguments)
        main_model.base_model(*arguments)
    assert recorder.row == [[0, 1, 2, 3] * 2, [-1, -1, 0, 1] * 2]


@pytest.mark.parametrize(("side", "expected"), [("left", [-1, -1, 0, 1]), ("right", [0, 1, -1, -1])])
def test_positions_of_a_padded_call(any_model, side, expected):
    ids, mask = padded([4, 2], side)
    with recorded(any_model) as recorder:
        logits(any_model, ids, mask)
    assert recorder.row == [[0, 1, 2, 3], expected]


GENERATE = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None}


def test_positions_in_cached_decoding_of_a_left_padded_batch(any_model):
    ids, mask = padded([LENGTH, 3], "left")
    with recorded(any_model) as recorder:
        any_model.generate(ids, attention_mask=mask, max_new_tokens=4, **GENERATE)
    assert [call.shape[1] for call in recorder.calls] == [LENGTH, 1, 1, 1]
    assert recorder.row == [list(range(LENGTH + 3)), [-1] * (LENGTH - 3) + list(range(6))]


def test_positions_in_uncached_decoding_of_a_left_padded_batch(any_model):
    ids, mask = padded([4, 2], "left")
    with recorded(any_model) as recorder:
        any_model.generate(ids, attention_mask=mask, max_new_tokens=3, use_cache=False, **GENERATE)
    assert [call.tolist() for call in recorder.calls] == [
        [[0, 1, 2, 3], [-1, -1, 0, 1]],
        [[0, 1, 2, 3, 4], [-1, -1, 0, 1, 2]],
        [[0, 1, 2, 3, 4, 5], [-1, -1, 0, 1, 2, 3]],
    ]


def test_positions_of_the_beams_of_a_left_padded_batch(any_model):
    ids, mask = padded([4, 2], "left")
    with recorded(any_model) as recorder:
        any_model.generate(ids, attention_mask=mask, max_new_tokens=3, num_beams=3, **GENERATE)
    assert recorder.row == [[0, 1, 2, 3, 4, 5]] * 3 + [[-1, -1, 0, 1, 2, 3]] * 3


def test_positions_of_a_prompt_in_chunks_on_a_cache(any_model):
    ids, mask = padded([LENGTH, 6], "left")
    cache, bounds = DynamicCache(config=any_model.config), [0, 4, 9, LENGTH]
    with recorded(any_model) as recorder, torch.no_grad(), hf.batch(prompt_lengths=6):
        for start, end in itertools.pairwise(bounds):
            position = places(mask)[:, start:end].clamp(min=0)
            any_model(
                ids[:, start:end], attention_mask=mask[:, :end], position_ids=position, past_key_values=cache
            )
    assert recorder.row == places(mask).tolist()


def test_positions_of_a_prompt_in_chunks_without_a_mask(main_model):
    ids, cache = random_ids(1, LENGTH), DynamicCache(config=main_model.config)
    with recorded(main_model) as recorder, torch.no_grad():
        for chunk in ids.split(5, dim=1):
            main_model(chunk, past_key_values=cache)
    assert recorder.row == [list(range(LENGTH))]


def test_positions_of_chunked_prefill_in_generate(main_model):
    ids, mask = padded([LENGTH, 6], "left")
    with recorded(main_model) as recorder, hf.batch(prompt_lengths=6):
        main_model.generate(
            ids,
            attention_mask=mask,
            past_key_values=DynamicCache(config=main_model.config),
            prefill_chunk_size=5,
            max_new_tokens=2,
            **GENERATE,
        )
    assert recorder.row == [[*row, row[-1] + 1] for row in places(mask).tolist()]


def test_positions_of_embeddings_in_place_of_ids(any_model):
    ids, mask = padded([4, 2], "left")
    embeddings = any_model.get_input_embeddings()(ids)
    with recorded(any_model) as recorder:
        with torch.no_grad():
            any_model(inputs_embeds=embeddings, attention_mask=mask)
        any_model.generate(inputs_embeds=embeddings, attention_mask=mask, max_new_tokens=3, **GENERATE)
    once = [[0, 1, 2, 3], [-1, -1, 0, 1]]
    assert recorder.row == [once[0] + once[0] + [4, 5], once[1] + once[1] + [2, 3]]


@pytest.mark.parametrize("kind", KINDS)
def test_positions_and_lengths_are_the_same_at_every_kind_of_hook(any_model, kind):
    ids, mask = padded([LENGTH, 3], "left")
    with recorded(any_model, kind=kind) as recorder:
        any_model.generate(ids, attention_mask=mask, max_new_tokens=3, **GENERATE)
    assert recorder.row == [list(range(LENGTH + 2)), [-1] * (LENGTH - 3) + list(range(5))]
    assert recorder.lengths == [[LENGTH, 3]] * 3


@pytest.mark.parametrize(
    "kwargs", [{}, {"use_cache": False}, {"num_beams": 3}, {"num_beams": 2, "use_cache": False}]
)
def test_lengths_are_those_of_the_prompts_at_every_step_of_decoding(main_model, kwargs):
    ids, mask = padded([LENGTH, 3], "left")
    with recorded(main_model) as recorder:
        main_model.generate(ids, attention_mask=mask, max_new_tokens=4, **GENERATE, **kwargs)
    beams = kwargs.get("num_beams", 1)
    assert recorder.lengths == [[LENGTH] * beams + [3] * beams] * 4


def test_lengths_of_the_next_text_are_its_own(main_model):
    with recorded(main_model) as recorder:
        for length in (5, 9, 4):
            ids = random_ids(1, length)
            mask = torch.ones_like(ids)
            logits(main_model, ids)
            main_model.generate(ids, attention_mask=mask, use_cache=False, max_new_tokens=2, **GENERATE)
    assert recorder.lengths == [[length] for length in (5, 5, 5, 9, 9, 9, 4, 4, 4)]


@pytest.mark.parametrize("side", ["left", "right"])
def test_lengths_of_a_padded_batch_count_its_text(main_model, side):
    ids, mask = padded([4, 2, 7], side)
    with recorded(main_model) as recorder:
        logits(main_model, ids, mask)
    assert recorder.lengths == [[4, 2, 7]]


@pytest.mark.parametrize("told", [9, torch.tensor(9), torch.tensor([9, 6])], ids=str)
def test_told_lengths_hold_in_every_chunk_and_for_rows_that_were_repeated(main_model, told):
    ids, cache = random_ids(4, 9), DynamicCache(config=main_model.config)
    with recorded(main_model) as recorder, torch.no_grad(), hf.batch(prompt_lengths=told):
        for chunk in ids.split(4, dim=1):
            main_model(chunk, past_key_values=cache)
    expected = [9, 9, 6, 6] if isinstance(told, Tensor) and told.ndim else [9] * 4
    assert recorder.lengths == [expected] * 3


def test_positions_of_the_text_with_a_static_cache(main_model):
    ids, mask = padded([4, 2], "left")
    with recorded(main_model) as recorder:
        main_model.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=3,
            cache_implementation="static",
            disable_compile=True,
            **GENERATE,
        )
    first, second = recorder.row
    assert first == [0, 1, 2, 3, 4, 5]
    assert second[2:] == [0, 1, 2, 3]  # padding cannot be told apart there; nothing attends to it


# --- editing the residual stream: what it does ------------------------------------------------------------


def test_an_edit_that_returns_what_it_got_leaves_the_logits_as_they_are_to_the_last_bit(any_model):
    ids, mask = padded([LENGTH, 3], "left")
    expected = logits(any_model, ids, mask)
    for layer, kind in itertools.product(range(any_model.config.num_hidden_layers), KINDS):
        with recorded(any_model, layer, kind):
            assert torch.equal(logits(any_model, ids, mask), expected)


@pytest.mark.parametrize("kind", KINDS[1:])
def test_an_edit_of_what_a_branch_adds_or_of_what_leaves_a_block_reaches_the_next_block(any_model, kind):
    last = any_model.config.num_hidden_layers - 1
    ids, seen = random_ids(2, 6), []
    plain = block_inputs(any_model, ids, torch.ones_like(ids), [last])[last]
    with hf.edit_activation(any_model, f"blocks.{last - 1}.hook_{kind}", only_the_last_token):
        handle = hf.block(any_model, last).register_forward_pre_hook(
            lambda module, args, kwargs: seen.append(args[0] if args else kwargs["hidden_states"]),
            with_kwargs=True,
        )
        logits(any_model, ids)
        handle.remove()
    assert torch.equal(seen[0][:, :-1], plain[:, :-1])
    if kind == "resid_post":
        torch.testing.assert_close(seen[0][:, -1], plain[:, -1] + 1, **CLOSE)
    assert (seen[0][:, -1] - plain[:, -1]).abs().amin() > 1e-3


def test_an_edit_is_what_the_block_receives(any_model):
    ids = random_ids(1, 6)
    seen = []
    with hf.edit_activation(any_model, resid_pre(1), plus_one):
        handle = hf.block(any_model, 1).register_forward_pre_hook(
            lambda module, args, kwargs: seen.append(args[0] if args else kwargs["hidden_states"]),
            with_kwargs=True,
        )
        logits(any_model, ids)
        handle.remove()
    plain = block_inputs(any_model, ids, torch.ones_like(ids), [1])[1]
    assert torch.equal(seen[0], plain + 1)


def test_the_model_is_as_before_after_the_context_and_after_an_exception_inside(any_model):
    ids, hooks = random_ids(2, 6), hook_count(any_model)
    expected = logits(any_model, ids)
    with hf.edit_activation(any_model, resid_pre(1), turned):
        assert hook_count(any_model) > hooks
        assert not torch.allclose(logits(any_model, ids), expected)
    assert hook_count(any_model) == hooks
    assert torch.equal(logits(any_model, ids), expected)

    def fails(hidden: Tensor, positions: Tensor, lengths: Tensor) -> Tensor:
        raise ArithmeticError("inside the pass")

    with pytest.raises(ArithmeticError, match="inside"), hf.edit_activation(any_model, resid_pre(1), fails):
        logits(any_model, ids)
    assert hook_count(any_model) == hooks
    assert torch.equal(logits(any_model, ids), expected)


def test_a_layer_beyond_the_model_leaves_no_hook(main_model):
    hooks = hook_count(main_model)
    with pytest.raises(ValueError, match="layer 9"), hf.edit_activation(main_model, resid_pre(9), plus_one):
        pass
    with pytest.raises(ValueError, match="layer 9"):
        block_inputs(main_model, random_ids(1, 3), torch.ones(1, 3), [0, 9])
    assert hook_count(main_model) == hooks


def test_nested_edits_act_in_turn_and_come_off_one_by_one(any_model):
    ids = random_ids(1, 6)
    plain = logits(any_model, ids)

    def double(hidden: Tensor, positions: Tensor, lengths: Tensor) -> Tensor:
        return 2 * hidden

    def both(hidden: Tensor, positions: Tensor, lengths: Tensor) -> Tensor:
        return 2 * plus_one(hidden, positions, lengths)

    def alone(edit: hf.Edit) -> Tensor:
        with hf.edit_activation(any_model, resid_pre(1), edit):
            return logits(any_model, ids)

    only_outer, as_one = alone(plus_one), alone(both)
    with hf.edit_activation(any_model, resid_pre(1), plus_one):
        with hf.edit_activation(any_model, resid_pre(1), double):
            assert torch.equal(logits(any_model, ids), as_one)
        assert torch.equal(logits(any_model, ids), only_outer)
    assert torch.equal(logits(any_model, ids), plain)


def test_nested_edits_at_two_layers_see_the_same_positions(main_model):
    ids, mask = padded([5, 2], "left")
    with recorded(main_model, 0) as first, recorded(main_model, 2) as second:
        main_model.generate(ids, attention_mask=mask, max_new_tokens=3, **GENERATE)
    assert first.row == second.row == [[0, 1, 2, 3, 4, 5, 6], [-1, -1, -1, 0, 1, 2, 3]]


def test_unsteered_switches_edits_off_for_as_long_as_it_lasts(main_model):
    ids = random_ids(1, 5)
    plain = logits(main_model, ids)
    with hf.edit_activation(main_model, resid_pre(1), turned):
        steered = logits(main_model, ids)
        with hf.unsteered():
            assert torch.equal(logits(main_model, ids), plain)
        assert torch.equal(logits(main_model, ids), steered)
    assert not torch.allclose(steered, plain)


# --- reading the residual stream --------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["left", "right"])
def test_block_inputs_are_the_hidden_states_of_the_plain_model(any_model, side):
    ids, mask = padded([LENGTH, 4], side)
    layers = range(any_model.config.num_hidden_layers)
    with torch.no_grad():
        expected = any_model(
            ids, attention_mask=mask, position_ids=places(mask).clamp(min=0), output_hidden_states=True
        ).hidden_states
    found = block_inputs(any_model, ids, mask, layers)
    assert sorted(found) == list(layers)
    for layer in layers:
        torch.testing.assert_close(found[layer][mask.bool()], expected[layer][mask.bool()], **CLOSE)


def test_block_inputs_of_one_layer_are_those_of_a_pass_for_all(any_model):
    ids = random_ids(2, 5)
    together = block_inputs(any_model, ids, torch.ones_like(ids), [0, 1])
    for layer in (0, 1):
        alone = block_inputs(any_model, ids, torch.ones_like(ids), [layer])
        assert list(alone) == [layer]
        assert torch.equal(alone[layer], together[layer])


def test_block_inputs_runs_no_block_that_it_does_not_need_and_leaves_no_hook(any_model):
    ran, handles = [], []
    for i, block in enumerate(hf.blocks(any_model)):
        handles.append(block.register_forward_hook(lambda *_, i=i: ran.append(i)))
    hooks, ids = hook_count(any_model), random_ids(1, 4)
    block_inputs(any_model, ids, torch.ones_like(ids), [1, 0])
    assert hook_count(any_model) == hooks
    for handle in handles:
        handle.remove()
    assert ran == [0]


def test_block_inputs_ignores_edits_that_are_on(any_model):
    ids = random_ids(1, 5)
    plain = block_inputs(any_model, ids, torch.ones_like(ids), [0, 1])
    with hf.edit_activation(any_model, resid_pre(0), turned, shortest=50):
        inside = block_inputs(any_model, ids, torch.ones_like(ids), [0, 1])
    assert all(torch.equal(inside[layer], plain[layer]) for layer in (0, 1))


def test_block_inputs_need_no_gradients(main_model):
    ids = random_ids(1, 5)
    with torch.enable_grad():
        inputs = block_inputs(main_model, ids, torch.ones_like(ids), [1])[1]
    assert not inputs.requires_grad


# --- the four kinds of hook -------------------------------------------------------------------------------


def name_of(layer: int, kind: str) -> str:
    return f"blocks.{layer}.hook_{kind}"


def branches(block: nn.Module) -> dict[str, tuple[nn.Module, Callable[[Tensor], Tensor]]]:
    """Attention and MLP of a block, found by their classes, and what becomes of their outputs."""

    def find(ending: str) -> nn.Module:
        return next(part for part in block.modules() if type(part).__name__.endswith(ending))

    def same(value: Tensor) -> Tensor:
        return value

    return {
        "attn_out": (
            find("Attention"),
            block.post_attention_layernorm if hasattr(block, "post_feedforward_layernorm") else same,
        ),
        "mlp_out": (
            block.fc2 if hasattr(block, "fc2") else find("MLP"),
            getattr(block, "post_feedforward_layernorm", same),
        ),
    }


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("blocks.6.hook_resid_pre", (6, "resid_pre")),
        ("blocks.0.hook_resid_post", (0, "resid_post")),
        ("blocks.11.hook_attn_out", (11, "attn_out")),
        ("blocks.120.hook_mlp_out", (120, "mlp_out")),
    ],
)
def test_a_place_is_a_layer_and_a_kind(name, expected):
    assert hf.place(name) == expected


@pytest.mark.parametrize(
    "name",
    [
        "blocks.6.hook_q",
        "blocks.-1.hook_mlp_out",
        "blocks.x.hook_mlp_out",
        "blocks.6.hook_resid_pre ",
        "6",
        6,
        "",
        None,
    ],
)
def test_another_name_is_a_value_error_that_quotes_it_and_names_all_kinds(name):
    with pytest.raises(ValueError, match=rf"{name!r}.*resid_pre") as caught:
        hf.place(name)
    assert all(kind in str(caught.value) for kind in KINDS)


@pytest.mark.parametrize("side", ["left", "right"])
def test_what_enters_a_block_plus_what_its_branches_add_is_what_leaves_it_and_enters_the_next(
    any_model, side
):
    ids, mask = padded([LENGTH, 4], side)
    layers = range(any_model.config.num_hidden_layers)
    names = [name_of(layer, kind) for layer in layers for kind in KINDS]
    found = hf.activations(any_model, ids, mask, names)
    assert set(found) == set(names)
    for layer in layers:
        enters, attention, mlp, leaves = (found[name_of(layer, kind)] for kind in KINDS)
        assert attention.abs().max() > 0.01
        assert mlp.abs().max() > 0.01
        torch.testing.assert_close(enters + attention + mlp, leaves, **CLOSE)
        if layer + 1 in layers:
            assert torch.equal(leaves, found[name_of(layer + 1, "resid_pre")])


def test_what_the_branches_add_is_the_output_of_attention_and_of_the_mlp(any_model):
    ids, seen, handles = random_ids(2, LENGTH), {}, []
    for layer, block in enumerate(hf.blocks(any_model)):
        for kind, (part, _) in branches(block).items():
            handles.append(
                part.register_forward_hook(lambda _, args, out, key=(layer, kind): seen.update({key: out}))
            )
    names = [
        name_of(*key) for key in itertools.product(range(len(hf.blocks(any_model))), ("attn_out", "mlp_out"))
    ]
    found = hf.activations(any_model, ids, torch.ones_like(ids), names)
    for handle in handles:
        handle.remove()
    for (layer, kind), output in seen.items():
        output = output[0] if isinstance(output, tuple) else output
        finish = branches(hf.block(any_model, layer))[kind][1]
        assert torch.equal(found[name_of(layer, kind)], finish(output).reshape(2, LENGTH, -1))


@pytest.mark.parametrize(
    ("kind", "blocks", "mlps"),
    [
        ("resid_pre", [0], [0]),
        ("attn_out", [0], [0]),
        ("mlp_out", [0], [0, 1]),
        ("resid_post", [0, 1], [0, 1]),
    ],
)
def test_a_pass_for_activations_ends_at_the_deepest_hook(any_model, kind, blocks, mlps):
    ran, handles = {"blocks": [], "mlps": []}, []
    for i, block in enumerate(hf.blocks(any_model)):
        for name, part in (("blocks", block), ("mlps", branches(block)["mlp_out"][0])):
            handles.append(part.register_forward_hook(lambda *_, i=i, name=name: ran[name].append(i)))
    hooks, ids = hook_count(any_model), random_ids(1, 4)
    hf.activations(any_model, ids, torch.ones_like(ids), [name_of(1, kind), name_of(0, "mlp_out")])
    assert hook_count(any_model) == hooks
    for handle in handles:
        handle.remove()
    assert ran == {"blocks": blocks, "mlps": mlps}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_hook_comes_off_at_the_end_and_after_an_exception(any_model, kind):
    ids, hooks = random_ids(2, 6), hook_count(any_model)
    plain = logits(any_model, ids)
    with hf.edit_activation(any_model, name_of(1, kind), turned):
        assert not torch.allclose(logits(any_model, ids), plain)
    with pytest.raises(RuntimeError, match="inside"), hf.edit_activation(any_model, name_of(1, kind), turned):
        raise RuntimeError("inside")
    assert hook_count(any_model) == hooks
    assert torch.equal(logits(any_model, ids), plain)


def test_plain_is_the_model_itself_unless_something_wraps_it(main_model):
    class Wrapper(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.original_model = main_model

    assert hf.unwrapped(main_model) is main_model
    assert hf.unwrapped(Wrapper()) is main_model


# --- prompts that are too short ---------------------------------------------------------------------------


def test_a_text_shorter_than_the_edit_needs_is_a_value_error_with_both_numbers(any_model):
    ids, mask = padded([6, 3], "left")
    with (
        recorded(any_model, shortest=4),
        pytest.raises(ValueError, match=r"prompt of 3 tokens.*addition of 4"),
    ):
        logits(any_model, ids, mask)
    with recorded(any_model, shortest=3) as recorder:
        logits(any_model, ids, mask)
    assert len(recorder.calls) == 1


def test_later_tokens_on_a_cache_may_be_few(main_model):
    ids = random_ids(1, 6)
    with recorded(main_model, shortest=6) as recorder:
        main_model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=3, **GENERATE)
    assert recorder.row == [list(range(8))]


def test_prompt_length_lets_a_long_prompt_come_in_short_chunks(main_model):
    ids, cache = random_ids(1, 6), DynamicCache(config=main_model.config)
    with recorded(main_model, shortest=4) as recorder, torch.no_grad():
        with pytest.raises(ValueError, match=r"prompt of 2 tokens.*prompt_lengths"):
            main_model(ids[:, :2], past_key_values=cache)
        cache = DynamicCache(config=main_model.config)
        with hf.batch(prompt_lengths=6):
            for chunk in ids.split(2, dim=1):
                main_model(chunk, past_key_values=cache)
    assert recorder.row == [list(range(6))]


def test_a_first_chunk_of_nothing_but_padding_is_not_a_short_prompt(main_model):
    ids, mask = padded([LENGTH, 4], "left")
    cache = DynamicCache(config=main_model.config)
    with (
        recorded(main_model) as recorder,
        torch.no_grad(),
    ):  # an edit that needs one token, which every text has
        for start, end in ((0, 5), (5, LENGTH)):
            main_model(ids[:, start:end], attention_mask=mask[:, :end], past_key_values=cache)
    assert recorder.row == places(mask).tolist()


def test_a_prompt_length_that_is_too_short_is_an_error_as_well(main_model):
    with (
        recorded(main_model, shortest=4),
        hf.batch(prompt_lengths=3),
        pytest.raises(ValueError, match="of 3 tokens"),
    ):
        logits(main_model, random_ids(1, 8))


def test_prompt_length_ends_with_its_context_and_after_an_exception(main_model):
    with recorded(main_model, shortest=4):
        with pytest.raises(RuntimeError, match="stop"), hf.batch(prompt_lengths=9):
            raise RuntimeError("stop")
        with pytest.raises(ValueError, match="prompt of 2 tokens"):
            logits(main_model, random_ids(1, 2))
