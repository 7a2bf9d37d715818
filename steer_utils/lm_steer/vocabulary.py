"""A tokenizer's tokens as text: what each adds to a line, which are words, and how a text falls into them."""

import re
from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

BYTE = re.compile(r"<0x[0-9A-F]{2}>")  # how SentencePiece names the bytes of rare characters
BROKEN = "\ufffd"  # what a piece of a character decodes to


def token_texts(tokenizer: PreTrainedTokenizerBase) -> dict[int, str]:
    """{id: text} by rising id: what each token adds in the middle of a text, its leading space included.

    So texts can be compared between tokenizers: "▁the" of SentencePiece and "Ġthe" of byte-level BPE are both
    " the". Special tokens are left out, and bytes that are pieces of characters.
    """
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    special.update(tokenizer.all_special_ids)
    vocabulary = sorted((i, token) for token, i in tokenizer.get_vocab().items() if i not in special)
    ids = [i for i, token in vocabulary if not BYTE.fullmatch(token)]
    texts = dict(zip(ids, _inside(tokenizer, [[i] for i in ids]), strict=True))
    return {i: text for i, text in texts.items() if text and BROKEN not in text}


def is_word(text: str) -> bool:
    """Whether a token's text is a space and a word of three letters or more."""
    return text[0] == " " and len(text) > 3 and text[1:].isalpha()


def pieces(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> list[str]:
    """What each token of a text adds to it; a character made of several tokens appears at its last."""
    found, start = [], 0
    for end in range(1, len(ids) + 1):
        (text,) = _inside(tokenizer, [ids[start:end]])
        whole = end == len(ids) or not text.endswith(BROKEN)
        found.append(text if whole else "")
        start = end if whole else start
    return found


def word_starts(tokens: Sequence[str]) -> list[int]:
    """Where the words of a text begin: at its first token, and at each that begins with white space."""
    return [i for i, token in enumerate(tokens) if i == 0 or token[:1].isspace()]


def _inside(tokenizer: PreTrainedTokenizerBase, rows: Sequence[Sequence[int]]) -> list[str]:
    """Texts of token ids as they read behind a letter: alone, SentencePiece would strip their first space."""
    letter = tokenizer("a", add_special_tokens=False)["input_ids"]
    texts = tokenizer.batch_decode([[*letter, *row] for row in rows], clean_up_tokenization_spaces=False)
    before = len(tokenizer.decode(letter, clean_up_tokenization_spaces=False))
    return [text[before:] for text in texts]
