"""The forward pass of PPLM: against an independent loop, through generation, caches, batches and chunks."""

import math
from collections.abc import Callable

import pytest
import torch
from conftest import (
    CONFIGS,
    MAIN,
    WINDOW,
    assert_same_up_to_rounding,
    head_steer,
    hook_count,
    hooked_by_hand,
    logits,
    new_model,
    padded,
    places,
    random_ids,
    tiny,
)
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

import steer_utils as su
from steer_utils import PPLM, Bag, hooks
from steer_utils.pplm.classifier import ClassifierHead

LENGTH = WINDOW + 5
IDS = (5, 17, 40)
BAG = Bag("test", entries=tuple((i,) for i in IDS))
HEAD = {"head": ClassifierHead(32, 3, seed=1), "target_class_id": 1}
KINDS = {
    "past": {"bags": BAG},
    "past head": HEAD,
    "past both": {"bags": BAG, **HEAD},
    "hidden": {"bags": BAG, "perturb": "hidden"},
    "hidden head": {**HEAD, "perturb": "hidden"},
    "probs": {"bags": BAG, "perturb": "probs"},
}
each_kind = pytest.mark.parametrize("kind", KINDS)
kinds = pytest.mark.parametrize(  # every kind, those of the past on several architectures
    ("main_model", "kind"),
    [
        *zip(MAIN, ["past", "past head", "past both", "hidden"], strict=True),
        *zip(MAIN, ["hidden head", "probs", "past", "past head"], strict=True),
    ],
    indirect=["main_model"],
)
CLOSE = {"atol": 2e-4, "rtol": 2e-4}
PROMPTS = ["I hate you because", "abc", "Good day"]


def steer(kind: str = "past", **settings) -> PPLM:
    return PPLM(**{"stepsize": 0.05, "gamma": 1.0, "top_k": 0} | KINDS[kind] | settings)


def written(
    model: PreTrainedModel, steer: PPLM | None, ids: Tensor, mask: Tensor | None = None, **kwargs
) -> tuple[Tensor, Tensor]:
    """The new tokens [B, N] and the logits [B, N, V] of them, by `model.generate`, greedily by default."""
    kwargs = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "eos_token_id": None} | kwargs
    kwargs |= {"attention_mask": torch.ones_like(ids) if mask is None else mask}
    kwargs |= {"return_dict_in_generate": True, "output_logits": True}
    if steer is None:
        out = model.generate(ids, **kwargs)
    else:
        with steer.on(model):
            out = model.generate(ids, **kwargs)
    return out.sequences[:, ids.shape[1] :], torch.stack(out.logits, dim=1)


