"""Train LM-Steers: each text goes through the model once, and only the steer's tensors learn.

A steer acts on the last hidden states, so these are computed once for all tokens (`token_states`). A step
draws a batch of them, gives each token the steer values of its text (the label for the steer that is trained,
1 for a dummy that learns what all texts share), and moves the tensors by Adam on the mean cross-entropy of
the next tokens. A text with label −1 therefore trains the steer with the opposite sign.
Shapes: N tokens, D width, V vocabulary, S steers, R rank.
Source: Han et al. 2024, section 3, and the authors' experiments/training/train.py.
"""

import hashlib
import json
import math
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.optim import Adam, Optimizer
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .. import hf
from ..checkpoint import Run
from ..generation import chunks, progress
from ..models import model_id, own_tokenizer, pad, token_ids
from .steer import ADAPTORS, LMHeadSteer

Batch = tuple[Tensor, Tensor, Tensor]  # hidden states [N, D], next ids [N], steer values [N, S]

TEXTS_PER_PASS = 32
LOGITS_AT_ONCE = 2**26  # 256 MB in float32; up to four times that with a softcap or an OffsetSteer
HELD_OUT_TOKENS = 4096  # at most
VALIDATIONS = 10  # at most, in a run
PATIENCE = 4  # early stopping: so many validations without a lower loss end the training


@dataclass(frozen=True)
class Training:
    """How a steer is trained. ValueError for a setting out of range.

    adaptor_class: "multiply" (of that rank), "add" or "offset". training_steer, dummy_steer: which of the
    num_steers learns the labels, and which what all texts share (None: none). init_var: standard deviation
    of the initial projectors; vectors start at 0. lr: Adam's learning rate, which falls linearly to 0 over
    n_steps. batch_tokens: tokens in a step, drawn from all texts. regularization: weight of the squared norm
    of the tensors in the loss. max_length: tokens of a text, BOS included, after which it is cut.
    validation: share of the texts held out. pad_in_loss: see `token_states`.
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
            if isinstance(value, np.generic):  # JSON, and so a card, cannot hold NumPy's numbers
                object.__setattr__(self, name, value.item())
        if self.adaptor_class not in ADAPTORS:
            raise ValueError(
                f"adaptor_class must be one of {', '.join(ADAPTORS)}, not {self.adaptor_class!r}"
            )
        for name in ("num_steers", "rank", "n_steps", "batch_tokens", "max_length"):
            value, least = getattr(self, name), 2 if name == "max_length" else 1  # BOS and a token
            if not (isinstance(value, int) and value >= least):
                raise ValueError(f"{name} must be a whole number from {least}, not {value!r}")
        for name in ("epsilon", "lr", "init_var"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be above 0 and finite, not {getattr(self, name)!r}")
        if not 0 <= self.regularization < math.inf:
            raise ValueError(f"regularization must be 0 or more, finite, not {self.regularization!r}")
        if not 0 < self.validation < 1:
            raise ValueError(f"validation must be a share between 0 and 1, not {self.validation!r}")
        if self.training_steer not in range(self.num_steers):
            raise ValueError(f"training_steer must be below {self.num_steers}, not {self.training_steer!r}")
        others = [None, *(s for s in range(self.num_steers) if s != self.training_steer)]
        if self.dummy_steer not in others:
            raise ValueError(f"dummy_steer must be one of {others}, not {self.dummy_steer!r}")


def train_lm_steer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    texts: Sequence[str | Sequence[int]],
    labels: Sequence[float],
    *,
    folder: str | Path | None = None,
    **settings: object,
) -> LMHeadSteer:
    """Train a steer for a model on labelled texts; its `card` records the texts, the settings and the losses.

    texts: strings, or token ids with BOS in front. labels: one for each text, from −1 to 1, not all 0.
    folder: keeps the state of the run at each validation; after a stop, the same call goes on from there and
    gives the same steer. settings: see `Training`. The steer with the lowest validation loss is returned.
    Memory: N · D hidden states in the model's dtype, and about a gigabyte for logits.

    ValueError for labels out of range or all 0, a text without tokens, too few texts to hold some out, a
    folder with another run in it, or a loss that is not finite. A warning counts the texts that were cut.
    """
    how, model = Training(**settings), hf.unwrapped(model)
    ids, cut = _encoded(own_tokenizer(model, tokenizer), texts, how.max_length)
    values = steer_values(labels, len(ids), how)
    run = Run(folder, _identity(model, ids, values, how))
    states = token_states(model, ids, pad_in_loss=how.pad_in_loss)
    fit = _Fit(model, how, new_steer(model, how), states, values, *_split(states.text, len(ids), how))
    state = fit.all_steps(run)
    steer = replace(fit.start, **{name: state[name][3].cpu() for name in fit.start.parameters})
    tokens = {"tokens": len(fit.train), "tokens held out": len(fit.held_out)}
    card = {
        "texts": {"all": len(ids), "cut": cut} | tokens,
        "training": asdict(how) | {"steps": state["step"], "kept step": state["kept"]},
        "losses": state["losses"],
        "validation": state["validation"],
        "held out": fit.verdict(steer),
    }
    return replace(steer, model_id=model_id(model), card=card)


# --- what is learned from ---------------------------------------------------------------------------------


def _encoded(
    tokenizer: PreTrainedTokenizerBase | None, texts: Sequence[str | Sequence[int]], max_length: int
) -> tuple[list[list[int]], int]:
    """Token ids of each text, at most max_length, and how many texts were longer."""
    if isinstance(texts, str) or not len(texts):
        raise ValueError(f"give a list of texts, not {texts!r}")
    texts = list(texts)
    ids = [token_ids(tokenizer, text) if isinstance(text, str) else list(text) for text in texts]
    if empty := [i for i, one in enumerate(ids) if len(one) < 2]:
        raise ValueError(f"the text of index {empty[0]} has no tokens ({texts[empty[0]]!r}): leave it out")
    if cut := sum(len(one) > max_length for one in ids):
        warnings.warn(f"{cut} of {len(ids)} texts are cut after max_length={max_length} tokens", stacklevel=3)
    return [one[:max_length] for one in ids], cut


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


class TokenStates(NamedTuple):
    """Last hidden states [N, D] in the model's dtype, the next ids [N], and the index of their texts [N]."""

    hidden: Tensor
    next_ids: Tensor
    text: Tensor


