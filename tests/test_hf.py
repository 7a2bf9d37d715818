"""Decoder blocks, LM head, KV cache, absolute positions and hooks of every known architecture."""

import copy
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from conftest import (
    CONFIGS,
    KINDS,
    OTHERS,
    WINDOW,
    hook_count,
    logits,
    new_model,
    padded,
    places,
    random_ids,
    tiny,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import DynamicCache, OPTConfig, PreTrainedModel

from steer_utils import hf, hooks, probing

LENGTH = WINDOW + 5  # longer than a sliding window
CLOSE = {"atol": 2e-5, "rtol": 2e-5}
GENERATE = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None}


class Recorder:
    """An edit that changes nothing and records the positions and lengths of each call."""

    def __init__(self) -> None:
        self.calls: list[Tensor] = []
        self.lengths: list[list[int]] = []

    def __call__(self, hidden: Tensor, positions: Tensor, lengths: Tensor) -> Tensor:
        self.calls.append(positions.expand(hidden.shape[:2]).clone())
        self.lengths.append(lengths.expand(len(hidden)).tolist())
        return hidden

    @property
    def positions(self) -> list[list[int]]:
        """The positions of all calls, one after another, for each batch row."""
        return torch.cat(self.calls, dim=1).tolist()


@contextmanager
def recorded(
    model: PreTrainedModel, layer: int = 1, kind: str = "resid_pre", **settings
) -> Iterator[Recorder]:
    recorder = Recorder()
    with hooks.edit_activation(model, name_of(layer, kind), recorder, **settings):
        yield recorder


def name_of(layer: int, kind: str = "resid_pre") -> str:
    return f"blocks.{layer}.hook_{kind}"


def all_names(model: PreTrainedModel) -> list[str]:
    """The names of all hooks of a model."""
    return [name_of(layer, kind) for layer in range(model.config.num_hidden_layers) for kind in KINDS]


@contextmanager
def block_input(model: PreTrainedModel, layer: int) -> Iterator[list[Tensor]]:
    """What enters a block in each pass, after the hooks that are on already."""
    seen = []

    def note(module: nn.Module, args: tuple, kwargs: dict) -> None:
        seen.append(args[0] if args else kwargs["hidden_states"])

    with hf.block(model, layer).register_forward_pre_hook(note, with_kwargs=True):
        yield seen


def turned(hidden: Tensor, positions: Tensor, lengths: Tensor) -> Tensor:
    return hidden.flip(-1)


def last_token_plus_one(hidden: Tensor, positions: Tensor, lengths: Tensor) -> Tensor:
    return hidden + (positions == lengths[:, None] - 1)[..., None]


# --- parts of a model -------------------------------------------------------------------------------------


def test_every_architecture_with_branch_hooks_has_a_tiny_model():
    assert all(tiny(name).config.model_type == name for name in CONFIGS)
    assert all(probing.branches(tiny(name), layer) for name in CONFIGS for layer in (0, 1))


def test_blocks_run_once_each_and_in_order(any_model):
    order, blocks = [], hf.blocks(any_model)
    assert len(blocks) == any_model.config.num_hidden_layers
    with ExitStack() as stack:
        for i, block in enumerate(blocks):
            assert hf.block(any_model, i) is block
            stack.enter_context(block.register_forward_pre_hook(lambda *_, i=i: order.append(i)))
        logits(any_model, random_ids(1, 5))
    assert order == list(range(len(blocks)))


@pytest.mark.parametrize("layer", [-1, 3])
def test_a_layer_beyond_the_model_is_a_value_error_with_both_numbers(layer):
    count = hook_count(tiny("llama"))
    with pytest.raises(ValueError, match=rf"layer {layer} .* blocks 0 to 2"):
        hf.block(tiny("llama"), layer)
    for call in (
        lambda: hooks.edit_activation(tiny("llama"), name_of(9), turned).__enter__(),
        lambda: hooks.activations(
            tiny("llama"), random_ids(1, 3), torch.ones(1, 3), [name_of(0), name_of(9)]
        ),
    ):
        with pytest.raises(ValueError, match="layer 9"):
            call()
    assert hook_count(tiny("llama")) == count