def assert_same(found: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> None:
    assert torch.equal(found[0], expected[0])
    torch.testing.assert_close(found[1], expected[1], **CLOSE)


def differ(found: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> bool:
    return not torch.allclose(found[1], expected[1], atol=1e-2)


def read_on(model: PreTrainedModel, past: list, token: int) -> tuple[Tensor, list]:
    """Log probabilities [V] after one more token on given keys and values, and these, longer by one."""
    cache = DynamicCache()
    for layer, (keys, values) in enumerate(past):
        cache.update(keys, values, layer)
    found = model(torch.tensor([[token]]), past_key_values=cache).logits[0, -1]
    return found.log_softmax(-1), [(layer.keys, layer.values) for layer in cache.layers]


def pplm_by_hand(
    model: PreTrainedModel,
    ids: list[int],
    *,
    count: int = 5,
    stepsize: float = 0.05,
    num_iterations: int = 3,
    gamma: float = 1.0,
    kl_scale: float = 0.01,
    gm_scale: float = 0.9,
    persist: bool = True,
    window_length: int = 0,
) -> tuple[Tensor, Tensor]:
    """A bag's PPLM on one text, as the paper has it, without a cache of its own: tokens, fused log probs."""
    tokens, kept, largest, rows = list(ids), None, [0.0] * model.config.n_layer, []
    for _ in range(count):
        with torch.no_grad():
            plain = model(torch.tensor([tokens])).logits[0, -1].log_softmax(-1)
            fresh = model(torch.tensor([tokens[:-1]])).past_key_values
        past = kept if kept is not None else [(layer.keys, layer.values) for layer in fresh.layers]
        for _ in range(num_iterations):
            past = [tuple(t.detach().requires_grad_() for t in pair) for pair in past]
            steered, _ = read_on(model, past, tokens[-1])
            bag = -torch.log(sum(steered[i].exp() for i in IDS))
            loss = bag + kl_scale * sum(steered.exp() * (steered - plain))
            gradients = torch.autograd.grad(loss, [t for pair in past for t in pair])
            moved = []
            for layer, (keys, values) in enumerate(past):
                by = [g.clone() for g in gradients[2 * layer : 2 * layer + 2]]
                if window_length:
                    for g in by:
                        g[:, :, :-window_length] = 0
                norm = math.sqrt(sum(float((g**2).sum()) for g in by))
                largest[layer] = max(largest[layer], norm)
                step = stepsize / largest[layer] ** gamma
                moved.append((keys - step * by[0], values - step * by[1]))
            past = moved
        with torch.no_grad():
            steered, grown = read_on(model, [tuple(t.detach() for t in pair) for pair in past], tokens[-1])
        kept = grown if persist else None
        rows.append((gm_scale * steered + (1 - gm_scale) * plain).log_softmax(-1))
        tokens.append(int(rows[-1].argmax()))
    return torch.tensor([tokens[len(ids) :]]), torch.stack(rows)[None]


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"persist": False},
        {"window_length": 3},
        {"gamma": 1.5, "num_iterations": 2, "kl_scale": 0.5},
        {"gm_scale": 1.0, "gamma": 0.0, "stepsize": 1.0, "kl_scale": 0.0},
    ],
)
def test_steered_by_a_bag_the_model_writes_what_an_independent_loop_writes(settings):
    model, ids = tiny("gpt2"), random_ids(1, 9)
    found = written(model, steer(**settings), ids, max_new_tokens=5)
    assert differ(found, written(model, None, ids, max_new_tokens=5))
    assert_same(found, pplm_by_hand(model, ids[0].tolist(), **settings))


def test_what_was_moved_stays_moved_unless_it_may_not_persist(main_model):
    ids = random_ids(1, LENGTH)
    kept, fresh = (written(main_model, steer(persist=p), ids)[1] for p in (True, False))
    torch.testing.assert_close(kept[:, 0], fresh[:, 0])
    assert not torch.allclose(kept[:, 1:], fresh[:, 1:], atol=1e-3)


@kinds
def test_without_steps_or_without_their_share_the_logits_are_the_unsteered_ones_normalised(kind, main_model):
    zero = {"num_iterations": 0} if kind in ("past", "hidden", "probs") else {"gm_scale": 0.0}
    ids, mask = padded([LENGTH, 5], "left")
    tokens, plain = written(main_model, None, ids, mask)
    assert_same(written(main_model, steer(kind, **zero), ids, mask), (tokens, plain.log_softmax(-1)))


@pytest.mark.parametrize(
    ("kind", "zero"),
    [("past", {"stepsize": 0.0}), ("hidden head", {"gm_scale": 0.0}), ("probs", {"stepsize": 0.0})],
)
def test_without_steps_or_their_share_a_penalty_and_cuts_give_the_unsteered_text(kind, zero, tokenizer):
    model, settings = tiny("gpt2"), {"freq_penalty": 1.0, "top_k": 10, "seed": 3, "max_new_tokens": 12}
    found = su.generate(model, tokenizer, PROMPTS, steer=steer(kind, **zero), **settings)
    plain = su.generate(model, tokenizer, PROMPTS, **settings)
    assert found["completion"].tolist() == plain["completion"].tolist()


@pytest.mark.parametrize(
    ("main_model", "kind"),
    list(zip(MAIN, ["past", "hidden", "probs", "past"], strict=True)),
    indirect=["main_model"],
)
def test_steered_by_a_bag_its_words_become_likelier(main_model, kind):
    ids = random_ids(4, LENGTH)
    plain, steered = (written(main_model, one, ids, max_new_tokens=1)[1][:, 0] for one in (None, steer(kind)))
    of_bag = [scores.softmax(-1)[:, IDS].sum(dim=-1) for scores in (plain, steered)]
    assert (of_bag[1] > of_bag[0]).all()


