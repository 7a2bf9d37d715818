"""PPLM.jl's names for what `pplm` does, so that its documentation can be followed line by line.

`from steer_utils.pplm import julia as PPLM`, and then `PPLM.pplm(method="Discrim", …)`, `PPLM.sample_pplm(args, …)`,
and the functions of which its manual loops are made. Corrected on the way: a head sees the mean of hidden
states, not their sum; every bag counts; KL is that of the steered distribution from the plain one; a nucleus
is never empty. As there, classes are counted from 1, steps are Adam's, and no step outlives its token.
Shapes: B rows, T positions, D width, V vocabulary. Source: AdarshKumar712/PPLM.jl 0.1.0.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import Cache, PreTrainedModel, PreTrainedTokenizerBase

from .. import generation, hf, models
from ..sampling import Draw, sampling_processors
from . import classifier as classifier_head
from . import perturbation
from .descent import log_of
from .perturbation import Moment
from .steer import PPLM


@dataclass(frozen=True)
class pplm:
    """The settings. method: "BoW" with `bow_list`, or "Discrim" with `discrim`, a head's name, or its `path`.

    target_class_id: from 1. temperature, top_k, top_p: of sampling; `sample_pplm` uses one of the cuts.
    """

    method: str = "BoW"
    perturb: str = "hidden"
    bow_list: Sequence[str] = ("military",)
    discrim: str = "toxicity"
    path: str | Path = ""
    target_class_id: int = 1
    stepsize: float = 0.01
    num_iterations: int = 2
    fusion_gm_scale: float = 0.9
    fusion_kl_scale: float = 0.01
    max_length: int = 100
    temperature: float = 1.1
    top_k: int = 50
    top_p: float = 0.8

    @cached_property  # a head is read from its file once, not at each token
    def steer(self) -> PPLM:
        """The same as a steer. ValueError for another method, or a class that the head does not have."""
        if self.method not in ("BoW", "Discrim"):
            raise ValueError(f"method must be 'BoW' or 'Discrim', not {self.method!r}")
        shared = {
            "perturb": self.perturb,
            "update": "adam",
            "persist": False,
            "stepsize": self.stepsize,
            "num_iterations": self.num_iterations,
            "gm_scale": self.fusion_gm_scale,
            "kl_scale": self.fusion_kl_scale,
            "horizon_length": 0,
            "top_k": 0,
        }
        if self.method == "BoW":
            return PPLM(tuple(self.bow_list), **shared)
        head = classifier_head.ClassifierHead.from_pretrained(self.path or self.discrim)
        if not 1 <= self.target_class_id <= head.class_size:
            names = ", ".join(f"{i} {name}" for i, name in enumerate(head.classes, start=1))
            raise ValueError(f"target_class_id must be one of {names}, not {self.target_class_id!r}")
        return PPLM(head=head, target_class_id=self.target_class_id - 1, **shared)


def ClassifierHead(
    *,
    load_from_pretrained: bool = False,
    discrim: str = "",
    path: str | Path = "",
    class_size: int = 2,
    embed_size: int = 768,
) -> tuple[classifier_head.ClassifierHead, dict[str, Any]]:
    """A head by name, from a path, or random, and what is known of it."""
    if load_from_pretrained:
        head = classifier_head.ClassifierHead.from_pretrained(path or discrim)
    else:
        head = classifier_head.ClassifierHead(embed_size, class_size)
    return head, head.metadata


def sample_pplm(
    args: pplm,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    model: PreTrainedModel | None = None,
    prompt: str = "I hate the customs",
    sample_method: str = "top_k",
    seed: int | None = None,
) -> str:
    """The prompt and `max_length` tokens more, steered. sample_method: "top_k" or "nucleus"."""
    cut = {"top_k": {"top_k": args.top_k, "top_p": 1.0}, "nucleus": {"top_k": 0, "top_p": args.top_p}}
    if sample_method not in cut:
        raise ValueError(f"sample_method must be 'top_k' or 'nucleus', not {sample_method!r}")
    if model is None:
        model, tokenizer = models.load()
    settings = {"max_new_tokens": args.max_length, "temperature": args.temperature, "seed": seed}
    table = generation.generate(model, tokenizer, prompt, steer=args.steer, **settings, **cut[sample_method])
    return prompt + table["completion"][0]


# --- the parts of a manual loop ---------------------------------------------------------------------------


def perturb_probs(probs: Tensor, tokenizer: PreTrainedTokenizerBase, args: pplm) -> Tensor:
    """Next-token probabilities [B, V] after steps towards the bags; 0 at the least, and of any sum.

    Without the text, of a word in several tokens only the first is pulled.
    """
    steer = args.steer.with_tokenizer(tokenizer)
    moment = _moment(steer, log_probs=log_of(probs))
    (delta,) = perturbation.perturb_probs(steer, moment).deltas[0]
    return (probs + delta).clamp(min=0)


def perturb_hidden_discrim(
    hidden: Tensor, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, args: pplm
) -> Tensor:
    """Last hidden states [B, T, D] after steps; bags move the last one alone.

    Without the text, of a word in several tokens only the first is pulled.
    """
    steer = args.steer.with_tokenizer(tokenizer)
    states = hidden if steer.head is not None else hidden[:, -1:]
    log_probs = perturbation.last_logits(model, hidden[:, -1]).log_softmax(dim=-1)
    moment = _moment(steer, hidden=states, mask=hidden.new_ones(hidden.shape[:2]), log_probs=log_probs)
    (delta,) = perturbation.perturb_hidden(steer, model, moment).deltas[0]
    return torch.cat([hidden[:, : -states.shape[1]], states + delta], dim=1)


perturb_hidden_bow = perturb_hidden_discrim  # `args` says which of the two losses it is


def perturb_past_discrim(
    model: PreTrainedModel,
    prev: Tensor,
    past: Cache,
    original_probs: Tensor,
    args: pplm,
    *,
    hidden: Tensor | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> Cache:
    """A cache after steps on its keys and values, for `model(prev, past_key_values=…)`.

    prev: the token [B, 1] that comes next. original_probs: what the plain model says after it, [B, V].
    hidden: the plain last hidden states [B, T, D] of the cached tokens; with them a head judges all of the
    text, without them the newest token alone, as in PPLM.jl. tokenizer: for bags. Without the text before
    `prev`, of a word in several tokens only the first two are pulled.
    """
    steer = args.steer.with_tokenizer(tokenizer)
    mask = prev.new_ones(len(prev), past.get_seq_length() + 1)
    known = prev.new_zeros(len(prev), 0, hf.last_width(model)) if hidden is None else hidden
    states = pad(known.float(), (0, 0, 0, 1))  # the newest state comes with the steps
    moment = _moment(steer, prev, mask, past, past, states, log_of(original_probs))
    return perturbation.moved(past, perturbation.perturb_past(steer, model, moment).deltas)


perturb_past_bow = perturb_past_discrim


def _moment(steer: PPLM, *given: Any, **named: Any) -> Moment:
    """A moment of which some things are known; of the text, its last token at most."""
    known = dict.fromkeys(Moment._fields) | dict(zip(Moment._fields, given, strict=False)) | named
    nothing = torch.empty(len(known["log_probs"]), 0, dtype=torch.long, device=known["log_probs"].device)
    text = nothing if known["last"] is None else known["last"]
    return Moment(**(known | {"wanted": [bag.wanted(text) for bag in steer.bags]}))


def temp_softmax(x: Tensor, t: float = 1.2) -> Tensor:
    """softmax(x / t) over the last axis."""
    return (x / t).softmax(dim=-1)


def top_k_sample(probs: Tensor, k: int = 10, stream: np.random.Generator | None = None) -> Tensor:
    """Draw token ids [B] from the k best of some weights [B, V]; see `nucleus_sample` for the stream."""
    return _sample(probs, stream, top_k=k, top_p=1.0)


def nucleus_sample(probs: Tensor, p: float = 0.8, stream: np.random.Generator | None = None) -> Tensor:
    """Draw token ids [B] from the fewest of the weights [B, V] that reach p of their sum.

    stream: gives the random number of each row; by default a new one. With that of
    `generation.random_streams` the draws are those of `su.generate`.
    """
    return _sample(probs, stream, top_p=p)


def _sample(weights: Tensor, stream: np.random.Generator | None, **cut: Any) -> Tensor:
    stream = np.random.default_rng() if stream is None else stream
    mask = torch.ones(len(weights), 1, dtype=torch.long)
    uniforms = torch.from_numpy(stream.random((len(weights), 1), dtype=np.float32))
    scores = sampling_processors(mask, **cut)(mask, weights.log())
    return Draw(uniforms.to(weights.device), 1)(mask, scores).argmax(dim=-1)
