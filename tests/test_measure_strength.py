"""Equal strength against `model.generate` and whole passes over the texts, for every kind of steer."""

import math
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import HEAD_KINDS, MAIN, head_steer, hook_count, log_prob_gains, logits, tiny
from torch import Tensor
from transformers import PreTrainedModel

import steer_utils as su
from steer_utils.measure import metrics, strength
from steer_utils.measure.strength import (
    at_kl,
    bracket,
    continuations,
    factor_at,
    forced,
    kl_along,
    loss_increase,
    scaled,
)
from steer_utils.models import token_ids
from steer_utils.pplm.classifier import ClassifierHead

PROMPTS = ["I hate you because", "abcdef", "Good day"]
BAG = {"bags": su.Bag("test", entries=((5,), (17,), (40, 41)))}
HEAD = {"head": ClassifierHead(32, 3, seed=1), "target_class_id": 1}
PLUS, MINUS = su.get_x_vector("Love", "Hate", coeff=1, act_name=1)
ROWS = torch.randn(2, 32, generator=torch.Generator().manual_seed(0))
STEERS: dict[str, Callable[[], Any]] = {
    "addition": lambda: PLUS,
    "list": lambda: [PLUS, MINUS],
    "everywhere": lambda: replace(PLUS, positions="all"),
    "vector": lambda: su.SteeringVector("blocks.0.hook_mlp_out", ROWS, positions="all"),
    **{f"LM-Steer {kind}": lambda kind=kind: head_steer(kind).at([-1.0, 0.5]) for kind in HEAD_KINDS},
    "PPLM past": lambda: su.PPLM(**BAG, stepsize=0.1, gamma=1.0, num_iterations=1),
    "PPLM hidden": lambda: su.PPLM(**HEAD, perturb="hidden", stepsize=0.5, gamma=1.0, top_k=0),
    "PPLM probs": lambda: su.PPLM(**BAG, perturb="probs", stepsize=0.01, gamma=1.0, top_k=0),
    "of two kinds": lambda: [PLUS + MINUS, head_steer("add").at([1.0, 0.0])],
}


def each(steer: Any) -> list[Any]:
    return [steer] if hasattr(steer, "on") else list(steer)


def uncut(steer: Any) -> Any:
    return replace(steer, top_k=0) if isinstance(steer, su.PPLM) else steer


@torch.no_grad()
def greedily_along(model: PreTrainedModel, tokenizer, steer: Any, prompt: str, ids: list[int]) -> Tensor:
    """Logits [T, V] that `model.generate` has at each token when it is made to write the given ids."""
    start = su.encode(tokenizer, prompt)["input_ids"]
    told = start.shape[1]

    def given(_: int, sent: Tensor) -> list[int]:
        return [ids[len(sent) - told]]

    with ExitStack() as stack:
        for one in each(steer):
            stack.enter_context(uncut(one).on(model, tokenizer))
        out = model.generate(
            start,
            attention_mask=torch.ones_like(start),
            max_new_tokens=len(ids),
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
            prefix_allowed_tokens_fn=given,
            return_dict_in_generate=True,
            output_logits=True,
        )
    assert out.sequences[0, told:].tolist() == ids
    return torch.cat(out.logits)


def kl_by_hand(steered: Tensor, unsteered: Tensor) -> Tensor:
    p, q = steered.double().softmax(-1), unsteered.double().softmax(-1)
    return (p * (p.log() - q.log())).sum(-1)


# --- equal KL ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("number", "kind"), list(enumerate(STEERS)), ids=STEERS)
def test_the_kl_at_the_strength_found_is_the_goal(tokenizer, number, kind):
    model, steer = tiny(MAIN[number % len(MAIN)]), STEERS[kind]()
    nats, tokens = (0.25, 1) if number % 3 == 0 else (0.1, 4)
    found = at_kl(steer, nats, model, tokenizer, PROMPTS, tokens=tokens)
    assert type(found) is type(steer)
    ids = continuations(model, tokenizer, PROMPTS, tokens=tokens)
    assert ids.shape == (3, tokens)
    kls = [
        kl_by_hand(*(greedily_along(model, tokenizer, one, prompt, row) for one in (found, [])))
        for prompt, row in zip(PROMPTS, ids.tolist(), strict=True)
    ]
    assert torch.stack(kls).mean().item() == pytest.approx(nats, rel=0.03)
    torch.testing.assert_close(
        kl_along(found, model, tokenizer, PROMPTS, tokens=tokens).double(),
        torch.stack(kls),
        atol=1e-3,
        rtol=1e-2,
    )


