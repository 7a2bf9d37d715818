"""The texts of the course, and files of one's own in their place."""

import io
import json
import os
import tarfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from steer_utils import data, embedded

NOT_THERE = "no-such-list"
SENTIMENT_PROMPTS = {"neutral": 200, "positive": 100, "negative": 100}


def write_prompts(path: Path, *lines: dict | str) -> Path:
    """A JSONL file; a line given as text is written as it is."""
    rows = [line if isinstance(line, str) else json.dumps(line, ensure_ascii=False) for line in lines]
    path.write_bytes("".join(row + "\n" for row in rows).encode())
    return path


def prompt(text: str, **more: str) -> dict:
    return {"prompt": {"text": text}, **more}


def beginning(text: str) -> tuple[str, ...]:
    """The first three words, whatever their case and the commas behind them."""
    return tuple(text.casefold().replace(",", "").split()[:3])


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


@pytest.mark.parametrize(("name", "count"), SENTIMENT_PROMPTS.items())
def test_the_prompts_about_sentiment_are_in_alternating_halves(name, count):
    assert len(data.prompts(name)) == count
    assert data.prompts(name, "choose") == data.prompts(name)[::2]
    assert data.prompts(name, "test") == data.prompts(name)[1::2]


@pytest.mark.parametrize("name", SENTIMENT_PROMPTS)
def test_the_prompts_about_sentiment_are_unfinished_sentences_of_five_to_twelve_words(name):
    texts = data.prompts(name)
    assert not [text for text in texts if text != " ".join(text.split()) or text[-1] in ".,:;!?"]
    assert not [text for text in texts if not text[0].isupper() or not 5 <= len(text.split()) <= 12]


@pytest.mark.parametrize("name", SENTIMENT_PROMPTS)
def test_no_two_prompts_about_sentiment_begin_alike_nor_like_an_opening_or_a_hostile_one(name):
    begins = Counter(beginning(text) for text in data.prompts(name))
    assert not [begin for begin, count in begins.items() if count > 1]
    assert not begins.keys() & {beginning(text) for text in data.prompts() + data.prompts("hostile")}


def test_no_prompt_about_sentiment_is_in_two_files():
    texts = [text.casefold() for name in SENTIMENT_PROMPTS for text in data.prompts(name)]
    assert len(set(texts)) == sum(SENTIMENT_PROMPTS.values())


def test_the_wedding_words_are_single_words_in_lower_case_without_repetition():
    words = data.words("wedding")
    assert len(words) > 10
    assert len(set(words)) == len(words)
    assert all(word == word.lower() and word.isalpha() for word in words)


def test_no_opening_speaks_of_weddings_by_itself():
    wedding = set(data.words("wedding"))
    assert not [text for text in data.prompts() if wedding & set(text.lower().replace(",", "").split())]