@pytest.mark.parametrize(
    ("main_model", "kind"),
    list(zip(MAIN, ["past head", "hidden head", "past head", "hidden head"], strict=True)),
    indirect=["main_model"],
)
def test_steered_by_a_head_the_newest_state_makes_its_class_likelier(main_model, kind):
    """That state is found again from the logits, which are affine in it."""
    ids, pplm = random_ids(4, LENGTH), steer(kind, horizon_length=0, kl_scale=0.0, gm_scale=1.0)
    with torch.no_grad():
        states = main_model.base_model(ids).last_hidden_state.double()
    steered = written(main_model, pplm, ids, max_new_tokens=1)[1][:, 0].double()
    columns = torch.nn.functional.pad(main_model.get_output_embeddings().weight.double(), (0, 1), value=1)
    newest = torch.linalg.lstsq(columns, steered.T).solution[:-1].T
    moved = torch.cat([states[:, :-1], newest[:, None]], dim=1)
    before, after = (HEAD["head"](some.mean(dim=1)).softmax(-1)[:, 1] for some in (states, moved))
    assert (after > before + 1e-5).all()


@pytest.mark.parametrize(
    ("main_model", "kind"),
    list(zip(MAIN, ["past", "hidden", "probs", "past head"], strict=True)),
    indirect=["main_model"],
)
def test_grad_length_is_how_many_tokens_are_steered(main_model, kind):
    ids = random_ids(1, LENGTH)
    limited = written(main_model, steer(kind, grad_length=2, persist=False), ids, max_new_tokens=5)
    whole = written(main_model, steer(kind, persist=False), ids, max_new_tokens=5)
    torch.testing.assert_close(limited[1][:, :2], whole[1][:, :2])
    text = torch.cat([ids, limited[0]], dim=1)
    plain = logits(main_model, text)[:, LENGTH - 1 : -1].log_softmax(-1)
    torch.testing.assert_close(limited[1][:, 2:], plain[:, 2:], **CLOSE)
    assert not torch.allclose(limited[1][:, :2], plain[:, :2], atol=1e-3)


def test_after_grad_length_a_moved_past_stays_moved(main_model):
    ids = random_ids(1, LENGTH)
    tokens, found = written(main_model, steer(grad_length=2), ids, max_new_tokens=5)
    plain = logits(main_model, torch.cat([ids, tokens], dim=1))[:, LENGTH - 1 : -1].log_softmax(-1)
    assert not torch.allclose(found[:, 2:], plain[:, 2:], atol=1e-3)
    none, expected = written(main_model, steer(grad_length=0), ids), written(main_model, None, ids)
    assert_same(none, (expected[0], expected[1].log_softmax(-1)))


@pytest.mark.parametrize(
    ("main_model", "kind"),
    list(zip(MAIN, ["past", "hidden", "probs", "past"], strict=True)),
    indirect=["main_model"],
)
def test_top_k_and_top_p_cut_after_the_fusion(main_model, kind):
    ids, once = random_ids(2, LENGTH), {"max_new_tokens": 1}
    whole = written(main_model, steer(kind), ids, **once)[1][:, 0]
    ranks = whole.argsort(dim=-1, descending=True).argsort(dim=-1)
    best = written(main_model, steer(kind, top_k=7), ids, **once)[1][:, 0]
    torch.testing.assert_close(best, whole.masked_fill(ranks >= 7, -math.inf))
    nucleus = written(main_model, steer(kind, top_p=0.6), ids, **once)[1][:, 0]
    for row, cut in zip(whole.softmax(-1).tolist(), nucleus, strict=True):
        total, kept = 0.0, []
        for token in sorted(range(97), key=row.__getitem__, reverse=True):
            if total < 0.6:
                kept.append(token)
            total += row[token]
        assert cut.isfinite().nonzero().flatten().tolist() == sorted(kept)


def penalised(scores: Tensor, ids: list[int], penalty: float) -> Tensor:
    """Logits [V] of tokens that stand in a text made smaller, as CTRL does."""
    found = scores.clone()
    for token in set(ids):
        found[token] = scores[token] / penalty if scores[token] > 0 else scores[token] * penalty
    return found


