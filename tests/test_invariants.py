"""What every steer promises on every main architecture, whatever its mechanism.

A mechanism is one entry of STEERS: a steer of a given strength, and what that of strength zero leaves of the
plain logits. The numbers in the names are those of the invariants.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from conftest import (
    HEAD_KINDS,
    WINDOW,
    assert_same_up_to_rounding,
    head_steer,
    hook_count,
    logits,
    padded,
    random_ids,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import PreTrainedModel

import steer_utils as su
from steer_utils.pplm.classifier import ClassifierHead

LENGTH = WINDOW + 5
CLOSE = {"atol": 2e-4, "rtol": 2e-4}
PROMPTS = ["I hate you because", "abcde", "Good day"]


class Mechanism(NamedTuple):
    """A steer of each strength, what strength zero makes of plain logits, and whether it needs no cache."""

    at: Callable[[float], Any]
    zero: Callable[[Tensor], Tensor] = lambda plain: plain


def x_vector(strength: float) -> su.ActivationAddition:
    love, hate = su.get_x_vector("Love", "Hate", coeff=20 * strength, act_name=1)
    return love + hate


def steering_vector(strength: float) -> su.SteeringVector:
    rows = torch.randn(2, 32, generator=torch.Generator().manual_seed(0))
    return 3 * strength * su.SteeringVector("blocks.0.hook_mlp_out", rows)


def pplm(**kwargs: Any) -> Mechanism:
    kwargs = {"gamma": 1.0, "top_k": 0} | kwargs
    return Mechanism(
        lambda strength: su.PPLM(stepsize=0.1 * strength, **kwargs),
        lambda plain: plain.log_softmax(dim=-1),
    )


def at_head(kind: str) -> Mechanism:
    steer = head_steer(kind, epsilon=0.1 if kind == "multiply" else 1.0)
    return Mechanism(lambda strength: steer.at([strength, -strength]))


BAG = {"bags": su.Bag("test", entries=((5,), (17,), (40, 41)))}
HEAD = {"head": ClassifierHead(32, 3, seed=1), "target_class_id": 1}
STEERS = {
    "x-vector": Mechanism(x_vector),
    "steering vector": Mechanism(steering_vector),
    "PPLM past, bag": pplm(**BAG),
    "PPLM past, head": pplm(**HEAD),
    "PPLM past, head, fresh": pplm(**HEAD, persist=False),
    "PPLM hidden, bag": pplm(**BAG, perturb="hidden"),
    "PPLM hidden, head": pplm(**HEAD, perturb="hidden"),
    "PPLM probs, bag": pplm(**BAG, perturb="probs"),
    **{f"LM-Steer {kind}": at_head(kind) for kind in HEAD_KINDS},
}


@pytest.fixture(params=STEERS)
def mechanism(request: pytest.FixtureRequest) -> Mechanism:
    return STEERS[request.param]


def written(
    model: PreTrainedModel, tokenizer, steer: Any, ids: Tensor, mask: Tensor | None = None, **kwargs: Any
) -> tuple[Tensor, Tensor]:
    """The whole rows [B, T + N] and the logits [B, N, V] that greedy search writes; None: unsteered."""
    mask = torch.ones_like(ids) if mask is None else mask
    kwargs = {"attention_mask": mask, "max_new_tokens": 4, "do_sample": False, "pad_token_id": 0} | kwargs
    kwargs |= {"eos_token_id": None, "return_dict_in_generate": True, "output_logits": True}
    if steer is None:
        out = model.generate(ids, **kwargs)
    else:
        with steer.on(model, tokenizer):
            out = model.generate(ids, **kwargs)
    return out.sequences, torch.stack(out.logits, dim=1)


def assert_same(found: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> None:
    assert torch.equal(found[0], expected[0])
    torch.testing.assert_close(found[1], expected[1], **CLOSE)


def test_1_strength_zero_gives_the_plain_logits_and_another_strength_does_not(
    main_model, tokenizer, mechanism
):
    ids, mask = padded([LENGTH, 6], "left")
    rows, plain = written(main_model, tokenizer, None, ids, mask)
    found = written(main_model, tokenizer, mechanism.at(0.0), ids, mask)
    assert_same(found, (rows, mechanism.zero(plain)))
    steered = written(main_model, tokenizer, mechanism.at(1.0), ids, mask)[1]
    change = steered.softmax(dim=-1)[:, 0] - plain.softmax(dim=-1)[:, 0]
    assert (change.abs().sum(dim=-1) > 1e-4).all()


def test_2_with_and_without_a_cache_the_logits_are_the_same(main_model, tokenizer, mechanism):
    ids, mask = padded([LENGTH, 6], "left")
    cached, uncached = (
        written(main_model, tokenizer, mechanism.at(1.0), ids, mask, use_cache=use) for use in (True, False)
    )
    assert_same(uncached, cached)


@settings(max_examples=3, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_3_and_5_a_left_padded_batch_is_its_texts_one_by_one(main_model, tokenizer, mechanism, data):
    lengths = data.draw(st.lists(st.integers(6, 16), min_size=2, max_size=4))
    strength = data.draw(st.floats(0.1, 1.0))
    ids, mask = padded(lengths, "left", seed=data.draw(st.integers(0, 99)))
    steer = mechanism.at(strength)
    batch = written(main_model, tokenizer, steer, ids, mask, max_new_tokens=2)
    for row, n in enumerate(lengths):
        alone = written(main_model, tokenizer, steer, ids[row : row + 1, -n:], max_new_tokens=2)
        torch.testing.assert_close(batch[1][row, :1], alone[1][0, :1], **CLOSE)
        if torch.equal(batch[0][row, -2:], alone[0][0, -2:]):  # two tokens may be level but for rounding
            torch.testing.assert_close(batch[1][row], alone[1][0], atol=5e-3, rtol=5e-3)


def test_4_after_the_context_or_an_exception_inside_it_the_model_is_what_it_was(
    main_model, tokenizer, mechanism
):
    ids, names, hooks = random_ids(2, LENGTH), dict(vars(main_model)), hook_count(main_model)
    plain, weights = logits(main_model, ids), [weight.clone() for weight in main_model.parameters()]
    steer = mechanism.at(1.0)

    def use_and_fail() -> None:
        with steer.on(main_model, tokenizer):
            written(main_model, tokenizer, None, ids, max_new_tokens=2)
            raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        use_and_fail()
    for _ in range(2):
        assert vars(main_model) == names
        assert hook_count(main_model) == hooks
        assert all(map(torch.equal, weights, main_model.parameters()))
        assert torch.equal(logits(main_model, ids), plain)
        written(main_model, tokenizer, steer, ids, max_new_tokens=2)


def test_5_a_table_of_prompts_is_that_of_each_prompt_alone(main_model, tokenizer, mechanism):
    kwargs = {"steer": mechanism.at(1.0), "max_new_tokens": 3, "seed": 1}
    together = su.generate(main_model, tokenizer, PROMPTS, **kwargs)
    for i, prompt in enumerate(PROMPTS):
        alone = su.generate(main_model, tokenizer, prompt, **kwargs)
        assert_same_up_to_rounding(together[i : i + 1].reset_index(drop=True), alone)


def test_6_the_same_seed_gives_the_same_text_and_torchs_random_state_stays(main_model, tokenizer, mechanism):
    kwargs = {"steer": mechanism.at(1.0), "max_new_tokens": 6, "num_samples": 3}
    torch.manual_seed(7)
    state = torch.get_rng_state()
    first = su.generate(main_model, tokenizer, PROMPTS[:1], seed=1, **kwargs)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(8)
    again = su.generate(main_model, tokenizer, PROMPTS[:1], seed=1, **kwargs)
    other = su.generate(main_model, tokenizer, PROMPTS[:1], seed=2, **kwargs)
    assert first.equals(again)
    assert first["completion"].tolist() != other["completion"].tolist()
