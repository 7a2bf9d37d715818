"""The one place that knows how transformers builds its models: blocks, output head, cache, positions.

Everything else in this package takes tensors. When transformers moves something, this file changes.
Shapes: B batch, T positions of this pass, P cached positions, D width, V vocabulary, H heads.
"""

import copy
import inspect
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from contextvars import ContextVar
from dataclasses import dataclass
from functools import lru_cache, partial, wraps
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from torch.utils.hooks import RemovableHandle
from transformers import Cache, DynamicCache, PreTrainedModel

# Where each architecture (config.model_type) keeps its decoder blocks, below the model with the output head.
BLOCKS = {
    "gpt2": "transformer.h",
    "gptj": "transformer.h",
    "gpt_neo": "transformer.h",
    "gpt_neox": "gpt_neox.layers",
    "opt": "model.decoder.layers",
    "llama": "model.layers",
    "mistral": "model.layers",
    "qwen2": "model.layers",
    "qwen3": "model.layers",
    "gemma": "model.layers",
    "gemma2": "model.layers",
    "gemma3_text": "model.layers",
    "phi3": "model.layers",
    "olmo2": "model.layers",
    "smollm3": "model.layers",
}
# The two modules of a block whose outputs are added to the residual stream, where not self_attn and mlp.
_normed = ("post_attention_layernorm", "post_feedforward_layernorm")
BRANCHES = {
    "gpt2": ("attn", "mlp"),
    "gptj": ("attn", "mlp"),
    "gpt_neo": ("attn", "mlp"),
    "gpt_neox": ("attention", "mlp"),
    "opt": ("self_attn", "fc2"),
    "gemma2": _normed,
    "gemma3_text": _normed,
    "olmo2": _normed,
}

_unsteered: ContextVar[bool] = ContextVar("unsteered", default=False)
_prompt_length: ContextVar[int | Tensor | None] = ContextVar("prompt_length", default=None)
_batch_rows: ContextVar[tuple[Sequence[int], int] | None] = ContextVar("rows", default=None)


# --- parts of a model -------------------------------------------------------------------------------------


def unwrapped(model: nn.Module) -> PreTrainedModel:
    """The transformers model inside a TransformerLens `TransformerBridge`; any other model as it is.

    A bridge wraps the modules of a transformers model in place, so what acts on the one acts on the other.
    """
    return getattr(model, "original_model", model)


def blocks(model: PreTrainedModel) -> nn.ModuleList:
    """The decoder blocks, in order. ValueError for an architecture that is not in `BLOCKS`."""
    kind = model.config.model_type
    if kind not in BLOCKS:
        raise ValueError(
            f"unknown architecture {kind!r}; known: {', '.join(BLOCKS)}. If its blocks are an nn.ModuleList, "
            f"say where: steer_utils.hf.BLOCKS[{kind!r}] = 'model.layers' (print(model) shows it)."
        )
    return model.get_submodule(BLOCKS[kind])


def decoder(model: PreTrainedModel) -> nn.Module:
    """The module that owns the blocks and is given ids, mask and cache; OPT never calls its `base_model`."""
    blocks(model)
    return model.get_submodule(BLOCKS[model.config.model_type].rpartition(".")[0])


def block(model: PreTrainedModel, layer: int) -> nn.Module:
    """Decoder block `layer`, counted from 0. ValueError for a layer beyond the model."""
    layers = blocks(model)
    if not 0 <= layer < len(layers):
        raise ValueError(f"layer {layer} is beyond the model, which has blocks 0 to {len(layers) - 1}")
    return layers[layer]


def lm_head(model: PreTrainedModel) -> nn.Module:
    """The linear map from the last hidden state [..., D] to word scores [..., V]; see `logits`."""
    return model.get_output_embeddings()


def logits(model: PreTrainedModel, hidden: Tensor) -> Tensor:
    """Logits [..., V] of last hidden states [..., D], softly capped where the model does (Gemma 2)."""
    return capped(model, lm_head(model)(hidden))


def capped(model: PreTrainedModel, scores: Tensor) -> Tensor:
    """Logits of word scores [..., V], which steers change linearly: the same, or softly capped (Gemma 2)."""
    cap = getattr(model.config, "final_logit_softcapping", None)
    return scores if cap is None else cap * torch.tanh(scores / cap)


