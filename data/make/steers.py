"""How the steers in data/steers came about: which texts, which settings.

`python -m steer_utils.lm_steer sentiment` trains that steer again; `detoxification --csv FILE` does with the
comments in a file that `data.toxic_comments` reads, and `NAME --csv FILE --text COLUMN --label COLUMN`
trains a steer of your own on any table whose labels are numbers from −1 to 1.
"""

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pandas as pd
import scorers as scorers_fit

from steer_utils import data, models
from steer_utils.lm_steer.training import train_lm_steer

STEERS = data.DATA / "steers"
COMMAND = "python -m steer_utils.lm_steer"
PER_CLASS = 1000  # toxic comments, and others
SETTINGS = {"rank": 64, "lr": 1e-2, "n_steps": 200, "max_length": 64, "validation": 0.03}


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog=COMMAND, description="Train an LM-Steer and save it.")
    parser.add_argument("name", help="sentiment, detoxification, or a name for a steer of your own")
    parser.add_argument("--csv", type=Path, help="labelled texts")
    parser.add_argument("--text", default="text", help="the column with the texts, of a steer of your own")
    parser.add_argument("--label", default="label", help="the column with its labels, from -1 to 1")
    parser.add_argument("--folder", type=Path, help="where to save it; a killed run resumes there")
    parser.add_argument("--model", default=models.DEFAULT, help="as for steer_utils.load")
    given = parser.parse_args(arguments)
    if given.name != "sentiment" and given.csv is None:
        parser.error(f"{given.name} needs --csv")
    table, about = texts(given.name, given.csv, given.text, given.label)
    own = given.name not in ("sentiment", "detoxification")
    folder = given.folder or (Path(given.name) if own else STEERS / given.name)
    model, tokenizer = models.load(given.model)
    steer = train_lm_steer(
        model, tokenizer, table["text"].tolist(), table["label"].tolist(), folder=given.folder, **SETTINGS
    )
    card = {"what": about, "command": f"{COMMAND} {given.name}"} | dict(steer.card)
    replace(steer, names=(given.name, "dummy"), card=card).save_pretrained(folder)
    print(f"{folder}: {card['held out']} nats a token on texts held out")


def texts(name: str, csv: Path | None, text: str, label: str) -> tuple[pd.DataFrame, str]:
    """Columns text and label of what the steer of that name is trained on, and what they are."""
    if name == "sentiment":
        table = data.rated_sentences("movie")
        table = table[~scorers_fit.held_out(table["id"])]
        about = (
            f"positive (1) against negative (-1): mean ratings of film snippets by 20 people, over 2 and "
            f"clipped, from {data.RATED_PACKAGE} {data.RATED_VERSION} (Hutto & Gilbert 2014); ids divisible "
            f"by 5 are left out"
        )
        return table.assign(label=(table["rating"] / 2).clip(-1, 1)), about
    if name == "detoxification":
        about = f"clean (1) against toxic (-1): {PER_CLASS:,} comments of each from {csv.name}"
        return data.toxic_comments(csv, per_class=PER_CLASS), about
    return data.labelled(pd.read_csv(csv), text, label), f"labels of {csv.name}"
