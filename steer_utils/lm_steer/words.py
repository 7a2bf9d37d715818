"""What an LM-Steer does to words: its strongest directions, and the words that lie far along them.

With the singular value decomposition ε M = Σ_i σ_i u_i v_iᵀ, a hidden state h gains Σ_i σ_i (h·u_i) v_i at
steer value 1, and the logit of a word with the output embedding e gains Σ_i σ_i (h·u_i) (v_i·e). Words with
a large v_i·e become likelier where h·u_i is positive, and those at the other end where it is negative.
Shapes: D width, R rank, V vocabulary, K directions. Source: Han et al., ACL 2024, section 4.
"""

import re
from collections.abc import Sequence
from typing import NamedTuple

import torch
from pandas import DataFrame
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from .. import hf
from ..checkpoint import last_states
from ..models import Model, Tokenizer, own_tokenizer, text_ids
from ..types import require
from .steer import LMSteer

BYTE = re.compile(r"<0x[0-9A-F]{2}>")  # how SentencePiece names the bytes of rare characters
BROKEN = "\ufffd"  # what an incomplete character decodes to


class Directions(NamedTuple):
    """ε M_s as u diag(values) vᵀ, on the CPU in float32."""

    u: Tensor  # [D, K]
    values: Tensor  # [K], descending
    v: Tensor  # [D, K]; signs are arbitrary, so the largest entry of each column is made positive


def directions(steer: LMSteer, s: int = 0) -> Directions:
    """The singular value decomposition of ε M_s without its zeros."""
    require(0 <= s < steer.num_steers, f"0 to {steer.num_steers - 1} ({', '.join(steer.names)})", s=s)
    (q1, r1), (q2, r2) = (torch.linalg.qr(one[s].cpu().double()) for one in steer.tensors().values())
    u, values, vt = torch.linalg.svd(r1 @ r2.T)
    kept = values > 1e-9 * values[0]
    u, values, v = q1 @ u[:, kept], values[kept], q2 @ vt.T[:, kept]
    signs = v.gather(0, v.abs().argmax(dim=0)[None]).sign()
    return Directions((u * signs).float(), (steer.epsilon * values).float(), (v * signs).float())


@hf.no_grad
def word_lists(
    steer: LMSteer,
    model: Model,
    tokenizer: Tokenizer,
    s: int = 0,
    *,
    texts: Sequence[str],
    num_directions: int = 10,
    num_words: int = 20,
) -> DataFrame:
    """The words at both ends of each direction of steer s, two table rows for each direction.

    texts: neutral ones, whose last hidden states tell which end a positive steer value makes likelier. Words
    are tokens of a space and three letters or more, one for each spelling in lower case.
    Columns: direction; singular_value (with ε); push (σ_i times the mean of h·u_i: the gain of a word with
    e·v_i = 1 at steer value 1); agreement (the share of positions where h·u_i has the sign of its mean); side
    ("more" or "less"); words (a list); score (their mean e·v_i).
    """
    model, tokenizer = hf.unwrapped(model), own_tokenizer(model, tokenizer)
    steer.require_fit(model)
    if min(counts := (num_directions, num_words, len(texts))) < 1:
        raise ValueError(f"give 1 or more directions, words and texts, not {counts}")
    u, values, v = (tensor[..., :num_directions] for tensor in directions(steer, s))
    names, scores = token_texts(tokenizer), word_scores(model, v)
    keys = {i: name.lower() for i, name in names.items() if is_word(name)}
    if not keys:
        raise ValueError("no token of this tokenizer is a space and a word of three letters or more")
    states = last_states(model, text_ids(tokenizer, texts, as_data=True))
    along_u = torch.cat([of_text.float() @ u for _, of_text in states])
    mean, rows = along_u.mean(dim=0), []
    agreement = (along_u * mean > 0).float().mean(dim=0).tolist()
    for i, push in enumerate((values * mean).tolist()):
        for side, sign in (("more", 1), ("less", -1)):
            ids = top((sign if push > 0 else -sign) * scores[:, i], keys, num_words)
            words, score = [names[j][1:] for j in ids], scores[ids, i].mean().item()
            rows.append([i, values[i].item(), push, agreement[i], side, words, score])
    columns = ["direction", "singular_value", "push", "agreement", "side", "words", "score"]
    return DataFrame(rows, columns=columns)


