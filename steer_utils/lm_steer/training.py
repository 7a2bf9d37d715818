"""Train LM-Steers: each text goes through the model once, and only the steer's tensors learn.

A steer acts on the last hidden states, so these are computed once for all tokens. A step lowers the mean
cross-entropy of the next tokens of a batch by Adam, at the steer values of their texts: the label, and 1 for
a dummy, which learns what all texts share.
Shapes: N tokens, D width, V vocabulary, S steers, R rank.
Source: Han et al. 2024, section 3, and the authors' experiments/training/train.py.
"""

import json
import math
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.optim import Adam, Optimizer

from .. import hf, hooks
from ..checkpoint import TEXTS_PER_PASS, Run, fingerprint, last_states, weights_of
from ..generation import chunks, progress
from ..models import Model, Texts, Tokenizer, model_id, own_tokenizer, text_ids
from ..types import require
from .steer import ADAPTORS, LMHeadSteer

Batch = tuple[Tensor, Tensor, Tensor]  # hidden states [N, D], next ids [N], steer values [N, S]
TokenIds = Sequence[Sequence[int]]  # of each text, BOS in front
HELD_OUT_TOKENS = 4096  # at most
VALIDATIONS = 10  # at most, in a run
PATIENCE = 4  # early stopping: so many validations without a lower loss end the training


@dataclass(frozen=True)
class Training:
    """How a steer is trained. ValueError for a setting out of range."""

    adaptor_class: str = "multiply"  # or "add", "offset"
    num_steers: int = 2
    training_steer: int = 0  # the one that learns the labels
    dummy_steer: int | None = 1  # the one that learns what all texts share; None for none
    rank: int = 64  # of "multiply"
    epsilon: float = 1e-3  # the factor on the learned tensors
    init_var: float = 1e-2  # standard deviation of the initial projectors; vectors start at 0
    lr: float = 1e-2  # Adam's learning rate, which falls linearly to 0 over n_steps
    n_steps: int = 150
    batch_tokens: int = 1024  # tokens in a step
    regularization: float = 0.0  # weight of the tensors' squared norm in the loss
    max_length: int = 256  # tokens of a text, BOS included
    validation: float = 0.05  # share of the texts held out
    pad_in_loss: bool = False  # learn from padding too; see `token_states`
    seed: int = 0  # of the initial projectors, the texts held out and the order of the tokens

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if isinstance(value, np.generic):  # JSON, and so a card, cannot hold NumPy's numbers
                object.__setattr__(self, name, value.item())
        for name in ("num_steers", "rank", "n_steps", "batch_tokens", "max_length"):
            value, least = getattr(self, name), 2 if name == "max_length" else 1  # BOS and a token
            require(value >= least, f"a whole number from {least}", **{name: value})
        for name in ("epsilon", "lr", "init_var", "regularization", "validation"):
            value, below = getattr(self, name), 1 if name == "validation" else math.inf
            fits = 0 < value < below or (name == "regularization" and value == 0)
            require(fits, f"above 0 and below {below}", **{name: value})
        steers = [*range(self.num_steers)]
        others = [None, *(s for s in steers if s != self.training_steer)]
        known = {"adaptor_class": [*ADAPTORS], "training_steer": steers, "dummy_steer": others}
        for name, allowed in known.items():
            require(getattr(self, name) in allowed, f"one of {allowed}", **{name: getattr(self, name)})


