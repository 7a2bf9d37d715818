"""How transformers builds its models: decoder blocks, LM head, KV cache, absolute positions, hooks.

No other file touches transformers' internals. When transformers moves something, only this file changes.
Shapes: B batch, T positions of this pass, P cached positions, D width, V vocabulary, H attention heads.
"""

import copy
import inspect
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass, replace
from functools import partial, wraps
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import Cache, DynamicCache, PreTrainedModel

LOGITS_AT_ONCE = 2**25  # 128 MB in float32, of which a training step holds several
# The two modules of a block whose outputs are added to the residual stream, for each config.model_type. Other
# architectures may scale or normalise what they add, so there only resid_pre and resid_post are hooked.
_attn_mlp, _self_attn_mlp = ("attn", "mlp"), ("self_attn", "mlp")
_normed = ("post_attention_layernorm", "post_feedforward_layernorm")
BRANCHES = {
    **dict.fromkeys(("gpt2", "gptj", "gpt_neo"), _attn_mlp),
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "gemma", "phi3", "smollm3"), _self_attn_mlp),
    **dict.fromkeys(("gemma2", "gemma3_text", "olmo2"), _normed),
    "gpt_neox": ("attention", "mlp"),
    "opt": ("self_attn", "fc2"),
}

_unsteered: ContextVar[bool] = ContextVar("unsteered", default=False)


def unwrapped(model: nn.Module) -> PreTrainedModel:
    """The transformers model inside a TransformerLens `TransformerBridge`; any other model as it is.

    A bridge wraps the modules of a transformers model in place, so hooks on one act on the other too.
    """
    return getattr(model, "original_model", model)


def decoder(model: PreTrainedModel) -> nn.Module:
    """The module that owns the decoder blocks and takes ids, mask and KV cache."""
    return model.get_decoder()


def blocks(model: PreTrainedModel) -> nn.ModuleList:
    """The decoder blocks, in order: the decoder's one `nn.ModuleList` with as many entries as layers.

    ValueError if there is not exactly one.
    """
    layers = model.config.get_text_config().num_hidden_layers
    lists = [part for part in decoder(model).children() if isinstance(part, nn.ModuleList)]
    found = [part for part in lists if len(part) == layers]
    if len(found) != 1:
        raise ValueError(
            f"cannot find the decoder blocks of a {model.config.model_type!r} model: expected one ModuleList "
            f"of {layers} blocks in its {type(decoder(model)).__name__}, which has lists of "
            f"{[len(part) for part in lists]}"
        )
    return found[0]


def block(model: PreTrainedModel, layer: int) -> nn.Module:
    """Decoder block `layer`, counted from 0. ValueError for a layer beyond the model."""
    layers = blocks(model)
    if not 0 <= layer < len(layers):
        raise ValueError(f"layer {layer} is beyond the model, which has blocks 0 to {len(layers) - 1}")
    return layers[layer]


def lm_head(model: PreTrainedModel) -> nn.Module:
    """The LM head: the linear map from last hidden states [..., D] to scores [..., V]; see `logits`."""
    return model.get_output_embeddings()


def logits(model: PreTrainedModel, hidden: Tensor) -> Tensor:
    """Logits [..., V] of last hidden states [..., D]; see `capped`."""
    return capped(model, lm_head(model)(hidden))


def capped(model: PreTrainedModel, scores: Tensor) -> Tensor:
    """Logits of the LM head's scores [..., V], which Cohere and Granite scale and Gemma 2 softly caps."""
    names = ("logit_scale", "logits_scaling", "final_logit_softcapping")
    factor, divisor, cap = (getattr(model.config, name, None) for name in names)
    scores = scores if factor is None else factor * scores
    scores = scores if divisor is None else scores / divisor
    return scores if cap is None else cap * torch.tanh(scores / cap)


def width(model: PreTrainedModel) -> int:
    """D, the width of the residual stream (OPT-350m's word embeddings are narrower)."""
    return model.config.hidden_size


def last_width(model: PreTrainedModel) -> int:
    """The width of the last hidden states (OPT-350m maps its residual stream to that of its embeddings)."""
    return getattr(model.config, "word_embed_proj_dim", width(model))


def untied(model: PreTrainedModel) -> PreTrainedModel:
    """A copy that shares every weight, and whose LM head may be given weights of its own and saved.

    Steers that are on act on the given model only, not on the copy.
    """
    new = copy.deepcopy(model, {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())})
    new.config.tie_word_embeddings = False
    if hasattr(vars(new).get("forward"), "stands_in"):  # it would run the given model
        del vars(new)["forward"]
    for module in new.modules():
        for hooks in (module._forward_hooks, module._forward_pre_hooks):
            ours = [k for k, hook in hooks.items() if getattr(hook, "__module__", "").startswith(__package__)]
            for key in ours:
                del hooks[key]
    return new


