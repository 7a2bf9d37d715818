"""How the scorers' numbers come about: the split, what counts as seen, the figures, and a small fit."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import scorers as scorers_fit

from steer_utils import data

QUALITIES = {
    "good": ["lovely", "kind", "splendid", "cheerful", "excellent", "charming", "delightful", "wonderful"],
    "bad": ["horrid", "cruel", "dreadful", "gloomy", "terrible", "boring", "disgusting", "miserable"],
}
THINGS = ["evening", "teacher", "journey", "meal", "story"]


def rated(kind: str) -> pd.DataFrame:
    """Eighty sentences written here, in place of the real ones: their documents are numbered 1 to 10."""
    rows = [
        (f"{i % 10 + 1}_{i}", sign * (1 + i % 3), f"In the {kind} it was a {word} {thing}.")
        for sign, side in ((1, "good"), (-1, "bad"))
        for i, (word, thing) in enumerate((word, thing) for word in QUALITIES[side] for thing in THINGS)
    ]
    return pd.DataFrame(rows, columns=["id", "rating", "text"])


# --- the split --------------------------------------------------------------------------------------------


def test_sentences_of_a_document_stay_together_and_every_fifth_is_held_out():
    table = pd.DataFrame({"id": ["4_1", "5_1", "5_2", "10_1", "11_5"], "rating": 1.0, "text": list("abcde")})
    fit, held = scorers_fit.split({"news": table})
    assert fit["text"].tolist() == ["a", "e"]
    assert held["text"].tolist() == ["b", "c", "d"]


def test_neutral_sentences_are_in_neither_part():
    ratings = [-2, -0.5, -0.49, 0.49, 0.5, 2]
    table = pd.DataFrame({"id": list("123456"), "rating": ratings, "text": list("abcdef")})
    fit, held = scorers_fit.split({"movie": table})
    assert fit[["text", "positive", "kind"]].values.tolist() == [
        ["a", False, "movie"],
        ["b", False, "movie"],
        ["f", True, "movie"],
    ]
    assert held["text"].tolist() == ["e"]


@pytest.mark.parametrize(
    ("text", "new"),
    [
        ("It 's a slow-burning film , and ca n't decide .", False),  # the same in another spelling
        ("a slow burning film, and can't", False),  # a part
        ("Really: it's a slow burning film and can't decide. So!", False),  # holds it
        ("IT'S A SLOW BURNING FILM -LRB- and can't decide -RRB-", False),
        ("It's a slow burning film and can decide.", True),
        ("film", True),  # too short to be called a part
        ("Yes!", False),
        ("Yes, the cafe again", True),
        ("Le cafe", False),
    ],
)
def test_a_text_is_seen_if_it_equals_holds_or_is_part_of_a_known_one(text, new):
    known = ["It's a slow burning film and can't decide.", "yes", "Le café"]
    assert scorers_fit.unseen([text], known) == [new]


def test_the_treebank_gives_its_clear_sentences(tmp_path):
    path = tmp_path / "sst.txt"
    path.write_text("".join(f"__label__{stars}\tsentence {stars} , ok\n" for stars in (1, 2, 3, 4, 5)))
    table = scorers_fit.read_treebank([path, path])
    assert table["text"].tolist() == [f"sentence {stars} , ok" for stars in (1, 2, 4, 5)] * 2
    assert table["positive"].tolist() == [False, False, True, True] * 2


# --- the figures ------------------------------------------------------------------------------------------


def test_a_score_of_one_half_is_half_right_and_counted():
    positive, score = pd.Series([True, True, False, False] * 9), pd.Series([0.9, 0.5, 0.5, 0.6] * 9)
    found = scorers_fit.figures(positive, score)
    assert found["n"] == 36
    assert found["share"][0] == (1 + 0.5 + 0.5 + 0) / 4
    assert found["undecided"] == 0.5


def test_the_area_is_the_share_of_pairs_in_the_right_order_and_the_interval_shrinks_with_n():
    rng = np.random.default_rng(0)
    widths = []
    for n in (100, 1600):
        positive = pd.Series(np.arange(n) % 2 == 0)
        score = pd.Series((rng.normal(size=n) + positive).rank(pct=True))
        pairs = np.subtract.outer(score[positive].to_numpy(), score[~positive].to_numpy())
        area, low, high = scorers_fit.figures(positive, score)["auc"]
        assert area == pytest.approx((pairs > 0).mean(), abs=1e-4)
        assert low < area < high
        widths.append(high - low)
    assert widths[0] / widths[1] == pytest.approx(4, rel=0.4)  # the square root of 16


# --- toxicity ---------------------------------------------------------------------------------------------


def comments(**columns: list) -> pd.DataFrame:
    return pd.DataFrame({"id": range(len(columns["comment_text"]))} | columns)


@pytest.mark.parametrize("column", ["target", "toxicity"])
def test_comments_are_toxic_for_half_of_their_raters_and_not_for_none_and_others_are_left_out(
    tmp_path, column
):
    texts = ["a", "b", "c", "d", "a", None, "NaN rating"]
    ratings = [0.0, 0.49, 0.5, 1.0, 0.0, 1.0, None]
    comments(comment_text=texts, **{column: ratings}).to_csv(tmp_path / "c.csv", index=False)
    table = scorers_fit.toxic_comments(tmp_path / "c.csv")
    assert table.values.tolist() == [["a", False], ["c", True], ["d", True]]


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"comment_text": ["a"], "toxic": [1]}, "comment_text, toxic, not .*was fitted to that data: give"),
        ({"comment_text": ["a"], "score": [1]}, "id, comment_text, score, not comment_text with target or"),
    ],
)
def test_other_columns_are_refused_with_those_there_are(tmp_path, columns, message):
    comments(**columns).to_csv(tmp_path / "c.csv", index=False)
    with pytest.raises(ValueError, match=message):
        scorers_fit.toxic_comments(tmp_path / "c.csv")


def test_the_card_of_toxicity_counts_as_many_comments_of_each_class(tmp_path, monkeypatch):
    monkeypatch.setattr(scorers_fit, "RESAMPLES", 50)
    monkeypatch.setattr(scorers_fit, "COMMENTS", 20)
    rude = [f"You are a stupid idiot, number {i}." for i in range(40)]
    kind = [f"The {word} {thing} was lovely." for word in QUALITIES["good"] for thing in THINGS]
    ratings = [1.0] * 35 + [0.0] * 5 + [0.0] * len(kind)  # five rude ones that nobody minds
    comments(comment_text=rude + kind, target=ratings).to_csv(tmp_path / "c.csv", index=False)
    for name in ("one.json", "two.json"):
        scorers_fit.measure_toxicity(tmp_path / "c.csv", "written here", tmp_path / name)
    card = json.loads((tmp_path / "one.json").read_text())["card"]
    found = card["measured"]["profanity_check"]["held out"]
    assert (tmp_path / "one.json").read_bytes() == (tmp_path / "two.json").read_bytes()
    assert card["held out"] == "written here"
    assert found["n"] == 40
    assert found["share of each class"]["toxic"] == 1.0
    assert found["share"][0] == (1 + found["share of each class"]["not"]) / 2
    assert found["share of each class"]["not"] >= 15 / 20


# --- a small fit ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def fitted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fitted")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "rated_sentences", rated)
        patch.setattr(scorers_fit, "RESAMPLES", 50)
        for name in ("one.json", "two.json"):
            scorers_fit.refit(folder / name)
    return folder


def test_a_fit_on_clear_sentences_gets_those_held_out_right(fitted):
    found = json.loads((fitted / "one.json").read_text())
    assert len(found["weights"]) == 384
    card = found["card"]
    assert card["texts fitted"] == {**dict.fromkeys(data.RATED, 64), "all": 256}
    assert card["positive share of them"] == 0.5
    assert set(card["measured"]) == {"minilm", "vader"}
    assert list(card["measured"]["minilm"]) == ["held out", *data.RATED]
    assert card["measured"]["minilm"]["held out"]["n"] == 64
    assert card["measured"]["minilm"]["held out"]["share"][0] > 0.9


def test_a_fit_is_the_same_every_time_and_leaves_nothing_beside_its_file(fitted):
    assert (fitted / "one.json").read_bytes() == (fitted / "two.json").read_bytes()
    assert {file.name for file in fitted.iterdir()} == {"one.json", "two.json"}
