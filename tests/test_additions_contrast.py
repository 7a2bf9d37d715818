"""Directions from labelled texts: means and ablation against hidden states of transformers."""

from contextlib import ExitStack

import pytest
import torch
from conftest import hook_count, logits, tiny

import steer_utils as su
from steer_utils import hf, models
from steer_utils.additions import contrast

GOOD, BAD = ["abc", "hello you", "x"], ["zzz zz", "no"]


def states(model, tokenizer, text, layer):
    """What enters a block for a text alone, without BOS, [T − 1, D]."""
    batch = models.encode(tokenizer, text)
    with torch.no_grad():
        return model(**batch, output_hidden_states=True).hidden_states[layer][0, 1:]


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("batch_size", [1, 32])
def test_a_mean_difference_is_that_of_texts_one_by_one(family, batch_size, tokenizer, monkeypatch):
    model = tiny(family)
    monkeypatch.setattr(contrast, "TEXTS_PER_PASS", batch_size)
    found = su.mean_difference(model, tokenizer, GOOD, BAD, 1)
    means = [torch.cat([states(model, tokenizer, t, 1) for t in some]).mean(dim=0) for some in (GOOD, BAD)]
    assert torch.allclose(found.rows[0], means[0] - means[1], atol=1e-5)
    assert (found.act_name, found.positions) == ("blocks.1.hook_resid_pre", "all")


@pytest.mark.parametrize("texts", [([], BAD), (GOOD, [])])
def test_both_kinds_of_texts_are_needed(texts, tokenizer):
    with pytest.raises(ValueError, match="give texts of both kinds"):
        su.mean_difference(tiny("gpt2"), tokenizer, *texts, 1)


def test_a_random_vector_has_the_norms_and_places_of_the_first_and_another_direction():
    vector = su.SteeringVector(1, torch.randn(3, 32), positions="all")
    one, same, other = (vector.randomized(seed) for seed in (0, 0, 1))
    assert torch.allclose(one.rows.norm(dim=1), vector.rows.norm(dim=1))
    assert one.where == vector.where
    assert torch.equal(one.rows, same.rows)
    assert not torch.allclose(one.rows, other.rows)


def test_ablation_leaves_nothing_along_the_direction_and_the_rest_as_it_was(tokenizer):
    model, direction = tiny("llama"), torch.randn(32)
    hooks_before = hook_count(model)
    before, seen = states(model, tokenizer, "hello", 0), []
    with su.Ablation(direction).on(model), torch.no_grad(), ExitStack() as stack:
        for block in hf.blocks(model):
            hook = block.register_forward_pre_hook(lambda _, args: seen.append(args[0][0, 1:]))
            stack.callback(hook.remove)
        model(**models.encode(tokenizer, "hello"))
    unit = direction / direction.norm()
    assert len(seen) == len(hf.blocks(model)) == 3
    assert torch.allclose(torch.stack(seen) @ unit, torch.zeros(3, len(before)), atol=1e-5)
    assert torch.allclose(seen[0], before - (before @ unit)[:, None] * unit, atol=1e-5)
    assert hook_count(model) == hooks_before


def test_an_ablation_can_be_on_twice_and_texts_need_tokens(tokenizer):
    model, steer = tiny("gpt2"), su.Ablation(torch.randn(32))
    ids = torch.tensor([[0, 5, 6, 7]])
    found = []
    for _ in range(2):
        with steer.on(model):
            found.append(logits(model, ids))
    assert torch.equal(*found)
    assert not torch.allclose(logits(model, ids), found[0], atol=1e-3)
    with pytest.raises(ValueError, match="no tokens after BOS"):
        su.mean_difference(model, tokenizer, ["", ""], BAD, 1)


@pytest.mark.parametrize("direction", [torch.zeros(32), torch.full((32,), torch.nan), torch.ones(1, 32)])
def test_a_direction_without_a_direction_is_refused(direction):
    with pytest.raises(ValueError, match=r"direction must be numbers \[D\]"):
        su.Ablation(direction)


def test_a_direction_of_another_width_is_refused():
    with (
        pytest.raises(ValueError, match="has 5 numbers; this model takes 32"),
        su.Ablation(torch.ones(5)).on(tiny("gpt2")),
    ):
        pass
