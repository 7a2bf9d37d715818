"""What a pass over a few tokens shows of a model: branches of its blocks, effects of padding, how it embeds.

Each is looked up once for a model, while no hook acts on it, not even a reader's own.
Shapes: B batch, T positions of this pass, D width, V vocabulary.
"""

from collections.abc import Callable, Collection
from functools import partial
from itertools import chain
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from . import hf


def _bare(model: PreTrainedModel, call: Callable[[], Any]) -> Any:
    """What a call gives while no hook acts on the model, not even a reader's own: for what is found out once.

    The caller is inside `hooks.alone`, as another thread's steer would be off as well.
    """
    tables = [of for part in model.modules() for of in (part._forward_hooks, part._forward_pre_hooks)]
    held = [dict(of) for of in tables]

    def put_back():
        for of, before in zip(tables, held, strict=True):
            if [*of] != [*before]:
                of.clear()
                of.update(before)

    try:
        try:
            for of in tables:
                of.clear()
            return call()
        finally:
            put_back()
    finally:
        put_back()  # an interrupt may have stopped the first


@hf.no_grad
def _watched(
    model: PreTrainedModel, parts: Collection[nn.Module], ids: Tensor | None, **embeds: Tensor
) -> dict[nn.Module, tuple[Tensor | None, Tensor]]:
    """The hidden states that each of the modules is given, and what it gives, in one pass over a text."""
    seen = {}

    def keep(part: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        given, gives = args[0] if args else kwargs.get("hidden_states"), output
        pair = given, gives[0] if isinstance(gives, tuple) else gives
        # Some blocks add to their activations in place.
        seen[part] = tuple(None if one is None else one.flatten().float().clone() for one in pair)

    def read() -> None:
        with hf.nested([partial(hf.hooked, part, keep, with_kwargs=True) for part in parts]):
            hf.forward(model, ids, None, use_cache=False, **embeds)

    with hf.evaluating(model):
        _bare(model, read)
    return seen


_branches: WeakKeyDictionary[nn.Module, tuple[nn.Module, nn.Module] | None] = WeakKeyDictionary()


def branches(model: PreTrainedModel, layer: int) -> tuple[nn.Module, nn.Module] | None:
    """The modules whose outputs a block adds to the residual stream: attention's and the MLP's.

    None where leaving − entering is not their sum, as one pass over two tokens shows: some blocks scale what
    they add, add other things, or have several streams.
    """
    module = hf.block(model, layer)
    if module not in _branches:
        names = [pair for pair in hf.BRANCHES if all(hasattr(module, name) for name in pair)]
        pairs = [tuple(map(module.get_submodule, pair)) for pair in names]
        ids = torch.tensor([[0, 1]], device=hf.input_device(model))
        seen = _watched(model, {module, *chain(*pairs)}, ids)
        added = seen[module][1] - seen[module][0]
        rounding = (0.02 if model.dtype == torch.float32 else 0.1) * added.norm()
        outputs = (torch.stack([seen[one][1] for one in pair]) for pair in pairs)
        fit = (x.shape[1:] == added.shape and (added - x.sum(dim=0)).norm() <= rounding for x in outputs)
        _branches[module] = next((pair for pair, fits in zip(pairs, fit, strict=True) if fits), None)
    return _branches[module]


_by_padding: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


@hf.no_grad
def padding_changes(model: PreTrainedModel) -> bool:
    """Whether padding on the left makes another text of it, as where states or some positions count it."""
    if model not in _by_padding:
        ids = torch.arange(1, 9, device=hf.input_device(model))[None]
        padded = torch.nn.functional.pad(ids, (3, 0))
        pairs = (ids, torch.ones_like(ids)), (padded, (padded > 0).long())
        found = _bare(
            model, lambda: [hf.forward(model, *pair, use_cache=False).last_hidden_state for pair in pairs]
        )
        states = [one[:, -1].float() for one in found]
        rounding = (1e-3 if model.dtype == torch.float32 else 0.1) * states[0].norm()
        cache, apart = hf.new_cache(model), bool((states[1] - states[0]).norm() > rounding)
        _by_padding[model] = apart or cache is None or hf.holds_states(cache)
    return _by_padding[model]


def embed_softly(model: PreTrainedModel, probabilities: Tensor) -> Tensor:
    """The expected `inputs_embeds` [..., D] under probabilities [..., V]; ValueError if tokens are more."""
    if getattr(model.config.get_text_config(), "hidden_size_per_layer_input", 0):
        kind = model.config.model_type
        raise ValueError(f"a {kind!r} model looks up tokens in every block: no soft tokens, horizon_length=0")
    weight = model.get_input_embeddings().weight
    return _embedding_scale(model) * (probabilities.to(weight.dtype) @ weight)


_scales: WeakKeyDictionary[nn.Module, float] = WeakKeyDictionary()


@hf.no_grad
def _embedding_scale(model: PreTrainedModel) -> float:
    """By what a model multiplies an embedding that it looks up, but not one that it is given.

    Gemma and Falcon-H1 do. Passes over two tokens, given both ways, show it. ValueError for other changes.
    """
    if model not in _scales:
        ids, embedding, first = torch.tensor([[1, 2]]), model.get_input_embeddings(), hf.block(model, 0)
        ids = ids.to(hf.input_device(model))

        def entering(ids: Tensor | None, **embeds: Tensor) -> Tensor:
            return _watched(model, {first}, ids, **embeds)[first][0]

        found, rows = entering(ids), embedding.weight[ids]
        scale = _ratio(embedding(ids), rows) * _ratio(found, entering(None, inputs_embeds=embedding(ids)))
        again = entering(None, inputs_embeds=scale * rows)
        if (again - found).norm() > 0.02 * found.norm():
            raise ValueError(f"no soft tokens for {model.config.model_type!r} models: give horizon_length=0")
        _scales[model] = scale
    return _scales[model]


def _ratio(one: Tensor, other: Tensor) -> float:
    return (one * other).sum().item() / other.square().sum().item()
