"""Files of completions: the same however often the writing was stopped, and scored as by hand."""

import itertools
import json
import math
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from conftest import CONFIGS, head_steer, new_model, tiny
from transformers import PreTrainedModel

import steer_utils as su
from steer_utils.measure import evaluate, judges
from steer_utils.measure.evaluate import (
    attribute_of_groups,
    distinct_of_group,
    evaluate_file,
    generate_file,
    perplexity_of_groups,
    read_generations,
)
from steer_utils.measure.metrics import bootstrap, distinct, perplexity

PROMPTS = ["The cat", "a", "Once upon a time", "The cat", "b", "I said", "The cat", "a", "No, she", "It was"]
SHORT = {
    "num_samples": 3,
    "max_new_tokens": 4,
    "min_new_tokens": 4,
    "batch_size": 9,
    "top_p": 1.0,
}  # 4 chunks
STEER = su.ActivationAddition(3, 1, "a")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "new" / "out.jsonl"


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def texts(path: Path) -> list[list[str]]:
    return [[one["text"] for one in line["generations"]] for line in lines(path)]


# --- what a file holds ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "steer"),
    [("gpt2", None), ("llama", STEER), ("gpt_neox", [STEER, STEER])],
    ids=("none", "one", "two"),
)
def test_a_file_holds_what_one_call_of_generate_gives_repeated_prompts_included(tokenizer, path, name, steer):
    model = tiny(name)
    assert generate_file(model, tokenizer, PROMPTS, path, steer=steer, seed=5, **SHORT) == path
    table = su.generate(model, tokenizer, PROMPTS, steer=steer, seed=5, **SHORT)
    assert [line["prompt"] for line in lines(path)] == [{"text": prompt} for prompt in PROMPTS]
    assert list(itertools.chain(*texts(path))) == table["completion"].tolist()
    repeated = [text for prompt, text in zip(PROMPTS, texts(path), strict=True) if prompt == "The cat"]
    assert len(set(map(tuple, repeated))) == 3


def test_steers_that_come_from_an_iterator_steer_every_chunk(tokenizer, path):
    model = tiny("gpt2")
    generate_file(model, tokenizer, PROMPTS, path, steer=iter([STEER]), **SHORT)
    table = su.generate(model, tokenizer, PROMPTS, steer=STEER, seed=0, **SHORT)
    assert list(itertools.chain(*texts(path))) == table["completion"].tolist()


def test_a_saved_steer_is_read_generated_with_and_scored(tokenizer, path, tmp_path):
    model = tiny("llama")
    head_steer().save_pretrained(tmp_path / "steer")
    steer = su.LMSteer.from_pretrained(tmp_path / "steer", model).at([2.0, 0.5])
    generate_file(model, tokenizer, PROMPTS, path, steer=steer, **SHORT)
    expected = su.generate(model, tokenizer, PROMPTS, steer=head_steer().at([2.0, 0.5]), seed=0, **SHORT)
    assert list(itertools.chain(*texts(path))) == expected["completion"].tolist()
    found = evaluate_file(path, LENGTH, model, tokenizer)
    assert found["share"].mean == found["left out"] == found["missing"] == 0
    assert 1 < found["total perplexity"].low < 1000


@pytest.mark.parametrize("file", [True, False], ids=("file", "course"))
def test_prompts_come_from_a_file_or_from_the_course(tokenizer, path, tmp_path, file):
    source = tmp_path / "prompts.jsonl"  # as in RealToxicityPrompts
    source.write_text('{"prompt": {"text": "The cat"}, "md5_hash": "0"}\n{"prompt": {"text": "a"}}\n')
    generate_file(
        tiny("gpt2"), tokenizer, source if file else "openings", path, num_samples=1, max_new_tokens=1
    )
    expected = ["The cat", "a"] if file else su.data.prompts("openings")
    assert [line["prompt"]["text"] for line in lines(path)] == expected


@pytest.mark.parametrize(
    ("prompts", "settings", "message"),
    [
        ([], {}, "prompts must be at least one, not the list"),
        (["a"], {"num_samples": 0}, "num_samples must be at least 1, not 0"),
        (["a"], {"top_p": 0.0}, "top_p must be above 0"),
        (["a"], {"seed": None}, "give a seed: a call that goes on needs that of the first, not None"),
    ],
    ids=("prompts", "samples", "top_p", "seed"),
)
def test_impossible_settings_are_refused_and_leave_nothing(tokenizer, path, prompts, settings, message):
    with pytest.raises(ValueError, match=message):
        generate_file(tiny("gpt2"), tokenizer, prompts, path, **settings)
    assert not path.parent.exists()


# --- stopped and called again -----------------------------------------------------------------------------


