"""The texts that the course uses: those written for it, in `data/`, and later the public data sets."""

import json
from pathlib import Path

HERE = Path(__file__).parent
DATA = next((folder for folder in (HERE.parent / "data", HERE / "_data") if folder.is_dir()), HERE / "_data")


def prompts(source: str | Path = "openings", split: str | None = None) -> list[str]:
    """Read prompts from a JSONL file whose lines hold {"prompt": {"text": …}}, as LM-Steer's do.

    source: a name in data/prompts ("openings": 48 unfinished everyday sentences) or a path.
    split: "choose" to tune on, "test" to report on, None for all lines.
    Raises FileNotFoundError with the names there are, ValueError for a split that no line has.
    """
    named = DATA / "prompts" / f"{source}.jsonl"
    path = named if named.is_file() else Path(source)
    if not path.is_file():
        names = sorted(file.stem for file in named.parent.glob("*.jsonl"))
        raise FileNotFoundError(
            f"no prompts {str(source)!r}: give one of {names} or the path of a JSONL file"
        )
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    texts = [line["prompt"]["text"] for line in lines if split in (None, line.get("split"))]
    if not texts:
        raise ValueError(f"{path.name} has no prompts of split {split!r}")
    return texts
