"""Completions: their random numbers, what they are drawn from, and what reaches `model.generate`."""

import contextlib
import copy
import random
from collections.abc import Callable, Iterator

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import assert_same_up_to_rounding, hook_count, logits, padded, tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    PreTrainedModel,
    StoppingCriteria,
    TopPLogitsWarper,
)
from transformers.generation.streamers import BaseStreamer

import steer_utils as su
from steer_utils import generation, hf, hooks
from steer_utils.sampling import Draw, FrequencyPenalty, TopP, sampling_processors

HOOK = "blocks.1.hook_resid_pre"
PROMPTS = ["", "a", "Once upon a time", "The cat, ", "I hate you because you are"]


def completions(table: pd.DataFrame) -> dict[tuple[str, int], str]:
    return {(row.prompt, row.sample): row.completion for row in table.itertuples()}


def by_hand(model: PreTrainedModel, tokenizer, prompt: str, **kwargs) -> str:
    """The completion of one prompt by transformers alone."""
    ids = torch.tensor([[0, *tokenizer(prompt)["input_ids"]]])
    settings = {"do_sample": False, "pad_token_id": 0, "attention_mask": torch.ones_like(ids)} | kwargs
    row = model.generate(ids, **settings)[0]
    return tokenizer.decode(row[ids.shape[1] :], skip_special_tokens=True)


class Edit:
    """A steer that changes the residual stream in one block."""

    def __init__(self, change: Callable[[Tensor], Tensor]) -> None:
        self.change = change

    @contextlib.contextmanager
    def on(self, model: PreTrainedModel, tokenizer=None) -> Iterator[None]:
        with hooks.edit_activation(model, HOOK, lambda hidden, positions, lengths: self.change(hidden)):
            yield


FLIP = Edit(lambda hidden: hidden.flip(-1))


class End(LogitsProcessor):
    """Make batch row r end after `after[r]` new tokens, and not before."""

    def __init__(self, prompt_tokens: int, after: list[int]) -> None:
        self.prompt_tokens, self.after = prompt_tokens, torch.tensor(after)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        due = self.after <= input_ids.shape[1] - self.prompt_tokens
        scores = scores.clone()
        scores[:, 0] = torch.where(due, 1e4, -torch.inf)
        return scores


# --- the table --------------------------------------------------------------------------------------------


def test_the_table_has_a_row_for_each_sample_in_the_order_of_the_prompts(unlike_model, tokenizer):
    prompts = ["long prompt comes first", "b", "and a", "b"]
    table = su.generate(
        unlike_model, tokenizer, prompts, num_samples=2, max_new_tokens=3, seed=0, batch_size=3
    )
    assert list(table.columns) == ["prompt", "sample", "completion", "steered", "loss"]
    assert table["prompt"].tolist() == [prompt for prompt in prompts for _ in range(2)]
    assert table["sample"].tolist() == [0, 1] * 4
    assert table["steered"].tolist() == [False] * 8
    assert table.index.tolist() == list(range(8))


def test_a_prompt_alone_needs_no_list(unlike_model, tokenizer):
    one = su.generate(unlike_model, tokenizer, "abc", max_new_tokens=4, seed=1)
    assert one.equals(su.generate(unlike_model, tokenizer, ["abc"], max_new_tokens=4, seed=1))
    assert len(one) == 1


def test_max_new_tokens_is_the_number_of_new_tokens(unlike_model, tokenizer):
    endless = [End(0, after=[1000])]
    table = su.generate(
        unlike_model, tokenizer, PROMPTS, num_samples=3, max_new_tokens=7, seed=0, logits_processor=endless
    )
    assert table["completion"].map(len).tolist() == [7] * len(table)  # a character a token


# --- independence -----------------------------------------------------------------------------------------


SAMPLING = {
    "default": {},
    "repetition": {"repetition_penalty": 1.4},
    "frequency": {"freq_penalty": 0.8},
    "top-k": {"temperature": 0.7, "top_k": 20, "top_p": 1.0},
    "greedy": {"do_sample": False, "repetition_penalty": 1.3, "freq_penalty": 0.5},
}


@pytest.mark.parametrize("sampling", SAMPLING)
def test_a_batch_of_unequal_prompts_gives_the_completions_of_each_prompt_alone(
    unlike_model, tokenizer, sampling
):
    settings = {"num_samples": 3, "max_new_tokens": 12, "seed": 5, **SAMPLING[sampling]}
    together = completions(su.generate(unlike_model, tokenizer, PROMPTS, **settings))
    alone = {}
    for prompt in PROMPTS:
        alone |= completions(su.generate(unlike_model, tokenizer, prompt, **settings))
    assert together == alone


def test_completions_do_not_depend_on_the_batch_size(unlike_model, tokenizer):
    settings = {"num_samples": 5, "max_new_tokens": 8, "seed": 2, "freq_penalty": 0.3}
    expected = su.generate(unlike_model, tokenizer, PROMPTS, **settings)
    for batch_size in (1, 7):
        found = su.generate(unlike_model, tokenizer, PROMPTS, batch_size=batch_size, **settings)
        assert_same_up_to_rounding(found, expected)


