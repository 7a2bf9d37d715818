"""What arguments may be: beartype checks each call against its annotations, and errors say so in plain words.

`MEANING` says where an annotation means less or more than to Python: True is no number, a text is no list of
letters, a list has an order, NumPy's numbers and columns of a table count, and every item of a list counts.
Functions made anew for each token or steer have no annotations: each time a check would be compiled.
"""

import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence, Set
from numbers import Integral, Real
from reprlib import Repr
from typing import Annotated, Any, get_origin

from beartype import BeartypeConf, BeartypeViolationVerbosity, FrozenDict
from beartype.claw import beartype_package
from beartype.vale import Is

Messages = Sequence[Mapping[str, str]]  # of a conversation, [{"role": "user", "content": "Hello"}, …]
Prompts = str | Messages | Iterable[str | Messages]
Texts = Sequence[str | Sequence[int]]  # strings, or token ids with BOS in front

Test = Callable[[Any], bool]


def is_text(value: Any) -> bool:
    return isinstance(value, str) and (value.isascii() or not re.search("[\ud800-\udfff]", value))


def is_flag(value: Any) -> bool:
    return type(value).__name__ in ("bool", "bool_")  # NumPy's, too


def is_whole(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def is_several(item: Test) -> Test:
    """A test of values that are read once, all by the same test; those of an iterator are seen later."""

    def test(value: Any) -> bool:
        unordered = isinstance(value, str | bytes | Mapping | Set) or getattr(value, "ndim", 1) != 1
        if unordered or not isinstance(value, Iterable) or getattr(value, "is_meta", False):
            return False
        return isinstance(value, Iterator) or all(map(item, getattr(value, "tolist", lambda: value)()))

    return test


def is_list(item: Test) -> Test:
    """The same for a list, a tuple, an array [N] or a column of a table."""
    return lambda value: (
        hasattr(value, "__getitem__") and hasattr(value, "__len__") and is_several(item)(value)
    )


def is_tuple(item: Test) -> Test:
    return lambda value: isinstance(value, tuple) and all(map(item, value))


def is_dict(item: Test) -> Test:
    return lambda value: isinstance(value, Mapping) and all(map(item, value.values()))


def is_table(value: Any) -> bool:
    """Whether it is a list of lists of numbers, or an array [N, M]."""
    in_array = getattr(value, "ndim", 0) == 2 and re.match("int|float", str(getattr(value, "dtype", "")))
    rows = value.tolist() if in_array else value
    return is_list(is_list(is_number))(rows)


def is_words(value: Any) -> bool:
    return all(map(is_text, value)) if isinstance(value, Set) else is_list(is_text)(value)


def is_messages(value: Any) -> bool:
    return is_list(lambda one: isinstance(one, Mapping))(value) and len(value) > 0


is_prompts = is_several(lambda one: is_text(one) or isinstance(one, Mapping) or is_messages(one))
MEANING: dict[Any, tuple[Test, str]] = {  # a test for each annotation, and what an error asks for
    bool: (is_flag, "True or False"),
    int: (is_whole, "a whole number"),
    float: (is_number, "a number"),
    str: (is_text, "a text"),
    Prompts: (lambda value: is_text(value) or is_prompts(value), "a text, messages or a list of them"),
    Texts: (is_list(lambda one: is_text(one) or is_list(is_whole)(one)), "a list of texts or of token ids"),
    Messages: (is_messages, "messages"),
    Collection[str]: (is_words, "several texts"),
    Sequence[str]: (is_list(is_text), "a list of texts"),
    Sequence[int]: (is_list(is_whole), "a list of whole numbers"),
    Sequence[bool]: (is_list(is_flag), "a list of True and False"),
    Sequence[float]: (is_list(is_number), "a list of numbers"),
    Sequence[Sequence[float]]: (is_table, "a list of lists of numbers"),
    Mapping[str, Sequence[str]]: (is_dict(is_list(is_text)), "lists of texts by name"),
    Iterable[str]: (is_several(is_text), "a list of texts"),
    Iterable[int]: (is_several(is_whole), "a list of whole numbers"),
    Iterable[float]: (is_several(is_number), "a list of numbers"),
    Iterable[str | int]: (is_several(lambda one: is_text(one) or is_whole(one)), "a list of hooks"),
    tuple[tuple[int, ...], ...]: (is_tuple(is_tuple(is_whole)), "a tuple of tuples of token ids"),
    Sequence[int | None]: (is_list(lambda one: one is None or is_whole(one)), "a list of whole numbers"),
    tuple[str, ...]: (is_tuple(is_text), "a tuple of texts"),
}


def plain(hint: Any) -> str:
    """An annotation without the modules of its names."""
    return re.sub(r"<class '(.*?)'>", r"\1", re.sub(r"(?<![\w.])(?:\w+\.)+(?=\w)", "", str(hint)))


_words = {plain(hint): words for hint, (_, words) in MEANING.items()}
_words |= {"PreTrainedTokenizerBase": "a tokenizer", "Module": "a model", "Tensor": "a tensor"}
_words |= {"Steer": "a steer", "NoneType": "None"}
_repr = Repr()
_repr.maxstring = _repr.maxother = 80


def described(test: Test, words: str) -> Any:
    """The annotation of values that pass a test; an error asks for the words."""
    test.__qualname__ = words  # where beartype finds a test's name
    return Annotated[Any, Is[test]]


def several(item: Test, words: str) -> Any:
    """The same of some values in order that all pass a test."""
    return described(is_several(item), words)


def by_name(item: Test, words: str) -> Any:
    """The same of the values of a dict."""
    return described(is_dict(item), words)


def shown(value: Any) -> str:
    """A value as an error quotes it."""
    kind, text = type(value).__name__, " ".join(_repr.repr(value).split())
    return text if kind in ("str", "int", "float", "bool", "NoneType") else f"the {kind} {text}"


def require(holds: Any, what: str, **named: Any) -> None:
    """ValueError unless it holds; it says what the named argument must be."""
    if not holds:
        ((name, value),) = named.items()
        raise ValueError(f"{name} must be {what}, not {shown(value)}")


def holds(kinds: str, values: Any) -> bool:
    """Whether a tensor or an array holds numbers of some kinds ("float|int"), and in memory."""
    return bool(re.search(kinds, str(values.dtype))) and not getattr(values, "is_meta", False)


def require_columns(table: Any, *names: str) -> None:
    """ValueError for a table without a column."""
    if missing := [name for name in names if name not in table]:
        raise ValueError(f"the table lacks the column {missing[0]!r}: it has {list(table.columns)}")


class WrongType(TypeError):
    """An argument is not what its function takes; made from what beartype says, and the value."""

    def __init__(self, message: str, culprits: Sequence[object] = (None,)) -> None:
        where, _, hint = message.removesuffix(".").rpartition(" violates type hint ")
        function, name = re.match(r"[\w ]* ([\w.<>]+)\(\) (?:parameter (\w+)=|return)", where).groups()
        function = re.sub(r"\.__(init|new)__$", "", function).rpartition(".")[2]
        known = "|".join(map(re.escape, sorted(_words, key=len, reverse=True)))
        wanted = re.sub(rf"(?<!\w)({known})(?!\w)", lambda found: _words[found[0]], plain(hint))
        wanted = re.sub(r"Annotated\[.*?Is\[(.*?)\]\]", r"\1", wanted)
        wanted = re.sub(r"Union\[(.*)\]", lambda found: found[1].replace(", ", " | "), wanted)
        wanted, given = wanted.replace(" | ", " or "), culprits[0]
        torn = re.search(r".{,40}(?<!\\)\\ud[89a-f].{,40}", repr(given))
        found = shown(given) + (f", with half a character in {torn[0]}" if torn else "")
        super().__init__(f"{name or 'the result'} of {function} must be {wanted}, not {found}")


class _Meaning(FrozenDict):
    """What stands for an annotation. Items of other containers are not seen: beartype would draw one."""

    def get(self, hint: Any, default: Any = None) -> Any:
        kind = get_origin(hint)
        has_items = isinstance(kind, type) and issubclass(kind, Iterable)
        listed = has_items and (kind is not tuple or hint.__args__[-1] is Ellipsis)
        return super().get(hint, kind if listed else default)


# The modules that are imported from here on; `__init__` imports this one first.
beartype_package(
    __package__,
    conf=BeartypeConf(
        claw_is_pep526=False,
        hint_overrides=_Meaning({hint: Annotated[Any, Is[test]] for hint, (test, _) in MEANING.items()}),
        is_color=False,
        violation_type=WrongType,
        violation_verbosity=BeartypeViolationVerbosity.MINIMAL,
        warning_cls_on_decorator_exception=None,
    ),
)
