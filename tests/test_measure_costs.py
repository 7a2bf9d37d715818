"""Costs against counts by hand: unsteered decoding, each steer, gradients, and hooks that come off."""

import time
from contextlib import suppress

import pytest
import torch
from conftest import head_steer, hook_count, logits, random_ids, tiny

import steer_utils as su
from steer_utils import hooks
from steer_utils.measure import costs

SOME = su.Bag("some", entries=((5,), (6,)))
PPLM = {"gamma": 1.0, "stepsize": 0.05, "num_iterations": 3}


def decode(model, tokens=4, rows=2, prompt=5, **kwargs):
    """Greedy search for exactly so many tokens."""
    ids = random_ids(rows, prompt)
    kwargs |= {"attention_mask": torch.ones_like(ids), "do_sample": False}
    return model.generate(ids, min_new_tokens=tokens, max_new_tokens=tokens, **kwargs)


def passes(count):
    return len(count.forward), len(count.backward), len(count.head)


def test_plain_decoding_reads_the_prompt_once_and_each_token_but_the_last(any_model):
    with costs.counted(any_model) as count:
        decode(any_model)
    assert passes(count) == (4, 0, 4)
    assert count.forward == [2 * 5, 2, 2, 2]
    assert count.head == [2] * 4


def test_generate_reads_a_prompt_once_for_all_its_samples(tokenizer):
    model = tiny("llama")
    with costs.counted(model) as count:
        su.generate(model, tokenizer, "abcd", num_samples=3, max_new_tokens=2, min_new_tokens=2, seed=0)
    assert passes(count) == (1 + 2, 0, 2)
    assert count.forward == [4, 3, 3]  # BOS and "abc"; then "d" and one more token, in three batch rows


def test_pplm_on_the_past_needs_a_forward_and_a_backward_pass_for_each_step(main_model):
    steer = su.PPLM(bags=[SOME], **PPLM)
    with costs.counted(main_model) as count:
        decode(main_model, custom_generate=steer)
    tokens, steps = 4, 4 * PPLM["num_iterations"]
    assert passes(count) == (1 + 2 * tokens + steps, steps, 2 * tokens + steps)  # the prompt in two passes
    assert count.backward == [2] * steps


def test_pplm_on_hidden_states_goes_back_through_the_head_alone():
    model = tiny("llama")
    steer = su.PPLM(bags=[SOME], perturb="hidden", **PPLM)
    with costs.counted(model) as count:
        decode(model, custom_generate=steer)
    assert passes(count) == (1 + 4, 0, 4 * (1 + 2 + 1))  # the first of three steps takes the plain product


def test_a_step_through_soft_tokens_counts_each_of_the_passes_it_goes_back_through():
    model = tiny("llama")
    head = su.ClassifierHead(32, 2)
    steer = su.PPLM(head=head, target_class_id=1, horizon_length=2, **PPLM | {"num_iterations": 1})
    with costs.counted(model) as count:
        decode(model, tokens=1, custom_generate=steer)
    assert len(count.backward) == 1 + 2


def test_an_lm_steer_costs_no_pass():
    model = tiny("llama")
    with costs.counted(model) as count, head_steer().at([1.0, 0.5]).on(model):
        decode(model)
    assert passes(count) == (4, 0, 4)


def test_an_activation_addition_costs_a_pass_for_its_texts(tokenizer):
    model = tiny("llama")
    pair = su.get_x_vector("Love", "Hate", coeff=1, act_name=1)
    with costs.counted(model) as count, su.apply_activation_additions(model, pair, tokenizer):
        decode(model)
    assert passes(count) == (4 + 1, 0, 4)
    assert count.forward == [2 * 5, 2 * 5, 2, 2, 2]  # both texts are BOS and four letters


def test_training_counts_a_backward_pass_for_each_of_the_forward_ones(main_model):
    ids = random_ids(3, 7)
    embeds = main_model.get_input_embeddings()(ids).requires_grad_()
    with costs.counted(main_model) as count:
        main_model(inputs_embeds=embeds).logits.sum().backward()
        main_model(inputs_embeds=embeds)  # whose gradient nobody asks for
    assert passes(count) == (2, 1, 2)
    assert (count.forward, count.backward, count.head) == ([21, 21], [21], [21, 21])


def test_what_comes_after_the_end_does_not_count():
    model = tiny("llama")
    embeds = model.get_input_embeddings()(random_ids(1, 4)).requires_grad_()
    with costs.counted(model) as count:
        late = model(inputs_embeds=embeds).logits.sum()
    late.backward()
    model(inputs_embeds=embeds)
    assert passes(count) == (1, 0, 1)


def test_hooks_come_off_after_an_exception_and_logits_are_the_same_to_the_last_bit(main_model):
    ids, before = random_ids(2, 6), hook_count(main_model)
    plain = logits(main_model, ids)
    with suppress(RuntimeError), costs.counted(main_model) as count:
        assert torch.equal(logits(main_model, ids), plain)
        raise RuntimeError
    assert hook_count(main_model) == before
    assert torch.equal(logits(main_model, ids), plain)
    assert len(count.forward) == 1
    assert count.seconds > 0


def test_a_pass_that_ends_early_counts_from_its_start():
    model, ids = tiny("llama"), random_ids(1, 6)
    with costs.counted(model) as count:
        hooks.activations(model, ids, torch.ones_like(ids), ["blocks.1.hook_resid_pre"])
    assert passes(count) == (1, 0, 0)


def test_a_model_folded_inside_goes_on_without_being_counted():
    model, ids = tiny("llama"), random_ids(1, 6)
    with costs.counted(model) as count:
        folded = head_steer().fold(model, [1.0, 0.5])
        after = hook_count(folded)
    folded(ids)
    assert after == hook_count(model)
    assert count.head == []


def test_seconds_are_those_of_the_work():
    with costs.counted(tiny("gpt2")) as count:
        time.sleep(0.05)
    assert 0.05 <= count.seconds < 5


def test_shares_are_of_the_tokens_that_went_through():
    count = costs.Count([20, 4], [8], [16], seconds=2.0)
    assert count.per_token(8) == {"forward": 3.0, "backward": 1.0, "head": 2.0, "seconds": 0.25}
    with pytest.raises(ValueError, match="at least 1, not 0"):
        count.per_token(0)
