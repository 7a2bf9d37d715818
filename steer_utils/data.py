"""The texts that the course uses: those written for it, in `data/`, and later the public data sets."""

import json
from pathlib import Path

HERE = Path(__file__).parent
DATA = next((folder for folder in (HERE / "_data", HERE.parent / "data") if folder.is_dir()), HERE / "_data")


def prompts(source: str | Path = "openings", split: str | None = None) -> list[str]:
    """Read prompts from a JSONL file whose lines hold {"prompt": {"text": …}}, as LM-Steer's do.

    source: a name in data/prompts ("openings": 48 unfinished everyday sentences) or a path.
    split: "choose" to tune on, "test" to report on, None for all lines.
    Raises FileNotFoundError with the names there are, ValueError for a split that no line has.
    """
    path = _find("prompts", source, ".jsonl")
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line.strip()]
    texts = [line["prompt"]["text"] for line in lines if split in (None, line.get("split"))]
    if not texts:
        raise ValueError(f"{path.name} has no prompts of split {split!r}")
    return texts


def words(source: str | Path) -> list[str]:
    """Read a list of words, one a line. source: a name in data/wordlists ("wedding") or a path.

    Raises FileNotFoundError with the names there are, ValueError for a list without words.
    """
    path = _find("wordlists", source, ".txt")
    found = path.read_text(encoding="utf-8").split()
    if not found:
        raise ValueError(f"{path.name} has no words in it")
    return found


def _find(kind: str, source: str | Path, suffix: str) -> Path:
    """The file of that name in data/{kind}, or at that path."""
    for path in (DATA / kind / f"{source}{suffix}", Path(source)):
        if path.is_file():
            return path
    names = ", ".join(sorted(file.stem for file in (DATA / kind).glob(f"*{suffix}")))
    raise FileNotFoundError(f"no {kind} {str(source)!r}: give one of {names}, or the path of a {suffix} file")
