"""Train the classifier heads in data/heads again, or check the sentiment heads.

python data/make/heads.py sentiment             about twenty minutes on one core; sentiment5 has five classes
python data/make/heads.py toxicity --csv FILE   comments, as `data.toxic_comments` reads them
python data/make/heads.py check                 some minutes: are they right as often as their cards say?
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt
from pathlib import Path

import numpy as np
import pandas as pd
import scorers
import torch
from sklearn.model_selection import train_test_split
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import steer_utils as su
from steer_utils import data
from steer_utils.measure.judges import minilm_sentiment, vader
from steer_utils.measure.metrics import bootstrap
from steer_utils.pplm.classifier import ClassifierHead, mean_hidden, report, train_classifier_head

COMMAND = "python data/make/heads.py"
CLASSES = {
    "sentiment": ("negative", "positive"),
    "sentiment5": ("very_negative", "negative", "neutral", "positive", "very_positive"),
    "toxicity": ("non_toxic", "toxic"),
}
STRONG = 2  # from this absolute mean rating on, on a scale from -4 to 4, a text is very negative or positive
COMMENTS = 4000
HEADS = data.DATA / "heads"
MAX_TOKENS = {"sentiment": 256, "sentiment5": 256, "toxicity": 128}
WORDS = ("what", "data", "classes", "held out", "beside it", "command")  # of a card, which stay
CHECKED = 200  # held-out snippets that `check` judges


@dataclass(frozen=True)
class Recipe:
    """The texts of one head: columns text, label and kind, and for sentiment rating.

    about: what its card says of the texts, where that is new.
    """

    name: str
    train: pd.DataFrame
    judged: pd.DataFrame
    about: str = ""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog=COMMAND, description="Train or check the heads in data/heads.")
    parser.add_argument("name", choices=[*CLASSES, "check"])
    parser.add_argument("--csv", type=Path, help="the comments, for toxicity")
    parser.add_argument("--folder", type=Path, help="where to save it, if not in data/heads")
    given = parser.parse_args(arguments)
    if given.name == "toxicity" and given.csv is None:
        parser.error("toxicity needs --csv")
    model, tokenizer = su.load(dtype="float32")
    if given.name == "check":
        return sum(not check(model, tokenizer, name) for name in ("sentiment", "sentiment5"))
    recipe = toxicity(given.csv) if given.name == "toxicity" else sentiment(given.name)
    head = train(model, tokenizer, recipe)
    head.save_pretrained(given.folder or HEADS / given.name)
    for kind, found in head.metadata["judged"].items():
        print("{}, {}: accuracy {:.3f} [{:.3f}, {:.3f}]".format(given.name, kind, *found["accuracy"]))
    return 0


# --- recipes ----------------------------------------------------------------------------------------------


def sentiment(name: str) -> Recipe:
    """Film snippets of the train split to train on; the test split of all kinds to judge on."""
    five = name == "sentiment5"
    fit, held = (with_classes(scorers.rated(split), five=five) for split in ("train", "test"))
    held = held[scorers.unseen(held["text"], fit["text"])]
    return Recipe(name, fit[fit["kind"] == "movie"], held)


def with_classes(table: pd.DataFrame, *, five: bool) -> pd.DataFrame:
    """Add the label: 0 (very negative) to 4; or, without neutral texts, 0 (negative) or 1 (positive)."""
    size = (table["rating"].abs() >= scorers.NEUTRAL).astype(int) + (table["rating"].abs() >= STRONG)
    stars = 2 + np.sign(table["rating"]).astype(int) * size
    return table.assign(label=stars) if five else table.assign(label=stars // 3)[stars != 2]


def toxicity(csv: Path) -> Recipe:
    """Comments drawn from as many toxic as clean ones; a fifth of them to judge on."""
    table = data.toxic_comments(csv).drop_duplicates("text")
    table = table.sample(min(COMMENTS, len(table)), random_state=0)
    table = table.assign(label=(table["label"] < 0).astype(int), kind="comments")
    fit, held = train_test_split(table, test_size=0.2, stratify=table["label"], random_state=0)
    held = held[scorers.unseen(held["text"], fit["text"])]
    about = f"{len(table):,} comments of {csv.name}, drawn at random from as many of each class"
    return Recipe("toxicity", fit, held, about)


# --- training and checking --------------------------------------------------------------------------------


def train(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, recipe: Recipe) -> ClassifierHead:
    """Train a head, judge it on the held-out texts, and renew the numbers of its card."""
    fit, held, limit = recipe.train, recipe.judged, MAX_TOKENS[recipe.name]
    head = train_classifier_head(
        model, tokenizer, fit["text"].tolist(), fit["label"], classes=CLASSES[recipe.name], max_tokens=limit
    )
    features = mean_hidden(model, tokenizer, held["text"].tolist(), max_tokens=limit)
    label = torch.tensor(held["label"].to_numpy())
    where = {kind: torch.tensor((held["kind"] == kind).to_numpy()) for kind in held["kind"].unique()}
    old, judged = ClassifierHead.from_pretrained(recipe.name).metadata, {}
    for kind, rows in where.items():
        found = report(head, features[rows], label[rows])
        judged[kind] = {
            "n": len(found.correct),
            "accuracy": [round(one, 4) for one in bootstrap(found.correct)],
            "macro F1": round(found.macro_f1, 4),
            "calibration error": round(found.calibration_error, 4),
            "reliability": found.reliability.reset_index().round(4).to_dict("records"),
            "confusion": found.confusion.to_numpy().tolist(),
        }
    head.metadata |= {key: old[key] for key in WORDS if key in old} | {"judged": judged}
    head.metadata["data"] = recipe.about or old["data"]
    head.metadata["versions"] = scorers.versions("torch", "transformers", "scikit-learn", "vaderSentiment")
    if "rating" in held:
        head.metadata["beside it, measured"] = compared(head, features, held)
    return head


def compared(head: ClassifierHead, features: Tensor, held: pd.DataFrame) -> dict[str, dict]:
    """The head and the two judges of sentiment on held-out texts that are not neutral."""
    half, probabilities = head.class_size // 2, head(features).softmax(dim=-1)
    bad, good = probabilities[:, :half].sum(dim=1), probabilities[:, -half:].sum(dim=1)
    score, judged = pd.Series((good / (bad + good)).numpy(), index=held.index), scorers.clear(held)
    judges = {
        "head": lambda texts: score[judged.index].to_numpy(),
        "minilm": minilm_sentiment(),
        "vader": vader(),
    }
    return {name: scorers.measured(judge, judged) for name, judge in judges.items()}


def check(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str) -> bool:
    """Whether a head's accuracy on held-out film snippets is within four standard errors of its card's."""
    head = ClassifierHead.from_pretrained(name, model)
    held = sentiment(name).judged.query("kind == 'movie'")
    held = held.sample(min(CHECKED, len(held)), random_state=0)
    guess = head.log_probs(model, tokenizer, held["text"].tolist()).argmax(dim=-1).numpy()
    found, said = float((guess == held["label"]).mean()), head.metadata["judged"]["movie"]["accuracy"][0]
    print(f"{name}: accuracy {found:.3f} on {len(held)} held-out film snippets; its card says {said:.3f}")
    return abs(found - said) <= 4 * sqrt(said * (1 - said) / len(held))


if __name__ == "__main__":
    sys.exit(main())