@pytest.mark.parametrize("name", ["openings", "hostile", *SENTIMENT_PROMPTS])
def test_every_line_is_in_the_layout_of_lm_steer_s_files_with_its_half(name):
    lines = (data.DATA / "prompts" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    for line in map(json.loads, lines):
        assert line.keys() == {"prompt", "split"}
        assert line["prompt"].keys() == {"text"}
        assert line["split"] in ("choose", "test")


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


def test_files_in_the_layouts_of_lm_steer_and_realtoxicityprompts_are_read(tmp_path):
    sentiment = {"md5_hash": "06da", "prompt": {"text": "It made"}, "continuation": {"text": ", though."}}
    scored = {"text": "Today they are", "toxicity": 0.17, "threat": None}
    toxicity = {"filename": "1.txt", "begin": 363, "end": 436, "challenging": False, "prompt": scored}
    path = write_prompts(tmp_path / "theirs.jsonl", sentiment | {"num_positive": 0}, toxicity)
    assert data.prompts(path) == ["It made", "Today they are"]
    with pytest.raises(ValueError, match=r"theirs\.jsonl has no prompts of split 'test'"):
        data.prompts(path, "test")


def test_blank_lines_are_skipped(tmp_path):
    lines = ["", prompt("one"), "   ", "\t", prompt("two"), ""]
    assert data.prompts(write_prompts(tmp_path / "own.jsonl", *lines)) == ["one", "two"]
    listed = tmp_path / "own.txt"
    listed.write_text("\n\nsea\n  \nshore \n\n", encoding="utf-8")
    assert data.words(listed) == ["sea", "shore"]


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_a_line_is_an_entry_whatever_is_in_it(tmp_path, encoding, end):
    entries = ["black hole", "hip-hop", "Señor Ñandú", "fairy\u2028tale"]
    listed = tmp_path / "own.txt"
    listed.write_bytes(end.join([f"\t{entry} " for entry in entries]).encode(encoding))
    assert data.words(listed) == entries


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
    with pytest.raises(FileNotFoundError, match=rf"'{NOT_THERE}'.* judge/space, .* space, .*wedding.*\.txt"):
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


@pytest.mark.parametrize("encoding", ["latin-1", "utf-16"])
def test_a_list_in_another_encoding_is_a_value_error_that_says_how_to_save_it(tmp_path, encoding):
    listed = tmp_path / "own.txt"
    listed.write_bytes("café\nsauté\n".encode(encoding))
    with pytest.raises(ValueError, match=rf"{listed} is not UTF-8.*save it as UTF-8"):
        data.words(listed)


# --- rated sentences --------------------------------------------------------------------------------------

ROWS = {  # lines of the files: id, mean rating, text
    "movie": [
        '1\t2.5\tA lovely, "clever" little film.',
        "2\t-1.25\tLe cliché, again &amp; again",
        "10\t0\tNA",
    ],
    "tweets": ["1\t3\t  yay #fun", "2\t-0.5\t'so so", '3\t0.1\t"unclosed'],
    "products": ["1_1\t-0.05\t...", "1_2\t0.6\t!", "2_1\t0.05\t) 3a.", "2_2\t1.5\tno crash so far"],
    "news": ["12_3\t-4\tNothing works."],
}


def add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    entry = tarfile.TarInfo(name)
    entry.size = len(content)
    archive.addfile(entry, io.BytesIO(content))


def write_source(folder: Path) -> Path:
    """A source distribution laid out like the one with the rated sentences, with ROWS in it."""
    inner = io.BytesIO()
    with tarfile.open(fileobj=inner, mode="w:gz") as archive:
        for kind, rows in ROWS.items():
            text = "\r\n".join(rows)  # as there, the last line has no end
            add(archive, f"hutto_ICWSM_2014/{data.RATED[kind]}_GroundTruth.txt", text.encode())
    name = f"{data.RATED_PACKAGE}-{data.RATED_VERSION}"
    setup = (
        f"from setuptools import setup\nsetup(name={data.RATED_PACKAGE!r}, version={data.RATED_VERSION!r})\n"
    )
    info = f"Metadata-Version: 2.1\nName: {data.RATED_PACKAGE}\nVersion: {data.RATED_VERSION}\n"
    with tarfile.open(folder / f"{name}.tar.gz", "w:gz") as archive:
        add(archive, f"{name}/setup.py", setup.encode())
        add(archive, f"{name}/PKG-INFO", info.encode())
        add(archive, f"{name}/additional_resources/hutto_ICWSM_2014.tar.gz", inner.getvalue())
    return folder / f"{name}.tar.gz"


@pytest.fixture
def shelf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A source distribution in a folder, the only place where pip looks; an empty cache beside it."""
    (tmp_path / "shelf").mkdir()
    source = write_source(tmp_path / "shelf")
    monkeypatch.setattr(data, "RATED_SHA256", embedded.sha256(source))
    monkeypatch.setenv("STEER_UTILS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(source.parent))
    return source


def cached() -> list[str]:
    """Names of the files in the cache, locks aside."""
    return [file.name for file in embedded.cache_dir().iterdir() if file.suffix != ".lock"]


def test_the_rows_come_back_with_ids_ratings_and_texts_as_written(shelf):
    movie = data.rated_sentences("movie")
    assert list(movie.columns) == ["id", "rating", "text"]
    assert movie["id"].tolist() == ["1", "2", "10"]
    assert movie["rating"].tolist() == [2.5, -1.25, 0]
    assert movie["text"].tolist() == ['A lovely, "clever" little film.', "Le cliché, again & again", "NA"]
    assert data.rated_sentences("tweets")["text"].tolist() == ["  yay #fun", "'so so", '"unclosed']
    assert data.rated_sentences("news").values.tolist() == [["12_3", -4.0, "Nothing works."]]


def test_rows_without_a_word_are_left_out_and_the_rest_is_numbered_anew(shelf):
    products = data.rated_sentences("products")
    assert products["text"].tolist() == ["no crash so far"]
    assert products.index.tolist() == [0]


def test_the_sentences_are_fetched_once_and_then_read_from_the_cache(shelf):
    data.rated_sentences("movie")
    shelf.unlink()
    assert cached() == [shelf.name]
    assert len(data.rated_sentences("movie")) == len(ROWS["movie"])


def test_a_damaged_archive_in_the_cache_is_fetched_again_with_a_warning(shelf):
    data.rated_sentences("movie")
    copy = embedded.cache_dir() / shelf.name
    copy.write_bytes(copy.read_bytes()[:-7])
    with pytest.warns(UserWarning, match="damaged; fetching it again") as caught:
        assert len(data.rated_sentences("movie")) == len(ROWS["movie"])
    assert caught[0].filename == __file__  # the warning points at the line that asked
    assert copy.read_bytes() == shelf.read_bytes()


def test_an_archive_with_another_checksum_is_refused_before_its_setup_runs(shelf, tmp_path):
    content = shelf.read_bytes()
    ran = tmp_path / "ran"
    with tarfile.open(shelf, "w:gz") as archive:
        name = shelf.name.removesuffix(".tar.gz")
        add(archive, f"{name}/setup.py", f"open({str(ran)!r}, 'w').close()".encode())
    assert shelf.read_bytes() != content
    with pytest.raises(OSError, match=r"pip could not fetch vaderSentiment==3\.3\.2"):
        data.rated_sentences("movie")
    assert not ran.exists()
    assert cached() == []


def test_without_an_index_the_error_says_what_to_type_and_where_the_file_goes(shelf):
    shelf.unlink()
    typed = r"pip download --no-deps --no-binary vaderSentiment vaderSentiment==3\.3\.2"
    place = rf"copy vaderSentiment-3\.3\.2\.tar\.gz to {embedded.cache_dir()}"
    with pytest.raises(OSError, match=rf"(?s)it said: ERROR.*{typed}.*{place}"):
        data.rated_sentences("movie")
    assert cached() == []


def test_a_copy_put_there_by_hand_is_used(shelf):
    embedded.cache_dir().mkdir()
    shelf.rename(embedded.cache_dir() / shelf.name)
    assert len(data.rated_sentences("news")) == 1


def test_an_unknown_kind_is_a_value_error_that_names_the_kinds():
    with pytest.raises(ValueError, match=r"'films'.*movie, tweets, products, news"):
        data.rated_sentences("films")


def test_of_several_callers_at_once_one_fetches_and_all_read(shelf, monkeypatch):
    calls, fetch = [], data._fetch

    def slow(path: Path) -> None:
        calls.append(path)
        time.sleep(0.5)  # the others have time to arrive at the lock
        fetch(path)

    monkeypatch.setattr(data, "_fetch", slow)
    with ThreadPoolExecutor(3) as pool:
        tables = list(pool.map(data.rated_sentences, ["movie", "news", "tweets"]))
    assert [len(table) for table in tables] == [len(ROWS[kind]) for kind in ("movie", "news", "tweets")]
    assert len(calls) == 1


def test_the_real_sentences_are_as_many_as_their_authors_say(rated):
    sizes = {kind: len(table) for kind, table in rated.items()}
    assert sizes == {"movie": 10_605, "tweets": 4_200, "products": 3_703, "news": 5_190}


def test_the_real_sentences_are_whole(rated):
    table = pd.concat(rated.values(), ignore_index=True)
    assert table["rating"].between(-4, 4).all()
    assert not table.isna().any().any()
    assert not table["text"].str.contains("Ã|\ufffd").any()  # read in the wrong encoding
    assert all(table["id"].is_unique for table in rated.values())
