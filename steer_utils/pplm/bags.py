"""Bags of words: which next tokens would begin, or continue, a word of a topic.

A word counts in the ways in which it can stand in a sentence: after a space, with a small or a capital first
letter. If one of these is a single token, those of several tokens are left out. A word of several tokens
counts token by token: of "black hole", " black" always counts, and " hole" after the prefix " black".
Shapes: B batch rows, T tokens so far, K token ids of a bag, N tokens of the longest prefix.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import PreTrainedTokenizerBase

from .. import data

ANY = -1  # in a prefix, matches every token
NOTHING = -2  # stands where a text has no token


@dataclass(frozen=True)
class Bag:
    """Words and, for one tokenizer, their token ids.

    Made by `bag_of_words`, or from token ids: `Bag("mine", entries=((10,), (23, 5)))`. Duplicate words count
    once, duplicate entries of one token twice. ValueError if empty, and for a negative id.
    """

    name: str
    words: tuple[str, ...] = ()
    entries: tuple[tuple[int, ...], ...] = ()

    def __post_init__(self) -> None:
        if not self.words and not self.entries:
            raise ValueError(f"the bag {self.name!r} is empty: give at least one word")
        if () in self.entries or not all(map(str.strip, self.words)):
            raise ValueError(f"the bag {self.name!r} holds an empty word: leave it out")
        if negative := [i for entry in self.entries for i in entry if i < 0]:
            raise ValueError(f"the bag {self.name!r} holds the token id {negative[0]}: ids begin at 0")

    def encoded(self, tokenizer: PreTrainedTokenizerBase | None) -> "Bag":
        """The same bag with token ids. ValueError if it has none and there is no tokenizer to make them."""
        if self.entries:
            return self
        if tokenizer is None:
            raise ValueError(f"bag {self.name!r} holds words: use pplm.with_tokenizer(tokenizer) before")
        entries = [entry for word in self.words for entry in _spellings(word, tokenizer)]
        return replace(self, entries=tuple(dict.fromkeys(entries)))

    def wanted(self, text: Tensor) -> tuple[Tensor, Tensor | None]:
        """Token ids [K], and which of them count after each text [B, T], as [B, K]; None if all always do."""
        ids, prefixes = _with_prefixes(self.entries, text.device)
        size = prefixes.shape[1]
        if size == 0:
            return ids, None
        end = pad(text, (size, 0), value=NOTHING)[:, -size:]
        return ids, ((end[:, None] == prefixes) | (prefixes == ANY)).all(dim=-1)


@cache
def _with_prefixes(entries: tuple[tuple[int, ...], ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """Token ids [K], and the prefix [K, N] after which each counts, filled with `ANY` from the left."""
    singles = [entry for entry in entries if len(entry) == 1]
    # A token and its prefix, as one tuple. It adds nothing if the token counts after a shorter prefix too.
    pieces = dict.fromkeys(entry[:end] for entry in entries for end in range(1, len(entry) + 1))
    pieces = [piece for piece in pieces if not any(piece[i:] in pieces for i in range(1, len(piece)))]
    pieces = singles + [piece for piece in pieces if piece not in singles]
    longest = max(map(len, pieces)) - 1
    prefixes = [[ANY] * (longest + 1 - len(piece)) + [*piece[:-1]] for piece in pieces]
    ids = torch.tensor([piece[-1] for piece in pieces], device=device)
    return ids, torch.tensor(prefixes, dtype=torch.long, device=device)


def bag_of_words(source: str | Path | Iterable[str], tokenizer: PreTrainedTokenizerBase | None = None) -> Bag:
    """A bag from a name in data/wordlists ("space"), a file with an entry a line, or words.

    tokenizer: makes the token ids now. Raises FileNotFoundError with the names there are, ValueError for an
    empty bag or a file that is not UTF-8.
    """
    by_name = isinstance(source, (str, Path))
    words = tuple(dict.fromkeys(word.strip() for word in (data.words(source) if by_name else source)))
    bag = Bag(Path(source).stem if by_name else ", ".join(words[:3]), words)
    return bag if tokenizer is None else bag.encoded(tokenizer)


def _spellings(word: str, tokenizer: PreTrainedTokenizerBase) -> list[tuple[int, ...]]:
    """Token ids of a word after a space, small and capital; the single tokens alone if there are some."""
    cases = dict.fromkeys((word, word.lower(), word[:1].upper() + word[1:]))
    found = [tuple(tokenizer(f" {case}", add_special_tokens=False)["input_ids"]) for case in cases]
    return [entry for entry in found if len(entry) == 1] or found[:1]
