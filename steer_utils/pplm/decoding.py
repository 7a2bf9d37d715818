"""The forward pass that stands in for the model's while PPLM is on: one call, one steered distribution.

A call processes the new tokens with the unsteered model, takes the gradient steps of `steps`, processes the
last token again on what was moved, and fuses both distributions. The caller holds the unsteered KV cache.
Shapes: B batch rows, T tokens, D width, V vocabulary, G groups of moved tensors.
"""

from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from .. import hf, hooks
from .bags import NOTHING
from .steps import StepInputs, last_logits, log_of, read_last, start_hidden, with_newest


@dataclass
class SequenceState:
    """What is known of a batch of sequences beside the unsteered KV cache."""

    ids: Tensor  # [B, T], NOTHING for padding
    prompt_lengths: Tensor  # [B]
    hidden: Tensor | None = None  # unsteered last hidden states, [B, T, D], where a head needs them
    steered: Cache | None = None  # the KV cache as it was moved
    norms: Tensor | None = None  # gradient norms of earlier tokens, [G, B]
    written: int = 0  # new tokens so far


class PPLMForward:
    """Stands in for `model.forward`: log probabilities [B, 1, V] of the next token, fused and cut."""

    def __init__(self, model: PreTrainedModel, pplm: Any) -> None:
        self.model, self.pplm = model, pplm  # which is a `PPLM`
        # Each token takes a pass over the whole text where the architecture has a cache of its own kind.
        self.reads_anew, self.cache_name = hf.new_cache(model) is None, hf.cache_name(model)
        self.states: WeakKeyDictionary[Cache, SequenceState] = WeakKeyDictionary()
        self.own: tuple[Cache, Tensor] | None = None  # cache and text of the latest call with use_cache=False

    @hf.no_grad
    def __call__(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool | None = None,
        **others: Any,
    ) -> CausalLMOutputWithPast:
        cache = others.pop(self.cache_name, None) if past_key_values is None else past_key_values
        use_cache = False if self.reads_anew else use_cache
        self._require_supported(input_ids, attention_mask, cache, others)
        cache, ids = self._own_cache(input_ids) if use_cache is False else (cache, input_ids)
        cache = hf.new_cache(self.model) if cache is None else cache
        state, told = self._state_of(cache, ids, attention_mask), hooks.known_batch().prompt_lengths
        with hooks.batch(prompt_lengths=state.prompt_lengths if told is None else told):
            inputs = self._unsteered_pass(state, ids, cache)
            logits = self._steered_logits(state, inputs)
        state.written += 1
        kept = None if use_cache is False or self.cache_name not in hf.CACHE_NAMES[:2] else cache
        return CausalLMOutputWithPast(logits=self.pplm.fuse(logits, inputs)[:, None], past_key_values=kept)

    def _unsteered_pass(self, state: SequenceState, ids: Tensor, cache: Cache) -> StepInputs:
        """Process the new tokens on the cache; the last one alone, to have the cache before it."""
        mask, past, seen = (state.ids != NOTHING).long(), None, state.ids.shape[1] - ids.shape[1]
        hidden = [] if state.hidden is None else [state.hidden]
        if self.reads_anew:
            whole = state.ids.clamp(min=0)
            hidden = [hf.forward(self.model, whole, mask, use_cache=False).last_hidden_state.float()]
        else:
            for part in (part for part in (ids[:, :-1], ids[:, -1:]) if part.shape[1]):
                past, seen = hf.forked(cache), seen + part.shape[1]
                found = hf.forward(self.model, part, mask[:, :seen], past_key_values=cache, use_cache=True)
                hidden.append(found.last_hidden_state.float())
        if self.pplm.head is not None:
            state.hidden = torch.cat(hidden, dim=1)
        states = hidden[-1] if state.hidden is None else state.hidden
        start = start_hidden(self.model, states) if self.pplm.perturb == "hidden" else None
        logits = last_logits(self.model, states[:, -1]) if start is None else start[1].detach()
        return StepInputs(state.ids, mask, past, cache, states, logits, start)

    def _steered_logits(self, state: SequenceState, inputs: StepInputs) -> Tensor:
        """Logits [B, V] of the next token after the steps, before the fusion."""
        past, perturb = inputs.past if state.steered is None else state.steered, self.pplm.perturb
        immovable = perturb == "past" and past is not None and hf.is_empty(past)  # a text of one token
        if self.pplm.is_active(state.written) and not immovable:
            if perturb == "past" and (past is None or not hf.cached(past)):
                what = f"the cache of a {self.model.config.model_type!r} model has no keys and values"
                raise ValueError(f"{what} to move: perturb='hidden'")
            found = self.pplm.take_steps(self.model, inputs._replace(past=past), state.norms)
            state.norms = found.rule.norms
            if perturb == "hidden":
                return last_logits(self.model, found.moved[0][0][:, -1])
            if perturb == "probs":
                return log_of(found.moved[0][0]) + inputs.logits.logsumexp(dim=-1, keepdim=True)
            past = with_newest(past, found.moved)
        elif state.steered is None:
            return inputs.logits
        state.steered = past if self.pplm.persist else None
        return read_last(self.model, inputs, past)[1]

    def _require_supported(
        self, ids: Tensor | None, mask: Tensor | None, cache: Cache | None, others: dict[str, Any]
    ) -> None:
        if torch.is_inference_mode_enabled():
            raise RuntimeError("PPLM takes gradients: use torch.no_grad(), not torch.inference_mode()")
        if ids is None:
            raise ValueError("PPLM reads token ids: give input_ids, not inputs_embeds")
        for name in ("labels", "output_hidden_states", "output_attentions"):
            if others.get(name) is not None and others[name] is not False:
                raise ValueError(f"while PPLM is on, a call gives next-token logits only: leave out {name}")
        if self.reads_anew and mask is not None and mask.shape[1] > ids.shape[1]:
            kind = self.model.config.model_type
            raise ValueError(f"PPLM cannot share the cache of a {kind!r} model: call it with use_cache=False")
        if others.get("logits_to_keep", 1) > 1:
            raise ValueError("PPLM steers a token a call: no prompt_lookup_num_tokens, no assistant_model")
        if not (cache is None or isinstance(cache, DynamicCache)):
            raise ValueError(f"PPLM needs transformers' DynamicCache, not a {type(cache).__name__}")
        if not (cache is None or cache in self.states or hf.is_empty(cache)):
            raise ValueError("past_key_values was filled before PPLM, which needs its tokens: leave it out")

    def _own_cache(self, ids: Tensor) -> tuple[Cache, Tensor]:
        """KV cache for calls with use_cache=False, which bring the whole text, and the tokens new to it."""
        goes_on = self.own is not None and torch.equal(ids[:, :-1], self.own[1])
        self.own = (self.own[0] if goes_on else hf.new_cache(self.model) or DynamicCache(), ids)
        return self.own[0], ids[:, -1:] if goes_on else ids

    def _state_of(self, cache: Cache, ids: Tensor, mask: Tensor | None) -> SequenceState:
        """The state that belongs to a cache, with the new tokens."""
        if mask is not None:
            ids = ids.masked_fill(mask[:, -ids.shape[1] :] == 0, NOTHING)
        known, told = self.states.get(cache), hooks.known_batch().prompt_lengths
        if known is None or (hf.is_empty(cache) and not self.reads_anew):
            cache.reorder_cache = _refuse_beams
            known = SequenceState(ids, (ids != NOTHING).sum(dim=1))
        else:
            known.ids = torch.cat([known.ids, ids], dim=1)
            lengths = (known.ids != NOTHING).sum(dim=1)
            in_prompt = told is not None and lengths.max() <= torch.as_tensor(told).max()
            if in_prompt or ids.shape[1] > 1:  # a chunk of it; what followed the one before was not written
                known = SequenceState(known.ids, lengths, known.hidden)
        self.states[cache] = known
        return known


def _refuse_beams(*_: Any) -> None:
    raise ValueError("PPLM does not search with beams: set num_beams=1")