def test_signs_and_directions_stay(tokenizer):
    model = tiny("llama")
    found = at_kl(head_steer("add").at([-3.0, 1.5]), 0.3, model, tokenizer, PROMPTS)
    first, second = found.values().tolist()
    assert first < 0
    assert second == pytest.approx(-first / 2)
    both = [replace(one, positions="all") for one in (PLUS, -MINUS)]
    pair = at_kl(both, 0.3, model, tokenizer, PROMPTS, tokens=3)
    assert pair[0].coeff == pytest.approx(pair[1].coeff)


def test_scaling_is_what_each_kind_calls_its_strength():
    assert scaled(PLUS + MINUS, 3) == 3 * PLUS + 3 * MINUS
    assert scaled((PLUS, MINUS), 2) == [2 * PLUS, 2 * MINUS]
    assert scaled(su.PPLM(**BAG, stepsize=0.1), 2).stepsize == pytest.approx(0.2)


def test_pplm_keeps_its_cut_and_is_measured_without_it(tokenizer):
    model = tiny("gpt2")
    cut = su.PPLM(**BAG, stepsize=0.1, gamma=1.0, top_k=3, top_p=0.8)
    found = at_kl(cut, 0.2, model, tokenizer, PROMPTS, tokens=2)
    assert (found.top_k, found.top_p) == (3, 0.8)
    assert kl_along(found, model, tokenizer, PROMPTS, tokens=2).mean().item() == pytest.approx(0.2, rel=0.03)
    free = replace(found, top_k=0, top_p=1.0)
    torch.testing.assert_close(
        *(kl_along(one, model, tokenizer, PROMPTS, tokens=2) for one in (found, free)), atol=0, rtol=0
    )


def test_along_its_own_text_the_mean_kl_is_what_the_chain_rule_says(tokenizer):
    """With two tokens: KL of the first + the expectation, over all first tokens, of KL of the second."""
    model, prompt = tiny("gpt2"), "abc"
    steer = head_steer("offset").at([0.8, 0.0])
    many = kl_along(steer, model, tokenizer, [prompt] * 600, tokens=2, own_text=True)
    start = su.encode(tokenizer, prompt)["input_ids"]
    rows = torch.cat([start.expand(97, -1), torch.arange(97)[:, None]], dim=1)
    with torch.no_grad():
        unsteered = model(rows).logits[:, -2:]
        with steer.on(model):
            steered = model(rows).logits[:, -2:]
    kl = kl_by_hand(steered, unsteered)
    weights = steered[0, 0].double().softmax(-1)
    weights[0] = 0  # EOS is not drawn
    assert many[:, 0].mean().item() == pytest.approx(kl[0, 0].item(), rel=1e-3)
    expected = (weights / weights.sum() @ kl[:, 1]).item()
    assert many[:, 1].mean().item() == pytest.approx(expected, abs=4 * (many[:, 1].std() / 600**0.5).item())


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_text_in_front_counts_like_a_steer(kind, tokenizer):
    model, prefix = tiny(kind), "Good "
    ids = continuations(model, tokenizer, PROMPTS, tokens=3)
    found = kl_along((), model, tokenizer, PROMPTS, tokens=3, prefix=prefix)
    for prompt, text, row in zip(PROMPTS, ids, found, strict=True):
        with torch.no_grad():
            steered, unsteered = (
                model(torch.cat([su.encode(tokenizer, start)["input_ids"], text[None]], dim=1)).logits[
                    0, -4:-1
                ]
                for start in (prefix + prompt, prompt)
            )
        torch.testing.assert_close(row.double(), kl_by_hand(steered, unsteered), atol=1e-5, rtol=1e-3)


