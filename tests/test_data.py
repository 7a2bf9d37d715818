"""The texts of the course, files of one's own in their place, rated sentences, and labelled texts."""

import io
import json
import os
import re
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
FIVE = [-1, -0.5, 0, 0.5, 1]
SIX = "id,comment_text,toxic,severe_toxic,obscene,threat,insult,identity_hate"


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


def test_the_openings_are_48_different_unfinished_sentences_in_two_equal_halves():
    openings, choose, test = (data.prompts(split=split) for split in (None, "choose", "test"))
    assert len({text.casefold() for text in openings}) == len(openings) == 48
    assert len(choose) == len(test) == 24
    assert sorted(choose + test) == sorted(openings)
    assert all(text == text.strip() and not text.endswith((".", "!", "?")) for text in openings)


@pytest.mark.parametrize(("name", "count"), SENTIMENT_PROMPTS.items())
def test_the_prompts_about_sentiment_are_unfinished_sentences_in_alternating_halves(name, count):
    texts = data.prompts(name)
    assert len(texts) == count
    assert (data.prompts(name, "choose"), data.prompts(name, "test")) == (texts[::2], texts[1::2])
    assert not [text for text in texts if text != " ".join(text.split()) or text[-1] in ".,:;!?"]
    assert not [text for text in texts if not text[0].isupper() or not 5 <= len(text.split()) <= 12]


def test_no_two_prompts_about_sentiment_begin_alike_nor_like_an_opening_or_a_hostile_one():
    for name in SENTIMENT_PROMPTS:
        begins = Counter(beginning(text) for text in data.prompts(name))
        assert not [begin for begin, count in begins.items() if count > 1]
        assert not begins.keys() & {beginning(text) for text in data.prompts() + data.prompts("hostile")}
    texts = [text.casefold() for name in SENTIMENT_PROMPTS for text in data.prompts(name)]
    assert len(set(texts)) == sum(SENTIMENT_PROMPTS.values())


def test_the_wedding_words_are_single_words_that_no_opening_holds():
    words = data.words("wedding")
    assert len(set(words)) == len(words) > 10
    assert all(word == word.lower() and word.isalpha() for word in words)
    assert not [text for text in data.prompts() if {*words} & {*text.lower().replace(",", "").split()}]


def test_every_line_of_prompts_is_in_the_layout_of_lm_steer_s_files_with_its_half():
    for path in (data.DATA / "prompts").glob("*.jsonl"):
        for line in map(json.loads, path.read_text(encoding="utf-8").splitlines()):
            assert line.keys() == {"prompt", "split"}
            assert line["prompt"].keys() == {"text"}
            assert line["split"] in ("choose", "test")


# --- files of one's own -----------------------------------------------------------------------------------


