"""Interrupts at any line, threads, and contexts that end in another order: no steer outlives its context."""

import contextlib
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from conftest import hook_count, logits, new_model, random_ids, tiny
from test_invariants import STEERS

import steer_utils as su
from steer_utils import hooks, probing
from steer_utils.generation import all_on

OURS = str(Path(su.__file__).parent)
LINES_OF = (OURS, contextlib.__file__, torch.autograd.grad_mode.__file__, torch.utils.hooks.__file__)
ABLATION = su.Ablation(torch.randn(32, generator=torch.Generator().manual_seed(0)))
KINDS = {name: steer.at(1.0) for name, steer in STEERS.items()} | {"ablation": ABLATION}
KINDS["several kinds"] = [KINDS["addition"], KINDS["lm-steer-add"], KINDS["pplm-hidden-bag"]]
# Where an interrupt comes while a generator is thrown away, Python can only report it.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
PROMPT, IDS = "I hate you because", random_ids(1, 6)


@pytest.fixture(params=KINDS)
def steer(request: pytest.FixtureRequest) -> Any:
    return KINDS[request.param]


def interrupted(call: Callable[[], Any], at: int) -> int:
    """Call with a KeyboardInterrupt at line or function number `at`; how many were begun."""
    count = 0

    def trace(frame: FrameType, event: str, arg: Any) -> Callable | None:
        nonlocal count
        if not frame.f_code.co_filename.startswith(LINES_OF):
            return None
        count += event != "return"  # where Python itself sees no interrupt
        if count == at and event != "return":
            raise KeyboardInterrupt
        return trace

    sys.settrace(trace)
    try:
        call()
    except KeyboardInterrupt:
        pass
    finally:
        sys.settrace(None)
    return count


def state(model: torch.nn.Module) -> tuple:
    """All that a steer could leave behind, and what the model says."""
    known = hooks.known_batch(), torch.is_grad_enabled(), torch._dynamo.eval_frame._stance.stance
    with ThreadPoolExecutor(1) as pool:  # another thread, which would wait for a lock
        free = pool.submit(lambda: hooks.alone(model).acquire(timeout=1) and not hooks.alone(model).release())
    inside = bool(hooks._on), hooks.has_stand_in(model), bool(hooks._unsteered.get()), model.training
    return (known, free.result(), inside, hook_count(model), dict(vars(model)), logits(model, IDS).tolist())


def points(call: Callable[[], Any], count: int) -> range:
    """Numbers of lines, spread over a call."""
    total = interrupted(call, 0)
    assert total > count / 2
    return range(1, total + 1, max(1, total // count))


def test_an_interrupt_while_a_context_begins_or_ends_leaves_nothing_of_it(steer, tokenizer):
    model = tiny("llama")

    def enter_and_leave() -> None:
        with all_on(steer, model, tokenizer):
            pass

    before = state(model)
    assert before[:3] == ((hooks.Batch(), True, "default"), True, (False, False, False, False))
    for at in points(enter_and_leave, 50):
        interrupted(enter_and_leave, at)
        assert state(model) == before, at


def test_an_interrupt_of_generate_leaves_nothing_of_a_steer(steer, tokenizer):
    model = new_model(tiny("gpt2").config)  # what is looked up once for a model, it looks up here
    before = state(model)

    def write() -> None:
        for known in (probing._by_padding, probing._branches):
            known.clear()
        su.generate(model, tokenizer, PROMPT, steer=steer, max_new_tokens=2, seed=0)

    for at in points(write, 20):
        interrupted(write, at)
        assert state(model) == before, at


def test_a_steer_begins_and_ends_where_an_interrupt_kept_a_lock_from_its_release(steer, tokenizer):
    model = tiny("llama")
    before = state(model)
    hooks._guard.acquire()
    with all_on(steer, model, tokenizer):
        assert hooks._on
    assert state(model) == before
    assert not hooks._guard.locked()


def test_two_threads_never_write_under_each_others_steers(steer, tokenizer):
    model, other = tiny("llama"), 5 * KINDS["lm-steer-add"]
    settings = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}

    def write(one: Any) -> list[int]:
        with all_on(one, model, tokenizer):
            return model.generate(IDS, attention_mask=torch.ones_like(IDS), **settings)[0].tolist()

    def table(one: Any) -> str:
        return su.generate(model, tokenizer, PROMPT, steer=one, max_new_tokens=5, seed=0).to_json()

    jobs = [(call, one) for call in (write, table) for one in (steer, other)] + [(table, None)]
    alone = [call(one) for call, one in jobs]
    assert len({alone[2], alone[3], alone[4]}) == 3
    for _ in range(2):
        ready = threading.Barrier(len(jobs))

        def at_once(job: tuple, ready: threading.Barrier = ready) -> Any:
            ready.wait(timeout=60)
            return job[0](job[1])

        with ThreadPoolExecutor(len(jobs)) as pool:
            assert list(pool.map(at_once, jobs)) == alone


def test_contexts_that_end_in_another_order_restore_the_model(steer, tokenizer):
    model = tiny("gpt2")
    before = state(model)
    for other in (KINDS["lm-steer-add"], KINDS["vector-back-all"]):
        first, second = (all_on(one, model, tokenizer) for one in (steer, other))
        first.__enter__()
        second.__enter__()
        first.__exit__(None, None, None)
        steered = logits(model, IDS)
        second.__exit__(None, None, None)
        with all_on(other, model, tokenizer):
            assert torch.equal(steered, logits(model, IDS))
        assert state(model) == before


def test_what_is_known_of_a_batch_and_unsteered_passes_may_end_in_another_order():
    contexts = [hooks.batch(prompt_lengths=3), hooks.unsteered(), hooks.batch(of=2)]
    for context in contexts:
        context.__enter__()
    assert hooks.known_batch() == hooks.Batch(prompt_lengths=3, of=2)
    for context, known in zip(contexts, (hooks.Batch(of=2), hooks.Batch(of=2), hooks.Batch()), strict=True):
        context.__exit__(None, None, None)
        assert hooks.known_batch() == known
    assert not hooks._unsteered.get()
