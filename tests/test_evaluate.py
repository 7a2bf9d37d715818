"""Files of continuations: the same however often the writing was stopped, and measured as by hand."""

import itertools
import json
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from conftest import CONFIGS, new_model, tiny
from transformers import PreTrainedModel

import steer_utils as su
from steer_utils.measure import evaluate, generation_files
from steer_utils.measure import judges as scorers
from steer_utils.measure.evaluate import evaluate_file
from steer_utils.measure.generation_files import generate_file, read_generations
from steer_utils.measure.group_metrics import distinct_of_group, perplexity_of_groups
from steer_utils.measure.metrics import bootstrap, perplexity

PROMPTS = ["The cat", "a", "Once upon a time", "The cat", "b", "I said", "The cat", "a", "No, she", "It was"]
SHORT = {"num_samples": 3, "max_new_tokens": 4, "batch_size": 3, "top_p": 1.0}  # a chunk of eight prompts
STEER = su.ActivationAddition(3, 1, "a")


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three prompts in a chunk of SHORT, so that PROMPTS take four."""
    monkeypatch.setattr(generation_files, "BATCHES", 3)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "new" / "out.jsonl"


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def texts(path: Path) -> list[list[str]]:
    return [[one["text"] for one in line["generations"]] for line in lines(path)]


# --- what a file holds ------------------------------------------------------------------------------------


@pytest.mark.parametrize("steer", [(), STEER, [STEER, STEER]])
def test_a_file_holds_what_one_call_of_generate_gives_repeated_prompts_included(
    main_model, tokenizer, path, steer
):
    assert generate_file(main_model, tokenizer, PROMPTS, path, steer=steer, seed=5, **SHORT) == path
    table = su.generate(main_model, tokenizer, PROMPTS, steer=steer, seed=5, min_new_tokens=4, **SHORT)
    assert [line["prompt"] for line in lines(path)] == [{"text": prompt} for prompt in PROMPTS]
    assert list(itertools.chain(*texts(path))) == table["completion"].tolist()
    repeated = [text for prompt, text in zip(PROMPTS, texts(path), strict=True) if prompt == "The cat"]
    assert len(set(map(tuple, repeated))) == 3


def test_steers_that_come_from_an_iterator_steer_every_chunk(tokenizer, path):
    model = tiny("gpt2")
    generate_file(model, tokenizer, PROMPTS, path, steer=iter([STEER]), **SHORT)
    table = su.generate(model, tokenizer, PROMPTS, steer=STEER, seed=0, min_new_tokens=4, **SHORT)
    assert list(itertools.chain(*texts(path))) == table["completion"].tolist()


def ends_early() -> PreTrainedModel:
    """A tiny GPT-2 that gives every token of its vocabulary nearly the same probability, EOS too."""
    config = CONFIGS["gpt2"]()
    config.initializer_range = 0.01
    model = new_model(config)
    torch.nn.init.normal_(model.get_input_embeddings().weight, std=0.01)
    return model


def test_every_continuation_has_all_its_tokens_unless_they_may_end_early(tokenizer, tmp_path):
    exact, free = tmp_path / "exact.jsonl", tmp_path / "free.jsonl"
    settings = {"num_samples": 20, "max_new_tokens": 30, "top_p": 1.0}
    generate_file(ends_early(), tokenizer, ["ab", "c"], exact, **settings)
    generate_file(ends_early(), tokenizer, ["ab", "c"], free, exact_length=False, **settings)
    assert {len(text) for group in texts(exact) for text in group} == {30}  # a token is a character
    assert min(len(text) for group in texts(free) for text in group) < 30


def test_prompts_come_from_a_file_or_from_the_course(tokenizer, tmp_path):
    source = tmp_path / "prompts.jsonl"
    source.write_text('{"prompt": {"text": "The cat"}, "md5_hash": "0"}\n{"prompt": {"text": "a"}}\n')
    settings = {"num_samples": 1, "max_new_tokens": 1}
    generate_file(tiny("gpt2"), tokenizer, source, tmp_path / "one.jsonl", **settings)
    assert [line["prompt"]["text"] for line in lines(tmp_path / "one.jsonl")] == ["The cat", "a"]
    generate_file(tiny("gpt2"), tokenizer, "openings", tmp_path / "two.jsonl", **settings)
    assert [line["prompt"]["text"] for line in lines(tmp_path / "two.jsonl")] == su.data.prompts("openings")


@pytest.mark.parametrize(
    ("prompts", "settings", "message"),
    [
        ([], {}, "prompts must be at least 1, not 0"),
        (["a"], {"num_samples": 0}, "num_samples must be at least 1, not 0"),
        (["a"], {"max_new_tokens": 0}, "max_new_tokens must be at least 1, not 0"),
        (["a"], {"top_p": 0.0}, "top_p must be above 0"),
        (["a"], {"seed": -1}, "seed must be at least 0, not -1"),
    ],
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

    patch.setattr(generation_files, "generate", generate)


@pytest.mark.parametrize("chunks_done", [0, 1, 2, 3])
def test_a_run_that_was_killed_goes_on_and_gives_the_same_file(tokenizer, tmp_path, monkeypatch, chunks_done):
    whole, calls = run(tmp_path / "whole.jsonl", tokenizer), []
    with monkeypatch.context() as patch:
        counting(patch, calls, stop_at=1 + chunks_done)  # the first call writes the first continuation
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "out.jsonl", tokenizer)
    before = (tmp_path / "out.jsonl").read_bytes() if chunks_done else b""
    assert before.count(b"\n") == 3 * chunks_done
    calls.clear()
    counting(monkeypatch, calls)
    assert run(tmp_path / "out.jsonl", tokenizer) == whole
    assert whole.startswith(before)
    assert len(calls) == 1 + 4 - chunks_done  # what was there has not been written again


@pytest.mark.parametrize("cut", [1, 0.35, 0.77, -1])
def test_a_line_that_was_cut_off_is_written_again(tokenizer, path, cut):
    whole = run(path, tokenizer)
    path.write_bytes(whole[: cut if isinstance(cut, int) else int(cut * len(whole))])
    assert run(path, tokenizer) == whole


@pytest.mark.parametrize("kept", [0, 1, 3, 5, 9])
def test_a_file_goes_on_after_any_number_of_lines(tokenizer, path, kept):
    whole = run(path, tokenizer)
    path.write_bytes(b"".join(whole.splitlines(keepends=True)[:kept]))
    assert run(path, tokenizer) == whole


def test_a_finished_file_is_left_alone(tokenizer, path, monkeypatch):
    whole, calls = run(path, tokenizer), []
    counting(monkeypatch, calls)
    assert run(path, tokenizer) == whole
    assert len(calls) == 1


def test_letters_beyond_ascii_and_line_separators_in_prompts_survive_a_cut(tokenizer, path):
    prompts = ["a\u2028b", 'She said "no"', "x\ny", "c\x85d"]
    model = tiny("gpt2")
    generate_file(model, tokenizer, prompts, path, **SHORT)
    whole = path.read_bytes()
    assert whole.count(b"\n") == len(prompts)
    path.write_bytes(whole[: len(whole) // 2])
    generate_file(model, tokenizer, prompts, path, **SHORT)
    assert path.read_bytes() == whole
    assert read_generations(path).prompts == prompts


class Quiet:
    """A steer that says nothing of its strength."""

    def __init__(self, coeff: float) -> None:
        self.on = su.ActivationAddition(coeff, 1, "a").on


def other_weights() -> PreTrainedModel:
    model = new_model(CONFIGS["gpt2"]())
    model.lm_head.weight.mul_(1.01)
    return model


OTHER: dict[str, tuple[Callable[[], dict], str]] = {
    "seed": (lambda: {"seed": 2}, "seed 1, now 2"),
    "samples": (lambda: {"num_samples": 2}, "num_samples 3, now 2"),
    "tokens": (lambda: {"max_new_tokens": 5}, "max_new_tokens 4, now 5; min_new_tokens 4, now 5"),
    "length": (lambda: {"exact_length": False}, "min_new_tokens 4, now None"),
    "batch": (lambda: {"batch_size": 4}, "batch_size 3, now 4"),
    "top_p": (lambda: {"top_p": 0.9}, "top_p 1.0, now 0.9"),
    "temperature": (lambda: {"temperature": 0.7}, "temperature None, now 0.7"),
    "prompts": (lambda: {"prompts": [*PROMPTS[:-1], "It is"]}, "prompts '10 with SHA-256 .* now '10 with"),
    "steer": (
        lambda: {"steer": su.ActivationAddition(3, 1, "b")},
        "steer ….*hook_resid_pre', prompt='a', .* now ….*_pre', prompt='b'",
    ),
    "no steer": (lambda: {"steer": ()}, r"steer \"\[ActivationAddition\(.*, now '\[\]'"),
    "weights": (lambda: {"model": other_weights()}, r"its loss \d\.\d+, now \d\.\d+"),
}


@pytest.mark.parametrize(("change", "message"), OTHER.values(), ids=OTHER)
def test_a_file_made_with_other_settings_is_refused_and_left_alone(tokenizer, path, change, message):
    run(path, tokenizer)
    path.write_bytes(path.read_bytes()[:-9])
    before = {file.name: file.read_bytes() for file in path.parent.iterdir()}
    with pytest.raises(ValueError, match=rf"out\.jsonl' was made with other settings .*{message}.*: give"):
        run(path, tokenizer, **change())
    assert {file.name: file.read_bytes() for file in path.parent.iterdir()} == before


def test_steers_that_look_alike_are_told_apart_by_what_they_do(tokenizer, path):
    whole = run(path, tokenizer, steer=Quiet(3))
    assert run(path, tokenizer, steer=Quiet(3)) == whole  # another object at another place in memory
    assert repr(Quiet(3)) not in (settings := Path(f"{path}.settings.json").read_text())
    assert "Quiet object>" in settings
    with pytest.raises(ValueError, match=r"other settings \((first continuation|its loss) "):
        run(path, tokenizer, steer=Quiet(4))


def test_numbers_that_were_rounded_otherwise_are_no_other_settings(tokenizer, path):
    whole, beside = run(path, tokenizer), Path(f"{path}.settings.json")
    settings = json.loads(beside.read_text())
    for off, ok in ((1e-5, True), (-1e-5, True), (0.01, False)):
        beside.write_text(json.dumps(settings | {"its loss": settings["its loss"] + off}))
        if ok:
            assert run(path, tokenizer) == whole
            continue
        with pytest.raises(ValueError, match="its loss"):
            run(path, tokenizer)


def test_beams_have_no_loss_to_compare(tokenizer, path):
    beams = {"num_samples": 1, "do_sample": False, "num_beams": 2}
    assert run(path, tokenizer, **beams) == run(path, tokenizer, **beams)


def test_a_file_without_settings_beside_it_is_refused_and_left_alone(tokenizer, path):
    path.parent.mkdir()
    path.write_text("somebody's notes, without a newline")
    with pytest.raises(
        ValueError, match=r"out\.jsonl' has no whole out\.jsonl\.settings\.json beside it: give"
    ):
        run(path, tokenizer)
    assert path.read_text() == "somebody's notes, without a newline"


@pytest.mark.parametrize("damaged", ["", "{", "[]", "{}"])
def test_damaged_settings_are_none(tokenizer, path, damaged):
    whole = run(path, tokenizer)
    Path(f"{path}.settings.json").write_text(damaged)
    with pytest.raises(ValueError, match=r"has no whole out\.jsonl\.settings\.json beside it: give"):
        run(path, tokenizer)
    assert path.read_bytes() == whole


def test_settings_without_a_line_are_replaced(tokenizer, path):
    whole = run(path, tokenizer)
    path.write_bytes(b"")
    assert run(path, tokenizer, seed=2) != whole
    path.unlink()
    assert run(path, tokenizer) == whole


# --- measuring --------------------------------------------------------------------------------------------

FILE = {
    "It was ": ["a b a", "a c"],  # dist-1 3/5, dist-2 3/5, dist-3 1/5
    "No ": ["x", "rude x"],  # 2/3, 1/3, 0
    "Oh ": ["rude rude", "rude"],  # 1/3, 1/3, 0
}


def write(path: Path, groups: dict[str, list[str]]) -> Path:
    rows = [
        {"prompt": {"text": prompt, "toxicity": 0.1}, "generations": [{"text": text} for text in group]}
        for prompt, group in groups.items()
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return write(tmp_path / "generations.jsonl", FILE)


def scorer(name: str, score: Callable[[str], float]) -> scorers.Scorer:
    return scorers.Scorer(name, None, lambda texts: np.array([score(text) for text in texts]))


RUDENESS = scorer("rudeness", lambda text: 0.4 * text.count("rude") + 0.2 * ("x" in text))


def test_toxicity_is_that_of_the_continuation_alone(tmp_path):
    groups = {"rude rude rude": ["fine", "x"], "": ["rude x", "rude"], "a": ["rude rude", "rude x"]}
    found = evaluate_file(write(tmp_path / "g.jsonl", groups), ["toxicity"], toxicity=RUDENESS)
    figures = found["figures"]["toxicity"]
    assert figures["average_maximum"].mean == pytest.approx((0.2 + 0.6 + 0.8) / 3)
    assert figures["probability"] == bootstrap([0, 1, 1])


def test_sentiment_is_that_of_prompt_and_continuation_as_one_text(tmp_path):
    groups = {"I am gl": ["ad", "um"], "gl": ["ad", "ad"], "sad": ["glad", "ly"], "": ["a", "b"]}
    judge = scorer("gladness", lambda text: 0.9 if "glad" in text else 0.5)
    found = evaluate_file(write(tmp_path / "g.jsonl", groups), ["sentiment"], sentiment=judge)
    assert found["figures"]["sentiment"] == {"share_positive": bootstrap([0.5, 1, 0.5, 0])}


def test_dist_n_is_the_mean_over_prompts(file):
    found = evaluate_file(file, ["dist-n"])["figures"]["dist-n"]
    assert found["dist-1"].mean == pytest.approx((3 / 5 + 2 / 3 + 1 / 3) / 3)
    assert found["dist-2"].mean == pytest.approx((3 / 5 + 1 / 3 + 1 / 3) / 3)
    assert found["dist-3"].mean == pytest.approx((1 / 5 + 0 + 0) / 3)
    assert found["dist-1"] == bootstrap([distinct_of_group(group, 1) for group in FILE.values()])


def test_repetition_is_the_mean_over_prompts(tmp_path):
    groups = {"a": ["x y z x y z x y", "none"], "b": ["v w v w v", ""]}
    found = evaluate_file(write(tmp_path / "g.jsonl", groups), ["repetition"])["figures"]["repetition"]
    assert found["rep-4"] == bootstrap([(2 / 5 + 0) / 2, 0.0])  # xyzx yzxy zxyz xyzx yzxy; vwvw wvwv


def test_perplexity_is_the_judge_s_of_the_continuation_after_its_prompt(main_model, tokenizer, file):
    found = evaluate_file(file, ["perplexity"], judge=(main_model, tokenizer))["figures"]["perplexity"]
    each = [perplexity(main_model, tokenizer, [prompt] * 2, group) for prompt, group in FILE.items()]
    tokens = [list(map(len, group)) for group in FILE.values()]  # a token is a character
    losses = [np.log(values) * count for values, count in zip(each, tokens, strict=True)]
    expected = perplexity_of_groups(losses, tokens)
    np.testing.assert_allclose(found["mean"], expected.mean, rtol=1e-4)
    np.testing.assert_allclose(found["total"], expected.total, rtol=1e-4)
    assert found["left_out"] == expected.left_out


def test_the_result_is_what_is_written_and_shown_with_the_judges(tokenizer, file, tmp_path, capsys):
    output = tmp_path / "new" / "result.json"
    metrics = ["dist-n", "toxicity", "sentiment", "perplexity"]
    judge = (tiny("gpt2"), tokenizer)
    result = evaluate_file(file, metrics, output_file=output, judge=judge, toxicity=RUDENESS)
    assert json.loads(output.read_text()) == json.loads(json.dumps(result))
    assert [file.name for file in output.parent.iterdir()] == ["result.json"]
    assert (result["generations"], result["prompts"], result["samples"]) == ("generations.jsonl", 3, 2)
    assert list(result["figures"]) == metrics
    sentiment = scorers.minilm_sentiment()
    assert result["judges"] == {
        "toxicity": "rudeness, not measured here",
        "sentiment": f"{sentiment.name}, right on {sentiment.accuracy}",
        "perplexity": su.models.model_id(tiny("gpt2")),
    }
    shown = capsys.readouterr().out
    assert "3 prompts × 2 continuations" in shown
    for name in ("average maximum", "share positive", "left out", "dist-3", "rudeness"):
        assert name in shown


def test_toxicity_is_judged_by_the_embedded_scorer_if_none_is_given(file):
    found = evaluate_file(file, ["toxicity"])
    scores = [scorers.profanity_check()(group).max() for group in FILE.values()]
    assert found["figures"]["toxicity"]["average_maximum"] == bootstrap(scores)
    assert found["judges"]["toxicity"].startswith("alt-profanity-check ")


def test_what_was_generated_can_be_measured(tokenizer, path):
    run(path, tokenizer)
    found = evaluate_file(path, ["dist-n", "perplexity"], judge=(tiny("gpt2"), tokenizer))
    assert (found["prompts"], found["samples"]) == (10, 3)
    assert read_generations(path).texts == texts(path)


@pytest.mark.parametrize(
    ("metrics", "message"),
    [
        (
            ["toxicity", "fluency"],
            "no metric 'fluency': give some of toxicity, sentiment, perplexity, dist-n, repetition$",
        ),
        (["ppl-big"], "no metric 'ppl-big': .*ppl-small are perplexity, each with its judge"),
        ("toxicity", "not the single string 'toxicity'"),
        ([], "no metrics to measure: give some of toxicity"),
        (["dist-n", "perplexity"], r"needs a judge=\(model, tokenizer\), on the command line --judge MODEL"),
    ],
)
def test_metrics_that_cannot_be_measured_are_refused_before_anything_is_read(metrics, message):
    with pytest.raises(ValueError, match=message):
        evaluate_file("no-such-file.jsonl", metrics)


WHOLE = '{"prompt": {"text": "a"}, "generations": [{"text": "b"}]}\n'


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "has no lines"),
        ("\n\n", "has no lines"),
        (WHOLE, "has one prompt: an interval needs at least two"),
        (WHOLE + WHOLE[:20], 'line 2 of .* is not whole, or is not .*generations.*: \'{"prompt": '),
        (WHOLE + '{"prompt": "a"}\n', "line 2 of .* is not whole, or"),
        ('{"prompt": {"text": "a"}, "generations": ["b"]}\n', "line 1 of .* is not whole, or"),
        ("[]\n", "line 1 of .* is not whole, or"),
        (
            WHOLE + '{"prompt": {"text": "a"}, "generations": [{"text": "b"}, {"text": "c"}]}\n',
            "line 2 of .* has 2 continuations and the first 1: all need as many",
        ),
        ('{"prompt": {"text": "a"}, "generations": []}\n', "line 1 of .* has 0 .*at least one"),
    ],
)
def test_a_file_that_cannot_be_measured_is_refused_with_its_line(tmp_path, content, message):
    (tmp_path / "g.jsonl").write_text(content)
    with pytest.raises(ValueError, match=message):
        evaluate_file(tmp_path / "g.jsonl", ["dist-n"])


def test_a_file_that_is_not_there_is_named():
    with pytest.raises(FileNotFoundError, match=r"no-such-file\.jsonl"):
        evaluate_file("no-such-file.jsonl", ["dist-n"])


# --- the command line -------------------------------------------------------------------------------------


@pytest.fixture
def saved(tokenizer, tmp_path) -> Path:
    """A folder with the tiny GPT-2."""
    tiny("gpt2").save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def command(*words: str | Path) -> None:
    evaluate.main(list(map(str, words)))


def test_both_commands_do_what_the_functions_do(saved, tokenizer, tmp_path):
    source = tmp_path / "prompts.jsonl"
    source.write_text("".join(json.dumps({"prompt": {"text": prompt}}) + "\n" for prompt in PROMPTS))
    written, result = tmp_path / "out.jsonl", tmp_path / "result.json"
    sizes = ("--num-samples", "2", "--max-new-tokens", "3", "--seed", "4")
    command("generate", "--model", saved, "--prompts", source, "--output", written, *sizes)
    expected = generate_file(
        *su.load(saved), PROMPTS, tmp_path / "own.jsonl", num_samples=2, max_new_tokens=3, seed=4, top_p=1.0
    )
    assert written.read_bytes() == expected.read_bytes()
    command(
        *("score", "--generations", written, "--metrics", "dist-n,perplexity"),
        *("--judge", saved, "--output", result),
    )
    found = evaluate_file(written, ["dist-n", "perplexity"], judge=su.load(saved))
    assert json.loads(result.read_text()) == json.loads(json.dumps(found))


def test_a_trained_steer_is_read_from_its_folder_and_set_to_its_values(
    saved, tokenizer, tmp_path, monkeypatch
):
    class LMSteer:
        """In place of the trained one: adds its values one after the other."""

        def __init__(self, folder: str) -> None:
            assert folder == "my-steer"

        @classmethod
        def from_pretrained(cls, folder: str, model: PreTrainedModel) -> "LMSteer":
            return cls(folder)

        def at(self, values: Sequence[float]) -> su.AdditionSum:
            return su.AdditionSum(tuple(su.ActivationAddition(value, 1, "a") for value in values))

    module = ModuleType("steer_utils.lm_steer")
    module.LMSteer = LMSteer
    monkeypatch.setitem(sys.modules, "steer_utils.lm_steer", module)
    sizes = ("--num-samples", "2", "--max-new-tokens", "3", "--top-p", "0.5")
    words = ("--model", saved, "--prompts", "openings", "--output", tmp_path / "out.jsonl")
    command("generate", *words, *sizes, "--steer", "my-steer", "--steer-values", "-5", "1.5")
    expected = generate_file(
        *su.load(saved),
        "openings",
        tmp_path / "own.jsonl",
        steer=[su.ActivationAddition(-5, 1, "a"), su.ActivationAddition(1.5, 1, "a")],
        num_samples=2,
        max_new_tokens=3,
        top_p=0.5,
    )
    assert (tmp_path / "out.jsonl").read_bytes() == expected.read_bytes()


@pytest.mark.parametrize("alone", [("--steer", "folder"), ("--steer-values", "5", "1")])
def test_a_folder_and_values_belong_together(tmp_path, capsys, alone):
    with pytest.raises(SystemExit):
        command("generate", "--prompts", "openings", "--output", tmp_path / "out.jsonl", *alone)
    assert "--steer FOLDER and --steer-values V … belong together" in capsys.readouterr().err
