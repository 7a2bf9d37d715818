"""Best of several: the completion that a bag or a head finds most likely to be on the attribute.

PPLM's paper draws r completions of each prompt, drops those that repeat themselves, and keeps the one with
the greatest log p(attribute | text). Source: Dathathri et al. 2020, section 4.1 (their programs leave it out).
"""

from collections.abc import Sequence

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from . import hf
from .bags import NOTHING
from .descent import bag_loss
from .metrics import distinct
from .models import bos_id, pad, token_ids
from .pplm import PPLM


def best_of(
    table: pd.DataFrame, scores: Sequence[float], *, min_distinct: float = 0.0, r: int | None = None
) -> pd.DataFrame:
    """Of each prompt's first r completions, the one with the highest score that does not repeat itself.

    table: from `su.generate`. scores: one for each row, such as `attribute_scores`. min_distinct: the least
    mean of distinct-1, -2 and -3; where no completion of a prompt reaches it, the most distinct is taken.
    Returns a row a prompt, in order, with columns `score` and `distinct` more. ValueError for scores of
    another number, and for r below 1.
    """
    if len(scores) != len(table) or (r is not None and r < 1):
        raise ValueError(
            f"{len(scores)} scores for {len(table)} completions, and r={r}: give one each, r ≥ 1"
        )
    spread = [np.mean([distinct(text, n) for n in (1, 2, 3)]) for text in table["completion"]]
    ranked = table.assign(score=np.asarray(scores, dtype=float), distinct=spread)
    ranked = ranked[ranked["sample"] < (r or np.inf)]
    ranked = ranked.assign(order=np.where(ranked["distinct"] >= min_distinct, np.inf, ranked["distinct"]))
    best = ranked.sort_values(["order", "score"], ascending=False, kind="stable").groupby(
        "prompt", sort=False
    )
    return best.head(1).sort_index().drop(columns="order").reset_index(drop=True)


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
        scores += _bag_scores(
            steer, model, [token_ids(tokenizer, text) for text in texts], starts, bos_id(tokenizer)
        )
    return scores


def _bag_scores(
    steer: PPLM, model: PreTrainedModel, rows: Sequence[list[int]], starts: Sequence[int], bos: int
) -> np.ndarray:
    found = []
    for row, start in zip(rows, starts, strict=True):
        batch = pad([row], bos, device=model.device)
        with hf.unsteered():
            hidden = hf.forward(model, **batch).last_hidden_state[0, start - 1 : -1]
        log_probs = hf.logits(model, hidden).float().log_softmax(dim=-1)
        before = _prefixes(batch["input_ids"][0], start)
        losses = [bag_loss(log_probs, bag.ids.to(log_probs.device), bag.wanted(before)) for bag in steer.bags]
        found.append(-sum(losses).mean().item() if len(log_probs) else -np.inf)
    return np.array(found)


def _prefixes(ids: Tensor, start: int) -> Tensor:
    """The text before each token from `start` on, aligned at its end: [T − start, T]."""
    rows = [
        torch.nn.functional.pad(ids[:end], (len(ids) - end, 0), value=NOTHING)
        for end in range(start, len(ids))
    ]
    return torch.stack(rows) if rows else ids.new_empty(0, len(ids))
