"""Labelled texts to train on: a DataFrame with columns text and label, a number from −1 to 1.

`sst5` reads film reviews, `toxic_comments` the files of two Kaggle competitions, `rated_labels` the rated
sentences that pip fetches, and `labelled` any table of your own.
"""

import json
import re
import warnings
from pathlib import Path

import pandas as pd

from . import data

SST5 = {0: -1.0, 1: -0.5, 2: 0.0, 3: 0.5, 4: 1.0}
TOXIC = ["toxic", "severe_toxic", "obscene", "threat", "insult", "identity_hate"]
KAGGLE = (
    '"Jigsaw Unintended Bias in Toxicity Classification" or "Toxic Comment Classification Challenge" '
    "(kaggle.com/competitions)"
)


def labelled(table: pd.DataFrame, text: str = "text", label: str = "label") -> pd.DataFrame:
    """Any table of labelled texts with columns text (as written) and label (float, from −1 to 1).

    text, label: what the columns are called in `table`. Rows without a text or without a label are left out,
    with a warning that counts them. Raises ValueError for a column that is not there, for a label that is
    not a number from −1 to 1 (True and False are none), and where no row is left.
    """
    if missing := {text, label} - set(table.columns):
        raise ValueError(f"there is no column {sorted(missing)}: name two of {', '.join(map(str, table))}")
    found = pd.DataFrame({"text": table[text], "label": table[label]})
    blank = found.isna().any(axis=1) | (found["text"].astype(str).str.strip() == "")
    if blank.any():
        warnings.warn(f"left out {blank.sum():,} of {len(table):,} rows: no text or no label", stacklevel=2)
    found = found[~blank].reset_index(drop=True)
    if found.empty:
        raise ValueError(f"none of the {len(table):,} rows has both a text and a label")
    return found.assign(text=found["text"].astype(str), label=_in_range(found["label"], label))


def _in_range(labels: pd.Series, column: str) -> pd.Series:
    """The labels as floats, [N]; ValueError that quotes the first that is not from −1 to 1."""
    numbers = pd.to_numeric(labels, errors="coerce")
    wrong = ~numbers.between(-1, 1) | pd.api.types.is_bool_dtype(numbers)
    if wrong.any():
        raise ValueError(
            f"the label {labels[wrong].tolist()[0]!r} is not a number from -1 to 1: map labels first, "
            f'such as table["{column}"].map({{"bad": -1, "good": 1}}), or {column} / 2 - 1 for 0 to 4'
        )
    return numbers.astype(float)


def rated_labels(kind: str = "movie") -> pd.DataFrame:
    """The sentences of `data.rated_sentences`: columns text, label (rating / 4, clipped to [−1, 1]).

    kind: "movie", "tweets", "products" or "news". Raises ValueError and OSError as that function does.
    """
    table = data.rated_sentences(kind)
    return table[["text"]].assign(label=(table["rating"] / 4).clip(-1, 1))


# --- film reviews in five classes -------------------------------------------------------------------------


def sst5(source: str | Path = "SetFit/sst5", split: str = "train") -> pd.DataFrame:
    """Sentences of film reviews in five classes, very negative to very positive: columns text, label.

    label: −1, −0.5, 0, 0.5 or 1. source: a data set on the Hub, or a file with lines either of __label__1 …
    __label__5, a tab and the text, or of {"text": …, "label": 0 … 4}, as the Hub's files have them.
    split: "train" (8,544 sentences), "validation" (1,101) or "test" (2,210) on the Hub; a file is one split,
    so that `split` says nothing there. Source: Socher et al., EMNLP 2013, sentence level.
    Raises FileNotFoundError for a .txt or .jsonl file that is not there, ValueError for a line or a label of
    another kind, ModuleNotFoundError for the Hub without `datasets`.
    """
    path = Path(source)
    if path.is_file():
        lines = path.read_text(encoding="utf-8-sig").split("\n")
        table = pd.DataFrame([_sst_line(line) for line in lines if line.strip()], columns=["text", "label"])
    elif isinstance(source, Path) or path.suffix in (".txt", ".jsonl"):
        raise FileNotFoundError(f"no file {source}: give the path of one, or a data set such as SetFit/sst5")
    else:
        table = _from_hub(source, split)
    label = table["label"].map(SST5)
    if label.isna().any():
        raise ValueError(f"{source} has the label {table['label'][label.isna()].tolist()[0]!r}, not 0 to 4")
    return labelled(table.assign(label=label))