def test_the_first_samples_do_not_depend_on_how_many_follow(unlike_model, tokenizer):
    few, many = (
        completions(su.generate(unlike_model, tokenizer, PROMPTS, num_samples=n, max_new_tokens=6, seed=3))
        for n in (2, 5)
    )
    assert few.items() <= many.items()


def test_a_batch_is_never_larger_than_batch_size(unlike_model, tokenizer):
    sizes = []
    handle = hf.lm_head(unlike_model).register_forward_hook(lambda _, args, out: sizes.append(out.shape[0]))
    su.generate(unlike_model, tokenizer, PROMPTS, num_samples=5, max_new_tokens=1, seed=0, batch_size=4)
    handle.remove()
    assert max(sizes) <= 4


def test_a_prompt_is_read_once_whatever_the_number_of_samples(unlike_model, tokenizer):
    read = []
    handle = hf.block(unlike_model, 0).register_forward_hook(
        lambda module, args, kwargs, out: read.append(
            (args[0] if args else kwargs["hidden_states"]).shape[:2].numel()
        ),
        with_kwargs=True,
    )
    su.generate(unlike_model, tokenizer, "x" * 49, num_samples=6, max_new_tokens=2, seed=0, eos_token_id=None)
    handle.remove()
    assert (
        sum(read) == 49 + 6 + 6
    )  # 50 tokens of the prompt but the last; the last and one new one for each sample


# --- agreement with `model.generate` ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "kwargs", [{}, {"use_cache": False}, {"num_beams": 3}], ids=["cache", "none", "beams"]
)
def test_greedy_and_beam_completions_are_those_of_model_generate(main_model, tokenizer, kwargs):
    expected = {
        prompt: by_hand(main_model, tokenizer, prompt, max_new_tokens=10, **kwargs) for prompt in PROMPTS
    }
    for count in (1, 2):
        given = {"num_samples": count, "max_new_tokens": 10, "do_sample": False, **kwargs}
        found = completions(su.generate(main_model, tokenizer, PROMPTS, **given))
        assert found == {(prompt, i): expected[prompt] for prompt in PROMPTS for i in range(count)}


def test_sampling_without_the_cache_agrees_with_sampling_on_it(unlike_model, tokenizer):
    settings = {"num_samples": 2, "max_new_tokens": 10, "seed": 4}
    expected = su.generate(unlike_model, tokenizer, PROMPTS, **settings)
    found = su.generate(unlike_model, tokenizer, PROMPTS, use_cache=False, **settings)
    assert_same_up_to_rounding(found, expected)


def test_sampled_tokens_are_the_drawn_ones_by_hand(unlike_model, tokenizer):
    """One prompt, token by token, without cache, in a few lines of numpy."""
    prompt, seed, settings = "The cat", 11, {"temperature": 0.8, "freq_penalty": 0.5, "top_p": 0.7}
    (ours,) = su.generate(unlike_model, tokenizer, prompt, max_new_tokens=8, seed=seed, **settings)[
        "completion"
    ]
    uniforms = generation.random_streams([prompt], 1, seed)[0, 0].random(8, dtype=np.float32)
    ids = [0, *tokenizer(prompt)["input_ids"]]
    start = len(ids)
    for uniform in uniforms:
        with torch.no_grad():
            scores = unlike_model(torch.tensor([ids])).logits[0, -1].double().numpy()
        cumulative = np.cumsum(softmax(reference(scores, ids, **settings)))
        ids.append(int(np.argmax(cumulative > uniform * cumulative[-1])))
        if ids[-1] == 0:
            break
    assert ours == tokenizer.decode(ids[start:], skip_special_tokens=True)


def test_settings_count_by_name_else_in_a_given_config_else_as_stored_with_the_model(
    tokenizer, transformers_warnings
):
    stored = {"do_sample": True, "top_k": 9, "temperature": 0.6, "top_p": 0.5, "repetition_penalty": 3.0}
    model, given = copy.deepcopy(tiny("gpt2")), {"num_samples": 3, "max_new_tokens": 20, "seed": 0}
    by_name = su.generate(model, tokenizer, PROMPTS, **given, **stored)
    other = su.generate(model, tokenizer, PROMPTS, **given, **stored | {"temperature": 2.0})
    in_config = GenerationConfig(**stored)
    assert su.generate(model, tokenizer, PROMPTS, **given, generation_config=in_config).equals(by_name)
    model.generation_config.update(**stored, max_new_tokens=5)  # a stored length counts for nothing
    assert su.generate(model, tokenizer, PROMPTS, **given).equals(by_name)
    assert su.generate(model, tokenizer, PROMPTS, **given, temperature=2.0).equals(other)
    hot = GenerationConfig(do_sample=True, temperature=2.0, max_new_tokens=20)
    given.pop("max_new_tokens")
    assert su.generate(model, tokenizer, PROMPTS, **given, generation_config=hot).equals(other)
    assert transformers_warnings == []