@torch.no_grad()
def token_states(
    model: PreTrainedModel, ids: Sequence[Sequence[int]], *, pad_in_loss: bool = False
) -> TokenStates:
    """The unsteered model's state at every token but the last of each text, text after text, on the CPU.

    ids: of each text, two at least, BOS in front. pad_in_loss: fill each 32 texts with EOS up to the longest
    and count these tokens like any other, as the authors' loss does (where they did not see each other).
    """
    ids = _filled(ids, model.generation_config.eos_token_id) if pad_in_loss else ids
    counts = torch.tensor([len(one) - 1 for one in ids])
    starts = (counts.cumsum(0) - counts).tolist()
    hidden = torch.empty(int(counts.sum()), hf.last_width(model), dtype=model.dtype)
    by_length = sorted(range(len(ids)), key=lambda i: len(ids[i]))  # near-equal lengths need little padding
    with progress(len(ids), unit="text") as bar, hf.unsteered():
        for chosen in chunks(by_length, TEXTS_PER_PASS):
            batch = pad([ids[i] for i in chosen], ids[0][0], padding_side="right", device=model.device)
            found = hf.forward(model, **batch, use_cache=False).last_hidden_state.cpu()
            for i, states in zip(chosen, found, strict=True):
                hidden[starts[i] : starts[i] + len(ids[i]) - 1] = states[: len(ids[i]) - 1]
            bar.update(len(chosen))
    next_ids = torch.tensor([token for one in ids for token in one[1:]])
    return TokenStates(hidden, next_ids, torch.arange(len(ids)).repeat_interleave(counts))


