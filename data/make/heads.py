"""How the heads in data/heads came about: which texts, which held out, what the heads get right on those.

`python -m steer_utils.classifier_head sentiment`, or sentiment5, trains a head again, for some twenty
minutes; `toxicity --csv FILE` does with the comments in that file, and `NAME --csv FILE --text COLUMN --label
COLUMN` trains a head of your own on any labelled table.
"""

import argparse
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import scorers as scorers_fit
import torch
from sklearn.model_selection import train_test_split
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from steer_utils import data, models
from steer_utils.measure.judges import minilm_sentiment, vader
from steer_utils.measure.metrics import bootstrap
from steer_utils.pplm.classifier import ClassifierHead, mean_hidden, report, train_classifier_head

HEADS = data.DATA / "heads"

SENTIMENT = ("negative", "positive")
SENTIMENT5 = ("very_negative", "negative", "neutral", "positive", "very_positive")
TOXICITY = ("non_toxic", "toxic")
STRONG = 2  # a mean rating at least so far from 0, on −4 … 4, is very negative or very positive
COMMENTS, MAX_TOKENS = 4000, 128  # of the toxic comments: enough for the accuracy, and for patience
COMMAND = "python -m steer_utils.classifier_head"


@dataclass(frozen=True)
class Recipe:
    """What a head is trained and judged on: tables with columns text and label, judged also kind."""

    classes: Sequence[str]
    train: pd.DataFrame
    judged: pd.DataFrame
    about: dict[str, Any]
    command: str
    max_tokens: int = 256
    beside_scorers: bool = False  # whether the sentiment scorers are to judge the same texts


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog=COMMAND, description="Train a classifier head and save it.")
    parser.add_argument("name", help="sentiment, sentiment5, toxicity, or a name for a head of your own")
    parser.add_argument("--csv", type=Path, help="labelled texts; for toxicity without a line of names")
    parser.add_argument("--text", help="the column with the texts")
    parser.add_argument("--label", help="the column with the labels, words or numbers")
    parser.add_argument("--check", action="store_true", help="compare a sentiment head with its card instead")
    parser.add_argument("--folder", type=Path, help="where to save it")
    parser.add_argument("--model", default=models.DEFAULT, help="as for steer_utils.load")
    given = parser.parse_args(arguments)
    needed = {"sentiment": (), "sentiment5": (), "toxicity": ("csv",)}.get(
        given.name, ("csv", "text", "label")
    )
    if missing := [f"--{name}" for name in needed if getattr(given, name) is None]:
        parser.error(f"{given.name} needs {', '.join(missing)}")
    model, tokenizer = models.load(given.model, dtype="float32")
    if given.check:
        require_as_good(ClassifierHead.from_pretrained(given.name, model), model, tokenizer)
        return
    if "text" in needed:
        head = train_on_csv(model, tokenizer, given.csv, text=given.text, label=given.label)
    else:
        head = train_shipped(model, tokenizer, recipe(given.name, given.csv))
    folder = given.folder or (Path(given.name) if "text" in needed else HEADS / given.name)
    head.save_pretrained(folder)
    for kind, found in head.metadata.get("judged", {"": head.metadata["validation"]}).items():
        print(f"{folder}: accuracy {found['accuracy']} of {found['n']:,} texts held out {kind}")


def train_on_csv(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, path: Path, *, text: str, label: str
) -> ClassifierHead:
    """Train a head on two columns of a CSV file; its classes are the labels, sorted.

    ValueError for a column that is not there; rows without text or label are left out.
    """
    table = pd.read_csv(path)
    if missing := {text, label} - set(table.columns):
        raise ValueError(f"{path.name} has no column {sorted(missing)}; it has {', '.join(map(str, table))}")
    table = table.dropna(subset=[text, label])
    codes, classes = pd.factorize(table[label], sort=True)
    names = [str(name) for name in classes]
    return train_classifier_head(model, tokenizer, table[text].astype(str).tolist(), codes, classes=names)


# --- recipes ----------------------------------------------------------------------------------------------


def recipe(name: str, csv: Path | None = None) -> Recipe:
    """What the shipped head of that name is made of."""
    if name == "toxicity":
        return toxicity(csv)
    tables = {kind: data.rated_sentences(kind) for kind in data.RATED}
    return sentiment(tables, SENTIMENT if name == "sentiment" else SENTIMENT5)


