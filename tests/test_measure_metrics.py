"""Topic words, perplexity by a plain loop over tokens, divergences, and how often intervals hold."""

import copy
import functools
import math

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import CONFIGS, head_steer, llama_like, new_model, tiny
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer
from tokenizers.models import BPE
from transformers import LlamaConfig, PreTrainedModel, PreTrainedTokenizerFast

import steer_utils as su
from steer_utils import hooks
from steer_utils.measure.metrics import (
    Interval,
    bootstrap,
    completion_log_probs,
    distinct,
    next_token_kl,
    next_token_logits,
    perplexity,
    ratio,
    token_log_probs,
    word_count,
    wrong_way,
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


# --- words ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "words", "count"),
    [
        ("", {"bride"}, 0),
        ("The bride smiled.", set(), 0),
        ("Bride, BRIDE and bride!", ["bRide"], 3),
        ("brides bridesmaid unbride bride_1", ["bride"], 0),
        ("'bride'-(bride)…bride's\nbride\tbride", ["bride"], 5),
        ("bride groom bride", ("bride", "groom", "Bride"), 3),
        ("Ein KÖNIG und eine Königin", ["könig"], 1),
        ("A black hole. The Black\nHole, a black-hole", ["black hole"], 3),
        ("black and deep hole, blackhole, black holes", ["black hole"], 0),
        ("a black hole hole black", ["black hole", "hole"], 3),
        ("the bride's groom, the brides groom", ["bride's groom"], 1),
        ("no no no", ["no no"], 2),
    ],
)
def test_whole_words_and_words_in_succession_are_counted_in_any_case(text, words, count):
    assert word_count([text, "nothing"], words).tolist() == [count, 0]


def test_case_counts_where_it_is_asked_for():
    assert word_count(["Bride bride Bride"], ["Bride"], case_sensitive=True).tolist() == [2]


def test_no_texts_have_no_counts_and_a_single_text_is_refused():
    assert word_count([], ["a"]).shape == (0,)
    with pytest.raises(TypeError, match="texts of word_count must be a list of texts, not 'a star'"):
        word_count("a star", ["star"])


def test_an_entry_without_a_word_is_refused():
    with pytest.raises(ValueError, match="every entry needs a letter or a digit"):
        word_count(["a"], ["star", "…"])


@pytest.mark.parametrize(
    ("text", "n", "share"),
    [("a b a b", 1, 0.5), ("a b a b", 2, 2 / 3), ("A a, a!", 1, 1 / 3), ("a", 2, 1), ("", 1, 1)],
)
def test_distinct_is_the_share_of_different_runs_of_words(text, n, share):
    assert distinct(text, n) == pytest.approx(share)


@pytest.mark.parametrize("n", [0, -1])
def test_runs_of_no_words_are_refused(n):
    with pytest.raises(ValueError, match=f"n must be at least 1, not {n}"):
        distinct("a b", n)


@given(st.lists(st.sampled_from("abc"), max_size=30), st.integers(1, 5))
def test_the_different_runs_of_any_text_are_what_counting_by_hand_gives(words, n):
    seen, again = [], 0
    for i in range(len(words) - n + 1):
        again += words[i : i + n] in seen
        seen.append(words[i : i + n])
    assert distinct(" ".join(words), n) == pytest.approx(1 - again / len(seen) if seen else 1.0)


# --- intervals --------------------------------------------------------------------------------------------


def test_the_mean_is_the_mean_and_lies_in_its_interval():
    values = [0.0, 1.0, 1.0, 0.0, 0.25]
    found = bootstrap(values)
    assert found.mean == pytest.approx(sum(values) / len(values))
    assert min(values) <= found.low < found.mean < found.high <= max(values)


def test_values_that_are_all_the_same_have_an_interval_of_no_width():
    assert bootstrap([0.25] * 6) == Interval(0.25, 0.25, 0.25)


def test_an_interval_is_reproducible_moves_no_random_state_and_is_as_wide_as_theory_says():
    values = np.random.default_rng(3).normal(size=200)
    before = np.random.get_state()[1].copy()  # noqa: NPY002
    found = bootstrap(values)
    assert found == bootstrap(values)
    assert np.array_equal(np.random.get_state()[1], before)  # noqa: NPY002
    assert found.high - found.low == pytest.approx(2 * 1.96 * values.std() / math.sqrt(200), rel=0.05)


def test_about_95_of_100_intervals_hold_the_true_mean():
    samples = np.random.default_rng(0).normal(loc=3.0, scale=2.0, size=(200, 30))
    intervals = [bootstrap(sample) for sample in samples]
    assert 0.88 <= np.mean([found.low <= 3.0 <= found.high for found in intervals]) <= 0.98