def test_a_path_works_in_place_of_a_name(tmp_path, monkeypatch):
    lines = [prompt("one"), prompt("two", split="test"), prompt("three", split="choose")]
    path = write_prompts(tmp_path / "own.jsonl", *lines)
    listed = tmp_path / "own.txt"
    listed.write_text("Sea\nshore\n", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    for place in (path, str(path), Path("own.jsonl"), "own.jsonl", "./own.jsonl"):
        assert data.prompts(place) == ["one", "two", "three"]
        assert data.prompts(place, "test") == ["two"]
    for place in (listed, "own.txt"):
        assert data.words(place) == ["Sea", "shore"]


def test_a_name_that_is_also_a_path_here_is_a_value_error_that_names_both(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("space").write_text("sea\n")
    with pytest.raises(ValueError, match=r"'\./space' .*DATA / 'wordlists' / 'space\.txt'"):
        data.words("space")
    assert data.words("./space") == data.words(Path("space")) == ["sea"]
    assert "planet" in " ".join(data.words(data.DATA / "wordlists" / "space.txt"))
    Path("space").unlink()
    Path("space").mkdir()  # a folder is no list of words
    assert data.words("space") == data.words(data.DATA / "wordlists" / "space.txt")


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


@pytest.mark.parametrize(("encoding", "end"), [("utf-8", "\r\n"), ("utf-8-sig", "\n")])
def test_a_line_is_an_entry_whatever_is_in_it(tmp_path, encoding, end):
    entries = ["black hole", "hip-hop", "Señor Ñandú", "fairy\u2028tale"]
    listed = tmp_path / "own.txt"
    listed.write_bytes(end.join([f"\t{entry} " for entry in entries]).encode(encoding))
    assert data.words(listed) == entries


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
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
    with pytest.raises(FileNotFoundError, match=rf"no prompts '{NOT_THERE}': give .*openings.*or a path"):
        data.prompts(NOT_THERE)
    with pytest.raises(FileNotFoundError, match=rf"'{NOT_THERE}'.* judge/space, .* space, .*wedding"):
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


@pytest.mark.parametrize("line", ['{"text": "a"}', '{"prompt": "a"}', "[1]", "a text", "7"])
def test_a_line_in_another_layout_is_a_value_error_that_quotes_it(tmp_path, line):
    path = write_prompts(tmp_path / "own.jsonl", prompt("one"))
    path.write_text(f"{path.read_text()}\n{line}\n")
    with pytest.raises(ValueError, match=rf"own\.jsonl has a line without .*{re.escape(repr(line))}"):
        data.prompts(path)


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


def test_the_rows_come_back_as_written_and_those_without_a_word_are_left_out(shelf):
    movie = data.rated_sentences("movie")
    assert list(movie.columns) == ["id", "rating", "text"]
    assert movie["id"].tolist() == ["1", "2", "10"]
    assert movie["rating"].tolist() == [2.5, -1.25, 0]
    assert movie["text"].tolist() == ['A lovely, "clever" little film.', "Le cliché, again & again", "NA"]
    shelf.unlink()  # it was fetched once, and is read from the cache
    assert cached() == [shelf.name]
    assert data.rated_sentences("tweets")["text"].tolist() == ["  yay #fun", "'so so", '"unclosed']
    assert data.rated_sentences("news").values.tolist() == [["12_3", -4.0, "Nothing works."]]
    products = data.rated_sentences("products")
    assert products["text"].tolist() == ["no crash so far"]
    assert products.index.tolist() == [0]


def test_every_fifth_document_is_in_the_split_to_test_on(shelf):
    embedded.cache_dir().mkdir()
    shelf.rename(embedded.cache_dir() / shelf.name)  # a copy put there by hand is used
    assert data.rated_sentences("movie", split="train")["id"].tolist() == ["1", "2"]
    test = data.rated_sentences("movie", split="test")
    assert (test["id"].tolist(), test.index.tolist()) == (["10"], [0])
    with pytest.raises(ValueError, match="split must be None, 'train' or 'test', not 'tset'"):
        data.rated_sentences("movie", split="tset")


def test_a_damaged_archive_in_the_cache_is_fetched_again_with_a_warning(shelf):
    embedded.cache_dir().mkdir()
    copy = embedded.cache_dir() / shelf.name
    copy.write_bytes(shelf.read_bytes()[:-7])
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


def test_an_unknown_kind_is_a_value_error_that_names_the_kinds():
    with pytest.raises(ValueError, match=r"'films'.*movie, tweets, products, news"):
        data.rated_sentences("films")


def test_of_several_callers_at_once_one_fetches_and_all_read(shelf, monkeypatch):
    calls = []

    def slow(path: Path) -> None:
        calls.append(path)
        time.sleep(0.3)  # the others have time to arrive at the lock
        shelf.rename(path)

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


# --- labelled texts --------------------------------------------------------------------------------------


def write(path: Path, *lines: str) -> Path:
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return path


def rows(table: pd.DataFrame) -> list[tuple[str, float]]:
    """The rows of a table that has the columns text and label and a fresh index."""
    assert list(table.columns) == ["text", "label"]
    assert table.index.tolist() == list(range(len(table)))
    assert table["label"].dtype == float
    return list(table.itertuples(index=False, name=None))


# --- film reviews in five classes -------------------------------------------------------------------------


def test_reviews_as_json_lines_become_five_labels(tmp_path):
    texts = ["007", "Nº 1, “x”\u2028y", "NA", "2001-01-01", "true"]
    lines = [json.dumps({"text": text, "label": i, "label_text": "…"}) for i, text in enumerate(texts)]
    path = write(tmp_path / "train.jsonl", *lines)
    assert rows(data.sst5(path)) == list(zip(texts, FIVE, strict=True))
    numbers = write(tmp_path / "numbers.jsonl", lines[0])  # a file of nothing but numbers is one of texts
    assert rows(data.sst5(numbers)) == [("007", -1)]


@pytest.mark.parametrize("label", [5, -1, 0.5, "good"])
def test_a_review_with_another_label_is_a_value_error_that_quotes_it(tmp_path, label):
    lines = [json.dumps({"text": "a", "label": one}) for one in (3, label)]
    with pytest.raises(ValueError, match=rf"own.jsonl has the label '?{label}'?; expected 0 to 4"):
        data.sst5(write(tmp_path / "own.jsonl", *lines))


def test_reviews_that_cannot_be_fetched_are_an_os_error_that_says_what_to_do(monkeypatch):
    def down(*_, **__):
        raise RuntimeError("no route")  # the Hub's HTTP library has a base class of its own

    monkeypatch.setattr(pd, "read_json", down)
    with pytest.raises(OSError, match=r"SetFit/sst5.*no route.*give a file that is here, or connect"):
        data.sst5()


# --- toxic comments ---------------------------------------------------------------------------------------


def comments(path: Path, toxic: int, clean: int) -> Path:
    """A file without names, clean comments first: "clean 0", … and then "toxic 0", …"""
    lines = [f"clean {i},0" for i in range(clean)] + [f"toxic {i},1" for i in range(toxic)]
    return write(path, *lines)


@pytest.mark.parametrize("column", ["target", "toxicity"])
def test_of_rated_comments_those_between_and_those_without_a_rating_are_left_out(tmp_path, column):
    shares = {
        "half": "0.5",
        "all": "1",
        "none": "0.0",
        "some": "0.4999",
        "blank": "",
        "few": "0.01",
        "nil": "0",
    }
    lines = [f'{i},"{text}, ""q""\nNA",{share},0.9' for i, (text, share) in enumerate(shares.items())]
    path = write(tmp_path / "train.csv", f"id,comment_text,{column},severe_toxicity", *lines)
    expected = [("half", -1), ("all", -1), ("none", 1), ("nil", 1)]
    assert rows(data.toxic_comments(path)) == [(f'{text}, "q"\nNA', label) for text, label in expected]


def test_a_comment_with_any_of_the_six_marks_is_toxic(tmp_path):
    for kind in range(6):
        marks = ",".join("1" if i == kind else "0" for i in range(6))
        unrated = ",".join(["-1"] * 6)
        lines = ["0a,NA,0,0,0,0,0,0", f"0b,bah,{marks}", f"0c,unrated,{unrated}"]
        path = write(tmp_path / "train.csv", SIX, *lines)
        assert rows(data.toxic_comments(path)) == [("NA", 1), ("bah", -1)]


def test_of_a_large_file_only_the_columns_that_decide_are_read(tmp_path, monkeypatch):
    read, asked = pd.read_csv, []
    monkeypatch.setattr(
        data.pd, "read_csv", lambda *args, **kwargs: asked.append(kwargs) or read(*args, **kwargs)
    )
    path = write(tmp_path / "train.csv", "id,target,comment_text,other", "1,1,bah,5", "2,0,fine,6")
    assert rows(data.toxic_comments(path)) == [("bah", -1), ("fine", 1)]
    assert [set(one.get("usecols", ())) for one in asked if one.get("nrows") is None] == [
        {"comment_text", "target"}
    ]


def test_a_file_without_names_holds_texts_and_0_or_1(tmp_path):
    path = write(tmp_path / "own.csv", '"None",0', '"bah, humbug",1')
    assert rows(data.toxic_comments(str(path))) == [("None", 1), ("bah, humbug", -1)]


def test_as_many_clean_comments_are_drawn_as_are_toxic(tmp_path):
    path = comments(tmp_path / "own.csv", toxic=10, clean=100)
    texts = data.toxic_comments(path)["text"].tolist()
    assert texts[10:] == [f"toxic {i}" for i in range(10)]
    drawn = [int(text.removeprefix("clean ")) for text in texts[:10]]
    assert drawn == sorted(set(drawn))  # the order of the file, none twice
    assert drawn != list(range(10))


def test_the_seed_says_which_are_drawn(tmp_path):
    path = comments(tmp_path / "own.csv", toxic=40, clean=100)
    tables = [data.toxic_comments(path, per_class=8, seed=seed) for seed in (0, 0, 1)]
    assert [table["label"].tolist() for table in tables] == [[1] * 8 + [-1] * 8] * 3
    pd.testing.assert_frame_equal(tables[0], tables[1])
    for label in (-1, 1):
        first, other = (set(table["text"][table["label"] == label]) for table in (tables[0], tables[2]))
        assert first != other


def test_a_class_with_too_few_comments_is_taken_whole_with_a_warning(tmp_path):
    path = comments(tmp_path / "own.csv", toxic=3, clean=5)
    with pytest.warns(UserWarning, match=r"only 3 toxic comments, not 4: draw per_class=3") as caught:
        table = data.toxic_comments(path, per_class=4)
    assert caught[0].filename == __file__
    assert table["label"].value_counts().to_dict() == {1: 4, -1: 3}
    with pytest.warns(UserWarning, match=r"only 2 clean comments, not 6: draw per_class=2"):
        table = data.toxic_comments(comments(tmp_path / "most.csv", toxic=6, clean=2))
    assert table["label"].value_counts().to_dict() == {1: 2, -1: 6}


def test_comments_without_a_text_are_left_out(tmp_path):
    path = write(tmp_path / "train.csv", "comment_text,target", "bah,1", '" ",1', "fine,0", ",0")
    assert rows(data.toxic_comments(path)) == [("bah", -1), ("fine", 1)]


def test_a_missing_file_is_an_error_that_says_what_to_download(tmp_path):
    names = "'Jigsaw Unintended Bias in Toxicity Classification' or 'Toxic Comment Classification Challenge'"
    with pytest.raises(FileNotFoundError, match=rf"no file '{tmp_path}/train\.csv': .*Kaggle.*{names}"):
        data.toxic_comments(tmp_path / "train.csv")


@pytest.mark.parametrize("header", ["text,label", "id,target", "comment_text,toxic,severe_toxic", "text,0,1"])
def test_other_columns_are_a_value_error_that_lists_them_and_those_expected(tmp_path, header):
    path = write(tmp_path / "own.csv", header, header.replace("text", "bah"))
    expected = (
        "comment_text with target, with toxicity or with toxic, .*, identity_hate; or a text and 0 or 1"
    )
    with pytest.raises(
        ValueError, match=rf"own\.csv has the columns {', '.join(header.split(','))}; .*{expected}"
    ):
        data.toxic_comments(path)


@pytest.mark.parametrize("score", ["1.5", "-0.2", "nan"])
def test_a_score_that_is_not_from_0_to_1_is_a_value_error_that_quotes_it(tmp_path, score):
    path = write(tmp_path / "train.csv", "comment_text,target", "a,1", f"b,{score}", "c,0")
    with pytest.raises(ValueError, match=rf"train\.csv has the score '{score}'; expected 0 to 1"):
        data.toxic_comments(path)


@pytest.mark.parametrize(
    ("lines", "missing"),
    [
        (["a,0", "b,0"], "toxic comments among 2"),
        (["a,1", "b,0.3"], "clean"),
        (["a,0.3"], "toxic"),
        (['" ",1', "a,0"], "toxic"),
    ],
    ids=["no-toxic", "no-clean", "neither", "blank"],
)
def test_a_class_without_comments_is_a_value_error_that_names_it(tmp_path, lines, missing):
    path = write(tmp_path / "train.csv", "comment_text,target", *lines)
    with pytest.raises(ValueError, match=rf"train\.csv has no {missing}"):
        data.toxic_comments(path)


def test_per_class_below_1_is_a_value_error_that_quotes_it(tmp_path):
    path = comments(tmp_path / "own.csv", toxic=2, clean=2)
    with pytest.raises(ValueError, match="per_class=0: give at least 1"):
        data.toxic_comments(path, per_class=0)
