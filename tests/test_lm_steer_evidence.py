"""A text analysed with a steer: spans, evidence, the values of a text, and how a notebook shows it."""

import itertools
import math
import re

import numpy as np
import pytest
import torch
from conftest import CONFIGS, hook_count, new_model, random_ids, tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from test_lm_steer_words import close, some, steer
from torch import Tensor
from transformers import PreTrainedModel

import steer_utils as su
from steer_utils import hf
from steer_utils.lm_steer.evidence import Evidence, best_spans, losses_at

TEXT = "a Cat sat, & sang"


# --- spans --------------------------------------------------------------------------------------------------


def by_brute_force(numbers: list[float], max_spans: int, max_length: int) -> float:
    """The best score of all choices of disjoint spans, by trying each."""

    def best(start: int, left: int) -> float:
        starts = range(start, len(numbers) if left else 0)
        spans = ((a, b) for a in starts for b in range(a + 1, min(a + max_length, len(numbers)) + 1))
        return max([0.0, *(sum(numbers[a:b]) + best(b + 1, left - 1) for a, b in spans)])

    return best(0, max_spans)


numbers = st.lists(st.integers(-12, 12).map(lambda n: n / 4), max_size=8)  # quarters add up exactly


@given(numbers, st.integers(1, 4), st.integers(1, 9))
@settings(max_examples=300, deadline=None)
def test_spans_score_as_well_as_any_choice(numbers: list[float], max_spans: int, max_length: int):
    found = best_spans(numbers, max_spans, max_length)
    assert sum(sum(numbers[a:b]) for a, b in found) == by_brute_force(numbers, max_spans, max_length)
    assert len(found) <= max_spans
    assert all(0 <= a < b <= len(numbers) and b - a <= max_length for a, b in found)
    assert all(sum(numbers[a:b]) > 0 for a, b in found)
    assert all(after - before >= 1 for (_, before), (after, _) in itertools.pairwise(found))


def test_spans_of_equal_worth_are_few_end_early_and_start_late():
    assert best_spans([1.0] * 9, 1, 4) == [(0, 4)]
    assert best_spans([0.0, 1.0, 0.0, 0.0, 1.0, -1.0, 1.0], 1, 3) == [(1, 2)]
    assert best_spans([2.0, -1.0, 1.0], 2, 3) == [(0, 1), (2, 3)]
    assert best_spans([2.0, 0.0, 1.0], 2, 3) == [(0, 3)]


@pytest.mark.parametrize(("numbers", "spans"), [([], []), ([1.5], [(0, 1)]), ([-1], []), ([0, 0], [])])
def test_spans_of_short_rows(numbers: list[float], spans: list):
    assert best_spans(numbers) == spans


def test_spans_do_not_touch():
    assert best_spans([1.0, 1.0, 1.0, 1.0], 2, 2) == [(0, 2), (3, 4)]


@pytest.mark.parametrize(
    ("numbers", "given", "message"),
    [
        ([1.0, math.nan], {}, r"evidence must be finite numbers, not .*\[1.0, nan\]"),
        ([1.0], {"max_spans": 0}, "max_spans must be at least 1, not 0"),
        ([1.0], {"max_length": -2}, "max_length must be at least 1, not -2"),
    ],
)
def test_spans_refuse(numbers: list, given: dict, message: str):
    with pytest.raises(ValueError, match=message):
        best_spans(numbers, **given)


# --- evidence -----------------------------------------------------------------------------------------------


def log_probs_by_hand(model: PreTrainedModel, given: su.LMSteer, ids: list[int], values: list) -> Tensor:
    """Log probabilities of ids[1:], from a whole pass of a folded model."""
    row = torch.tensor([ids])
    logits = given.fold(model, values)(row).logits[0, :-1]
    return logits.log_softmax(dim=-1).gather(1, row[0, 1:, None])[:, 0]


def test_evidence_is_the_difference_of_two_whole_passes(main_model, tokenizer):
    given, a, b = steer(), [1.0, 0.5], [-2.0, 0.0]
    ids, hooks = su.models.token_ids(tokenizer, TEXT), hook_count(main_model)
    found = su.evidence_spans(given, main_model, tokenizer, TEXT, a, b)
    expected = log_probs_by_hand(main_model, given, ids, a) - log_probs_by_hand(main_model, given, ids, b)
    close(torch.tensor(found.evidence).float(), expected)
    assert found.tokens == list(TEXT)
    assert found.spans == best_spans(found.evidence)
    assert hook_count(main_model) == hooks
    filtered = given.at(a, filter_p=0.1)  # makes no difference, or tokens outside would be all that counts
    assert (su.evidence_spans(filtered, main_model, tokenizer, TEXT, a, b).evidence == found.evidence).all()


