"""Transfer an LM-Steer to another model, by the tokens that both vocabularies share.

Let E_s [n, D_s] and E_t [n, D_t] be the output embeddings of n shared tokens, and M = P1 P2ᵀ. The paper fits
one map of output embeddings, E_t B ≈ E_s, and uses it on both sides: M' = B M Bᵀ, with rows of B of length 1.
"closed_form" solves for B by least squares, "learned" by Adam as the authors' program does.

But M maps hidden states to changes of them, and only the changes meet the embeddings: the logit of a word e
gains h M eᵀ. So M' = C M Bᵀ needs a second map, that of hidden states, h_s ≈ h_t C.
"logits" takes C = Aᵀ from E_s A ≈ E_t, so that h_t C gives the shared tokens the logits of h_t. It subtracts
the mean embedding from both tables, since a vector that all tokens share changes no probability. For
E_t = E_s Q it gives Qᵀ M Q⁻ᵀ, which is right for every invertible Q; "closed_form" gives Q⁻¹ M Q⁻ᵀ, which is
right for rotations only. "states" fits C to pairs of hidden states of both models after the same characters:
the large mean state, on which steers act, adds nearly the same to all logits, so embeddings hardly show it.
Source of the first two: Han et al., ACL 2024, section 5, and the authors' steer_transfer.py. The other two
are this package's.
"""

from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize as to_unit_length
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .. import hf
from ..models import model_id, own_tokenizer, token_ids
from .steer import LMSteer
from .training import token_states
from .words import pieces, token_texts

METHODS = ("closed_form", "learned", "logits", "states")
ROUNDING = 1e-6  # singular values below it, relative to the largest, are float32's rounding

Encoder = tuple[PreTrainedModel, PreTrainedTokenizerBase]


def transfer(
    steer: LMSteer,
    source_model: PreTrainedModel,
    source_tokenizer: PreTrainedTokenizerBase | None,
    target_model: PreTrainedModel,
    target_tokenizer: PreTrainedTokenizerBase | None,
    *,
    anchors: int = 4000,
    texts: Sequence[str] = (),
    method: str = "closed_form",
    **settings: Any,
) -> LMSteer:
    """The same steers, at the same values, for the target model.

    anchors: number of shared tokens to use, by rising id in the target (often the most frequent first).
    texts: for method="states", a hundred unlabelled sentences or more, like those to be steered. settings:
    normalize, n_steps, lr and seed of `transferred`. `card["transfer"]` records the number of shared tokens,
    the quality of the fits and the settings. ValueError for a steer that does not fit the source, or fewer
    tokens or states than either model is wide; TypeError for another kind of steer.
    """
    source, target = hf.unwrapped(source_model), hf.unwrapped(target_model)
    if not isinstance(steer, LMSteer):
        raise TypeError(f"only an LMSteer, a map of embeddings, can be transferred, not {steer!r}")
    steer.require_fit(source)
    tables = [hf.lm_head(model).weight for model in (source, target)]
    tokenizers = own_tokenizer(source_model, source_tokenizer), own_tokenizer(target_model, target_tokenizer)
    shared = [(i, j) for i, j in shared_tokens(*tokenizers) if i < len(tables[0]) and j < len(tables[1])]
    chosen, widest = shared[: max(0, anchors)], max(table.shape[1] for table in tables)
    if len(chosen) < widest:  # many maps would then fit them exactly
        advice = f"set anchors to {widest} or more" if len(shared) >= widest else "train a steer instead"
        raise ValueError(
            f"{len(chosen)} anchors of {len(shared)} shared words are too few for models of width "
            f"{tables[0].shape[1]} and {tables[1].shape[1]}: {advice}"
        )
    ids = torch.tensor(chosen).T
    embeddings = [table[ids_of.to(table.device)] for table, ids_of in zip(tables, ids, strict=True)]
    states = None
    if method == "states":
        if isinstance(texts, str) or not len(texts):
            raise ValueError(f"method='states' needs texts: give a list of a hundred or more, not {texts!r}")
        states = paired_states((source, tokenizers[0]), (target, tokenizers[1]), texts)
    moved = transferred(steer, *embeddings, states=states, method=method, **settings)
    facts = {"from": model_id(source), "shared words": len(shared)} | moved.card["transfer"]
    return replace(moved, model_id=model_id(target), card={**moved.card, "transfer": facts})


def shared_tokens(source: PreTrainedTokenizerBase, target: PreTrainedTokenizerBase) -> list[tuple[int, int]]:
    """Pairs of ids (source's, target's) of tokens with the same text, by rising id in the target.

    If several tokens of one tokenizer have the same text, the first counts.
    """
    first = {text: i for i, text in reversed(token_texts(source).items())}
    pairs = ((first.pop(text, None), j) for j, text in token_texts(target).items())
    return [(i, j) for i, j in pairs if i is not None]