@pytest.mark.parametrize("values", [[], [1.0]], ids=len)
@pytest.mark.parametrize(
    "estimate", [bootstrap, lambda values: ratio(values, [1] * len(values))], ids=("mean", "ratio")
)
def test_fewer_than_two_values_are_a_value_error_with_their_number(estimate, values):
    with pytest.raises(ValueError, match=f"at least two prompts, not {len(values)}"):
        estimate(values)


@pytest.mark.parametrize(
    ("spec", "shown"), [(".2f", "0.25 [0.12, 0.50]"), (".0%", "25% [12%, 50%]"), ("", "0.25 [0.125, 0.5]")]
)
def test_an_interval_is_formatted_number_by_number(spec, shown):
    assert format(Interval(0.25, 0.125, 0.5), spec) == shown


def test_a_ratio_with_equal_counts_has_the_interval_of_the_mean():
    values = np.random.default_rng(0).normal(size=30)
    np.testing.assert_allclose(ratio(4 * values, [4] * 30), bootstrap(values))


def test_prompts_with_a_count_of_0_do_not_move_a_ratio_and_one_alone_has_no_interval():
    assert ratio([3.0, 0.0, 5.0], [2, 0, 1]) == ratio([3.0, 5.0], [2, 1])
    np.testing.assert_equal(ratio([3.0, 0.0], [2, 0]), (1.5, math.nan, math.nan))
    np.testing.assert_equal(ratio([0.0, 0.0], [0, 0]), (math.nan, math.nan, math.nan))


def test_about_95_of_100_intervals_of_a_ratio_hold_the_true_one():
    rng, held = np.random.default_rng(1), 0
    for _ in range(100):
        counts = rng.integers(1, 20, size=30)
        found = ratio(rng.normal(2.0, 1.0, size=30) * counts, counts)
        held += found.low <= 2.0 <= found.high
    assert 86 <= held <= 99


def test_prompts_whose_score_fell_moved_the_wrong_way_and_ties_stay_in_the_denominator():
    assert wrong_way([0.5, 0.5, 0.5, 0.2], [0.4, 0.5, 0.9, 0.1999]) == bootstrap([1, 0, 0, 1])
    before, after = np.array([0.5, 0.5, 0.5]), np.array([0.4, 0.5, 0.9])
    assert wrong_way(-before, -after) == bootstrap([0, 0, 1])


@pytest.mark.parametrize(
    ("unsteered", "steered"), [([0.1, 0.2], [0.1]), ([0.1, math.nan], [0.1, 0.2])], ids=("numbers", "nan")
)
def test_scores_that_cannot_be_compared_are_refused(unsteered, steered):
    with pytest.raises(ValueError, match="two scores of each prompt, none of them NaN"):
        wrong_way(unsteered, steered)


# --- next-token distributions -----------------------------------------------------------------------------

STEERED, UNSTEERED = torch.randn(2, 5, 4, 31, generator=torch.Generator().manual_seed(0)).double() * 3
SET = [3, 7, 8, 30]


def test_the_kl_is_torch_s_and_tokens_that_were_cut_add_nothing():
    p, q = STEERED.log_softmax(-1), UNSTEERED.log_softmax(-1)
    expected = torch.nn.functional.kl_div(q, p, log_target=True, reduction="none")
    torch.testing.assert_close(next_token_kl(STEERED, UNSTEERED), expected.sum(-1))
    assert (next_token_kl(UNSTEERED, UNSTEERED) == 0).all()
    cut = STEERED.clone()
    cut[..., 5:] = -torch.inf
    p, q = cut[..., :5].softmax(-1), UNSTEERED.softmax(-1)[..., :5]
    torch.testing.assert_close(next_token_kl(cut, UNSTEERED), (p * (p / q).log()).sum(-1))


def test_next_token_logits_of_a_batch_are_those_of_each_prompt_and_feel_a_steer(any_model, tokenizer):
    prompts = [prompt for prompt in PROMPTS if len(prompt) > 3]
    steer = su.ActivationAddition(3, 1, "ab")
    with steer.on(any_model, tokenizer):
        together = next_token_logits(any_model, tokenizer, prompts)
        for prompt, found in zip(prompts, together, strict=True):
            ids = torch.tensor([token_ids(tokenizer, prompt)])
            torch.testing.assert_close(found, any_model(ids).logits[0, -1], atol=2e-4, rtol=1e-4)
    assert (together - next_token_logits(any_model, tokenizer, prompts)).abs().max() > 0.01


