"""PPLM: gradient steps at decoding time, towards words of a bag or a class of a classifier head.

At each token the model has computed something: cached keys and values, a last hidden state h, next-token
probabilities p. PPLM moves one of these by a few gradient steps against a loss,

    −log Σ_{w in bag} p̃(w)  −  log p(class | mean hidden state)  +  kl_scale · KL(p̃ ‖ p),

and samples from p̃^γ · p^(1−γ), normalised, with γ = gm_scale. Nothing is trained, and no weight changes.
Source: Dathathri et al., "Plug and Play Language Models", ICLR 2020, section 3; "hidden", "probs" and Adam
come from PPLM.jl. Read on in `decoding`, then `steps`.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, replace
from numbers import Integral
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .. import hf
from ..models import token_ids
from ..sampling import sampling_processors
from . import steps
from .bags import NOTHING, Bag, bag_of_words
from .classifier import ClassifierHead
from .decoding import PPLMForward


@dataclass(frozen=True)
class PPLM:
    """Settings of PPLM, and a steer: `with pplm.on(model, tokenizer)`, or `custom_generate=pplm`.

    bags: names in data/wordlists, files, `Bag`s; a single one needs no list. Each has its own loss.
    head, target_class_id: a classifier head and the class to move towards, a number from 0 or a name.
    perturb: "past" moves cached keys and values, as in the paper; "hidden", the last hidden states, and
        "probs", the next-token probabilities (bags only), are much cheaper and come from PPLM.jl.
    update: "normalized", −stepsize · g / ‖g‖^gamma; "adam", Adam with that step size, without gamma.
    num_iterations: steps at each token. persist: keep the moved past for later tokens.
    kl_scale: weight of KL(p̃ ‖ p) in the loss. gm_scale: γ of the fusion; 1 samples from p̃ alone.
    window_length: how many of the newest (window="oldest": the first) cached positions move; 0 for all. In
        shorter texts all move. decay: inside the window, earlier positions move less.
    horizon_length: how many soft tokens a head looks ahead with "past"; with 0, it judges the text so far.
    grad_length: how many new tokens are steered; None for all.
    temperature, repetition_penalty: applied to p̃ before the fusion. top_k (0 for all), top_p: applied after
        it, and before the sampling settings of `generate`. For comparisons with the unsteered model, take
        `uncut()`.
    Raises ValueError for a setting out of range, nothing to steer by, or a class that the head does not have.
    """

    bags: Sequence[Bag | str | Path] = ()
    head: ClassifierHead | None = None
    target_class_id: int | str | None = None
    perturb: str = "past"
    update: str = "normalized"
    stepsize: float = 0.02
    num_iterations: int = 3
    gamma: float = 1.5
    persist: bool = True
    kl_scale: float = 0.01
    gm_scale: float = 0.9
    window_length: int = 0
    window: str = "newest"
    decay: bool = False
    horizon_length: int = 1
    grad_length: int | None = None
    temperature: float = 1.0
    repetition_penalty: float = 1.0
    top_k: int = 10
    top_p: float = 1.0

    reads_prompt = True  # no shared prefill: PPLM needs the prompt's token ids and hidden states

    def __post_init__(self) -> None:
        bags = [self.bags] if isinstance(self.bags, (Bag, str, Path)) else self.bags
        bags = tuple(bag if isinstance(bag, Bag) else bag_of_words(bag) for bag in bags)
        object.__setattr__(self, "bags", bags)
        if not bags and self.head is None:
            raise ValueError("nothing to steer by: give bags=['space'], or head= and target_class_id=")
        if self.head is not None or self.target_class_id is not None:
            object.__setattr__(self, "target_class_id", self._class_id())
        self._require_in_range()

    def _class_id(self) -> int:
        """The number of the target class. ValueError without a head or class, or for probabilities."""
        if self.head is None:
            raise ValueError(f"target_class_id={self.target_class_id!r} is a class of a head: give head= too")
        if self.target_class_id is None:
            raise ValueError(f"give target_class_id: {', '.join(self.head.classes)}, or a number from 0")
        if self.perturb == "probs":
            raise ValueError("perturb='probs' moves what a head does not see: use 'hidden' or 'past'")
        return self.head.class_id(self.target_class_id)

    def _require_in_range(self) -> None:
        def require(holds: bool, name: str, what: str) -> None:
            if not holds:
                raise ValueError(f"{name} must be {what}, not {getattr(self, name)!r}")

        require(self.perturb in ("past", "hidden", "probs"), "perturb", "one of past, hidden, probs")
        require(self.update in ("normalized", "adam"), "update", "one of normalized, adam")
        require(self.window in ("newest", "oldest"), "window", "one of newest, oldest")
        for name in ("num_iterations", "window_length", "horizon_length", "top_k", "grad_length"):
            count = getattr(self, name)
            whole = isinstance(count, Integral) and count >= 0
            require(whole or (name == "grad_length" and count is None), name, "a whole number from 0")
        for name in ("stepsize", "gamma", "kl_scale"):
            require(0 <= getattr(self, name) < math.inf, name, "at least 0 and finite")
        for name in ("temperature", "repetition_penalty"):
            require(0 < getattr(self, name) < math.inf, name, "above 0 and finite")
        require(0 <= self.gm_scale <= 1, "gm_scale", "at least 0 and at most 1")
        require(0 < self.top_p <= 1, "top_p", "above 0 and at most 1")
        if self.decay and self.window_length == 0:
            raise ValueError("decay=True falls off inside a window: give window_length as well")

    # --- a value like other steers ------------------------------------------------------------------------

    @contextmanager
    def on(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None = None) -> Iterator[None]:
        """While inside, a call of the model gives the logits [B, 1, V] to sample the next token from.

        They are log probabilities, fused and cut. `model.generate` and `su.generate` work as usual, streamers
        included. Other steers that are on act in every pass, so PPLM then moves the steered model.
        tokenizer: for bags that hold words. A prompt may come in chunks; the last needs two tokens or more,
        since a single token counts as a generated one. Raises ValueError for a head of another width, a
        second PPLM, beams, a KV cache filled before, and a call that asks for more than next-token logits.
        """
        model = hf.unwrapped(model)
        if hf.has_stand_in(model):
            raise ValueError("another PPLM is on: give its bags and its head to one PPLM")
        if self.head is not None:
            self.head.require_fit(model)
        head = None if self.head is None else deepcopy(self.head).to(model.device)
        with hf.stand_in(model, PPLMForward(replace(self.with_tokenizer(tokenizer), head=head), model)):
            yield

    def __call__(self, model: PreTrainedModel, *args: Any, generation_config: Any, **kwargs: Any) -> Any:
        """What `model.generate(…, custom_generate=pplm)` calls in place of its own decoding loop.

        transformers hands no streamer to a custom loop: a streamer gets the prompt, no token and no end. To
        stream, call `model.generate(…, streamer=…)` inside `pplm.on(model, tokenizer)`.
        """
        if generation_config.num_beams > 1:
            raise ValueError(f"PPLM does not search with beams: num_beams={generation_config.num_beams}")
        with self.on(model):
            return hf.decode(model, *args, generation_config=generation_config, **kwargs)

    def with_tokenizer(self, tokenizer: PreTrainedTokenizerBase | None) -> "PPLM":
        """The same settings with token ids in the bags; ValueError if that needs a tokenizer and has none."""
        return replace(self, bags=tuple(bag.encoded(tokenizer) for bag in self.bags))

    def uncut(self) -> "PPLM":
        """The same settings without top_k and top_p: every token keeps a probability."""
        return replace(self, top_k=0, top_p=1.0)

    def __mul__(self, factor: float) -> "PPLM":
        """The same settings with `factor` times the step size; ValueError if that is below 0."""
        return replace(self, stepsize=factor * self.stepsize)

    __rmul__ = __mul__

    @property
    def words(self) -> tuple[str, ...]:
        """The words of all bags."""
        return tuple(word for bag in self.bags for word in bag.words)

    # --- what the forward pass asks for -------------------------------------------------------------------

    def is_active(self, written: int) -> bool:
        """Whether there are steps at the next token, after so many new ones."""
        in_reach = self.grad_length is None or written < self.grad_length
        return self.stepsize > 0 and self.num_iterations > 0 and in_reach

    def take_steps(
        self, model: PreTrainedModel, inputs: steps.StepInputs, norms: Tensor | None = None
    ) -> steps.Perturbed:
        """The gradient steps of one token; norms: [G, B] of the token before.

        With bags alone, the norms in g / ‖g‖^gamma are the largest so far, as in the authors' program.
        """
        rule = steps.Normalized(self.stepsize, self.gamma, running=self.head is None, norms=norms)
        descent = steps.Descent(
            rule=steps.Adam(self.stepsize) if self.update == "adam" else rule,
            num_iterations=self.num_iterations,
            bags=[bag.wanted(inputs.ids) for bag in self.bags],
            head=self.head,
            target=self.target_class_id,
            kl_scale=self.kl_scale,
            window=steps.Window(self.window_length, self.window, self.decay),
            horizon_length=self.horizon_length,
        )
        if self.perturb == "probs":
            return steps.perturb_probs(inputs, descent)
        perturb = steps.perturb_past if self.perturb == "past" else steps.perturb_hidden
        return perturb(model, inputs, descent)

    def fuse(self, logits: Tensor, inputs: steps.StepInputs) -> Tensor:
        """Fused log probabilities [B, V] from steered logits [B, V], −inf for the tokens that are cut."""
        ids = torch.where(inputs.ids == NOTHING, inputs.ids[:, -1:], inputs.ids)  # padding earns no penalty
        penalties = {"temperature": self.temperature, "repetition_penalty": self.repetition_penalty}
        shaped = sampling_processors(inputs.mask, top_p=1.0, **penalties)(ids, logits)
        mixed = steps.fused(shaped.log_softmax(dim=-1), inputs.log_probs, self.gm_scale)
        return sampling_processors(inputs.mask, top_k=self.top_k, top_p=self.top_p)(ids, mixed)


@torch.no_grad()
def attribute_scores(
    steer: PPLM, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, table: pd.DataFrame
) -> np.ndarray:
    """log p(attribute | text) of each prompt with its completion under the unsteered model, [N].

    With a head, the log probability of its class; with bags, the mean over the completion's tokens of the
    bags' log probability, −inf for an empty completion; with both, the sum. `su.best_of` ranks by it.
    """
    steer, scores = steer.with_tokenizer(tokenizer), np.zeros(len(table))
    texts = (table["prompt"] + table["completion"]).tolist()
    if steer.head is not None:
        scores += steer.head.log_probs(model, tokenizer, texts)[:, steer.target_class_id].numpy()
    if steer.bags:
        prompts = [len(token_ids(tokenizer, prompt)) for prompt in table["prompt"]]
        rows = [torch.tensor([token_ids(tokenizer, text)], device=model.device) for text in texts]
        scores += [_bag_score(steer.bags, model, *pair) for pair in zip(rows, prompts, strict=True)]
    return scores


def _bag_score(bags: Sequence[Bag], model: PreTrainedModel, ids: Tensor, start: int) -> float:
    """Mean log probability of the bags' words at the tokens of ids [1, T] from `start` on; −inf for none."""
    model, ends = hf.unwrapped(model), range(start, ids.shape[1])
    if not ends:
        return -math.inf
    with hf.unsteered():
        hidden = hf.forward(model, ids, torch.ones_like(ids)).last_hidden_state[0, start - 1 : -1]
    log_probs = steps.last_logits(model, hidden).log_softmax(dim=-1)
    before = torch.cat([pad(ids[:, :end], (ids.shape[1] - end, 0), value=NOTHING) for end in ends])
    return -sum(steps.bag_loss(log_probs, *bag.wanted(before)) for bag in bags).mean().item()
