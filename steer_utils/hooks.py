"""How a steer reaches into a model's passes: edits of activations and of the LM head, and a stand-in for all.

Every edit is a context manager: its hooks come off at the end, after an exception too. While one is on, no
other thread steers the model, compiled code runs uncompiled (it would not see the hooks), and copies made of
the model are not steered.
Shapes: B batch, T positions of this pass, P cached positions, D width, V vocabulary.
"""

import inspect
import re
import warnings
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial, update_wrapper
from threading import Lock, RLock
from types import MethodType
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from . import hf, probing
from .sampling import TopP

TELL = "with steer_utils.hooks.batch(prompt_lengths=…)"  # what errors advise
OUTSIDE = -1e4  # a logit whose probability is 0 in any dtype, and whose products with 0 are no NaN
_locks: WeakKeyDictionary[nn.Module, Any] = WeakKeyDictionary()
_on: dict[object, nn.Module] = {}  # the model of each edit that is on
_guard, _stance = Lock(), None  # torch's stance is one for all models and threads


def alone(model: PreTrainedModel) -> AbstractContextManager[Any]:
    """While inside, other threads wait that steer this model or read it steered; so wait for none inside."""
    return _locks.setdefault(model, RLock())


@contextmanager
def _steering(model: PreTrainedModel) -> Iterator[None]:
    """While inside, an edit of the model is on."""
    edit = object()
    with alone(model), hf.temporarily(partial(_note, edit, model), partial(_note, edit, None)):
        yield


def _note(edit: object, model: PreTrainedModel | None) -> None:
    """Put an edit on a model, or off, maybe again; while there are any, compiled code runs uncompiled."""
    global _stance
    try:
        _guard.acquire(timeout=1)  # another call has it for microseconds, or lost it to an interrupt
        _on.pop(edit, None) if model is None else _on.update({edit: model})
        if _on and _stance is None:
            _stance = torch.compiler.set_stance("force_eager")
        elif not _on and _stance is not None:
            _stance.__exit__(None, None, None)
            _stance = None
    finally:
        with suppress(RuntimeError):
            _guard.release()


def require_no_steer(model: PreTrainedModel) -> None:
    """ValueError while this thread steers the model: for what another steer would falsify."""
    with alone(model):
        if any(one is model for one in list(_on.values())):
            raise ValueError("a steer is on, which would count as the model's own: leave its context before")


@dataclass(frozen=True)
class Batch:
    """What the caller knows about the texts in a batch, and a forward pass cannot see.

    prompt_lengths: tokens of each prompt, BOS included, one number or [B]; None: the first pass over a text
    is its whole prompt. texts: which of a job's texts the batch rows are; of: how many the job has.
    """

    prompt_lengths: int | Tensor | None = None
    texts: Sequence[int] | None = None
    of: int = 0


_batch: ContextVar[tuple] = ContextVar("batch", default=())
_unsteered: ContextVar[tuple] = ContextVar("unsteered", default=())  # empty: steers act


def _within(variable: ContextVar[tuple], value: Any) -> AbstractContextManager[None]:
    """While inside, the variable holds this value, too; contexts may end in another order than they began."""
    own = [value]

    def undo():
        variable.set(tuple(one for one in variable.get() if one is not own))

    return hf.temporarily(lambda: variable.set((*variable.get(), own)), undo)


def batch(**known: Any) -> AbstractContextManager[None]:
    """While inside, this is known of the batch that the model reads; see `Batch`."""
    Batch(**known)  # knows the names
    return _within(_batch, known)


def known_batch() -> Batch:
    """What the contexts of `batch` say, the inner ones last."""
    return Batch(**{name: value for (known,) in _batch.get() for name, value in known.items()})


