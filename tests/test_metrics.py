"""Topic words, perplexity by a plain loop, and how often intervals hold what they should."""

import copy
import math

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import CONFIGS, llama_like, new_model, tiny
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer
from tokenizers.models import BPE
from transformers import LlamaConfig, PreTrainedModel, PreTrainedTokenizerFast

import steer_utils as su
from steer_utils.measure.metrics import (
    Interval,
    bootstrap,
    completion_log_probs,
    disruption,
    distinct,
    effectiveness,
    kl_contributions,
    log_prob_gains,
    next_token_kl,
    next_token_logits,
    perplexity,
    repetition,
    token_log_probs,
    topic_hits,
    word_count,
)
from steer_utils.models import token_ids

PROMPTS = ["Once upon a time", "", "The cat", "I hate you because", "a"]
COMPLETIONS = [" there was a queen.", "Hello", " sat on the mat, and on the rug.", "!", "bcd\nefg"]


@torch.no_grad()
def by_hand(model: PreTrainedModel, ids: list[int], start: int) -> float:
    """exp of the mean of −log p(token | all before it) for the tokens from `start` on, one by one."""
    scores = model(torch.tensor([ids])).logits[0].double()
    surprise = [-scores[i - 1].log_softmax(-1)[ids[i]].item() for i in range(start, len(ids))]
    return math.exp(sum(surprise) / len(surprise))


# --- topic words ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "words", "count"),
    [
        ("", {"bride"}, 0),
        ("The bride smiled.", {"bride"}, 1),
        ("The bride smiled.", set(), 0),
        ("Bride, BRIDE and bride!", ["bride"], 3),
        ("the bride", ["BRIDE"], 1),
        ("brides bridesmaid unbride bride_1", ["bride"], 0),
        ("'bride'-(bride)…bride's\nbride\tbride", ["bride"], 5),
        ("bride groom bride", ("bride", "groom"), 3),
        ("Ein KÖNIG und eine Königin", ["könig"], 1),
        ("in 2024", ["2024"], 1),
    ],
)
def test_every_whole_word_of_the_list_counts_whatever_its_case_and_punctuation(text, words, count):
    assert word_count(text, words) == count


@pytest.mark.parametrize(("words", "count"), [(["bride"], 1), (["Bride"], 2), (["bride", "Bride"], 3)])
def test_case_counts_where_it_is_asked_for(words, count):
    assert word_count("Bride bride Bride", words, case_sensitive=True) == count


def test_a_word_that_the_list_has_twice_counts_once():
    assert word_count("the bride", ["bride", "Bride", "bride"]) == 1


@pytest.mark.parametrize(
    ("text", "n", "share"),
    [
        ("a b a b", 1, 0.5),
        ("a b a b", 2, 2 / 3),
        ("a b a b", 3, 1.0),
        ("A a, a!", 1, 1 / 3),
        ("a", 2, 1.0),
        ("", 1, 1.0),
    ],
)
def test_distinct_counts_different_runs_of_words_over_all_runs(text, n, share):
    assert distinct(text, n) == pytest.approx(share)


@pytest.mark.parametrize(
    ("text", "n", "share"),
    [
        ("a b a b a b", 1, 4 / 6),  # of six words, four stood there before
        ("a b a b a b", 2, 3 / 5),  # ab ba ab ba ab
        ("a b a b a b", 4, 1 / 3),  # abab baba abab
        ("A a, a!", 1, 2 / 3),
        ("one two three four five", 4, 0.0),
        ("a a a", 4, 0.0),
        ("", 1, 0.0),
    ],
)
def test_repetition_is_the_share_of_runs_that_stood_there_before(text, n, share):
    assert repetition(text, n) == pytest.approx(share)


def test_runs_of_four_words_repeat_unless_another_number_is_given():
    text = "so it goes on and so it goes on"
    assert repetition(text) == repetition(text, 4) == pytest.approx(1 / 6)


