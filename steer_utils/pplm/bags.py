"""Bags of words: which next tokens would begin, or go on with, a word of a topic.

A language model writes tokens, not words. A word is pulled in the ways in which it can stand in a sentence:
behind a space, with a small or a capital first letter. Where one of these is a single token, those of several
tokens are left aside. A word that is always cut in pieces is pulled piece by piece: its first piece at any
time, each other piece when the text ends with the pieces before it.
Shapes: B rows, K tokens that a bag can want, N the most tokens that a piece needs before it.
"""

from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from .. import data

ANY = -1  # stands for whatever token
NOTHING = -2  # stands where a text has no token yet


@dataclass(frozen=True)
class Bag:
    """Words and, for one tokenizer, the token ids of each way to write them; who stands twice counts twice.

    Make one with `bag_of_words`, or from token ids: `Bag("my bag", entries=((10,), (23, 5)))`.
    ValueError for a bag without words and entries, or an empty entry.
    """

    name: str
    words: tuple[str, ...] = ()
    entries: tuple[tuple[int, ...], ...] = ()

    def __post_init__(self) -> None:
        if not self.words and not self.entries:
            raise ValueError(f"the bag {self.name!r} is empty: give at least one word")
        if () in self.entries or not all(map(str.strip, self.words)):
            raise ValueError(f"the bag {self.name!r} holds an empty word: leave it out")

    def encoded(self, tokenizer: PreTrainedTokenizerBase | None) -> "Bag":
        """The same bag with token ids. ValueError if it has none and there is no tokenizer to make them."""
        if self.entries:
            return self
        if tokenizer is None:
            raise ValueError(
                f"the bag {self.name!r} holds words, and there is no tokenizer to make token ids of them: "
                f"bag_of_words({self.name!r}, tokenizer), or pplm.with_tokenizer(tokenizer)"
            )
        entries = [entry for word in self.words for entry in _spellings(word, tokenizer)]
        return replace(self, entries=tuple(dict.fromkeys(entries)))

    @property
    def ids(self) -> Tensor:
        """The token ids [K] that the bag can want, in some place or other."""
        return _wants(self.entries, torch.device("cpu"))[0]

    def wanted(self, text: Tensor) -> tuple[Tensor, Tensor | None]:
        """The bag's `ids` [K], and which of them it wants after these texts, [B, K]; None for all, always.

        text: the texts' last token ids [B, T], of which N are looked at.
        """
        ids, before = _wants(self.entries, text.device)
        if before.shape[1] == 0:
            return ids, None
        end = torch.nn.functional.pad(text, (before.shape[1], 0), value=NOTHING)[:, -before.shape[1] :]
        return ids, ((end[:, None] == before) | (before == ANY)).all(dim=-1)


@cache
def _wants(entries: tuple[tuple[int, ...], ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """Token ids [K], and the tokens [K, N] that must stand before each; `ANY` matches every token."""
    singles = [(entry[0], ()) for entry in entries if len(entry) == 1]
    long = [entry for entry in entries if len(entry) > 1]
    pieces = dict.fromkeys((entry[i], entry[:i]) for entry in long for i in range(len(entry)))
    known = {*singles, *pieces}
    wants = singles + [piece for piece in pieces if piece not in singles and not _covered(piece, known)]
    longest = max(len(before) for _, before in wants)
    ids = torch.tensor([token for token, _ in wants], device=device)
    padded = [[ANY] * (longest - len(before)) + [*before] for _, before in wants]
    return ids, torch.tensor(padded, dtype=torch.long, device=device)


def bag_of_words(source: str | Path | Iterable[str], tokenizer: PreTrainedTokenizerBase | None = None) -> Bag:
    """A bag from a name in data/wordlists ("space"), a file with an entry a line, or words.

    tokenizer: makes the token ids now; without it, the model's is used when the bag is. Raises
    FileNotFoundError with the names there are, ValueError for an empty bag or a file that is not UTF-8.
    """
    by_name = isinstance(source, (str, Path))
    words = tuple(dict.fromkeys(word.strip() for word in (data.words(source) if by_name else source)))
    bag = Bag(Path(source).stem if by_name else ", ".join(words[:3]), words)
    return bag if tokenizer is None else bag.encoded(tokenizer)


def _spellings(word: str, tokenizer: PreTrainedTokenizerBase) -> list[tuple[int, ...]]:
    """The token ids of a word behind a space, small and capital; if some are single tokens, only those."""
    cases = dict.fromkeys((word, word.lower(), word[:1].upper() + word[1:]))
    found = [tuple(tokenizer(f" {case}", add_special_tokens=False)["input_ids"]) for case in cases]
    return [entry for entry in found if len(entry) == 1] or found[:1]


def _covered(piece: tuple[int, tuple[int, ...]], known: Collection[tuple[int, tuple[int, ...]]]) -> bool:
    """Whether its token is wanted already after fewer of the tokens that stand before it, or after none."""
    token, before = piece
    return any((token, before[i:]) in known for i in range(1, len(before) + 1))