def width(model: PreTrainedModel) -> int:
    """D, the width of the residual stream (OPT-350m's word embeddings are narrower)."""
    return model.config.hidden_size


def last_width(model: PreTrainedModel) -> int:
    """The width of the last hidden states (OPT-350m maps its residual stream to that of its embeddings)."""
    return getattr(model.config, "word_embed_proj_dim", width(model))


def untied(model: PreTrainedModel) -> PreTrainedModel:
    """A copy that shares every weight, in which the output head may get weights of its own, and be saved.

    Steers that are on are not on in the copy.
    """
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    new = copy.deepcopy(model, shared)
    new.config.tie_word_embeddings = False
    for module in new.modules():
        for hooks in (module._forward_hooks, module._forward_pre_hooks):
            ours = [k for k, hook in hooks.items() if getattr(hook, "__module__", "").startswith(__package__)]
            for key in ours:
                del hooks[key]
    return new


# --- the cache --------------------------------------------------------------------------------------------


def new_cache(model: PreTrainedModel) -> Cache:
    """An empty cache that grows with each pass, for sliding attention too."""
    return DynamicCache(config=model.config)


def cached(cache: Cache) -> list[tuple[Tensor, Tensor]]:
    """Keys and values of each layer, [B, H, P, D/H] each; the tensors themselves, not copies."""
    return [(layer.keys, layer.values) for layer in cache.layers]


