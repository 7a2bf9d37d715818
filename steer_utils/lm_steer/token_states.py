"""The last hidden state of every token of many texts, and the token that came next: computed once, kept.

What is trained at the output head alone needs a model's passes only once. Shapes: N tokens, D width.
"""

import hashlib
import json
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .. import checkpoint, hf
from ..generation import progress
from ..models import model_id, pad, token_ids
from .vocabulary import pieces

TEXTS_PER_PASS = 32


class TokenStates(NamedTuple):
    """Last hidden states [N, D] in the model's dtype, the ids that follow, their texts' numbers [N]."""

    hidden: Tensor
    next_ids: Tensor
    text: Tensor


@torch.no_grad()
def token_states(
    model: PreTrainedModel,
    rows: Sequence[Sequence[int]],
    *,
    folder: str | Path | None = None,
    pad_in_loss: bool = False,
) -> TokenStates:
    """Read texts with the plain model: N = Σ (T_i − 1), text after text, on the CPU.

    rows: token ids, BOS in front, two at least of each. folder: where the states are kept, N · D numbers in
    `states.bin`; they are read from the file as needed, and those that are there are not computed again.
    pad_in_loss: fill each 32 texts with EOS up to the longest, as tokens like any other; in the original,
    whose loss counts padding too, they did not see each other.
    """
    rows = _filled(rows, model.generation_config.eos_token_id) if pad_in_loss else rows
    counts = torch.tensor([len(row) - 1 for row in rows])
    size, of = (int(counts.sum()), hf.last_width(model)), fingerprint(model, list(map(list, rows)))
    hidden, done = _storage(size, model.dtype, folder, of)
    starts = (counts.cumsum(0) - counts).tolist()
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))  # of one length, less padding
    with progress(len(rows), unit="text") as bar:
        bar.update(done)
        for i in range(done, len(rows), TEXTS_PER_PASS):
            chunk = order[i : i + TEXTS_PER_PASS]
            for j, states in zip(chunk, _states(model, [rows[j] for j in chunk]), strict=True):
                hidden[starts[j] : starts[j] + len(states)] = states
            _note(folder, of, i + len(chunk))
            bar.update(len(chunk))
    next_ids = torch.tensor([token for row in rows for token in row[1:]])
    return TokenStates(hidden, next_ids, torch.arange(len(rows)).repeat_interleave(counts))


def _filled(rows: Sequence[Sequence[int]], end: int | Sequence[int]) -> list[list[int]]:
    """Rows with the end token behind them, those of a batch up to its longest."""
    end, size = end if isinstance(end, int) else end[0], TEXTS_PER_PASS
    longest = [max(map(len, rows[i : i + size])) for i in range(0, len(rows), size)]
    return [[*row, *[end] * (longest[i // size] - len(row))] for i, row in enumerate(rows)]


def _states(model: PreTrainedModel, rows: Sequence[Sequence[int]]) -> list[Tensor]:
    """The states of all but the last token of each row, [T_i − 1, D]."""
    batch = pad(rows, rows[0][0], padding_side="right", device=model.device)
    with hf.unsteered():
        hidden = hf.forward(model, **batch, use_cache=False).last_hidden_state.cpu()
    return [states[: len(row) - 1] for states, row in zip(hidden, rows, strict=True)]


# --- of two models ----------------------------------------------------------------------------------------

Reader = tuple[PreTrainedModel, PreTrainedTokenizerBase]


def paired_states(one: Reader, other: Reader, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Last hidden states [N, D₁] and [N, D₂] of two models that have read the same texts equally far.

    That is wherever in a text a token of each ends at the same character; BOS is left out, the end is not.
    """
    found = [_by_place(reader, texts) for reader in (one, other)]
    places = [place for place in found[0] if place in found[1]]
    if not places:
        return tuple(torch.empty(0, hf.last_width(model)) for model, _ in (one, other))
    return tuple(torch.stack([states[place] for place in places]) for states in found)


def _by_place(reader: Reader, texts: Sequence[str]) -> dict[tuple[int, int], Tensor]:
    """The state [D] behind each token by its place: the text's number, and the characters before it."""
    model, tokenizer = reader
    rows = [token_ids(tokenizer, text) for text in texts]
    hidden = token_states(model, [[*row, row[0]] for row in rows]).hidden  # of the last token too
    found = {}
    for i, (row, states) in enumerate(zip(rows, hidden.split([len(row) for row in rows]), strict=True)):
        for end, state in zip(_ends(tokenizer, row[1:]), states[1:], strict=True):
            found[i, end] = state
    return found


def _ends(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> list[int]:
    """Where each token ends, in characters; SentencePiece may put a space before a text, which counts not."""
    parts = pieces(tokenizer, ids)
    text = "".join(parts)
    return [end - len(text) + len(text.lstrip(" ")) for end in accumulate(map(len, parts))]


# --- on disk ----------------------------------------------------------------------------------------------


def _storage(
    size: tuple[int, int], dtype: torch.dtype, folder: str | Path | None, of: str
) -> tuple[Tensor, int]:
    """Room for the states, in memory or in a file, and of how many texts it holds them already."""
    if folder is None:
        return torch.empty(size, dtype=dtype), 0
    path = Path(folder) / "states.bin"
    path.parent.mkdir(parents=True, exist_ok=True)
    numbers = size[0] * size[1]
    whole = path.is_file() and path.stat().st_size == numbers * dtype.itemsize
    done = _done(path, of) if whole else 0
    if not done:  # the note must not outlive what it is about, and other states may still be read
        _note(folder, of, 0)
        path.unlink(missing_ok=True)
    return torch.from_file(str(path), shared=True, size=numbers, dtype=dtype).view(size), done


def _done(path: Path, of: str) -> int:
    """Of how many texts a file holds the states, if it is about these texts and this model."""
    try:
        facts = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
        return facts["texts"] if facts["of"] == of else 0
    except (OSError, ValueError, KeyError, TypeError):
        return 0


def _note(folder: str | Path | None, of: str, done: int) -> None:
    if folder is not None:
        checkpoint.write_atomically(
            Path(folder) / "states.json", json.dumps({"of": of, "texts": done}).encode()
        )


def fingerprint(model: PreTrainedModel, *facts: object) -> str:
    """The same for the same model, dtype and facts, which are anything that JSON can hold."""
    some = [weight.flatten()[:: 2**20].tolist() for weight in model.parameters()]
    about = [model_id(model), str(model.dtype), some, *facts]
    return hashlib.sha256(json.dumps(about).encode()).hexdigest()
