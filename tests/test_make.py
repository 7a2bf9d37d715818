"""The scripts in data/make: what they train on and hold out, the figures of a card, small trainings."""

import json
import re
from pathlib import Path

import frontier
import heads
import numpy as np
import pandas as pd
import pytest
import scorers
import steers
import torch
from conftest import tiny

import steer_utils as su
from steer_utils import data

ROOT = Path(__file__).parents[1]
CARDS = sorted(path for path in data.DATA.rglob("*.json") if path.parent.name != "prompts")
GOOD = ["lovely", "kind", "splendid", "cheerful", "excellent", "charming", "delightful", "wonderful"]
BAD = ["horrid", "cruel", "dreadful", "gloomy", "terrible", "boring", "disgusting", "miserable"]
THINGS = ["evening", "teacher", "journey", "meal", "story"]


def sentences(kind: str, split: str) -> pd.DataFrame:
    """Forty sentences, as `data.rated_sentences` gives them; those of the two splits differ."""
    rows = [
        (sign * (1 + i % 3), f"In the {kind} {split} it was a {word} {thing}.")
        for sign, side in ((1, GOOD), (-1, BAD))
        for i, (word, thing) in enumerate((word, thing) for word in side for thing in THINGS)
    ]
    return pd.DataFrame(rows[:: 1 if split == "train" else 2], columns=["rating", "text"]).assign(id="1_1")


@pytest.fixture
def rated(monkeypatch):
    monkeypatch.setattr(data, "rated_sentences", sentences)
    monkeypatch.setattr(scorers, "RESAMPLES", 50)


def comments(path: Path, toxic: int, clean: int) -> Path:
    """A file in the columns of Kaggle's unintended-bias challenge."""
    texts = [f"You are a stupid idiot, number {i}." for i in range(toxic)]
    texts += [f"The {GOOD[i % 8]} {THINGS[i % 5]} was lovely, number {i}." for i in range(clean)]
    pd.DataFrame({"id": 0, "target": [1.0] * toxic + [0.0] * clean, "comment_text": texts}).to_csv(path)
    return path


# --- which texts ------------------------------------------------------------------------------------------


def test_neutral_sentences_are_left_out_and_the_others_are_positive_or_not():
    table = scorers.clear(pd.DataFrame({"rating": [-2, -0.5, -0.49, 0, 0.49, 0.5, 2]}))
    assert table["rating"].tolist() == [-2, -0.5, 0.5, 2]
    assert table["positive"].tolist() == [False, False, True, True]


def test_a_text_is_seen_if_it_equals_contains_or_is_part_of_a_known_one():
    known = ["It's a slow burning film and can't decide.", "yes", "Le café"]
    expected = {
        "It 's a slow-burning film , and ca n't decide .": False,  # the same in another spelling
        "a slow burning film, and can't": False,  # a part
        "Really: it's a slow burning film and can't decide. So!": False,  # contains it
        "IT'S A SLOW BURNING FILM -LRB- and can't decide -RRB-": False,
        "It's a slow burning film and can decide.": True,
        "film": True,  # too short to be called a part
        "Yes!": False,
        "Yes, the cafe again": True,
        "Le cafe": False,
    }
    assert dict(zip(expected, scorers.unseen(expected, known), strict=True)) == expected


def test_the_treebank_gives_its_sentences_that_are_not_neutral(tmp_path):
    path = tmp_path / "sst.txt"
    path.write_text("".join(f"__label__{stars}\tsentence {stars} , ok\n" for stars in (1, 2, 3, 4, 5)))
    table = scorers.sst(path)
    assert table["text"].tolist() == [f"sentence {stars} , ok" for stars in (1, 2, 4, 5)]
    assert table["positive"].tolist() == [False, False, True, True]


def test_ratings_become_five_classes_or_two():
    table = pd.DataFrame({"rating": [-4, -2, -1.9, -0.5, -0.4, 0, 0.4, 0.5, 1.9, 2, 4]})
    assert heads.with_classes(table, five=True)["label"].tolist() == [0, 0, 1, 1, 2, 2, 2, 3, 3, 4, 4]
    assert heads.with_classes(table, five=False)["label"].tolist() == [0] * 4 + [1] * 4