# --- random numbers ---------------------------------------------------------------------------------------


def test_without_a_seed_torchs_global_state_decides(unlike_model, tokenizer):
    def once(seed: int | None) -> pd.DataFrame:
        if seed is not None:
            torch.manual_seed(seed)
        return su.generate(unlike_model, tokenizer, "a", num_samples=8, max_new_tokens=10, top_p=1.0)

    with torch.random.fork_rng():
        first, next_one, again, other = once(3), once(None), once(3), once(4)
    assert first.equals(again)
    assert not first.equals(next_one)
    assert not first.equals(other)


def test_with_a_seed_no_global_random_state_moves(unlike_model, tokenizer):
    before = torch.get_rng_state(), np.random.get_state(), random.getstate()  # noqa: NPY002
    for do_sample in (True, False):
        given = {"num_samples": 2, "max_new_tokens": 5, "seed": 0, "do_sample": do_sample}
        su.compare(unlike_model, tokenizer, PROMPTS, steer=FLIP, **given)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert all(np.array_equal(a, b) for a, b in zip(np.random.get_state(), before[1], strict=True))  # noqa: NPY002
    assert random.getstate() == before[2]


def test_samples_of_a_prompt_and_repeated_prompts_in_the_list_differ(unlike_model, tokenizer):
    table = su.generate(
        unlike_model, tokenizer, ["a", "a", "a"], num_samples=5, max_new_tokens=12, seed=0, top_p=1.0
    )
    assert table["completion"].nunique() == 15


def test_steered_and_unsteered_samples_share_their_random_numbers(unlike_model, tokenizer):
    class Nothing:
        def on(self, model: PreTrainedModel, tokenizer=None) -> contextlib.nullcontext:
            return contextlib.nullcontext()

    settings = {"num_samples": 3, "max_new_tokens": 8, "seed": 0}
    table = su.compare(unlike_model, tokenizer, PROMPTS, steer=Nothing(), **settings)
    plain, steered = (table[table["steered"] == side].reset_index(drop=True) for side in (False, True))
    assert plain["completion"].equals(steered["completion"])
    assert plain.equals(su.generate(unlike_model, tokenizer, PROMPTS, **settings))
    unseeded = su.compare(unlike_model, tokenizer, "ab", steer=Nothing(), num_samples=3, max_new_tokens=8)
    assert unseeded["completion"][:3].tolist() == unseeded["completion"][3:].tolist()


def test_a_steer_acts_and_no_steer_is_none_or_an_empty_list(unlike_model, tokenizer):
    given = {"num_samples": 3, "max_new_tokens": 10, "seed": 0}
    plain = su.generate(unlike_model, tokenizer, PROMPTS, **given)
    one = su.generate(unlike_model, tokenizer, PROMPTS, steer=FLIP, **given)
    assert one["steered"].all()
    assert (one["completion"] != plain["completion"]).mean() > 0.8
    twice = su.generate(unlike_model, tokenizer, PROMPTS, steer=[FLIP, FLIP], **given)
    assert twice["completion"].equals(plain["completion"])  # turned around and back
    for nothing in (None, [], (), iter([])):
        assert su.generate(unlike_model, tokenizer, PROMPTS, steer=nothing, **given).equals(plain)


# --- drawing ----------------------------------------------------------------------------------------------


def drawn(scores: Tensor, uniforms: Tensor) -> Tensor:
    """The tokens [B] that `Draw` picks from scores [B, V] with uniforms [B]."""
    prompt = torch.zeros(len(scores), 3, dtype=torch.long)
    picked = Draw(uniforms[:, None], prompt_tokens=3)(prompt, scores)
    assert ((picked == 0).sum(dim=1) == 1).all()
    assert (picked == -torch.inf).sum() == picked.numel() - len(picked)
    return picked.argmax(dim=1)


def test_draws_have_the_distribution_of_the_softmax_and_nothing_impossible_is_drawn():
    probabilities = np.array([0, 0.3, 0.02, 0, 0, 0.2, 0.1, 0.33, 0.05, 0])
    count = 20_000
    scores = torch.tensor(np.log(np.maximum(probabilities, 1e-300)), dtype=torch.float32).repeat(count, 1)
    scores[:, probabilities == 0] = -torch.inf
    uniforms = torch.from_numpy(np.random.default_rng(0).random(count, dtype=np.float32))
    observed = np.bincount(drawn(scores + 7.5, uniforms), minlength=10)
    assert observed[probabilities == 0].tolist() == [0, 0, 0, 0]
    possible = probabilities > 0
    assert chisquare(observed[possible], count * probabilities[possible]).pvalue > 0.01


def test_the_smallest_and_the_largest_uniform_draw_the_first_and_the_last_possible_token():
    scores = torch.randn(64, 97, generator=torch.Generator().manual_seed(0)) * 3
    scores[:, :5] = scores[:, -4:] = -torch.inf
    assert drawn(scores, torch.zeros(64)).tolist() == [5] * 64
    largest = float(np.nextafter(np.float32(1), np.float32(0)))
    assert drawn(scores, torch.full((64,), largest)).tolist() == [92] * 64


