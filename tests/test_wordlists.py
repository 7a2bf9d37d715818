"""The lists of words that steer towards a topic, and those that judge whether a text is on it."""

import re
from itertools import product

import pytest
from transformers import AutoTokenizer

from steer_utils import data, embedded
from steer_utils.pplm.bags import bag_of_words

FOLDER = data.DATA / "wordlists"
JUDGES = sorted(f"judge/{file.stem}" for file in (FOLDER / "judge").iterdir())
TOPICS = [name.removeprefix("judge/") for name in JUDGES]
LISTS = [*TOPICS, *JUDGES, "positive_words"]


def same_stem(one: str, other: str) -> bool:
    """Whether the first five letters are the same, or as many as the shorter word has."""
    length = min(5, len(one), len(other))
    return one[:length] == other[:length]


def single_words(entries: list[str]) -> set[str]:
    """The words of three letters or more in all entries, in lower case."""
    return {word for entry in entries for word in re.findall(r"\w{3,}", entry.casefold())}


def test_every_topic_has_a_list_to_steer_with_and_one_to_judge_by():
    assert len(TOPICS) == 12
    assert {file.stem for file in FOLDER.glob("*.txt")} == {*TOPICS, "positive_words", "wedding"}


def test_files_hold_one_entry_a_line_sorted_without_repetition():
    for name in LISTS:
        entries = data.words(name)
        folded = [entry.casefold() for entry in entries]
        assert (FOLDER / f"{name}.txt").read_text(encoding="utf-8") == "".join(f"{one}\n" for one in entries)
        assert [entry for entry in entries if entry != " ".join(entry.split())] == [], name
        assert folded == sorted(set(folded)), name
        assert len(folded) >= 50, name


def test_few_entries_to_steer_with_have_several_words_and_none_to_judge_by():
    counts = {name: sum(" " in entry for entry in data.words(name)) for name in TOPICS}
    assert [name for name, count in counts.items() if not 3 <= count <= 8] == []
    judging = [entry for name in JUDGES for entry in data.words(name)]
    assert [entry for entry in judging if not re.fullmatch(r"\w+", entry)] == []


def test_as_bags_they_want_no_fragment_of_a_word_and_no_bare_space():
    tokenizer = AutoTokenizer.from_pretrained(embedded.unpacked(embedded.DEFAULT))
    for name in [*TOPICS, "positive_words", "wedding"]:
        for entry in bag_of_words(name, tokenizer).entries:
            first, whole = (tokenizer.decode(ids).strip() for ids in (entry[:1], entry))
            assert len(first) >= 4 or first == whole.split()[0], (name, whole)


@pytest.mark.parametrize("topic", TOPICS)
def test_no_word_to_judge_by_is_one_to_steer_with_or_in_an_opening(topic):
    steering, judging = single_words(data.words(topic)), single_words(data.words(f"judge/{topic}"))
    assert [(one, other) for one, other in product(steering, judging) if same_stem(one, other)] == []
    assert [text for text in data.prompts() if judging & single_words([text])] == []


def test_words_have_the_same_stem_if_they_begin_alike():
    alike = [("orbit", "orbital"), ("court", "courtroom"), ("war", "warfare"), ("song", "song")]
    assert all(same_stem(one, other) and same_stem(other, one) for one, other in alike)
    assert not same_stem("protein", "proton")
    assert not same_stem("battle", "battalion")