@pytest.mark.parametrize(
    ("main_model", "kind"),
    list(zip(MAIN, ["past", "hidden", "past", "hidden"], strict=True)),
    indirect=["main_model"],
)
def test_temperature_and_repetition_penalty_shape_the_steered_side_only(main_model, kind):
    """With steps too small to be felt, both sides begin as the plain logits."""
    ids = random_ids(1, LENGTH)
    plain = logits(main_model, ids)[0, -1]
    shaped = (penalised(plain, ids[0].tolist(), 1.7) / 0.6).log_softmax(-1)
    expected = (0.8 * shaped + 0.2 * plain.log_softmax(-1)).log_softmax(-1)
    settings = {
        "temperature": 0.6,
        "repetition_penalty": 1.7,
        "gm_scale": 0.8,
        "stepsize": 1e-7,
        "gamma": 1.0,
    }
    found = written(main_model, steer(kind, **settings), ids, max_new_tokens=1)[1][0, 0]
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize(
    ("main_model", "kind"),
    list(zip(MAIN, ["past", "hidden", "past", "hidden"], strict=True)),
    indirect=["main_model"],
)
def test_a_repetition_penalty_does_not_jump_where_the_step_size_reaches_zero(main_model, kind):
    ids = random_ids(1, LENGTH)
    settings = {"repetition_penalty": 1.7}
    small, none = (
        written(main_model, steer(kind, stepsize=size, **settings), ids, max_new_tokens=1)[1]
        for size in (1e-8, 0.0)
    )
    torch.testing.assert_close(small, none, atol=1e-3, rtol=1e-3)


def test_a_repetition_penalty_counts_no_padding():
    model, settings = tiny("llama"), {"repetition_penalty": 1.7}
    ids, mask = padded([LENGTH, 5], "left")
    ids[1, : LENGTH - 5] = (pad := int(logits(model, ids[1:, -5:])[0, -1].argmax()))
    assert pad not in ids[1, -5:]
    batch = written(model, steer(**settings), ids, mask, max_new_tokens=1)[1][1:]
    alone = written(model, steer(**settings), ids[1:, -5:], max_new_tokens=1)[1]
    torch.testing.assert_close(batch, alone, **CLOSE)


@pytest.mark.parametrize(
    ("main_model", "kind"),
    list(zip(MAIN, ["past", "hidden", "probs", "past"], strict=True)),
    indirect=["main_model"],
)
def test_the_second_piece_of_a_word_is_pulled_behind_its_first_only(main_model, kind):
    ids = random_ids(2, LENGTH)
    ids[:, -1] = torch.tensor([50, 51])
    strong, once = {"stepsize": 0.5}, {"max_new_tokens": 1}
    short, long = (
        written(main_model, steer(kind, **strong, bags=Bag("test", entries=(entry,))), ids, **once)[1][:, 0]
        for entry in ((50,), (50, 60))
    )
    torch.testing.assert_close(long[1], short[1], **CLOSE)
    assert long[0].softmax(-1)[60] > 1.01 * short[0].softmax(-1)[60]


@kinds
def test_a_left_padded_batch_with_a_one_token_prompt_is_written_as_its_texts_alone(main_model, kind):
    windowed = {"window_length": 3, "decay": True}
    lengths = [LENGTH, 6, 2, 1]
    ids, mask = padded(lengths, "left")
    batch = written(main_model, steer(kind, **windowed), ids, mask, max_new_tokens=3)
    for row, n in enumerate(lengths):
        alone = written(main_model, steer(kind, **windowed), ids[row : row + 1, -n:], max_new_tokens=3)
        assert_same(tuple(part[row : row + 1] for part in batch), alone)


def test_the_end_of_one_text_leaves_the_others_as_they_are(main_model):
    ids, mask = padded([LENGTH, 6], "left")
    tokens, _scores = written(main_model, steer(), ids, mask, max_new_tokens=5)
    end = int(tokens[0, 1])
    ended = written(main_model, steer(), ids, mask, max_new_tokens=5, eos_token_id=end)[0]
    assert ended[0, 2:].eq(0).all()
    stop = tokens[1].tolist().index(end) + 1 if end in tokens[1] else 5
    assert torch.equal(ended[1, :stop], tokens[1, :stop])