def new_cache(model: PreTrainedModel) -> Cache:
    """An empty KV cache that grows with each pass; it knows which layers have sliding attention."""
    return DynamicCache(config=model.config)


def cached(cache: Cache) -> list[tuple[Tensor, Tensor]]:
    """Keys and values of each layer, [B, H, P, D/H] each; the tensors themselves, not copies."""
    return [(layer.keys, layer.values) for layer in cache.layers]


def with_cached(cache: Cache, tensors: Sequence[tuple[Tensor, Tensor]]) -> Cache:
    """A copy of the KV cache that holds other keys and values, of the same shapes.

    Gradients flow to the tensors. ValueError if their number or a shape differs.
    """
    held = cached(cache)
    if [(k.shape, v.shape) for k, v in tensors] != [(k.shape, v.shape) for k, v in held]:
        raise ValueError(
            f"the cache holds {len(held)} layers of keys and values {[tuple(t.shape) for t in held[0]]}; "
            f"given {len(tensors)} layers, first {[tuple(t.shape) for t in tensors[0]] if tensors else None}"
        )
    new = forked(cache)
    for layer, (keys, values) in zip(new.layers, tensors, strict=True):
        layer.keys, layer.values = keys, values
    return new


def forked(cache: Cache) -> Cache:
    """A KV cache that starts as the given one and grows on its own; they share their tensors."""
    new = copy.copy(cache)
    new.layers = [copy.copy(layer) for layer in cache.layers]
    return new


def repeated(cache: Cache, times: int) -> Cache:
    """A copy of the KV cache with each batch row repeated `times` times: row 0, row 0, …, row 1, …"""
    new = copy.deepcopy(cache)
    new.batch_repeat_interleave(times)
    return new


def token_positions(
    tokens: int, past: int = 0, attention_mask: Tensor | None = None, position_ids: Tensor | None = None
) -> Tensor:
    """The absolute position of each token of a pass, [B, T] or [1, T]: BOS is 0, padding is −1.

    tokens: T, the length of this pass. past: P, the number of cached positions, padding included.
    attention_mask: [B, P + T], 1 for text and 0 for padding on either side. A mask already expanded for
    attention (4-D, or one for each kind of layer) does not show padding; then position_ids [B, T] are used.
    """
    if isinstance(attention_mask, Tensor) and attention_mask.ndim == 2:
        text = attention_mask.bool()
        return torch.where(text, text.cumsum(-1) - 1, -1)[:, past : past + tokens]
    return torch.arange(past, past + tokens)[None] if position_ids is None else position_ids


def _past(call: dict[str, Any]) -> int:
    """P, the number of positions in the KV cache of a call."""
    cache = call.get("past_key_values")
    return 0 if cache is None else cache.get_seq_length()


@dataclass(frozen=True)
class Batch:
    """What the caller knows about the texts in a batch, and a forward pass cannot see.

    prompt_lengths: tokens of each prompt, BOS included, one number or [B]; None: the first pass over a text
    is its whole prompt. texts: which of a job's texts the batch rows are; of: how many the job has.
    """

    prompt_lengths: int | Tensor | None = None
    texts: Sequence[int] | None = None
    of: int = 0


_batch: ContextVar[Batch] = ContextVar("batch", default=Batch())  # noqa: B039, a Batch is immutable


@contextmanager
def _set(variable: ContextVar, value: Any) -> Iterator[None]:
    token = variable.set(value)
    try:
        yield
    finally:
        variable.reset(token)


def batch(**known: Any) -> AbstractContextManager[None]:
    """While inside, this is known of the batch that the model reads; see `Batch`."""
    return _set(_batch, replace(_batch.get(), **known))


def unsteered() -> AbstractContextManager[None]:
    """While inside, steers that are on do nothing: for a pass of the unsteered model."""
    return _set(_unsteered, True)


def known_batch() -> Batch:
    """What the contexts of `batch` say."""
    return _batch.get()