@given(st.lists(st.sampled_from("abc"), max_size=30), st.integers(1, 5))
def test_repetition_of_any_text_is_what_counting_by_hand_gives(words, n):
    seen, again = [], 0
    for i in range(len(words) - n + 1):
        again += words[i : i + n] in seen
        seen.append(words[i : i + n])
    assert repetition(" ".join(words), n) == pytest.approx(again / len(seen) if seen else 0.0)


@pytest.mark.parametrize(
    ("text", "words", "hit"),
    [
        ("A black hole.", ["black hole"], True),
        ("The Black\nHole, they say", ["black hole"], True),
        ("black-hole", ["black hole"], True),
        ("black and deep hole", ["black hole"], False),
        ("blackhole, black holes", ["black hole"], False),
        ("stars", ["star"], False),
        ("a star", ["planet", "Star"], True),
        ("bride's", ["bride"], True),
        ("", ["star"], False),
    ],
)
def test_a_topic_is_hit_by_whole_words_and_by_words_in_succession(text, words, hit):
    found = topic_hits([text, "nothing"], words)
    assert found.tolist() == [hit, False]


@given(st.text("ab _'-.", max_size=20), st.sampled_from(["a", "b", "ab", "B"]))
def test_single_words_hit_where_they_are_counted(text, word):
    assert topic_hits([text], [word])[0] == (word_count(text, [word]) > 0)


@pytest.mark.parametrize("words", [[], ["star", " "], ["…"]])
def test_a_topic_without_words_is_refused(words):
    with pytest.raises(ValueError, match="a topic needs words"):
        topic_hits(["a"], words)


# --- perplexity -------------------------------------------------------------------------------------------


def test_perplexity_is_that_of_a_plain_loop_over_the_tokens(any_model, tokenizer):
    expected = []
    for prompt, completion in zip(PROMPTS, COMPLETIONS, strict=True):
        ids = token_ids(tokenizer, prompt + completion)
        expected.append(by_hand(any_model, ids, len(prompt) + 1))  # a token is a character; BOS is in front
    found = perplexity(any_model, tokenizer, PROMPTS, COMPLETIONS)
    assert found.shape == (5,)
    np.testing.assert_allclose(found, expected, rtol=1e-4)


def test_perplexity_sees_the_soft_cap_of_the_logits(tokenizer):
    config = CONFIGS["gemma2"]()
    config.final_logit_softcapping = 0.5
    model = new_model(config)  # the same weights as the shared one, and nearly no preferences
    ids = token_ids(tokenizer, "The cat sat")
    capped, free = (perplexity(one, tokenizer, ["The cat"], [" sat"])[0] for one in (model, tiny("gemma2")))
    assert capped == pytest.approx(by_hand(model, ids, 8), rel=1e-4)
    assert 97 / math.e < capped < 97 * math.e  # logits within ±0.5 leave each of 97 tokens about as likely
    assert abs(math.log(capped / free)) > 0.1


@pytest.mark.parametrize("batch_size", [1, 2, 3, 64])
def test_perplexity_does_not_depend_on_the_batch_size(any_model, tokenizer, batch_size):
    alone = [
        perplexity(any_model, tokenizer, [prompt], [completion])[0]
        for prompt, completion in zip(PROMPTS, COMPLETIONS, strict=True)
    ]
    found = perplexity(any_model, tokenizer, PROMPTS, COMPLETIONS, batch_size=batch_size)
    np.testing.assert_allclose(found, alone, rtol=1e-4)


def test_perplexity_is_that_of_the_plain_model_while_a_steer_is_on(any_model, tokenizer):
    plain = perplexity(any_model, tokenizer, PROMPTS, COMPLETIONS)
    with su.ActivationAddition(50.0, 1, "A text longer than some prompts").on(any_model, tokenizer):
        assert np.array_equal(perplexity(any_model, tokenizer, PROMPTS, COMPLETIONS), plain)


