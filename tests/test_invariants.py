"""What every steer promises, whatever its mechanism: the table STEERS × the invariants of the design.

Each test is one invariant, and runs for each steer on one or two of the MAIN models, in turn, so that every
invariant meets every steer and every model.
"""

from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from conftest import (
    HEAD_KINDS,
    MAIN,
    WINDOW,
    assert_same_up_to_rounding,
    head_steer,
    hook_count,
    kept_by_hand,
    logits,
    padded,
    random_ids,
    tiny,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import PreTrainedModel

import steer_utils as su
from steer_utils import hf, hooks
from steer_utils.generation import all_on

LENGTH = WINDOW + 5  # longer than a sliding window
CLOSE = {"atol": 2e-4, "rtol": 2e-4}
PROMPTS = ["I hate you because", "abcde", "Good day"]


class Mechanism(NamedTuple):
    """A steer, or a list of several, for each strength.

    at_zero: what strength 0 makes of the unsteered logits. linear: the hook of an activation that is affine
    in the strength, or "logits", or "" if nothing is.
    """

    at: Callable[[float], Any]
    at_zero: Callable[[Tensor], Tensor] = lambda unsteered: unsteered
    linear: str = ""


def addition(strength: float) -> su.ActivationAddition:
    return su.ActivationAddition(15 * strength, 1, "Love")


def x_vector(strength: float) -> list[su.ActivationAddition]:
    return list(su.get_x_vector("Love", "Bad", coeff=20 * strength, act_name=1))


def steering_vector(strength: float, **where: str) -> su.SteeringVector:
    rows = torch.randn(2, 32, generator=torch.Generator().manual_seed(0))
    return 3 * strength * su.SteeringVector("blocks.0.hook_mlp_out", rows, **where)


def lm_head_steer(kind: str, strength: float) -> Any:
    steer = head_steer(kind, epsilon=0.1 if kind == "multiply" else 1.0)
    return steer.at([strength, -strength])


def pplm(**kwargs: Any) -> Mechanism:
    kwargs = {"gamma": 1.0, "top_k": 0} | kwargs
    return Mechanism(
        lambda strength: su.PPLM(stepsize=0.1 * strength, **kwargs),
        lambda unsteered: unsteered.log_softmax(dim=-1),
    )


def nucleus(logits: Tensor, top_p: float = 0.9) -> Tensor:
    """The logits, with a probability of 0 for tokens outside the nucleus."""
    probs = logits.softmax(dim=-1)
    better = (probs[..., None, :] > probs[..., None]).float() * probs[..., None, :]
    return logits.masked_fill(better.sum(dim=-1) >= top_p, hooks.OUTSIDE)


BAG = {"bags": su.Bag("test", entries=((5,), (17,), (40, 41)))}
HEAD = {"head": su.ClassifierHead(32, 3, seed=1), "target_class_id": 1}
ADDITIONS = {
    "addition": Mechanism(addition, linear="blocks.1.hook_resid_pre"),
    "x-vector": Mechanism(x_vector, linear="blocks.1.hook_resid_pre"),
    "vector-front-own": Mechanism(steering_vector, linear="blocks.0.hook_mlp_out"),
    "vector-back-all": Mechanism(
        lambda strength: steering_vector(strength, addition_location="back", positions="all"),
        linear="blocks.0.hook_mlp_out",
    ),
}
AT_LM_HEAD = {
    f"lm-steer-{kind}": Mechanism(lambda strength, kind=kind: lm_head_steer(kind, strength), linear="logits")
    for kind in HEAD_KINDS
}
AT_LM_HEAD["lm-steer-filtered"] = Mechanism(
    lambda strength: lm_head_steer("multiply", strength).at([strength, -strength], filter_p=0.9), nucleus
)
PPLMS = {
    "pplm-past-bag": pplm(**BAG),
    "pplm-past-head": pplm(**HEAD),
    "pplm-past-fresh": pplm(**HEAD, persist=False),
    "pplm-hidden-bag": pplm(**BAG, perturb="hidden"),
    "pplm-hidden-head": pplm(**HEAD, perturb="hidden"),
    "pplm-probs-bag": pplm(**BAG, perturb="probs"),
}
STEERS = ADDITIONS | AT_LM_HEAD | PPLMS


def table(steers: Iterable[str] = STEERS, *, models: int = 1, first: int = 0) -> pytest.MarkDecorator:
    """Each of the steers with `models` of the MAIN models; the next steer gets the next ones."""
    cases = [
        (name, MAIN[(first + i + 2 * k) % len(MAIN)]) for i, name in enumerate(steers) for k in range(models)
    ]
    return pytest.mark.parametrize(("name", "architecture"), cases, ids=["-".join(case) for case in cases])


def written(
    model: PreTrainedModel, tokenizer, steer: Any, ids: Tensor, mask: Tensor | None = None, **kwargs: Any
) -> tuple[Tensor, Tensor]:
    """Token ids [B, T + N] and logits [B, N, V] of greedy search under one steer, several or none."""
    mask = torch.ones_like(ids) if mask is None else mask
    kwargs = {"attention_mask": mask, "max_new_tokens": 4, "do_sample": False, "pad_token_id": 0} | kwargs
    kwargs |= {"eos_token_id": None, "return_dict_in_generate": True, "output_logits": True}
    with all_on(steer, model, tokenizer):
        output = model.generate(ids, **kwargs)
    return output.sequences, torch.stack(output.logits, dim=1)


def assert_same(found: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> None:
    assert torch.equal(found[0], expected[0])
    torch.testing.assert_close(found[1], expected[1], **CLOSE)


# --- the invariants of one steer --------------------------------------------------------------------------


@table()
def test_1_strength_zero_gives_the_unsteered_logits_and_another_strength_others(
    name, architecture, tokenizer
):
    model, steer, (ids, mask) = tiny(architecture), STEERS[name], padded([LENGTH, 6], "left")
    rows, unsteered = written(model, tokenizer, None, ids, mask)
    assert_same(written(model, tokenizer, steer.at(0.0), ids, mask), (rows, steer.at_zero(unsteered)))
    steered = written(model, tokenizer, steer.at(1.0), ids, mask)[1]
    change = steered.softmax(dim=-1)[:, 0] - unsteered.softmax(dim=-1)[:, 0]
    assert (change.abs().sum(dim=-1) > 1e-4).all()


@table(models=2, first=1)
def test_2_with_and_without_a_cache_the_logits_are_the_same(name, architecture, tokenizer):
    model, steer, (ids, mask) = tiny(architecture), STEERS[name].at(1.0), padded([LENGTH, 6], "left")
    cached, uncached = (
        written(model, tokenizer, steer, ids, mask, use_cache=use_cache) for use_cache in (True, False)
    )
    assert_same(uncached, cached)


@table(models=2, first=0)
@settings(max_examples=2, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_3_a_left_padded_batch_is_its_prompts_one_by_one(name, architecture, tokenizer, data):
    model, lengths = tiny(architecture), data.draw(st.lists(st.integers(6, 16), min_size=2, max_size=4))
    ids, mask = padded(lengths, "left", seed=data.draw(st.integers(0, 99)))
    steer = STEERS[name].at(data.draw(st.floats(0.1, 1.0)))
    batch = written(model, tokenizer, steer, ids, mask, max_new_tokens=2)
    for row, n in enumerate(lengths):
        alone = written(model, tokenizer, steer, ids[row : row + 1, -n:], max_new_tokens=2)
        torch.testing.assert_close(batch[1][row, :1], alone[1][0, :1], **CLOSE)
        if torch.equal(batch[0][row, -2:], alone[0][0, -2:]):  # else two tokens were equal up to rounding
            torch.testing.assert_close(batch[1][row], alone[1][0], atol=5e-3, rtol=5e-3)


@pytest.mark.parametrize("act_name", ["blocks.1.hook_resid_pre", "blocks.2.hook_attn_out"])
def test_3_a_right_padded_capture_gives_the_rows_of_each_text_alone(main_model, tokenizer, act_name):
    texts = ["Love", "Hatred and more", "a"]
    additions = [su.ActivationAddition(2.0, act_name, text, addition_location="back") for text in texts]
    together = su.steering_vectors(main_model, tokenizer, additions)
    for addition, found in zip(additions, together, strict=True):
        (alone,) = su.steering_vectors(main_model, tokenizer, [addition])
        assert len(found.rows) == 1 + len(addition.prompt)
        torch.testing.assert_close(found.rows, alone.rows, **CLOSE)


@table(first=2)
def test_4_after_the_context_or_an_exception_inside_it_the_model_is_what_it_was(
    name, architecture, tokenizer
):
    model, steer, ids = tiny(architecture), STEERS[name].at(1.0), random_ids(2, LENGTH)
    attributes, hooks = dict(vars(model)), hook_count(model)
    unsteered, weights = logits(model, ids), [weight.clone() for weight in model.parameters()]

    def use_and_fail() -> None:
        with all_on(steer, model, tokenizer):
            model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=2, pad_token_id=0)
            raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        use_and_fail()
    for _ in range(2):
        assert vars(model) == attributes
        assert hook_count(model) == hooks
        assert all(map(torch.equal, weights, model.parameters()))
        assert torch.equal(logits(model, ids), unsteered)
        written(model, tokenizer, steer, ids, max_new_tokens=2)


@table(first=3)
def test_5_a_table_of_prompts_is_that_of_each_prompt_alone(name, architecture, tokenizer):
    given = {"steer": STEERS[name].at(1.0), "max_new_tokens": 3, "seed": 1}
    together = su.generate(tiny(architecture), tokenizer, PROMPTS, **given)
    for i, prompt in enumerate(PROMPTS):
        alone = su.generate(tiny(architecture), tokenizer, prompt, **given)
        assert_same_up_to_rounding(together[i : i + 1].reset_index(drop=True), alone)


@table(first=1)
def test_6_the_same_seed_gives_the_same_text_and_the_global_random_state_stays(name, architecture, tokenizer):
    model, given = tiny(architecture), {"steer": STEERS[name].at(1.0), "max_new_tokens": 6, "num_samples": 3}
    torch.manual_seed(7)
    state = torch.get_rng_state()
    first = su.generate(model, tokenizer, PROMPTS[0], seed=1, **given)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(8)
    assert su.generate(model, tokenizer, PROMPTS[0], seed=1, **given).equals(first)
    other = su.generate(model, tokenizer, PROMPTS[0], seed=2, **given)
    assert first["completion"].tolist() != other["completion"].tolist()


@table([name for name, steer in STEERS.items() if steer.linear], models=2)
def test_7_what_a_steer_adds_is_linear_in_its_strength(name, architecture, tokenizer):
    model, steer, (ids, mask) = tiny(architecture), STEERS[name], padded([LENGTH, 7], "left")

    def at(*strengths: float) -> Tensor:
        with all_on(flat([steer.at(strength) for strength in strengths]), model, tokenizer):
            if steer.linear == "logits":
                return logits(model, ids, mask)
            seen = []
            with kept_by_hand(model, steer.linear, seen):
                logits(model, ids, mask)
            return seen[0]

    one = at(1.0) - at(0.0)
    assert one.abs().max() > 0.1
    torch.testing.assert_close(at(-2.5) - at(0.0), -2.5 * one, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(at(0.5, 1.5) - at(0.0), 2 * one, atol=1e-3, rtol=1e-3)


def flat(steers: list) -> list:
    """Steers and lists of steers as one list."""
    return [one for steer in steers for one in (steer if isinstance(steer, list) else [steer])]


def reloaded(steer: Any, folder: Path) -> Any:
    """The same steer, or the same PPLM with its classifier head, after a visit to the disk."""
    if isinstance(steer, su.PPLM):
        steer.head.save_pretrained(folder)
        return replace(steer, head=su.ClassifierHead.from_pretrained(folder))
    steer.save_pretrained(folder)
    return type(steer).from_pretrained(folder)


SAVED = [name for name in STEERS if name.startswith(("vector", "lm-steer")) or name == "pplm-hidden-head"]


@table(SAVED, models=2, first=1)
def test_8_after_save_and_load_the_logits_are_identical(name, architecture, tokenizer, tmp_path):
    model, steer, (ids, mask) = tiny(architecture), STEERS[name].at(1.0), padded([LENGTH, 6], "left")
    again = reloaded(steer, tmp_path)
    for found, expected in zip(
        *(written(model, tokenizer, one, ids, mask) for one in (again, steer)), strict=True
    ):
        assert torch.equal(found, expected)


@table(models=2, first=0)
def test_10_a_prompt_in_chunks_is_steered_at_the_same_absolute_positions(name, architecture, tokenizer):
    model, steer, (ids, mask) = tiny(architecture), STEERS[name].at(1.0), padded([LENGTH, 6], "left")
    with hooks.batch(prompt_lengths=mask.sum(1)):
        whole = written(model, tokenizer, steer, ids, mask)
        chunked = written(
            model, tokenizer, steer, ids, mask, prefill_chunk_size=5, past_key_values=hf.new_cache(model)
        )
    assert_same(chunked, whole)


AT_ONE_TOKEN = [
    name for name in STEERS if name.startswith(("vector", "lm-steer", "pplm-hidden", "pplm-probs"))
]


@table(AT_ONE_TOKEN, first=2)
def test_10_a_prompt_of_one_token_is_steered_like_any_other(name, architecture, tokenizer):
    model, steer, ids = tiny(architecture), STEERS[name].at(1.0), random_ids(1, 1)
    if name in ADDITIONS:
        steer = replace(steer, rows=steer.rows[:1])
    unsteered, steered = (written(model, tokenizer, one, ids, max_new_tokens=1)[1] for one in (None, steer))
    assert (steered.softmax(dim=-1) - unsteered.softmax(dim=-1)).abs().sum() > 1e-4


@pytest.mark.parametrize(
    ("kind", "architecture"), [*(("multiply", name) for name in MAIN), ("add", "gptj"), ("offset", "gptj")]
)
def test_11_a_folded_model_gives_the_steered_logits_without_a_hook(kind, architecture):
    model, steer, (ids, mask) = tiny(architecture), lm_head_steer(kind, 1.0), padded([LENGTH, 6], "left")
    hooks, folded = hook_count(model), steer.fold(model)
    with steer.on(model):
        steered = logits(model, ids, mask)
    assert hook_count(folded) == hooks
    torch.testing.assert_close(logits(folded, ids, mask), steered, **CLOSE)


# --- several steers in a list -----------------------------------------------------------------------------


def first_logits(model: PreTrainedModel, tokenizer, steer: Any) -> Tensor:
    """The first logits after a padded batch of prompts, [B, V]."""
    ids, mask = padded([LENGTH, 7], "left")
    return written(model, tokenizer, steer, ids, mask, max_new_tokens=1)[1][:, 0]


def vector(seed: int, act_name: str | int = 1, **where: str) -> su.SteeringVector:
    rows = 3 * torch.randn(2, 32, generator=torch.Generator().manual_seed(seed))
    return su.SteeringVector(act_name, rows, **where)


def at_lm_head(kind: str, seed: int, **facts: Any) -> Any:
    return head_steer(kind, seed=seed, **facts).at([1.0, -0.5])


PAIRS = {
    "additions": (addition(1.0), su.ActivationAddition(-7.0, 1, "Hatred", addition_location="back")),
    "sums": (addition(1.0) + addition(0.3), addition(0.2) - su.ActivationAddition(5.0, 0, "ab")),
    "vectors": (vector(0), vector(1)),
    **{f"lm-steers-{kind}": (at_lm_head(kind, 0), at_lm_head(kind, 1)) for kind in HEAD_KINDS},
    "lm-steers-epsilon": (at_lm_head("multiply", 0), at_lm_head("multiply", 1, rank=2, epsilon=0.3)),
}


@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize("architecture", ["gpt2", "gemma3_text"])
def test_a_list_of_two_of_one_kind_is_their_sum_in_any_order(pair, architecture, tokenizer):
    model, (one, other) = tiny(architecture), PAIRS[pair]
    expected = first_logits(model, tokenizer, one + other)
    assert (expected - first_logits(model, tokenizer, one)).abs().max() > 0.01
    for steer in ([one, other], [other, one], (one, other)):
        torch.testing.assert_close(first_logits(model, tokenizer, steer), expected, **CLOSE)


REFUSED = {
    "model-ids": (at_lm_head("multiply", 0, model_id="a/one"), at_lm_head("multiply", 1, model_id="b/two")),
    "multiply-add": (at_lm_head("multiply", 0), at_lm_head("add", 1)),
    "add-offset": (at_lm_head("add", 0), at_lm_head("offset", 1)),
    "no-values": (at_lm_head("multiply", 0), head_steer("multiply", seed=1)),
}


@pytest.mark.parametrize("pair", REFUSED)
def test_a_list_whose_sum_is_refused_is_refused_as_well_and_leaves_the_model_unsteered(pair, tokenizer):
    (one, other), model = REFUSED[pair], tiny("llama")
    hooks = hook_count(model)
    with pytest.raises((TypeError, ValueError)) as of_sum:
        one + other
    with pytest.raises(of_sum.type):
        su.generate(model, tokenizer, "abc", steer=[vector(0), one, other], max_new_tokens=2, seed=0)
    assert hook_count(model) == hooks


MIXED = {
    "addition-lm-steer": [addition(1.0), at_lm_head("multiply", 0)],
    "addition-pplm": [addition(1.0), STEERS["pplm-past-bag"].at(1.0)],
    "pplm-lm-steer": [STEERS["pplm-hidden-head"].at(1.0), at_lm_head("add", 0)],
    "addition-vector": [addition(1.0), vector(0)],
    "vectors-back-front": [vector(0, addition_location="back", positions="all"), vector(1)],
    "vectors-two-hooks": [vector(0, "blocks.0.hook_mlp_out"), vector(1)],
    "all": [*x_vector(1.0), vector(0), at_lm_head("multiply", 0), STEERS["pplm-hidden-bag"].at(1.0)],
}


@pytest.mark.parametrize("steers", MIXED)
@pytest.mark.parametrize("architecture", ["llama", "gpt_neox"])
def test_a_list_of_several_kinds_acts_with_all_of_them_in_any_order(steers, architecture, tokenizer):
    model, steers = tiny(architecture), MIXED[steers]
    expected = first_logits(model, tokenizer, steers)
    torch.testing.assert_close(first_logits(model, tokenizer, steers[::-1]), expected, **CLOSE)
    for i in range(len(steers)):
        others = steers[:i] + steers[i + 1 :]
        assert (first_logits(model, tokenizer, others) - expected).abs().max() > 0.01
