"""How transformers builds its models: decoder blocks, LM head, logits, KV cache, positions.

No other file touches transformers' internals. When transformers moves something, only this file changes. What
cannot be looked up is found out by `probing`. How a steer reaches into a pass is in `hooks`.
Shapes: B batch, T positions of this pass, P cached positions, D width, V vocabulary, H attention heads.
"""

import copy
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial, wraps
from typing import Any, Self

import torch
import transformers
from torch import Tensor, nn
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.cache_utils import CacheLayerMixin, LinearAttentionCacheLayerMixin

LOGITS_AT_ONCE = 2**25  # 128 MB in float32, of which a training step holds several
# The modules whose outputs attention and MLP add to the residual stream, in the order of trying.
BRANCHES = [("post_attention_layernorm", "post_feedforward_layernorm"), ("self_attn", "fc2")]
BRANCHES += [(attention, "mlp") for attention in ("attn", "self_attn", "attention", "self_attention")]
# Of the argument that holds a model's cache; transformers 5.24 calls the first one "cache".
CACHE_NAMES = ("past_key_values", "cache", "cache_params", "state")


def inner(model: nn.Module) -> nn.Module:
    """The model inside a TransformerLens bridge, a PEFT model or a compiled one; any other as it is.

    Such wrappers keep or change a transformers model in place, so hooks on one act on the other too.
    """
    model = getattr(model, "_orig_mod", model)  # torch.compile
    model = getattr(model, "original_model", model)  # TransformerBridge
    return model.get_base_model() if hasattr(model, "get_base_model") else model  # PEFT


def unwrapped(model: nn.Module) -> PreTrainedModel:
    """The `inner` model. ValueError unless it is a decoder-only language model of transformers."""
    adapter = getattr(model, "active_peft_config", None)
    if adapter is not None and adapter.is_prompt_learning:
        kind = adapter.peft_type.value
        raise ValueError(f"{kind} puts tokens in front of every text, which steers would take for its own")
    model = inner(model)
    if why := not_decoder_only(model):
        raise ValueError(f"{type(model).__name__} is no decoder-only language model: {why}")
    return model


def require_evaluation(model: PreTrainedModel) -> None:
    """ValueError in training mode."""
    if model.training:
        raise ValueError("the model is in training mode, with dropout and no KV cache: call model.eval()")


def not_decoder_only(model: nn.Module) -> str:
    """Why a model does not continue texts from left to right, in words; "" if it does."""
    if not isinstance(model, PreTrainedModel):
        return "it is no model of transformers"
    if model.config.is_encoder_decoder:
        return "it has an encoder"
    if not model.can_generate():
        return "it has no head that predicts the next token"
    if model.config.model_type == "xlnet":
        return "it predicts tokens in any order"
    told = getattr(model.config, "is_decoder", None)  # GPT-NeoX says False, too
    masked = type(model.config) in transformers.MODEL_FOR_MASKED_LM_MAPPING and not told
    attention = {part.is_causal for part in model.modules() if hasattr(part, "is_causal")}
    if masked or (told is False and attention == {False}):
        return "it reads from both sides, unless config.is_decoder is True"
    return ""


def _base(model: PreTrainedModel) -> tuple[str, nn.Module]:
    """Name and module of the part below the LM head (Llama 4 and Mllama give another name for it)."""
    name = model.base_model_prefix if model.base_model_prefix in model._modules else "model"
    return name, model.get_submodule(name)


@contextmanager
def temporarily(do: Callable[[], Any], undo: Callable[[], Any]) -> Iterator[None]:
    """While inside, `do` is done. It is undone twice, as an interrupt may come the first time."""
    try:
        try:
            do()
            yield
        finally:
            undo()
    finally:
        undo()


@contextmanager
def nested(contexts: Sequence[Callable[[], AbstractContextManager[Any]]]) -> Iterator[None]:
    """While inside, all of them are on. An ExitStack that is interrupted would forget those that are left."""
    if not contexts:
        yield
        return
    with contexts[0](), nested(contexts[1:]):
        yield


