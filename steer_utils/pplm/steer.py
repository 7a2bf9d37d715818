"""PPLM: gradient steps at decoding time, towards words of a bag or a class of a classifier head.

At each token PPLM moves the cached keys and values, the last hidden state h, or the next-token probabilities
p by a few gradient steps against the loss

    −log Σ_{w in bag} p̃(w)  −  log p(class | mean hidden state)  +  kl_scale · KL(p̃ ‖ p),

and samples from p̃^γ · p^(1−γ), normalised, with γ = gm_scale. No weight changes. "hidden", "probs" and Adam
come from PPLM.jl. Source: Dathathri et al., "Plug and Play Language Models", ICLR 2020, section 3.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from .. import hf, hooks
from ..checkpoint import last_states
from ..models import Model, text_ids
from ..sampling import sampling_processors
from ..types import is_several, is_text, require, require_columns, several
from . import steps
from .bags import NOTHING, Bag, bag_of_words, finished
from .classifier import ClassifierHead
from .decoding import PPLMForward
from .steps import Perturbed, StepInputs

Bags = several(lambda one: isinstance(one, str | Path | Bag) or is_several(is_text)(one), "a list of bags")
COUNTS = "num_iterations window_length horizon_length grad_length top_k"
RANGES: list[tuple[str, str, Callable[[Any], bool]]] = [  # settings, what they must be, and whether they are
    ("perturb", "one of past, hidden, probs", lambda x: x in ("past", "hidden", "probs")),
    ("update", "one of normalized, adam", lambda x: x in ("normalized", "adam")),
    ("window", "one of newest, oldest", lambda x: x in ("newest", "oldest")),
    (COUNTS, "a whole number from 0", lambda x: x is None or x >= 0),
    ("stepsize gamma kl_scale", "at least 0 and finite", lambda x: 0 <= x < math.inf),
    ("temperature repetition_penalty", "above 0 and finite", lambda x: 0 < x < math.inf),
    ("gm_scale", "at least 0 and at most 1", lambda x: 0 <= x <= 1),
    ("top_p", "above 0 and at most 1", lambda x: 0 < x <= 1),
]


@dataclass(frozen=True)
class PPLM:
    """A steer, by `pplm.on(model, tokenizer)` or `custom_generate=pplm`; ValueError for wrong settings."""

    bags: Bag | str | Path | Bags = ()  # names in data/wordlists, files or `Bag`s, each with its own loss
    head: ClassifierHead | None = None
    target_class_id: int | str | None = None  # the class to move towards, a number from 0 or a name
    perturb: str = "past"  # cached keys and values, as in the paper; the cheaper "hidden"; "probs", bags only
    update: str = "normalized"  # −stepsize · g / ‖g‖^gamma; "adam": Adam with that step size
    stepsize: float = 0.02
    num_iterations: int = 3  # steps at each token
    gamma: float = 1.5
    persist: bool = True  # keep the moved past for later tokens
    kl_scale: float = 0.01
    gm_scale: float = 0.9  # γ of the fusion; 1 samples from p̃ alone
    window_length: int = 0  # how many cached positions move; 0 for all, as in shorter texts
    window: str = "newest"  # which ones; or the "oldest"
    decay: bool = False  # inside the window, earlier positions move less
    horizon_length: int = 1  # soft tokens a head looks ahead with "past"; 0: it judges the text so far
    grad_length: int | None = None  # how many new tokens are steered; None for all
    temperature: float = 1.0  # applied to p̃ before the fusion, as is the penalty
    repetition_penalty: float = 1.0
    top_k: int = 10  # applied after the fusion, as is top_p; 0 for all
    top_p: float = 1.0

    reads_prompt = True  # no shared prefill: PPLM needs the prompt's token ids and hidden states

    def __post_init__(self) -> None:
        bags = [self.bags] if isinstance(self.bags, (Bag, str, Path)) else self.bags
        bags = tuple(bag if isinstance(bag, Bag) else bag_of_words(bag) for bag in bags)
        object.__setattr__(self, "bags", bags)
        if self.head is not None:
            if self.perturb == "probs":
                raise ValueError("perturb='probs' moves what a head does not see: use 'hidden' or 'past'")
            object.__setattr__(self, "target_class_id", self.head.class_id(self.target_class_id))
        elif self.target_class_id is not None:
            raise ValueError(f"target_class_id={self.target_class_id!r} is a class of a head: give head= too")
        elif not bags:
            raise ValueError("nothing to steer by: give bags=['space'], or head= and target_class_id=")
        if self.decay and self.window_length == 0:
            raise ValueError("decay=True falls off inside a window: give window_length as well")
        for names, what, holds in RANGES:
            for name in names.split():
                require(holds(getattr(self, name)), what, **{name: getattr(self, name)})

    @contextmanager
    def on(self, model: Model, tokenizer: PreTrainedTokenizerBase | None = None) -> Iterator[None]:
        """While inside, a call of the model gives the fused and cut log probabilities [B, 1, V].

        With other steers on, PPLM moves the steered model. tokenizer: for bags of words. Where a prompt comes
        in chunks, one of a single token counts as generated unless `hooks.batch(prompt_lengths=…)` says more.
        Raises ValueError for a head of another width, a token id beyond the vocabulary, a second PPLM, beams,
        a KV cache filled before, and a call that asks for other outputs.
        """
        model = hf.unwrapped(model)
        if hooks.has_stand_in(model):
            raise ValueError("another PPLM is on: give its bags and its head to one PPLM")
        if self.head is not None:
            self.head.require_fit(model)
        pplm, size = self.with_tokenizer(tokenizer), hf.vocabulary(model)
        if beyond := [i for bag in pplm.bags for entry in bag.entries for i in entry if i >= size]:
            raise ValueError(f"a bag holds the token id {beyond[0]}, but the vocabulary ends at {size - 1}")
        with hooks.stand_in(model, PPLMForward(model, pplm)):
            yield

    def __call__(self, model: Model, *args: Any, generation_config: Any, **kwargs: Any) -> Any:
        """The loop of `model.generate(…, custom_generate=pplm)`, which gets no streamer: use `pplm.on`."""
        if generation_config.num_beams > 1:
            raise ValueError(f"PPLM does not search with beams: num_beams={generation_config.num_beams}")
        with self.on(model):
            return hf.decode(model, *args, generation_config=generation_config, **kwargs)

    @property
    def words(self) -> tuple[str, ...]:
        """The words of all bags, which `print_n_comparisons` colours."""
        return tuple(word for bag in self.bags for word in bag.words)

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

    def is_active(self, written: int) -> bool:
        """Whether there are steps at the next token, after so many new ones."""
        in_reach = self.grad_length is None or written < self.grad_length
        return self.stepsize > 0 and self.num_iterations > 0 and in_reach

    def take_steps(self, model: Model, inputs: StepInputs, norms: Tensor | None = None) -> Perturbed:
        """The gradient steps of one token; norms: [G, B] of the token before."""
        running = self.head is None  # as in the authors' program
        rule = steps.Normalized(self.stepsize, self.gamma, running, norms)
        rule = steps.Adam(self.stepsize) if self.update == "adam" else rule
        loss = [bag.wanted(inputs.ids) for bag in self.bags], self.head, self.target_class_id, self.kl_scale
        where = self.window_length, self.window, self.decay, self.horizon_length
        descent = steps.Descent(rule, self.num_iterations, *loss, *where)
        perturb = {"past": steps.perturb_past, "hidden": steps.perturb_hidden, "probs": steps.perturb_probs}
        return perturb[self.perturb](model, inputs, descent)

    def fuse(self, logits: Tensor, inputs: StepInputs) -> Tensor:
        """Fused log probabilities [B, V] from steered logits [B, V], −inf for the tokens that are cut."""
        last = inputs.ids[:, -1:].clamp(min=0)  # a chunk of a prompt may be padding alone
        ids = torch.where(inputs.ids == NOTHING, last, inputs.ids)  # padding earns no penalty
        penalties = {"temperature": self.temperature, "repetition_penalty": self.repetition_penalty}
        shaped = sampling_processors(inputs.mask, top_p=1.0, **penalties)(ids, logits)
        steered, unsteered, gamma = shaped.log_softmax(dim=-1), inputs.log_probs, self.gm_scale
        mixed = (gamma * steered + (1 - gamma) * unsteered).log_softmax(dim=-1)
        mixed = finished(self.bags, mixed, unsteered, inputs.ids)
        return sampling_processors(inputs.mask, top_k=self.top_k, top_p=self.top_p)(ids, mixed)


@hf.no_grad
def attribute_scores(
    steer: PPLM, model: Model, tokenizer: PreTrainedTokenizerBase, table: pd.DataFrame
) -> np.ndarray:
    """log p(attribute | text) of each prompt with its completion under the unsteered model, [N].

    For a head, that of its class; for bags, the mean of the log probabilities of their words over the
    completion's tokens, −inf if there are none; for both, the sum. `su.best_of` ranks by it.
    """
    require_columns(table, "prompt", "completion")
    steer, scores, model = steer.with_tokenizer(tokenizer), np.zeros(len(table)), hf.unwrapped(model)
    rows = text_ids(tokenizer, (table["prompt"] + table["completion"]).tolist())  # as they were generated
    if steer.head is not None:
        scores += steer.head.log_probs(model, tokenizer, rows)[:, steer.target_class_id].numpy()
    if steer.bags:
        starts = [len(row) for row in text_ids(tokenizer, table["prompt"].tolist())]
        for i, hidden in last_states(model, rows):
            scores[i] += _bag_score(steer.bags, model, rows[i], hidden, starts[i])
    return scores


def _bag_score(bags: Sequence[Bag], model: Model, ids: list[int], hidden: Tensor, start: int) -> float:
    """Mean log probability of the bags' words at the tokens of ids [T] from `start` on; −inf for none."""
    text = torch.tensor(ids, device=hf.input_device(model))
    if not (before := [text[:end] for end in range(start, len(ids))]):
        return -math.inf
    with hooks.unsteered():
        logits = steps.last_logits(model, hidden[start - 1 : -1].to(text.device))
    before = pad_sequence(before, batch_first=True, padding_value=NOTHING, padding_side="left")
    return -sum(steps.bag_loss(logits.log_softmax(dim=-1), *bag.wanted(before)) for bag in bags).mean().item()
