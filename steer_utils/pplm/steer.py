"""PPLM: gradient steps at decoding time, towards words of a bag or a class of a classifier head.

At each token the model has computed something: cached keys and values, a last hidden state h, next-token
probabilities p. PPLM moves one of these by a few gradient steps against a loss,

    −log Σ_{w in bag} p̃(w)  −  log p(class | mean hidden state)  +  kl_scale · KL(p̃ ‖ p),

and samples from p̃^γ · p^(1−γ), normalised, with γ = gm_scale. Nothing is trained, and no weight changes.
Shapes: B rows, T positions, P cached positions, D width, V vocabulary, H heads, L layers.
Source: Dathathri et al., "Plug and Play Language Models", ICLR 2020, section 3; "hidden", "probs" and Adam
come from PPLM.jl.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, replace
from numbers import Integral
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel, PreTrainedTokenizerBase
from transformers.modeling_outputs import CausalLMOutputWithPast

from .. import hf
from ..sampling import sampling_processors
from .bags import NOTHING, Bag, bag_of_words
from .classifier import ClassifierHead
from .descent import Adam, Normalized, Rule, fused, log_of
from .perturbation import (
    Moment,
    begin_hidden,
    last_logits,
    movable_past,
    move_past,
    newest_state,
    next_token,
    perturb_hidden,
    perturb_probs,
)

CHOICES = {
    "perturb": ("past", "hidden", "probs"),
    "update": ("normalized", "adam"),
    "window": ("newest", "oldest"),
}
COUNTS = ("num_iterations", "window_length", "horizon_length", "top_k", "grad_length")
RANGES = {
    "stepsize": (0, math.inf),
    "gamma": (0, math.inf),
    "kl_scale": (0, math.inf),
    "gm_scale": (0, 1),
    "temperature": (0, math.inf),
    "repetition_penalty": (0, math.inf),
    "top_p": (0, 1),
}
POSITIVE = ("temperature", "repetition_penalty", "top_p")


@dataclass(frozen=True)
class PPLM:
    """Settings of PPLM, and a steer: `with pplm.on(model, tokenizer)`, or `custom_generate=pplm`.

    bags: names in data/wordlists, files, `Bag`s; one alone needs no list. Each has a loss of its own.
    head, target_class_id: a classifier head, and the class, a number from 0 or a name, to move towards.
    perturb: what is moved: "past", cached keys and values, as in the original; or, much cheaper, "hidden",
        the last hidden states, or "probs", the next-token probabilities (bags only), as in PPLM.jl.
    update: "normalized", −stepsize · g / ‖g‖^gamma; "adam", Adam with that step size, without gamma.
    num_iterations: steps at each token. persist: what was moved in the past stays moved for later tokens.
    kl_scale: weight of KL(p̃ ‖ p) in the loss. gm_scale: γ of the fusion, 1 for p̃ alone.
    window_length: how many of the newest (window="oldest": the first) cached positions are moved, 0 for all;
        in a shorter text, all. decay: within the window, the less the earlier.
    horizon_length: how many soft tokens past's head looks ahead; 0 for none: it judges the text so far.
    grad_length: how many new tokens are steered; None for all.
    temperature, repetition_penalty: of p̃, before the fusion. top_k (0 for all), top_p: cuts after it. What
        `generate` is told about sampling comes on top: to compare with the plain model, give top_k=0 here.
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

    reads_prompt = True  # a cache made before would tell neither token ids nor hidden states

    def __post_init__(self) -> None:
        single = isinstance(self.bags, (Bag, str, Path))
        bags = tuple(map(_as_bag, [self.bags] if single else self.bags))
        object.__setattr__(self, "bags", bags)
        if not bags and self.head is None:
            raise ValueError("nothing to steer by: give bags=['space'], or head= and target_class_id=")
        if self.head is not None or self.target_class_id is not None:
            object.__setattr__(self, "target_class_id", self._class_id())
        for name, known in CHOICES.items():
            _require(getattr(self, name) in known, name, getattr(self, name), f"one of {', '.join(known)}")
        for name in COUNTS:
            count = 0 if name == "grad_length" and self.grad_length is None else getattr(self, name)
            _require(isinstance(count, Integral) and count >= 0, name, count, "a whole number from 0")
        for name, (low, high) in RANGES.items():
            value, above = getattr(self, name), name in POSITIVE
            inside = math.isfinite(value) and low <= value <= high and (value > low or not above)
            least = "above" if above else "at least"
            most = "finite" if high == math.inf else f"at most {high}"
            _require(inside, name, value, f"{least} {low} and {most}")
        if self.decay and self.window_length == 0:
            raise ValueError("decay=True falls off inside a window: give window_length as well")

    def _class_id(self) -> int:
        """The number of the target class. ValueError without head or class, or for probabilities."""
        if self.head is None:
            raise ValueError(f"target_class_id={self.target_class_id!r} is a class of a head: give head= too")
        if self.target_class_id is None:
            raise ValueError(f"give target_class_id: {', '.join(self.head.classes)}, or a number from 0")
        if self.perturb == "probs":
            raise ValueError("perturb='probs' moves what a head does not see: use 'hidden' or 'past'")
        return self.head.class_id(self.target_class_id)

    # --- steering -------------------------------------------------------------------------------------------

    @contextmanager
    def on(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None = None) -> Iterator[None]:
        """While inside, a call of the model gives the logits [B, 1, V] to sample the next token from.

        They are log probabilities, fused and cut. `model.generate` and `su.generate` work as ever, without
        beams. Steers that are on are felt in every pass: PPLM then moves, and stays near, the steered model.
        tokenizer: for bags that hold words. Raises ValueError for a head of another width or a second PPLM
        (one takes bags and a head), and inside for beams, or a cache that was filled before where its tokens
        matter. A prompt may come in chunks; the last of them should have two tokens or more, or it passes for
        a token that was written.
        """
        model = hf.unwrapped(model)
        if isinstance(vars(model).get("forward"), _Writer):
            raise ValueError("another PPLM is on: give its bags and its head to one PPLM")
        if self.head is not None:
            self.head.require_width(model)
        head = None if self.head is None else deepcopy(self.head).to(model.device)
        with hf.stand_in(model, _Writer(replace(self.with_tokenizer(tokenizer), head=head), model)):
            yield

    def __call__(self, model: PreTrainedModel, *args: Any, generation_config: Any, **kwargs: Any) -> Any:
        """What `model.generate(…, custom_generate=pplm)` calls instead of its own decoding loop."""
        if generation_config.num_beams > 1:
            raise ValueError(f"num_beams={generation_config.num_beams}: PPLM samples, or searches greedily")
        with self.on(model):
            return hf.decode(model, *args, generation_config=generation_config, **kwargs)

    def with_tokenizer(self, tokenizer: PreTrainedTokenizerBase | None) -> "PPLM":
        """The same settings with the bags' words as token ids; ValueError if they are not and cannot be."""
        return replace(self, bags=tuple(bag.encoded(tokenizer) for bag in self.bags))

    @property
    def words(self) -> tuple[str, ...]:
        """The words of all bags."""
        return tuple(word for bag in self.bags for word in bag.words)

    def __mul__(self, factor: float) -> "PPLM":
        """The same settings with `factor` times the step size; ValueError if that is below 0."""
        return replace(self, stepsize=factor * self.stepsize)

    __rmul__ = __mul__

    def rule(self, norms: Tensor | None = None) -> Rule:
        """What makes steps of gradients. norms: [G, B] so far; those of bags alone are a running maximum."""
        if self.update == "adam":
            return Adam(self.stepsize)
        return Normalized(self.stepsize, self.gamma, running=self.head is None, norms=norms)