def test_a_sentiment_head_learns_from_films_and_is_judged_on_new_sentences_of_every_kind(monkeypatch):
    def repeated(kind: str, split: str) -> pd.DataFrame:
        table = sentences(kind, split)
        table.loc[0, "text"] = "This very same sentence is in both of the splits."
        return table

    monkeypatch.setattr(data, "rated_sentences", repeated)
    recipe = heads.sentiment("sentiment")
    assert recipe.train["kind"].unique().tolist() == ["movie"]
    assert recipe.judged["kind"].unique().tolist() == list(data.RATED)
    assert len(recipe.train) == 80
    assert len(recipe.judged) == 4 * 39


def test_a_fifth_of_the_comments_is_held_out_for_the_head_and_a_comment_counts_once(tmp_path):
    texts = [f"number {i} is {'bad' if i % 2 else 'fine'}" for i in range(100)]
    labels = [i % 2 for i in range(100)]
    table = pd.DataFrame({"text": [*texts, *texts[:2]], "label": [*labels, *labels[:2]]})
    table.to_csv(tmp_path / "c.csv", header=False, index=False)
    recipe = heads.toxicity(tmp_path / "c.csv")
    assert (len(recipe.train), len(recipe.judged)) == (80, 20)
    assert recipe.judged["label"].tolist() == recipe.judged["text"].str.contains("bad").astype(int).tolist()
    assert recipe.judged["label"].sum() == 10
    assert not set(recipe.train["text"]) & set(recipe.judged["text"])
    assert "c.csv" in recipe.about


def test_a_steer_learns_from_films_of_the_train_split_with_labels_clipped_to_one(monkeypatch):
    table = pd.DataFrame({"rating": [3.0, 1.0, -1.0, -4.0], "text": list("abcd")})
    monkeypatch.setattr(data, "rated_sentences", lambda kind, split: table.assign(text=f"{kind} {split}"))
    found, _ = steers.films()
    assert found["label"].tolist() == [1.0, 0.5, -0.5, -1.0]
    assert set(found["text"]) == {"movie train"}


# --- figures ----------------------------------------------------------------------------------------------


def test_a_score_of_one_half_is_half_right_and_counted():
    positive, score = pd.Series([True, True, False, False] * 9), pd.Series([0.9, 0.5, 0.5, 0.6] * 9)
    found = scorers.figures(positive, score)
    assert (found["n"], found["undecided"]) == (36, 0.5)
    assert found["share"][0] == (1 + 0.5 + 0.5 + 0) / 4


def test_the_area_is_the_share_of_pairs_in_the_right_order_and_the_interval_shrinks_with_n(monkeypatch):
    monkeypatch.setattr(scorers, "RESAMPLES", 300)
    rng, widths = np.random.default_rng(0), []
    for n in (100, 1600):
        positive = pd.Series(np.arange(n) % 2 == 0)
        score = pd.Series((rng.normal(size=n) + positive).rank(pct=True))
        pairs = np.subtract.outer(score[positive].to_numpy(), score[~positive].to_numpy())
        area, low, high = scorers.figures(positive, score)["auc"]
        assert area == pytest.approx((pairs > 0).mean(), abs=1e-4)
        assert low < area < high
        widths.append(high - low)
    assert widths[0] / widths[1] == pytest.approx(4, rel=0.4)  # the square root of 16


# --- whole runs, small ------------------------------------------------------------------------------------


def test_a_judge_fitted_to_clear_sentences_gets_those_held_out_right(rated, tmp_path):
    scorers.fit_sentiment(path=tmp_path / "fitted.json")
    found = json.loads((tmp_path / "fitted.json").read_text())
    card = found["card"]
    assert len(found["weights"]) == 384
    assert card["texts fitted"] == {**dict.fromkeys(data.RATED, 80), "all": 320}
    assert list(card["measured"]["minilm"]) == ["held out", *data.RATED]
    assert card["measured"]["minilm"]["held out"]["n"] == card["measured"]["vader"]["held out"]["n"] == 160
    assert card["measured"]["minilm"]["held out"]["share"][0] > 0.9
    assert [file.name for file in tmp_path.iterdir()] == ["fitted.json"]