@pytest.mark.parametrize("architecture", OTHERS)
def test_an_unlisted_architecture_has_hooks_between_its_blocks_but_not_inside_them(architecture):
    model, ids = tiny(architecture), random_ids(1, 5)
    for kind in ("resid_pre", "resid_post"):
        with recorded(model, kind=kind) as recorder:
            logits(model, ids)
        assert recorder.positions == [[0, 1, 2, 3, 4]]
        plain = hooks.activations(model, ids, torch.ones_like(ids), [name_of(1)])[name_of(1)]
        layer = {"resid_pre": 1, "resid_post": 0}[kind]
        with hooks.edit_activation(model, name_of(layer, kind), turned), block_input(model, 1) as seen:
            logits(model, ids)
        assert torch.equal(seen[0], plain.flip(-1))
    if architecture == "mpt":  # the others add what attention and MLP give, as it is
        with pytest.raises(ValueError, match=rf"hook_mlp_out' is not .*'{architecture}'.*resid_pre"):
            hooks.edit_activation(model, name_of(0, "mlp_out"), turned).__enter__()


def test_a_model_whose_blocks_cannot_be_found_is_a_value_error_that_says_what_is_there():
    model = new_model(CONFIGS["llama"]())
    model.model.others, model.config.num_hidden_layers = nn.ModuleList([nn.Identity()]), 5
    with pytest.raises(ValueError, match=r"'llama' model: expected one ModuleList of 5 .* lists of \[3, 1\]"):
        hf.blocks(model)


@pytest.mark.parametrize("architecture", [*CONFIGS, *OTHERS])
def test_logits_of_the_last_hidden_states_are_those_of_the_model(architecture):
    model, (ids, mask) = tiny(architecture), padded([LENGTH, 4], "left")
    if architecture == "mpt":  # ALiBi: it takes no position ids
        ids, mask = ids[:1], mask[:1]
        expected = model(ids, attention_mask=mask).logits
    else:
        expected = logits(model, ids, mask)
    with torch.no_grad():
        hidden = hf.forward(model, ids, mask).last_hidden_state
        found = hf.logits(model, hidden)
        assert hf.logits(model, hidden[0, -1]).shape == (97,)
        scores = hf.lm_head(model)(hidden)
    torch.testing.assert_close(found[mask.bool()], expected[mask.bool()], **CLOSE)
    own = {"gemma2": 0.01, "cohere": 0.5, "granite": 0.5}  # these change what the LM head gives
    assert (found - scores).abs().max() >= own.get(architecture, 0)


@pytest.mark.parametrize("architecture", ["gemma2", "gemma3_text"])
def test_logits_are_capped_as_the_configuration_says(architecture):
    config = CONFIGS[architecture]()
    config.final_logit_softcapping = 0.5
    model, ids = new_model(config), random_ids(2, LENGTH)
    with torch.no_grad():
        hidden = hf.forward(model, ids, torch.ones_like(ids)).last_hidden_state
        assert hf.lm_head(model)(hidden).abs().max() > 1  # without the cap
        found = hf.logits(model, hidden)
    assert found.abs().max() <= 0.5
    torch.testing.assert_close(found, logits(model, ids), **CLOSE)


