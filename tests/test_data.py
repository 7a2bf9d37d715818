"""The texts of the course, and files of one's own in their place."""

import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from steer_utils import data

NOT_THERE = "no-such-list"


def write_prompts(path: Path, *lines: dict | str) -> Path:
    """A JSONL file; a line given as text is written as it is."""
    rows = [line if isinstance(line, str) else json.dumps(line, ensure_ascii=False) for line in lines]
    path.write_bytes("".join(row + "\n" for row in rows).encode())
    return path


def prompt(text: str, **more: str) -> dict:
    return {"prompt": {"text": text}, **more}


# --- what the course brings -------------------------------------------------------------------------------


def test_there_are_48_openings_and_no_two_are_alike():
    openings = data.prompts()
    assert len(openings) == 48
    assert len({text.casefold() for text in openings}) == 48


def test_half_of_the_openings_are_to_choose_by_and_the_other_half_to_test_on():
    choose, test = data.prompts(split="choose"), data.prompts(split="test")
    assert len(choose) == len(test) == 24
    assert set(choose).isdisjoint(test)
    assert sorted(choose + test) == sorted(data.prompts())


def test_openings_end_where_a_completion_can_go_on():
    assert all(text == text.strip() and not text.endswith((".", "!", "?")) for text in data.prompts())


def test_the_wedding_words_are_single_words_in_lower_case_without_repetition():
    words = data.words("wedding")
    assert len(words) > 10
    assert len(set(words)) == len(words)
    assert all(word == word.lower() and word.isalpha() for word in words)


def test_no_opening_speaks_of_weddings_by_itself():
    wedding = set(data.words("wedding"))
    assert not [text for text in data.prompts() if wedding & set(text.lower().replace(",", "").split())]


# --- files of one's own -----------------------------------------------------------------------------------


@pytest.mark.parametrize("as_type", [str, Path])
def test_a_path_works_in_place_of_a_name(tmp_path, monkeypatch, as_type):
    lines = [prompt("one"), prompt("two", split="test"), prompt("three", split="choose")]
    path = write_prompts(tmp_path / "own.jsonl", *lines)
    listed = tmp_path / "own.txt"
    listed.write_text("Sea\nshore\n", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    for place in (path, Path("own.jsonl")):
        assert data.prompts(as_type(place)) == ["one", "two", "three"]
        assert data.prompts(as_type(place), "test") == ["two"]
    for place in (listed, Path("own.txt")):
        assert data.words(as_type(place)) == ["Sea", "shore"]


def test_blank_lines_are_skipped(tmp_path):
    lines = ["", prompt("one"), "   ", "\t", prompt("two"), ""]
    assert data.prompts(write_prompts(tmp_path / "own.jsonl", *lines)) == ["one", "two"]
    listed = tmp_path / "own.txt"
    listed.write_text("\n\nsea\n  \nshore \n\n", encoding="utf-8")
    assert data.words(listed) == ["sea", "shore"]


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    texts=st.lists(
        st.text(st.characters(codec="utf-8"), max_size=20) | st.sampled_from(["a\u2028b", "a\x85b", " é\n"]),
        min_size=1,
        max_size=5,
    )
)
def test_every_text_comes_back_as_it_was_written(tmp_path, texts):
    path = write_prompts(tmp_path / "own.jsonl", *(prompt(text) for text in texts))
    assert data.prompts(path) == texts


# --- errors -----------------------------------------------------------------------------------------------


def test_an_unknown_name_is_an_error_that_names_it_and_what_there_is(tmp_path):
    with pytest.raises(FileNotFoundError, match=rf"prompts '{NOT_THERE}'.*openings.*\.jsonl"):
        data.prompts(NOT_THERE)
    with pytest.raises(FileNotFoundError, match=rf"wordlists '{NOT_THERE}'.*wedding.*\.txt"):
        data.words(NOT_THERE)
    with pytest.raises(FileNotFoundError, match=str(tmp_path / NOT_THERE)):
        data.words(tmp_path / NOT_THERE)
    with pytest.raises(FileNotFoundError, match="openings"):
        data.prompts(tmp_path)  # a folder


def test_a_split_that_no_line_has_is_a_value_error_that_quotes_it(tmp_path):
    with pytest.raises(ValueError, match=r"openings.*'tset'"):
        data.prompts(split="tset")
    without = write_prompts(tmp_path / "own.jsonl", prompt("one"))
    with pytest.raises(ValueError, match=r"own\.jsonl.*'test'"):
        data.prompts(without, "test")


def test_a_file_without_words_or_prompts_is_a_value_error_that_names_it(tmp_path):
    (tmp_path / "empty.txt").write_text("\n \n")
    with pytest.raises(ValueError, match=r"empty\.txt"):
        data.words(tmp_path / "empty.txt")
    with pytest.raises(ValueError, match=r"empty\.jsonl"):
        data.prompts(write_prompts(tmp_path / "empty.jsonl"))