WIKIPEDIA = "".join(
    f"You are a stupid idiot number {i}.,1\nIt was a lovely evening number {i}.,0\n" for i in range(100, 240)
)


@pytest.fixture
def few_comments(monkeypatch, tmp_path) -> tuple[Path, Path]:
    """A file of 280 comments, of which a head takes 40 and a steer 20; and one of another forum."""
    monkeypatch.setattr(scorers, "RESAMPLES", 50)
    monkeypatch.setattr(scorers, "COMMENTS", 30)
    monkeypatch.setattr(heads, "COMMENTS", 40)
    monkeypatch.setattr(steers, "PER_CLASS", 10)
    (tmp_path / "w.csv").write_text(WIKIPEDIA)
    return tmp_path / "w.csv", comments(tmp_path / "c.csv", 35, 40)


def test_the_judges_of_toxicity_meet_no_comment_that_head_or_steer_was_made_with(few_comments):
    csv, _ = few_comments
    fit, held = scorers.fresh_comments(csv)
    head = heads.toxicity(csv)
    known = {*head.train["text"], *head.judged["text"], *steers.comments(csv)[0]["text"]}
    assert 40 <= len(known) <= 60
    assert held["label"].value_counts().to_dict() == {-1: 30, 1: 30}
    assert not known & {*fit["text"], *held["text"]}
    assert not {*fit["text"]} & {*held["text"]}
    assert len(known) + len(fit) + len(held) == 280


def test_the_judges_of_toxicity_are_fitted_and_measured_on_as_many_comments_of_each_class(
    few_comments, tmp_path
):
    scorers.main(
        ["--toxicity", str(few_comments[0]), "--civil", str(few_comments[1]), "--folder", str(tmp_path)]
    )
    for name, judge in {"minilm_toxicity": "minilm", "toxic_words": "words"}.items():
        card = json.loads((tmp_path / f"{name}.json").read_text())["card"]
        assert {found["n"] for found in card["measured"][judge].values()} == {60}
        found = card["measured"][judge]["held out"]
        assert found["share of each class"]["toxic"] == 1.0
        assert found["share"][0] == pytest.approx(sum(found["share of each class"].values()) / 2, abs=1e-4)


def test_comments_of_the_challenge_that_the_judges_of_toxicity_were_fitted_to_are_refused(tmp_path):
    pd.DataFrame({"comment_text": ["a"], "toxic": [1]}).to_csv(tmp_path / "c.csv", index=False)
    with pytest.raises(ValueError, match=r"c\.csv has the columns comment_text, toxic, neither target"):
        scorers.fit_toxicity(tmp_path / "w.csv", tmp_path / "c.csv")


