"""Divergences along given texts, against whole passes over them, for every kind of steer."""

import math

import numpy as np
import pytest
import torch
from conftest import head_steer, hook_count, logits, tiny

import steer_utils as su
from steer_utils.measure import metrics
from steer_utils.measure.group_metrics import ratio
from steer_utils.measure.teacher_forcing import forced, loss_increase
from steer_utils.models import token_ids

PROMPTS = ["Once upon a time", "", "The cat", "I hate you because"]
COMPLETIONS = [" there was", "Hello", "", " of the mat, and"]
CLOSE = {"atol": 3e-4, "rtol": 3e-4}
STEERS = {
    "lm_steer": lambda: head_steer().at([1.0, -0.5]),
    "x_vector": lambda: su.ActivationAddition(prompt="ab", coeff=3.0, act_name=1),
    "everywhere": lambda: su.SteeringVector(
        "blocks.1.hook_resid_pre", torch.linspace(-2, 2, 32)[None], positions="all"
    ),
}


def pplm(**kwargs):
    kwargs = {"gamma": 1.0, "top_k": 0, "num_iterations": 2, "stepsize": 0.1} | kwargs
    return su.PPLM(bags=[su.Bag("some", entries=((5,), (6,)))], **kwargs)


def whole_passes(model, tokenizer, prompt, completion, steer):
    """KL and gain at each token of the completion, from one steered and one plain pass over the text."""
    ids = torch.tensor([token_ids(tokenizer, prompt + completion)])
    start = len(prompt) + 1  # a token is a character; BOS is in front
    with steer.on(model, tokenizer), su.hf.batch(prompt_lengths=start):
        ours = logits(model, ids)[0, start - 1 : -1].log_softmax(-1)
    theirs = logits(model, ids)[0, start - 1 : -1].log_softmax(-1)
    rows, tokens = torch.arange(len(ours)), ids[0, start:]
    return (ours.exp() * (ours - theirs)).sum(-1), (ours - theirs)[rows, tokens]


@pytest.mark.parametrize("batch_size", [1, 64])
@pytest.mark.parametrize("kind", STEERS)
def test_each_token_has_the_divergence_and_gain_of_whole_passes(main_model, tokenizer, kind, batch_size):
    prompts, steer = ["Once upon a time", "abc", "The cat", "I hate you"], STEERS[kind]()
    found = forced(main_model, tokenizer, prompts, COMPLETIONS, steer, batch_size=batch_size)
    assert [len(one.kl) for one in found] == [len(text) for text in COMPLETIONS]
    for one, prompt, completion in zip(found, prompts, COMPLETIONS, strict=True):
        kl, gain = whole_passes(main_model, tokenizer, prompt, completion, steer)
        torch.testing.assert_close(one.kl, kl, **CLOSE)
        torch.testing.assert_close(one.gain, gain, **CLOSE)
    assert max(one.kl.max() for one in found if len(one.kl)) > 0.01


def test_any_architecture_will_do(any_model, tokenizer):
    steer = head_steer().at([1.0, -0.5])
    for one, prompt, completion in zip(
        forced(any_model, tokenizer, PROMPTS, COMPLETIONS, steer), PROMPTS, COMPLETIONS, strict=True
    ):
        kl, gain = whole_passes(any_model, tokenizer, prompt, completion, steer)
        torch.testing.assert_close(one.kl, kl, **CLOSE)
        torch.testing.assert_close(one.gain, gain, **CLOSE)


def test_gains_are_those_of_log_prob_gains(main_model, tokenizer):
    steer = head_steer().at([1.0, 0.5])
    (found,) = forced(main_model, tokenizer, [""], ["The cat sat"], steer)
    (expected,) = metrics.log_prob_gains(main_model, tokenizer, ["The cat sat"], steer)
    torch.testing.assert_close(found.gain, expected, **CLOSE)


def test_pplm_is_followed_at_each_token_as_it_writes(main_model, tokenizer):
    steer, prompt, completion = pplm(), "The cat", " sat"
    (found,) = forced(main_model, tokenizer, [prompt], [completion], steer)
    ids = torch.tensor([token_ids(tokenizer, prompt + completion)])
    for t in range(len(completion)):
        with steer.on(main_model):  # each token anew: without persist, PPLM keeps only norms between tokens
            cache = None
            for part in [ids[:, :8], *ids[:, 8 : 8 + t].unbind(1)]:
                ours = main_model(part.reshape(1, -1), past_key_values=cache, use_cache=True)
                cache = ours.past_key_values
        theirs = logits(main_model, ids[:, : 8 + t])[:, -1]
        torch.testing.assert_close(
            found.kl[t : t + 1], metrics.next_token_kl(ours.logits[:, -1], theirs), **CLOSE
        )


