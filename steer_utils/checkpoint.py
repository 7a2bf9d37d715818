"""Files: values kept as safetensors and JSON, on disk or on the Hub, and jobs that go on after a stop.

Everything is written under another name and renamed, so a reader sees a whole file or none. No pickle.
"""

import hashlib
import json
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, ClassVar, Self
from uuid import uuid4

import torch
import transformers
from huggingface_hub import HfApi, snapshot_download
from safetensors import SafetensorError
from safetensors.torch import load as tensors_of_bytes
from safetensors.torch import save as tensors_to_bytes
from torch import Tensor

from . import __version__, data, hf, hooks
from .embedded import EMBEDDED
from .generation import by_length, progress
from .models import Model, batch_of, model_id, require_readable

TEXTS_PER_PASS = 32
HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")


class Saved:
    """A value that belongs to a model, kept as NAME.safetensors and NAME.json in one folder.

    A subclass sets file_name (NAME), shipped (the folder of data/ that holds some, or "") and facts (the keys
    that its JSON must have). It defines to_files() -> (tensors, JSON values with "model", an id or "", and,
    there or in "card", "weights" as `weights_of` gives them), the class method from_files(tensors, values),
    and require_fit(model), a ValueError for other shapes.
    """

    file_name: ClassVar[str]
    shipped: ClassVar[str] = ""
    facts: ClassVar[tuple[str, ...]] = ()

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the two files into a folder, which is made if need be.

        The tensors' file holds all, with a hash, so a stop between both does no harm; JSON is for readers.
        """
        tensors, facts = self.to_files()
        _require_finite(tensors)
        versions = {"torch": torch.__version__, "transformers": transformers.__version__}
        facts |= {"versions": {"steer_utils": __version__} | versions}
        try:
            content = _content(tensors, json.dumps(facts, allow_nan=False))
        except ValueError as error:
            raise ValueError(f"JSON has no NaN and no inf, which are in {facts}") from error
        facts["sha256"] = hashlib.sha256(content).hexdigest()
        text = json.dumps(facts, indent=1, ensure_ascii=False) + "\n"
        write_atomically(Path(folder) / f"{self.file_name}.safetensors", content)
        write_atomically(Path(folder) / f"{self.file_name}.json", text)

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        model: Model | None = None,
        *,
        any_model: bool = False,
        revision: str | None = None,
    ) -> Self:
        """Read one that comes with this package, by name; a saved one, by folder; or one on the Hub, by id.

        FileNotFoundError if it is not there, ValueError if it is damaged or if the source is both a name and
        a folder. With `model` also ValueError if it does not fit or, without `any_model`, is for another one,
        or for one of that name with other weights, as before it was fine-tuned.
        """
        if isinstance(source, str) and HUB_ID.fullmatch(source) and not Path(source).exists():
            files = [f"{cls.file_name}.{ending}" for ending in ("json", "safetensors")]
            folder = Path(snapshot_download(source, revision=revision, allow_patterns=files))
        else:
            folder = data.find(cls.shipped, source)
        try:
            tensors, facts = cls._read(folder)
            value = cls.from_files(tensors, facts)
        except FileNotFoundError as error:
            message = f"{str(folder)!r} holds no {cls.file_name}: {error.filename} is missing"
            raise FileNotFoundError(message) from error
        except (KeyError, TypeError, ValueError, RuntimeError, SafetensorError) as error:
            raise ValueError(f"the {cls.file_name} in {str(folder)!r} is damaged ({error})") from error
        if not isinstance(value, cls):
            kind = type(value).__name__
            raise ValueError(f"{str(folder)!r} holds an {kind}, not an {cls.__name__}: give {kind}")
        if model is not None:
            value.require_fit(hf.unwrapped(model))
            old, now = {**facts, **facts.get("card", {})}["weights"].split(), weights_of(model).split()
            same, name = model_id(model) == facts["model"], repr(model_id(model))
            if not any_model and not (same and (now[:1] != old[:1] or now == old)):  # else read in other ways
                name = f"the weights that {name} has now" if same else name
                made = f"this {cls.file_name} was made with {facts['model']!r}, not with {name}"
                raise ValueError(f"{made}; any_model=True takes it all the same")
        return value

    def push_to_hub(self, repo_id: str, *, private: bool | None = None, token: str | None = None) -> str:
        """Upload both files and a model card to a repository on the Hub, which is made if need be.

        Returns the URL of the commit. A card that is there already is kept.
        """
        # Not huggingface_hub.ModelHubMixin: it deletes a model's config.json from the folder it saves to.
        api = HfApi(token=token)
        api.create_repo(repo_id, private=private, exist_ok=True)
        with TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            if not api.file_exists(repo_id, "README.md"):
                (Path(folder) / "README.md").write_text(self.model_card(repo_id), encoding="utf-8")
            return str(api.upload_folder(repo_id=repo_id, folder_path=folder))

    def model_card(self, repo_id: str) -> str:
        """What a repository on the Hub says of this value: the model, how to load it, and all facts."""
        _, facts = self.to_files()
        model = next((name for name in EMBEDDED if facts["model"].startswith(f"{name}-")), facts["model"])
        base = f"base_model: {model}\n" if HUB_ID.fullmatch(model) else ""
        kind, load = type(self).__name__, f'su.{type(self).__name__}.from_pretrained("{repo_id}", model)'
        return f"""---
