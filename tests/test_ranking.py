"""Best of several: what is kept, and the scores by bag and by head, against plain loops."""

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import logits, tiny
from transformers import PreTrainedModel

import steer_utils as su
from steer_utils.models import token_ids
from steer_utils.pplm.classifier import ClassifierHead

TABLE = pd.DataFrame(
    [
        ("one", 0, "a b c d"),
        ("one", 1, "a a a a"),
        ("one", 2, "a b c e"),
        ("two", 0, "x x x x x"),
        ("two", 1, "x x y y y"),
        ("two", 2, "x x x x x"),
    ],
    columns=["prompt", "sample", "completion"],
)


def kept(scores: list[float], **settings) -> list[tuple[str, int]]:
    best = su.best_of(TABLE, scores, **settings)
    return list(zip(best["prompt"], best["sample"], strict=True))


def test_the_highest_score_of_each_prompt_is_kept():
    assert kept([1, 3, 2, 6, 5, 4]) == [("one", 1), ("two", 0)]


def test_what_repeats_itself_is_dropped_and_the_most_distinct_stays_where_all_do():
    assert kept([1, 3, 2, 6, 5, 4], min_distinct=0.9) == [("one", 2), ("two", 1)]


def test_only_the_first_r_take_part():
    assert kept([1, 2, 3, 4, 5, 6], r=1) == [("one", 0), ("two", 0)]
    assert kept([1, 2, 3, 4, 5, 6], r=2) == [("one", 1), ("two", 1)]


def test_the_best_of_one_is_the_one_and_scores_come_along():
    best = su.best_of(TABLE.head(1), [0.25])
    assert best["score"].tolist() == [0.25]
    assert best["completion"].tolist() == ["a b c d"]


WRONG = [([1.0], None, "1 scores for 6"), ([0.0] * 6, 0, "not 0")]


@pytest.mark.parametrize(("scores", "r", "message"), WRONG)
def test_other_numbers_are_value_errors(scores, r, message):
    with pytest.raises(ValueError, match=message):
        su.best_of(TABLE, scores, r=r)


def bag_score_by_hand(model: PreTrainedModel, tokenizer, prompt: str, completion: str, wanted) -> float:
    """Mean log probability, at each token of the completion, of the ids that are wanted there."""
    ids, start = token_ids(tokenizer, prompt + completion), len(token_ids(tokenizer, prompt))
    log_probs = logits(model, torch.tensor([ids]))[0].log_softmax(-1)
    found = [log_probs[t - 1, wanted(ids[:t])].logsumexp(-1).item() for t in range(start, len(ids))]
    return float(np.mean(found))


def test_bags_score_the_probability_their_words_had_at_each_token(main_model, tokenizer):
    bags = [su.Bag("a", entries=((5,), (17,))), su.Bag("b", entries=((40, 41),))]
    table = pd.DataFrame({"prompt": ["go", "stop it"], "completion": [" HIH", " I"]})
    found = su.attribute_scores(su.PPLM(bags), main_model, tokenizer, table)
    for row, score in zip(table.itertuples(), found, strict=True):
        text = (row.prompt, row.completion)
        one = bag_score_by_hand(main_model, tokenizer, *text, lambda ids: [5, 17])
        two = bag_score_by_hand(main_model, tokenizer, *text, lambda ids: [40, 41] if ids[-1] == 40 else [40])
        assert score == pytest.approx(one + two, abs=1e-4)


def test_a_head_scores_its_class_and_both_add_up(main_model, tokenizer):
    head, bag = ClassifierHead(32, 3, seed=2), su.Bag("a", entries=((5,), (17,)))
    table = pd.DataFrame({"prompt": ["go", "stop it"], "completion": [" on", " now"]})
    of_head = su.PPLM(head=head, target_class_id=2)
    both = su.PPLM(bag, head=head, target_class_id=2)
    scores = [su.attribute_scores(s, main_model, tokenizer, table) for s in (of_head, su.PPLM(bag), both)]
    for i, text in enumerate(table["prompt"] + table["completion"]):
        states = main_model(torch.tensor([token_ids(tokenizer, text)]), output_hidden_states=True)
        mean = states.hidden_states[-1][0].mean(dim=0)
        assert scores[0][i] == pytest.approx(head(mean).log_softmax(-1)[2].item(), abs=1e-4)
    np.testing.assert_allclose(scores[2], scores[0] + scores[1], atol=1e-4)


def test_an_empty_completion_has_the_lowest_score_of_bags(tokenizer):
    table = pd.DataFrame({"prompt": ["go"], "completion": [""]})
    bag = su.PPLM(su.Bag("a", entries=((5,),)))
    assert su.attribute_scores(bag, tiny("gpt2"), tokenizer, table)[0] == -np.inf
