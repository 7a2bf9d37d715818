"""The one place that knows how transformers builds its models: blocks, output head, cache, positions.

Everything else in this package takes tensors. When transformers moves something, this file changes.
Shapes: B batch, T positions of this pass, P cached positions, D width, V vocabulary, H heads.
"""

import copy
import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, PreTrainedModel

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

_unsteered: ContextVar[bool] = ContextVar("unsteered", default=False)
_prompt_length: ContextVar[int | None] = ContextVar("prompt_length", default=None)


# --- parts of a model -------------------------------------------------------------------------------------


def blocks(model: PreTrainedModel) -> nn.ModuleList:
    """The decoder blocks, in order. ValueError for an architecture that is not in `BLOCKS`."""
    kind = model.config.model_type
    if kind not in BLOCKS:
        raise ValueError(
            f"unknown architecture {kind!r}; known: {', '.join(BLOCKS)}. If its blocks are an nn.ModuleList, "
            f"say where: steer_utils.hf.BLOCKS[{kind!r}] = 'model.layers' (print(model) shows it)."
        )
    return model.get_submodule(BLOCKS[kind])


def _decoder(model: PreTrainedModel) -> nn.Module:
    """The module that owns the blocks and is given ids, mask and cache; OPT never calls its `base_model`."""
    blocks(model)
    return model.get_submodule(BLOCKS[model.config.model_type].rpartition(".")[0])


def block(model: PreTrainedModel, layer: int) -> nn.Module:
    """Decoder block `layer`, counted from 0. ValueError for a layer beyond the model."""
    layers = blocks(model)
    if not 0 <= layer < len(layers):
        raise ValueError(f"layer {layer} is beyond the model, which has blocks 0 to {len(layers) - 1}")
    return layers[layer]


def output_head(model: PreTrainedModel) -> nn.Module:
    """The linear map from the last hidden state [..., D] to word scores [..., V]; see `logits`."""
    return model.get_output_embeddings()


def logits(model: PreTrainedModel, hidden: Tensor) -> Tensor:
    """Logits [..., V] of last hidden states [..., D], softly capped where the model does (Gemma 2)."""
    scores = output_head(model)(hidden)
    cap = getattr(model.config, "final_logit_softcapping", None)
    return scores if cap is None else cap * torch.tanh(scores / cap)


def width(model: PreTrainedModel) -> int:
    """D, the width of the residual stream (OPT-350m's word embeddings are narrower)."""
    return model.config.hidden_size


# --- the cache --------------------------------------------------------------------------------------------


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
    new = copy.copy(cache)
    new.layers = [copy.copy(layer) for layer in cache.layers]
    for layer, (keys, values) in zip(new.layers, tensors, strict=True):
        layer.keys, layer.values = keys, values
    return new


def repeated(cache: Cache, times: int) -> Cache:
    """A copy of the cache in which each row stands `times` times: row 0, row 0, …, row 1, …"""
    new = copy.deepcopy(cache)
    new.batch_repeat_interleave(times)
    return new


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
def prompt_length(tokens: int) -> Iterator[None]:
    """While inside, prompts have (at least) so many tokens, BOS included, even if they come in chunks.

    Without it, the first pass over a text is taken for the whole prompt.
    """
    token = _prompt_length.set(tokens)
    try:
        yield
    finally:
        _prompt_length.reset(token)


def _require_length(positions: Tensor, shortest: int) -> None:
    """ValueError if the first pass, positions [B, T], holds a prompt of fewer than `shortest` tokens."""
    seen = int(positions.max(dim=-1).values.min()) + 1  # 0 for a row that begins with a chunk of padding
    length = _prompt_length.get() or max(seen, 1)
    if length < shortest:
        raise ValueError(
            f"a prompt of {length} tokens (BOS included) is shorter than an addition of {shortest}: lengthen "
            f"the prompt or shorten the addition. If it comes in chunks: with steer_utils.hf.prompt_length(…)"
        )


# --- reading and editing the residual stream --------------------------------------------------------------

Edit = Callable[[Tensor, Tensor], Tensor]


@contextmanager
def edit_block_input(model: PreTrainedModel, layer: int, edit: Edit, *, shortest: int = 1) -> Iterator[None]:
    """While inside, block `layer` receives `edit(hidden [B,T,D], positions [B,T])` in place of its input.

    The hooks come off at the end, after an exception too. ValueError for a text below `shortest` tokens.
    """
    decoder, now = _decoder(model), {}
    names = inspect.signature(decoder.forward)

    def note_positions(module: nn.Module, args: tuple, kwargs: dict) -> None:
        if _unsteered.get():
            return
        call = names.bind_partial(*args).arguments | kwargs
        now["positions"] = _positions_of_call(call)
        if _past(call) == 0:
            _require_length(now["positions"], shortest)

    def change_input(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        if _unsteered.get():
            return None
        if args:
            return (edit(args[0], now["positions"]), *args[1:]), kwargs
        return args, kwargs | {"hidden_states": edit(kwargs["hidden_states"], now["positions"])}

    handles = [block(model, layer).register_forward_pre_hook(change_input, with_kwargs=True)]
    handles.append(decoder.register_forward_pre_hook(note_positions, with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def unsteered() -> Iterator[None]:
    """While inside, steers that are on do nothing: for a pass that must see the plain model."""
    token = _unsteered.set(True)
    try:
        yield
    finally:
        _unsteered.reset(token)


class _Enough(Exception):
    """Ends a forward pass whose remaining blocks nobody needs."""


@torch.no_grad()
def block_inputs(
    model: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor, layers: Iterable[int]
) -> dict[int, Tensor]:
    """The residual stream entering each of the layers, {layer: [B, T, D]}, of the plain model.

    input_ids, attention_mask: [B, T]. The pass ends at the deepest layer asked for.
    """
    wanted, found = {layer: block(model, layer) for layer in layers}, {}

    def keep(layer: int) -> Callable:
        def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
            found[layer] = args[0] if args else kwargs["hidden_states"]
            if layer == max(wanted):
                raise _Enough

        return hook

    handles = [at.register_forward_pre_hook(keep(layer), with_kwargs=True) for layer, at in wanted.items()]
    try:
        with unsteered(), suppress(_Enough):
            forward(model, input_ids, attention_mask)
    finally:
        for handle in handles:
            handle.remove()
    return found


def forward(model: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor, **kwargs: Any) -> Any:
    """One pass through the decoder without its output head; `last_hidden_state` [B, T, D] and the cache.

    input_ids: [B, T]. attention_mask: [B, P + T], with P positions in `past_key_values`, if given.
    Positions are passed by hand: outside `generate`, GPT-2 numbers them without looking at the mask.
    """
    past = _past(kwargs)
    places = token_positions(input_ids.shape[1], past=past, attention_mask=attention_mask).clamp(min=0)
    return model.base_model(input_ids, attention_mask=attention_mask, position_ids=places, **kwargs)