@settings(max_examples=100, deadline=None)
@given(
    weights=st.lists(st.integers(0, 50), min_size=2, max_size=40).filter(any), bits=st.integers(0, 2**24 - 1)
)
def test_a_draw_inverts_the_cumulative_distribution(weights, bits):
    scores = torch.tensor(weights, dtype=torch.float64).log().float()[None]
    uniform = bits / 2**24  # every number that a float32 generator gives
    token = int(drawn(scores, torch.tensor([uniform], dtype=torch.float32)))
    below, total = sum(weights[:token]), sum(weights)
    assert weights[token] > 0
    assert below - 1e-5 * total <= uniform * total <= below + weights[token] + 1e-5 * total


def test_each_new_token_uses_its_own_column_of_the_uniforms():
    scores = torch.zeros(1, 10)
    draw = Draw(torch.tensor([[0.05, 0.55, 0.95]]), prompt_tokens=2)
    picked = [draw(torch.zeros(1, length, dtype=torch.long), scores).argmax().item() for length in (2, 3, 4)]
    assert picked == [0, 5, 9]


def test_the_streams_of_all_samples_differ():
    streams = generation.random_streams(["a", "a", "b"], 4, seed=0)
    assert len({tuple(stream.random(5)) for stream in streams.values()}) == 12


def test_a_second_call_goes_on_with_the_random_numbers_of_the_first(tokenizer):
    how = {"num_samples": 2, "max_new_tokens": 5, "seed": 3}
    whole = su.generate(tiny("gpt2"), tokenizer, ["a", "b", "a"], **how)
    second = su.generate(tiny("gpt2"), tokenizer, ["b", "a"], earlier={"a": 2}, **how)
    assert second["completion"].tolist() == whole["completion"].tolist()[2:]


# --- the loss ---------------------------------------------------------------------------------------------


def second_pass(model: PreTrainedModel, tokenizer, table: pd.DataFrame, steer: list, new: int) -> list[float]:
    """The column `loss`, from one more pass over each text under the steers; a character is a token."""
    losses = []
    for row in table.itertuples():
        start, written = ([*tokenizer(text)["input_ids"]] for text in (row.prompt, row.completion))
        written += [0] * (len(written) < new)  # it ended with EOS, which does not show
        ids = torch.tensor([[0, *start, *written]])
        with contextlib.ExitStack() as stack, hooks.batch(prompt_lengths=1 + len(start)):
            for one in steer:
                stack.enter_context(one.on(model, tokenizer))
            likely = logits(model, ids)[0].log_softmax(-1)
        places = range(len(start), len(start) + len(written))
        losses.append(-sum(likely[t, ids[0, t + 1]].item() for t in places) / len(written))
    return losses


LATER = su.ActivationAddition(2.0, "blocks.1.hook_mlp_out", "", addition_location="back", positions="all")
STEERS = {"none": [], "front": [su.ActivationAddition(3.0, 1, "")], "back": [LATER, FLIP]}


@pytest.mark.parametrize(
    ("name", "sampling"),
    [
        ("none", {"batch_size": 2}),
        ("front", {"top_p": 1.0}),
        ("back", {"temperature": 0.6, "freq_penalty": 0.8, "top_p": 0.7}),
        ("back", {"repetition_penalty": 1.3, "top_k": 9}),
        ("back", {"do_sample": False, "use_cache": False, "freq_penalty": 1.0}),
    ],
    ids=["batches", "front", "frequency", "repetition", "greedy"],
)
def test_the_loss_is_that_of_one_more_pass_over_the_completion_under_the_steers(
    unlike_model, tokenizer, name, sampling
):
    given = {"num_samples": 2, "max_new_tokens": 8, "seed": 0, "steer": STEERS[name], **sampling}
    table = su.generate(unlike_model, tokenizer, PROMPTS, **given)
    expected = second_pass(unlike_model, tokenizer, table, STEERS[name], 8)
    np.testing.assert_allclose(table["loss"], expected, atol=1e-4)
    assert table["loss"].between(0.001, 20).all()


@pytest.mark.parametrize(
    "cut",
    [
        {"min_new_tokens": 8},
        {"no_repeat_ngram_size": 1, "temperature": 0.5},
        {"suppress_tokens": list(range(2, 50))},
        {"bad_words_ids": [[token] for token in range(50, 97)], "do_sample": False},
    ],
    ids=lambda cut: next(iter(cut)),
)
def test_the_loss_is_that_of_the_models_own_logits_where_transformers_cuts_them(tokenizer, cut):
    given = {"num_samples": 2, "max_new_tokens": 8, "seed": 0, **cut}
    table = su.generate(tiny("llama"), tokenizer, PROMPTS, **given)
    expected = second_pass(tiny("llama"), tokenizer, table, [], 8)
    np.testing.assert_allclose(table["loss"], expected, atol=1e-4)


