"""Training LM-Steers: the model reads the texts once, and only the steers learn.

Each token's last hidden state is computed once (`token_states`). A step takes some of them, gives each the
steer values of its text, its label for the steer that is trained and 1 for a dummy that learns what all texts
share, and makes their next tokens more likely by Adam on the mean cross-entropy. A text of label −1 so trains
the steer with the opposite sign. Shapes: N tokens, D width, V vocabulary, S steers, R rank.
Source: Han et al. 2024, section 3, and the authors' experiments/training/train.py.
"""

import math
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from numbers import Integral
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .. import hf
from ..models import model_id, own_tokenizer, token_ids
from .head_steer import HeadSteer
from .run import Run
from .token_states import TokenStates, token_states

HELD_TOKENS = 4096  # at most


@dataclass(frozen=True)
class Training:
    """How a steer is trained; ValueError for a setting out of range.

    adaptor_class: "multiply" of that rank, "add" or "offset". training_steer, dummy_steer: which of the
    num_steers learns the labels, and which what the texts share (None: none does). init_var: standard
    deviation of the first tensors of "multiply"; the others start at 0. lr: of Adam; it falls to 0 in a
    straight line over n_steps. batch_tokens: tokens of a step, drawn from all texts. regularization: times
    the sum of all squares, added to the loss. max_length: tokens of a text, BOS included; the rest is cut.
    validation: the share of the texts held out. pad_in_loss: see `token_states`.
    """

    adaptor_class: str = "multiply"
    num_steers: int = 2
    training_steer: int = 0
    dummy_steer: int | None = 1
    rank: int = 64
    epsilon: float = 1e-3
    init_var: float = 1e-2
    lr: float = 1e-2
    n_steps: int = 150
    batch_tokens: int = 1024
    regularization: float = 0.0
    max_length: int = 256
    validation: float = 0.05
    pad_in_loss: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if isinstance(value, np.generic):  # which JSON, and so a card, cannot hold
                object.__setattr__(self, name, value.item())
        kinds = HeadSteer.kinds
        _require(
            self.adaptor_class in kinds, "adaptor_class", self.adaptor_class, f"one of {', '.join(kinds)}"
        )
        for name in ("num_steers", "rank", "n_steps", "batch_tokens", "max_length"):
            value, least = getattr(self, name), 2 if name == "max_length" else 1  # BOS and a token
            fits = isinstance(value, Integral) and value >= least
            _require(fits, name, value, f"a whole number from {least}")
        for name in ("epsilon", "lr", "init_var"):
            value = getattr(self, name)
            _require(math.isfinite(value) and value > 0, name, value, "above 0 and finite")
        _require(
            0 <= self.regularization < math.inf, "regularization", self.regularization, "0 or more, finite"
        )
        steers = range(self.num_steers)
        _require(0 < self.validation < 1, "validation", self.validation, "a share between 0 and 1")
        _require(
            self.training_steer in steers, "training_steer", self.training_steer, f"one of {list(steers)}"
        )
        others = [None, *(s for s in steers if s != self.training_steer)]
        _require(self.dummy_steer in others, "dummy_steer", self.dummy_steer, f"one of {others}")


def train_lm_steer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    texts: Sequence[str | Sequence[int]],
    labels: Sequence[float],
    *,
    folder: str | Path | None = None,
    **settings: object,
) -> HeadSteer:
    """Train a steer for a model on labelled texts; its `card` says on what, how, and how well.

    texts: strings, or token ids with BOS in front. labels: one a text, from −1 to 1, not all 0. settings: see
    `Training`. folder: keeps the hidden states and the state of the run; the same call after a run was killed
    goes on there and gives the same steer. Of the states that training passes through, ten are tried on texts
    held out; the one with the lowest loss is returned, and four without a lower one end the training. Memory:
    N · D hidden states in the model's dtype (with a folder, on disk) and about a gigabyte for logits.

    ValueError for labels out of range or all 0, a text without tokens, too few texts to hold some out, a
    folder with another run in it, or a loss that is not finite from the start; where it gets so later,
    training ends with a warning and the best state so far. A warning counts the texts that were cut. Same
    seed, same steer; the global random state does not move.
    """
    how, model = Training(**settings), hf.unwrapped(model)
    rows, cut = _rows(own_tokenizer(model, tokenizer), texts, how.max_length)
    values = steer_values(labels, len(rows), how)
    states = token_states(model, rows, folder=folder, pad_in_loss=how.pad_in_loss)
    train, held = _split(states, len(rows), how)
    run = Run(model, states, values, how, folder)
    run.go(train, held)
    card = {
        "texts": {"all": len(rows), "cut": cut, "tokens": len(train), "tokens held out": len(held)},
        "training": asdict(how) | {"steps": run.step, "kept step": run.kept},
        "losses": run.losses,
        "validation": [list(look) for look in run.curve],
        "held out": run.verdict(held),
    }
    return replace(run.best(), model_id=model_id(model), card=card)


# --- what is learned from ---------------------------------------------------------------------------------


def _rows(
    tokenizer: PreTrainedTokenizerBase | None, texts: Sequence[str | Sequence[int]], max_length: int
) -> tuple[list[list[int]], int]:
    """Token ids of each text, at most max_length, and how many were longer."""
    if isinstance(texts, str) or not len(texts):
        raise ValueError(f"give a list of texts, not {texts!r}")
    texts = list(texts)
    rows = [token_ids(tokenizer, text) if isinstance(text, str) else list(text) for text in texts]
    if empty := [i for i, row in enumerate(rows) if len(row) < 2]:
        raise ValueError(f"the text of index {empty[0]} has no tokens ({texts[empty[0]]!r}): leave it out")
    cut = sum(len(row) > max_length for row in rows)
    if cut:
        warnings.warn(
            f"{cut} of {len(rows)} texts are cut after max_length={max_length} tokens", stacklevel=3
        )
    return [row[:max_length] for row in rows], cut


def steer_values(labels: Sequence[float], texts: int, how: Training) -> Tensor:
    """The steer values of each text in training, [texts, S]."""
    found = torch.as_tensor(np.asarray(labels, dtype=np.float32))
    if found.shape != (texts,):
        raise ValueError(f"give a label for each text: {texts} texts, labels of shape {tuple(found.shape)}")
    if odd := found[~(found.abs() <= 1)].tolist():
        raise ValueError(f"labels must be from -1 to 1, not {odd[0]}: divide them by the largest")
    if not found.any():
        raise ValueError("all labels are 0, so there is nothing to learn: give some below or above")
    values = torch.zeros(texts, how.num_steers)
    values[:, how.training_steer] = found
    if how.dummy_steer is not None:
        values[:, how.dummy_steer] = 1
    return values


def _split(states: TokenStates, texts: int, how: Training) -> tuple[Tensor, Tensor]:
    """Tokens to train on and tokens of texts held out, at most HELD_TOKENS of these."""
    order = torch.randperm(texts, generator=torch.Generator().manual_seed(how.seed))
    held = torch.isin(states.text, order[: max(1, round(how.validation * texts))])
    if held.all():
        raise ValueError(f"{texts} texts are too few to hold some out: give more")
    tokens = held.nonzero()[:, 0]  # some of each text, since texts may be sorted by label
    chosen = torch.randperm(len(tokens), generator=torch.Generator().manual_seed(how.seed))[:HELD_TOKENS]
    return (~held).nonzero()[:, 0], tokens[chosen.sort().values]


def _require(holds: bool, name: str, value: object, what: str) -> None:
    if not holds:
        raise ValueError(f"{name} must be {what}, not {value!r}")
