"""What a pass over a few tokens shows of a model: the branches of its blocks, and what padding changes.

Each is looked up once for a model, while no hook acts on it, not even a reader's own.
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
    model: PreTrainedModel, parts: Collection[nn.Module]
) -> dict[nn.Module, tuple[Tensor | None, Tensor]]:
    """The hidden states that each module is given, and what it gives, in one pass over two tokens."""
    seen, ids = {}, torch.tensor([[0, 1]], device=hf.input_device(model))

    def keep(part: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        pair = args[0] if args else kwargs.get("hidden_states"), output
        pair = (one[0] if isinstance(one, tuple) else one for one in pair)
        # Some blocks add to their activations in place.
        seen[part] = tuple(None if one is None else one.flatten().float().clone() for one in pair)

    def read() -> None:
        with hf.nested([partial(hf.hooked, part, keep, with_kwargs=True) for part in parts]):
            hf.forward(model, ids, None, use_cache=False)

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
        seen = _watched(model, {module, *chain(*pairs)})
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