@pytest.mark.parametrize("end", [0, [40, 0]], ids=["one", "two"])
def test_the_loss_counts_the_token_that_ends_a_text_and_none_behind_it(unlike_model, tokenizer, end):
    ends = [End(4, after=[0, 2, 5, 9])]
    given = {"num_samples": 4, "max_new_tokens": 10, "seed": 0, "logits_processor": ends, "top_p": 1.0}
    table = su.generate(unlike_model, tokenizer, "abc", eos_token_id=end, **given)
    if isinstance(end, list) and 40 in end:
        table = table[~table["completion"].str.endswith(tokenizer.decode([40]))]
    assert len(table) >= 2
    expected = second_pass(unlike_model, tokenizer, table, [], 10)
    np.testing.assert_allclose(table["loss"], expected, atol=1e-4)


def test_the_loss_of_a_row_that_a_criterion_stopped_counts_no_filling(unlike_model, tokenizer):
    class Stop(StoppingCriteria):
        def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs) -> Tensor:
            return torch.tensor([input_ids.shape[1] - 4 >= wanted for wanted in (2, 6)])

    given = {"num_samples": 2, "max_new_tokens": 10, "seed": 0, "logits_processor": [End(0, after=[1000])]}
    table = su.generate(unlike_model, tokenizer, "abc", stopping_criteria=[Stop()], **given)
    assert table["completion"].map(len).tolist() == [2, 6]
    for i, count in enumerate((2, 6)):
        expected = second_pass(unlike_model, tokenizer, table[i : i + 1], [], count)
        np.testing.assert_allclose(table["loss"][i], expected[0], atol=1e-4)


def test_the_loss_goes_on_behind_a_token_that_no_longer_ends_a_text(unlike_model, tokenizer):
    given = {"num_samples": 3, "max_new_tokens": 6, "seed": 0, "do_sample": False}
    given["logits_processor"] = [End(4, after=[2, 2, 2])]  # from there on, nothing but token 0
    table = su.generate(unlike_model, tokenizer, "abc", eos_token_id=None, **given)
    for row in table.itertuples():
        ids = torch.tensor(
            [[0, *tokenizer("abc")["input_ids"], *tokenizer(row.completion)["input_ids"], 0, 0, 0, 0]]
        )
        likely = logits(unlike_model, ids)[0].log_softmax(-1)
        expected = -sum(likely[t, ids[0, t + 1]].item() for t in range(3, 9)) / 6
        assert row.loss == pytest.approx(expected, abs=1e-4)


def test_the_loss_of_beams_is_not_a_number(unlike_model, tokenizer):
    table = su.generate(unlike_model, tokenizer, PROMPTS, max_new_tokens=4, do_sample=False, num_beams=3)
    assert table["loss"].isna().all()


def test_the_loss_is_in_the_tables_of_both_sides_of_a_comparison(unlike_model, tokenizer):
    given = {"max_new_tokens": 6, "seed": 0, "num_samples": 2}
    table = su.compare(unlike_model, tokenizer, PROMPTS, steer=FLIP, **given)
    for side, steer in ((False, []), (True, [FLIP])):
        part = table[table["steered"] == side]
        np.testing.assert_allclose(
            part["loss"], second_pass(unlike_model, tokenizer, part, steer, 6), atol=1e-4
        )


# --- several steers ---------------------------------------------------------------------------------------


@contextlib.contextmanager
def passes(model: PreTrainedModel) -> Iterator[list[tuple[int, ...]]]:
    """The shapes (rows, tokens) of the passes that begin while inside."""
    shapes = []

    def note(module: torch.nn.Module, args: tuple, kwargs: dict) -> None:
        shapes.append(tuple((args[0] if args else kwargs["hidden_states"]).shape[:2]))

    with hf.block(model, 0).register_forward_pre_hook(note, with_kwargs=True):
        yield shapes


def test_the_texts_of_all_additions_share_one_pass_and_equal_texts_a_row(unlike_model, tokenizer):
    love, hate = su.get_x_vector("Love", "Hatred", coeff=2, act_name=1)
    others = [
        su.ActivationAddition(1.0, 2, "Love", addition_location="back"),
        su.ActivationAddition(1.0, "blocks.0.hook_mlp_out", "b") + 3 * love,
    ]
    steer = [love, FLIP, hate, su.SteeringVector(1, torch.ones(2, 32)), *others]
    with passes(unlike_model) as shapes:
        su.generate(unlike_model, tokenizer, "x" * 9, steer=steer, num_samples=4, max_new_tokens=1, seed=0)
    assert shapes == [(3, 7), (1, 9), (4, 1)]  # "Love", "Hatred", "b"; all but the last token; the last one


# --- processors -------------------------------------------------------------------------------------------


def softmax(scores: np.ndarray) -> np.ndarray:
    exponentials = np.exp(scores - scores.max())
    return exponentials / exponentials.sum()