def train_lm_steer(
    model: Model,
    tokenizer: Tokenizer,
    texts: Texts,
    labels: Sequence[float],
    *,
    folder: str | Path | None = None,
    **settings: object,
) -> LMHeadSteer:
    """Train a steer for a model on labelled texts; its `card` records the texts, the settings and the losses.

    texts: strings, or token ids with BOS in front. labels: one for each text, from −1 to 1, not all 0.
    folder: keeps the hidden states and the state at each validation; after a stop, the same call goes on from
    there. settings: see `Training`. The steer with the lowest validation loss is returned. Memory, and space
    in the folder: N · D hidden states.
    ValueError for texts or labels that cannot be learned from, a folder with another run in it, or a loss
    that is not finite; after a first validation, such a loss only ends the training, with a warning.
    """
    how, tokenizer, model = Training(**settings), own_tokenizer(model, tokenizer), hf.unwrapped(model)
    hooks.require_no_steer(model)
    if torch.is_inference_mode_enabled():
        raise RuntimeError("training takes gradients: leave torch.inference_mode()")
    ids, cut = _encoded(tokenizer, texts, how.max_length)
    values = steer_values(labels, len(ids), how)
    facts = {"model": fingerprint(model), "texts": ids, "labels": values.tolist()}  # decide, as `how` does
    facts = {name: sha256(json.dumps(fact).encode()).hexdigest() for name, fact in facts.items()}
    run = Run(folder, asdict(how) | facts)
    where = None if folder is None else Path(folder) / "states"
    hidden, next_ids, text = token_states(model, ids, pad_in_loss=how.pad_in_loss, folder=where)
    split = _split(text, len(ids), how)
    fit = _Fit(model, how, new_steer(model, how), (hidden, next_ids, values[text]), *split)
    state = fit.all_steps(run)
    steer = replace(fit.start, **{name: state[name][3].cpu() for name in fit.start.parameters})
    turned = torch.ones(how.num_steers).index_fill(0, torch.tensor(how.training_steer), -1)
    factors = {"plain": 0.0, "steered": 1.0, "reversed": turned}  # on the steer values
    held_out = {name: fit.validation_loss(steer, factor) for name, factor in factors.items()}
    card = {"losses": state["losses"], "validation": state["validation"], "held out": held_out}
    card["training"] = asdict(how) | {"steps": state["step"], "kept step": state["kept"]}
    tokens = {"tokens": len(fit.train), "tokens held out": len(fit.held_out)}
    card |= {"texts": {"all": len(ids), "cut": cut} | tokens, "weights": weights_of(model)}
    return replace(steer, model_id=model_id(model), card=card)


def _encoded(tokenizer: Tokenizer, texts: Texts, max_length: int) -> tuple[list[list[int]], int]:
    """Token ids of each text, at most max_length, and how many texts were longer."""
    if not len(texts):
        raise ValueError(f"give texts to learn from, not {texts!r}")
    ids = text_ids(tokenizer, texts, as_data=True)
    if empty := [(i, text) for i, text in enumerate(texts) if len(ids[i]) < 2]:
        raise ValueError("the text of index {} has no tokens ({!r}): leave it out".format(*empty[0]))
    if cut := sum(len(one) > max_length for one in ids):
        warnings.warn(f"{cut} of {len(ids)} texts are cut after max_length={max_length} tokens", stacklevel=5)
    return [one[:max_length] for one in ids], cut


def steer_values(labels: Sequence[float], texts: int, how: Training) -> Tensor:
    """The steer values of each text in training, [texts, S]."""
    found = np.asarray(labels, dtype=np.float32)
    if found.shape != (texts,):
        raise ValueError(f"give a label for each text: {texts} texts, labels of shape {found.shape}")
    if not (np.abs(found) <= 1).all() or not found.any():
        given = f"these are {found.min()} to {found.max()}"
        raise ValueError(f"labels must be from -1 to 1, and not all 0; {given}")
    if {*np.unique(found).tolist()} == {0, 1}:
        what = "labels are 0 and 1, so no text is negative: 0 is neutral, and -1 the opposite of 1"
        warnings.warn(what, stacklevel=5)
    values = torch.zeros(texts, how.num_steers)
    values[:, how.training_steer] = torch.as_tensor(found)
    if how.dummy_steer is not None:
        values[:, how.dummy_steer] = 1
    return values


class TokenStates(NamedTuple):
    """Last hidden states [N, D] in the model's dtype, the next ids [N], and the index of their texts [N]."""

    hidden: Tensor
    next_ids: Tensor
    text: Tensor


