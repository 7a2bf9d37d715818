"""PPLM.jl's names for what this folder does, so that its documentation can be followed line by line.

`from steer_utils.pplm import julia as PPLM`. As in PPLM.jl, classes are counted from 1, steps are Adam's, and
the perturbation is discarded after each token. Corrected: a head sees the mean of hidden states, not their
sum; every bag counts; the KL term is KL(steered ‖ unsteered); a nucleus is never empty.
Shapes: B batch rows, T tokens, D width, V vocabulary. Source: AdarshKumar712/PPLM.jl 0.1.0.
"""

import math
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import Cache, PreTrainedTokenizerBase

from .. import generation, hf
from ..models import Model
from ..sampling import Draw, sampling_processors
from ..types import holds, require
from . import classifier
from .steer import PPLM, Bags
from .steps import StepInputs, last_logits, log_of, with_newest


@dataclass(frozen=True)
class pplm:
    """The settings of PPLM.jl."""

    method: str = "BoW"  # or "Discrim"
    perturb: str = "hidden"
    bow_list: Bags = ("military",)
    discrim: str = "toxicity"  # a head's name, or
    path: str | Path = ""  # its path
    target_class_id: int = 1  # from 1
    stepsize: float = 0.01
    num_iterations: int = 2
    fusion_gm_scale: float = 0.9
    fusion_kl_scale: float = 0.01
    max_length: int = 100
    temperature: float = 1.1
    top_k: int = 50  # `sample_pplm` uses top_k or top_p
    top_p: float = 0.8

    @cached_property  # reads the head's files once, not at each token
    def steer(self) -> PPLM:
        """The same as a steer. ValueError for another method, or a class that the head does not have."""
        require(self.method in ("BoW", "Discrim"), "'BoW' or 'Discrim'", method=self.method)
        if self.method == "BoW":
            attribute = {"bags": tuple(self.bow_list)}
        else:
            head = classifier.ClassifierHead.from_pretrained(self.path or self.discrim)
            names = ", ".join(f"{i} {name}" for i, name in enumerate(head.classes, start=1))
            known = 1 <= self.target_class_id <= head.class_size
            require(known, f"one of {names}", target_class_id=self.target_class_id)
            attribute = {"head": head, "target_class_id": self.target_class_id - 1}
        scales = {"gm_scale": self.fusion_gm_scale, "kl_scale": self.fusion_kl_scale}
        steps = {"update": "adam", "stepsize": self.stepsize, "num_iterations": self.num_iterations}
        fixed = {"perturb": self.perturb, "persist": False, "horizon_length": 0, "top_k": 0}
        return PPLM(**attribute, **scales, **steps, **fixed)


def ClassifierHead(
    *, load_from_pretrained: bool = False, discrim: str = "", path: str | Path = "", **sizes: Any
) -> tuple[classifier.ClassifierHead, dict[str, Any]]:
    """A head by name, from a path, or random with class_size=2 and embed_size=768, and its metadata."""
    if load_from_pretrained:
        head = classifier.ClassifierHead.from_pretrained(path or discrim)
    else:
        head = classifier.ClassifierHead(**{"class_size": 2, "embed_size": 768} | sizes)
    return head, head.metadata


def sample_pplm(
    args: pplm,
    *,
    tokenizer: PreTrainedTokenizerBase,
    model: Model,
    prompt: str = "I hate the customs",
    sample_method: str = "top_k",
    seed: int | None = None,
) -> str:
    """The prompt and `max_length` steered tokens. sample_method: "top_k" or "nucleus"."""
    cut = {"top_k": {"top_k": args.top_k, "top_p": 1.0}, "nucleus": {"top_k": 0, "top_p": args.top_p}}
    require(sample_method in cut, "'top_k' or 'nucleus'", sample_method=sample_method)
    settings = {"max_new_tokens": args.max_length, "temperature": args.temperature, "seed": seed}
    table = generation.generate(model, tokenizer, prompt, steer=args.steer, **settings, **cut[sample_method])
    return prompt + table["completion"][0]


def perturb_hidden_discrim(
    hidden: Tensor, model: Model, tokenizer: PreTrainedTokenizerBase, args: pplm
) -> Tensor:
    """Last hidden states [B, T, D] after steps; bags move the last one only."""
    width = hf.last_width(hf.unwrapped(model))
    known = holds("float", hidden) and hidden.ndim == 3 and hidden.shape[2] == width and hidden.numel()
    require(known, f"hidden states [B, T, {width}]", hidden=hidden)
    steer = replace(args.steer, perturb="hidden").with_tokenizer(tokenizer)
    ids, mask = hidden.new_zeros(len(hidden), 0), hidden.new_ones(hidden.shape[:2])
    inputs = StepInputs(ids, mask, hidden=hidden, logits=last_logits(model, hidden[:, -1]))
    ((moved,),) = steer.take_steps(model, inputs).moved
    return moved


def perturb_past_discrim(
    model: Model,
    prev: Tensor,
    past: Cache,
    original_probs: Tensor,
    args: pplm,
    *,
    hidden: Tensor | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> Cache:
    """A KV cache after steps on its keys and values, for `model(prev, past_key_values=…)`.

    prev: the next token, [B, 1]. original_probs: the unsteered model's after it, [B, V]. tokenizer: for bags.
    hidden: unsteered last hidden states [B, T, D] of the cached tokens, for a head to judge the whole text;
    without them it judges the newest token alone, as in PPLM.jl.
    """
    known = prev.new_zeros(len(prev), 0, hf.last_width(model)) if hidden is None else hidden
    states = pad(known.float(), (0, 0, 0, 1))  # the newest state comes with the steps
    mask = prev.new_ones(len(prev), past.get_seq_length() + 1)
    inputs = StepInputs(prev, mask, past, past, states, log_of(original_probs))
    steer = replace(args.steer, perturb="past").with_tokenizer(tokenizer)
    return with_newest(past, steer.take_steps(model, inputs).moved)


def temp_softmax(x: Tensor, t: float = 1.2) -> Tensor:
    """softmax(x / t) over the last axis."""
    require(0 < t < math.inf, "above 0 and finite", t=t)
    require(holds("float", x) and not x.isnan().any(), "numbers", x=x)
    return (x / t).softmax(dim=-1)


def top_k_sample(probs: Tensor, k: int = 10, stream: np.random.Generator | None = None) -> Tensor:
    """Draw token ids [B] from the k best of weights [B, V]. stream: of `generation.random_streams`."""
    require(k >= 1, "at least 1", k=k)
    known = holds("float", probs) and probs.ndim == 2 and (probs.sum(dim=-1) > 0).all()
    known = known and ((probs >= 0) & probs.isfinite()).all() and probs.numel() > 0
    require(known, "weights [B, V], finite and from 0, some of each row above", probs=probs)
    stream = np.random.default_rng() if stream is None else stream
    mask = torch.ones(len(probs), 1, dtype=torch.long)
    uniforms = torch.from_numpy(stream.random((len(probs), 1), dtype=np.float32))
    scores = sampling_processors(mask, top_k=k, top_p=1.0)(mask, probs.log())
    return Draw(uniforms.to(probs.device), 1)(mask, scores).argmax(dim=-1)
