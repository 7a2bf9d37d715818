"""Numbers about the samples of a prompt, against sums done by hand and against simulated prompts."""

import math

import numpy as np
import pytest

from steer_utils.measure.group_metrics import (
    attribute_of_groups,
    distinct_of_group,
    perplexity_of_groups,
    ratio,
    share_of_groups,
    wrong_way,
)
from steer_utils.measure.metrics import Interval, bootstrap, distinct

# --- distinct-n -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("texts", "n", "share"),
    [
        (["a b a", "a c"], 1, 3 / 5),
        (["a b a", "a c"], 2, 3 / 5),  # ab, ba, ac
        (["a b a", "a c"], 3, 1 / 5),  # over words still
        (["x", "x", "x"], 1, 1 / 3),
        (["a  b"], 1, 1.0),  # a, nothing, b
        (["", ""], 1, 1 / 2),
        ([" a", " a"], 2, 1 / 4),
        (["A a"], 1, 1.0),
        (["a\nb"], 1, 1.0),  # one word
        (["x"], 2, 0.0),
        (["a b", "c"], 2, 1 / 3),  # no run goes over the end of a text
    ],
)
def test_runs_of_all_texts_count_once_over_the_number_of_words(texts, n, share):
    assert distinct_of_group(texts, n) == pytest.approx(share)


def test_the_two_conventions_differ():
    text = "a b a"
    assert distinct(text, 2) == 1.0  # two runs, both different
    assert distinct_of_group([text], 2) == pytest.approx(2 / 3)


def test_a_prompt_without_texts_has_no_distinct_n():
    with pytest.raises(ValueError, match="at least one text"):
        distinct_of_group([], 1)


# --- attributes -------------------------------------------------------------------------------------------


def test_the_maximum_is_averaged_and_prompts_are_counted_not_samples():
    found = attribute_of_groups([[0.1, 0.9, 0.8], [0.5, 0.2, 0.3], [0.51, 0.0, 0.0], [0.0, 0.1, 0.2]])
    assert found.average_maximum.mean == pytest.approx((0.9 + 0.5 + 0.51 + 0.2) / 4)
    assert found.probability.mean == 0.5  # exactly 0.5 is not above it
    assert found.average_maximum == bootstrap([0.9, 0.5, 0.51, 0.2])


def test_the_share_is_averaged_over_prompts():
    found = share_of_groups([[0.9, 0.9], [0.9, 0.1, 0.1, 0.1], [0.5, 0.5]])
    assert found == bootstrap([1.0, 0.25, 0.0])


@pytest.mark.parametrize("measure", [attribute_of_groups, share_of_groups])
def test_a_prompt_without_samples_is_named(measure):
    with pytest.raises(ValueError, match="prompt 2 of 3"):
        measure([[0.1], [], [0.2]])


@pytest.mark.parametrize("measure", [attribute_of_groups, share_of_groups])
def test_one_prompt_has_no_interval(measure):
    with pytest.raises(ValueError, match="at least two prompts, not 1"):
        measure([[0.1, 0.2]])


# --- the wrong way ----------------------------------------------------------------------------------------


def test_prompts_whose_score_fell_moved_the_wrong_way_and_ties_stay_in_the_denominator():
    found = wrong_way([0.5, 0.5, 0.5, 0.2], [0.4, 0.5, 0.9, 0.1999])
    assert found == bootstrap([1, 0, 0, 1])
    assert wrong_way([0.3, 0.4], [0.3, 0.4]).mean == 0


def test_a_score_that_was_to_fall_is_given_as_its_negative():
    plain, steered = np.array([0.5, 0.5, 0.5]), np.array([0.4, 0.5, 0.9])
    assert wrong_way(-plain, -steered) == bootstrap([0, 0, 1])


@pytest.mark.parametrize(
    ("plain", "steered", "message"),
    [
        ([0.1, 0.2], [0.1], r"\(2,\) and \(1,\)"),
        ([[0.1], [0.2]], [[0.1], [0.2]], r"\(2, 1\)"),
        ([0.1, math.nan], [0.1, 0.2], "1 of 2 prompts have a score of NaN"),
        ([0.1], [0.1], "at least two prompts, not 1"),
    ],
)
def test_scores_that_cannot_be_compared_are_refused(plain, steered, message):
    with pytest.raises(ValueError, match=message):
        wrong_way(plain, steered)


# --- perplexity -------------------------------------------------------------------------------------------


def test_outliers_and_empty_continuations_are_left_out_of_the_mean_and_counted():
    nats = math.log(1e4)
    found = perplexity_of_groups([[2.0, 3 * nats, 0.0], [8.0, 6.0]], [[2, 3, 0], [4, 2]])
    assert found.mean.mean == pytest.approx((math.e + math.e**2 + math.e**3) / 3)
    assert found.left_out == 2
    assert found.total.mean == pytest.approx(math.exp((2 + 3 * nats + 8 + 6) / 11))
    just_below = perplexity_of_groups([[2.0, 3 * nats - 1e-6], [8.0]], [[2, 3], [4]])
    assert just_below.left_out == 0


def test_a_perplexity_beyond_all_numbers_is_an_outlier():
    assert perplexity_of_groups([[1.0, 1000.0], [1.0], [2.0]], [[1, 1], [1], [1]]).left_out == 1


def test_where_every_continuation_is_an_outlier_there_is_no_mean():
    found = perplexity_of_groups([[10.0], [10.0]], [[1], [1]])
    assert np.isnan(found.mean).all()
    assert found.left_out == 2
    assert found.total.mean == pytest.approx(math.exp(10))


def test_empty_continuations_alone_have_no_perplexity_at_all():
    found = perplexity_of_groups([[0.0], [0.0]], [[0], [0]])
    assert np.isnan(found.mean).all()
    assert np.isnan(found.total).all()


@pytest.mark.parametrize("groups", [[], [[1.0, 2.0]]])
def test_fewer_than_two_prompts_are_a_value_error(groups):
    with pytest.raises(ValueError, match=f"at least two prompts, not {len(groups)}"):
        perplexity_of_groups(groups, [[1] * len(group) for group in groups])


def test_equal_counts_give_the_ratio_the_interval_of_the_mean():
    values = np.random.default_rng(0).normal(size=30)
    np.testing.assert_allclose(ratio(4 * values, [4] * 30), bootstrap(values))


def test_prompts_with_nothing_to_say_do_not_move_a_ratio_and_one_alone_has_no_interval():
    assert ratio([3.0, 0.0, 5.0], [2, 0, 1]) == ratio([3.0, 5.0], [2, 1])
    alone = ratio([3.0, 0.0], [2, 0])
    assert alone.mean == 1.5
    assert np.isnan(alone[1:]).all()


def test_about_95_of_100_intervals_of_a_ratio_hold_the_true_one():
    rng, held = np.random.default_rng(1), 0
    for _ in range(100):
        counts = rng.integers(1, 20, size=30)
        found = ratio(rng.normal(2.0, 1.0, size=30) * counts, counts)
        assert isinstance(found, Interval)
        held += found.low <= 2.0 <= found.high
    assert 86 <= held <= 99