@pytest.mark.parametrize("count", [2, 8])
def test_values_for_another_number_of_texts_are_refused(tokenizer, count):
    model, steer = tiny("llama"), head_steer().at([[1.0, 0.0]] * count)
    with steer.on(model), pytest.raises(ValueError, match=f"values for {count} texts do not fit 4 texts"):
        next_token_logits(model, tokenizer, PROMPTS[:4])


def pplm(**settings) -> su.PPLM:
    return su.PPLM(bags=su.Bag("some", entries=((5,), (6,))), stepsize=0.1, gamma=1.0, **settings)


def test_next_token_logits_feel_pplm_unless_steers_are_off(main_model, tokenizer):
    unsteered = next_token_logits(main_model, tokenizer, PROMPTS)
    with pplm(top_k=0).on(main_model):
        found = next_token_logits(main_model, tokenizer, PROMPTS)
        for i, prompt in enumerate(PROMPTS):
            ids = torch.tensor([token_ids(tokenizer, prompt)])
            torch.testing.assert_close(found[i], main_model(ids).logits[0, -1], atol=2e-4, rtol=1e-4)
        with hooks.unsteered():
            assert torch.equal(next_token_logits(main_model, tokenizer, PROMPTS), unsteered)
    assert next_token_kl(found, unsteered)[[0, 2, 3]].min() > 1e-3


def test_a_forward_pass_that_is_not_a_steer_s_is_no_reason_to_refuse_a_text(tokenizer):
    """accelerate replaces `forward` in the model's own namespace too."""
    model = new_model(CONFIGS["gpt2"]())
    expected = token_log_probs(model, tokenizer, PROMPTS[:1])
    model.forward = functools.wraps(model.forward)(functools.partial(model.forward))
    assert torch.equal(token_log_probs(model, tokenizer, PROMPTS[:1])[0], expected[0])


# --- log probabilities of texts ---------------------------------------------------------------------------


def test_token_log_probs_are_those_of_a_loop_over_the_tokens(main_model, tokenizer):
    found = token_log_probs(main_model, tokenizer, COMPLETIONS, batch_size=3)
    for text, log_probs in zip(COMPLETIONS, found, strict=True):
        ids = token_ids(tokenizer, text)
        expected = [-math.log(by_hand(main_model, ids[: i + 1], i)) for i in range(1, len(ids))]
        torch.testing.assert_close(log_probs.tolist(), expected, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("texts", "settings", "error", "message"),
    [
        ("a text", {}, TypeError, "must be a list of texts or of token ids, not 'a text'"),
        (["a", []], {}, ValueError, "the text of index 1 has no tokens"),
        (["a"], {"batch_size": -1}, ValueError, "batch_size must be at least 1, not -1"),
    ],
    ids=("string", "empty", "batch size"),
)
def test_what_is_no_list_of_texts_is_refused(tokenizer, texts, settings, error, message):
    with pytest.raises(error, match=message):
        token_log_probs(tiny("gpt2"), tokenizer, texts, **settings)


def test_values_of_each_text_go_to_their_text_where_logits_are_computed_in_parts(tokenizer, monkeypatch):
    model, values = tiny("llama"), [[1.0], [0.0], [-2.0], [0.5], [3.0]]
    steer = su.LMSteer(*torch.randn(2, 1, 32, 4, generator=torch.Generator().manual_seed(0)), epsilon=0.1)
    monkeypatch.setattr("steer_utils.hf.LOGITS_AT_ONCE", 2 * 33 * 97)  # two texts at a time
    with steer.at(values).on(model):
        found = token_log_probs(model, tokenizer, COMPLETIONS, batch_size=4)
    for text, value, log_probs in zip(COMPLETIONS, values, found, strict=True):
        with steer.at(value).on(model):
            torch.testing.assert_close(
                token_log_probs(model, tokenizer, [text])[0], log_probs, atol=1e-4, rtol=1e-4
            )


def test_a_text_cannot_be_scored_in_one_pass_under_pplm_and_its_completion_is_scored_without(tokenizer):
    model = tiny("llama")
    expected = perplexity(model, tokenizer, PROMPTS, COMPLETIONS)
    with pplm().on(model):
        with pytest.raises(
            ValueError, match=r"cannot score a text in one pass: use measure\.strength\.forced"
        ):
            token_log_probs(model, tokenizer, COMPLETIONS)
        assert np.array_equal(perplexity(model, tokenizer, PROMPTS, COMPLETIONS), expected)


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