def reference(
    scores: np.ndarray, ids: list[int], *, temperature=1.0, freq_penalty=0.0, top_k=0, top_p=1.0
) -> np.ndarray:
    """Temperature, then the frequency penalty, then top-k, then top-p; ids without padding."""
    scores = scores / temperature - freq_penalty * np.bincount(ids, minlength=len(scores))
    keep = np.argsort(-scores)[: top_k or None]
    share = softmax(scores[keep])
    keep = keep[: int(np.searchsorted(np.cumsum(share), top_p * (1 - 1e-9))) + 1]
    kept = np.full_like(scores, -np.inf)
    kept[keep] = scores[keep]
    return kept


def test_the_frequency_penalty_counts_bos_prompt_and_new_text_but_not_padding():
    ids = torch.tensor([[0, 0, 0, 3, 3, 2, 3], [0, 1, 2, 3, 3, 4, 0]])  # five tokens of prompt, two new ones
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    scores = torch.zeros(2, 6)
    expected = -0.5 * torch.tensor([[1.0, 0, 1, 3, 0, 0], [2, 1, 1, 2, 1, 0]])
    assert torch.equal(FrequencyPenalty(0.5, mask)(ids, scores), expected)
    assert torch.equal(scores, torch.zeros(2, 6))


@pytest.mark.parametrize("spread", [0.1, 1, 5])
def test_top_p_keeps_the_nucleus_that_transformers_finds_by_sorting_every_token(spread):
    scores = spread * torch.randn(3, 3000, generator=torch.Generator().manual_seed(0))
    for top_p in (0.05, 0.3, 0.9):
        assert torch.equal(TopP(top_p)(scores, scores), TopPLogitsWarper(top_p)(None, scores))


def test_the_frequency_penalty_of_beams_uses_the_mask_of_their_prompt():
    mask = torch.tensor([[0, 1], [1, 1]])
    ids = torch.tensor([[0, 0, 1], [0, 0, 2], [0, 3, 1], [0, 3, 2]])
    expected = -torch.tensor([[1.0, 1, 0, 0], [1, 0, 1, 0], [1, 1, 0, 1], [1, 0, 1, 1]])
    assert torch.equal(FrequencyPenalty(1.0, mask)(ids, torch.zeros(4, 4)), expected)


@pytest.mark.parametrize(
    "chosen",
    [
        {"temperature": 0.5, "freq_penalty": 1.5, "top_p": 0.6},
        {"temperature": 2.0, "freq_penalty": -0.7, "top_p": 0.3},
        {"temperature": 0.5, "freq_penalty": 1.5, "top_k": 5, "top_p": 0.8},
    ],
    ids=["cold", "hot", "top-k"],
)
def test_temperature_comes_before_the_frequency_penalty_and_that_before_top_k_and_top_p(chosen):
    ids, mask = padded([9, 5], "left")
    ids = ids % 7  # with repetitions
    scores = torch.randn(2, 97, generator=torch.Generator().manual_seed(1)) * 3
    scores[:, :7] += 6  # the penalised tokens are the probable ones
    ours = sampling_processors(mask, **chosen)(ids, scores)
    for row in range(2):
        expected = reference(scores[row].double().numpy(), ids[row, mask[row].bool()].tolist(), **chosen)
        np.testing.assert_allclose(ours[row].numpy(), expected, rtol=1e-5, atol=1e-5)


def test_the_repetition_penalty_comes_before_the_temperature_and_does_not_see_padding_as_new():
    ids, mask = torch.tensor([[0, 0, 5]]), torch.tensor([[0, 1, 1]])
    scores = torch.linspace(-2, 2, 10)[None]
    penalised = scores.clone()
    penalised[0, 0] *= 2.0  # negative logits are multiplied, positive ones divided
    penalised[0, 5] /= 2.0
    ours = sampling_processors(mask, repetition_penalty=2.0, temperature=0.5, top_p=1.0)(ids, scores)
    torch.testing.assert_close(ours, penalised / 0.5)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6), top_p=st.floats(0.01, 1.0), top_k=st.integers(0, 30))
def test_top_k_and_top_p_keep_what_brute_force_keeps(seed, top_p, top_k):
    scores = torch.randn(1, 25, generator=torch.Generator().manual_seed(seed)) * 2
    ours = sampling_processors(torch.ones(1, 1), top_p=top_p, top_k=top_k)(torch.zeros(1, 1).long(), scores)
    in_order = sorted(range(25), key=lambda token: -scores[0, token])[: top_k or None]
    share = softmax(scores[0].double().numpy()[in_order])
    sums = np.cumsum(share)
    if np.abs(sums - top_p).min() < 1e-5 and top_p < 1:
        return  # rounding decides there
    keep = {token for token, before in zip(in_order, sums - share, strict=True) if before < top_p}
    assert {token for token in range(25) if ours[0, token] > -torch.inf} == keep
    assert all(ours[0, token] == scores[0, token] for token in keep)