@dataclass
class _Positions:
    """Follows the decoder from pass to pass: absolute positions [B, T] of this pass, prompt lengths [B]."""

    shortest: int  # prompt that is allowed, in tokens
    positions: Tensor | None = None
    first_lengths: Tensor | None = None  # of the prompts, as the first pass has them
    start: Tensor | None = None  # the ids of the first pass, [B, T₀]
    shape: torch.Size | None = None  # of the ids of this pass, (B, T)

    def follow(self, call: dict[str, Any]) -> None:
        """Take in one call of the decoder. ValueError for a new prompt of fewer than `shortest` tokens."""
        ids, past = call.get("input_ids"), _past(call)
        new = past == 0 and not self._repeats(call, ids)
        given = call["inputs_embeds"] if ids is None else ids
        told = call.get("attention_mask"), call.get("position_ids")
        self.shape = given.shape[:2]
        self.positions = token_positions(given.shape[1], past, *told).to(given.device)
        if new or self.first_lengths is None:  # the first chunk of a text may be padding alone: length 0
            self.start, self.first_lengths = ids, self.positions.amax(dim=-1).clamp(min=0) + 1
        if new and (length := int(self.lengths.min())) < self.shortest:
            raise ValueError(
                f"a prompt of {length} tokens (BOS included) is shorter than an addition of {self.shortest}: "
                f"lengthen the prompt or shorten the addition. If it comes in chunks: "
                f"with steer_utils.hf.batch(prompt_lengths=…)"
            )

    @property
    def lengths(self) -> Tensor:
        """Tokens of each prompt, [B] or [1]: as told by `batch`, else as in the first pass."""
        told = known_batch().prompt_lengths
        lengths = self.first_lengths if told is None else torch.as_tensor(told, device=self.positions.device)
        return lengths.reshape(-1).repeat_interleave(max(1, self.shape[0] // lengths.numel()))

    def _repeats(self, call: dict[str, Any], ids: Tensor | None) -> bool:
        """Whether this is a later step of decoding without a KV cache, which repeats the text so far."""
        if call.get("use_cache") is not False or ids is None or self.start is None:
            return False
        grown = ids.shape == (self.shape[0], self.shape[1] + 1)
        return grown and torch.equal(ids[:, : self.start.shape[1]], self.start)


Edit = Callable[[Tensor, Tensor, Tensor], Tensor]


class Place(NamedTuple):
    layer: int
    kind: str


def place(act_name: str) -> Place:
    """Parse a TransformerLens hook name such as "blocks.6.hook_resid_pre".

    resid_pre: the residual stream [B, T, D] that enters the block; resid_post: that leaves it; attn_out,
    mlp_out: what attention and MLP add to it. ValueError for any other name.
    """
    match = re.fullmatch(r"blocks\.(\d+)\.hook_(resid_pre|resid_post|attn_out|mlp_out)", str(act_name))
    if match is None:
        raise ValueError(
            f"unknown hook {act_name!r}: give a layer such as 6, or 'blocks.6.hook_resid_pre'; instead of "
            f"resid_pre also resid_post, attn_out, mlp_out"
        )
    return Place(int(match[1]), match[2])


def _register(model: PreTrainedModel, act_name: str, change: Callable[[Tensor], Tensor]) -> RemovableHandle:
    """Hook `change` into the forward pass; its result replaces the activation."""
    layer, kind = place(act_name)
    module = block(model, layer)

    def before(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        if args:
            return (change(args[0]), *args[1:]), kwargs
        return args, kwargs | {"hidden_states": change(kwargs["hidden_states"])}

    def after(module: nn.Module, args: tuple, output: Any) -> Any:
        return (change(output[0]), *output[1:]) if isinstance(output, tuple) else change(output)

    if kind == "resid_pre":
        return module.register_forward_pre_hook(before, with_kwargs=True)
    if kind != "resid_post":
        if (names := BRANCHES.get(model.config.model_type)) is None:
            raise ValueError(
                f"{act_name!r} is not known for {model.config.model_type!r} models: use hook_resid_pre or "
                f"hook_resid_post"
            )
        module = module.get_submodule(names[kind == "mlp_out"])
    return module.register_forward_hook(after)


@contextmanager
def edit_activation(
    model: PreTrainedModel, act_name: str, edit: Edit, *, shortest: int = 1
) -> Iterator[None]:
    """While inside, `edit(activation [B, T, D], positions [B, T], lengths [B])` replaces an activation.

    positions: see `token_positions`; lengths: tokens of each prompt. The hooks are removed at the end, after
    an exception too. ValueError for a prompt of fewer than `shortest` tokens.
    """
    module, text = decoder(model), _Positions(shortest)
    names = inspect.signature(module.forward)

    def note(module: nn.Module, args: tuple, kwargs: dict) -> None:
        if not _unsteered.get():
            text.follow(names.bind_partial(*args).arguments | kwargs)

    def change(value: Tensor) -> Tensor:
        if _unsteered.get():
            return value
        shaped = value.reshape(*text.shape, -1)  # OPT's MLP knows no rows: it gives [B·T, D]
        return edit(shaped, text.positions, text.lengths).reshape(value.shape)

    with ExitStack() as stack:
        stack.callback(_register(model, act_name, change).remove)
        stack.callback(module.register_forward_pre_hook(note, with_kwargs=True).remove)
        yield


@contextmanager
def edit_lm_head(
    model: PreTrainedModel, edit: Callable[[Tensor], Tensor], *, output: bool = False
) -> Iterator[None]:
    """While inside, `edit` changes the LM head's input [N, …, D] or, with `output`, its output [N, …, V].

    Tied input embeddings stay as they are. The hook is removed at the end, after an exception too.
    """

    def change(module: nn.Module, args: tuple[Tensor], scores: Tensor | None = None) -> Tensor:
        value = scores if output else args[0]
        return value if _unsteered.get() else edit(value)

    head = lm_head(model)
    with head.register_forward_hook(change) if output else head.register_forward_pre_hook(change):
        yield


def for_batch_rows(values: Tensor, count: int) -> Tensor:
    """The values [B, …] of each of `count` batch rows; several rows of one text follow one another.

    ValueError if they do not come out even, or if `batch` knows of another number of texts.
    """
    known = known_batch()
    if known.texts is not None:
        if len(values) != known.of:
            raise ValueError(f"values for {len(values)} texts do not fit {known.of} texts: give a row each")
        values = values[list(known.texts)]
    if count % len(values):
        raise ValueError(f"values for {len(values)} texts do not fit a batch of {count} rows")
    return values.repeat_interleave(count // len(values), dim=0)


class _Enough(Exception):
    """Ends a forward pass whose remaining blocks are not needed."""


@torch.no_grad()
def activations(
    model: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor, act_names: Iterable[str]
) -> dict[str, Tensor]:
    """The activations of the unsteered model at the given hooks, {act_name: [B, T, D]}.

    input_ids, attention_mask: [B, T]. The pass ends at the deepest hook.
    """
    wanted, found = set(act_names), {}

    def keep(act_name: str, value: Tensor) -> Tensor:
        found[act_name] = value
        if len(found) == len(wanted):
            raise _Enough
        return value

    with ExitStack() as stack, unsteered(), suppress(_Enough):
        for name in wanted:
            stack.callback(_register(model, name, partial(keep, name)).remove)
        forward(model, input_ids, attention_mask)
    return {name: value.reshape(*input_ids.shape, -1) for name, value in found.items()}


def forward(model: PreTrainedModel, input_ids: Tensor | None, attention_mask: Tensor, **kwargs: Any) -> Any:
    """One pass through the decoder without the LM head; returns `last_hidden_state` [B, T, D] and the cache.

    input_ids: [B, T], or None with `inputs_embeds` [B, T, D]. attention_mask: [B, P + T], where
    `past_key_values`, if given, holds P positions.
    Positions are passed by hand: outside `generate`, GPT-2 numbers them without looking at the mask.
    """
    tokens = (kwargs["inputs_embeds"] if input_ids is None else input_ids).shape[1]
    places = token_positions(tokens, _past(kwargs), attention_mask).clamp(min=0)
    return model.base_model(input_ids, attention_mask=attention_mask, position_ids=places, **kwargs)


def embed_softly(model: PreTrainedModel, probabilities: Tensor) -> Tensor:
    """The expected input embedding [..., D] under probabilities [..., V], for `inputs_embeds`."""
    embedding = model.get_input_embeddings()
    scale = getattr(embedding, "embed_scale", 1.0)  # Gemma's module multiplies what it looks up
    return scale * (probabilities.to(embedding.weight.dtype) @ embedding.weight)


@contextmanager
def stand_in(model: PreTrainedModel, forward: Callable[..., Any]) -> Iterator[None]:
    """While inside, `forward` replaces the model's forward pass, in `model.generate` too; see `unsteered`."""
    names, own = vars(model), model.forward
    before = names.get("forward")  # where accelerate spreads a model over devices, it has set one

    @wraps(own)  # generate looks at the signature
    def either(*args: Any, **kwargs: Any) -> Any:
        return (own if _unsteered.get() else forward)(*args, **kwargs)

    names["forward"], either.stands_in = either, True
    try:
        yield
    finally:
        names.pop("forward")
        if before is not None:
            names["forward"] = before


def has_stand_in(model: PreTrainedModel) -> bool:
    """Whether a call of the model goes to a forward pass given to `stand_in`; never inside `unsteered`."""
    return getattr(vars(unwrapped(model)).get("forward"), "stands_in", False) and not _unsteered.get()


def decode(model: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
    """Sampling or greedy search as `model.generate` runs it: what `custom_generate` may hand on to."""
    return model._sample(*args, **kwargs)