def test_a_sentiment_head_is_trained_and_compared_with_the_judges(rated, tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(heads, "minilm_sentiment", lambda: lambda texts: np.full(len(texts), 0.5))
    monkeypatch.setattr(su, "load", lambda dtype: (tiny("llama"), tokenizer), raising=False)
    heads.main(["sentiment", "--folder", str(tmp_path)])
    card = su.ClassifierHead.from_pretrained(tmp_path, tiny("llama")).metadata
    beside = card["beside it, measured"]
    assert card["texts"]["all"] == 80
    assert list(card["judged"]) == list(data.RATED)
    assert beside["head"]["movie"]["share"][0] == pytest.approx(card["judged"]["movie"]["accuracy"][0])
    assert beside["minilm"]["movie"]["share"][0] == 0.5
    assert "of 2 classes" in card["what"]


def test_a_detoxification_steer_is_trained_on_as_many_comments_of_each_class(
    tmp_path, tokenizer, monkeypatch
):
    monkeypatch.setattr(su, "load", lambda: (tiny("gpt2"), tokenizer), raising=False)
    monkeypatch.setattr(steers, "PER_CLASS", 8)
    monkeypatch.setattr(steers, "SETTINGS", {"rank": 4, "n_steps": 3, "validation": 0.2, "max_length": 60})
    csv = comments(tmp_path / "c.csv", 10, 20)
    steers.main(["detoxification", "--csv", str(csv), "--folder", str(tmp_path)])
    steer = su.LMSteer.from_pretrained(tmp_path, tiny("gpt2"))
    assert steer.names == ("detoxification", "dummy")
    assert steer.projector1.shape == (2, 32, 4)
    assert steer.card["texts"]["all"] == 16


@pytest.mark.parametrize(
    ("main", "arguments", "message"),
    [
        (heads.main, ["toxicity"], "toxicity needs --csv"),
        (steers.main, ["detoxification"], "detoxification needs --csv"),
        (scorers.main, ["--toxicity", "c.csv"], "--toxicity and --civil need each other"),
    ],
    ids=["heads", "steers", "scorers"],
)
def test_a_command_says_what_is_missing(main, arguments, message, capsys):
    with pytest.raises(SystemExit):
        main(arguments)
    assert message in capsys.readouterr().err


# --- what is shipped --------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", CARDS, ids=lambda path: path.relative_to(data.DATA).as_posix())
def test_a_card_names_the_script_that_makes_its_numbers(path):
    card = json.loads(path.read_text(encoding="utf-8"))["card"]
    command = next(card[key] for key in ("command", "refit", "measure") if key in card)
    script, name = re.match(r"python (data/make/\w+\.py) ?(\w*)", command).groups()
    assert (ROOT / script).is_file()
    assert name in ("", path.parent.name)


@pytest.mark.parametrize("name", ["sentiment", "detoxification"])
def test_a_shipped_steer_is_small_and_better_than_its_reverse_on_held_out_texts(name):
    steer = su.LMSteer.from_pretrained(name)
    assert steer.model_id.startswith("smollm2-135m")
    assert steer.names == (name, "dummy")
    assert steer.card["held out"]["steered"] < steer.card["held out"]["reversed"]
    assert torch.isfinite(steer.projector1).all()
    assert sum(file.stat().st_size for file in (steers.STEERS / name).iterdir()) < 1_000_000


# --- more prompts than a lesson has time for --------------------------------------------------------------


@pytest.mark.slow
def test_the_frontier_and_the_detoxification_are_measured(rated, monkeypatch, tmp_path):
    monkeypatch.setenv("STEER_UTILS_FIGURES", str(tmp_path))
    monkeypatch.setattr(frontier, "VALUES", (0, 6))
    monkeypatch.setattr(frontier, "SAMPLING", {"max_new_tokens": 3, "seed": 0})
    choose, test = (data.prompts("neutral", half)[:2] for half in ("choose", "test"))
    model, tokenizer = su.load(dtype="float32")
    halves = {"all": choose + test, "choose": choose, "test": test}
    frontier.frontier(model, tokenizer, halves, samples=2)
    found = json.loads((tmp_path / "05_frontier.json").read_text())
    assert found["openings"] == {"all": 4, "choose": 2, "test": 2}
    assert found["by_part"]["all"]["0"]["perplexity ratio"] == [1, 1, 1]
    assert {*found["by_part"]["test"]["6"]} == {"VADER", "MiniLM", "MiniLM, no films", "perplexity ratio"}
    frontier.detoxification(model, tokenizer, data.prompts("hostile")[:2], samples=2)
    found = json.loads((tmp_path / "05_detoxification.json").read_text())
    assert len(found["by_way"]) == 8
    for way in found["by_way"].values():
        for measures in way["judges"].values():
            assert measures["average maximum"][0] >= measures["share"][0] / 2
    monkeypatch.setattr(frontier, "FILTERED", (0, 12))
    frontier.filtered(model, tokenizer, halves, data.prompts("hostile")[:2], samples=2, toxic_samples=2)
    found = json.loads((tmp_path / "05_filtered.json").read_text())["by_sampling"]
    values = {name: [*one["by_part"]["test"]] for name, one in found.items()}
    assert values.pop("top-p 0.7") == ["-14", "-10", "0", "6", "8", "10"]
    assert values == {
        "filter_p 0.9": ["0", "12"],
        "filter_p 0.7": ["0", "12"],
        "constant, filter_p 0.7": ["0", "8", "20"],
        "lexicon, filter_p 0.7": ["0", "8", "20"],
    }
    assert found["filter_p 0.7"]["by_way"]["value 0"]["perplexity ratio"] == [1, 1, 1]
