"""Steers that the notebooks share: snippets and labels, baselines, and training for another model."""

import pytest
import torch

import steer_utils as su
from steer_utils.course import steers

SNIPPETS = su.data.rated_sentences("movie", split="train").set_index("text")["rating"]


def test_snippets_are_not_from_the_test_split_and_labelled_by_half_their_rating_up_to_one():
    texts, labels = steers.film_snippets(300, seed=1)
    assert len(texts) == 300
    held_out = set(su.data.rated_sentences("movie", split="test")["text"]) - set(SNIPPETS.index)
    assert not held_out & set(texts)
    once = [i for i, text in enumerate(texts) if SNIPPETS.index.tolist().count(text) == 1]
    wanted = [max(-1.0, min(1.0, SNIPPETS[texts[i]] / 2)) for i in once]
    assert [labels[i] for i in once] == pytest.approx(wanted)
    assert -1 in labels
    assert 1 in labels
    assert steers.film_snippets(300, seed=1) == (texts, labels)
    assert steers.film_snippets(300, seed=2)[0] != texts


def test_a_steer_is_trained_with_the_settings_of_the_profile():
    fast = steers.toward_positive(*su.load("smollm2-135m", dtype="float32"), "fast", scale=0.01)
    assert fast.card["texts"]["all"] == 100
    assert len(fast.card["losses"]) == 10
    assert fast.rank == 64


def test_a_random_steer_has_the_shape_of_another_and_comes_from_its_seed_alone():
    steer = su.LMSteer(torch.ones(2, 5, 3), torch.ones(2, 5, 3), epsilon=0.5).at(2.0)
    found = steers.random_like(steer, 7)
    noise = torch.Generator().manual_seed(7)
    assert torch.equal(found.projector1, torch.randn(2, 5, 3, generator=noise))
    assert torch.equal(found.projector2, torch.randn(2, 5, 3, generator=noise))
    assert found.epsilon == 0.5


def test_the_constant_is_what_the_map_makes_of_the_mean_state():
    steer = su.LMSteer(*torch.randn(2, 2, 5, 3), epsilon=0.5)
    states = torch.randn(7, 5)
    found = steers.constant(steer, states)
    wanted = (states @ steer.matrix([1.0, 0.0])).mean(dim=0)
    assert torch.allclose(found.epsilon * found.add_vec[0], wanted, atol=1e-5)


def test_a_lexicon_adds_the_score_of_a_word_behind_a_space_to_its_logit():
    model, tokenizer = su.load("smollm2-135m", dtype="float32")
    found = steers.of_words(model, tokenizer, {"good": 2.0, "bad": -3.0}).offset_vec[0]
    ids = {
        text: tokenizer(text, add_special_tokens=False)["input_ids"] for text in (" good", " Good", " bad")
    }
    assert [found[i].item() for (i,) in ids.values()] == [2, 2, -3]
    assert {tokenizer.decode(i).lower() for i in found.nonzero().flatten()} == {" good", " bad"}


def test_a_step_begins_with_the_cache_before_the_last_token_of_padded_prompts():
    model, tokenizer = su.load("smollm2-135m", dtype="float32")
    prompts = ["The food", "The lake was cold, and"]
    found = steers.step_inputs(model, tokenizer, prompts)
    batch = su.encode(tokenizer, prompts)
    with torch.no_grad():
        whole = model(**batch, output_hidden_states=True)
    length = batch["input_ids"].shape[1]
    assert torch.equal(found.ids, batch["input_ids"])
    assert found.past.get_seq_length() == length - 1
    assert found.past_and_last.get_seq_length() == length
    assert torch.allclose(found.hidden[:, -1], whole.hidden_states[-1][:, -1], atol=1e-3)
    assert torch.allclose(found.logits, whole.logits[:, -1], atol=1e-3)