def _sst_line(line: str) -> dict[str, str | int]:
    """Text and label 0 … 4 of a line in either layout."""
    if found := re.fullmatch(r"__label__([1-5])\s+(.*)", line, flags=re.DOTALL):
        return {"text": found[2], "label": int(found[1]) - 1}
    try:
        row = json.loads(line)
        return {"text": row["text"], "label": row["label"]}
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(
            f"{line[:60]!r} is neither __label__1 to __label__5, a tab and a text, "
            'nor {"text": …, "label": 0 to 4}'
        ) from error


def _from_hub(name: str, split: str) -> pd.DataFrame:
    try:
        from datasets import load_dataset  # slow to import, and not needed for files
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"{name!r} is not a file here; for data sets of the Hub, type: pip install datasets"
        ) from error
    return load_dataset(name, split=split).to_pandas()


# --- toxic comments ---------------------------------------------------------------------------------------


def toxic_comments(path: str | Path, *, per_class: int | None = None, seed: int = 0) -> pd.DataFrame:
    """Comments of a CSV file: columns text and label, −1 for toxic and 1 for clean, as in LM-Steer's code.

    path: in one of three layouts. Kaggle's "unintended bias": comment_text, and target or toxicity, the share
    of raters who found it toxic (from 0.5 up toxic, 0 clean, what is between or blank is left out). Kaggle's
    "toxic comment classification": comment_text and six columns of 0 and 1, any 1 being toxic (−1, for not
    rated, is left out). Or text and 0 or 1 (toxic), without a line of names.
    per_class: how many comments of either class to draw; None draws as many clean ones as are toxic. Warns
    where a class has fewer. seed: of the draw; what is drawn keeps the order of the file.
    Raises FileNotFoundError that says what to download; ValueError for other columns, for a score outside
    [0, 1], for a class without comments, for per_class below 1.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}: give train.csv of the Kaggle competition {KAGGLE}")
    if per_class is not None and per_class < 1:
        raise ValueError(f"per_class={per_class}: give at least 1, or None for as many as are toxic")
    comments = _comments(path)
    toxic, clean = comments["share"] >= 0.5, comments["share"] == 0
    written = comments["text"].str.strip() != ""
    for name, rows in {"toxic": toxic, "clean": clean}.items():
        if not (rows & written).any():
            raise ValueError(f"{path.name} has no {name} comments among {len(comments):,}")
    table = labelled(comments.assign(label=clean.astype(int) - toxic)[toxic | clean])
    return _balanced(table, per_class or int((table["label"] < 0).sum()), seed)


def _comments(path: Path) -> pd.DataFrame:
    """Columns text and share, the largest score in the row; NaN where there is none, −1 for not rated."""
    as_written = {"dtype": str, "keep_default_na": False}  # else a comment "NA" would be a missing one
    first = pd.read_csv(path, header=None, nrows=1, **as_written).iloc[0].tolist()
    share = [name for name in ("target", "toxicity") if name in first][:1]
    if len(first) == 2 and first[1].strip() in ("0", "1"):
        names, scores = ["comment_text", "toxic"], ["toxic"]
    elif "comment_text" in first and (share or set(TOXIC) <= set(first)):
        names, scores = None, share or TOXIC
    else:
        raise ValueError(
            f"{path.name} has the columns {', '.join(first)[:200]}; expected comment_text with target, with "
            f"toxicity or with {', '.join(TOXIC)}; or a text and 0 or 1, without a line of names"
        )
    # header=0 goes with names=None: the first line holds them
    table = pd.read_csv(
        path, header=None if names else 0, names=names, usecols=["comment_text", *scores], **as_written
    )
    return pd.DataFrame({"text": table["comment_text"], "share": _largest(table[scores], path.name)})


def _largest(scores: pd.DataFrame, file: str) -> pd.Series:
    """The largest score of each row [N, K], as a float [N]; ValueError that quotes the first that is none."""
    numbers = scores.apply(pd.to_numeric, errors="coerce")
    blank = scores.apply(lambda column: column.str.strip() == "")
    wrong = ~(blank | numbers.ge(0) & numbers.le(1) | numbers.eq(-1)).to_numpy()
    if wrong.any():
        raise ValueError(f"{file} has the score {scores.to_numpy()[wrong][0]!r}; expected 0 to 1, or nothing")
    return numbers.max(axis=1)


def _balanced(table: pd.DataFrame, size: int, seed: int) -> pd.DataFrame:
    """`size` rows of either class, drawn without replacement; all of a class that has fewer."""
    drawn = []
    for label, rows in table.groupby("label"):
        if len(rows) < size:
            few = f"only {len(rows):,} comments have label {label:+.0f}, not {size:,}"
            warnings.warn(f"{few}: for as many of both, give per_class={len(rows)}", stacklevel=3)
        drawn.append(rows.sample(min(size, len(rows)), random_state=seed))
    return pd.concat(drawn).sort_index().reset_index(drop=True)
