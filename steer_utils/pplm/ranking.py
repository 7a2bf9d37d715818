"""Best of several: the completion that a bag or a head finds most likely to be on the attribute.

PPLM's paper draws r completions of each prompt, drops those that repeat themselves, and keeps the one with
the greatest log p(attribute | text). Source: Dathathri et al. 2020, section 4; not in their programs.
"""

import math
from collections.abc import Sequence

import numpy as np
import pandas as pd
import torch
from torch.nn.functional import pad
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .. import hf
from ..measure.metrics import distinct
from ..models import token_ids
from .bags import NOTHING
from .descent import bag_loss
from .steer import PPLM


def best_of(
    table: pd.DataFrame, scores: Sequence[float], *, min_distinct: float = 0.0, r: int | None = None
) -> pd.DataFrame:
    """Of each prompt's first r completions, the one with the highest score that does not repeat itself.

    table: from `su.generate`. scores: one for each row, such as `attribute_scores`. min_distinct: the least
    mean of distinct-1, -2 and -3; where no completion of a prompt reaches it, the most distinct is taken.
    Returns a row a prompt, in order, with columns `score` and `distinct` more. ValueError for scores of
    another number, and for r below 1.
    """
    if len(scores) != len(table):
        raise ValueError(f"{len(scores)} scores for {len(table)} completions: give one for each")
    if r is not None and r < 1:
        raise ValueError(f"r must be at least 1, not {r}")
    spread = [np.mean([distinct(text, n) for n in (1, 2, 3)]) for text in table["completion"]]
    ranked = table.assign(score=np.asarray(scores, dtype=float), distinct=spread)
    ranked = ranked[ranked["sample"] < (r or np.inf)]
    ranked = ranked.assign(order=np.where(ranked["distinct"] >= min_distinct, np.inf, ranked["distinct"]))
    ranked = ranked.sort_values(["order", "score"], ascending=False, kind="stable")
    best = ranked.groupby("prompt", sort=False).head(1).sort_index()
    return best.drop(columns="order").reset_index(drop=True)


@torch.no_grad()
def attribute_scores(
    steer: PPLM, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, table: pd.DataFrame
) -> np.ndarray:
    """log p(attribute | text) of each prompt with its completion under the plain model, [N].

    Of a head, the log probability of its class; of bags, the mean over the completion's tokens of the log
    probability that the bag's words had there. Of both, the sum.
    """
    steer = steer.with_tokenizer(tokenizer)
    texts = (table["prompt"] + table["completion"]).tolist()
    scores = np.zeros(len(texts))
    if steer.head is not None:
        scores += steer.head.log_probs(model, tokenizer, texts)[:, steer.target_class_id].numpy()
    if steer.bags:
        starts = [len(token_ids(tokenizer, prompt)) for prompt in table["prompt"]]
        rows = [token_ids(tokenizer, text) for text in texts]
        scores += [_bag_score(steer, hf.unwrapped(model), *pair) for pair in zip(rows, starts, strict=True)]
    return scores


def _bag_score(steer: PPLM, model: PreTrainedModel, row: Sequence[int], start: int) -> float:
    """Mean log probability of the bags' words at the tokens from `start` on; −inf if there are none."""
    ids = torch.tensor([row], device=model.device)
    with hf.unsteered():
        hidden = hf.forward(model, ids, torch.ones_like(ids)).last_hidden_state[0, start - 1 : -1]
    if not len(hidden):
        return -math.inf
    log_probs = hf.logits(model, hidden).float().log_softmax(dim=-1)
    ends = range(start, len(row))
    before = torch.stack([pad(ids[0, :end], (len(row) - end, 0), value=NOTHING) for end in ends])
    return -sum(bag_loss(log_probs, *bag.wanted(before)) for bag in steer.bags).mean().item()