@pytest.mark.parametrize("top_p", [0.05, 0.9, 0.999])
def test_top_p_keeps_the_fewest_tokens_that_reach_it_in_a_large_vocabulary_too(top_p):
    sharpness = torch.tensor([10.0, 3.0, 1.0, 0.5, 0.01])[:, None]
    scores = torch.randn(5, 6000, generator=torch.Generator().manual_seed(0)) * sharpness
    ours = sampling_processors(torch.ones(1, 1), top_p=top_p)(torch.zeros(len(scores), 1).long(), scores)
    for before, after in zip(scores.double().numpy(), ours.numpy(), strict=True):
        kept, share = after > -np.inf, softmax(before)
        assert np.array_equal(after[kept], before[kept].astype(np.float32))
        assert before[kept].min() > before[~kept].max()
        assert share[kept].sum() >= top_p - 1e-5
        assert share[kept].sum() - share[kept].min() < top_p + 1e-5


def test_settings_that_do_nothing_need_no_processor():
    neutral = {"temperature": 1, "top_p": 1, "top_k": 0, "repetition_penalty": 1, "freq_penalty": 0}
    assert len(sampling_processors(torch.ones(1, 1), **neutral)) == 0


# --- errors -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", 0),
        ("temperature", float("nan")),
        ("top_p", 0),
        ("top_p", 1.5),
        ("top_p", float("nan")),
        ("top_k", -1),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", float("nan")),
        ("freq_penalty", float("nan")),
        ("freq_penalty", float("inf")),
        ("num_samples", 0),
        ("batch_size", 0),
        ("max_new_tokens", 0),
        ("seed", -1),
    ],
)
def test_an_impossible_setting_is_a_value_error_that_quotes_it(tokenizer, name, value):
    given = {"max_new_tokens": 2, "seed": 0, name: value}
    with pytest.raises(ValueError, match=str(value).removesuffix(".0")):
        su.generate(tiny("gpt2"), tokenizer, "a", **given)


def test_no_prompts_are_a_value_error_and_a_prompt_that_is_not_text_a_type_error(tokenizer):
    with pytest.raises(ValueError, match="prompts"):
        su.generate(tiny("gpt2"), tokenizer, [])
    with pytest.raises(TypeError, match="3"):
        su.generate(tiny("gpt2"), tokenizer, ["a", 3])


def test_an_unknown_setting_is_an_error_that_names_it(tokenizer):
    with pytest.raises((TypeError, ValueError), match="temprature"):
        su.generate(tiny("gpt2"), tokenizer, "a", temprature=0.5)