@kinds
def test_a_prompt_read_in_chunks_is_continued_as_a_whole_one(main_model, kind):
    ids, mask = padded([LENGTH, 6], "left")
    pplm = steer(kind, gamma=1.5)
    whole, chunks = (written(main_model, pplm, ids, mask, prefill_chunk_size=size) for size in (None, 5))
    assert_same(chunks, whole)


@pytest.mark.parametrize("size", [4, 1])
def test_chunks_of_one_token_belong_to_the_prompt_whose_lengths_are_told(unlike_model, size):
    ids, mask = padded([LENGTH, 6], "left")  # the last chunk of four has one token
    whole = written(unlike_model, steer(), ids, mask)
    with hooks.batch(prompt_lengths=mask.sum(dim=1)):
        assert_same(written(unlike_model, steer(), ids, mask, prefill_chunk_size=size), whole)


@pytest.mark.parametrize("kind", ["past", "hidden"])
def test_a_chunk_of_padding_alone_takes_a_repetition_penalty(unlike_model, kind):
    ids, mask = padded([LENGTH, 6], "left")
    pplm = steer(kind, repetition_penalty=1.7)
    whole, chunks = (written(unlike_model, pplm, ids, mask, prefill_chunk_size=n) for n in (None, 5))
    assert_same(chunks, whole)


def test_chunks_of_a_prompt_are_no_tokens_that_grad_length_counts():
    model, ids, pplm = tiny("gpt2"), random_ids(1, LENGTH), steer("hidden head", grad_length=2)
    assert_same(written(model, pplm, ids, prefill_chunk_size=5), written(model, pplm, ids))


@pytest.mark.parametrize("kind", ["past", "hidden head"])
def test_a_cache_that_was_filled_before_is_refused(kind):
    model, ids = tiny("gpt2"), random_ids(1, LENGTH)
    with torch.no_grad():
        cache = model(ids[:, :6], use_cache=True).past_key_values
    with pytest.raises(ValueError, match="filled before"):
        written(model, steer(kind), ids, past_key_values=cache)


@kinds
def test_a_text_continued_on_its_cache_is_as_one_written_at_once(main_model, kind):
    ids, cache = random_ids(1, LENGTH), DynamicCache(config=main_model.config)
    once = written(main_model, steer(kind), ids, max_new_tokens=6)
    kwargs = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    with steer(kind).on(main_model):
        text = ids
        for _ in range(2):
            mask = torch.ones_like(text)
            text = main_model.generate(text, attention_mask=mask, past_key_values=cache, **kwargs)
    assert torch.equal(text[:, LENGTH:], once[0])