def hooked(
    module: nn.Module, hook: Callable[..., Any], *, before: bool = False, **how: bool
) -> AbstractContextManager[None]:
    """While inside, a module calls `hook` after each pass, or before it; `how`: torch's other options."""
    register = module.register_forward_pre_hook if before else module.register_forward_hook

    def undo():  # not by torch's handle, which an interrupt may keep from us
        tables = [table for name, table in vars(module).items() if name.endswith(("_hooks", "_with_kwargs"))]
        for key in [key for table in tables for key, one in table.items() if one is hook]:
            for table in tables:
                table.pop(key, None)

    return temporarily(partial(register, hook, **how), undo)


def evaluating(model: PreTrainedModel) -> AbstractContextManager[None]:
    """While inside, the model is in evaluation mode."""
    learning = [part for part in model.modules() if part.training]

    def undo():
        for part in learning:
            part.training = True

    return temporarily(model.eval, undo)


def no_grad(function: Callable[..., Any]) -> Callable[..., Any]:
    """`torch.no_grad` of a function; torch's own may stay on after an interrupt."""

    @wraps(function)
    def call(*args, **kwargs):
        before = torch.is_grad_enabled()
        try:
            with torch.no_grad():
                return function(*args, **kwargs)
        finally:
            torch.set_grad_enabled(before)

    return call


def decoder(model: PreTrainedModel) -> nn.Module:
    """The module that owns the decoder blocks and takes ids, mask and KV cache."""
    found = model.get_decoder()
    # Llama 4 answers itself, ModernBERT its LM head.
    return _base(model)[1] if found is model or isinstance(found, nn.Linear) else found


def blocks(model: PreTrainedModel) -> nn.ModuleList:
    """The decoder's `nn.ModuleList` with an entry for each layer, or its only one; else ValueError."""
    layers = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    lists = [part for part in decoder(model).children() if isinstance(part, nn.ModuleList)]
    found = [part for part in lists if len(part) == layers] or lists  # some configs count an encoder's layers
    if len(found) != 1:
        where = f"{type(decoder(model)).__name__}, which has lists of {[len(part) for part in lists]}"
        what = f"cannot find the decoder blocks of a {model.config.model_type!r} model"
        raise ValueError(f"{what}: expected one ModuleList of {layers} blocks in its {where}")
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


class _Decoder(tuple):
    """Stands where a model keeps its decoder, and is what it gives for any text: (last hidden states,)."""

    module: nn.Module
    last_hidden_state = property(lambda self: self[0])

    def __call__(self, *_: Any, **__: Any) -> Self:
        return self

    def __getattr__(self, name: str) -> Any:  # OPT calls model.decoder; what else was found is None
        return self if name == "decoder" else getattr(self.module, name, None)


def logits(model: PreTrainedModel, hidden: Tensor) -> Tensor:
    """The model's logits [..., V] of last hidden states [..., D], scaled and capped as it does.

    Its own forward pass makes them, in a shallow copy of the model whose decoder finds these states.
    """
    shell, (name, base) = copy.copy(model), _base(model)
    found = _Decoder((hidden.reshape(-1, 1, hidden.shape[-1]),))
    found.module = base
    vars(shell)["_modules"] = model._modules | {name: found}
    ids = torch.zeros(found[0].shape[:2], dtype=torch.long, device=hidden.device)
    return type(model).forward(shell, ids).logits.reshape(*hidden.shape[:-1], -1)


def width(model: PreTrainedModel) -> int:
    """D, the width of the residual stream (OPT-350m's word embeddings are narrower)."""
    return model.config.get_text_config().hidden_size


def last_width(model: PreTrainedModel) -> int:
    """The width of the last hidden states (OPT-350m maps its residual stream to that of its embeddings)."""
    return getattr(model.config, "word_embed_proj_dim", width(model))


def vocabulary(model: PreTrainedModel) -> int:
    """How many token ids the model can read."""
    return model.get_input_embeddings().weight.shape[0]