def run(path: Path, tokenizer, **changed) -> bytes:
    """The file that a call leaves, from a shared model and settings."""
    settings = {"prompts": PROMPTS, "model": tiny("gpt2"), "steer": STEER, "seed": 1} | SHORT | changed
    model, prompts = settings.pop("model"), settings.pop("prompts")
    generate_file(model, tokenizer, prompts, path, **settings)
    return path.read_bytes()


def counting(patch: pytest.MonkeyPatch, calls: list[Sequence[str]], stop_at: float = math.inf) -> None:
    """Each call of `generate` leaves its prompts in the list; the one after `stop_at` raises."""

    def generate(model, tokenizer, prompts, **settings):
        calls.append(prompts)
        if len(calls) > stop_at:
            raise KeyboardInterrupt
        return su.generate(model, tokenizer, prompts, **settings)

    patch.setattr(evaluate, "generate", generate)


@pytest.mark.parametrize("chunks_done", [0, 3])
def test_a_run_that_was_killed_goes_on_and_gives_the_same_file(tokenizer, tmp_path, monkeypatch, chunks_done):
    whole, calls = run(tmp_path / "whole.jsonl", tokenizer), []
    with monkeypatch.context() as patch:
        counting(patch, calls, stop_at=1 + chunks_done)  # the first call tells the steer from others
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "out.jsonl", tokenizer)
    assert not (tmp_path / "out.jsonl").exists()
    calls.clear()
    counting(monkeypatch, calls)
    assert run(tmp_path / "out.jsonl", tokenizer) == whole
    assert len(calls) == 1 + 4 - chunks_done  # what was there has not been generated again


def test_many_equal_prompts_cost_no_more_than_as_many_different_ones(tokenizer, path, monkeypatch):
    calls = []
    counting(monkeypatch, calls)
    run(path, tokenizer, prompts=["a"] * 40)
    assert sum(map(len, calls)) == 1 + 40


def test_a_finished_file_that_was_lost_or_damaged_is_written_again_without_generating(
    tokenizer, path, monkeypatch
):
    whole, calls = run(path, tokenizer), []
    path.write_bytes(whole[:20])
    counting(monkeypatch, calls)
    assert run(path, tokenizer) == whole
    assert len(calls) == 1


def test_letters_beyond_ascii_and_line_separators_survive(tokenizer, path):
    prompts = ["a\u2028b", 'She said "no"', "x\ny", "c\x85d"]
    generate_file(tiny("gpt2"), tokenizer, prompts, path, **SHORT)
    assert path.read_bytes().count(b"\n") == len(prompts)
    assert read_generations(path)[0] == prompts


class Quiet:
    """A steer that says nothing of its strength."""

    def __init__(self, coeff: float) -> None:
        self.on = su.ActivationAddition(coeff, 1, "a").on


def other_weights() -> PreTrainedModel:
    model = new_model(CONFIGS["gpt2"]())
    model.lm_head.weight.mul_(1.1)
    return model


OTHER: dict[str, tuple[Callable[[], dict], str]] = {
    "seed": (lambda: {"seed": 2}, "seed"),
    "samples": (lambda: {"num_samples": 2}, "samples"),
    "batch": (lambda: {"batch_size": 6}, "batch_size"),
    "prompts": (lambda: {"prompts": [*PROMPTS[:-1], "It is"]}, "prompts"),
    "steer": (lambda: {"steer": su.ActivationAddition(3, 1, "b")}, "steer"),
    "weights": (lambda: {"model": other_weights()}, "model, first"),
}


@pytest.mark.parametrize(("change", "name"), OTHER.values(), ids=OTHER)
def test_a_file_made_with_other_settings_is_refused_and_left_alone(tokenizer, path, change, name):
    whole = run(path, tokenizer)
    with pytest.raises(ValueError, match=rf"out\.jsonl\.run' holds a run with other settings \(.*{name}.*\)"):
        run(path, tokenizer, **change())
    assert path.read_bytes() == whole


def test_steers_that_look_alike_are_told_apart_by_what_they_do(tokenizer, path):
    whole = run(path, tokenizer, steer=Quiet(3))
    assert run(path, tokenizer, steer=Quiet(3)) == whole  # another object at another place in memory
    with pytest.raises(ValueError, match=r"other settings \(first\)"):
        run(path, tokenizer, steer=Quiet(4))


def test_beams_have_no_loss_to_compare(tokenizer, path):
    beams = {"num_samples": 1, "do_sample": False, "num_beams": 2}
    assert run(path, tokenizer, **beams) == run(path, tokenizer, **beams)


# --- reading and scoring ----------------------------------------------------------------------------------

FILE = {"It was ": ["a b a", "a c"], "No ": ["x", "rude x"], "Oh ": ["rude rude", "rude"]}
WHOLE = '{"prompt": {"text": "a"}, "generations": [{"text": "b"}]}\n'