def test_evidence_turns_with_its_values_and_vanishes_without_a_difference(tokenizer):
    model, given = tiny("llama"), steer()
    one, other = (su.evidence_spans(given, model, tokenizer, TEXT, v, -v) for v in (2.0, -2.0))
    assert one.evidence.tolist() == (-other.evidence).tolist()
    same = su.evidence_spans(given, model, tokenizer, TEXT, 2.0, 2.0)
    assert isinstance(same, Evidence)
    assert (same.evidence == 0).all()
    assert same.spans == []
    single = su.evidence_spans(given, model, tokenizer, "a", 2.0, -2.0, max_spans=1, max_length=1)
    assert single.tokens == ["a"]
    assert len(single.evidence) == 1


def test_one_pass_whose_length_needs_no_more_memory(monkeypatch, tokenizer):
    model, given, ids = tiny("gpt2"), steer(), random_ids(1, 40)[0].tolist()
    passes, rows = [], []
    with (
        hf.blocks(model)[0].register_forward_hook(lambda *_: passes.append(1)),
        hf.lm_head(model).register_forward_hook(lambda *call: rows.append(len(call[2]))),
    ):
        losses = losses_at(given, model, ids, np.linspace(-3, 3, 13))
        assert (len(passes), len(rows)) == (1, 13)
        monkeypatch.setattr("steer_utils.hf.LOGITS_AT_ONCE", 97 * 7)
        assert losses_at(given, model, ids, np.linspace(-3, 3, 13)) == pytest.approx(losses, abs=1e-5)
        assert max(rows[13:]) == 7


def test_evidence_and_training_are_refused_while_a_steer_is_on_and_not_after_it(tokenizer):
    model, given = tiny("llama"), steer()
    for other in (su.AddSteer(some(1, 32)).at(3.0), su.SteeringVector(1, some(1, 32))):
        with other.on(model), pytest.raises(ValueError, match="a steer is on"):
            su.evidence_spans(given, model, tokenizer, TEXT, 1.0, 0.0)
        with other.on(model), pytest.raises(ValueError, match="a steer is on"):
            su.train_lm_steer(model, tokenizer, ["a b", "c d"], [1, -1])
    assert su.evidence_spans(given, model, tokenizer, TEXT, 1.0, 0.0).tokens


@pytest.mark.parametrize("kind", [su.AddSteer, su.OffsetSteer])
def test_evidence_of_other_kinds_of_steers(kind: type, tokenizer):
    model = tiny("gpt2")
    given = kind(some(2, 32 if kind is su.AddSteer else 97), epsilon=0.1)
    found = su.evidence_spans(given, model, tokenizer, TEXT, [1.0, 0.0], 0.0)
    row = torch.tensor([su.models.token_ids(tokenizer, TEXT)])
    with given.at(1.0).on(model):
        steered = model(row).logits[0, :-1].log_softmax(-1)
    gains = (steered - model(row).logits[0, :-1].log_softmax(-1)).gather(1, row[0, 1:, None])[:, 0]
    close(torch.tensor(found.evidence).float(), gains)


def test_evidence_refuses(tokenizer):
    model, given = tiny("gpt2"), steer()
    with pytest.raises(ValueError, match="an empty text"):
        su.evidence_spans(given, model, tokenizer, "", 1.0, -1.0)
    with pytest.raises(ValueError, match=r"one row of values, not \(1, 2\)"):
        su.evidence_spans(given, model, tokenizer, TEXT, [[1.0, 0.0]], -1.0)
    with pytest.raises(ValueError, match="take a number for the first"):
        su.evidence_spans(given, model, tokenizer, TEXT, [1.0], -1.0)
    with pytest.raises(ValueError, match="width of 8; the model's is 32"):
        su.evidence_spans(steer(width=8), model, tokenizer, TEXT, 1.0, -1.0)
    with pytest.raises(ValueError, match="max_spans must be at least 1, not 0"):
        su.evidence_spans(given, model, tokenizer, TEXT, 1.0, -1.0, max_spans=0)


# --- the values of a text -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("architecture", "dim", "ends"),
    [
        ("gpt2", 0, (-3, 3)),
        ("llama", 1, (1, 2.5)),
        ("gemma3_text", 1, (-2, -1)),
        ("gpt_neox", 0, (1, 2.5)),
        ("gemma2", 1, (-3, 3)),
        ("gemma2", 0, (1, 2.5)),
        ("gptj", 1, (-2, -1)),
        ("gptj", 0, (-3, 3)),
    ],
)
def test_losses_are_those_of_a_whole_pass_at_each_value(architecture, dim, ends, tokenizer):
    """Gemma 2 caps its logits, which are then no longer affine in the value, and GPT-J's head has a bias."""
    model, given = new_model(CONFIGS[architecture]()), steer()
    if hf.lm_head(model).bias is not None:
        torch.nn.init.normal_(hf.lm_head(model).bias)
    ids = su.models.token_ids(tokenizer, TEXT)
    found = su.steer_analysis(
        given, model, tokenizer, TEXT, dim=dim, min_value=ends[0], max_value=ends[1], bins=4
    )
    rows = np.eye(2)[dim] * np.append(np.linspace(*ends, 4), 0)[:, None]
    expected = [-log_probs_by_hand(model, given, ids, row.tolist()).mean().item() for row in rows]
    assert [*found.losses, found.unsteered_loss] == pytest.approx(expected, rel=1e-5)
    assert found.values.tolist() == pytest.approx(np.linspace(*ends, 4).tolist())
    assert found.best_value == found.values[np.argmin(expected[:-1])]
    assert found.distribution.sum() == pytest.approx(1)
    weights = np.exp(-10 * np.array(expected[:-1]))
    assert found.distribution == pytest.approx(weights / weights.sum(), rel=1e-3)
    assert hook_count(model) == 0