def for_batch_rows(values: Tensor, count: int) -> Tensor:
    """The values [B, …] of each of `count` rows, text by text; ValueError if they do not come out even."""
    known = known_batch()
    if known.texts is not None:
        if len(values) != known.of:
            raise ValueError(f"values for {len(values)} texts do not fit {known.of} texts: give a row each")
        values = values[list(known.texts)]
    if count % len(values):
        raise ValueError(f"values for {len(values)} texts do not fit a batch of {count} rows")
    return values.repeat_interleave(count // len(values), dim=0)


def unsteered() -> AbstractContextManager[None]:
    """While inside, steers that are on do nothing: for a pass of the unsteered model."""
    return _within(_unsteered, True)


@dataclass
class Positions:
    """Follows the decoder from pass to pass: absolute positions [B, T] of this pass, prompt lengths [B]."""

    shortest: int = 1  # prompt that is allowed, in tokens
    in_prompt: bool = False  # whether nobody asks for positions after the prompts, where they are None
    by_length: bool = False  # whether it matters where a prompt ends
    begins: Collection[int] = ()  # a text that begins with another id gives a warning; none if empty
    positions: Tensor | None = None
    first_lengths: Tensor | None = None  # of the prompts, as the first pass has them
    start: Tensor | None = None  # the ids of the first pass, [B, T₀], or its embeddings
    shape: torch.Size | None = None  # of the ids of this pass, (B, T)
    seen: int = 0  # columns of the text so far
    told: int | Tensor | None = None  # the prompt lengths that `batch` told of the text
    after_prompts: bool = False  # whether all tokens of this pass, and so of the later ones, are

    def follow(self, call: dict[str, Any]) -> None:
        """Take in one call of the decoder. ValueError for a new prompt of fewer than `shortest` tokens.

        Where only prompts matter, later passes cost nothing: the host knows how many positions are cached.
        """
        ids, before = call.get("input_ids"), (self.shape, self.told)
        given = call["inputs_embeds"] if ids is None else ids
        past = hf.past_length(call, given.shape[1], self.seen)
        goes_on, new = past >= self.seen > 0, past == 0 and not self._repeats(call, given)
        self.shape, self.told = given.shape[:2], known_batch().prompt_lengths
        self.seen = past + given.shape[1]
        if self.after_prompts and goes_on and before[0] == self.shape and before[1] is self.told:
            self.positions = None
        else:
            self._read(call, given, past, new)

    def _read(self, call: dict[str, Any], given: Tensor, past: int, new: bool) -> None:
        known = call.get("attention_mask"), call.get("position_ids")
        self.positions = hf.token_positions(given.shape[1], past, *known).to(given.device)
        if new or self.first_lengths is None:  # the first chunk of a text may be padding alone: length 0
            self.start, self.first_lengths = given, self.positions.amax(dim=-1).clamp(min=0) + 1
        if new and (length := int(self.lengths.min())) < self.shortest:
            what = f"a prompt of {length} tokens (BOS included) is shorter than an addition of"
            advice = f"lengthen the prompt or shorten the addition. If it comes in chunks: {TELL}"
            raise ValueError(f"{what} {self.shortest}: {advice}")
        if past > 0 and given.shape[1] > 1 and self.by_length and self.told is None:
            what = "a prompt that comes in chunks does not say where it ends"
            raise ValueError(f"{what}: {TELL}, or leave out prefill_chunk_size")
        if new and self.begins and given.ndim == 2:
            firsts = given[(self.positions == 0).expand_as(given)].tolist()
            if not set(firsts) <= set(self.begins):
                what = "a text does not begin with BOS, so it meets an addition one token late"
                warnings.warn(f"{what}: encode it with steer_utils.encode", stacklevel=3)
        decoding = self.in_prompt and past > 0 and given.shape[1] == 1
        self.after_prompts = decoding and bool((self.positions >= self.lengths[:, None]).all())

    @property
    def lengths(self) -> Tensor:
        """Tokens of each prompt, [B] or [1]: as told by `batch`, else as in the first pass."""
        device = self.first_lengths.device
        lengths = self.first_lengths if self.told is None else torch.as_tensor(self.told).to(device)
        return lengths.reshape(-1).repeat_interleave(max(1, self.shape[0] // lengths.numel()))

    def _repeats(self, call: dict[str, Any], given: Tensor) -> bool:
        """Whether this is a later step of decoding without a KV cache, which repeats the text so far."""
        if call.get("use_cache") is not False or self.start is None or given.ndim != self.start.ndim:
            return False
        grown = given.shape[:2] == (self.shape[0], self.shape[1] + 1)
        return grown and torch.equal(given[:, : self.start.shape[1]], self.start)


Edit = Callable[[Tensor, Tensor, Tensor], Tensor]
Change = Callable[[Tensor], Tensor]


class Place(NamedTuple):
    layer: int
    kind: str


def place(act_name: str) -> Place:
    """Parse a TransformerLens hook name such as "blocks.6.hook_resid_pre".

    resid_pre: the residual stream [B, T, D] that enters the block; resid_post: that leaves it; attn_out,
    mlp_out: what attention and MLP add to it. ValueError for any other name.
    """
    match = re.fullmatch(r"blocks\.(\d+)\.hook_(resid_pre|resid_post|attn_out|mlp_out)", act_name)
    if match is None:
        known = "6, or 'blocks.6.hook_resid_pre'; instead of resid_pre also resid_post, attn_out, mlp_out"
        raise ValueError(f"unknown hook {act_name!r}: give a layer such as {known}")
    return Place(int(match[1]), match[2])


def _module(model: PreTrainedModel, act_name: str) -> nn.Module:
    """The module that takes or gives an activation; ValueError where the architecture has none."""
    layer, kind = place(act_name)
    if kind in ("resid_pre", "resid_post"):
        return hf.block(model, layer)
    with unsteered():
        found = probing.branches(model, layer)
    if found is None:
        what = f"what a block of a {model.config.model_type!r} model adds to the residual stream"
        raise ValueError(f"{act_name!r} is not {what}: use hook_resid_pre or hook_resid_post")
    return found[kind == "mlp_out"]


def _changing(own: nn.Module, act_name: str, change: Change) -> AbstractContextManager[None]:
    """While inside, the result of `change` replaces the activation in each pass of a module."""

    def before(module, args, kwargs):
        if module is not own:  # a copy
            return args, kwargs
        if args:
            return (change(args[0]), *args[1:]), kwargs
        return args, kwargs | {"hidden_states": change(kwargs["hidden_states"])}

    def after(module, args, output):
        if module is not own:
            return output
        return (change(output[0]), *output[1:]) if isinstance(output, tuple) else change(output)

    if place(act_name).kind == "resid_pre":
        return hf.hooked(own, before, before=True, with_kwargs=True)
    return hf.hooked(own, after)


@contextmanager
def edit_activation(model: PreTrainedModel, act_name: str, edit: Edit, **expected: Any) -> Iterator[None]:
    """While inside, `edit(activation [B, T, D], positions [B, T], lengths [B])` replaces an activation.

    positions: see `hf.token_positions`; lengths: tokens of each prompt. expected: see `Positions`. ValueError
    for a prompt of fewer than `shortest` tokens.
    """
    own, text = hf.decoder(model), Positions(**expected)
    names = inspect.signature(own.forward)

    def note(module, args, kwargs):
        if module is own and not _unsteered.get():
            text.follow(names.bind_partial(*args).arguments | kwargs)

    def change(value):
        if _unsteered.get() or text.positions is None:
            return value
        shaped = _by_rows(value, text.shape, model)
        where = (tensor.to(value.device) for tensor in (text.positions, text.lengths))
        return edit(shaped, *where).reshape(value.shape)

    noting = hf.hooked(own, note, before=True, with_kwargs=True)
    with _steering(model), _changing(_module(model, act_name), act_name, change), noting:
        yield


@contextmanager
def edit_lm_head(model: PreTrainedModel, edit: Change, *, output: bool = False) -> Iterator[None]:
    """While inside, `edit` changes the LM head's input [N, …, D] or, with `output`, its output [N, …, V]."""
    own = hf.lm_head(model)

    def change(module, args, scores=None):
        value = scores if output else args[0]
        return value if _unsteered.get() or module is not own else edit(value)

    with _steering(model), hf.hooked(own, change, before=not output):
        yield


@contextmanager
def plausible(model: PreTrainedModel, top_p: float) -> Iterator[None]:
    """While inside, tokens outside the top-p of the logits without edits of the LM head get OUTSIDE."""
    own, given = hf.lm_head(model), []

    def note(module, args):
        if module is own and not _unsteered.get():
            given[:] = args

    def cut(module, args, scores):
        if _unsteered.get() or module is not own:
            return scores
        with unsteered():
            plain = hf.logits(model, given.pop()).flatten(0, -2)
        outside = TopP(top_p)(None, plain).isinf().reshape(scores.shape)
        return scores.masked_fill(outside, OUTSIDE)

    if top_p == 1:
        yield
        return
    noting = hf.hooked(own, note, before=True, prepend=True)  # before the edits of steers that are on already
    with _steering(model), noting, hf.hooked(own, cut):
        yield


class _Enough(Exception):
    """Ends a forward pass whose remaining blocks are not needed."""


@hf.no_grad
def activations(
    model: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor, act_names: Collection[str]
) -> dict[str, Tensor]:
    """The unsteered model's activations, {act_name: [B, T, D]}; the pass ends at the deepest hook."""
    found = {}

    def keep(act_name, value):
        found[act_name] = value
        if len(found) == len(wanted):
            raise _Enough
        return value

    with _steering(model), hf.evaluating(model), unsteered():
        wanted = {name: _module(model, name) for name in act_names}
        each = [partial(_changing, module, name, partial(keep, name)) for name, module in wanted.items()]
        with hf.nested(each), suppress(_Enough):
            hf.forward(model, input_ids, attention_mask, use_cache=False)
    return {name: _by_rows(value, input_ids.shape, model) for name, value in found.items()}


def _by_rows(value: Tensor, shape: torch.Size, model: PreTrainedModel) -> Tensor:
    """An activation as [B, T, D]; OPT's MLP gives [B·T, D]. ValueError for streams of another kind."""
    if value.numel() != shape.numel() * hf.width(model):
        kind = model.config.model_type
        raise ValueError(f"the residual stream of {kind!r} models is {tuple(value.shape)}, not one [B, T, D]")
    return value.reshape(*shape, -1)


class _StandIn:
    """Takes the place of a model's forward pass; a copy of the model gets its own back."""

    def __init__(self, model: PreTrainedModel, forward: Callable[..., Any]) -> None:
        self.model, self.own, self.forward = model, model.forward, forward
        update_wrapper(self, self.own)  # generate looks at the signature

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return (self.own if _unsteered.get() else self.forward)(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> MethodType:
        return MethodType(type(self.model).forward, memo[id(self.model)])


@contextmanager
def stand_in(model: PreTrainedModel, forward: Callable[..., Any]) -> Iterator[None]:
    """While inside, `forward` replaces the model's forward pass, in `model.generate` too; see `unsteered`."""
    names, ours = vars(model), _StandIn(model, forward)
    before = names.get("forward")  # where accelerate spreads a model over devices, it has set one

    def undo():
        if names.get("forward") is ours:
            names.pop("forward") if before is None else names.update(forward=before)

    with _steering(model), hf.temporarily(lambda: names.update(forward=ours), undo):
        yield


def has_stand_in(model: PreTrainedModel) -> bool:
    """Whether a call of the model goes to a forward pass given to `stand_in`; never inside `unsteered`."""
    return isinstance(vars(hf.unwrapped(model)).get("forward"), _StandIn) and not _unsteered.get()
