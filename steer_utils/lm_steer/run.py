"""The steps of training an LM-Steer, and the state of a run, which can be killed and goes on.

Shapes: N tokens, D width, V vocabulary, S steers. What is trained, on what, and the source: `lm_steer_fit`.
"""

import math
import warnings
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers import PreTrainedModel

from .. import checkpoint, hf
from ..generation import progress
from .head_steer import HeadSteer
from .steer import AddSteer, LMSteer, OffsetSteer
from .token_states import TokenStates, fingerprint

if TYPE_CHECKING:
    from .training import Training

ROOM = 2**26  # logits computed at a time: 256 MB in float32; up to four times that with a softcap or "offset"
LOOKS = 10  # at the held-out texts, in a run
PATIENCE = 4  # of them without a lower loss, after which training ends


def new_steer(model: PreTrainedModel, how: "Training") -> HeadSteer:
    """A steer that knows nothing yet."""
    steers, width = how.num_steers, hf.last_width(model)
    if how.adaptor_class == "add":
        return AddSteer(torch.zeros(steers, width), epsilon=how.epsilon)
    if how.adaptor_class == "offset":
        return OffsetSteer(torch.zeros(steers, len(hf.lm_head(model).weight)), epsilon=how.epsilon)
    generator = torch.Generator().manual_seed(how.seed)
    pair = (how.init_var * torch.randn(steers, width, how.rank, generator=generator) for _ in range(2))
    return LMSteer(*pair, epsilon=how.epsilon)


