"""Train the LM-Steers in data/steers again.

python data/make/steers.py sentiment                   about ten minutes on two cores
python data/make/steers.py detoxification --csv FILE   comments, as `data.toxic_comments` reads them
"""

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pandas as pd

import steer_utils as su
from steer_utils import data

STEERS = data.DATA / "steers"
COMMAND = "python data/make/steers.py"
PER_CLASS = 1000  # toxic comments, and as many clean ones
SETTINGS = {"rank": 64, "lr": 1e-2, "n_steps": 200, "max_length": 64, "validation": 0.03}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog=COMMAND, description="Train a steer in data/steers.")
    parser.add_argument("name", choices=["sentiment", "detoxification"])
    parser.add_argument("--csv", type=Path, help="the comments, for detoxification")
    parser.add_argument("--folder", type=Path, help="where to save it, if not in data/steers")
    given = parser.parse_args(arguments)
    if given.name == "detoxification" and given.csv is None:
        parser.error("detoxification needs --csv")
    table, about = films() if given.name == "sentiment" else comments(given.csv)
    model, tokenizer = su.load()
    steer = su.train_lm_steer(model, tokenizer, table["text"].tolist(), table["label"].tolist(), **SETTINGS)
    command = f"{COMMAND} {given.name}" + (" --csv FILE" if given.csv else "")
    card = {"what": about, "command": command} | dict(steer.card)
    replace(steer, names=(given.name, "dummy"), card=card).save_pretrained(
        given.folder or STEERS / given.name
    )
    print(f"{given.name}: {card['held out']} nats a token on held-out texts")


def films() -> tuple[pd.DataFrame, str]:
    """Film snippets with labels from -1 (negative) to 1, and what they are."""
    table = data.rated_sentences("movie", split="train")
    about = (
        "positive (1) against negative (-1): mean ratings of film snippets by 20 people, over 2 and clipped, "
        f"from {data.RATED_PACKAGE} {data.RATED_VERSION} (Hutto & Gilbert 2014); ids divisible by 5 are "
        "left out"
    )
    return table.assign(label=(table["rating"] / 2).clip(-1, 1)), about


def comments(csv: Path) -> tuple[pd.DataFrame, str]:
    """Comments with labels -1 (toxic) and 1 (clean), and what they are."""
    about = f"clean (1) against toxic (-1): {PER_CLASS:,} comments of each from {csv.name}"
    return data.toxic_comments(csv, per_class=PER_CLASS), about


if __name__ == "__main__":
    main()