def test_pplm_that_does_not_step_diverges_only_by_its_cut(main_model, tokenizer):
    free, cut = (
        forced(main_model, tokenizer, ["The cat"], [" sat"], pplm(stepsize=0.0, top_k=k))[0] for k in (0, 3)
    )
    assert free.kl.abs().max() < 1e-5
    plain = logits(main_model, torch.tensor([token_ids(tokenizer, "The cat")]))[0, -1].softmax(-1)
    assert cut.kl[0].item() == pytest.approx(-math.log(plain.topk(3).values.sum()), rel=1e-3)
    assert cut.kl.isfinite().all()
    kept = plain.topk(3).indices.tolist()
    assert cut.gain[0].isfinite() == (token_ids(tokenizer, " ")[-1] in kept)


def test_values_of_each_text_go_to_their_text(main_model, tokenizer):
    values = [[1.0, 0.0], [0.0, 0.0], [0.0, 1.0], [-2.0, 0.0]]
    found = forced(main_model, tokenizer, PROMPTS, COMPLETIONS, head_steer().at(values), batch_size=3)
    for i, value in enumerate(values):
        (alone,) = forced(
            main_model, tokenizer, PROMPTS[i : i + 1], COMPLETIONS[i : i + 1], head_steer().at(value)
        )
        torch.testing.assert_close(found[i].kl, alone.kl, **CLOSE)
    assert (found[1].kl.abs() < 1e-6).all()


def test_several_steers_at_once_are_followed_together(main_model, tokenizer):
    one, other = head_steer().at([1.0, 0.0]), head_steer().at([0.0, 0.5])
    found = forced(main_model, tokenizer, PROMPTS, COMPLETIONS, [one, other])
    for pair in zip(found, forced(main_model, tokenizer, PROMPTS, COMPLETIONS, one + other), strict=True):
        torch.testing.assert_close(*pair, **CLOSE)


def test_no_texts_have_nothing_to_follow(tokenizer):
    assert forced(tiny("gpt2"), tokenizer, [], [], head_steer().at(1.0)) == []


def test_nothing_but_empty_completions_is_followed_without_a_pass(tokenizer):
    model = tiny("llama")
    with su.costs.counted(model) as count:
        (found,) = forced(model, tokenizer, ["The cat"], [""], head_steer().at(1.0))
    assert (len(found.kl), count.forward) == (0, 0)


def test_the_model_is_as_it_was(main_model, tokenizer):
    before, ids = hook_count(main_model), torch.tensor([[0, 4, 5]])
    plain = logits(main_model, ids)
    forced(main_model, tokenizer, PROMPTS, COMPLETIONS, pplm())
    assert hook_count(main_model) == before
    assert torch.equal(logits(main_model, ids), plain)


def test_unequal_numbers_of_prompts_and_completions_are_refused(tokenizer):
    with pytest.raises(ValueError, match="list of 1, list of 2"):
        forced(tiny("gpt2"), tokenizer, ["a"], ["b", "c"], head_steer().at(1.0))


# --- texts that a steer is not about ----------------------------------------------------------------------

TEXTS = ["A text of no particular kind", "and another one, longer than the first", "tiny"]


def test_the_loss_on_other_texts_rises_by_the_ratio_of_sums(main_model, tokenizer):
    steer, model = head_steer().at([1.0, 0.5]), main_model
    found = loss_increase(model, tokenizer, TEXTS, steer, start=6)
    gains = [one[5:] for one in metrics.log_prob_gains(model, tokenizer, TEXTS[:2], steer)]
    expected = ratio([-one.sum().item() for one in gains], [len(one) for one in gains])
    np.testing.assert_allclose(found, expected, rtol=1e-3)


def test_a_steer_of_no_strength_costs_nothing(main_model, tokenizer):
    assert loss_increase(main_model, tokenizer, TEXTS, head_steer().at(0.0), start=3).mean == pytest.approx(
        0, abs=1e-5
    )


@pytest.mark.parametrize(
    ("start", "message"), [(0, "at least 1, for BOS, not 0"), (35, "1 of 3 texts have more than 35 tokens")]
)
def test_texts_that_are_too_short_are_refused(tokenizer, start, message):
    with pytest.raises(ValueError, match=message):
        loss_increase(tiny("gpt2"), tokenizer, TEXTS, head_steer().at(1.0), start=start)


def test_what_is_no_steer_is_named(tokenizer):
    with pytest.raises(TypeError, match="5 is no steer"):
        forced(tiny("gpt2"), tokenizer, ["a"], ["b"], 5)