def test_an_empty_completion_has_no_perplexity_and_leaves_its_neighbours_theirs(main_model, tokenizer):
    full = perplexity(main_model, tokenizer, ["The cat", "a"], [" sat", "bc"])
    found = perplexity(main_model, tokenizer, ["The cat", "The dog", "", "a"], [" sat", "", "", "bc"])
    assert np.isnan(found).tolist() == [False, True, True, False]
    np.testing.assert_allclose(found[[0, 3]], full, rtol=1e-5)


def test_no_texts_have_no_perplexities(tokenizer):
    assert perplexity(tiny("gpt2"), tokenizer, [], []).shape == (0,)


@pytest.mark.parametrize(
    ("prompts", "completions"),
    [
        (["a", "b"], ["c"]),
        (["a"], ["c", "d"]),
        ([], ["c"]),
        ("ab", "cd"),
        ("ab", ["c", "d"]),
        (["a", "b"], "cd"),
    ],
)
def test_perplexity_wants_two_lists_of_one_length(tokenizer, prompts, completions):
    with pytest.raises(ValueError, match="two lists of equal length"):
        perplexity(tiny("gpt2"), tokenizer, prompts, completions)


def test_log_probs_of_completions_add_up_to_their_perplexities(main_model, tokenizer):
    found = completion_log_probs(main_model, tokenizer, PROMPTS, COMPLETIONS)
    assert [len(log_probs) for log_probs in found] == list(map(len, COMPLETIONS))  # a token is a character
    expected = perplexity(main_model, tokenizer, PROMPTS, COMPLETIONS)
    np.testing.assert_allclose([math.exp(-x.sum() / len(x)) for x in found], expected, rtol=1e-5)


def test_token_ids_are_taken_as_they_are(main_model):
    (found,) = completion_log_probs(main_model, None, [[7, 9]], [[3, 0, 5]])  # no BOS in front, one inside
    assert len(found) == 3
    assert math.exp(-found.mean()) == pytest.approx(by_hand(main_model, [7, 9, 3, 0, 5], 2), rel=1e-4)


def wide_vocabulary() -> PreTrainedModel:
    """A tiny Llama for tokenizers with up to 400 tokens."""
    config: LlamaConfig = copy.deepcopy(tiny("llama").config)
    config.vocab_size = 400
    return new_model(config)


@pytest.mark.parametrize(
    ("prompt", "completion"), [("The cat", " sat."), ("The cat", "s"), ("", "Hi"), ("é", "é")]
)
def test_prompt_and_completion_are_one_text_for_a_tokenizer_that_puts_a_space_in_front(prompt, completion):
    model, tokenizer = wide_vocabulary(), llama_like()
    ids = tokenizer(prompt + completion)["input_ids"]  # its own template gives the one BOS
    count = len(completion.encode())  # letters and the bytes of é: no space of its own in front
    if not prompt:
        count += 1  # the space in front of the whole text is not in the empty prompt
    found = perplexity(model, tokenizer, [prompt], [completion])
    np.testing.assert_allclose(found, by_hand(model, ids, len(ids) - count), rtol=1e-4)


def test_a_token_that_joins_prompt_and_completion_belongs_to_the_completion():
    vocabulary = {token: i for i, token in enumerate(["<s>", "a", "b", "c", "bc", "d"])}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(BPE(vocabulary, [("b", "c")])), bos_token="<s>", eos_token="<s>"
    )
    model = tiny("llama")
    found = perplexity(model, tokenizer, ["aab", "ab"], ["cd", "d"])
    expected = [by_hand(model, [0, 1, 1, 4, 5], 3), by_hand(model, [0, 1, 2, 5], 3)]
    np.testing.assert_allclose(found, expected, rtol=1e-4)


# --- next-token distributions -----------------------------------------------------------------------------

STEERED, PLAIN = torch.randn(2, 5, 4, 31, generator=torch.Generator().manual_seed(0)).double() * 3
SET = [3, 7, 8, 30]