def token_states(
    model: Model, ids: TokenIds, *, pad_in_loss: bool = False, folder: Path | None = None
) -> TokenStates:
    """The unsteered model's state at every token but the last of each text, text after text, on the CPU.

    pad_in_loss: fill each 32 texts with EOS up to the longest and learn from these too, as the authors do.
    folder: keeps those of each batch.
    """
    if pad_in_loss:
        eos, parts = model.generation_config.eos_token_id, chunks(ids, TEXTS_PER_PASS)
        if eos is None:
            raise ValueError("pad_in_loss=True fills texts with EOS: set generation_config.eos_token_id")
        end = [eos if isinstance(eos, int) else eos[0]]
        ids = [[*one, *end * (max(map(len, some)) - len(one))] for some in parts for one in some]
    counts = torch.tensor([len(one) - 1 for one in ids])
    hidden = torch.empty(int(counts.sum()), hf.last_width(model), dtype=model.dtype)
    of_text = hidden.split(counts.tolist())
    for i, states in last_states(model, ids, of_text=_all_but_last, folder=folder):
        of_text[i].copy_(states)
    next_ids = torch.tensor([token for one in ids for token in one[1:]])
    return TokenStates(hidden, next_ids, torch.arange(len(ids)).repeat_interleave(counts))


def _all_but_last(states: Tensor) -> Tensor:
    return states[:-1]


def _split(text: Tensor, texts: int, how: Training) -> tuple[Tensor, Tensor]:
    """The tokens to train on, and at most HELD_OUT_TOKENS of the texts held out."""
    order = torch.randperm(texts, generator=torch.Generator().manual_seed(how.seed))
    held_out = torch.isin(text, order[: max(1, round(how.validation * texts))])
    if held_out.all():
        raise ValueError(f"{texts} texts are too few to hold some out: give more")
    tokens = held_out.nonzero()[:, 0]  # drawn from all of them, since texts may be sorted by label
    chosen = torch.randperm(len(tokens), generator=torch.Generator().manual_seed(how.seed))[:HELD_OUT_TOKENS]
    return (~held_out).nonzero()[:, 0], tokens[chosen.sort().values]


def new_steer(model: Model, how: Training) -> LMHeadSteer:
    """An untrained steer: normal projectors, or vectors of zeros."""
    width, kind = hf.last_width(model), ADAPTORS[how.adaptor_class]
    if how.adaptor_class != "multiply":
        size = width if how.adaptor_class == "add" else len(hf.lm_head(model).weight)
        return kind(torch.zeros(how.num_steers, size), epsilon=how.epsilon)
    shape, generator = (how.num_steers, width, how.rank), torch.Generator().manual_seed(how.seed)
    pair = [how.init_var * torch.randn(shape, generator=generator) for _ in range(2)]
    return kind(*pair, epsilon=how.epsilon)