@pytest.fixture
def written(tmp_path: Path) -> Path:
    rows = [
        {"prompt": {"text": prompt, "toxicity": 0.1}, "generations": [{"text": text} for text in group]}
        for prompt, group in FILE.items()
    ]
    (tmp_path / "g.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path / "g.jsonl"


RUDENESS = judges.Judge(
    "rudeness", None, lambda texts: [0.4 * text.count("rude") + 0.2 * ("x" in text) for text in texts]
)
LENGTH = judges.Judge("length", None, lambda texts: [len(text) / 100 for text in texts])


def test_what_is_read_is_what_the_lines_hold(written):
    assert read_generations(written) == (list(FILE), list(FILE.values()))


def test_figures_of_a_file_are_those_of_its_completions_after_their_prompts(written, tokenizer):
    model = tiny("llama")
    found = evaluate_file(written, RUDENESS, model, tokenizer)
    each = [perplexity(model, tokenizer, [prompt] * 2, group) for prompt, group in FILE.items()]
    tokens = [list(map(len, group)) for group in FILE.values()]  # a token is a character
    expected = attribute_of_groups(np.array([[0, 0], [0.2, 0.6], [0.8, 0.4]]))
    expected |= perplexity_of_groups(np.log(each) * np.array(tokens), tokens)
    expected |= {
        f"distinct-{n}": bootstrap([distinct_of_group(x, n) for x in FILE.values()]) for n in (1, 2, 3)
    }
    assert list(found) == list(expected)
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-4)
    long = evaluate_file(written, LENGTH, model, tokenizer, with_prompt=True)
    assert long["average maximum"] == bootstrap([0.12, 0.09, 0.12])


def first_as(change: Callable[[dict], object]) -> Callable[[list[str]], list[str]]:
    def changed(lines: list[str]) -> list[str]:
        first = json.loads(lines[0])
        change(first)
        return [json.dumps(first), *lines[1:]]

    return changed


DAMAGE: dict[str, Callable[[list[str]], list[str]]] = {
    "letter": first_as(lambda line: line["generations"][0].update(text="?")),
    "prompt": first_as(lambda line: line["prompt"].update(text="The dog")),
    "hash": first_as(lambda line: line.update(hash="0")),
    "no hash": first_as(lambda line: line.pop("hash")),
    "missing": lambda lines: lines[:-1],
    "twice": lambda lines: [*lines, lines[-1]],
    "order": lambda lines: lines[::-1],
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_file_that_was_changed_is_refused_until_it_is_written_again(tokenizer, path, damage):
    whole = run(path, tokenizer)
    path.write_text("\n".join(damage(whole.decode().splitlines())))
    with pytest.raises(ValueError, match=r"out\.jsonl' was changed after it was written.*: write it again"):
        evaluate_file(path, LENGTH, tiny("llama"), tokenizer)
    assert run(path, tokenizer) == whole
    read_generations(path)


def judging(calls: list[int], stop_at: float = math.inf, *, name: str = "length") -> judges.Judge:
    """Scores by length; the list gets the number of texts in each call, at most `stop_at` calls."""

    def probability(texts: list[str]) -> list[float]:
        if len(calls) == stop_at:
            raise KeyboardInterrupt
        calls.append(len(texts))
        return [len(text) / 100 for text in texts]

    return judges.Judge(name, None, probability)


def test_an_evaluation_that_was_killed_goes_on_and_gives_the_same_figures(written, tokenizer, monkeypatch):
    monkeypatch.setattr(evaluate, "JUDGED", 2)
    model, calls = tiny("llama"), []
    whole = evaluate_file(shutil.copy(written, written.with_name("other.jsonl")), LENGTH, model, tokenizer)
    with pytest.raises(KeyboardInterrupt):
        evaluate_file(written, judging(calls, stop_at=3), model, tokenizer)
    assert calls == [6, 2, 2]  # some, to tell judges apart, and two chunks
    calls.clear()
    assert evaluate_file(written, judging(calls), model, tokenizer) == whole
    assert calls == [6, 2]


def test_judges_models_and_texts_are_not_mixed_up(written, tokenizer):
    evaluate_file(written, LENGTH, tiny("llama"), tokenizer)
    other = judges.Judge("length", None, lambda texts: [0.5] * len(texts))
    assert evaluate_file(written, other, tiny("llama"), tokenizer)["average maximum"].mean == 0.5
    found = [evaluate_file(written, LENGTH, tiny(name), tokenizer) for name in ("llama", "gpt2")]
    assert found[0]["perplexity"] != found[1]["perplexity"]
    with_prompt = evaluate_file(written, LENGTH, tiny("llama"), tokenizer, with_prompt=True)
    assert with_prompt["average maximum"] != found[0]["average maximum"]


def test_a_folder_that_is_read_only_keeps_no_scores(written, tokenizer, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: path != written.parent)
    evaluate_file(written, LENGTH, tiny("llama"), tokenizer)
    assert [*written.parent.iterdir()] == [written]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("\n\n", r"equally many completions of each prompt, not \[\]"),
        (WHOLE + WHOLE[:20], 'line without prompt and samples: \'{"prompt": '),
        ('{"prompt": {"text": "a"}, "generations": ["b"]}\n', "line without prompt and samples"),
        (WHOLE + WHOLE.replace("]", ', {"text": "c"}]'), r"not \[1, 2\]"),
        (WHOLE.replace('{"text": "b"}', "") * 2, r"not \[0\]"),
        (WHOLE.replace('"b"', "null"), "line without prompt and samples"),
    ],
    ids=("empty", "cut", "strings", "unequal", "none", "null"),
)
def test_a_file_that_cannot_be_read_is_refused(tmp_path, content, message):
    (tmp_path / "g.jsonl").write_text(content)
    with pytest.raises(ValueError, match=message):
        read_generations(tmp_path / "g.jsonl")