@pytest.mark.parametrize(
    ("name", "value", "more"),
    [
        ("min_p", 0.1, {}),
        ("num_beams", 3, {}),
        ("num_return_sequences", 2, {"do_sample": False}),
        ("max_length", 9, {}),
        ("return_dict_in_generate", True, {}),
        ("max_new_tokens", 0, {"do_sample": False}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_setting_that_would_be_ignored_or_break_the_table_is_a_value_error_that_quotes_it(
    tokenizer, name, value, more
):
    with pytest.raises(ValueError, match=f"{name}.*{value}"):
        su.generate(tiny("gpt2"), tokenizer, "a", **{"max_new_tokens": 2, "seed": 0, name: value, **more})


def test_a_setting_that_is_off_is_no_error_and_changes_nothing(tokenizer):
    given = {"prompts": "abc", "max_new_tokens": 5, "seed": 0}
    plain = su.generate(tiny("gpt2"), tokenizer, **given)
    off = {"min_p": None, "typical_p": None, "num_beams": 1}
    assert su.generate(tiny("gpt2"), tokenizer, **given, **off).equals(plain)


@pytest.mark.parametrize(
    "steer", ["love", 3, [None], [FLIP, [FLIP]]], ids=["text", "number", "none-in-list", "nested"]
)
def test_what_is_no_steer_is_a_type_error_that_asks_for_a_flat_list_and_steers_nothing(tokenizer, steer):
    model = tiny("gpt2")
    count = hook_count(model)
    for call in (su.generate, su.compare):
        with pytest.raises(TypeError, match=r"steer of \w+ must be a steer or a flat list of steers or None"):
            call(model, tokenizer, "abc", steer=steer, max_new_tokens=2, seed=0)
    assert hook_count(model) == count


def test_a_steer_that_fails_on_entering_leaves_those_before_it_off(tokenizer):
    model = tiny("gpt2")
    count = hook_count(model)
    steers = [FLIP, su.SteeringVector(9, torch.ones(1, 32))]
    with pytest.raises(ValueError, match="layer 9"), generation.all_on(steers, model, tokenizer):
        pass
    assert hook_count(model) == count


@pytest.mark.parametrize("do_sample", [True, False])
def test_logits_that_are_not_finite_are_a_value_error(unlike_model, tokenizer, do_sample):
    with pytest.raises(ValueError, match="not finite"):
        su.generate(
            unlike_model,
            tokenizer,
            "abc",
            steer=Edit(lambda hidden: hidden * torch.inf),
            seed=0,
            max_new_tokens=3,
            do_sample=do_sample,
        )


# --- ends of texts ----------------------------------------------------------------------------------------


def test_eos_ends_a_row_and_special_tokens_do_not_show(unlike_model, tokenizer):
    table = su.generate(
        unlike_model,
        tokenizer,
        "abc",
        num_samples=4,
        max_new_tokens=10,
        seed=0,
        logits_processor=[End(4, after=[0, 2, 5, 9])],
    )
    assert table["completion"].map(len).tolist() == [0, 2, 5, 9]


def test_prompts_of_one_token_work_alone_and_in_a_batch(unlike_model, tokenizer):
    table = su.generate(unlike_model, tokenizer, ["", ""], num_samples=3, max_new_tokens=6, seed=0, top_p=1.0)
    assert table["completion"].nunique() >= 5
    greedy = su.generate(unlike_model, tokenizer, "", max_new_tokens=6, do_sample=False)["completion"][0]
    assert greedy == by_hand(unlike_model, tokenizer, "", max_new_tokens=6)


def test_a_space_at_the_beginning_of_a_completion_is_kept(tokenizer):
    class Spaces(LogitsProcessor):
        def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
            return torch.full_like(scores, -torch.inf).index_fill_(1, torch.tensor([1]), 0.0)

    table = su.generate(
        tiny("llama"), tokenizer, ["ab", "ab "], max_new_tokens=3, seed=0, logits_processor=[Spaces()]
    )
    assert table["completion"].tolist() == ["   ", "   "]


# --- what passes through to `model.generate` --------------------------------------------------------------


def test_stopping_criteria_and_stop_strings_pass_through(unlike_model, tokenizer):
    class Three(StoppingCriteria):
        def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs) -> Tensor:
            return torch.full((len(input_ids),), input_ids.shape[1] >= 4 + 3)

    given = {"num_samples": 3, "seed": 0, "eos_token_id": None}
    short = su.generate(
        unlike_model, tokenizer, "abc", max_new_tokens=9, stopping_criteria=[Three()], **given
    )
    assert short.equals(su.generate(unlike_model, tokenizer, "abc", max_new_tokens=3, **given))


@pytest.mark.parametrize("steer", [None, FLIP], ids=["unsteered", "steered"])
def test_a_stop_string_ends_a_completion(tokenizer, steer):
    given = {"num_samples": 4, "seed": 0, "max_new_tokens": 12, "steer": steer}
    whole = su.generate(tiny("llama"), tokenizer, ["abc", "d"], **given)["completion"]
    stop = whole[0][4:6]
    cut = su.generate(tiny("llama"), tokenizer, ["abc", "d"], stop_strings=[stop, "no such text"], **given)
    for found, text in zip(cut["completion"], whole, strict=True):
        end = text.find(stop)
        assert found == (text if end < 0 else text[: end + len(stop)])
    assert len(cut["completion"][0]) < len(whole[0])


@pytest.mark.parametrize("steer", [(), FLIP], ids=["unsteered", "steered"])
def test_a_static_cache_changes_no_completion(unlike_model, tokenizer, steer):
    given = {"num_samples": 2, "max_new_tokens": 8, "seed": 0, "steer": steer, "disable_compile": True}
    prompts = ["a", "Once upon a time"]
    dynamic = su.generate(unlike_model, tokenizer, prompts, **given)
    static = su.generate(unlike_model, tokenizer, prompts, cache_implementation="static", **given)
    assert_same_up_to_rounding(static, dynamic)


def test_a_streamer_sees_the_tokens_of_the_completion(unlike_model, tokenizer):
    class Keep(BaseStreamer):
        def __init__(self) -> None:
            self.tokens, self.ended = [], False

        def put(self, value: Tensor) -> None:
            self.tokens += value.flatten().tolist()

        def end(self) -> None:
            self.ended = True

    keep = Keep()
    table = su.generate(unlike_model, tokenizer, "abc", max_new_tokens=6, seed=1, streamer=keep)
    assert keep.ended
    assert keep.tokens[:4] == [0, 66, 67, 68]
    assert tokenizer.decode(keep.tokens[4:], skip_special_tokens=True) == table["completion"][0]


# --- what is shown ----------------------------------------------------------------------------------------


def test_the_progress_bar_is_silent_in_continuous_integration_only(tokenizer, capsys, monkeypatch):
    su.generate(tiny("gpt2"), tokenizer, "a", max_new_tokens=2, seed=0)
    assert capsys.readouterr() == ("", "")
    monkeypatch.delenv("CI")
    su.generate(tiny("gpt2"), tokenizer, "a", max_new_tokens=2, seed=0)
    assert "completion" in capsys.readouterr().err


def test_without_a_word_sampling_is_from_the_nucleus_of_nine_tenths(tokenizer):
    given = {"num_samples": 4, "max_new_tokens": 12, "seed": 0}
    default = su.generate(tiny("gpt2"), tokenizer, PROMPTS, **given)
    assert default.equals(su.generate(tiny("gpt2"), tokenizer, PROMPTS, **given, top_p=0.9))
    assert not default.equals(su.generate(tiny("gpt2"), tokenizer, PROMPTS, **given, top_p=1.0))
