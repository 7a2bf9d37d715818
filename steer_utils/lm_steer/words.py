"""What an LM-Steer does to words: its strongest directions, and the words that lie far along them.

With the singular value decomposition ε M = Σ_i σ_i u_i v_iᵀ, a hidden state h gains Σ_i σ_i (h·u_i) v_i at
steer value 1, and the logit of a word with the output embedding e gains Σ_i σ_i (h·u_i) (v_i·e). Words with
a large v_i·e become likelier where h·u_i is positive, and those at the other end where it is negative.
This ranks directions as if all h were equally likely. Given real hidden states H, `directions` ranks them by
what these gain: it decomposes H ε M, whose v_i are the principal axes of the gains.
Shapes: N positions, D width, R rank, V vocabulary, K = min(D, R) directions.
Source: Han et al., ACL 2024, section 4, and the authors' pca_analysis.py, which leaves the side open.
"""

import re
from collections.abc import Sequence
from typing import NamedTuple

import torch
from pandas import DataFrame
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .. import hf
from ..models import own_tokenizer, token_ids
from .steer import LMSteer
from .training import token_states

BYTE = re.compile(r"<0x[0-9A-F]{2}>")  # how SentencePiece names the bytes of rare characters
BROKEN = "\ufffd"  # what an incomplete character decodes to


class Directions(NamedTuple):
    """ε M_s as u diag(values) vᵀ."""

    u: Tensor  # [D, K]
    values: Tensor  # [K], descending
    v: Tensor  # [D, K]; signs are arbitrary, so the largest entry of each column is made positive


def directions(steer: LMSteer, s: int = 0, hidden: Tensor | None = None) -> Directions:
    """The singular value decomposition of ε M_s, from two QR decompositions and an SVD of size K.

    hidden: last hidden states [N, D]. Then v and the values are those of H ε M_s / √N, so that σ_i² is the
    mean square of what a state gains along v_i; directions in which no state gains are left out. The columns
    of u are then not orthogonal, but ε M_s is still u diag(values) vᵀ for these states.
    On the CPU, in float32. ValueError for a steer that does not exist.
    """
    if not 0 <= s < steer.num_steers:
        raise ValueError(f"s must be 0 to {steer.num_steers - 1} ({', '.join(steer.names)}), not {s!r}")
    left, right = (tensor[s].cpu().double() for tensor in steer.tensors().values())
    (q1, r1), (q2, r2) = (torch.linalg.qr(tensor) for tensor in (left, right))
    if hidden is None:
        u, values, vt = torch.linalg.svd(r1 @ r2.T)
        u, v = q1 @ u, q2 @ vt.T
    else:
        r = torch.linalg.qr(hidden.cpu().double() @ q1, mode="r").R / len(hidden) ** 0.5
        _, values, vt = torch.linalg.svd(r @ r1 @ r2.T, full_matrices=False)
        kept = values > 1e-9 * values[0]
        values, v = values[kept], q2 @ vt.T[:, kept]
        u = left @ (right.T @ v) / values
    signs = v.gather(0, v.abs().argmax(dim=0)[None]).sign()
    return Directions((u * signs).float(), (steer.epsilon * values).float(), (v * signs).float())


@torch.no_grad()
def word_lists(
    steer: LMSteer,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    s: int = 0,
    *,
    texts: Sequence[str] | None = None,
    num_directions: int = 10,
    num_words: int = 20,
    whole_words: bool = True,
) -> DataFrame:
    """The words at both ends of each direction of steer s, two table rows for each direction.

    texts: neutral ones. Their last hidden states tell which end a positive steer value makes likelier, side
    "more" or "less"; without texts the sides are "high" and "low". whole_words: only tokens that are a space
    and three letters or more, one for each spelling in lower case; otherwise all tokens, as they are written.

    Columns: direction; singular_value (with ε); push (σ_i times the mean of h·u_i, which is what a word with
    e·v_i = 1 gains at steer value 1; NaN without texts); agreement (the share of positions where h·u_i has
    the sign of its mean; near a half, the side means little); side; words (a list); score (their mean e·v_i).
    ValueError if the steer does not fit, if no token is a whole word, or for a number below 1.
    """
    model, tokenizer = hf.unwrapped(model), own_tokenizer(model, tokenizer)
    steer.require_fit(model)
    if min(num_directions, num_words) < 1:
        raise ValueError(f"give 1 or more directions and words, not {num_directions} and {num_words}")
    u, values, v = (tensor[..., :num_directions] for tensor in directions(steer, s))
    if texts is not None:
        if not len(texts):
            raise ValueError("there are no texts to tell the sides by: give some, or None")
        ids = [token_ids(tokenizer, text) for text in texts]
        hidden = token_states(model, [[*one, one[0]] for one in ids]).hidden  # of the last token too
        along_u = hidden.float() @ u
    scores, names = word_scores(model, v), token_texts(tokenizer)
    keys = {i: name.lower() for i, name in names.items() if is_word(name)} if whole_words else names
    if not keys:
        raise ValueError("no token of this tokenizer is a whole word: give whole_words=False")
    rows = []
    for i, value in enumerate(values.tolist()):
        push, agreement, sides = torch.nan, torch.nan, {"high": 1, "low": -1}
        if texts is not None:
            mean = along_u[:, i].mean()
            push, agreement = value * mean.item(), (along_u[:, i] * mean > 0).float().mean().item()
            sides = {"more": 1, "less": -1} if push > 0 else {"more": -1, "less": 1}
        for side, sign in sides.items():
            ids = top(sign * scores[:, i], keys, num_words)
            words = [names[j][whole_words:] for j in ids]  # a whole word without its space
            rows.append([i, value, push, agreement, side, words, scores[ids, i].mean().item()])
    columns = ["direction", "singular_value", "push", "agreement", "side", "words", "score"]
    return DataFrame(rows, columns=columns)


