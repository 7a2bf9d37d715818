"""Transfer an LM-Steer to another model, by the tokens that both vocabularies share.

Let E_s [n, D_s] and E_t [n, D_t] be the output embeddings of n shared tokens, and M = P1 P2ᵀ. The paper fits
E_t B ≈ E_s and takes M' = B M Bᵀ, with rows of B of length 1: "closed_form" by least squares, "learned" by
Adam. But M maps hidden states to changes of them, and only the changes meet embeddings. So M' = C M Bᵀ needs
a second map, of hidden states: h_s ≈ h_t C. "logits" takes C = Aᵀ from E_s A ≈ E_t, so that h_t C gives the
shared tokens the logits of h_t; both tables lose their mean, since a vector that all tokens share changes no
probability. Where E_t = E_s Q, it is right for every invertible Q, "closed_form" for rotations only. "states"
fits C to pairs of hidden states after the same characters: embeddings hardly show the large mean state.
Source of the first two: Han et al., ACL 2024, section 5, and the authors' steer_transfer.py.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize as to_unit_length
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .. import hf
from ..checkpoint import last_states, weights_of
from ..models import Model, Tokenizer, model_id, own_tokenizer, text_ids
from ..types import require
from .steer import LMSteer
from .words import pieces, token_texts

USES = {"closed_form": "normalize", "learned": "normalize n_steps lr seed", "logits": "", "states": "states"}
ROUNDING = 1e-6  # relative singular values that are float32's rounding, as behind a LayerNorm without bias

Encoder = tuple[PreTrainedModel, PreTrainedTokenizerBase]


def transfer(
    steer: LMSteer,
    source_model: Model,
    source_tokenizer: Tokenizer,
    target_model: Model,
    target_tokenizer: Tokenizer,
    *,
    anchors: int = 4000,
    texts: Sequence[str] = (),
    method: str = "states",
    **settings: Any,
) -> LMSteer:
    """The same steers, at the same values, for the target model.

    anchors: number of shared tokens to use, by rising id in the target (often the most frequent first).
    texts: for method="states", a hundred sentences or more, like those to be steered. The other methods fit
    words alone, and may turn the effect around. settings: those of `transferred`. ValueError for "states"
    without texts, fewer tokens or states than a model is wide, and settings without use.
    """
    source, target = hf.unwrapped(source_model), hf.unwrapped(target_model)
    steer.require_fit(source)
    require(anchors >= 1, "at least 1", anchors=anchors)
    one, other = own_tokenizer(source_model, source_tokenizer), own_tokenizer(target_model, target_tokenizer)
    tables = [hf.lm_head(model).weight for model in (source, target)]
    (size, width), (other_size, other_width) = (table.shape for table in tables)
    shared = [(i, j) for i, j in shared_tokens(one, other) if i < size and j < other_size]
    chosen, widest = shared[:anchors], max(width, other_width)
    if len(chosen) < widest:  # many maps would then fit them exactly
        advice = f"set anchors to {widest} or more" if len(shared) >= widest else "train a steer instead"
        few = f"{len(chosen)} anchors of {len(shared)} shared words are too few"
        raise ValueError(f"{few} for models of width {width} and {other_width}: {advice}")
    pairs = zip(tables, torch.tensor(chosen).T, strict=True)
    words = [table[ids.to(table.device)] for table, ids in pairs]
    read = {"texts": texts} if len(texts) else {}
    if method == "states":
        read = {"states": paired_states((source, one), (target, other), texts)}
    moved = transferred(steer, *words, method=method, **read, **settings)
    facts = {"from": model_id(source), "shared words": len(shared)} | moved.card["transfer"]
    facts = {"transfer": facts, "weights": weights_of(target)}
    return replace(moved, model_id=model_id(target), card={**moved.card, **facts})


def shared_tokens(source: PreTrainedTokenizerBase, target: PreTrainedTokenizerBase) -> list[tuple[int, int]]:
    """Ids (source's, target's) of tokens with the same text, by rising id in the target; the first counts."""
    first = {text: i for i, text in reversed(token_texts(source).items())}
    pairs = ((first.pop(text, None), j) for j, text in token_texts(target).items())
    return [(i, j) for i, j in pairs if i is not None]


def paired_states(source: Encoder, target: Encoder, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Last hidden states [N, D_s] and [N, D_t] of two models wherever tokens of both end at one character."""
    one, other = (_states_by_place(*encoder, texts) for encoder in (source, target))
    if not (places := sorted(one.keys() & other.keys())):
        raise ValueError(f"pairs of states need texts: give a list of a hundred or more, not {texts!r}")
    first, second = (torch.stack([states[place] for place in places]) for states in (one, other))
    return first, second