def with_cached(cache: Cache, tensors: Sequence[tuple[Tensor, Tensor]]) -> Cache:
    """A cache like the given one, which stays as it is, that holds other keys and values of the same shapes.

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
    """A cache that begins as the given one and grows on its own; their tensors are shared, not copied."""
    new = copy.copy(cache)
    new.layers = [copy.copy(layer) for layer in cache.layers]
    return new


def repeated(cache: Cache, times: int) -> Cache:
    """A copy of the cache in which each row stands `times` times: row 0, row 0, …, row 1, …"""
    new = copy.deepcopy(cache)
    new.batch_repeat_interleave(times)
    return new


def joined(caches: Sequence[Cache]) -> Cache:
    """One cache with the rows of several, which hold as many positions each."""
    new = forked(caches[0])
    for layer, *parts in zip(new.layers, *(cache.layers for cache in caches), strict=True):
        layer.keys = torch.cat([part.keys for part in parts])
        layer.values = torch.cat([part.values for part in parts])
    return new


class MovablePast:
    """A copy of a cache whose numbers may be changed in place, with room behind for tokens to come.

    moved: the keys and values of each layer [B, H, P, D/H], or of the newest `size` of its positions. They
    are the memory that passes read, so that changing them costs no copies; where the model computes in 16
    bits, float32 numbers that each pass rounds into that memory. Raises ValueError for an empty cache.
    """

    SPARE = 32  # positions; once they are filled, everything moves to larger memory

    def __init__(self, cache: Cache, size: int = 0) -> None:
        if cache.get_seq_length() == 0:
            raise ValueError("the cache is empty: a text of one token has no past to move")
        self.size = size
        self._go_on_from(self._with_room(cache))

    def reading(self) -> Cache:
        """A cache for one pass of one token; gradients flow to `moved`.

        There may be many, one after the other: all of them write their token to the same place.
        """
        new = forked(self._cache)
        for layer, moved in zip(new.layers, self.moved, strict=True):
            layer.moved = moved
        return new

    def keep(self, cache: Cache) -> None:
        """Go on from the latest cache of `reading`, which a pass has lengthened."""
        full = any(layer.begin + layer.keys.shape[2] == layer.rooms[0].shape[2] for layer in cache.layers)
        self._go_on_from(self._with_room(cache) if full else cache)

    def _go_on_from(self, cache: Cache) -> None:
        self._cache = cache
        self.moved = [tuple(map(self._movable, pair)) for pair in cached(cache)]

    def _with_room(self, cache: Cache) -> Cache:
        new = forked(cache)
        new.layers = [layer if isinstance(layer, _InPlace) else _in_place(layer) for layer in new.layers]
        for layer in new.layers:
            layer.begin, layer.rooms = 0, [pad(t, (0, 0, 0, self.SPARE)) for t in (layer.keys, layer.values)]
            layer.keys, layer.values = (room[:, :, : layer.keys.shape[2]] for room in layer.rooms)
        return new

    def _movable(self, tensor: Tensor) -> Tensor:
        newest = tensor[:, :, -self.size :].detach()
        return newest.to(torch.promote_types(tensor.dtype, torch.float32))


class _InPlace:
    """A layer of a cache that takes a token into `rooms`, memory in which it stands from position `begin`."""

    begin: int
    rooms: list[Tensor]
    moved: tuple[Tensor, ...] | None = None  # its keys and values, until it has taken in a token

    def update(self, keys: Tensor, values: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        if self.moved is None or keys.shape[2] != 1:
            raise RuntimeError(
                f"a cache of MovablePast.reading takes one token, once, not {keys.shape[2]} more: "
                f"keep it and ask for another"
            )
        positions = slice(self.begin, self.begin + self.keys.shape[2] + 1)  # of all that stands, and one more
        tensors = zip(self.moved, (keys, values), self.rooms, strict=True)
        keys, values = (_Longer.apply(old, new, room[:, :, positions]) for old, new, room in tensors)
        dropped, self.moved = 0, None
        if self.is_sliding:
            self.cumulative_length += 1
            dropped = max(0, keys.shape[2] - self.sliding_window + 1)
        self.begin += dropped
        self.keys, self.values = keys[:, :, dropped:], values[:, :, dropped:]
        return keys, values


def _in_place(layer: Any) -> _InPlace:
    """The same layer with another `update`, whatever its class."""
    new = object.__new__(_in_place_class(type(layer)))
    vars(new).update(vars(layer))
    return new


@lru_cache
def _in_place_class(kind: type) -> type:
    return type(f"InPlace{kind.__name__}", (_InPlace, kind), {})


class _Longer(torch.autograd.Function):
    """`whole`, memory [B, H, P + 1, D/H] whose newest P or fewer are `moved`, with new ones at its end."""

    @staticmethod
    def forward(ctx: Any, moved: Tensor, new: Tensor, whole: Tensor) -> Tensor:
        ctx.size = moved.shape[2]
        if moved.dtype != whole.dtype:
            whole[:, :, -1 - ctx.size : -1] = moved
        whole[:, :, -1:] = new
        return whole  # not marked as changed: autograd then gives a view of it, whose history begins here

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return gradient[:, :, -1 - ctx.size : -1], gradient[:, :, -1:], None


# --- absolute positions -----------------------------------------------------------------------------------


def token_positions(
    tokens: int,
    *,
    past: int = 0,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    device: torch.device | str = "cpu",
) -> Tensor:
    """The place in its text of each token of a pass, [B, T] or [1, T]: BOS is 0, padding is −1.

    tokens: T, the length of this pass. past: P, the number of cached positions, padding included.
    attention_mask: [B, P + T], 1 for text and 0 for padding on either side. Masks already expanded for
    attention (4-D, or one for each kind of layer) say nothing of padding; then position_ids [B, T] decide.
    """
    if isinstance(attention_mask, Tensor) and attention_mask.ndim == 2:
        text = attention_mask.bool()
        places = torch.where(text, text.cumsum(-1) - 1, -1)
        return places[:, past : past + tokens]
    if position_ids is not None:
        return position_ids
    return torch.arange(past, past + tokens, device=device)[None]


def _positions_of_call(given: dict[str, Any]) -> Tensor:
    """`token_positions` of one call of a decoder, from the arguments it was given by name."""
    tokens = given.get("input_ids") if given.get("input_ids") is not None else given["inputs_embeds"]
    return token_positions(
        tokens.shape[1],
        past=_past(given),
        attention_mask=given.get("attention_mask"),
        position_ids=given.get("position_ids"),
        device=tokens.device,
    )


def _past(given: dict[str, Any]) -> int:
    """P, the number of positions in the cache that a call was given."""
    cache = given.get("past_key_values")
    return cache.get_seq_length() if cache is not None else 0


@contextmanager
def prompt_length(tokens: int | Tensor) -> Iterator[None]:
    """While inside, prompts have so many tokens, BOS included, even if they come in chunks.

    tokens: one number, or one for each row, [B]. Without it, the first pass over a text is the whole prompt.
    """
    token = _prompt_length.set(tokens)
    try:
        yield
    finally:
        _prompt_length.reset(token)


@contextmanager
def assumed_prompt_length(tokens: int | Tensor) -> Iterator[None]:
    """As `prompt_length`, where nothing else has been said."""
    with nullcontext() if _prompt_length.get() is not None else prompt_length(tokens):
        yield


@dataclass
class _Text:
    """What the decoder is reading: absolute positions [B,T] of this pass, and its prompts' lengths [B]."""

    shortest: int
    positions: Tensor | None = None
    first_lengths: Tensor | None = None  # of the prompts as the first pass has them
    start: Tensor | None = None  # the ids of the first pass, [B, T₀]
    shape: torch.Size | None = None  # of the ids of this pass, (B, T)

    def read(self, call: dict[str, Any]) -> None:
        """Note one call of the decoder. ValueError for a new prompt below `shortest` tokens."""
        ids = call.get("input_ids")
        new = _past(call) == 0 and not self._goes_on(call, ids)
        self.positions = _positions_of_call(call)
        self.shape = ids.shape if ids is not None else call["inputs_embeds"].shape[:2]
        if new or self.first_lengths is None:  # a row may begin with a chunk of padding alone: length 0
            self.start, self.first_lengths = ids, self.positions.amax(dim=-1).clamp(min=0) + 1
        if new and (length := int(self.lengths.min())) < self.shortest:
            raise ValueError(
                f"a prompt of {length} tokens (BOS included) is shorter than an addition of {self.shortest}: "
                f"lengthen the prompt or shorten the addition. If it comes in chunks: "
                f"with steer_utils.hf.prompt_length(…)"
            )

    @property
    def lengths(self) -> Tensor:
        """Tokens of each row's prompt, [B] or [1]: as told by `prompt_length`, else as in the first pass."""
        told = _prompt_length.get()
        lengths = self.first_lengths if told is None else torch.as_tensor(told, device=self.positions.device)
        return lengths.reshape(-1).repeat_interleave(max(1, self.shape[0] // lengths.numel()))

    def _goes_on(self, call: dict[str, Any], ids: Tensor | None) -> bool:
        """Whether this is the next step of generating without a cache, which reads all of the text anew."""
        if call.get("use_cache") is not False or ids is None or self.start is None:
            return False
        grown = ids.shape == (self.shape[0], self.shape[1] + 1)
        return grown and torch.equal(ids[:, : self.start.shape[1]], self.start)


# --- reading and editing activations ----------------------------------------------------------------------

Edit = Callable[[Tensor, Tensor, Tensor], Tensor]


class Place(NamedTuple):
    """An activation of block `layer`: what enters it, what its branches add, or what leaves it."""

    layer: int
    kind: str


def place(act_name: str) -> Place:
    """The place that a TransformerLens hook name means, such as "blocks.6.hook_resid_pre".

    resid_pre: the residual stream [B,T,D] entering the block; resid_post: leaving it; attn_out, mlp_out:
    what attention and MLP add to it. ValueError for any other name.
    """
    match = re.fullmatch(r"blocks\.(\d+)\.hook_(resid_pre|resid_post|attn_out|mlp_out)", str(act_name))
    if match is None:
        raise ValueError(
            f"unknown hook {act_name!r}: give a layer such as 6, or 'blocks.6.hook_resid_pre'; instead of "
            f"resid_pre also resid_post, attn_out, mlp_out"
        )
    return Place(int(match[1]), match[2])


def _register(model: PreTrainedModel, act_name: str, change: Callable[[Tensor], Tensor]) -> RemovableHandle:
    """Hook `change` into the forward pass: what it returns takes the place of the activation."""
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
        names = BRANCHES.get(model.config.model_type, ("self_attn", "mlp"))
        module = module.get_submodule(names[kind == "mlp_out"])
    return module.register_forward_hook(after)


@contextmanager
def edit_activation(
    model: PreTrainedModel, act_name: str, edit: Edit, *, shortest: int = 1
) -> Iterator[None]:
    """While inside, an activation is replaced by `edit(activation [B,T,D], positions [B,T], lengths [B])`.

    positions: see `token_positions`; lengths: tokens of each prompt. The hooks come off at the end, after an
    exception too. ValueError for a prompt of fewer than `shortest` tokens.
    """
    reader, text = decoder(model), _Text(shortest)
    names = inspect.signature(reader.forward)

    def note(module: nn.Module, args: tuple, kwargs: dict) -> None:
        if not _unsteered.get():
            text.read(names.bind_partial(*args).arguments | kwargs)

    def change(value: Tensor) -> Tensor:
        if _unsteered.get():
            return value
        shaped = value.reshape(*text.shape, -1)  # OPT's MLP knows no rows: it gives [B·T, D]
        return edit(shaped, text.positions, text.lengths).reshape(value.shape)

    with ExitStack() as stack:
        stack.callback(_register(model, act_name, change).remove)
        stack.callback(reader.register_forward_pre_hook(note, with_kwargs=True).remove)
        yield


@contextmanager
def unsteered() -> Iterator[None]:
    """While inside, steers that are on do nothing: for a pass that must see the plain model."""
    token = _unsteered.set(True)
    try:
        yield
    finally:
        _unsteered.reset(token)


@contextmanager
def edit_lm_head(
    model: PreTrainedModel, edit: Callable[[Tensor], Tensor], *, output: bool = False
) -> Iterator[None]:
    """While inside, the output head is given `edit(hidden [N, …, D])`; with `output`, its logits are edited.

    Tied input embeddings are not touched. The hook comes off at the end, after an exception too.
    """

    def before(module: nn.Module, args: tuple[Tensor]) -> Tensor:
        return args[0] if _unsteered.get() else edit(args[0])

    def after(module: nn.Module, args: tuple[Tensor], scores: Tensor) -> Tensor:
        return scores if _unsteered.get() else edit(scores)

    head = lm_head(model)
    with head.register_forward_hook(after) if output else head.register_forward_pre_hook(before):
        yield


@contextmanager
def batch_rows(chosen: Sequence[int], texts: int) -> Iterator[None]:
    """While inside, the rows that the model reads are these of so many texts, all of which have values."""
    token = _batch_rows.set((chosen, texts))
    try:
        yield
    finally:
        _batch_rows.reset(token)


def for_rows(values: Tensor, count: int) -> Tensor:
    """The values [B, …] of each of `count` rows, which stand in succession if there are several of a text.

    ValueError if they do not come out even, or inside `batch_rows` if there are values for fewer or more texts.
    """
    if (told := _batch_rows.get()) is not None:
        chosen, texts = told
        if len(values) != texts:
            raise ValueError(f"values for {len(values)} texts do not fit {texts} texts: give a row for each")
        values = values[list(chosen)]
    if count % len(values):
        raise ValueError(f"values for {len(values)} texts do not fit a batch of {count} rows")
    return values.repeat_interleave(count // len(values), dim=0)


class _Enough(Exception):
    """Ends a forward pass whose remaining blocks nobody needs."""


@contextmanager
def _kept(model: PreTrainedModel, act_names: Iterable[str], *, stop: bool) -> Iterator[dict[str, Tensor]]:
    """The activations of the plain passes inside; with `stop`, a pass ends once it has given all of them."""
    wanted, found = set(act_names), {}

    def keep(act_name: str, value: Tensor) -> Tensor:
        found[act_name] = value
        if stop and len(found) == len(wanted):
            raise _Enough
        return value

    with ExitStack() as stack, unsteered():
        for name in wanted:
            stack.callback(_register(model, name, partial(keep, name)).remove)
        yield found


@torch.no_grad()
def activations(
    model: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor, act_names: Iterable[str]
) -> dict[str, Tensor]:
    """The activations of the plain model at the given hooks, {act_name: [B, T, D]}.

    input_ids, attention_mask: [B, T]. The pass ends at the deepest of the hooks.
    """
    with _kept(model, act_names, stop=True) as found, suppress(_Enough):
        forward(model, input_ids, attention_mask)
    return {name: value.reshape(*input_ids.shape, -1) for name, value in found.items()}


def forward(model: PreTrainedModel, input_ids: Tensor | None, attention_mask: Tensor, **kwargs: Any) -> Any:
    """One pass through the decoder without its output head; `last_hidden_state` [B, T, D] and the cache.

    input_ids: [B, T], or None with `inputs_embeds` [B, T, D]. attention_mask: [B, P + T], with P positions in
    `past_key_values`, if given.
    Positions are passed by hand: outside `generate`, GPT-2 numbers them without looking at the mask.
    """
    past, tokens = _past(kwargs), (kwargs["inputs_embeds"] if input_ids is None else input_ids).shape[1]
    places = token_positions(tokens, past=past, attention_mask=attention_mask).clamp(min=0)
    return model.base_model(input_ids, attention_mask=attention_mask, position_ids=places, **kwargs)


# --- taking a pass up again in the middle -----------------------------------------------------------------


class Reading(NamedTuple):
    """A plain pass over B prompts: the cache, and what entered each block, L tensors [B, T, D]."""

    cache: Cache
    inputs: list[Tensor]
    in_tuples: bool  # whether the blocks of this architecture return their output inside a tuple


@torch.no_grad()
def read(model: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor) -> Reading:
    """Read prompts [B, T] with the plain model, and keep all that `resumed` needs."""
    names = [f"blocks.{layer}.hook_resid_pre" for layer in range(len(blocks(model)))]
    outputs = []
    handle = block(model, 0).register_forward_hook(lambda module, args, output: outputs.append(output))
    with handle, _kept(model, names, stop=False) as found:
        cache = forward(model, input_ids, attention_mask, use_cache=True).past_key_values
    return Reading(cache, [found[name] for name in names], isinstance(outputs[0], tuple))


@contextmanager
def resumed(model: PreTrainedModel, reading: Reading, layer: int, times: int) -> Iterator[None]:
    """While inside, passes over the prompts of a reading start at block `layer`; those below are not run.

    The passes must read the same tokens into an empty cache, each row `times` times in succession. What
    steers at `layer` or above is felt; what the blocks below would have given comes from the reading.
    """
    hidden = reading.inputs[layer].repeat_interleave(times, dim=0)

    def stand_in(index: int) -> Callable[..., Tensor]:
        def forward(_: Tensor, *args: Any, **kwargs: Any) -> Tensor | tuple[Tensor]:
            cache = next(value for value in (*args, *kwargs.values()) if isinstance(value, Cache))
            cache.layers[index] = copy.deepcopy(reading.cache.layers[index])
            cache.layers[index].batch_repeat_interleave(times)
            return (hidden,) if reading.in_tuples else hidden

        return forward

    # In the instances' own namespaces: a TransformerBridge hands attributes on, and accelerate sets its own.
    namespaces = [vars(module) for module in blocks(model)[:layer]]
    before = [names.get("forward") for names in namespaces]
    try:
        for index, names in enumerate(namespaces):
            names["forward"] = stand_in(index)
        yield
    finally:
        for names, own in zip(namespaces, before, strict=True):
            names.pop("forward", None)
            if own is not None:
                names["forward"] = own


# --- standing in for the model's own forward pass, and its decoding loop ----------------------------------


def embed_softly(model: PreTrainedModel, probabilities: Tensor) -> Tensor:
    """The mean input embedding [..., D] of tokens with these probabilities [..., V], for `inputs_embeds`."""
    embedding = model.get_input_embeddings()
    scale = getattr(embedding, "embed_scale", 1.0)  # Gemma's module multiplies what it looks up
    return scale * (probabilities.to(embedding.weight.dtype) @ embedding.weight)


@contextmanager
def stand_in(model: PreTrainedModel, forward: Callable[..., Any]) -> Iterator[None]:
    """While inside, a call of the model is a call of `forward`; `model.generate` goes on working."""
    names, own = vars(model), model.forward
    before = names.get("forward")  # where accelerate spreads a model over devices, it has set one
    names["forward"] = wraps(own)(forward)  # generate looks at the signature
    names["forward"].stands_in = True
    try:
        yield
    finally:
        names.pop("forward")
        if before is not None:
            names["forward"] = before


def is_stood_in(model: PreTrainedModel) -> bool:
    """Whether a call of the model goes to a forward pass given to `stand_in`; never inside `unsteered`."""
    return getattr(vars(model).get("forward"), "stands_in", False) and not _unsteered.get()


def decode(model: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
    """Sampling or greedy search as `model.generate` runs it: what `custom_generate` may hand on to.

    `generate` keeps its streamer from a `custom_generate` that is callable, so it is looked up in the caller.
    """
    frame = inspect.currentframe()
    while frame is not None and frame.f_code is not inspect.unwrap(type(model).generate).__code__:
        frame = frame.f_back
    streamer = frame.f_locals.get("streamer") if frame is not None else None
    return model._sample(*args, **{"streamer": streamer} | kwargs)
