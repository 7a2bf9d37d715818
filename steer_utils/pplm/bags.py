"""Bags of words: which next tokens would begin, or continue, a word of a topic.

A word counts in the ways in which it can stand in a sentence: after a space, with a small or a capital first
letter; without the space if that takes fewer tokens, as in Chinese. If one of these is a single token, those
of several tokens are left out. A word of several tokens counts token by token: " black" of "black hole"
counts until it stands at the end of the text; then only " hole" does.
Shapes: B batch rows, T tokens so far, K token ids of a bag, N tokens of the longest prefix.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import chain, dropwhile
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import PreTrainedTokenizerBase

from .. import data

ANY = -1  # in a prefix, matches every token
NOTHING = -2  # stands where a text has no token
FRAGMENT = 4  # letters: a first token of fewer is no word of its own


@dataclass(frozen=True)
class Bag:
    """Words and, for one tokenizer, their token ids.

    Made by `bag_of_words`, or from token ids: `Bag("mine", entries=((10,), (23, 5)))`. Duplicate words count
    once, duplicate entries of one token twice. ValueError if empty, and for a negative id.
    """

    name: str
    words: tuple[str, ...] = ()
    entries: tuple[tuple[int, ...], ...] = ()
    tokenizer: PreTrainedTokenizerBase | None = field(default=None, repr=False)  # where it cuts characters

    def __post_init__(self) -> None:
        if not self.words and not self.entries:
            raise ValueError(f"the bag {self.name!r} is empty: give at least one word")
        if () in self.entries or not all(map(str.strip, self.words)):
            raise ValueError(f"the bag {self.name!r} holds an empty word: leave it out")
        if negative := [i for entry in self.entries for i in entry if i < 0]:
            raise ValueError(f"the bag {self.name!r} holds the token id {negative[0]}: ids begin at 0")

    def encoded(self, tokenizer: PreTrainedTokenizerBase | None) -> "Bag":
        """The same bag with token ids. Words that begin with a fragment are left out, unless all do.

        ValueError if there are only words and no tokenizer, for a word that it does not know, and for a bag
        of words that was encoded by another tokenizer.
        """
        if self.entries and (tokenizer is None or not self.words):
            return self
        if tokenizer is None:
            raise ValueError(f"bag {self.name!r} holds words: use pplm.with_tokenizer(tokenizer) before")
        found = [_spellings(word, tokenizer) for word in self.words]
        whole = [entries for entries in found if not _is_fragment(entries[0], tokenizer)]
        entries = tuple(dict.fromkeys(chain(*(whole or found))))
        if self.entries not in ((), entries):
            raise ValueError(f"the bag {self.name!r} was encoded by another tokenizer: make it for this one")
        cuts = any(_ends_inside(entry[:end], tokenizer) for entry in entries for end in range(1, len(entry)))
        return replace(self, entries=entries, tokenizer=tokenizer if cuts else None)

    def wanted(self, text: Tensor) -> tuple[Tensor, Tensor | None]:
        """Token ids [K], and which of them count after each text [B, T], as [B, K]; None if all always do."""
        ids, prefixes = _with_prefixes(self.entries, text.device)
        size = prefixes.shape[1]
        if size == 0:
            return ids, None
        end, first = pad(text, (size, 0), value=NOTHING)[:, -size:], prefixes[:, -1] == ANY
        fits = ((end[:, None] == prefixes) | (prefixes == ANY)).all(dim=-1)
        begun = (fits & ~first).any(dim=1, keepdim=True)
        return ids, fits & ~(first & begun)


def finished(bags: Sequence[Bag], log_probs: Tensor, unsteered: Tensor, text: Tensor) -> Tensor:
    """Log probabilities [B, V] after texts [B, T]; a text that ends inside a character finishes it.

    A word of a bag that it begins goes on; any other is left to the unsteered model.
    """
    tokenizer = next((bag.tokenizer for bag in bags if bag.tokenizer), None)
    for row, ids in enumerate(text.tolist() if tokenizer else ()):
        if _ends_inside([token for token in ids[-4:] if token != NOTHING], tokenizer):
            begun = ((one, end) for bag in bags for one in bag.entries for end in range(1, len(one)))
            others = torch.ones_like(log_probs[row], dtype=torch.bool)
            others[[one[end] for one, end in begun if tuple(ids[-end:]) == one[:end]]] = False
            going_on = log_probs[row].masked_fill(others, -torch.inf)
            log_probs[row] = unsteered[row] if others.all() else going_on
    return log_probs


@cache
def _with_prefixes(entries: tuple[tuple[int, ...], ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """Token ids [K], and the prefix [K, N] after which each counts, filled with `ANY` from the left."""
    singles = [entry for entry in entries if len(entry) == 1]
    # A token and its prefix, as one tuple; it adds nothing if the token counts after a shorter one too.
    pieces = dict.fromkeys(entry[:end] for entry in entries for end in range(1, len(entry) + 1))
    pieces = [piece for piece in pieces if not any(piece[i:] in pieces for i in range(1, len(piece) - 1))]
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
    """Token ids of a word, small and capital: the single tokens, or else the spelling of fewest tokens."""
    cases = dict.fromkeys((word, word.lower(), word[:1].upper() + word[1:]))
    both = [[_without_blanks(start + case, tokenizer) for start in (" ", "")] for case in cases]
    found = [min(pair, key=len) for pair in both]  # the one after a space, of two equally long ones
    found = [entry for entry in found if entry and tokenizer.unk_token_id not in entry]
    if not found:
        raise ValueError(f"the tokenizer does not know {word!r}: leave it out")
    fewest = min(found, key=len)
    if _ends_inside(fewest[:1], tokenizer):  # the model may write either
        return list(dict.fromkeys(both[0]))
    return [entry for entry in found if len(entry) == 1] or [fewest]


def _ends_inside(ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a text ends inside a character, as those of several bytes may be cut; none has more than 4."""
    ends = (tokenizer.decode(ids[-n:]) for n in range(1, min(4, len(ids)) + 1))
    return bool(ids) and all(end.endswith("\ufffd") for end in ends)


def _without_blanks(text: str, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Token ids of a text from the first that is no bare space, which "▁" and "Ġ" stand for."""
    ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    return tuple(dropwhile(lambda token: not tokenizer.convert_ids_to_tokens(token).strip("▁Ġ "), ids))


def _is_fragment(entry: tuple[int, ...], tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the first token, half a character or " br" of "brides", would draw in other words as well."""
    start, whole = (tokenizer.decode(ids).strip() for ids in (entry[:1], entry))
    return start.endswith("\ufffd") or (len(start) < FRAGMENT and start != whole.split()[0])
