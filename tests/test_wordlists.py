"""The lists of words that steer towards a topic, and those that judge whether a text is on it."""

import re
from itertools import product

import pytest

from steer_utils import data

TOPICS = [
    "health",
    "kitchen",
    "legal",
    "military",
    "monsters",
    "music",
    "politics",
    "religion",
    "science",
    "space",
    "sports",
    "technology",
]
JUDGES = [f"judge/{topic}" for topic in TOPICS]
LISTS = [*TOPICS, "positive_words", *JUDGES]


def same_stem(one: str, other: str) -> bool:
    """Whether the first five letters are the same, or as many as the shorter word has."""
    length = min(5, len(one), len(other))
    return one[:length] == other[:length]


def single_words(entries: list[str]) -> set[str]:
    """The words of three letters or more in all entries, in lower case."""
    return {word for entry in entries for word in re.findall(r"\w{3,}", entry.casefold())}


def test_every_topic_has_a_list_to_steer_with_and_one_to_judge_by():
    folder = data.DATA / "wordlists"
    assert sorted(file.stem for file in (folder / "judge").iterdir()) == TOPICS
    assert {file.stem for file in folder.glob("*.txt")} == {*TOPICS, "positive_words", "wedding"}


@pytest.mark.parametrize("name", LISTS)
def test_a_file_is_one_entry_a_line_and_nothing_else(name):
    content = (data.DATA / "wordlists" / f"{name}.txt").read_text(encoding="utf-8")
    assert content == "".join(f"{entry}\n" for entry in data.words(name))


@pytest.mark.parametrize("name", LISTS)
def test_a_list_is_long_enough_and_sorted_without_repetition(name):
    folded = [entry.casefold() for entry in data.words(name)]
    assert len(folded) >= 50
    assert folded == sorted(set(folded))


@pytest.mark.parametrize("name", LISTS)
def test_the_words_of_an_entry_have_one_space_between_them(name):
    assert [entry for entry in data.words(name) if entry != " ".join(entry.split())] == []


@pytest.mark.parametrize("name", TOPICS)
def test_few_entries_to_steer_with_have_several_words(name):
    assert 3 <= sum(" " in entry for entry in data.words(name)) <= 8


@pytest.mark.parametrize("name", JUDGES)
def test_entries_to_judge_by_are_single_words(name):
    assert [entry for entry in data.words(name) if not re.fullmatch(r"\w+", entry)] == []


@pytest.mark.parametrize("topic", TOPICS)
def test_no_word_to_judge_by_has_the_stem_of_one_to_steer_with(topic):
    steering, judging = single_words(data.words(topic)), single_words(data.words(f"judge/{topic}"))
    assert [(one, other) for one, other in product(steering, judging) if same_stem(one, other)] == []


@pytest.mark.parametrize("topic", TOPICS)
def test_no_opening_is_on_a_topic_by_itself(topic):
    judging = single_words(data.words(f"judge/{topic}"))
    assert [text for text in data.prompts() if judging & single_words([text])] == []


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("orbit", "orbital", True),
        ("court", "courtroom", True),
        ("war", "warfare", True),
        ("song", "song", True),
        ("protein", "proton", False),
        ("battle", "battalion", False),
    ],
)
def test_words_have_the_same_stem_if_they_begin_alike(one, other, same):
    assert same_stem(one, other) is same
    assert same_stem(other, one) is same
