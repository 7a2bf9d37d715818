"""Training a head: steps by a plain torch loop, what is kept, what is refused, and what a report says."""

import json
from pathlib import Path

import heads as classifier_head_shipped
import numpy as np
import pandas as pd
import pytest
import scorers as scorers_fit
import torch
from conftest import tiny
from sklearn.metrics import brier_score_loss
from torch import Tensor, nn

import steer_utils as su
from steer_utils import data
from steer_utils.measure import judges as scorers
from steer_utils.pplm.classifier import ClassifierHead
from steer_utils.pplm.classifier_fit import fit, fit_best, reliability, report, train_classifier_head

CLOSE = {"atol": 1e-6, "rtol": 1e-5}


def clouds(count: int, distance: float, classes: int = 3, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Points around the unit vectors times a distance, [N, 8], and whose they are, [N]."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % classes
    return torch.randn(count, 8, generator=generator) + distance * torch.eye(8)[labels], labels


def vowels(count: int = 120) -> tuple[list[str], list[int]]:
    """Texts of which half hold only a and half only o between the same consonants."""
    rng = np.random.default_rng(0)
    words = ["".join(rng.choice(list("bcdfgklmnprst"), 6)) for _ in range(count)]
    return ["".join(c + "ao"[i % 2] for c in word) for i, word in enumerate(words)], [0, 1] * (count // 2)


# --- steps ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shuffled", [False, True])
def test_steps_are_those_of_a_plain_loop(shuffled):
    features, labels = clouds(50, 1.0)
    head, linear = ClassifierHead(8, 3, seed=4), nn.Linear(8, 3)
    linear.load_state_dict(head.state_dict())
    adam, generators = torch.optim.Adam(linear.parameters(), lr=0.03), [None, None]
    if shuffled:
        generators = [torch.Generator().manual_seed(1) for _ in range(2)]
    steps = fit(head, features, labels, lr=0.03, batch_size=16, epochs=3, generator=generators[0])
    for epoch in range(3):
        order = torch.randperm(50, generator=generators[1]) if shuffled else torch.arange(50)
        for start in range(0, 50, 16):
            rows = order[start : start + 16]
            loss = -linear(features[rows]).log_softmax(-1)[range(len(rows)), labels[rows]].mean()
            adam.zero_grad()
            loss.backward()
            adam.step()
            step = next(steps)
            assert (step.epoch, step.loss) == (epoch, pytest.approx(loss.item(), rel=1e-5))
            torch.testing.assert_close(head.weight, linear.weight, **CLOSE)
            torch.testing.assert_close(head.bias, linear.bias, **CLOSE)
            assert not any(p.requires_grad or p.grad is not None for p in head.parameters())
    assert next(steps, None) is None


def test_a_step_is_taken_only_when_asked_for_and_where_gradients_are_off():
    features, labels = clouds(50, 1.0)
    head = ClassifierHead(8, 3)
    before = head.weight.clone()
    steps = fit(head, features, labels, lr=0.03, batch_size=16, epochs=3)
    assert torch.equal(head.weight, before)
    with torch.no_grad():
        next(steps)
    assert not torch.equal(head.weight, before)


def test_the_epoch_with_the_lowest_loss_on_held_out_texts_is_kept():
    train, held = clouds(30, 1.0), clouds(300, 1.0, seed=1)  # few: it overfits soon
    head, settings = ClassifierHead(8, 3), {"lr": 0.02, "batch_size": 8}
    losses = fit_best(head, train, held, epochs=40, **settings)["validation"]
    best = losses.index(min(losses))
    assert 0 < best < 39
    assert nn.functional.cross_entropy(head(held[0]), held[1]).item() == pytest.approx(losses[best], abs=1e-5)
    shorter = ClassifierHead(8, 3)
    list(fit(shorter, *train, epochs=best + 1, **settings))
    assert torch.equal(head.weight, shorter.weight)


def test_no_epochs_and_losses_without_end_are_refused():
    train = clouds(30, 1.0)
    with pytest.raises(ValueError, match="epochs must be at least 1, not 0"):
        fit_best(ClassifierHead(8, 3), train, train, epochs=0, lr=0.1, batch_size=8)
    broken = (train[0].index_fill(0, torch.tensor([3]), torch.nan), train[1])
    with pytest.raises(ValueError, match=r"\[nan\], never finite"):
        fit_best(ClassifierHead(8, 3), broken, train, epochs=1, lr=0.1, batch_size=8)


# --- training ---------------------------------------------------------------------------------------------


def test_a_head_learns_what_a_random_model_shows(main_model, tokenizer):
    texts, labels = vowels()
    before = torch.get_rng_state()
    head = train_classifier_head(
        main_model, tokenizer, texts[:80], labels[:80], classes=("a", "o"), lr=0.01, epochs=60
    )
    assert torch.equal(torch.get_rng_state(), before)
    p = head.probabilities(main_model, tokenizer, texts[80:])
    assert (p.argmax(-1) == torch.tensor(labels[80:])).float().mean() > 0.95
    facts = head.metadata
    assert facts["texts"] == {"all": 80, "held out to choose the epoch": 8, "a": 40, "o": 40}
    assert facts["validation"]["n"] == 8
    assert len(facts["losses"]["train"]) == 60
    assert not any(p.requires_grad for p in head.parameters())


def test_the_same_seed_gives_the_same_head_and_its_card_survives_saving(tokenizer, tmp_path):
    texts, labels = vowels(40)
    one, two, other = (
        train_classifier_head(tiny("llama"), tokenizer, texts, labels, epochs=3, seed=seed)
        for seed in (0, 0, 1)
    )
    assert torch.equal(one.weight, two.weight)
    assert not torch.equal(one.weight, other.weight)
    one.save_pretrained(tmp_path)
    assert ClassifierHead.from_pretrained(tmp_path, tiny("llama")).metadata == one.metadata
    assert one.classes == ("0", "1")


@pytest.mark.parametrize("kind", [list, np.array, torch.tensor, pd.Series])
def test_labels_may_come_in_any_sequence(tokenizer, kind):
    texts, labels = vowels(40)
    head = train_classifier_head(tiny("gpt2"), tokenizer, texts, kind(labels), epochs=1)
    assert head.metadata["texts"]["1"] == 20


@pytest.mark.parametrize(
    ("texts", "labels", "given", "message"),
    [
        (40, [0, 1] * 19, {}, "40 texts, 38 labels"),
        (0, [], {}, "0 texts, 0 labels"),
        (40, [0, 2] * 20, {}, r"0 to 2.*\[1\]"),
        (40, [1, 2] * 20, {}, r"0 to 2.*\[0\]"),
        (40, [-1, 0] * 20, {}, r"0 to 1.*\[-1, 1\]"),
        (40, [0] * 40, {}, r"0 to 1.*\[1\]"),
        (40, [0, 1] * 20, {"classes": ["a", "b", "c"]}, r"0 to 2.*\[2\]"),
        (40, [0, 1] * 20, {"classes": ["a"]}, r"\[1\]"),
        (40, [0, 0.5] * 20, {}, r"whole numbers from 0, not \[0\.0, 0\.5"),
        (40, ["a", "b"] * 20, {}, "whole numbers from 0, not .'a'"),
        (4, [0, 1] * 2, {}, r"4 texts, \[2, 2\].* too few to hold out 0\.1"),
        (40, [0] * 39 + [1], {}, r"40 texts, \[39, 1\].* too few"),
        (40, [0, 1] * 20, {"validation": 0}, "between 0 and 1, not 0"),
        (40, [0, 1] * 20, {"validation": 1.0}, r"between 0 and 1, not 1\.0"),
        (40, [0, 1] * 20, {"epochs": 0}, "epochs must be at least 1, not 0"),
    ],
)
def test_what_cannot_be_learned_from_is_refused(tokenizer, texts, labels, given, message):
    with pytest.raises(ValueError, match=message):
        train_classifier_head(tiny("gpt2"), tokenizer, vowels(40)[0][:texts], labels, **given)


# --- the report -------------------------------------------------------------------------------------------


def test_a_report_counts_what_is_right_and_what_was_taken_for_what():
    head = ClassifierHead(3, 3, classes="abc")
    head.load_state_dict({"weight": torch.eye(3), "bias": torch.zeros(3)})  # the class is the largest feature
    taken, labels = torch.tensor([0, 0, 0, 1, 1, 0]), torch.tensor([0, 0, 1, 1, 2, 2])
    found = report(head, 50 * torch.eye(3)[taken], labels)
    assert found.confusion.values.tolist() == [[2, 0, 0], [1, 1, 0], [1, 1, 0]]
    assert found.confusion.loc["b", "a"] == 1
    assert (found.n, found.accuracy.mean) == (6, 0.5)
    assert found.f1 == pytest.approx({"a": 2 / 3, "b": 1 / 2, "c": 0})
    assert found.macro_f1 == pytest.approx(7 / 18)
    assert found.brier == pytest.approx(0.5)  # sure each time, and wrong in half of them
    assert found.calibration_error == pytest.approx(0.5)
    assert found.reliability.values.tolist() == [[6, 1, 0.5]]
    assert str(found).startswith("accuracy 0.500 [")


def test_of_two_classes_the_brier_score_is_the_usual_one():
    (features, labels), head = clouds(60, 1.0, classes=2), ClassifierHead(8, 2, seed=2)
    expected = brier_score_loss(labels, head(features).softmax(-1)[:, 1])
    assert report(head, features, labels).brier == pytest.approx(expected, rel=1e-5)


def test_the_calibration_error_is_near_zero_for_labels_drawn_from_the_probabilities():
    head, generator = ClassifierHead(8, 4, seed=2), torch.Generator().manual_seed(0)
    features = 4 * torch.randn(20_000, 8, generator=generator)
    labels = torch.multinomial(head(features).softmax(-1), 1, generator=generator)[:, 0]
    found = report(head, features, labels)
    assert found.calibration_error < 0.02
    assert found.reliability["n"].sum() == 20_000
    head.weight *= 3  # too sure of itself
    assert report(head, features, labels).calibration_error > 0.1


def test_a_reliability_table_has_a_row_for_each_range_with_texts_in_it():
    table = reliability(np.array([0.55, 0.51, 0.91, 0.99, 1.0]), np.array([True, False, True, True, False]))
    assert table.index.tolist() == [0.5, 0.9]
    assert table["n"].tolist() == [2, 3]
    assert table["accuracy"].tolist() == pytest.approx([0.5, 2 / 3])
    assert table["confidence"].tolist() == pytest.approx([0.53, 2.9 / 3])


# --- the heads that come with the package -----------------------------------------------------------------


def test_ratings_become_five_classes_and_two():
    ratings = [-4, -2, -1.9, -0.5, -0.4, 0, 0.4, 0.5, 1.9, 2, 4]
    table = pd.DataFrame({"id": "1_1", "rating": ratings, "text": [f"text {i}" for i in range(11)]})
    five = [0, 0, 1, 1, 2, 2, 2, 3, 3, 4, 4]
    made_of = classifier_head_shipped.sentiment({"movie": table}, classifier_head_shipped.SENTIMENT5)
    assert made_of.train["label"].tolist() == five
    made_of = classifier_head_shipped.sentiment({"movie": table}, classifier_head_shipped.SENTIMENT)
    assert made_of.train["label"].tolist() == [0] * 4 + [1] * 4


def rated(kind: str) -> pd.DataFrame:
    """Made-up ratings of the texts with vowels; a document in five is held out."""
    texts, labels = vowels(200)
    ratings = [(2 * label - 1) * (1 + i % 3) for i, label in enumerate(labels)]
    ids = [f"{i % 10}_{i}" for i in range(len(texts))]
    table = pd.DataFrame({"id": ids, "rating": ratings, "text": [f"{text}{kind}{text}" for text in texts]})
    table.loc[0, "rating"] = 0.0
    return table


def test_a_shipped_head_is_trained_on_movies_and_judged_on_all_kinds_held_out(
    monkeypatch, tokenizer, tmp_path
):
    monkeypatch.setattr(data, "rated_sentences", rated)
    monkeypatch.setattr(scorers_fit, "RESAMPLES", 20)
    flat = scorers.Judge("flat", scorers.vader().accuracy, lambda texts: np.full(len(texts), 0.5))
    monkeypatch.setattr(classifier_head_shipped, "minilm_sentiment", lambda: flat)
    made_of = classifier_head_shipped.recipe("sentiment")
    assert len(made_of.train) == 160
    head = classifier_head_shipped.train_shipped(tiny("llama"), tokenizer, made_of)
    facts = head.metadata
    assert list(facts["judged"]) == list(data.RATED)
    assert facts["judged"]["movie"]["n"] == 39  # without the neutral one
    beside = facts["beside it, measured"]
    assert beside["head"]["movie"]["share"][0] == facts["judged"]["movie"]["accuracy"][0]
    assert beside["minilm"]["movie"]["share"][0] == 0.5
    head.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "classifier_head.json").read_text())["card"]["command"].endswith(
        "sentiment"
    )