def sentiment(tables: dict[str, pd.DataFrame], classes: Sequence[str]) -> Recipe:
    """Rated sentences by kind: movie to train on, every fifth document of all kinds to judge."""
    table = pd.concat([rows.assign(kind=kind) for kind, rows in tables.items()], ignore_index=True)
    five = stars(table["rating"])
    table = table.assign(label=five if len(classes) == 5 else five // 3)
    if len(classes) == 2:
        table = table[five != 2]
    held = scorers_fit.held_out(table["id"])
    fit, judged = table[~held], table[held]
    judged = judged[scorers_fit.unseen(judged["text"], fit["text"])]
    about = {
        "what": f"which of {len(classes)} classes of sentiment a text has",
        "data": f"mean ratings of 20 people, -4 to 4, in the source distribution of {data.RATED_PACKAGE} "
        f"{data.RATED_VERSION} (Hutto & Gilbert 2014): movie to train, {', '.join(data.RATED)} to judge",
        "classes": f"from -{scorers_fit.NEUTRAL} down negative, from {scorers_fit.NEUTRAL} up positive, "
        + (f"from {STRONG} on very; between, neutral" if len(classes) == 5 else "between, left out"),
        "held out": "ids divisible by 5 (for products and news, those of whole documents); texts that repeat "
        "one with another id, of any kind, are not judged",
        "beside it": "the scorers' share on the right side of 0.5 and area under the ROC curve, on the same "
        "texts without the neutral ones; the head's score is p(positive) over that of both sides. minilm was "
        "fitted on the same kind of data, and on all four kinds of it",
    }
    command = f"{COMMAND} sentiment{5 if len(classes) == 5 else ''}"
    return Recipe(classes, fit[fit["kind"] == "movie"], judged, about, command, beside_scorers=True)


def stars(rating: pd.Series) -> pd.Series:
    """Ratings −4 … 4 as 0 (very negative), 1, 2 (neutral), 3, 4 (very positive)."""
    size = (rating.abs() >= scorers_fit.NEUTRAL).astype(int) + (rating.abs() >= STRONG)
    return 2 + np.sign(rating).astype(int) * size


def toxicity(path: Path) -> Recipe:
    """Comments from a CSV file of text and label (1 toxic) without a line of names, a fifth held out."""
    table = pd.read_csv(path, header=None, names=["text", "label"]).drop_duplicates("text")
    whole = len(table)
    table = table.sample(min(COMMENTS, whole), random_state=0).assign(kind="comments")
    train, judged = train_test_split(table, test_size=0.2, stratify=table["label"], random_state=0)
    judged = judged[scorers_fit.unseen(judged["text"], train["text"])]
    about = {
        "what": "whether a comment is toxic",
        "data": f"the Jigsaw toxic comment data in a balanced selection of 12,180 "
        f"(Hongcheng-Gao/RobTest-Demo); {len(table):,} of its {whole:,} different texts, drawn at random",
        "held out": "a fifth, as many of each class; texts that repeat a training text are not judged",
    }
    return Recipe(TOXICITY, train, judged, about, f"{COMMAND} toxicity --csv FILE", max_tokens=MAX_TOKENS)


# --- a head and its card ----------------------------------------------------------------------------------


def train_shipped(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, made_of: Recipe
) -> ClassifierHead:
    """Train a head as its recipe says, judge it on the texts held out, and write its card."""
    train, judged, limit = made_of.train, made_of.judged, made_of.max_tokens
    head = train_classifier_head(
        model, tokenizer, train["text"].tolist(), train["label"], classes=made_of.classes, max_tokens=limit
    )
    features = mean_hidden(model, tokenizer, judged["text"].tolist(), max_tokens=limit)
    label = torch.tensor(judged["label"].to_numpy())
    where = {kind: torch.tensor((judged["kind"] == kind).to_numpy()) for kind in judged["kind"].unique()}
    found = {kind: judged_on(head, features[rows], label[rows]) for kind, rows in where.items()}
    head.metadata |= made_of.about | {"judged": found}
    if made_of.beside_scorers:
        head.metadata["beside it, measured"] = _opinions(head, features, judged)
    head.metadata |= {"versions": _versions(), "command": made_of.command}
    return head


def judged_on(head: ClassifierHead, features: torch.Tensor, labels: torch.Tensor) -> dict[str, Any]:
    """What a head gets right, as JSON values; the accuracy with its 95 % interval."""
    found = report(head, features, labels)
    return {
        "n": len(found.correct),
        "accuracy": [round(value, 4) for value in bootstrap(found.correct)],
        "macro F1": round(found.macro_f1, 4),
        "calibration error": round(found.calibration_error, 4),
        "reliability": found.reliability.reset_index().round(4).to_dict("records"),
        "confusion": found.confusion.to_numpy().tolist(),
    }


def require_as_good(head: ClassifierHead, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """AssertionError if a sentiment head's accuracy on 200 held-out snippets is not what its card says."""
    name = "sentiment" if head.class_size == 2 else "sentiment5"
    judged = recipe(name).judged.query("kind == 'movie'").sample(200, random_state=0)
    guess = head.log_probs(model, tokenizer, judged["text"].tolist()).argmax(dim=-1).numpy()
    right, said = (guess == judged["label"]).mean(), head.metadata["judged"]["movie"]["accuracy"][0]
    assert abs(right - said) < 4 * np.sqrt(said * (1 - said) / 200), (right, said)  # four standard errors


def _opinions(head: ClassifierHead, features: torch.Tensor, judged: pd.DataFrame) -> dict[str, dict]:
    """Head and scorers on the texts that are not neutral: on which side of 0.5 do they put them?"""
    half = head.class_size // 2  # classes below and above the neutral one
    probabilities = head(features).softmax(dim=-1)
    bad, good = probabilities[:, :half].sum(dim=1), probabilities[:, -half:].sum(dim=1)
    score = pd.Series((good / (bad + good)).numpy(), index=judged.index)
    clear = judged[judged["rating"].abs() >= scorers_fit.NEUTRAL]
    clear = clear.assign(positive=clear["rating"] > 0)
    scorers = {"minilm": minilm_sentiment().probability, "vader": vader().probability}
    return {"head": scorers_fit.measure(lambda texts: score[texts.index], clear)} | {
        name: scorers_fit.measure(probability, clear) for name, probability in scorers.items()
    }


def _versions() -> dict[str, str]:
    packages = ("torch", "transformers", "scikit-learn", "vaderSentiment")
    return {name: metadata.version(name).split("+")[0] for name in packages} | {
        "python": platform.python_version()
    }