def test_the_planted_value_is_found(tokenizer):
    """Of a long text that the model writes at value 2, no value explains more than 2 itself."""
    model, given = tiny("llama"), steer(1, epsilon=0.1)
    torch.manual_seed(0)
    start = torch.zeros(8, 1, dtype=torch.long)
    with given.at(2.0).on(model):
        written = model.generate(
            start, attention_mask=start + 1, max_new_tokens=100, do_sample=True, eos_token_id=None, top_k=0
        )
    values = np.arange(-4.0, 5.0)
    losses = np.concatenate([losses_at(given, model, row, values) for row in written.tolist()], axis=1)
    assert values[losses.mean(axis=1).argmin()] == 2


def test_words_average_their_tokens(tokenizer):
    model, given = tiny("gpt2"), steer()
    found = su.steer_analysis(given, model, tokenizer, TEXT)
    assert found.words.tokens == ["a", " Cat", " sat,", " &", " sang"]
    ids = su.models.token_ids(tokenizer, TEXT)
    best = log_probs_by_hand(model, given, ids, [found.best_value, 0.0])
    gains = 10 * (best - log_probs_by_hand(model, given, ids, [0.0, 0.0]))
    sizes = [len(word) for word in found.words.tokens]
    expected = [part.mean().item() for part in gains.split(sizes)]
    assert found.words.evidence.tolist() == pytest.approx(expected, abs=1e-3)
    assert found.words.spans == []


def test_in_bfloat16_interpolated_losses_are_as_good_as_separate_ones(tokenizer):
    model, given = new_model(CONFIGS["gpt2"]()), steer()
    ids = su.models.token_ids(tokenizer, TEXT * 3)
    exact = losses_at(given, model, ids, np.linspace(-3, 3, 7)).mean(axis=1)
    rough = losses_at(given, model.bfloat16(), ids, np.linspace(-3, 3, 7)).mean(axis=1)
    assert rough == pytest.approx(exact, abs=0.05)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"dim": 2}, r"dim must be 0 to 1 \(0, 1\), not 2"),
        ({"dim": -1}, "not -1"),
        ({"min_value": 3}, "not 7 from 3 to 3"),
        ({"bins": 1}, "2 or more bins .* not 1 from -3 to 3"),
        ({"max_value": math.inf}, "not 7 from -3 to inf"),
        ({"max_value": math.nan}, "not 7 from -3 to nan"),
    ],
)
def test_analysis_refuses(given: dict, message: str, tokenizer):
    with pytest.raises(ValueError, match=message):
        su.steer_analysis(steer(), tiny("gpt2"), tokenizer, TEXT, **given)


def test_analysis_refuses_an_empty_text(tokenizer):
    with pytest.raises(ValueError, match="an empty text"):
        su.steer_analysis(steer(), tiny("gpt2"), tokenizer, "")


# --- as a notebook shows it ---------------------------------------------------------------------------------


def test_highlight_escapes_colours_and_underlines():
    evidence = Evidence(["a", " <b>", "&", " c"], np.array([2.0, 1.0, -0.5, 0.0]), [(0, 2), (3, 4)])
    found = su.highlight(evidence).data
    styles = re.findall(r"rgba\((\d+),\d+,\d+,([\d.]+)\)", found)
    assert styles == [("0", "0.55"), ("0", "0.28"), ("213", "0.14"), ("213", "0.00")]
    underlined = re.findall(r"<u>(.*?)</u>", found)
    assert [re.sub("<[^>]*>", "", part) for part in underlined] == ["a &lt;b&gt;", " c"]
    assert re.sub("<[^>]*>", "", found) == "a &lt;b&gt;&amp; c"
    assert re.findall(r'title="(.*?)"', found) == ["+2.00", "+1.00", "-0.50", "+0.00"]


def test_highlight_of_nothing_and_of_no_evidence():
    assert "span" not in su.highlight(Evidence([], np.array([]), [])).data
    assert "nan" not in su.highlight(Evidence(["a"], np.array([0.0]), [])).data
