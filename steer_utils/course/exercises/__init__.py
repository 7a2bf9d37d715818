"""Exercises: a right answer, the mistakes that readers make, and a check that tells them apart.

One module a notebook. An exercise is its answer, a function under `exercise`; the functions
under its `mistake` go wrong in a typical way, each with a hint of its own. A notebook shows the task and a
stub of the same name, and checks what the reader made of it:

    su.exercises.check("00", probability_of, model, tokenizer)
"""

import copy
import inspect
import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from importlib import import_module
from textwrap import dedent
from typing import Any

import numpy as np
import torch

_failures: Counter[tuple[str, str]] = Counter()


class Exercise:
    """A function to write. cases: of the notebook's objects (model, tokenizer, …), the arguments to try.

    of: what counts of a result, where right answers differ in the rest.
    """

    def __init__(
        self, answer: Callable, cases: Callable[..., Sequence[tuple]], hint: str, of: Callable[[Any], Any]
    ) -> None:
        self.answer, self.cases, self.hint, self.of = answer, cases, hint, of
        self.name, self.mistakes = answer.__name__, {}

    def __call__(self, *args: Any) -> Any:
        return self.answer(*args)

    def mistake(self, hint: str) -> Callable[[Callable], Callable]:
        """Decorate a function that makes a typical mistake: whoever makes it is told this hint."""

        def add(wrong: Callable) -> Callable:
            self.mistakes[hint] = wrong
            return wrong

        return add

    def verdict(self, attempt: Callable, cases: Sequence[tuple]) -> str:
        """What is wrong with an attempt, by its results on the cases; "" if nothing is."""
        found, wanted = (self.results(one, cases) for one in (attempt, self.answer))
        if same(found, wanted):
            return ""
        for hint, wrong in self.mistakes.items():
            if same(found, self.results(wrong, cases)):
                return hint
        case, got, right = next(row for row in zip(cases, found, wanted, strict=True) if not same(*row[1:]))
        return f"{self.name}({', '.join(map(_shown, case))}) gives {_shown(got)}, not {_shown(right)}."

    def results(self, function: Callable, cases: Iterable[tuple]) -> list[Any]:
        """What a function returns for each case, whose tensors and lists it may change without harm."""
        return [self.of(function(*map(_own, case))) for case in cases]


def exercise(
    cases: Callable[..., Sequence[tuple]], hint: str, of: Callable[[Any], Any] = lambda result: result
) -> Callable[[Callable], Exercise]:
    """Decorate the answer of an exercise; see `Exercise`. hint: for those who fail twice."""
    return lambda answer: Exercise(answer, cases, hint, of)


def find(notebook: str, name: str) -> Exercise:
    """The exercise of a notebook, such as "00", that asks for a function of that name. KeyError for none."""
    found = vars(import_module(f"{__name__}.nb{notebook}")).get(name)
    if not isinstance(found, Exercise):
        raise KeyError(f"notebook {notebook} has no exercise {name!r}: keep the name of the function")
    return found


def check(notebook: str, attempt: Callable, *context: Any) -> None:
    """Print whether an exercise is solved; nothing while its stub raises NotImplementedError.

    context: what the cases are made of, such as model and tokenizer. A typical mistake is named at once. The
    second failure brings a hint, the third the answer. Other exceptions of the attempt are not caught.
    """
    task = find(notebook, attempt.__name__)
    try:
        wrong = task.verdict(attempt, task.cases(*context))
    except NotImplementedError:
        return
    if not wrong:
        print(f"✔ {task.name}: right.")
        return
    _failures[notebook, task.name] += 1
    tries = _failures[notebook, task.name]
    more = f" Hint: {task.hint}" if tries > 1 else ""
    more += f' For the answer, type su.exercises.show("{notebook}", "{task.name}")' if tries > 2 else ""
    print(f"✘ {task.name}: not yet. {wrong}{more}")


def show(notebook: str, name: str) -> None:
    """Print the answer of an exercise."""
    print(source(find(notebook, name).answer))


def source(answer: Callable) -> str:
    """The text of a function without its decorators."""
    lines = dedent(inspect.getsource(answer)).rstrip().split("\n")
    return "\n".join(lines[next(i for i, line in enumerate(lines) if line.startswith("def ")) :])


def _own(value: Any) -> Any:
    """A copy of a tensor or a list; models and tokenizers as they are."""
    if isinstance(value, torch.Tensor):
        return value.clone()
    return copy.copy(value) if isinstance(value, list | dict) else value


def same(one: Any, other: Any) -> bool:
    """Whether two results are equal: of one shape, and numbers to a relative 10⁻³."""
    if isinstance(one, (str, bool, type(None))) or isinstance(other, (str, bool, type(None))):
        return type(one) is type(other) and one == other
    if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    try:
        a, b = (
            np.asarray(x.detach().float().cpu() if isinstance(x, torch.Tensor) else x) for x in (one, other)
        )
        if a.shape != b.shape:
            return False
        scale = max(np.abs(b[np.isfinite(b)]).max(initial=0), 1e-6)
        return bool(np.allclose(a, b, rtol=1e-3, atol=1e-4 * scale))
    except (TypeError, ValueError):  # no numbers
        return False


def _shown(value: Any) -> str:
    """A value in a message: numbers and short texts as they are, of tensors the shape, else the type."""
    if isinstance(value, torch.Tensor) and value.numel() > 6:
        return f"a tensor of shape {tuple(value.shape)}"
    if isinstance(value, torch.Tensor):
        return str(value.tolist())
    if isinstance(value, float) and not math.isnan(value):
        return f"{value:.4g}"
    simple = isinstance(value, (str, int, float, bool, type(None), list, tuple)) and len(repr(value)) < 80
    return repr(value) if simple else f"a {type(value).__name__}"