def _as_bag(bag: Bag | str | Path) -> Bag:
    return bag if isinstance(bag, Bag) else bag_of_words(bag)


def _require(holds: bool, name: str, value: Any, what: str) -> None:
    if not holds:
        raise ValueError(f"{name} must be {what}, not {value!r}")


# --- writing ----------------------------------------------------------------------------------------------


@dataclass
class _Text:
    """What is known of a batch of texts beside the plain cache."""

    ids: Tensor  # [B, T], NOTHING for padding
    prompt: Tensor  # lengths of the prompts, [B]
    hidden: Tensor | None = None  # plain last hidden states, [B, T, D], where a head needs them
    steered: hf.MovablePast | None = None  # keys and values as they were moved, once they were
    norms: Tensor | None = None  # [G, B]
    written: int = 0  # new tokens so far


class _Writer:
    """A model's forward pass that gives PPLM's next-token distribution; one text state for each cache."""

    def __init__(self, steer: PPLM, model: PreTrainedModel) -> None:
        self.steer, self.model = steer, model
        self.texts: WeakKeyDictionary[Cache, _Text] = WeakKeyDictionary()
        self.own: tuple[Cache, Tensor] | None = None  # of a text that comes without a cache, and its ids

    @torch.no_grad()
    def __call__(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool | None = None,
        **_: Any,
    ) -> CausalLMOutputWithPast:
        self._require_readable(input_ids, past_key_values)
        cache, ids = past_key_values, input_ids
        if use_cache is False:
            cache, ids = self._own_cache(ids)
        cache = hf.new_cache(self.model) if cache is None else cache
        total = cache.get_seq_length() + ids.shape[1]
        mask = ids.new_ones(len(ids), total) if attention_mask is None else attention_mask
        text = self._text(cache, ids, mask)
        with hf.batch(prompt_lengths=text.prompt if hf.known_batch().prompt_lengths is None else hf.known_batch().prompt_lengths):
            moment, logits = self._read(text, ids, mask, cache)
            scores = self._scores(text, moment, self._steered(text, moment, logits))
        text.written += 1
        kept = None if use_cache is False else cache
        return CausalLMOutputWithPast(logits=scores[:, None], past_key_values=kept)

    def _require_readable(self, ids: Tensor | None, cache: Cache | None) -> None:
        if torch.is_inference_mode_enabled():
            raise RuntimeError("PPLM takes gradients: use torch.no_grad(), not torch.inference_mode()")
        if ids is None:
            raise ValueError("PPLM reads token ids: give input_ids, not inputs_embeds")
        if cache is not None and not isinstance(cache, DynamicCache):
            raise ValueError(f"PPLM needs transformers' DynamicCache, not a {type(cache).__name__}")
        known = cache is None or cache in self.texts or cache.get_seq_length() == 0
        long = any(len(entry) > 1 for bag in self.steer.bags for entry in bag.entries)
        if not known and (long or self.steer.head is not None or self.steer.repetition_penalty != 1):
            raise ValueError(
                "past_key_values was filled before, without the tokens that a head, words of several tokens "
                "or a penalty look at: leave it out"
            )

    def _own_cache(self, ids: Tensor) -> tuple[Cache, Tensor]:
        """For a call that brings all of its text and no cache: one kept here, and the tokens new to it."""
        goes_on = self.own is not None and torch.equal(ids[:, :-1], self.own[1])
        self.own = (self.own[0] if goes_on else hf.new_cache(self.model), ids)
        return self.own[0], ids[:, -1:] if goes_on else ids

    def _text(self, cache: Cache, ids: Tensor, mask: Tensor) -> _Text:
        ids = ids.masked_fill(mask[:, -ids.shape[1] :] == 0, NOTHING)
        known = self.texts.get(cache)
        if known is None or cache.get_seq_length() == 0:
            cache.reorder_cache = _refuse_beams
            known = _Text(ids, mask.sum(dim=1))
        elif ids.shape[1] > 1:  # another chunk of the prompt: after the one before, nothing was written
            known = _Text(torch.cat([known.ids, ids], dim=1), mask.sum(dim=1), known.hidden)
        else:
            known.ids = torch.cat([known.ids, ids], dim=1)
        self.texts[cache] = known
        return known

    def _read(self, text: _Text, ids: Tensor, mask: Tensor, cache: Cache) -> tuple[Moment, Tensor]:
        """Take in new tokens, the last by itself, to keep the cache before it; the logits [B, V] after it.

        The last pass of a token cannot share a call with this one, since the steps between look at the plain
        distribution. The first step on the past could, as 2 B rows. With one step that saved 14 % of a token
        behind 30 others and nothing behind 250, where gradients go back through the plain rows as well.
        """
        hidden = [] if text.hidden is None else [text.hidden]
        if ids.shape[1] > 1:
            read = hf.forward(self.model, ids[:, :-1], mask[:, :-1], past_key_values=cache, use_cache=True)
            hidden.append(read.last_hidden_state.float())
        start = Moment(ids[:, -1:], mask, hf.forked(cache), cache, None, None)
        newest = newest_state(self.model, start, cache)
        hidden.append(newest[:, None].float())
        if self.steer.head is not None:
            text.hidden = torch.cat(hidden, dim=1)
        states = hidden[-1] if text.hidden is None else text.hidden
        wanted = [bag.wanted(text.ids) for bag in self.steer.bags]
        begun = begin_hidden(self.model, states) if self.steer.perturb == "hidden" else None
        logits = last_logits(self.model, newest) if begun is None else begun.logits.detach()
        log_probs = logits.log_softmax(dim=-1)
        return start._replace(hidden=states, log_probs=log_probs, wanted=wanted, begun=begun), logits

    def _steered(self, text: _Text, moment: Moment, plain: Tensor) -> Tensor:
        """Logits [B, V] of the next token after the steps, before the fusion; plain ones without steps."""
        steer = self.steer
        limit = math.inf if steer.grad_length is None else steer.grad_length
        active = steer.stepsize > 0 and steer.num_iterations > 0 and text.written < limit
        if steer.perturb == "past":
            return self._after_moving_the_past(text, moment, plain, active)
        if not active:
            return plain
        if steer.perturb == "hidden":
            found = perturb_hidden(steer, self.model, moment, norms=text.norms)
            logits = last_logits(self.model, (moment.hidden + found.deltas[0][0])[:, -1])
        else:
            found = perturb_probs(steer, moment, norms=text.norms)
            logits = log_of(moment.log_probs.exp() + found.deltas[0][0]) + plain.logsumexp(-1, keepdim=True)
        text.norms = found.rule.norms
        return logits

    def _after_moving_the_past(self, text: _Text, moment: Moment, plain: Tensor, active: bool) -> Tensor:
        if text.steered is None:
            if not active or moment.mask.shape[1] == 1:  # a text of one token has no past
                return plain
            text.steered = movable_past(self.steer, moment.before)
        if active:
            rule = self.steer.rule(text.norms)
            move_past(self.steer, self.model, moment, text.steered, rule)
            text.norms = rule.norms
        past = text.steered.reading()
        logits = next_token(self.model, moment, past)[1]
        if self.steer.persist:
            text.steered.keep(past)
        else:
            text.steered = None
        return logits

    def _scores(self, text: _Text, moment: Moment, logits: Tensor) -> Tensor:
        """Fused log probabilities [B, V], −inf where they are cut."""
        s = self.steer
        penalties = {"temperature": s.temperature, "repetition_penalty": s.repetition_penalty}
        ids = torch.where(text.ids == NOTHING, text.ids[:, -1:], text.ids)  # padding earns no penalty
        shaped = sampling_processors(moment.mask, top_p=1.0, **penalties)(ids, logits)
        mixed = fused(shaped.log_softmax(dim=-1), moment.log_probs, s.gm_scale)
        return sampling_processors(moment.mask, top_k=s.top_k, top_p=s.top_p)(ids, mixed)


def _refuse_beams(*_: Any) -> None:
    raise ValueError("PPLM does not search with beams: set num_beams=1")
