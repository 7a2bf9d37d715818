"""Exercises: every answer passes, every mistake gets its own hint, on a tiny model."""

import inspect
import pkgutil

import pytest
import torch
from conftest import tiny

from steer_utils.course import exercises

NOTEBOOKS = [name.removeprefix("nb") for _, name, _ in pkgutil.iter_modules(exercises.__path__)]
ALL = [
    (number, one)
    for number in NOTEBOOKS
    for one in vars(exercises.import_module(f"{exercises.__name__}.nb{number}")).values()
    if isinstance(one, exercises.Exercise)
]
NAMES = [f"{number}-{one.name}" for number, one in ALL]


def context(task, tokenizer):
    given = {"model": tiny("llama"), "tokenizer": tokenizer}
    return [given[name] for name in inspect.signature(task.cases).parameters]


@pytest.fixture(autouse=True)
def first_try():
    exercises._failures.clear()


@pytest.mark.parametrize(("number", "task"), ALL, ids=NAMES)
def test_the_answer_is_right_and_each_mistake_gets_its_own_hint(number, task, tokenizer, capsys):
    given = context(task, tokenizer)
    exercises.check(number, task.answer, *given)
    assert capsys.readouterr().out == f"✔ {task.name}: right.\n"
    assert len(task.mistakes) >= 2
    for hint, wrong in task.mistakes.items():
        assert task.verdict(wrong, task.cases(*given)) == hint


def always(value):
    def probability_of(model, tokenizer, prompt, word):
        return value

    return probability_of


def test_nothing_is_said_before_the_first_try(tokenizer, capsys):
    def probability_of(model, tokenizer, prompt, word):
        raise NotImplementedError

    exercises.check("00", probability_of, tiny("llama"), tokenizer)
    assert capsys.readouterr().out == ""


def test_the_second_failure_brings_a_hint_and_the_third_the_answer(tokenizer, capsys):
    shown = []
    for _ in range(3):
        exercises.check("00", always(0.5), tiny("llama"), tokenizer)
        shown.append(capsys.readouterr().out)
    assert "gives 0.5, not " in shown[0]
    assert "Hint:" not in shown[0]
    assert "Hint:" in shown[1]
    assert "su.exercises.show" not in shown[1]
    assert 'su.exercises.show("00", "probability_of")' in shown[2]
    exercises.show("00", "probability_of")
    assert capsys.readouterr().out.startswith("def probability_of(model, tokenizer, prompt, word):\n")


def test_an_exception_of_an_attempt_keeps_its_line(tokenizer):
    def probability_of(model, tokenizer, prompt, word):
        return 1 / 0

    with pytest.raises(ZeroDivisionError) as caught:
        exercises.check("00", probability_of, tiny("llama"), tokenizer)
    assert "return 1 / 0" in str(caught.traceback[-1].statement)


def test_an_unknown_exercise_is_named():
    with pytest.raises(KeyError, match="no exercise 'nothing'"):
        exercises.find("00", "nothing")


@pytest.mark.parametrize(
    ("one", "other", "equal"),
    [
        (torch.ones(2), [1.0, 1.0], True),
        (1.0, 1.0001, True),
        (1.0, 1.01, False),
        (torch.ones(2), torch.ones(1, 2), False),
        ("a", "a", True),
        ("a", 1, False),
        (None, 0.0, False),
        ([1, [2.0, "a"]], (1, (2.0, "a")), True),
        ([1, 2], [1, 2, 3], False),
        (True, 1, False),
        ([1.0, float("inf")], [1.0, float("inf")], True),
        ([1.0, float("inf")], [2.0, float("inf")], False),
        (object(), 1.0, False),
    ],
)
def test_results_are_equal_up_to_rounding_and_of_one_shape(one, other, equal):
    assert exercises.same(one, other) is equal