def test_perplexity_does_not_depend_on_a_steer_that_is_on(main_model, tokenizer):
    together = perplexity(main_model, tokenizer, PROMPTS, COMPLETIONS)
    with su.ActivationAddition(50.0, 1, "A text longer than some prompts").on(main_model, tokenizer):
        assert np.array_equal(perplexity(main_model, tokenizer, PROMPTS, COMPLETIONS), together)


def test_an_empty_completion_has_no_perplexity_and_leaves_its_neighbours_theirs(tokenizer):
    model = tiny("llama")
    full = perplexity(model, tokenizer, ["The cat", "a"], [" sat", "bc"])
    found = perplexity(model, tokenizer, ["The cat", "The dog", "", "a"], [" sat", "", "", "bc"])
    assert np.isnan(found).tolist() == [False, True, True, False]
    np.testing.assert_allclose(found[[0, 3]], full, rtol=1e-5)
    assert perplexity(model, tokenizer, [], []).shape == (0,)


@pytest.mark.parametrize(
    ("prompts", "completions", "sizes"),
    [
        (["a", "b"], ["c"], "two lists of equal length, not 2 and 1"),
        ("ab", ["c", "d"], "prompts of perplexity must be a list of texts or of token ids, not 'ab'"),
        (["a", "b"], "cd", "completions of perplexity must be a list of texts or of token ids, not 'cd'"),
    ],
    ids=("fewer", "strings", "string"),
)
def test_perplexity_wants_two_lists_of_one_length(tokenizer, prompts, completions, sizes):
    with pytest.raises((TypeError, ValueError), match=sizes):
        perplexity(tiny("gpt2"), tokenizer, prompts, completions)


def test_log_probs_of_completions_add_up_to_their_perplexities(tokenizer):
    model = tiny("gpt2")
    found = completion_log_probs(model, tokenizer, PROMPTS, COMPLETIONS)
    assert [len(log_probs) for log_probs in found] == list(map(len, COMPLETIONS))  # a token is a character
    expected = perplexity(model, tokenizer, PROMPTS, COMPLETIONS)
    np.testing.assert_allclose([math.exp(-x.sum() / len(x)) for x in found], expected, rtol=1e-5)


def test_token_ids_are_taken_as_they_are():
    model = tiny("gpt2")
    (found,) = completion_log_probs(model, None, [[7, 9]], [[3, 0, 5]])  # no BOS in front, one inside
    assert len(found) == 3
    assert math.exp(-found.mean()) == pytest.approx(by_hand(model, [7, 9, 3, 0, 5], 2), rel=1e-4)


def test_a_prompt_without_ids_is_refused_and_an_empty_text_is_bos(tokenizer):
    model = tiny("gpt2")
    with pytest.raises(ValueError, match="the text of index 1 has no tokens: its ids must begin with BOS"):
        completion_log_probs(model, None, [[0], []], [[3], [5, 6]])
    (found,) = completion_log_probs(model, tokenizer, [""], ["Hi"])
    assert torch.equal(found, token_log_probs(model, tokenizer, ["Hi"])[0])


@pytest.mark.parametrize(("prompt", "completion"), [("The cat", " sat."), ("", "Hi"), ("é", "é")])
def test_prompt_and_completion_are_one_text_for_a_tokenizer_that_puts_a_space_in_front(prompt, completion):
    config: LlamaConfig = copy.deepcopy(tiny("llama").config)
    config.vocab_size = 400
    model, tokenizer = new_model(config), llama_like()
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


def test_the_best_of_one_is_the_one_and_scores_come_along():
    best = su.best_of(TABLE.head(1), [0.25])
    assert best["score"].tolist() == [0.25]
    assert best["completion"].tolist() == ["a b c d"]


def test_another_number_of_scores_is_a_value_error():
    with pytest.raises(ValueError, match=r"6 scores, .* not 1"):
        su.best_of(TABLE, [1.0])


def test_a_prompt_given_twice_is_two_prompts():
    twice = pd.concat([TABLE.head(3), TABLE.head(3), TABLE.tail(3)], ignore_index=True)
    best = su.best_of(twice, [1, 3, 2, 9, 8, 7, 1, 2, 1])
    assert best["prompt"].tolist() == ["one", "one", "two"]
    assert best["sample"].tolist() == [1, 0, 1]


def test_a_missing_score_is_never_the_best_and_a_prompt_without_any_is_a_value_error():
    assert kept([math.nan, -3, -2, math.nan, math.nan, 4]) == [("one", 2), ("two", 2)]
    with pytest.raises(ValueError, match="the prompt 'two' has a score: all are NaN"):
        su.best_of(TABLE, [1, 2, 3, math.nan, math.nan, math.nan])
