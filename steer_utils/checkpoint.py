"""Tensors on disk with the facts about them: NAME.safetensors and NAME.json side by side in a folder."""

import hashlib
import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError, safe_open
from safetensors.torch import load as tensors_from_bytes
from safetensors.torch import save as tensors_to_bytes
from torch import Tensor
from transformers import PreTrainedModel

from . import __version__
from .models import model_id


def save(folder: str | Path, name: str, tensors: dict[str, Tensor], *, model: str, **facts: Any) -> None:
    """Write tensors, and facts about them as JSON: the model's id, library versions, and those given.

    Each file is written under another name and renamed; the JSON holds the hash of the tensors.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
    data = tensors_to_bytes({key: tensor.clone() for key, tensor in tensors.items()})  # one may stand twice
    versions = {library.__name__: library.__version__ for library in (torch, transformers)}
    about = {
        "model": model,
        **facts,
        "versions": {"steer_utils": __version__} | versions,
        "sha256": hashlib.sha256(data).hexdigest(),
    }
    write_whole(folder / f"{name}.safetensors", data)
    write_whole(folder / f"{name}.json", (json.dumps(about, indent=1, ensure_ascii=False) + "\n").encode())


def load(
    folder: str | Path,
    name: str,
    model: PreTrainedModel | None = None,
    *,
    any_model: bool = False,
    needed: Collection[str] = (),
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and the facts given to `save`, "model" among them.

    FileNotFoundError if a file is missing, ValueError if they do not belong together, if one of the `needed`
    facts is not there or, unless `any_model`, if they were made with another model than the given one.
    """
    try:
        facts = _facts(Path(folder) / f"{name}.json", {"model", "versions", "sha256", *needed})
        data = (Path(folder) / f"{name}.safetensors").read_bytes()
        if hashlib.sha256(data).hexdigest() != facts.pop("sha256"):
            raise ValueError("the JSON file belongs to other tensors")
        tensors, made_with = tensors_from_bytes(data), facts["model"]
        del facts["versions"]
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{str(folder)!r} holds no {name}: {error.filename} is missing") from error
    except (ValueError, SafetensorError) as error:
        raise ValueError(f"the {name} in {str(folder)!r} is damaged ({error}): save it again") from error
    if model is not None and not any_model and model_id(model) != made_with:
        raise ValueError(
            f"this {name} was made with {made_with!r}, not with {model_id(model)!r}; "
            f"any_model=True takes it all the same"
        )
    return tensors, facts


def save_one(path: Path, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
    """Write tensors and facts into one file, whole or not at all: the state of something that goes on."""
    tensors = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
    write_whole(path, tensors_to_bytes(tensors, metadata={"facts": json.dumps(facts)}))


def load_one(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What `save_one` wrote; ValueError if the file is not whole."""
    try:
        with safe_open(path, "pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, json.loads(file.metadata()["facts"])  # noqa: SIM118
    except (SafetensorError, TypeError, KeyError, ValueError) as error:
        raise ValueError(f"{path} is damaged ({error}): delete it") from error


def _facts(path: Path, needed: set[str]) -> dict[str, Any]:
    """The object in a JSON file. ValueError if it is none, or lacks one of the needed keys."""
    facts = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(facts, dict):
        raise ValueError(f"{path.name} holds no object but {facts!r}")
    if missing := needed - facts.keys():
        raise ValueError(f"{path.name} lacks {', '.join(sorted(missing))}")
    return facts


def write_whole(path: Path, data: bytes) -> None:
    """Write a file whole or not at all."""
    scratch = path.with_name(f".{path.name}.tmp")
    scratch.write_bytes(data)
    scratch.replace(path)