def test_toxic_comments_are_read_without_a_line_of_names_and_a_fifth_is_held_out(tmp_path):
    texts, labels = vowels(100)
    pd.DataFrame({"text": [*texts, texts[0]], "label": [*labels, labels[0]]}).to_csv(
        tmp_path / "comments.csv", header=False, index=False
    )
    made_of = classifier_head_shipped.recipe("toxicity", tmp_path / "comments.csv")
    assert (len(made_of.train), len(made_of.judged)) == (80, 20)
    assert made_of.judged["label"].sum() == 10
    assert not set(made_of.train["text"]) & set(made_of.judged["text"])


@pytest.fixture
def table(tmp_path: Path, monkeypatch, tokenizer) -> Path:
    """A CSV file with words as labels, and a tiny model in the place of the embedded one."""
    texts, labels = vowels()
    words = ["ah" if label == 0 else "oh" for label in labels]
    path = tmp_path / "table.csv"
    pd.DataFrame({"says": [*texts, None], "sound": [*words, "ah"]}).to_csv(path, index=False)
    monkeypatch.setattr(su.models, "load", lambda *args, **kwargs: (tiny("llama"), tokenizer))
    monkeypatch.chdir(tmp_path)
    return path


def test_the_command_line_trains_a_head_on_a_table(table, capsys):
    classifier_head_shipped.main(["vowels", "--csv", str(table), "--text", "says", "--label", "sound"])
    head = ClassifierHead.from_pretrained(table.parent / "vowels", tiny("llama"))
    assert head.classes == ("ah", "oh")
    assert head.metadata["texts"]["all"] == 120
    assert "vowels: accuracy" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["mine"], "mine needs --csv, --text, --label"),
        (["mine", "--csv", "x.csv", "--text", "t"], "mine needs --label"),
        (["toxicity"], "toxicity needs --csv"),
    ],
)
def test_the_command_line_says_what_is_missing(arguments, message, capsys):
    with pytest.raises(SystemExit):
        classifier_head_shipped.main(arguments)
    assert message in capsys.readouterr().err


def test_a_column_that_is_not_there_is_named(table):
    with pytest.raises(ValueError, match=r"table\.csv has no column \['text'\]; it has says, sound"):
        classifier_head_shipped.main(["vowels", "--csv", str(table), "--text", "text", "--label", "sound"])