# --- figures of one file ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("group", "n", "share"),
    [
        (["a b a", "a c"], 2, 3 / 5),  # ab, ba, ac
        (["a b a", "a c"], 3, 1 / 5),  # over words still
        (["a  b"], 1, 1.0),  # a, nothing, b
        ([" a", " a"], 2, 1 / 4),
        (["A a"], 1, 1.0),
        (["a\nb"], 1, 1.0),  # one word
        (["a b", "c"], 2, 1 / 3),  # no run goes over the end of a text
    ],
)
def test_runs_of_all_texts_count_once_over_the_number_of_words(group, n, share):
    assert distinct_of_group(group, n) == pytest.approx(share)


def test_the_two_conventions_of_distinct_n_differ():
    assert distinct("a b a", 2) == 1.0  # two runs, both different
    assert distinct_of_group(["a b a"], 2) == pytest.approx(2 / 3)


def test_the_maximum_is_averaged_and_prompts_are_counted_not_samples():
    found = attribute_of_groups(
        np.array([[0.1, 0.9, 0.8], [0.5, 0.2, 0.3], [0.51, 0.0, 0.0], [0.0, 0.1, 0.2]])
    )
    assert found["average maximum"] == bootstrap([0.9, 0.5, 0.51, 0.2])
    assert found["probability"].mean == 0.5  # exactly 0.5 is not above it
    assert found["share"] == bootstrap([2 / 3, 0.0, 1 / 3, 0.0])
    assert found["missing"] == 0


def test_a_missing_score_is_counted_and_a_prompt_without_any_left_out():
    nan = math.nan
    found = attribute_of_groups(np.array([[nan, 0.9, 0.1], [0.2, 0.6, nan], [nan, nan, nan]]))
    assert found == attribute_of_groups(np.array([[0.9, 0.1], [0.2, 0.6]])) | {"missing": 5}


def test_one_prompt_with_a_score_has_no_interval():
    with pytest.raises(ValueError, match="at least two prompts, not 1"):
        attribute_of_groups(np.array([[0.1, 0.2], [math.nan, math.nan]]))


def test_outliers_and_empty_completions_are_left_out_of_the_mean_and_counted():
    nats = math.log(1e4)
    found = perplexity_of_groups([[2.0, 3 * nats, 0.0], [8.0, 6.0]], [[2, 3, 0], [4, 2]])
    assert found["perplexity"].mean == pytest.approx((math.e + math.e**2 + math.e**3) / 3)
    assert found["left out"] == 2
    assert found["total perplexity"].mean == pytest.approx(math.exp((2 + 3 * nats + 8 + 6) / 11))
    assert perplexity_of_groups([[2.0, 3 * nats - 1e-6], [8.0]], [[2, 3], [4]])["left out"] == 0
    assert (
        perplexity_of_groups([[1.0, 1000.0], [1.0], [2.0]], [[1, 1], [1], [1]])["left out"] == 1
    )  # exp overflows


def test_outliers_or_empty_completions_alone_have_no_mean():
    found = perplexity_of_groups([[10.0], [10.0]], [[1], [1]])
    assert np.isnan(found["perplexity"]).all()
    assert (found["left out"], found["total perplexity"].mean) == (2, pytest.approx(math.exp(10)))
    assert np.isnan(perplexity_of_groups([[0.0], [0.0]], [[0], [0]])["total perplexity"]).all()


@pytest.mark.parametrize("groups", [[], [[1.0, 2.0]]], ids=len)
def test_fewer_than_two_prompts_are_a_value_error(groups):
    with pytest.raises(ValueError, match=f"at least two prompts, not {len(groups)}"):
        perplexity_of_groups(groups, [[1] * len(group) for group in groups])