def map_of_words(
    steer: LMSteer,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    words: Sequence[str] | None = None,
    s: int = 0,
    *,
    num_words: int = 20,
) -> DataFrame:
    """Where words lie along the two strongest directions of steer s: columns word, direction 0, direction 1.

    words: each one token, with or without a space in front; by default the `num_words` at each end of both
    directions. ValueError for a steer of rank 1, and for words that are not one token.
    """
    model, tokenizer = hf.unwrapped(model), own_tokenizer(model, tokenizer)
    if steer.rank < 2:
        raise ValueError(f"a map needs two directions; this steer has rank {steer.rank}")
    if words is None:
        lists = word_lists(steer, model, tokenizer, s, num_directions=2, num_words=num_words)["words"]
        words = list(dict.fromkeys(word for one in lists for word in one))
    ids = {text: i for i, text in reversed(token_texts(tokenizer).items())}
    found = [ids.get(f" {word}", ids.get(word)) for word in words]
    if unknown := [word for word, i in zip(words, found, strict=True) if i is None]:
        raise ValueError(f"{', '.join(map(repr, unknown))}: not one token of this model; leave them out")
    scores = word_scores(model, directions(steer, s).v[:, :2])[found]
    return DataFrame({"word": list(words), "direction 0": scores[:, 0], "direction 1": scores[:, 1]})


@torch.no_grad()
def word_scores(model: PreTrainedModel, v: Tensor) -> Tensor:
    """e·v_i of every output embedding and directions v [D, K], [V, K], on the CPU in float32."""
    parts = hf.lm_head(hf.unwrapped(model)).weight.split(
        2**14
    )  # a float32 copy of all would double the memory
    return torch.cat([(part.float() @ v.to(part.device)).cpu() for part in parts])


def top(scores: Tensor, keys: dict[int, str], count: int) -> list[int]:
    """The `count` ids with the highest scores [V] among those with a key; one for each key."""
    ids = torch.tensor([i for i in keys if i < len(scores)])
    best: dict[str, int] = {}
    for i in ids[scores[ids].argsort(descending=True, stable=True)].tolist():
        best.setdefault(keys[i], i)
    return list(best.values())[:count]


# --- tokens as text ---------------------------------------------------------------------------------------


def token_texts(tokenizer: PreTrainedTokenizerBase) -> dict[int, str]:
    """{id: text} by rising id: what each token adds in the middle of a text, its leading space included.

    These can be compared between tokenizers: "▁the" of SentencePiece and "Ġthe" of byte-level BPE are both
    " the". Special tokens and incomplete characters are left out.
    """
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    special.update(tokenizer.all_special_ids)
    ids = sorted(
        i for token, i in tokenizer.get_vocab().items() if i not in special and not BYTE.fullmatch(token)
    )
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


def word_starts(tokens: Sequence[str]) -> list[int]:
    """Where the words of a text begin: at its first token, and at each that begins with white space."""
    return [i for i, token in enumerate(tokens) if i == 0 or token[:1].isspace()]


def _mid_text(tokenizer: PreTrainedTokenizerBase, rows: Sequence[Sequence[int]]) -> list[str]:
    """Token ids decoded behind a letter; alone, SentencePiece would strip their leading space."""
    letter = tokenizer("a", add_special_tokens=False)["input_ids"]
    texts = tokenizer.batch_decode([[*letter, *row] for row in rows], clean_up_tokenization_spaces=False)
    before = len(tokenizer.decode(letter, clean_up_tokenization_spaces=False))
    return [text[before:] for text in texts]
