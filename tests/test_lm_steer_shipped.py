"""The command that trains the steers in data/steers, and the steers themselves."""

import json

import pandas as pd
import pytest
import steers as lm_steer_shipped
from conftest import tiny

from steer_utils import data
from steer_utils.lm_steer.steer import LMSteer

SHIPPED = sorted(folder.name for folder in lm_steer_shipped.STEERS.glob("*/"))


@pytest.fixture
def tiny_model(monkeypatch, tokenizer):
    monkeypatch.setattr(lm_steer_shipped.models, "load", lambda name: (tiny("gpt2"), tokenizer))
    monkeypatch.setattr(
        lm_steer_shipped, "SETTINGS", {"rank": 4, "n_steps": 3, "validation": 0.2, "max_length": 20}
    )


def test_a_steer_of_ones_own_is_trained_on_a_table_and_saved(tmp_path, tiny_model, capsys):
    table = pd.DataFrame(
        {"words": ["good day", "bad night", "so so", "fine", "awful"], "mark": [1, -1, 0, 1, -1]}
    )
    table.to_csv(tmp_path / "own.csv")
    folder = str(tmp_path / "steer")
    arguments = ["mine", "--csv", str(tmp_path / "own.csv"), "--text", "words", "--label", "mark"]
    lm_steer_shipped.main([*arguments, "--folder", folder])
    steer = LMSteer.from_pretrained(folder, tiny("gpt2"))
    assert steer.names == ("mine", "dummy")
    assert steer.projector1.shape == (2, 32, 4)
    assert steer.card["texts"]["all"] == 5
    assert folder in capsys.readouterr().out


def test_sentiment_leaves_every_fifth_document_out_and_clips_its_labels(monkeypatch):
    table = pd.DataFrame({"id": ["1", "5", "6"], "rating": [3.0, 1.0, -1.0], "text": ["a b", "c d", "e f"]})
    monkeypatch.setattr(data, "rated_sentences", lambda kind: table)
    found, about = lm_steer_shipped.texts("sentiment", None, "text", "label")
    assert found["text"].tolist() == ["a b", "e f"]
    assert found["label"].tolist() == [1.0, -0.5]
    assert "film" in about


def test_detoxification_takes_as_many_clean_comments_as_toxic_ones(tmp_path, monkeypatch):
    monkeypatch.setattr(lm_steer_shipped, "PER_CLASS", 2)
    pd.DataFrame([(f"text {i}", i % 2) for i in range(10)]).to_csv(
        tmp_path / "c.csv", header=False, index=False
    )
    found, about = lm_steer_shipped.texts("detoxification", tmp_path / "c.csv", "text", "label")
    assert sorted(found["label"]) == [-1, -1, 1, 1]
    assert "c.csv" in about


def test_without_a_table_the_command_says_what_is_missing(capsys):
    with pytest.raises(SystemExit):
        lm_steer_shipped.main(["detoxification"])
    assert "detoxification needs --csv" in capsys.readouterr().err


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_steer_is_small_whole_and_says_how_it_was_made(name):
    steer, folder = LMSteer.from_pretrained(name), lm_steer_shipped.STEERS / name
    assert steer.model_id.startswith("smollm2-135m")
    assert steer.names == (name, "dummy")
    assert steer.card["held out"]["steered"] < steer.card["held out"]["reversed"]
    assert lm_steer_shipped.COMMAND in steer.card["command"]
    assert sum(file.stat().st_size for file in folder.iterdir()) < 1_000_000
    assert json.loads((folder / "lm_steer.json").read_text())["adaptor_class"] == "multiply"
