"""Take an LM-Steer to another model, by the words that both vocabularies have.

With E_s [n, D_s] and E_t [n, D_t] the output embeddings of n shared words, B is the least-squares solution
of E_t B ≈ E_s, and M = P1 P2ᵀ becomes M' = B M Bᵀ: the paper's transfer, "closed_form", or "learned" by Adam
as in the authors' program. Both scale each row of B to length 1.

M acts on hidden states (rows h, M on their right), and is seen through words: a logit changes by h M eᵀ. Two
maps are therefore needed, and "logits" fits each of them so that the shared words keep their logits:

    seen:   the target's y with y E_tᵀ ≈ x E_sᵀ for a change x = h_s M of the source's state is y = x Bᵀ;
    acting: the source's h_s with h_s E_sᵀ ≈ h_t E_tᵀ is h_s = h_t Aᵀ, with A from E_s A ≈ E_t.

So M' = Aᵀ M Bᵀ. States are dual to embeddings: if E_t = E_s Q, then h_t = h_s Q⁻ᵀ, and M' must be Qᵀ M Q⁻ᵀ.
"logits" gives that for every invertible Q. B on both sides gives Q⁻¹ M Q⁻ᵀ, which is the same only where
Qᵀ = Q⁻¹, for rotations; the unit rows make up for one common scale besides. "logits" also takes the mean
embedding off both tables, since a vector that all words share changes no probability.

Words say little of where states lie: what is added to all logits alike they do not see, and the large mean
state that steers act on is mostly of that kind. "states" reads some texts with both models, and fits
h_s ≈ h_t C to pairs of states that have seen the same characters: M' = C M Bᵀ.
Source of the first two: Han et al., ACL 2024, section 5, and the authors' steer_transfer.py. The other two
are this package's.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize as to_unit_length
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .. import hf
from ..models import model_id, own_tokenizer
from .steer import LMSteer
from .token_states import paired_states
from .vocabulary import token_texts

METHODS = ("closed_form", "learned", "logits", "states")
NORMALIZE = ("rows", "none")
ROUNDING = 1e-6  # singular values below it, relative to the largest, are float32's rounding


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
    normalize: str = "rows",
    n_steps: int = 5000,
    lr: float = 0.01,
    seed: int = 0,
) -> LMSteer:
    """The same steers, at the same values, for the target model.

    anchors: of the words that both vocabularies have, as many as this, by rising id in the target's (often
    the most frequent first). texts: for "states", of any kind and without labels, a hundred sentences or more
    such as the steer will see. method, normalize, n_steps, lr, seed: as for `transferred`. `card["transfer"]`
    tells how many shared words there are, how well they fitted, and all settings. ValueError for a steer that
    does not fit the source, or fewer words, or states, than either model is wide; TypeError for another kind
    of steer.
    """
    source, target = hf.unwrapped(source_model), hf.unwrapped(target_model)
    if not isinstance(steer, LMSteer):
        raise TypeError(f"only an LMSteer, a map of embeddings, can be transferred, not {steer!r}")
    steer.require_fit(source)
    tables = [hf.lm_head(model).weight for model in (source, target)]
    tokenizers = own_tokenizer(source_model, source_tokenizer), own_tokenizer(target_model, target_tokenizer)
    shared = shared_tokens(*tokenizers)
    shared = [pair for pair in shared if pair[0] < len(tables[0]) and pair[1] < len(tables[1])]
    chosen = torch.tensor(shared[: max(0, anchors)], dtype=torch.long).reshape(-1, 2)
    words = [table[ids.to(table.device)] for table, ids in zip(tables, chosen.T, strict=True)]
    _require_enough(len(shared), *words)
    how = {"method": method, "normalize": normalize, "n_steps": n_steps, "lr": lr, "seed": seed}
    readers = zip((source, target), tokenizers, strict=True)
    states = paired_states(*readers, _readable(texts)) if method == "states" else None
    moved = transferred(steer, *words, states=states, **how)
    facts = {"from": model_id(source), "shared words": len(shared)} | moved.card["transfer"]
    return replace(moved, model_id=model_id(target), card={**moved.card, "transfer": facts})


def shared_tokens(source: PreTrainedTokenizerBase, target: PreTrainedTokenizerBase) -> list[tuple[int, int]]:
    """Pairs of ids (source's, target's) of tokens with the same text, by rising id in the target.

    Of tokens of one tokenizer with the same text, the first counts.
    """
    first: dict[str, int] = {}
    for i, text in token_texts(source).items():
        first.setdefault(text, i)
    pairs = ((first.pop(text, None), i) for i, text in token_texts(target).items())
    return [(i, j) for i, j in pairs if i is not None]


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
    """The steers moved by the embeddings of the same n words, [n, D_s] and [n, D_t].

    states: for "states", last hidden states [N, D_s] and [N, D_t] that belong together. method: see above.
    normalize: "rows" gives each row of B length 1, "none" keeps its scale; "logits" and "states" need
    neither, their two scales cancel. n_steps, lr, seed: of "learned".
    `card["transfer"]` gets the residual ‖E_t B − E_s‖ / ‖E_s‖ before rows are scaled, for "logits" and
    "states" also that of A or C, and the condition number of each table that was solved for. Least squares
    shrink B where the fit is poor, and "none" lets that weaken the steer twice. Of a table that is not of
    full rank the smallest solution is taken. ValueError for an unknown method or normalize, or for fewer
    states than either is wide.
    """
    for name, value, known in (("method", method, METHODS), ("normalize", normalize, NORMALIZE)):
        if value not in known:
            raise ValueError(f"{name} must be one of {', '.join(known)}, not {value!r}")
    source, target = (words.cpu().double() for words in (source_words, target_words))
    facts: dict[str, Any] = {"method": method, "anchors": len(source)}
    if method in ("logits", "states"):
        source, target = source - source.mean(dim=0), target - target.mean(dim=0)
        seen = closed_form(target, source)
        acting, quality = _acting(source, target) if method == "logits" else _reading(states)
        return _mapped(steer, acting, seen, facts | _quality(target, source, seen) | quality)
    settings = {"n_steps": n_steps, "lr": lr, "seed": seed} if method == "learned" else {}
    seen = learned(target, source, **settings) if settings else closed_form(target, source)
    facts |= {"normalize": normalize} | settings | _quality(target, source, seen)
    seen = to_unit_length(seen, dim=1) if normalize == "rows" else seen
    return _mapped(steer, seen, seen, facts)


def _acting(source_words: Tensor, target_words: Tensor) -> tuple[Tensor, dict[str, Any]]:
    """Aᵀ [D_t, D_s], from the target's states to the source's, by words alone; and how well A fits."""
    found = closed_form(source_words, target_words)
    return found.T, _quality(source_words, target_words, found, " of states")


def _reading(states: tuple[Tensor, Tensor] | None) -> tuple[Tensor, dict[str, Any]]:
    """C [D_t, D_s], from the target's states to the source's, by pairs of them; and how well it fits."""
    if states is None:
        raise ValueError("method='states' needs states, those of source and target: see `paired_states`")
    source, target = (one.cpu().double() for one in states)
    if len(source) < max(source.shape[1], target.shape[1]):
        raise ValueError(
            f"{len(source)} pairs of states are too few for models of width {source.shape[1]} and "
            f"{target.shape[1]}: give more texts"
        )
    found = closed_form(target, source)
    return found, {"states": len(source)} | _quality(target, source, found, " of states")


def closed_form(given: Tensor, wanted: Tensor) -> Tensor:
    """The B [D, D'] with the least ‖given B − wanted‖, of those the smallest; [n, D] and [n, D'], float64.

    A direction that is nothing but rounding counts as none: what comes out of a LayerNorm without a bias sums
    to zero, and a map may not live on the last digit by which it does not.
    """
    return torch.linalg.lstsq(given, wanted, rcond=ROUNDING, driver="gelsd").solution


def learned(given: Tensor, wanted: Tensor, *, n_steps: int, lr: float, seed: int) -> Tensor:
    """What Adam makes of the same problem from a random start: the authors' way, slower and less exact.

    The gradient of the mean squared error is 2 (GᵀG B − GᵀW) / (n D'), whose products are formed once.
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
    projectors = {
        name: (matrix @ tensor.cpu().double()).to(tensor)
        for (name, tensor), matrix in zip(steer.tensors().items(), (left, right), strict=True)
    }
    return replace(steer, **projectors, model_id="", card={**steer.card, "transfer": facts})


def _quality(given: Tensor, wanted: Tensor, solution: Tensor, what: str = "") -> dict[str, float]:
    """The relative residual of a fit, and the condition number of what it was made from."""
    residual = (given @ solution - wanted).norm() / wanted.norm()
    condition = torch.linalg.cond(given)
    return {f"residual{what}": residual.item(), f"condition{what}": condition.item()}


def _readable(texts: Sequence[str]) -> Sequence[str]:
    if isinstance(texts, str) or not len(texts):
        raise ValueError(f"method='states' reads texts: give a list of a hundred or more, not {texts!r}")
    return texts


def _require_enough(shared: int, source_words: Tensor, target_words: Tensor) -> None:
    """ValueError for fewer anchors than either model is wide: a map could then fit them in many ways."""
    widths = source_words.shape[1], target_words.shape[1]
    if len(source_words) < max(widths):
        raise ValueError(
            f"{len(source_words)} anchors of {shared} shared words are too few for models of width "
            f"{widths[0]} and {widths[1]}: "
            + (f"set anchors to {max(widths)} or more" if shared >= max(widths) else "train a steer instead")
        )
