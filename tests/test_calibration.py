"""Equal strength: the KL that a search promises against that of `model.generate`, for every kind of steer."""

import math
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import pytest
import torch
from conftest import HEAD_KINDS, head_steer, tiny
from torch import Tensor
from transformers import PreTrainedModel

import steer_utils as su
from steer_utils.measure import strength as calibration
from steer_utils.measure.strength import at_kl, continuations, kl_along, scaled
from steer_utils.pplm.classifier import ClassifierHead

PROMPTS = ["I hate you because", "abcdef", "Good day"]
BAG = {"bags": su.Bag("test", entries=((5,), (17,), (40, 41)))}
HEAD = {"head": ClassifierHead(32, 3, seed=1), "target_class_id": 1}
PLUS, MINUS = su.get_x_vector("Love", "Hate", coeff=1, act_name=1)
ROWS = torch.randn(2, 32, generator=torch.Generator().manual_seed(0))
STEERS: dict[str, Callable[[], Any]] = {
    "addition": lambda: PLUS,
    "sum": lambda: PLUS + MINUS,
    "list": lambda: [PLUS, MINUS],
    "everywhere": lambda: replace(PLUS, positions="all"),
    "at the back": lambda: replace(PLUS, addition_location="back"),
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

    def forced(_: int, sent: Tensor) -> list[int]:
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
            prefix_allowed_tokens_fn=forced,
            return_dict_in_generate=True,
            output_logits=True,
        )
    assert out.sequences[0, told:].tolist() == ids
    return torch.cat(out.logits)


def kl_by_hand(steered: Tensor, plain: Tensor) -> Tensor:
    p, q = steered.double().softmax(-1), plain.double().softmax(-1)
    return (p * (p.log() - q.log())).sum(-1)


@pytest.fixture(params=STEERS)
def steer(request: pytest.FixtureRequest) -> Any:
    return STEERS[request.param]()


@pytest.mark.parametrize(("nats", "tokens"), [(0.25, 1), (0.1, 4)])
def test_the_kl_at_the_strength_found_is_the_goal(main_model, tokenizer, steer, nats, tokens):
    found = at_kl(steer, nats, main_model, tokenizer, PROMPTS, tokens=tokens)
    assert type(found) is type(steer)
    ids = continuations(main_model, tokenizer, PROMPTS, tokens=tokens)
    assert ids.shape == (3, tokens)
    kls = [
        kl_by_hand(*(greedily_along(main_model, tokenizer, one, prompt, row) for one in (found, [])))
        for prompt, row in zip(PROMPTS, ids.tolist(), strict=True)
    ]
    assert torch.stack(kls).mean().item() == pytest.approx(nats, rel=0.03)


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
    assert (su.PPLM(**BAG, stepsize=0.1) * 0).stepsize == 0
    with pytest.raises(ValueError, match=r"stepsize must be at least 0 and finite, not -0\.1"):
        scaled(su.PPLM(**BAG, stepsize=0.1), -1)


def test_pplm_keeps_its_cut_and_is_measured_without_it(tokenizer):
    model = tiny("gpt2")
    cut = su.PPLM(**BAG, stepsize=0.1, gamma=1.0, top_k=3)
    found = at_kl(cut, 0.2, model, tokenizer, PROMPTS, tokens=2)
    assert found.top_k == 3
    assert kl_along(found, model, tokenizer, PROMPTS, tokens=2).mean().item() == pytest.approx(0.2, rel=0.03)


def test_along_its_own_text_the_mean_kl_is_what_the_chain_rule_says(tokenizer):
    """With two tokens: KL of the first + the expectation, over all first tokens, of KL of the second."""
    model, prompt = tiny("gpt2"), "abc"
    steer = head_steer("offset").at([0.8, 0.0])
    many = kl_along(steer, model, tokenizer, [prompt] * 600, tokens=2, own_text=True)
    start = su.encode(tokenizer, prompt)["input_ids"]
    rows = torch.cat([start.expand(97, -1), torch.arange(97)[:, None]], dim=1)
    with torch.no_grad():
        plain = model(rows).logits[:, -2:]
        with steer.on(model):
            steered = model(rows).logits[:, -2:]
    kl = kl_by_hand(steered, plain)
    weights = steered[0, 0].double().softmax(-1)
    weights[0] = 0  # the end of a text is not drawn
    assert many[:, 0].mean().item() == pytest.approx(kl[0, 0].item(), rel=1e-3)
    expected = (weights / weights.sum() @ kl[:, 1]).item()
    assert many[:, 1].mean().item() == pytest.approx(expected, abs=4 * (many[:, 1].std() / 600**0.5).item())