def test_the_texts_are_the_unsteered_models_and_come_from_the_seed(main_model, tokenizer):
    first, again, other = (
        continuations(main_model, tokenizer, PROMPTS, tokens=6, seed=seed) for seed in (0, 0, 1)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert (continuations(main_model, tokenizer, PROMPTS * 10, tokens=20) != 0).all()  # 0 is EOS


def test_afterwards_the_model_is_as_it_was(tokenizer):
    model, hooks = tiny("llama"), hook_count(tiny("llama"))
    before = metrics.next_token_logits(model, tokenizer, PROMPTS)
    at_kl(STEERS["PPLM past"](), 0.2, model, tokenizer, PROMPTS[:1], tokens=2)
    forced(model, tokenizer, PROMPTS, ["b", "c", "d"], STEERS["PPLM past"]())
    assert torch.equal(metrics.next_token_logits(model, tokenizer, PROMPTS), before)
    assert hook_count(model) == hooks


@pytest.mark.parametrize("count", [1, 6])
def test_values_for_another_number_of_prompts_are_refused(tokenizer, count):
    steer = head_steer().at([[1.0, 0.0]] * count)
    with pytest.raises(ValueError, match=f"values for {count} texts do not fit 3 texts"):
        kl_along(steer, tiny("llama"), tokenizer, ["a", "bc", "def"], tokens=2)


@pytest.mark.parametrize("nats", [0, math.nan, math.inf])
def test_nats_out_of_range_are_quoted(tokenizer, nats):
    with pytest.raises(ValueError, match=f"nats must be above 0 and finite, not {nats}"):
        at_kl(PLUS, nats, tiny("llama"), tokenizer, PROMPTS)


@pytest.mark.parametrize(("prompts", "tokens"), [([], 3), (PROMPTS, 0)], ids=("no prompts", "no tokens"))
def test_nothing_to_measure_on_is_refused(tokenizer, prompts, tokens):
    with pytest.raises(ValueError, match=r"prompts must be at least one|tokens must be at least 1, not 0"):
        at_kl(PLUS, 0.5, tiny("llama"), tokenizer, prompts, tokens=tokens)


@pytest.mark.parametrize("kind", ["addition", "PPLM probs"])
def test_a_steer_of_strength_zero_reaches_nothing(tokenizer, kind):
    with pytest.raises(
        ValueError, match=r"from 1/4096 to 4096 .* 0\.5 nats: the largest KL seen is (0|[0-9.]+e-0[78]),"
    ):
        at_kl(0 * STEERS[kind](), 0.5, tiny("llama"), tokenizer, PROMPTS[:1], tokens=1)


def test_a_goal_beyond_what_a_steer_can_do_quotes_the_largest_kl(tokenizer):
    timid = su.PPLM(**BAG, perturb="probs", stepsize=0.1, gamma=1.0, gm_scale=0.1)
    with pytest.raises(ValueError, match=r"gives 90\.0 nats: the largest KL seen is [0-9.]+[1-9]"):
        at_kl(timid, 90.0, tiny("llama"), tokenizer, PROMPTS[:1], tokens=1)


# --- the search, on functions made by hand ----------------------------------------------------------------


@pytest.mark.parametrize("goal", [1e-3, 7.0])
def test_a_power_law_takes_few_evaluations_none_of_them_twice(goal):
    seen: list[float] = []

    def kl(factor: float) -> float:
        seen.append(factor)
        return 0.3 * factor**2

    assert factor_at(kl, goal) == pytest.approx(math.sqrt(goal / 0.3), rel=0.02)
    assert len(seen) == len(set(seen)) <= 10


def test_the_first_of_several_strengths_is_found_coming_from_either_side():
    def peaked(x: float) -> float:
        return 2 * math.exp(-(math.log(x / 8) ** 2))

    for start in (1 / 4, 4):
        found = start * factor_at(lambda factor, start=start: peaked(start * factor), 0.5)
        assert found < 8
        assert peaked(found) == pytest.approx(0.5, rel=0.03)


def test_where_the_numbers_break_the_steer_counts_as_too_strong():
    broken = factor_at(lambda x: 0.1 * x**2 if x < 3 else math.nan, 0.5)
    assert broken == pytest.approx(math.sqrt(5), rel=0.02)


@pytest.mark.parametrize("kl", [0.495, 0.505])
def test_a_steer_that_is_right_already_stays(kl):
    assert factor_at(lambda x: kl * x, 0.5) == 1.0


@pytest.mark.parametrize(
    ("function", "ends"),
    [
        (lambda x: x - 2.5, (2, 3)),
        (lambda x: x + 2.5, (-2, -3)),
        (lambda x: x - 12, (11, 12)),
        (lambda x: x - 12.1, None),
        (lambda x: 1.0, None),
        (lambda x: min(x, 0.0), (0, 0)),  # right at once, and flat on one side
        (lambda x: x - 3.0, (2, 3)),
    ],
    ids=("up", "down", "last", "beyond", "constant", "flat", "whole"),
)
def test_the_bracket_is_the_first_pair_of_integers_around_a_change_of_sign(function, ends):
    assert bracket(function) == ends


# --- given texts ------------------------------------------------------------------------------------------

STARTS = ["Once upon a time", "abc", "The cat", "I hate you because"]
COMPLETIONS = [" there was", "Hello", "", " of the mat, and"]
CLOSE = {"atol": 3e-4, "rtol": 3e-4}


def pplm(**kwargs):
    kwargs = {"gamma": 1.0, "top_k": 0, "num_iterations": 2, "stepsize": 0.1} | kwargs
    return su.PPLM(bags=[su.Bag("some", entries=((5,), (6,)))], **kwargs)


def whole_passes(model, tokenizer, prompt, completion, steer):
    """The gain of each token of the completion, from one steered and one unsteered pass over the text."""
    ids = torch.tensor([token_ids(tokenizer, prompt + completion)])
    start = len(prompt) + 1  # a token is a character; BOS is in front
    with steer.on(model, tokenizer), su.hooks.batch(prompt_lengths=start):
        ours = logits(model, ids)[0, start - 1 : -1].log_softmax(-1)
    theirs = logits(model, ids)[0, start - 1 : -1].log_softmax(-1)
    return (ours - theirs)[torch.arange(len(ours)), ids[0, start:]]


def assert_like_whole_passes(model, tokenizer, prompts, steer):
    found = forced(model, tokenizer, prompts, COMPLETIONS, steer)
    for gain, prompt, completion in zip(found, prompts, COMPLETIONS, strict=True):
        torch.testing.assert_close(gain, whole_passes(model, tokenizer, prompt, completion, steer), **CLOSE)
    assert torch.cat(found).abs().max() > 0.01


@pytest.mark.parametrize(("kind", "batch_size"), [("addition", 1), ("vector", 3), ("LM-Steer multiply", 64)])
def test_each_token_has_the_gain_of_whole_passes(main_model, tokenizer, monkeypatch, kind, batch_size):
    monkeypatch.setattr(strength, "BATCH_SIZE", batch_size)
    prompts = [STARTS[0], "abcdef", *STARTS[2:]] if kind == "addition" else STARTS  # as long as the addition
    assert_like_whole_passes(main_model, tokenizer, prompts, 3.0 * STEERS[kind]())


def test_any_architecture_will_do(any_model, tokenizer):
    assert_like_whole_passes(any_model, tokenizer, STARTS, head_steer().at([1.0, -0.5]))


def test_pplm_is_followed_at_each_token_as_it_writes(main_model, tokenizer):
    steer, prompt, completion = pplm(), "The cat", " sat"
    (found,) = forced(main_model, tokenizer, [prompt], [completion], steer)
    ids = torch.tensor([token_ids(tokenizer, prompt + completion)])
    for t in range(len(completion)):
        with steer.on(main_model):
            cache = None
            for part in [ids[:, :8], *ids[:, 8 : 8 + t].unbind(1)]:
                ours = main_model(part.reshape(1, -1), past_key_values=cache, use_cache=True)
                cache = ours.past_key_values
        both = ours.logits[0, -1], logits(main_model, ids[:, : 8 + t])[0, -1]
        steered, unsteered = (one.log_softmax(-1)[ids[0, 8 + t]] for one in both)
        torch.testing.assert_close(found[t], steered - unsteered, **CLOSE)


def test_pplm_that_does_not_step_changes_a_token_only_by_its_cut(tokenizer):
    model = tiny("gpt2")
    free, cut = (
        forced(model, tokenizer, ["The cat"], [" sat"], pplm(stepsize=0.0, top_k=k))[0] for k in (0, 3)
    )
    assert free.abs().max() < 1e-5
    unsteered = logits(model, torch.tensor([token_ids(tokenizer, "The cat")]))[0, -1].softmax(-1)
    kept = unsteered.topk(3).indices.tolist()
    assert cut[0].isfinite() == (token_ids(tokenizer, " ")[-1] in kept)
    assert cut.isneginf().any()


def test_values_of_each_text_go_to_their_text(tokenizer, monkeypatch):
    model = tiny("llama")
    monkeypatch.setattr(strength, "BATCH_SIZE", 3)
    values = [[1.0, 0.0], [0.0, 0.0], [0.0, 1.0], [-2.0, 0.0]]
    found = forced(model, tokenizer, STARTS, COMPLETIONS, head_steer().at(values))
    for i, value in enumerate(values):
        (alone,) = forced(model, tokenizer, STARTS[i : i + 1], COMPLETIONS[i : i + 1], head_steer().at(value))
        torch.testing.assert_close(found[i], alone, **CLOSE)
    assert (found[1].abs() < 1e-6).all()


def test_several_steers_at_once_are_followed_together(tokenizer):
    model, one, other = tiny("gpt2"), head_steer().at([1.0, 0.0]), head_steer().at([0.0, 0.5])
    found = forced(model, tokenizer, STARTS, COMPLETIONS, [one, other])
    for pair in zip(found, forced(model, tokenizer, STARTS, COMPLETIONS, one + other), strict=True):
        torch.testing.assert_close(*pair, **CLOSE)


def test_nothing_to_follow_takes_no_pass(tokenizer):
    model = tiny("llama")
    with su.costs.counted(model) as count:
        assert forced(model, tokenizer, [], [], head_steer().at(1.0)) == []
        (found,) = forced(model, tokenizer, ["The cat"], [""], head_steer().at(1.0))
    assert (len(found), count.forward) == (0, [])


@pytest.mark.parametrize(
    ("completions", "steer", "error", "message"),
    [
        (["b", "c"], head_steer().at(1.0), ValueError, "two lists of equal length, not 1 and 2"),
        (["b"], 5, TypeError, "steer of forced must be a steer or a flat list of steers or None, not 5"),
    ],
    ids=("numbers", "no steer"),
)
def test_what_cannot_be_followed_is_refused(tokenizer, completions, steer, error, message):
    with pytest.raises(error, match=message):
        forced(tiny("gpt2"), tokenizer, ["a"], completions, steer)


TEXTS = ["A text of no particular kind", "and another one, longer than the first", "tiny"]


def test_the_loss_on_other_texts_rises_by_the_ratio_of_sums(tokenizer):
    model = tiny("gemma3_text")
    steer = head_steer().at([1.0, 0.5])
    found = loss_increase(model, tokenizer, TEXTS, steer, start=6)
    gains = [one[5:] for one in log_prob_gains(model, tokenizer, TEXTS[:2], steer)]
    expected = metrics.ratio([-one.sum().item() for one in gains], [len(one) for one in gains])
    np.testing.assert_allclose(found, expected, rtol=1e-3)
    assert loss_increase(model, tokenizer, TEXTS, 0 * steer, start=3).mean == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize(
    ("start", "message"),
    [(0, "longer than start=0 tokens"), (35, "1 of 3 texts are longer than start=35 tokens")],
)
def test_texts_that_are_too_short_are_refused(tokenizer, start, message):
    with pytest.raises(ValueError, match=message):
        loss_increase(tiny("gpt2"), tokenizer, TEXTS, head_steer().at(1.0), start=start)