def longest_text(model: PreTrainedModel) -> float:
    """How many positions the model has; inf if it has no limit, or stretches its own."""
    config = model.config.get_text_config()
    stretched = "dynamic" in str(getattr(config, "rope_parameters", None))
    limit = getattr(config, "max_position_embeddings", None) or getattr(config, "max_seq_len", None)
    return torch.inf if limit is None or stretched else limit


def input_device(model: PreTrainedModel) -> torch.device:
    """Where token ids go: that of the embeddings, also when accelerate keeps the weights elsewhere."""
    embedding = model.get_input_embeddings()
    where = getattr(getattr(embedding, "_hf_hook", None), "execution_device", None)
    return embedding.weight.device if where is None else torch.device(where)


def untied(model: PreTrainedModel) -> PreTrainedModel:
    """A copy that shares every weight, unsteered; its LM head may be given weights of its own and saved."""
    new = copy.deepcopy(model, {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())})
    new.config.get_text_config().tie_word_embeddings = new.config.tie_word_embeddings = False
    for module in new.modules():
        for hooks in (module._forward_hooks, module._forward_pre_hooks):
            ours = [k for k, hook in hooks.items() if getattr(hook, "__module__", "").startswith(__package__)]
            for key in ours:
                del hooks[key]
    return new


def new_cache(model: PreTrainedModel) -> Cache | None:
    """An empty KV cache that grows with each pass; None for architectures with a cache of their own kind."""
    in_modules = hasattr(model, "_setup_cache")  # RecurrentGemma
    usual = cache_name(model) and not in_modules and model._supports_default_dynamic_cache()
    return DynamicCache(config=model.config) if usual else None


def cache_name(model: PreTrainedModel) -> str:
    """The argument under which the model takes its cache; "" for the first GPT, which takes none."""
    names = inspect.signature(decoder(model).forward).parameters
    return next((name for name in CACHE_NAMES if name in names), "")


def counts_tokens(cache: Any) -> bool:
    """Whether a cache holds keys and values, so that its length says how many tokens were read."""
    return any(isinstance(layer, CacheLayerMixin) for layer in getattr(cache, "layers", ()))


def holds_states(cache: Any) -> bool:
    """Whether a cache remembers a text in states that each token overwrites, beside keys and values."""
    return any(isinstance(layer, LinearAttentionCacheLayerMixin) for layer in getattr(cache, "layers", ()))


def is_empty(cache: Cache) -> bool:
    """Whether no token was read into a cache."""
    if counts_tokens(cache) or not cache.layers:
        return int(cache.get_seq_length()) == 0
    return not cache.has_previous_state()


def cached(cache: Cache) -> list[tuple[Tensor, Tensor]]:
    """Keys and values of each layer that has them, [B, H, P, D/H] each; the tensors themselves, no copies."""
    return [(layer.keys, layer.values) for layer in _with_keys(cache)]


def _with_keys(cache: Cache) -> list[Any]:
    return [one for one in cache.layers if getattr(one, "keys", None) is not None and one.keys.numel()]


def with_cached(cache: Cache, tensors: Sequence[tuple[Tensor, Tensor]]) -> Cache:
    """A copy of the KV cache with other tensors, to which gradients flow; ValueError for other shapes."""
    held = cached(cache)
    if [(k.shape, v.shape) for k, v in tensors] != [(k.shape, v.shape) for k, v in held]:
        given = [tuple(t.shape) for t in tensors[0]] if tensors else None
        what = f"the cache holds {len(held)} layers of keys and values {[tuple(t.shape) for t in held[0]]}"
        raise ValueError(f"{what}; given {len(tensors)} layers, first {given}")
    new = forked(cache)
    for layer, (keys, values) in zip(_with_keys(new), tensors, strict=True):
        layer.keys, layer.values = keys, values
    return new