def paired_states(source: Encoder, target: Encoder, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Last hidden states [N, D_s] and [N, D_t] of two models after the same characters of the same texts.

    There is a pair wherever a token of each tokenizer ends at the same character; BOS has none.
    """
    (one, places), (other, theirs) = (_states_and_places(*encoder, texts) for encoder in (source, target))
    pairs = [(i, theirs[place]) for place, i in places.items() if place in theirs]
    rows = torch.tensor(pairs, dtype=torch.long).reshape(-1, 2)
    return one[rows[:, 0]], other[rows[:, 1]]


def _states_and_places(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]
) -> tuple[Tensor, dict[tuple[int, int], int]]:
    """States after all tokens, and the index of that after each (text, number of characters)."""
    places, ids = {}, [token_ids(tokenizer, text) for text in texts]
    starts = accumulate(map(len, ids), initial=0)
    for text, (start, one) in enumerate(zip(starts, ids, strict=False)):
        parts = pieces(tokenizer, one[1:])
        added = len("".join(parts)) - len("".join(parts).lstrip(" "))  # SentencePiece's space before a text
        ends = enumerate(accumulate(map(len, parts)), start + 1)
        places |= {(text, end - added): i for i, end in ends}
    return token_states(model, [[*one, one[0]] for one in ids]).hidden, places  # of the last token too


@torch.no_grad()
def transferred(
    steer: LMSteer,
    source_words: Tensor,
    target_words: Tensor,
    *,
    states: tuple[Tensor, Tensor] | None = None,
    method: str = "closed_form",
    normalize: str = "rows",
    n_steps: int = 5000,
    lr: float = 0.01,
    seed: int = 0,
) -> LMSteer:
    """The steers moved by the output embeddings of the same n tokens, [n, D_s] and [n, D_t].

    states: for "states", paired last hidden states [N, D_s] and [N, D_t]. method: see above. n_steps, lr,
    seed: of "learned". normalize: "rows" scales each row of B to length 1, "none" keeps its scale (where the
    fit is poor, least squares shrink B, which then weakens the steer twice); it does not concern "logits" and
    "states", whose two scales cancel.
    `card["transfer"]` gets the residual ‖E_t B − E_s‖ / ‖E_s‖ before scaling, for "logits" and "states" also
    that of C, and the condition numbers. A table that is not of full rank gets the smallest solution.
    ValueError for an unknown method or normalize, or for fewer states than either model is wide.
    """
    for name, value, known in (("method", method, METHODS), ("normalize", normalize, ("rows", "none"))):
        if value not in known:
            raise ValueError(f"{name} must be one of {', '.join(known)}, not {value!r}")
    source, target = (words.cpu().double() for words in (source_words, target_words))
    facts: dict[str, Any] = {"method": method, "anchors": len(source)}
    if method in ("closed_form", "learned"):
        settings = {"n_steps": n_steps, "lr": lr, "seed": seed} if method == "learned" else {}
        both = learned(target, source, **settings) if settings else closed_form(target, source)
        facts |= {"normalize": normalize} | settings | _quality(target, source, both)
        both = to_unit_length(both, dim=1) if normalize == "rows" else both
        return _mapped(steer, both, both, facts)
    source, target = source - source.mean(dim=0), target - target.mean(dim=0)
    of_embeddings = closed_form(target, source)
    facts |= _quality(target, source, of_embeddings)
    if method == "logits":
        of_states = closed_form(source, target).T
        return _mapped(
            steer, of_states, of_embeddings, facts | _quality(source, target, of_states.T, " of states")
        )
    if states is None:
        raise ValueError("method='states' needs states, those of source and target: see `paired_states`")
    theirs, ours = (one.cpu().double() for one in states)
    if len(ours) < max(widths := (theirs.shape[1], ours.shape[1])):
        raise ValueError(
            f"{len(ours)} pairs of states are too few for models of width {widths[0]} and {widths[1]}: "
            f"give more texts"
        )
    of_states = closed_form(ours, theirs)
    facts |= {"states": len(ours)} | _quality(ours, theirs, of_states, " of states")
    return _mapped(steer, of_states, of_embeddings, facts)


def closed_form(given: Tensor, wanted: Tensor) -> Tensor:
    """The B [D, D'] with the least ‖given B − wanted‖, of those the smallest; [n, D] and [n, D'], float64.

    Singular values that are only rounding count as 0. Without this, B could rest on the last digit of a sum
    that should be 0, as behind a LayerNorm without a bias.
    """
    return torch.linalg.lstsq(given, wanted, rcond=ROUNDING, driver="gelsd").solution


def learned(given: Tensor, wanted: Tensor, *, n_steps: int, lr: float, seed: int) -> Tensor:
    """Adam on the same problem from a random start: the authors' way, slower and less exact.

    The gradient of the mean squared error is 2 (GᵀG B − GᵀW) / (n D'); both products are computed once.
    """
    size = wanted.numel()
    square, product = 2 * given.T @ given / size, 2 * given.T @ wanted / size
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(product.shape, generator=generator, dtype=given.dtype)
    adam = torch.optim.Adam([weight], lr=lr)
    for _ in range(n_steps):
        weight.grad = square @ weight - product
        adam.step()
    return weight


def _mapped(steer: LMSteer, left: Tensor, right: Tensor, facts: dict[str, Any]) -> LMSteer:
    """M' = left M rightᵀ for all steers, with left and right [D_t, D_s]."""
    projector1 = (left @ steer.projector1.cpu().double()).to(steer.projector1)
    projector2 = (right @ steer.projector2.cpu().double()).to(steer.projector2)
    card = {**steer.card, "transfer": facts}
    return replace(steer, projector1=projector1, projector2=projector2, model_id="", card=card)


def _quality(given: Tensor, wanted: Tensor, solution: Tensor, what: str = "") -> dict[str, float]:
    """The relative residual of a fit, and the condition number of the table that it was solved for."""
    residual, condition = (given @ solution - wanted).norm() / wanted.norm(), torch.linalg.cond(given)
    return {f"residual{what}": residual.item(), f"condition{what}": condition.item()}