@dataclass
class _Fit:
    """A training run. Its state: numbers, and a stack of each tensor, Adam's two moments and the best one."""

    model: Model
    how: Training
    start: LMHeadSteer
    tokens: Batch  # all of them
    train: Tensor  # indices of tokens
    held_out: Tensor

    def all_steps(self, run: Run) -> dict[str, Any]:
        """The state after n_steps, after early stopping, or at a loss that is not finite."""
        state = {"step": 0, "kept": 0, "losses": [], "validation": [], "trouble": ""}
        state |= {name: torch.stack([t, 0 * t, 0 * t, t]) for name, t in self.start.tensors().items()}
        with progress(self.how.n_steps, unit="step") as bar:
            for number in range(VALIDATIONS):
                late = sum(step > state["kept"] for step, _ in state["validation"])
                if state["step"] == self.how.n_steps or late >= PATIENCE or state["trouble"]:
                    break
                state = run.chunk(number, partial(self._chunk, state, bar))
                bar.update(state["step"] - bar.n)  # if it was done before
        if state["trouble"]:
            warnings.warn(f"{state['trouble']}; kept the steer of step {state['kept']}", stacklevel=5)
        return state

    def _chunk(self, state: dict[str, Any], bar: Any) -> dict[str, Any]:
        """The state after the next steps and a validation; Adam changes the stacks in place."""
        first, curve, device = state["step"], state["validation"], hf.input_device(self.model)
        end = min(first + math.ceil(self.how.n_steps / VALIDATIONS), self.how.n_steps)
        stacks = {name: state[name].to(device, copy=True) for name in self.start.parameters}
        tensors = {name: stack[0].requires_grad_() for name, stack in stacks.items()}
        steer, adam, losses = replace(self.start, **tensors), Adam(tensors.values()), []
        for tensor, (_, mean, square, _) in zip(tensors.values(), stacks.values(), strict=True):
            adam.state[tensor] = {"step": torch.tensor(float(first)), "exp_avg": mean, "exp_avg_sq": square}
        for step in range(first, end):
            adam.param_groups[0]["lr"] = self.how.lr * (1 - step / self.how.n_steps)
            chosen = self._chosen(step)
            batch = tuple(every[chosen] for every in self.tokens)
            last = round(update(self.model, steer, adam, batch, self.how.regularization), 5)
            if not math.isfinite(last):
                break
            losses.append(last)
            bar.update()
        else:
            last = self.validation_loss(steer)
        state = state | {"step": first + len(losses), "losses": [*state["losses"], *losses]}
        if not math.isfinite(last):
            trouble = f"the loss is {last} at step {state['step']} with lr={self.how.lr}: lower lr or epsilon"
            if not curve:
                raise ValueError(trouble)
            return state | {"trouble": trouble}
        if last <= min((loss for _, loss in curve), default=math.inf):
            state["kept"] = end
            for stack in stacks.values():
                stack[3] = stack[0]
        return state | stacks | {"validation": [*curve, [end, last]]}

    def _chosen(self, step: int) -> Tensor:
        """The tokens of a step; an epoch has its own order and leaves out a remainder."""
        size = min(self.how.batch_tokens, len(self.train))
        epoch, place = divmod(step, len(self.train) // size)
        generator = torch.Generator().manual_seed(self.how.seed + epoch)
        return self.train[torch.randperm(len(self.train), generator=generator)[place * size :][:size]]

    def validation_loss(self, steer: LMHeadSteer, factors: Tensor | float = 1.0) -> float:
        """The mean loss on the tokens held out, at `factors` [S] times the steer values of their texts."""
        hidden, ids, values = (every[self.held_out] for every in self.tokens)
        return round(mean_loss(self.model, steer, hidden, ids, factors * values, learn=False), 5)


def update(
    model: Model, steer: LMHeadSteer, adam: Optimizer, batch: Batch, regularization: float = 0.0
) -> float:
    """One step; the loss before it, without the regularisation, or NaN and no step if it is not finite."""
    loss, tensors = mean_loss(model, steer, *batch, learn=True), steer.tensors().values()
    if finite := math.isfinite(loss) and all(tensor.grad.isfinite().all() for tensor in tensors):
        for tensor in tensors:
            tensor.grad += 2 * regularization * tensor.detach()
        adam.step()
    adam.zero_grad()
    return loss if finite else math.nan


def mean_loss(
    model: Model, steer: LMHeadSteer, hidden: Tensor, ids: Tensor, values: Tensor, *, learn: bool
) -> float:
    """Mean cross-entropy, in nats, of next ids [N] after states [N, D]; `learn` adds to the gradients."""
    total, tensors = 0.0, list(steer.tensors().values())
    undo = partial(torch.set_grad_enabled, torch.is_grad_enabled())
    for part in torch.arange(len(hidden)).split(max(1, hf.LOGITS_AT_ONCE // len(hf.lm_head(model).weight))):
        gradients = hf.temporarily(partial(torch.set_grad_enabled, learn), undo)
        with gradients, steer.at(values[part]).on(model):
            logits = hf.logits(model, hidden[part].to(hf.input_device(model))).float()
        losses, slope = _cross_entropy(logits.detach(), ids[part].to(logits.device))
        total += losses.sum().item() / len(hidden)
        if learn:  # only for the steer's tensors, even if the model's weights require gradients
            for tensor, summed in zip(tensors, torch.autograd.grad(logits, tensors, slope), strict=True):
                grad = summed / len(hidden)
                tensor.grad = grad if tensor.grad is None else tensor.grad + grad
    return total


def _cross_entropy(logits: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """F.cross_entropy of logits [N, V] and ids [N], unreduced, and its gradient, which overwrites them."""
    # Torch's own backward pass keeps copies of the logits: a fifth more time a step, three times the memory.
    place = torch.arange(len(ids), device=ids.device), ids
    logits -= logits.amax(-1, keepdim=True)
    chosen = logits[place]
    total = logits.exp_().sum(-1, keepdim=True)
    logits /= total
    logits[place] -= 1
    return total[:, 0].log() - chosen, logits