def forked(cache: Cache) -> Cache:
    """A cache that starts as the given one and grows on its own.

    They share keys and values, to which a pass appends; states, which it overwrites, are copied.
    """
    new = copy.copy(cache)
    new.layers = [copy.copy(layer) for layer in cache.layers]
    for layer in new.layers:
        states = {name: value for name, value in vars(layer).items() if isinstance(value, dict)}
        for name, value in states.items():
            setattr(layer, name, {k: v.clone() if isinstance(v, Tensor) else v for k, v in value.items()})
    return new


def gradients_through(cache: Cache) -> AbstractContextManager[Any]:
    """While inside, gradients flow through a pass on a cache, also one that overwrites states in place."""

    def keep(tensor):
        whole = tensor if tensor._base is None else tensor._base
        return tensor if isinstance(whole, nn.Parameter) else tensor.clone()

    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda kept: kept)
    return hooks if holds_states(cache) else nullcontext()


def repeated(cache: Cache, batch: int, times: int) -> Cache:
    """A copy of the cache with each of `batch` rows repeated `times` times: row 0, row 0, …, row 1, …"""
    new = copy.deepcopy(cache)
    new.reorder_cache(torch.arange(batch).repeat_interleave(times))
    return new


def token_positions(
    tokens: int,
    past: int = 0,
    attention_mask: Tensor | Mapping[str, Tensor] | None = None,
    position_ids: Tensor | None = None,
) -> Tensor:
    """The absolute position of each token of a pass, [B, T] or [1, T]: BOS is 0, padding is −1.

    tokens: T, the length of this pass. past: P, the number of cached positions, padding included.
    attention_mask: [B, P + T], 1 for text and 0 for padding on either side. A mask already expanded for
    attention (4-D, or one for each kind of layer) does not show padding; then position_ids [B, T] are used.
    """
    if isinstance(attention_mask, Tensor) and attention_mask.ndim == 2:
        text = attention_mask.bool()
        return torch.where(text, text.cumsum(-1) - 1, -1)[:, past : past + tokens]
    if position_ids is None:
        return torch.arange(past, past + tokens)[None]
    return position_ids if position_ids.ndim == 2 else position_ids[0]  # with pictures: of the text


def past_length(call: dict[str, Any], tokens: int, seen: int = 0) -> int:
    """P, the number of cached positions before the T tokens of a call of a decoder.

    seen: columns of the text in the calls before, which count where a cache of states does not.
    """
    mask = call.get("attention_mask")
    if isinstance(mask, Tensor) and mask.ndim == 2:
        return mask.shape[1] - tokens
    cache = next((call[name] for name in CACHE_NAMES if call.get(name) is not None), None)
    if cache is None or (isinstance(cache, Cache) and is_empty(cache)):
        return 0
    return int(cache.get_seq_length()) if counts_tokens(cache) else seen


def forward(model: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor | None, **kwargs: Any) -> Any:
    """One pass through the decoder without the LM head; returns `last_hidden_state` [B, T, D] and the cache.

    input_ids: [B, T]. attention_mask: [B, P + T], where `past_key_values`, if given, holds P positions.
    ValueError in training mode, and for a text longer than the model's positions. These are passed by hand:
    outside `generate`, GPT-2 ignores the mask in counting.
    """
    require_evaluation(model)
    tokens = input_ids.shape[1]
    past = past_length(kwargs | {"attention_mask": attention_mask}, tokens)
    places = token_positions(tokens, past, attention_mask).clamp(min=0)
    if past + tokens > longest_text(model) and (length := int(places.max()) + 1) > longest_text(model):
        raise ValueError(f"a text has {length} tokens, more than the model's {longest_text(model)} positions")
    if (cache := kwargs.pop("past_key_values", None)) is not None:
        kwargs[cache_name(model)] = cache
    return _base(model)[1](input_ids, attention_mask=attention_mask, position_ids=places, **kwargs)


def decode(model: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
    """Sampling or greedy search as `model.generate` runs it: what `custom_generate` may hand on to."""
    return model._sample(*args, **kwargs)