def _states_by_place(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]
) -> dict[tuple[int, int], Tensor]:
    """The state [D] after each (text, number of characters) at which a token ends."""
    found, rows = {}, text_ids(tokenizer, texts, as_data=True)
    for i, states in last_states(model, rows):
        parts = pieces(tokenizer, rows[i][1:])  # empty for a token inside a character
        added = len("".join(parts)) - len("".join(parts).lstrip(" "))  # SentencePiece's space before a text
        ends = zip(parts, accumulate(map(len, parts)), states[1:], strict=True)
        found |= {(i, end - added): state for part, end, state in ends if part}
    return found


@hf.no_grad
def transferred(
    steer: LMSteer, source: Tensor, target: Tensor, *, method: str = "closed_form", **settings: Any
) -> LMSteer:
    """The same steers for another model, given the output embeddings [n, D] of shared tokens in both models.

    settings: of the paper's methods normalize, "rows" to scale each row of B to length 1, or "none"; n_steps,
    lr and seed of `learned`; of "states" states, last hidden states [N, D_s] and [N, D_t].
    `card["transfer"]` gets relative residuals and condition numbers. ValueError as for `transfer`.
    """
    require(method in USES, f"one of {', '.join(USES)}", method=method)
    if unused := settings.keys() - USES[method].split():
        advice = f"leave out {', '.join(unused)}, or give another method"
        raise ValueError(f"method={method!r} uses {USES[method] or 'no settings'}: {advice}")
    fit = _one_map if method in ("closed_form", "learned") else _two_maps
    *sides, facts = fit(method, source.cpu().double(), target.cpu().double(), **settings)
    pairs = zip(sides, steer.tensors().items(), strict=True)
    tensors = {name: (side @ one.cpu().double()).to(one) for side, (name, one) in pairs}
    return replace(steer, **tensors, model_id="", card={**steer.card, "transfer": facts, "weights": ""})


def _one_map(
    method: str, source: Tensor, target: Tensor, *, normalize: str = "rows", **adam: Any
) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """M' = B M Bᵀ, as in the paper: B twice, and facts."""
    require(normalize in ("rows", "none"), "one of rows, none", normalize=normalize)
    both = learned(target, source, **adam) if method == "learned" else closed_form(target, source)
    facts = {"method": method, "anchors": len(source), "normalize": normalize} | adam
    facts |= _quality(target, source, both)
    both = to_unit_length(both, dim=1) if normalize == "rows" else both
    return both, both, facts


def _two_maps(
    method: str, source: Tensor, target: Tensor, *, states: Sequence[Tensor] = ()
) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """M' = C M Bᵀ: C from the embeddings or from pairs of states, B, and facts."""
    source, target = source - source.mean(dim=0), target - target.mean(dim=0)
    of_words, given, wanted = closed_form(target, source), source, target
    facts = {"method": method, "anchors": len(source)} | _quality(target, source, of_words)
    if method == "states":
        wanted, given = (one.cpu().double() for one in states)
        facts["states"], widths = len(given), (wanted.shape[1], given.shape[1])
        if len(given) < max(widths):
            raise ValueError(f"{len(given)} pairs of states are too few for widths {widths}: give more texts")
    of_states = closed_form(given, wanted)
    facts |= _quality(given, wanted, of_states, " of states")
    return of_states.T if method == "logits" else of_states, of_words, facts


def closed_form(given: Tensor, wanted: Tensor) -> Tensor:
    """The B [D, D'] with the least ‖given B − wanted‖, of those the smallest; [n, D] and [n, D'], float64."""
    return torch.linalg.lstsq(given, wanted, rcond=ROUNDING, driver="gelsd").solution


def learned(given: Tensor, wanted: Tensor, *, n_steps: int = 5000, lr: float = 0.01, seed: int = 0) -> Tensor:
    """Adam on the same problem from a random start: the authors' way, slower and less exact."""
    require(n_steps >= 1, "at least 1", n_steps=n_steps)
    require(0 < lr < math.inf, "above 0 and finite", lr=lr)
    size, generator = wanted.numel(), torch.Generator().manual_seed(seed)
    square, product = 2 * given.T @ given / size, 2 * given.T @ wanted / size  # of the gradient
    weight = torch.randn(product.shape, generator=generator, dtype=given.dtype)
    adam = torch.optim.Adam([weight], lr=lr)
    for _ in range(n_steps):
        weight.grad = square @ weight - product
        adam.step()
    return weight


def _quality(given: Tensor, wanted: Tensor, solution: Tensor, what: str = "") -> dict[str, float]:
    """The relative residual of a fit, and the condition number of the table that it was solved for."""
    residual = ((given @ solution - wanted).norm() / wanted.norm()).item()
    return {f"residual{what}": residual, f"condition{what}": torch.linalg.cond(given).item()}
