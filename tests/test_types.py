"""What public functions are given is checked against annotations, all of it, and said in plain words."""

import random

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import head_steer, tiny

import steer_utils as su
from steer_utils.measure.metrics import bootstrap, distinct, word_count

BOOLEAN = "persist of PPLM must be True or False, not"
PLACE = "act_name of ActivationAddition must be a text or a whole number, not"
TABLE = pd.DataFrame({"text": ["a"]})


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: su.PPLM(bags="space", persist="no"), f"{BOOLEAN} 'no'"),
        (lambda: su.PPLM(bags="space", persist=1), f"{BOOLEAN} 1"),
        (lambda: su.PPLM(bags="space", num_iterations=True), "must be a whole number, not True"),
        (lambda: su.ActivationAddition(1.0, 1.5, "a"), f"{PLACE} 1.5"),
        (lambda: su.ActivationAddition("1", 1, "a"), "coeff of ActivationAddition must be a number, not '1'"),
        (lambda: su.ActivationAddition(1.0, 1, tokens=[1.5]), "must be a list of whole numbers or None, not"),
        (lambda: su.ActivationAddition(1.0, 1, "half \ud800"), r"must be a text or None, not 'half \\ud800'"),
        (lambda: su.padded([su.ActivationAddition(1.0, 1, "a")] * 9 + [5], None), "a list of ActivationAdd"),
        (lambda: su.Bag("mine", "space"), "words of Bag must be a tuple of texts, not 'space'"),
        (lambda: su.Bag("mine", entries=((-1, "2"),)), "must be a tuple of tuples of token ids, not"),
        (lambda: word_count(TABLE, ["a"]), r"texts of word_count must be a list of texts, not the DataFrame"),
        (lambda: word_count(["a"], "text"), "words of word_count must be several texts, not 'text'"),
        (lambda: su.judges.vader()([*"abc", None]), r"must be a list of texts, not the list \['a', .*None\]"),
        (
            lambda: bootstrap("12"),
            "values of bootstrap must be a list of numbers or a list of True and False",
        ),
        (lambda: distinct("a", 1.0), "n of distinct must be a whole number, not 1.0"),
        (lambda: head_steer().at("3"), "values of at must be a number or a list of numbers or .*, not '3'"),
        (
            lambda: su.SteeringVector(1, [[1.0]]),
            r"rows of SteeringVector must be a tensor, not the list \[\[",
        ),
        (lambda: su.generate(None, None, ["a"]), "model of generate must be a model, not None"),
        (lambda: su.generate(tiny("gpt2"), "gpt2", ["a"]), "must be a tokenizer or None, not 'gpt2'"),
        (lambda: su.generate(tiny("gpt2"), None, {"a"}), "must be a text, messages or a list of them, not"),
        (lambda: su.load(5), "name of load must be a text or Path, not 5"),
    ],
)
def test_what_a_function_does_not_take_is_an_error_that_names_argument_and_value(call, message):
    for _ in range(5):  # beartype alone would look at one item, drawn by chance
        with pytest.raises(su.types.WrongType, match=message):
            call()


def test_numbers_of_numpy_and_columns_of_tables_are_what_they_stand_for():
    steer = su.PPLM(bags="space", num_iterations=np.int64(2), stepsize=np.float32(0.5), persist=np.True_)
    assert (steer.num_iterations, steer.stepsize, steer.persist) == (2, 0.5, True)
    assert word_count(pd.Series(["a b", "b"], index=[7, 8]), {"b"}).tolist() == [1, 1]
    assert bootstrap(np.array([True, False])) == bootstrap([1, 0.0]) == bootstrap(torch.tensor([1, 0]))


def test_what_is_read_once_may_be_an_iterator(tokenizer):
    table = su.generate(tiny("gpt2"), tokenizer, (text for text in ("ab", "c")), max_new_tokens=1, seed=0)
    assert table["prompt"].tolist() == ["ab", "c"]


def test_checking_draws_no_random_numbers(tokenizer):
    random.seed(0)
    before = random.getstate()
    su.encode(tokenizer, ["a", "b"])
    su.metrics.token_log_probs(tiny("gpt2"), tokenizer, [[0, 5, 6], "abc"])
    assert random.getstate() == before