def map_of_words(
    steer: LMSteer, model: Model, tokenizer: Tokenizer, words: Sequence[str], s: int = 0
) -> DataFrame:
    """Scores of words, each one token, along two directions: columns word, direction 0 and direction 1."""
    steer.require_fit(hf.unwrapped(model))
    v = directions(steer, s).v[:, :2]
    if v.shape[1] < 2:
        raise ValueError(f"a map needs two directions; this steer has rank {v.shape[1]}")
    ids = {text: i for i, text in reversed(token_texts(own_tokenizer(model, tokenizer)).items())}
    found = [ids.get(f" {word}", ids.get(word)) for word in words]
    if unknown := [word for word, i in zip(words, found, strict=True) if i is None]:
        raise ValueError(f"{', '.join(map(repr, unknown))}: not one token of this model; leave them out")
    scores = word_scores(model, v)[found]
    return DataFrame({"word": list(words), "direction 0": scores[:, 0], "direction 1": scores[:, 1]})


@hf.no_grad
def word_scores(model: Model, v: Tensor) -> Tensor:
    """e·v_i of every output embedding and directions v [D, K], [V, K], on the CPU in float32."""
    parts = hf.lm_head(hf.unwrapped(model)).weight.split(2**14)  # a float32 copy of all takes much memory
    return torch.cat([(part.float() @ v.to(part.device)).cpu() for part in parts])


def top(scores: Tensor, keys: dict[int, str], count: int) -> list[int]:
    """The `count` ids with the highest scores [V] among those with a key; one for each key."""
    best: dict[str, int] = {}
    for i in scores.argsort(descending=True, stable=True).tolist():
        if i in keys:
            best.setdefault(keys[i], i)
    return list(best.values())[:count]


def token_texts(tokenizer: PreTrainedTokenizerBase) -> dict[int, str]:
    """{id: text} by rising id, " the" for both "▁the" and "Ġthe"; no specials, no parts of characters."""
    added = tokenizer.added_tokens_decoder.items()
    special = {*tokenizer.all_special_ids, *(i for i, token in added if token.special)}
    vocabulary = tokenizer.get_vocab().items()
    ids = sorted(i for token, i in vocabulary if i not in special and not BYTE.fullmatch(token))
    texts = zip(ids, _mid_text(tokenizer, [[i] for i in ids]), strict=True)
    return {i: text for i, text in texts if text and BROKEN not in text}


def is_word(text: str) -> bool:
    """Whether a token's text is a space and a word of three letters or more."""
    return text[0] == " " and len(text) > 3 and text[1:].isalpha()


def pieces(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> list[str]:
    """What each token adds to a text; a character made of several tokens appears at its last."""
    found, start = [], 0
    for end in range(1, len(ids) + 1):
        (text,) = _mid_text(tokenizer, [ids[start:end]])
        whole = end == len(ids) or not text.endswith(BROKEN)
        found.append(text if whole else "")
        start = end if whole else start
    return found


def _mid_text(tokenizer: PreTrainedTokenizerBase, rows: Sequence[Sequence[int]]) -> list[str]:
    """Token ids decoded behind a letter; alone, SentencePiece would strip their leading space."""
    letter = tokenizer("a", add_special_tokens=False)["input_ids"]
    texts = tokenizer.batch_decode([[*letter, *row] for row in rows], clean_up_tokenization_spaces=False)
    before = len(tokenizer.decode(letter, clean_up_tokenization_spaces=False))
    return [text[before:] for text in texts]