def test_the_kl_is_torch_s_and_the_sum_of_its_contributions():
    p, q = STEERED.log_softmax(-1), PLAIN.log_softmax(-1)
    expected = torch.nn.functional.kl_div(q, p, log_target=True, reduction="none")
    torch.testing.assert_close(kl_contributions(STEERED, PLAIN), expected)
    torch.testing.assert_close(next_token_kl(STEERED, PLAIN), expected.sum(-1))
    assert (next_token_kl(PLAIN, PLAIN) == 0).all()


def test_tokens_that_were_cut_add_nothing_to_the_kl_and_the_rest_is_renormalised():
    cut = STEERED.clone()
    cut[..., 5:] = -torch.inf
    p, q = cut[..., :5].softmax(-1), PLAIN.softmax(-1)[..., :5]
    torch.testing.assert_close(next_token_kl(cut, PLAIN), (p * (p / q).log()).sum(-1))


def test_effectiveness_is_the_log_ratio_of_the_sets_probabilities():
    p, q = (logits.softmax(-1)[..., SET].sum(-1) for logits in (STEERED, PLAIN))
    torch.testing.assert_close(effectiveness(STEERED, PLAIN, SET), (p / q).log())
    assert (effectiveness(STEERED, PLAIN, []) == 0).all()


def test_disruption_is_the_kl_inside_the_set_and_outside_of_it():
    outside = [token for token in range(STEERED.shape[-1]) if token not in SET]
    expected = torch.zeros(STEERED.shape[:-1], dtype=torch.float64)
    for tokens in (SET, outside):
        within = [logits[..., tokens].log_softmax(-1) for logits in (STEERED, PLAIN)]
        share = STEERED.softmax(-1)[..., tokens].sum(-1)
        expected += share * (within[0].exp() * (within[0] - within[1])).sum(-1)
    torch.testing.assert_close(disruption(STEERED, PLAIN, SET), expected)
    assert (disruption(STEERED, PLAIN, SET) >= 0).all()
    torch.testing.assert_close(disruption(STEERED, PLAIN, []), next_token_kl(STEERED, PLAIN))


def test_raising_a_set_without_touching_the_rest_disrupts_nothing():
    raised = PLAIN.clone()
    raised[..., SET] += 2.0
    torch.testing.assert_close(disruption(raised, PLAIN, SET), torch.zeros(5, 4, dtype=torch.float64))
    assert (effectiveness(raised, PLAIN, SET) > 0).all()


def test_next_token_logits_of_a_batch_are_those_of_each_prompt_and_feel_a_steer(any_model, tokenizer):
    prompts = [prompt for prompt in PROMPTS if len(prompt) > 3]
    steer = su.ActivationAddition(3, 1, "ab")
    with steer.on(any_model, tokenizer):
        together = next_token_logits(any_model, tokenizer, prompts)
        for prompt, found in zip(prompts, together, strict=True):
            ids = torch.tensor([token_ids(tokenizer, prompt)])
            torch.testing.assert_close(found, any_model(ids).logits[0, -1], atol=2e-4, rtol=1e-4)
    assert (together - next_token_logits(any_model, tokenizer, prompts)).abs().max() > 0.01


# --- texts ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_token_log_probs_are_those_of_a_loop_over_the_tokens(any_model, tokenizer, batch_size):
    found = token_log_probs(any_model, tokenizer, COMPLETIONS, batch_size=batch_size)
    for text, log_probs in zip(COMPLETIONS, found, strict=True):
        ids = token_ids(tokenizer, text)
        expected = [-math.log(by_hand(any_model, ids[: i + 1], i)) for i in range(1, len(ids))]
        torch.testing.assert_close(log_probs.tolist(), expected, atol=2e-4, rtol=1e-4)