@kinds
def test_inside_one_context_each_text_begins_anew(main_model, kind):
    ids, kwargs = random_ids(1, LENGTH), {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    with steer(kind).on(main_model):
        rows = [
            main_model.generate(text, attention_mask=torch.ones_like(text), eos_token_id=None, **kwargs)
            for text in (ids, random_ids(1, 7, seed=9), ids)
        ]
    assert torch.equal(rows[0], rows[2])
    assert torch.equal(rows[0][:, LENGTH:], written(main_model, steer(kind), ids)[0])


@kinds
def test_without_a_cache_and_what_earlier_tokens_leave_all_is_the_same(main_model, kind):
    ids, mask = padded([LENGTH, 6], "left")
    pplm = steer(kind, persist=False, gamma=0.0)
    uncached = written(main_model, pplm, ids, mask, use_cache=False)
    assert_same(uncached, written(main_model, pplm, ids, mask))


@pytest.mark.parametrize("settings", [{"grad_length": 2}, {"gamma": 1.5}])
@pytest.mark.parametrize("kind", ["past", "hidden", "probs"])
def test_without_a_cache_tokens_and_norms_are_counted_all_the_same(kind, settings):
    model, ids, pplm = tiny("gpt2"), random_ids(1, LENGTH), steer(kind, persist=False, **settings)
    assert_same(written(model, pplm, ids, use_cache=False), written(model, pplm, ids))


def both(
    model: PreTrainedModel, first, second, ids: Tensor, mask: Tensor | None = None, **kwargs
) -> tuple[Tensor, Tensor]:
    with first.on(model), second.on(model):
        return written(model, None, ids, mask, **kwargs)


@kinds
def test_with_a_vector_at_every_position_pplm_steers_the_model_that_adds_it_by_hand(main_model, kind):
    row, name = 3 * torch.randn(1, 32, generator=torch.Generator().manual_seed(0)), "blocks.1.hook_resid_pre"
    vector, hooks = su.SteeringVector(name, row, "front", "all"), hook_count(main_model)
    ids, mask = padded([LENGTH, 6], "left")
    with hooked_by_hand(main_model, name, lambda value: value + row):
        expected = written(main_model, steer(kind), ids, mask)
    assert differ(expected, written(main_model, steer(kind), ids, mask))
    assert_same(both(main_model, vector, steer(kind), ids, mask), expected)
    assert_same(both(main_model, steer(kind), vector, ids, mask), expected)
    assert hook_count(main_model) == hooks
    assert "forward" not in vars(main_model)


@pytest.mark.parametrize(
    ("location", "size", "use_cache"),
    [("front", 3, True), ("front", 6, True), ("mid", 3, True), ("back", 3, True), ("back", 3, False)],
)
def test_with_pplm_of_no_strength_a_vector_stands_where_it_stands_alone(location, size, use_cache):
    model, (ids, mask) = tiny("gpt2"), padded([LENGTH, 6], "left")
    rows = 3 * torch.randn(size, 32, generator=torch.Generator().manual_seed(0))
    vector = su.SteeringVector(1, rows, location)
    with vector.on(model):
        tokens, expected = written(model, None, ids, mask, use_cache=use_cache)
    found = both(model, vector, steer("hidden", stepsize=0.0), ids, mask, use_cache=use_cache)
    assert_same(found, (tokens, expected.log_softmax(-1)))


@pytest.mark.parametrize("location", ["front", "mid", "back"])
def test_in_a_table_a_vector_and_pplm_may_be_given_in_any_order(tokenizer, location):
    model, rows = tiny("gpt2"), 3 * torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
    vector, settings = su.SteeringVector(1, rows, location), {"max_new_tokens": 4, "seed": 3}
    tables = [
        su.generate(model, tokenizer, PROMPTS, steer=order, **settings)
        for order in ([vector, steer()], [steer(), vector])
    ]
    assert_same_up_to_rounding(*tables)
    none = su.generate(model, tokenizer, PROMPTS, steer=[vector, steer(stepsize=0.0)], **settings)
    alone = su.generate(model, tokenizer, PROMPTS, steer=vector, **settings)
    assert_same_up_to_rounding(none, alone)
    assert tables[0]["loss"].tolist() != alone["loss"].tolist()


@kinds
def test_beside_a_vector_and_values_of_each_text_a_batch_is_its_texts_alone(main_model, kind):
    lengths, values = [LENGTH, 6, 9], torch.tensor([[1.0, -1.0], [0.0, 2.0], [-2.0, 0.5]])
    rows = 3 * torch.randn(2, 32, generator=torch.Generator().manual_seed(0))
    vector, lm_steer = su.SteeringVector(1, rows, "back"), head_steer()
    ids, mask = padded(lengths, "left")
    with lm_steer.at(values).on(main_model):
        batch = both(main_model, vector, steer(kind), ids, mask, max_new_tokens=3)
    for row, n in enumerate(lengths):
        with lm_steer.at(values[row].tolist()).on(main_model):
            alone = both(main_model, vector, steer(kind), ids[row : row + 1, -n:], max_new_tokens=3)
        assert_same(tuple(part[row : row + 1] for part in batch), alone)
    assert differ(batch, both(main_model, vector, steer(kind), ids, mask, max_new_tokens=3))


def test_where_gradients_are_wanted_none_reach_the_weights():
    model, ids = new_model(CONFIGS["gpt2"]()).requires_grad_(True), random_ids(1, 6)
    written(model, steer("past both"), ids)
    assert all(weight.grad is None for weight in model.parameters())
    assert all(weight.requires_grad for weight in model.parameters())


@pytest.mark.parametrize(
    ("kind", "steps", "passes", "products"),
    [
        ("past", 0, 1, 1),
        ("past", 3, 5, 5),
        ("past head", 3, 8, 8),
        ("hidden", 0, 1, 1),
        ("hidden", 1, 1, 2),
        ("hidden", 3, 1, 4),
        ("hidden head", 3, 1, 4),
        ("probs", 3, 1, 1),
    ],
)
def test_a_token_takes_so_many_passes_and_products_with_the_output_head(kind, steps, passes, products):
    """Steps on the past need a pass each, and a head's a second for its soft token; those on hidden states
    a product each, the first of which is the plain one."""
    model, ids, counts = tiny("gpt2"), random_ids(2, LENGTH), []
    for tokens in (2, 3):
        seen = {"passes": 0, "products": 0}

        def count(name: str, seen: dict[str, int] = seen) -> Callable[..., None]:
            def hook(*_: object) -> None:
                seen[name] += 1

            return hook

        with (
            model.transformer.register_forward_hook(count("passes")),
            model.lm_head.register_forward_hook(count("products")),
        ):
            written(model, steer(kind, num_iterations=steps), ids, max_new_tokens=tokens)
        counts.append(seen)
    assert {name: counts[1][name] - counts[0][name] for name in counts[0]} == {
        "passes": passes,
        "products": products,
    }


@kinds
def test_in_bfloat16_the_logits_are_finite_and_near_those_in_float32(main_model, kind):
    half = new_model(CONFIGS[main_model.config.model_type]()).to(torch.bfloat16)
    ids, once = random_ids(2, LENGTH), {"max_new_tokens": 1}
    exact, rough = (written(model, steer(kind), ids, **once)[1] for model in (main_model, half))
    assert rough.isfinite().all()
    assert (exact.softmax(-1) - rough.softmax(-1)).abs().max() < 0.2
    assert written(half, steer(kind), ids)[1].isfinite().all()


@pytest.mark.parametrize("kind", ["past", "hidden", "probs"])
def test_under_inference_mode_the_result_is_right_or_the_error_names_it(kind):
    model, ids = tiny("gpt2"), random_ids(1, LENGTH)
    expected = written(model, steer(kind), ids)
    try:
        with torch.inference_mode():
            found = written(model, steer(kind), ids)
    except (RuntimeError, ValueError) as error:
        assert "inference_mode" in str(error)  # noqa: PT017
    else:
        assert_same(found, expected)


@each_kind
def test_enormous_steps_give_no_nan(kind):
    pplm = steer(kind, stepsize=1e3, gamma=2.0)
    found = written(tiny("gpt2"), pplm, random_ids(1, LENGTH))[1]
    assert not found.isnan().any()


def refused(message: str, change: Callable[[PreTrainedModel], None]) -> None:
    model = tiny("gpt2")
    with pytest.raises(ValueError, match=message), steer().on(model):
        change(model)


def test_calls_that_pplm_cannot_follow_are_refused():
    ids = random_ids(1, LENGTH)
    mask, some = torch.ones_like(ids), {"max_new_tokens": 2, "pad_token_id": 0}
    refused("inputs_embeds", lambda model: model(inputs_embeds=torch.zeros(1, 3, 32)))
    refused(
        "DynamicCache, not a StaticCache",
        lambda model: model.generate(ids, attention_mask=mask, cache_implementation="static", **some),
    )
    for unsupported in ({"labels": ids}, {"output_hidden_states": True}, {"output_attentions": True}):
        refused(f"leave out {next(iter(unsupported))}", lambda model, more=unsupported: model(ids, **more))


def test_a_call_of_the_model_gives_the_logits_of_the_next_token():
    model, (ids, mask) = tiny("gpt2"), padded([LENGTH, 6], "left")
    with steer().on(model):
        found = model(ids, attention_mask=mask).logits
    assert found.shape == (2, 1, 97)
    assert places(mask)[1, -6] == 0
    torch.testing.assert_close(found, written(model, steer(), ids, mask, max_new_tokens=1)[1], **CLOSE)
    torch.testing.assert_close(found.exp().sum(dim=-1), torch.ones(2, 1))