library_name: steer_utils
tags: [{self.file_name}, steering]
{base}---
# {repo_id.split("/")[-1]}

A `{kind}` for {model or "any model of its width"}. With the package steer_utils:

```python
import steer_utils as su

model, tokenizer = su.load("{model}")
steer = {load}
```

Facts: `{json.dumps(facts, ensure_ascii=False)}`
"""

    @classmethod
    def _read(cls, folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """What `to_files` gave. ValueError if the two files do not belong together or a fact is missing."""
        facts, path = _object_in(folder / f"{cls.file_name}.json"), folder / f"{cls.file_name}.safetensors"
        if missing := {"model", "versions", "sha256", *cls.facts} - {"weights"} - facts.keys():
            raise ValueError(f"the JSON file lacks {', '.join(sorted(missing))}")
        content = path.read_bytes()  # once, since another process may save there
        same, (tensors, own) = facts.pop("sha256") == hashlib.sha256(content).hexdigest(), _opened(content)
        if own is None and not same:  # files that were made without facts in the tensors' file
            raise ValueError("the JSON file belongs to other tensors")
        if own is not None and (held := json.loads(own)) != facts:
            if same:
                raise ValueError("the JSON file was changed")
            warnings.warn(f"the JSON in {folder} is of another save; took the tensors' own", stacklevel=5)
            facts = held
        _require_finite(tensors)
        return tensors, {"weights": ""} | facts


def _require_finite(tensors: Mapping[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise ValueError(f"{name} holds inf or NaN: train or compute it again")


def _object_in(path: Path) -> dict[str, Any]:
    """The object in a JSON file; ValueError that names the file if it holds anything else."""
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} holds no whole JSON object ({error})") from error


def _on_cpu(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().contiguous().clone()  # a clone, since a tensor may be there twice


def write_atomically(path: Path, content: bytes | str) -> None:
    """Write a file whole or not at all; its folder is made if need be. OSError that says size and place."""
    scratch = path.with_name(f".{path.name}.{uuid4().hex}.tmp")  # of this call alone
    content = content if isinstance(content, bytes) else content.encode()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch.write_bytes(content)
        scratch.replace(path)
    except OSError as error:
        what = f"{len(content):,} bytes cannot be written to {str(path)!r} ({error.strerror})"
        raise OSError(error.errno, f"{what}: make room there, or choose another folder") from error
    finally:
        with suppress(OSError):
            scratch.unlink()


class Run:
    """A job as settings and numbered chunks. A chunk that is done is kept, and not computed again.

    folder: where the chunks are kept, one file each; with None they are not. settings: all that decides the
    results, as JSON values, written with the first chunk. shard: "I/N" for each N-th chunk from number I, so
    that N processes share the work, on one machine or on several with a common disk. ValueError if the folder
    holds another run, and for a shard that is none or has no folder.
    """

    def __init__(self, folder: str | Path | None, settings: Mapping[str, Any], shard: str = "0/1") -> None:
        self.folder = None if folder is None else Path(folder)
        self.own, self.shards = _shard(shard)
        if self.shards > 1 and folder is None:
            raise ValueError(f"shard={shard!r} leaves its chunks in files: give a folder")
        if self.folder is not None:
            self.settings, self.mark = json.loads(json.dumps(settings)), hash_of(settings)
            self._require_same()

    def _require_same(self) -> None:
        found = _object_in(path) if (path := self.folder / "run.json").exists() else self.settings
        keys = {**found, **self.settings}
        if differ := [key for key in keys if found.get(key) != self.settings.get(key)]:
            what = f"{str(self.folder)!r} holds a run with other settings ({', '.join(differ)})"
            raise ValueError(f"{what}: give another folder, or delete this one")

    def chunk(self, number: int, make: Callable[[], dict[str, Any]]) -> dict[str, Any] | None:
        """What `make` returns, tensors and JSON values by name; from its file if that is there and whole.

        None for a chunk of another shard that is not there yet.
        """
        if self.folder is None:
            return make()
        path = self.folder / f"chunk-{number:05}.safetensors"
        place = f"{number} of {self.mark}"  # hashed with what a chunk holds
        if path.is_file():
            try:
                tensors, rest = _opened(path.read_bytes(), place)
                return tensors | json.loads(rest)
            except (ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
                warnings.warn(f"{path} is damaged ({error}); computing it again", stacklevel=3)
        if number % self.shards != self.own:
            return None
        values = make()
        tensors = {name: _on_cpu(value) for name, value in values.items() if isinstance(value, Tensor)}
        rest = json.dumps({name: value for name, value in values.items() if name not in tensors})
        self._require_same()  # another run may have begun meanwhile
        if not (settings := self.folder / "run.json").exists():
            write_atomically(settings, json.dumps(self.settings, indent=1, ensure_ascii=False) + "\n")
        write_atomically(path, _content(tensors, rest, place))
        return tensors | json.loads(rest)

    def done(self) -> int:
        """The number of chunks in the folder."""
        return sum(1 for _ in self.folder.glob("chunk-*.safetensors"))


def _shard(text: str) -> tuple[int, int]:
    """I and N of "I/N"."""
    found = re.fullmatch(r"(\d+)/(\d+)", text)
    if not found or int(found[1]) >= int(found[2]):
        raise ValueError(f"shard must be I/N with I from 0 to N − 1, such as 0/4, not {text!r}")
    return int(found[1]), int(found[2])


def _content(tensors: Mapping[str, Tensor], rest: str, place: str = "") -> bytes:
    """A file of tensors and a text, with a hash of both and of the one place where it may be."""
    tensors = {name: _on_cpu(tensor) for name, tensor in tensors.items()}
    about = json.dumps({"values": rest, "sha256": _digest(tensors, rest + place)})
    return tensors_to_bytes(tensors, metadata={"about": about})  # one key, since keys have no order


def _opened(content: bytes, place: str = "") -> tuple[dict[str, Tensor], str | None]:
    """The tensors in such a file, and the text, None if it has none; ValueError if they were changed."""
    tensors, size = tensors_of_bytes(content), int.from_bytes(content[:8], "little")
    about = json.loads(json.loads(content[8 : 8 + size]).get("__metadata__", {}).get("about", "{}"))
    if "values" in about and about["sha256"] != _digest(tensors, about["values"] + place):
        raise ValueError("its hash does not fit")
    return tensors, about.get("values")


def last_states(
    model: Model,
    rows: Sequence[Sequence[int]],
    *,
    of_text: Callable[[Tensor], Tensor] = Tensor.detach,
    folder: str | Path | None = None,
) -> Iterator[tuple[int, Tensor]]:
    """The unsteered model's last hidden states of texts, each with its text's index: [T, D], on the CPU.

    rows: token ids with BOS. The shortest texts come first. of_text: what is made of a text's states, and
    kept in the folder, from where a call that was stopped goes on. Errors of `require_readable`.
    """
    require_readable(model, rows)
    run = Run(None, {})
    if folder is not None:
        texts = hash_of([list(map(int, row)) for row in rows])
        how = {"model": fingerprint(model), "texts": texts, "kept": of_text.__name__}
        run = Run(Path(folder) / hash_of(how), how)  # beside those of other texts

    @hf.no_grad
    def make(chosen):
        batch = batch_of(model, [rows[i] for i in chosen], "right")
        with hooks.unsteered():
            states = hf.forward(model, **batch, use_cache=False).last_hidden_state.cpu()
        return {str(i): of_text(one[: len(rows[i])]) for i, one in zip(chosen, states, strict=True)}

    with progress(len(rows), unit="text") as bar:
        for number, chosen in enumerate(by_length(model, rows, TEXTS_PER_PASS)):
            for i, states in run.chunk(number, partial(make, chosen)).items():
                yield int(i), states
            bar.update(len(chosen))


def fingerprint(model: Model) -> str:
    """A hash of a model's id, its dtype and its weights."""
    return hash_of([model_id(model), str(model.dtype), weights_of(model)])


def weights_of(model: Model) -> str:
    """Which weights a model has: how they were read, and a hash of about a thousand numbers of each tensor.

    They are rounded to bfloat16, in which the model may be elsewhere, or float16 if it is in that. Of weights
    that are quantised, or offloaded to where they cannot be read, only shapes count.
    """
    model, parts = hf.inner(model), set()  # no names, which a bridge changes
    packed = bool(getattr(model.config, "quantization_config", None))
    rounded = torch.float16 if model.dtype == torch.float16 else torch.bfloat16
    for one in model.state_dict().values():  # an even step could keep to a few columns
        packed |= (hidden := type(one) is not Tensor or one.device.type == "meta")
        some = torch.tensor(one.shape) if hidden else one.flatten()[:: one.numel() // 1000 | 1]
        parts.add(hashlib.sha256(_on_cpu(some).to(rounded).view(torch.uint8).numpy()).hexdigest())
    return f"{'packed' if packed else rounded} {hash_of(sorted(parts))}"


def hash_of(values: Any) -> str:
    """A hash of JSON values, in which the order of keys makes no difference."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]


def _digest(tensors: dict[str, Tensor], rest: str) -> str:
    return hashlib.sha256(tensors_to_bytes(tensors) + rest.encode()).hexdigest()
