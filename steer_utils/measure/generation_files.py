"""Files of generated texts, as DExperts and LM-Steer keep them: written in chunks, resumed, and read.

A file has one line of JSON for each prompt: {"prompt": {"text": …}, "generations": [{"text": …}, …]}. Beside
it lies FILE.settings.json, without which nobody could tell whether a file may be gone on with.
"""

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .. import data, hf, models
from ..checkpoint import write_atomically
from ..generation import Steer, chunks, generate, progress, require_settings

BATCHES = 8  # in a chunk, which is written as a whole; `generate` puts prompts of near-equal length together
LAYOUT = '{"prompt": {"text": …}, "generations": [{"text": …}, …]}'
LOSS_TOLERANCE = 1e-4  # nats a token: a second run may round otherwise


def generate_file(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    prompts: str | Path | Sequence[str],
    output_file: str | Path,
    *,
    steer: Steer | Iterable[Steer] = (),
    num_samples: int = 25,
    max_new_tokens: int = 20,
    seed: int = 0,
    batch_size: int = 64,
    exact_length: bool = True,
    **sampling: Any,
) -> Path:
    """Continue each prompt `num_samples` times and write a line for each; go on if the file has some.

    prompts: texts, or the name or path of a file as for `data.prompts`. exact_length: each continuation has
    `max_new_tokens` tokens, none ends early. The rest is as for `generate`, whose top_p of 0.9 is that of
    LM-Steer's experiments on sentiment; those on toxicity have 1.0.

    Stopped and called again, it leaves the file that it would have written in one go: whole lines stay, one
    that was cut off is written anew. The settings are kept in FILE.settings.json, and with them a first
    continuation, which shows whether model and steer still compute the same.
    Raises ValueError as `generate` does, and for a file made with other settings.
    """
    prompts = data.prompts(prompts) if isinstance(prompts, str | Path) else list(prompts)
    steers = list(steer) if isinstance(steer, Iterable) else [steer]
    sampling |= {"max_new_tokens": max_new_tokens}
    sampling |= {"min_new_tokens": max_new_tokens} if exact_length else {}
    require_settings(prompts, seed, sampling, num_samples=num_samples, batch_size=batch_size)
    write = partial(generate, model, tokenizer, steer=steers, seed=seed, batch_size=batch_size, **sampling)
    settings = {
        "model": models.model_id(hf.unwrapped(model)),
        "steer": repr(steers),
        "prompts": f"{len(prompts)} with SHA-256 {hashlib.sha256(json.dumps(prompts).encode()).hexdigest()}",
        **{"num_samples": num_samples, "seed": seed, "batch_size": batch_size, **sampling},
        **_first(write(prompts[0])),
    }
    path = Path(output_file)
    done = _begin(path, settings)
    _append(path, partial(write, num_samples=num_samples), prompts, done, batch_size // num_samples)
    return path


def _append(
    path: Path, write: Callable[..., pd.DataFrame], prompts: Sequence[str], done: int, prompts_at_a_time: int
) -> None:
    """Write the lines of all prompts from number `done` on."""
    size = BATCHES * max(1, prompts_at_a_time)
    with progress(len(prompts), "prompt") as bar:
        bar.update(done)
        while done < len(prompts):
            start = done // size * size  # the whole chunk again: in other batches, numbers round differently
            lines = _lines(write, prompts, start, size)[done - start :]
            with path.open("a", encoding="utf-8", newline="\n") as file:
                file.write("".join(lines))
            done += len(lines)
            bar.update(len(lines))


def _lines(write: Callable[..., pd.DataFrame], prompts: Sequence[str], start: int, size: int) -> list[str]:
    """The lines of a chunk.

    A prompt that came before takes the random numbers after those of its earlier lines, as it does in one
    call of `generate`: so they are written again, and left out.
    """
    chunk = prompts[start : start + size]
    wanted = set(chunk)
    again = [prompt for prompt in prompts[:start] if prompt in wanted]
    table = write([*again, *chunk])
    groups = [*chunks(table["completion"].tolist(), table["sample"].max() + 1)][len(again) :]
    return [_line(*pair) for pair in zip(chunk, groups, strict=True)]


def _line(prompt: str, texts: Sequence[str]) -> str:
    return json.dumps({"prompt": {"text": prompt}, "generations": [{"text": text} for text in texts]}) + "\n"


# --- the settings beside a file ---------------------------------------------------------------------------


def _first(table: pd.DataFrame) -> dict[str, Any]:
    """What the settings hold of one continuation of the first prompt."""
    return {"first continuation": table["completion"].item(), "its loss": table["loss"].item()}


def _begin(path: Path, settings: dict[str, Any]) -> int:
    """How many whole lines the file has, what comes after them cut off; writes or checks the settings."""
    beside = path.with_name(f"{path.name}.settings.json")
    text = re.sub(r" at 0x[0-9a-f]+", "", json.dumps(settings, indent=1, default=repr))
    if not path.exists() or path.stat().st_size == 0:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(beside, text.encode())
        return 0
    _require_same(path, beside, json.loads(text))
    with path.open("r+b") as file:
        whole, end, _ = file.read().rpartition(b"\n")
        file.truncate(len(whole + end))
    return (whole + end).count(b"\n")


def _require_same(path: Path, beside: Path, settings: dict[str, Any]) -> None:
    """ValueError unless the file beside has these settings, the loss up to rounding."""
    instead = "give another output_file, or delete this one"
    try:
        there = json.loads(beside.read_text(encoding="utf-8"))
        losses = there["its loss"], settings["its loss"]
    except (FileNotFoundError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{str(path)!r} has no whole {beside.name} beside it: {instead}") from error
    if np.isclose(*losses, rtol=0, atol=LOSS_TOLERANCE, equal_nan=True):
        there["its loss"] = settings["its loss"]
    other = [name for name in there | settings if repr(there.get(name)) != repr(settings.get(name))]
    if other:
        found = "; ".join(f"{name} {_apart(there.get(name), settings.get(name))}" for name in other)
        raise ValueError(f"{str(path)!r} was made with other settings ({found}): {instead}")


def _apart(old: Any, new: Any) -> str:
    """Two values, long ones from a little before the place where they differ."""
    old, new = repr(old), repr(new)
    same = takewhile(lambda pair: pair[0] == pair[1], zip(old, new, strict=False))
    start = max(0, len(list(same)) - 30)
    return ", now ".join("…" * bool(start) + text[start : start + 80] for text in (old, new))


# --- reading ----------------------------------------------------------------------------------------------


class Generations(NamedTuple):
    """P prompts, [P], and the S continuations of each, [P][S]."""

    prompts: list[str]
    texts: list[list[str]]

    def pairs(self) -> Iterator[tuple[str, str]]:
        """All P · S continuations in their order, each behind its prompt."""
        for prompt, texts in zip(self.prompts, self.texts, strict=True):
            yield from ((prompt, text) for text in texts)

    def grouped(self, values: Sequence[Any]) -> list[Sequence[Any]]:
        """P · S values, one for each continuation, as [P][S]."""
        return list(chunks(values, len(self.texts[0])))


def read_generations(path: str | Path) -> Generations:
    """The prompts of a file and their continuations.

    FileNotFoundError; ValueError for a file without lines, and for a line that is not whole, not of this
    layout, or with another number of continuations than the first.
    """
    lines = [line for line in Path(path).read_text(encoding="utf-8").split("\n") if line.strip()]
    if not lines:
        raise ValueError(f"{str(path)!r} has no lines: each is to be {LAYOUT}")
    found = Generations([], [])
    for number, line in enumerate(lines, 1):
        try:
            read = json.loads(line)
            prompt, texts = read["prompt"]["text"], [one["text"] for one in read["generations"]]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"line {number} of {str(path)!r} is not whole, or is not {LAYOUT}: {line!r:.99}"
            ) from error
        found.prompts.append(prompt)
        found.texts.append(texts)
        if not texts or len(texts) != len(found.texts[0]):
            raise ValueError(
                f"line {number} of {str(path)!r} has {len(texts)} continuations and the first "
                f"{len(found.texts[0])}: all need as many, and at least one"
            )
    return found