def _batch(tokens: Tensor, step: int, how: "Training") -> Tensor:
    """The tokens of a step: in each round through all of them but a remainder, in another order."""
    size = min(how.batch_tokens, len(tokens))
    round_, place = divmod(step, len(tokens) // size)
    order = torch.randperm(len(tokens), generator=torch.Generator().manual_seed(how.seed + round_))
    return tokens[order[place * size : (place + 1) * size]]


def mean_loss(
    model: PreTrainedModel, steer: HeadSteer, hidden: Tensor, next_ids: Tensor, values: Tensor, *, learn: bool
) -> float:
    """Mean cross-entropy in nats of the next tokens [N] after hidden states [N, D], at values [N, S].

    learn: add its gradients to those of the steer's tensors. Logits are computed for a part at a time.
    """
    total, tensors = 0.0, list(steer.tensors().values())
    for part in torch.arange(len(hidden)).split(max(1, ROOM // len(hf.lm_head(model).weight))):
        with torch.set_grad_enabled(learn), steer.at(values[part]).on(model):
            logits = hf.logits(model, hidden[part].to(model.device)).float()
        losses, slope = _cross_entropy(logits.detach(), next_ids[part].to(model.device))
        total += losses.sum().item() / len(hidden)
        if learn:  # of the steer alone, whatever else asks for gradients
            for tensor, summed in zip(tensors, torch.autograd.grad(logits, tensors, slope), strict=True):
                grad = summed / len(hidden)
                tensor.grad = grad if tensor.grad is None else tensor.grad + grad
    return total


def _cross_entropy(logits: Tensor, next_ids: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropies [N] in nats of next ids [N], and their slopes [N, V], which overwrite the logits.

    A slope is the probabilities, less 1 at the next id. No head needs its last result to go backward (if one
    did, autograd would say so), and new memory would cost more than the arithmetic.
    """
    place = torch.arange(len(next_ids), device=next_ids.device), next_ids
    logits -= logits.amax(-1, keepdim=True)
    chosen = logits[place]
    total = logits.exp_().sum(-1, keepdim=True)
    losses = total[:, 0].log() - chosen
    logits /= total
    logits[place] -= 1
    return losses, logits


def update(
    model: PreTrainedModel,
    steer: HeadSteer,
    optimizer: torch.optim.Optimizer,
    batch: tuple[Tensor, Tensor, Tensor],
    regularization: float = 0.0,
) -> float:
    """One step of the optimiser on hidden states, next ids and values; the loss before it, in nats.

    Without regularisation in the number that is returned; nothing is learned if it is not finite.
    """
    loss = mean_loss(model, steer, *batch, learn=True)
    if math.isfinite(loss):
        for tensor in steer.tensors().values():
            tensor.grad += 2 * regularization * tensor.detach()
        optimizer.step()
    optimizer.zero_grad()
    return loss


class Run:
    """The state of a training run: the steer, Adam's moments, the step, and what was best so far."""

    def __init__(
        self,
        model: PreTrainedModel,
        states: TokenStates,
        values: Tensor,
        how: "Training",
        folder: str | Path | None,
    ) -> None:
        self.model, self.states, self.values, self.how = model, states, values, how
        start = new_steer(model, how)
        tensors = {name: t.to(model.device).requires_grad_() for name, t in start.tensors().items()}
        self.steer = replace(start, **tensors)
        self.optimizer = torch.optim.Adam(tensors.values(), lr=how.lr)
        self.step, self.kept = 0, 0
        self.losses: list[float] = []
        self.curve: list[tuple[int, float]] = []  # after so many steps, the loss on texts held out
        self.kept_tensors: dict[str, Tensor] = {}
        self.path = None if folder is None else Path(folder) / "training.safetensors"
        self.identity = "" if self.path is None else self._fingerprint()
        if self.path is not None and self.path.is_file():
            self._load(self.path)

    def go(self, train: Tensor, held: Tensor) -> None:
        """Train to the end, or until the loss on the tokens held out has not fallen for long."""
        every = max(1, self.how.n_steps // LOOKS)
        with progress(self.how.n_steps, unit="step") as bar:
            bar.update(self.step)
            while self.step < self.how.n_steps and not self._stale():
                if not self._learn(_batch(train, self.step, self.how)):
                    return
                bar.set_postfix(loss=f"{self.losses[-1]:.3f}", refresh=False)
                bar.update()
                if self.step % every == 0 or self.step == self.how.n_steps:
                    self._look(held)

    def best(self) -> HeadSteer:
        """The steer of the lowest loss on texts held out, on the CPU."""
        return replace(self.steer, **{name: tensor.cpu() for name, tensor in self.kept_tensors.items()})

    def verdict(self, held: Tensor) -> dict[str, float]:
        """Losses on the texts held out: plain, steered by the best, and so with the labels reversed."""
        signs = torch.ones(self.how.num_steers)
        signs[self.how.training_steer] = -1
        factors = {"plain": torch.zeros_like(signs), "steered": torch.ones_like(signs), "reversed": signs}
        return {name: self._loss(self.best(), held, factor) for name, factor in factors.items()}

    def _loss(self, steer: HeadSteer, tokens: Tensor, factor: Tensor | float = 1.0) -> float:
        hidden, next_ids, values = self._of(tokens)
        return round(mean_loss(self.model, steer, hidden, next_ids, factor * values, learn=False), 5)

    def _of(self, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        states = self.states
        return states.hidden[tokens], states.next_ids[tokens], self.values[states.text[tokens]]

    def _learn(self, tokens: Tensor) -> bool:
        """One step; False, with a warning or an error, if its loss is not finite."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.how.lr * (1 - self.step / self.how.n_steps)
        loss = update(self.model, self.steer, self.optimizer, self._of(tokens), self.how.regularization)
        if not math.isfinite(loss):
            said = f"{self._refused(loss)}. Training ends; the steer of step {self.kept} is kept"
            warnings.warn(said, stacklevel=4)
            return False
        self.losses.append(round(loss, 5))
        self.step += 1
        return True

    def _look(self, held: Tensor) -> None:
        """Try the steer on the tokens held out; keep it if it is the best so far; write the run to disk."""
        loss = self._loss(self.steer, held)
        if not math.isfinite(loss):
            self._refused(loss)
        if math.isfinite(loss) and loss <= min((past for _, past in self.curve), default=math.inf):
            self.kept = self.step
            self.kept_tensors = {name: t.detach().clone() for name, t in self.steer.tensors().items()}
        self.curve.append((self.step, loss))
        if self.path is not None:
            self._save(self.path)

    def _refused(self, loss: float) -> str:
        """What to say of a loss that is not finite; as an error, while there is no better state."""
        said = f"the loss is {loss} at step {self.step} with lr={self.how.lr}: lower lr or epsilon"
        if not self.kept_tensors:
            raise ValueError(said)
        return said

    def _stale(self) -> bool:
        return sum(step > self.kept for step, _ in self.curve) >= PATIENCE

    # --- on disk --------------------------------------------------------------------------------------------

    def _save(self, path: Path) -> None:
        moments = self.optimizer.state_dict()["state"]
        tensors = {f"now.{name}": tensor for name, tensor in self.steer.tensors().items()}
        tensors |= {f"best.{name}": tensor for name, tensor in self.kept_tensors.items()}
        tensors |= {f"adam.{i}.{name}": value for i, of in moments.items() for name, value in of.items()}
        facts = {"of": self.identity, "step": self.step, "kept": self.kept, "losses": self.losses}
        checkpoint.save_one(path, tensors, facts | {"curve": self.curve})

    def _load(self, path: Path) -> None:
        tensors, facts = checkpoint.load_one(path)
        if facts["of"] != self.identity:
            raise ValueError(
                f"{path} belongs to a run with other settings, texts or labels: give another folder"
            )
        self.step, self.kept, self.losses = facts["step"], facts["kept"], facts["losses"]
        self.curve = [tuple(look) for look in facts["curve"]]
        with torch.no_grad():
            for name, tensor in self.steer.tensors().items():
                tensor.copy_(tensors[f"now.{name}"])
        self.kept_tensors = {n: tensors[f"best.{n}"] for n in self.steer.parameters if f"best.{n}" in tensors}
        state: dict[int, dict[str, Tensor]] = {}
        for key in (key for key in tensors if key.startswith("adam.")):
            _, i, name = key.split(".")
            state.setdefault(int(i), {})[name] = tensors[key]
        self.optimizer.load_state_dict(self.optimizer.state_dict() | {"state": state})

    def _fingerprint(self) -> str:
        """The same for the same settings, texts, labels and model."""
        learned = (self.states.next_ids, self.states.text, self.values)
        return fingerprint(self.model, asdict(self.how), *(tensor.tolist() for tensor in learned))