def test_log_prob_gains_are_steered_minus_plain_without_the_first_ones(main_model, tokenizer):
    steer, texts = su.ActivationAddition(4, 1, "ab"), ["Once upon", [0, 5, 9, 11, 40]]
    plain = token_log_probs(main_model, tokenizer, texts)
    with steer.on(main_model, tokenizer):
        steered = token_log_probs(main_model, tokenizer, texts)
        inside = log_prob_gains(main_model, tokenizer, texts, 0 * steer)  # its own plain pass stays plain
    for gains, after, before in zip(
        log_prob_gains(main_model, tokenizer, texts, steer, skip=3), steered, plain, strict=True
    ):
        torch.testing.assert_close(gains, (after - before)[3:])
        assert gains.abs().max() > 1e-3
    torch.testing.assert_close(inside, [after - before for after, before in zip(steered, plain, strict=True)])


# --- intervals --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "values", [[1, 2], [0.0, 1.0, 1.0, 0.0, 0.25], np.arange(40), torch.rand(9).tolist()]
)
def test_the_mean_is_the_mean_and_lies_in_its_interval(values):
    found = bootstrap(values)
    assert isinstance(found, Interval)
    assert found.mean == pytest.approx(sum(values) / len(values))
    assert found.low < found.mean < found.high
    assert min(values) <= found.low
    assert found.high <= max(values)


def test_values_that_are_all_the_same_have_an_interval_of_no_width():
    assert bootstrap([0.25] * 6) == Interval(0.25, 0.25, 0.25)


def test_an_interval_is_reproducible_and_moves_no_global_random_state():
    values = np.random.default_rng(3).normal(size=20)
    before = np.random.get_state()[1].copy()  # noqa: NPY002
    assert bootstrap(values) == bootstrap(values)
    assert bootstrap(values, seed=1) == bootstrap(values, seed=1)
    assert bootstrap(values, seed=1) != bootstrap(values, seed=2)
    assert np.array_equal(np.random.get_state()[1], before)  # noqa: NPY002


def test_a_higher_level_gives_a_wider_interval():
    values = np.random.default_rng(4).normal(size=20)
    widths = [
        found.high - found.low for found in (bootstrap(values, level=x) for x in (0.5, 0.8, 0.95, 0.99))
    ]
    assert widths == sorted(set(widths))
    normal = 2 * values.std() / math.sqrt(20) * np.array([0.6745, 1.2816, 1.9600, 2.5758])
    np.testing.assert_allclose(widths, normal, rtol=0.15)  # what the normal distribution says of means


def test_about_95_of_100_intervals_hold_the_true_mean():
    samples = np.random.default_rng(0).normal(loc=3.0, scale=2.0, size=(200, 30))
    intervals = [bootstrap(sample) for sample in samples]
    assert 0.88 <= np.mean([found.low <= 3.0 <= found.high for found in intervals]) <= 0.98


@pytest.mark.parametrize("values", [[], [1.0]])
def test_fewer_than_two_values_are_a_value_error_with_their_number(values):
    with pytest.raises(ValueError, match=f"at least two.*{len(values)}"):
        bootstrap(values)


@pytest.mark.parametrize(
    ("spec", "shown"),
    [(".2f", "0.25 [0.12, 0.50]"), (".0%", "25% [12%, 50%]"), ("", "0.25 [0.125, 0.5]")],
)
def test_an_interval_is_formatted_number_by_number(spec, shown):
    assert format(Interval(0.25, 0.125, 0.5), spec) == shown


# --- best of several --------------------------------------------------------------------------------------

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


def test_a_prompt_given_twice_is_two_prompts():
    twice = pd.concat([TABLE.head(3), TABLE.head(3), TABLE.tail(3)], ignore_index=True)
    best = su.best_of(twice, [1, 3, 2, 9, 8, 7, 1, 2, 1])
    assert best["prompt"].tolist() == ["one", "one", "two"]
    assert best["sample"].tolist() == [1, 0, 1]


def test_a_missing_score_is_never_the_best_and_a_prompt_without_any_is_a_value_error():
    assert kept([math.nan, -3, -2, math.nan, math.nan, 4]) == [("one", 2), ("two", 2)]
    with pytest.raises(ValueError, match="the prompt 'two' has a score: all are NaN"):
        su.best_of(TABLE, [1, 2, 3, math.nan, math.nan, math.nan])