def _filled(ids: Sequence[Sequence[int]], eos: int | Sequence[int]) -> list[list[int]]:
    """Token ids with EOS behind them, up to the longest of each TEXTS_PER_PASS."""
    eos = eos if isinstance(eos, int) else eos[0]
    longest = [max(map(len, some)) for some in chunks(ids, TEXTS_PER_PASS)]
    return [[*one, *[eos] * (longest[i // TEXTS_PER_PASS] - len(one))] for i, one in enumerate(ids)]


def _split(text: Tensor, texts: int, how: Training) -> tuple[Tensor, Tensor]:
    """The tokens to train on, and at most HELD_OUT_TOKENS of the texts held out."""
    order = torch.randperm(texts, generator=torch.Generator().manual_seed(how.seed))
    held_out = torch.isin(text, order[: max(1, round(how.validation * texts))])
    if held_out.all():
        raise ValueError(f"{texts} texts are too few to hold some out: give more")
    tokens = held_out.nonzero()[:, 0]  # drawn from all of them, since texts may be sorted by label
    chosen = torch.randperm(len(tokens), generator=torch.Generator().manual_seed(how.seed))[:HELD_OUT_TOKENS]
    return (~held_out).nonzero()[:, 0], tokens[chosen.sort().values]


def _identity(model: PreTrainedModel, ids: list[list[int]], values: Tensor, how: Training) -> dict[str, Any]:
    """What decides the result of a run: the settings, and hashes of the model, the texts and the labels."""
    weights = [weight.flatten()[:: 2**20].tolist() for weight in model.parameters()]  # some of each
    facts = {"model": [model_id(model), str(model.dtype), weights], "texts": ids, "labels": values.tolist()}
    hashes = {name: hashlib.sha256(json.dumps(fact).encode()) for name, fact in facts.items()}
    return asdict(how) | {name: found.hexdigest() for name, found in hashes.items()}


# --- the run ----------------------------------------------------------------------------------------------


def new_steer(model: PreTrainedModel, how: Training) -> LMHeadSteer:
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

    model: PreTrainedModel
    how: Training
    start: LMHeadSteer
    states: TokenStates
    values: Tensor  # [texts, S]
    train: Tensor  # indices of tokens
    held_out: Tensor

    def all_steps(self, run: Run) -> dict[str, Any]:
        """The state after n_steps, or after early stopping."""
        state = {"step": 0, "kept": 0, "losses": [], "validation": []}
        state |= {name: torch.stack([t, 0 * t, 0 * t, t]) for name, t in self.start.tensors().items()}
        with progress(self.how.n_steps, unit="step") as bar:
            for number in range(VALIDATIONS):
                late = sum(step > state["kept"] for step, _ in state["validation"])
                if state["step"] == self.how.n_steps or late >= PATIENCE:
                    break
                state = run.chunk(number, partial(self._chunk, state, bar))
                bar.update(state["step"] - bar.n)  # if it was done before
        return state

    def _chunk(self, state: dict[str, Any], bar: tqdm) -> dict[str, Any]:
        """The state after the next steps and a validation; Adam changes the stacks in place."""
        how, losses, curve = self.how, [*state["losses"]], state["validation"]
        stacks = {name: state[name].to(self.model.device, copy=True) for name in self.start.parameters}
        tensors = {name: stack[0].requires_grad_() for name, stack in stacks.items()}
        steer, adam = replace(self.start, **tensors), Adam(tensors.values(), lr=how.lr)
        for name, tensor in tensors.items():
            moments = {"exp_avg": stacks[name][1], "exp_avg_sq": stacks[name][2]}
            adam.state[tensor] = {"step": torch.tensor(float(state["step"]))} | moments
        end = min(state["step"] + math.ceil(how.n_steps / VALIDATIONS), how.n_steps)
        for step in range(state["step"], end):
            adam.param_groups[0]["lr"] = how.lr * (1 - step / how.n_steps)
            loss = update(self.model, steer, adam, self._examples(self._batch(step)), how.regularization)
            losses.append(round(_finite(loss, step, how), 5))
            bar.update()
        loss = _finite(self.validation_loss(steer), end, how)
        if better := loss <= min((before for _, before in curve), default=math.inf):
            for name, tensor in tensors.items():
                stacks[name][3] = tensor.detach()
        new = {"step": end, "kept": end if better else state["kept"], "losses": losses}
        return stacks | new | {"validation": [*curve, [end, loss]]}

    def _batch(self, step: int) -> Tensor:
        """The tokens of a step; an epoch has its own order and leaves out a remainder."""
        size = min(self.how.batch_tokens, len(self.train))
        epoch, place = divmod(step, len(self.train) // size)
        generator = torch.Generator().manual_seed(self.how.seed + epoch)
        return self.train[torch.randperm(len(self.train), generator=generator)[place * size :][:size]]

    def _examples(self, tokens: Tensor) -> Batch:
        """Hidden states, next ids and steer values of some tokens."""
        return self.states.hidden[tokens], self.states.next_ids[tokens], self.values[self.states.text[tokens]]

    def validation_loss(self, steer: LMHeadSteer, factors: Tensor | float = 1.0) -> float:
        """The mean loss on the tokens held out, at `factors` [S] times the steer values of their texts."""
        hidden, next_ids, values = self._examples(self.held_out)
        return round(mean_loss(self.model, steer, hidden, next_ids, factors * values, learn=False), 5)

    def verdict(self, steer: LMHeadSteer) -> dict[str, float]:
        """Losses on the tokens held out: unsteered, steered, and steered with the labels reversed."""
        ones = torch.ones(self.how.num_steers)
        turned = ones.index_fill(0, torch.tensor(self.how.training_steer), -1)
        factors = {"plain": 0 * ones, "steered": ones, "reversed": turned}
        return {name: self.validation_loss(steer, factor) for name, factor in factors.items()}


def _finite(loss: float, step: int, how: Training) -> float:
    if not math.isfinite(loss):
        raise ValueError(f"the loss is {loss} at step {step} with lr={how.lr}: lower lr or epsilon")
    return loss


def update(
    model: PreTrainedModel, steer: LMHeadSteer, adam: Optimizer, batch: Batch, regularization: float = 0.0
) -> float:
    """One optimiser step on hidden states, next ids and steer values; the loss before it, in nats.

    The returned loss is without the regularisation. A loss that is not finite changes nothing.
    """
    loss = mean_loss(model, steer, *batch, learn=True)
    if math.isfinite(loss):
        for tensor in steer.tensors().values():
            tensor.grad += 2 * regularization * tensor.detach()
        adam.step()
    adam.zero_grad()
    return loss


def mean_loss(
    model: PreTrainedModel,
    steer: LMHeadSteer,
    hidden: Tensor,
    next_ids: Tensor,
    values: Tensor,
    *,
    learn: bool,
) -> float:
    """Mean cross-entropy in nats of next ids [N] after hidden states [N, D], at steer values [N, S].

    learn: add the gradients to those of the steer's tensors. Logits are computed for a part at a time.
    """
    total, tensors = 0.0, list(steer.tensors().values())
    for part in torch.arange(len(hidden)).split(max(1, LOGITS_AT_ONCE // len(hf.lm_head(model).weight))):
        with torch.set_grad_enabled(learn), steer.at(values[part]).on(model):
            logits = hf.logits(model, hidden[part].to(model.device)).float()
        losses, slope = _cross_entropy(logits.detach(), next_ids[part].to(model.device))
        total += losses.sum().item() / len(hidden)
        if learn:  # only for the steer's tensors, even if the model's weights require gradients
            for tensor, summed in zip(tensors, torch.autograd.grad(logits, tensors, slope), strict=True):
                grad = summed / len(hidden)
                tensor.grad = grad if tensor.grad is None else tensor.grad + grad
    return total


def _cross_entropy(logits: Tensor, next_ids: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropies [N] in nats, and their gradients [N, V] with respect to the logits."""
    # The losses are F.cross_entropy(logits, next_ids, reduction="none"). Its backward pass would keep copies
    # of the logits; here the gradients (probabilities, less 1 at the next id) overwrite them, which takes
    # 17 % less time a step and a third of the memory. Autograd would raise if an LM head needed its output.
    place = torch.arange(len(next_ids), device=next_ids.device), next_ids
    logits -= logits.amax(-1, keepdim=True)
    chosen = logits[place]
    total = logits.exp_().sum(-1, keepdim=True)
    losses = total[:, 0].log() - chosen
    logits /= total
    logits[place] -= 1
    return losses, logits