def test_width_is_that_of_the_residual_stream_even_where_word_embeddings_are_narrower():
    config = {"hidden_size": 32, "ffn_dim": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = new_model(OPTConfig(**config, vocab_size=97, word_embed_proj_dim=16, max_position_embeddings=64))
    ids, names = random_ids(1, 6), [name_of(0), name_of(1)]
    found = hooks.activations(model, ids, torch.ones_like(ids), names)
    assert {tensor.shape[-1] for tensor in found.values()} == {hf.width(model)} == {32}
    assert hf.last_width(model) == hf.lm_head(model).weight.shape[1] == 16


def test_unwrapped_is_the_model_itself_unless_something_wraps_it():
    class Wrapper(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.original_model = tiny("gpt2")

    assert hf.unwrapped(tiny("gpt2")) is hf.unwrapped(Wrapper()) is tiny("gpt2")


def test_an_untied_copy_shares_all_weights_and_leaves_steers_and_the_original_alone(main_model):
    ids = random_ids(1, 6)
    plain, own = logits(main_model, ids), main_model.get_output_embeddings().weight
    with hooks.edit_lm_head(main_model, lambda hidden: -hidden), recorded(main_model):
        new = hf.untied(main_model)
    assert torch.equal(logits(new, ids), plain)
    assert {id(weight) for weight in new.parameters()} == {id(weight) for weight in main_model.parameters()}
    hf.lm_head(new).weight = nn.Parameter(2 * own, requires_grad=False)
    torch.testing.assert_close(logits(new, ids), 2 * plain, **CLOSE)
    assert hf.lm_head(main_model).weight is own
    assert torch.equal(logits(main_model, ids), plain)


def test_an_untied_copy_has_no_stand_in(unlike_model):
    ids = random_ids(1, 6)
    with hooks.stand_in(unlike_model, lambda *args, **kwargs: None):
        new = hf.untied(unlike_model)
        with hooks.unsteered():
            another = hf.untied(unlike_model)
    for one in (new, another):
        assert torch.equal(logits(one, ids), logits(unlike_model, ids))


# --- passes and the KV cache ------------------------------------------------------------------------------


def test_forward_on_a_cache_continues_the_positions_of_a_padded_batch(any_model):
    for side, size in (("left", 4), ("right", 1), ("left", LENGTH - 1)):
        ids, mask = padded([LENGTH, 5, 9], side)
        cache, parts, seen = hf.new_cache(any_model), [], 0
        with torch.no_grad():
            for chunk in ids.split(size, dim=1):
                seen += chunk.shape[1]
                output = hf.forward(any_model, chunk, mask[:, :seen], past_key_values=cache, use_cache=True)
                parts.append(output.last_hidden_state)
            for row, found in enumerate(torch.cat(parts, dim=1)):
                alone = ids[row : row + 1, mask[row].bool()]
                expected = hf.forward(any_model, alone, torch.ones_like(alone)).last_hidden_state[0]
                torch.testing.assert_close(found[mask[row].bool()], expected, **CLOSE)


def filled(model: PreTrainedModel, ids: Tensor, mask: Tensor | None = None) -> DynamicCache:
    """The KV cache after a pass."""
    with torch.no_grad():
        mask = torch.ones_like(ids) if mask is None else mask
        return hf.forward(model, ids, mask, use_cache=True).past_key_values


def next_logits(model: PreTrainedModel, cache: DynamicCache, token: Tensor, mask: Tensor) -> Tensor:
    """Logits [B, V] after one more token [B, 1], which lengthens the cache; mask [B, P + 1]."""
    position = (places(mask)[:, -1:]).clamp(min=0)
    return model(token, attention_mask=mask, position_ids=position, past_key_values=cache).logits[:, -1]


def clones(cache: DynamicCache) -> list[tuple[Tensor, Tensor]]:
    return [(keys.clone(), values.clone()) for keys, values in hf.cached(cache)]


def assert_same_tensors(found: list, expected: list) -> None:
    for pair, other in zip(found, expected, strict=True):
        assert all(map(torch.equal, pair, other))


def test_cached_are_the_keys_and_values_of_each_layer_themselves(any_model):
    config, cache = any_model.config, filled(any_model, random_ids(2, LENGTH))
    pairs = hf.cached(cache)
    assert len(pairs) == config.num_hidden_layers
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    for (keys, values), layer in zip(pairs, cache.layers, strict=True):
        assert keys is layer.keys
        assert values is layer.values
        assert keys.shape == values.shape
        assert keys.shape[2] in (LENGTH, WINDOW - 1)  # a sliding layer keeps only what it will attend to
        assert (keys.shape[0], keys.shape[1], keys.shape[3]) == (2, heads, 8)
        assert not torch.equal(keys, values)


def test_a_cache_with_other_tensors_gives_their_logits_and_gradients_and_leaves_the_given_one(any_model):
    ids, mask = padded([LENGTH, 4], "left")
    cache = filled(any_model, ids[:, :-1], mask[:, :-1])
    before, token = clones(cache), ids[:, -1:]
    same, other = (hf.with_cached(cache, [(k + by, v + by) for k, v in before]) for by in (0.0, 0.5))
    with torch.no_grad():
        changed = next_logits(any_model, other, token, mask)
        unchanged = next_logits(any_model, same, token, mask)
        expected = next_logits(any_model, hf.forked(cache), token, mask)
    assert (changed - unchanged).abs().max() > 0.01
    assert torch.equal(unchanged, expected)
    torch.testing.assert_close(unchanged, logits(any_model, ids, mask)[:, -1], **CLOSE)
    assert (other.get_seq_length(), cache.get_seq_length()) == (LENGTH, LENGTH - 1)
    leaves = [(k.requires_grad_(), v.requires_grad_()) for k, v in clones(cache)]
    next_logits(any_model, hf.with_cached(cache, leaves), token, mask).logsumexp(-1).sum().backward()
    assert all(tensor.grad.abs().max() > 0 for pair in leaves for tensor in pair)
    assert_same_tensors(hf.cached(cache), before)


def test_the_gradient_with_respect_to_the_cache_is_that_of_finite_differences():
    model = copy.deepcopy(tiny("gpt2")).double()  # RMS norms compute in float32 whatever their input
    ids = random_ids(1, LENGTH)
    cache, mask = filled(model, ids[:, :-1]), torch.ones_like(ids)
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


def test_cached_tensors_of_another_shape_or_number_are_a_value_error():
    cache = filled(tiny("llama"), random_ids(2, 5))
    pairs = hf.cached(cache)
    wrong = {
        f"holds {len(pairs)} layers.*given {len(pairs) - 1} layers": pairs[:-1],
        r"\(2, \d, 4, 8\)": [(k[:, :, 1:], v[:, :, 1:]) for k, v in pairs],
        r"\(1, \d, 5, 8\)": [(k[:1], v[:1]) for k, v in pairs],  # would broadcast
        "given 0 layers": [],
        "holds": [*pairs[:-1], (pairs[-1][0][..., :-1], pairs[-1][1])],
    }
    for message, tensors in wrong.items():
        with pytest.raises(ValueError, match=message):
            hf.with_cached(cache, tensors)


def test_a_repeated_cache_continues_like_a_prompt_that_was_repeated_before_the_prefill(any_model):
    ids, mask = padded([LENGTH, 4], "left")
    cache, token = filled(any_model, ids, mask), random_ids(6, 2)[:, 1:]
    before, three = clones(cache), hf.repeated(cache, 2, 3)
    repeated = [(k.repeat_interleave(3, 0), v.repeat_interleave(3, 0)) for k, v in before]
    assert_same_tensors(hf.cached(three), repeated)
    longer = torch.cat([mask.repeat_interleave(3, dim=0), torch.ones_like(token)], dim=1)
    with torch.no_grad():
        found = next_logits(any_model, three, token, longer)
        whole = torch.cat([ids.repeat_interleave(3, dim=0), token], dim=1)
    torch.testing.assert_close(found, logits(any_model, whole, longer)[:, -1], **CLOSE)
    assert_same_tensors(hf.cached(cache), before)


# --- absolute positions -----------------------------------------------------------------------------------


@settings(max_examples=100, deadline=None)
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


def test_token_positions_without_a_mask_of_two_dimensions_are_the_position_ids_or_count_every_token():
    told, expanded = torch.tensor([[4, 5], [2, 3]]), torch.ones(2, 1, 2, 6)
    for mask in (None, expanded, {"full_attention": expanded}):
        assert torch.equal(hf.token_positions(2, attention_mask=mask, position_ids=told), told)
    assert hf.token_positions(4, past=3).tolist() == [[3, 4, 5, 6]]
    mask, told = torch.tensor([[0, 1, 1]]), torch.tensor([[0, 0, 1]])  # the mask wins
    assert hf.token_positions(3, attention_mask=mask, position_ids=told).tolist() == [[-1, 0, 1]]


def test_positions_and_lengths_in_decoding_are_the_same_at_every_hook_with_and_without_cache(any_model):
    ids, mask = padded([LENGTH, 3], "left")
    for use_cache in (True, False):
        with ExitStack() as stack:
            recorders = [stack.enter_context(recorded(any_model, 1, kind)) for kind in KINDS]
            any_model.generate(ids, attention_mask=mask, max_new_tokens=3, use_cache=use_cache, **GENERATE)
        for recorder in recorders:
            assert recorder.lengths == [[LENGTH, 3]] * 3
            assert [call.shape[1] for call in recorder.calls][1:] == ([1, 1] if use_cache else [14, 15])
            calls = [torch.cat(recorder.calls, dim=1)] if use_cache else recorder.calls
            for call in calls:
                count = call.shape[1]
                assert call.tolist() == [list(range(count)), [-1] * 10 + list(range(count - 10))]


def test_positions_of_direct_calls_with_ids_or_embeddings(any_model):
    ids, mask = padded([4, 2], "left")
    embeddings = any_model.get_input_embeddings()(ids)
    with recorded(any_model) as recorder, torch.no_grad():
        any_model(ids)
        any_model(inputs_embeds=embeddings, attention_mask=mask)
        any_model.generate(inputs_embeds=embeddings, attention_mask=mask, max_new_tokens=2, **GENERATE)
    once = [[0, 1, 2, 3], [-1, -1, 0, 1]]
    assert recorder.positions == [once[0] * 3 + [4], once[0] + once[1] * 2 + [2]]


def test_positions_and_lengths_of_right_padding_and_of_arguments_without_names(main_model):
    ids, mask = padded([4, 2, 7], "right")
    with recorded(main_model) as recorder:
        logits(main_model, ids, mask)
    assert recorder.positions == places(mask).tolist()
    assert recorder.lengths == [[4, 2, 7]]
    arguments = (ids, None, mask) if main_model.config.model_type == "gpt2" else (ids, mask)
    with recorded(main_model) as recorder, torch.no_grad():
        main_model.base_model(*arguments)
    assert recorder.positions == places(mask).tolist()


def test_positions_and_lengths_of_beams(unlike_model):
    ids, mask = padded([4, 2], "left")
    for use_cache in (True, False):
        with recorded(unlike_model) as recorder:
            settings = {"max_new_tokens": 3, "num_beams": 3, "use_cache": use_cache, **GENERATE}
            unlike_model.generate(ids, attention_mask=mask, **settings)
        assert recorder.lengths == [[4] * 3 + [2] * 3] * 3
        assert [row[-3:] for row in recorder.positions] == [[3, 4, 5]] * 3 + [[1, 2, 3]] * 3


def test_positions_of_a_chunked_prefill_and_of_chunks_without_a_mask(main_model):
    ids, mask = padded([LENGTH, 6], "left")
    settings = {"past_key_values": hf.new_cache(main_model), "prefill_chunk_size": 5, "max_new_tokens": 2}
    with recorded(main_model) as recorder, hooks.batch(prompt_lengths=6):
        main_model.generate(ids, attention_mask=mask, **settings, **GENERATE)
    assert recorder.positions == [[*row, row[-1] + 1] for row in places(mask).tolist()]
    cache = hf.new_cache(main_model)
    with recorded(main_model) as recorder, torch.no_grad():
        for chunk in ids[:1].split(5, dim=1):
            main_model(chunk, past_key_values=cache)
    assert recorder.positions == [list(range(LENGTH))]


def test_positions_with_a_static_cache(unlike_model):
    ids, mask = padded([4, 2], "left")
    settings = {"max_new_tokens": 3, "cache_implementation": "static", "disable_compile": True, **GENERATE}
    with recorded(unlike_model) as recorder:
        unlike_model.generate(ids, attention_mask=mask, **settings)
    first, second = recorder.positions
    assert first == [0, 1, 2, 3, 4, 5]
    assert second[2:] == [0, 1, 2, 3]  # padding does not show there, and nothing attends to it


def test_lengths_of_the_next_prompt_are_its_own(unlike_model):
    with recorded(unlike_model) as recorder:
        for length in (5, 9, 4):
            ids = random_ids(1, length)
            mask = torch.ones_like(ids)
            logits(unlike_model, ids)
            unlike_model.generate(ids, attention_mask=mask, use_cache=False, max_new_tokens=2, **GENERATE)
    assert recorder.lengths == [[length] for length in (5, 5, 5, 9, 9, 9, 4, 4, 4)]


@pytest.mark.parametrize("told", [9, torch.tensor(9), torch.tensor([9, 6])], ids=["int", "scalar", "rows"])
def test_told_lengths_hold_in_every_chunk_and_for_repeated_batch_rows(told):
    ids, cache = random_ids(4, 9), hf.new_cache(tiny("llama"))
    with recorded(tiny("llama")) as recorder, torch.no_grad(), hooks.batch(prompt_lengths=told):
        for chunk in ids.split(4, dim=1):
            tiny("llama")(chunk, past_key_values=cache)
    expected = [9, 9, 6, 6] if isinstance(told, Tensor) and told.ndim else [9] * 4
    assert recorder.lengths == [expected] * 3


# --- what is known of a batch -----------------------------------------------------------------------------


def test_what_is_known_of_a_batch_ends_with_its_context_and_inner_ones_add_to_outer_ones():
    with hooks.batch(prompt_lengths=7), hooks.batch(texts=[2, 0], of=3):
        assert hooks.known_batch() == hooks.Batch(7, [2, 0], 3)
        with pytest.raises(RuntimeError, match="stop"), hooks.batch(prompt_lengths=9):
            raise RuntimeError("stop")
        assert hooks.known_batch().prompt_lengths == 7
    assert hooks.known_batch() == hooks.Batch()


def test_values_of_texts_go_to_the_batch_rows_of_each():
    values = torch.tensor([[1.0], [2.0], [3.0]])
    assert hooks.for_batch_rows(values, 6).flatten().tolist() == [1, 1, 2, 2, 3, 3]
    with hooks.batch(texts=[2, 0], of=3):
        assert hooks.for_batch_rows(values, 4).flatten().tolist() == [3, 3, 1, 1]
        with pytest.raises(ValueError, match="2 texts do not fit 3 texts"):
            hooks.for_batch_rows(values[:2], 4)
    with pytest.raises(ValueError, match="3 texts do not fit a batch of 4 rows"):
        hooks.for_batch_rows(values, 4)


# --- prompts that are too short ---------------------------------------------------------------------------


def test_a_prompt_shorter_than_the_edit_needs_is_a_value_error_with_both_numbers(unlike_model):
    ids, mask = padded([6, 3], "left")
    with recorded(unlike_model, shortest=4), pytest.raises(ValueError, match=r"of 3 tokens.*addition of 4"):
        logits(unlike_model, ids, mask)
    with recorded(unlike_model, shortest=3) as recorder:  # later tokens on a cache may be few
        unlike_model.generate(ids, attention_mask=mask, max_new_tokens=3, **GENERATE)
    assert recorder.positions[0] == list(range(8))


def test_a_long_prompt_in_short_chunks_needs_to_be_told(unlike_model):
    ids, cache = random_ids(1, 6), hf.new_cache(unlike_model)
    with recorded(unlike_model, shortest=4) as recorder, torch.no_grad():
        with pytest.raises(ValueError, match=r"prompt of 2 tokens.*prompt_lengths"):
            unlike_model(ids[:, :2], past_key_values=hf.new_cache(unlike_model))
        with hooks.batch(prompt_lengths=6):
            for chunk in ids.split(2, dim=1):
                unlike_model(chunk, past_key_values=cache)
        with hooks.batch(prompt_lengths=3), pytest.raises(ValueError, match="of 3 tokens"):
            logits(unlike_model, ids)
    assert recorder.positions == [list(range(6))]


def test_a_first_chunk_of_padding_alone_is_not_a_short_prompt(unlike_model):
    ids, mask = padded([LENGTH, 4], "left")
    cache = hf.new_cache(unlike_model)
    with recorded(unlike_model) as recorder, torch.no_grad():
        for start, end in ((0, 5), (5, LENGTH)):
            unlike_model(ids[:, start:end], attention_mask=mask[:, :end], past_key_values=cache)
    assert recorder.positions == places(mask).tolist()


# --- editing activations ----------------------------------------------------------------------------------


def test_an_edit_that_changes_nothing_leaves_the_logits_bit_for_bit_at_every_hook(any_model):
    ids, mask = padded([LENGTH, 3], "left")
    expected = logits(any_model, ids, mask)
    for name in all_names(any_model):
        with hooks.edit_activation(any_model, name, Recorder()):
            assert torch.equal(logits(any_model, ids, mask), expected)


def test_an_edit_at_every_kind_of_hook_reaches_the_next_block_and_no_other_token(any_model):
    last = any_model.config.num_hidden_layers - 1
    ids = random_ids(2, 6)
    plain = hooks.activations(any_model, ids, torch.ones_like(ids), [name_of(last)])[name_of(last)]
    for name in (name_of(last), *(name_of(last - 1, kind) for kind in KINDS[1:])):
        with (
            hooks.edit_activation(any_model, name, last_token_plus_one),
            block_input(any_model, last) as seen,
        ):
            logits(any_model, ids)
        assert torch.equal(seen[0][:, :-1], plain[:, :-1])
        if "resid" in name:
            torch.testing.assert_close(seen[0][:, -1], plain[:, -1] + 1, **CLOSE)
        assert (seen[0][:, -1] - plain[:, -1]).abs().amin() > 1e-3


def test_the_model_is_as_before_after_the_context_and_after_an_exception_inside(main_model):
    ids, count = random_ids(2, 6), hook_count(main_model)
    expected = logits(main_model, ids)

    def fails(hidden: Tensor, positions: Tensor, lengths: Tensor) -> Tensor:
        raise ArithmeticError("inside the pass")

    for kind in KINDS:
        with hooks.edit_activation(main_model, name_of(1, kind), turned):
            assert hook_count(main_model) > count
            assert not torch.allclose(logits(main_model, ids), expected)
        with (
            pytest.raises(ArithmeticError, match="inside"),
            hooks.edit_activation(main_model, name_of(1, kind), fails),
        ):
            logits(main_model, ids)
        assert hook_count(main_model) == count
        assert torch.equal(logits(main_model, ids), expected)


def test_nested_edits_act_in_turn_see_the_same_positions_and_come_off_one_by_one(unlike_model):
    ids, mask = padded([5, 2], "left")

    def doubled(hidden: Tensor, positions: Tensor, lengths: Tensor) -> Tensor:
        return 2 * hidden

    def steered(*edits: hooks.Edit) -> Tensor:
        with ExitStack() as stack:
            for edit in edits:
                stack.enter_context(hooks.edit_activation(unlike_model, name_of(1), edit))
            return logits(unlike_model, ids, mask)

    plain, outer = logits(unlike_model, ids, mask), steered(last_token_plus_one)
    both = steered(lambda *given: doubled(last_token_plus_one(*given), *given[1:]))
    assert torch.equal(steered(last_token_plus_one, doubled), both)
    assert not torch.allclose(both, steered(doubled, last_token_plus_one))
    assert torch.equal(steered(last_token_plus_one), outer)
    assert torch.equal(logits(unlike_model, ids, mask), plain)
    with recorded(unlike_model, 0) as first, recorded(unlike_model, 2) as second:
        unlike_model.generate(ids, attention_mask=mask, max_new_tokens=3, **GENERATE)
    assert first.positions == second.positions == [[0, 1, 2, 3, 4, 5, 6], [-1, -1, -1, 0, 1, 2, 3]]


def test_unsteered_switches_edits_off_while_inside(unlike_model):
    ids = random_ids(1, 5)
    plain, mask = logits(unlike_model, ids), torch.ones_like(ids)
    entering = hooks.activations(unlike_model, ids, mask, [name_of(1)])[name_of(1)]
    with (
        hooks.edit_activation(unlike_model, name_of(0), turned, shortest=5),
        hooks.edit_lm_head(unlike_model, lambda hidden: -hidden),
        hooks.edit_lm_head(unlike_model, lambda scores: scores + 1, output=True),
    ):
        steered = logits(unlike_model, ids)
        with hooks.unsteered():
            assert torch.equal(logits(unlike_model, ids), plain)
        found = hooks.activations(unlike_model, ids[:, :3], mask[:, :3], [name_of(1)])[name_of(1)]
        torch.testing.assert_close(found, entering[:, :3], **CLOSE)  # of the unsteered model
        assert torch.equal(logits(unlike_model, ids), steered)
    assert not torch.allclose(steered, plain)


def test_the_lm_head_is_given_edited_hidden_states_or_its_output_is_edited(unlike_model):
    ids, count = random_ids(2, 6), hook_count(unlike_model)
    plain = logits(unlike_model, ids)
    with hooks.edit_lm_head(unlike_model, lambda hidden: 2 * hidden):
        torch.testing.assert_close(logits(unlike_model, ids), 2 * plain, **CLOSE)
    with hooks.edit_lm_head(unlike_model, lambda scores: scores + 3, output=True):
        torch.testing.assert_close(logits(unlike_model, ids), plain + 3, **CLOSE)
    with pytest.raises(RuntimeError, match="inside"), hooks.edit_lm_head(unlike_model, torch.neg):
        raise RuntimeError("inside")
    assert hook_count(unlike_model) == count
    assert torch.equal(logits(unlike_model, ids), plain)


# --- reading activations ----------------------------------------------------------------------------------


def branches(block: nn.Module) -> dict[str, tuple[nn.Module, Callable[[Tensor], Tensor]]]:
    """Attention and MLP of a block, found by their classes, and what is done to their outputs."""

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


def test_a_place_is_a_layer_and_a_kind():
    assert hooks.place("blocks.6.hook_resid_pre") == (6, "resid_pre")
    assert hooks.place("blocks.120.hook_mlp_out") == (120, "mlp_out")


@pytest.mark.parametrize("name", ["blocks.6.hook_q", "blocks.-1.hook_mlp_out", "blocks.6.hook_mlp_out "])
def test_another_name_is_a_value_error_that_quotes_it_and_names_all_kinds(name):
    with pytest.raises(ValueError, match=rf"{name!r}.*resid_pre") as caught:
        hooks.place(name)
    assert all(kind in str(caught.value) for kind in KINDS)


def test_activations_are_the_hidden_states_of_the_model_and_add_up_along_the_residual_stream(any_model):
    for side in ("left", "right"):
        ids, mask = padded([LENGTH, 4], side)
        positions, text = places(mask).clamp(min=0), mask.bool()
        with torch.no_grad():
            output = any_model(ids, attention_mask=mask, position_ids=positions, output_hidden_states=True)
        found = hooks.activations(any_model, ids, mask, all_names(any_model))
        assert set(found) == set(all_names(any_model))
        for layer in range(any_model.config.num_hidden_layers):
            enters, attention, mlp, leaves = (found[name_of(layer, kind)] for kind in KINDS)
            torch.testing.assert_close(enters[text], output.hidden_states[layer][text], **CLOSE)
            assert min(attention.abs().max(), mlp.abs().max()) > 0.01
            torch.testing.assert_close(enters + attention + mlp, leaves, **CLOSE)
            if name_of(layer + 1) in found:
                assert torch.equal(leaves, found[name_of(layer + 1)])


def test_what_the_branches_add_is_the_output_of_attention_and_of_the_mlp(any_model):
    ids, seen = random_ids(2, LENGTH), {}
    with ExitStack() as stack:
        for layer, block in enumerate(hf.blocks(any_model)):
            for kind, (part, _) in branches(block).items():
                note = lambda _, args, out, key=(layer, kind): seen.update({key: out})  # noqa: E731
                stack.enter_context(part.register_forward_hook(note))
        names = [name for name in all_names(any_model) if name.endswith("out")]
        found = hooks.activations(any_model, ids, torch.ones_like(ids), names)
    assert len(seen) == len(names)
    for (layer, kind), output in seen.items():
        output = output[0] if isinstance(output, tuple) else output
        finish = branches(hf.block(any_model, layer))[kind][1]
        assert torch.equal(found[name_of(layer, kind)], finish(output).reshape(2, LENGTH, -1))


def test_a_pass_for_activations_ends_at_the_deepest_hook_and_leaves_none(main_model):
    ran = {"blocks": [], "mlps": []}
    ends = {"resid_pre": (1, 1), "attn_out": (1, 1), "mlp_out": (1, 2), "resid_post": (2, 2)}
    ids = random_ids(1, 4)
    with ExitStack() as stack:
        for block in hf.blocks(main_model):
            for name, part in (("blocks", block), ("mlps", branches(block)["mlp_out"][0])):
                stack.enter_context(part.register_forward_hook(lambda *_, name=name: ran[name].append(1)))
        count = hook_count(main_model)
        for kind, expected in ends.items():
            ran["blocks"].clear()
            ran["mlps"].clear()
            hooks.activations(
                main_model, ids, torch.ones_like(ids), [name_of(1, kind), name_of(0, "mlp_out")]
            )
            assert (len(ran["blocks"]), len(ran["mlps"])) == expected
            assert hook_count(main_model) == count


# --- standing in for the forward pass ---------------------------------------------------------------------


def test_another_forward_pass_stands_in_while_inside_and_generate_uses_it(unlike_model):
    ids, names, calls = random_ids(1, 4), dict(vars(unlike_model)), []
    own = unlike_model.forward

    def forward(*args, **kwargs):
        calls.append(kwargs["input_ids"].shape[1])
        return own(*args, **kwargs)

    settings = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 3, **GENERATE}
    expected = unlike_model.generate(ids, **settings)
    with hooks.stand_in(unlike_model, forward):
        assert torch.equal(unlike_model.generate(ids, **settings), expected)
    assert calls == [4, 1, 1]
    assert vars(unlike_model) == names
    with pytest.raises(RuntimeError, match="inside"), hooks.stand_in(unlike_model, forward):
        raise RuntimeError("inside")
    assert vars(unlike_model) == names


def test_where_steers_are_off_a_call_goes_to_the_models_own_forward_pass(unlike_model):
    ids, own = random_ids(1, 4), unlike_model.forward
    expected = own(ids).logits
    with hooks.stand_in(unlike_model, lambda *args, **kwargs: None), hooks.unsteered():
        assert torch.equal(unlike_model(ids).logits, expected)


def test_a_forward_pass_that_accelerate_has_set_is_in_force_again_afterwards():
    model, ran, ids = new_model(CONFIGS["llama"]()), [], random_ids(1, 4)

    class Note(ModelHook):
        def pre_forward(self, module: nn.Module, *args, **kwargs) -> tuple:
            ran.append(module)
            return args, kwargs

    add_hook_to_module(model, Note())  # as accelerate does where it spreads a model over devices
    with hooks.stand_in(model, lambda **kwargs: None):
        assert model(input_ids=ids) is None
    assert not ran
    logits(model, ids)
    assert ran == [model]


def test_what_is_found_out_once_does_not_see_the_hooks_of_a_reader():
    model = new_model(CONFIGS["llama"]())
    block = hf.blocks(model)[0]

    def first_column(module, args):
        hidden = args[0].clone()
        hidden[:, 0] += 100
        return (hidden, *args[1:])

    handle = block.register_forward_pre_hook(first_column)
    scaled = block.self_attn.register_forward_hook(lambda module, args, output: (9 * output[0], *output[1:]))
    before = logits(model, random_ids(1, 5))
    assert not probing.padding_changes(model)
    assert probing.branches(model, 0) == (block.self_attn, block.mlp)
    assert torch.equal(logits(model, random_ids(1, 5)), before)
    handle.remove()
    scaled.remove()
    assert hook_count(model) == hook_count(new_model(CONFIGS["llama"]()))