def test_the_texts_are_the_plain_models_and_come_from_the_seed(main_model, tokenizer):
    first, again, other = (
        continuations(main_model, tokenizer, PROMPTS, tokens=6, seed=seed) for seed in (0, 0, 1)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert (first != 0).all()  # 0 would end the text


def test_afterwards_the_model_is_as_it_was(tokenizer):
    model = tiny("llama")
    before = su.metrics.next_token_logits(model, tokenizer, PROMPTS)
    at_kl(STEERS["PPLM past"](), 0.2, model, tokenizer, PROMPTS[:1], tokens=2)
    assert torch.equal(su.metrics.next_token_logits(model, tokenizer, PROMPTS), before)


@pytest.mark.parametrize("nats", [0, -0.5, math.nan, math.inf])
def test_nats_out_of_range_are_quoted(tokenizer, nats):
    with pytest.raises(ValueError, match=f"nats must be above 0 and finite, not {nats}"):
        at_kl(PLUS, nats, tiny("llama"), tokenizer, PROMPTS)


@pytest.mark.parametrize(("prompts", "tokens"), [([], 3), (PROMPTS, 0)])
def test_nothing_to_measure_on_is_refused(tokenizer, prompts, tokens):
    with pytest.raises(ValueError, match=f"one prompt and one token, not {len(prompts)} and {tokens}"):
        at_kl(PLUS, 0.5, tiny("llama"), tokenizer, prompts, tokens=tokens)


@pytest.mark.parametrize("zero", [0 * PLUS, 0 * su.PPLM(**BAG), head_steer("add").at([0.0, 0.0])])
def test_a_steer_of_strength_zero_reaches_nothing(tokenizer, zero):
    with pytest.raises(
        ValueError, match=r"from 1/4096 to 4096 .* 0\.5 nats: the largest KL seen is (0|[0-9.]+e-0[78]),"
    ):
        at_kl(zero, 0.5, tiny("llama"), tokenizer, PROMPTS[:1], tokens=1)


def test_a_goal_beyond_what_a_steer_can_do_quotes_the_largest_kl(tokenizer):
    timid = su.PPLM(**BAG, perturb="probs", stepsize=0.1, gamma=1.0, gm_scale=0.1)
    with pytest.raises(ValueError, match=r"gives 90\.0 nats: the largest KL seen is [0-9.]+[1-9]"):
        at_kl(timid, 90.0, tiny("llama"), tokenizer, PROMPTS[:1], tokens=1)


# --- the search, on functions made by hand ----------------------------------------------------------------


def calls(function: Callable[[float], float]) -> tuple[Callable[[float], float], list[float]]:
    seen: list[float] = []

    def counted(x: float) -> float:
        seen.append(x)
        return function(x)

    return counted, seen


@pytest.mark.parametrize("goal", [1e-3, 0.25, 1.0, 7.0])
def test_a_power_law_takes_few_evaluations(goal):
    kl, seen = calls(lambda x: 0.3 * x**2)
    assert calibration._factor(kl, goal) == pytest.approx(math.sqrt(goal / 0.3), rel=0.02)
    assert len(seen) <= 10


def test_the_first_of_several_strengths_is_found_coming_from_either_side():
    def peaked(x: float) -> float:
        return 2 * math.exp(-(math.log(x / 8) ** 2))

    for start in (1 / 4, 4):
        found = start * calibration._factor(lambda factor, start=start: peaked(start * factor), 0.5)
        assert found < 8
        assert peaked(found) == pytest.approx(0.5, rel=0.03)


def test_where_the_numbers_break_the_steer_counts_as_too_strong():
    broken = calibration._factor(lambda x: 0.1 * x**2 if x < 3 else math.nan, 0.5)
    assert broken == pytest.approx(math.sqrt(5), rel=0.02)


@pytest.mark.parametrize("kl", [0.495, 0.505])
def test_a_steer_that_is_right_already_stays(kl):
    assert calibration._factor(lambda x: kl * x, 0.5) == 1.0
