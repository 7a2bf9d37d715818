"""Labelled texts: public files in each of their layouts, and tables of one's own."""

import json
import math
import sys
from pathlib import Path

import pandas as pd
import pytest

from steer_utils import data

FIVE = [-1, -0.5, 0, 0.5, 1]
SIX = "id,comment_text,toxic,severe_toxic,obscene,threat,insult,identity_hate"


def write(path: Path, *lines: str) -> Path:
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return path


def rows(table: pd.DataFrame) -> list[tuple[str, float]]:
    """The table's rows, after a look at what every loader promises: two columns and a fresh index."""
    assert list(table.columns) == ["text", "label"]
    assert table.index.tolist() == list(range(len(table)))
    assert table["label"].dtype == float
    return list(table.itertuples(index=False, name=None))


# --- any table --------------------------------------------------------------------------------------------


def test_any_two_columns_become_text_and_label():
    table = pd.DataFrame(
        {"stars": [-1, 0.25, 1], "review": [" so so ", "NA", "fine"], "id": 7}, index=[5, 3, 9]
    )
    assert rows(data.labelled(table, "review", "stars")) == [(" so so ", -1), ("NA", 0.25), ("fine", 1)]
    assert list(table.columns) == ["stars", "review", "id"]  # the table itself stays as it was


def test_numbers_written_as_text_are_numbers():
    assert rows(data.labelled(pd.DataFrame({"text": ["a", "b"], "label": ["-1", "0.5"]}))) == [
        ("a", -1),
        ("b", 0.5),
    ]


def test_rows_without_text_or_label_are_left_out_and_counted():
    texts = ["good", None, "", " \n", "no label", "bad"]
    table = pd.DataFrame({"text": texts, "label": [1, 1, 1, 1, math.nan, -1]})
    with pytest.warns(UserWarning, match="left out 4 of 6 rows") as caught:
        assert rows(data.labelled(table)) == [("good", 1), ("bad", -1)]
    assert caught[0].filename == __file__  # the warning points at the line that asked


@pytest.mark.parametrize(
    ("labels", "quoted"),
    [([0, 1, 4, 5], "4"), ([0.5, -1.01], r"-1\.01"), (["bad", "good"], "'bad'"), ([math.inf], "inf")],
)
def test_a_label_out_of_range_is_a_value_error_that_quotes_the_first_and_says_how_to_map(labels, quoted):
    table = pd.DataFrame({"text": "a", "stars": labels})
    with pytest.raises(ValueError, match=rf'label {quoted} is not .* -1 to 1: .*table\["stars"\]\.map'):
        data.labelled(table, label="stars")


@pytest.mark.parametrize("labels", [[True, False], [True, None]])
def test_true_and_false_are_no_labels(labels):  # False would be neutral
    table = pd.DataFrame({"text": "a", "label": pd.Series(labels, dtype=object)}).dropna()
    with pytest.raises(ValueError, match="label True is not a number"):
        data.labelled(table)


def test_a_column_that_is_not_there_is_a_value_error_that_names_those_there_are():
    table = pd.DataFrame({"review": ["a"], "label": [1]})
    with pytest.raises(ValueError, match=r"no column \['text'\].*review, label"):
        data.labelled(table)


def test_a_table_without_a_whole_row_is_a_value_error():
    with pytest.raises(ValueError, match="none of the 0 rows"):
        data.labelled(pd.DataFrame({"text": [], "label": []}))
    table = pd.DataFrame({"text": ["", "b"], "label": [1, None]})
    with pytest.warns(UserWarning, match="2 of 2"), pytest.raises(ValueError, match="none of the 2 rows"):
        data.labelled(table)


# --- film reviews in five classes -------------------------------------------------------------------------


@pytest.fixture
def jsonl(tmp_path: Path) -> Path:
    """Five lines as the Hub has them, one of each class."""
    lines = [{"text": f"Nº {i}, “x”\u2028y", "label": i, "label_text": "…"} for i in range(5)]
    return write(tmp_path / "train.jsonl", *(json.dumps(line, ensure_ascii=False) for line in lines))


@pytest.mark.parametrize("as_type", [str, Path])
def test_lines_with_a_label_in_front_become_five_labels(tmp_path, as_type):
    lines = [f"__label__{i}\tA `` film ''\twith a {i} ." for i in range(1, 6)]
    path = write(tmp_path / "sst_train.txt", lines[0], "", *lines[1:])
    found = rows(data.sst5(as_type(path)))
    assert found == [(f"A `` film ''\twith a {i + 1} .", label) for i, label in enumerate(FIVE)]


def test_json_lines_become_five_labels(jsonl):
    assert rows(data.sst5(jsonl)) == [(f"Nº {i}, “x”\u2028y", label) for i, label in enumerate(FIVE)]


@pytest.mark.parametrize(
    "line",
    [
        "__label__6\tToo good",
        "__label__0\tToo bad",
        "__label__3",
        "3\tNo such layout",
        '{"text": "no label"}',
        '{"sentence": "a", "label": 1}',
        '["a", 1]',
        '{"text": "cut o',
    ],
)
def test_a_line_in_another_layout_is_a_value_error_that_quotes_it(tmp_path, line):
    path = write(tmp_path / "own.txt", "__label__3\tfine", line)
    with pytest.raises(ValueError, match="is neither __label__1 to __label__5") as raised:
        data.sst5(path)
    assert repr(line) in str(raised.value)


@pytest.mark.parametrize("label", [5, -1, 0.5, "1", None])
def test_a_json_label_that_is_not_0_to_4_is_a_value_error_that_quotes_it(tmp_path, label):
    lines = [json.dumps({"text": "a", "label": given}) for given in (0, label)]
    with pytest.raises(ValueError, match=r"own\.jsonl has the label .*, not 0 to 4") as raised:
        data.sst5(write(tmp_path / "own.jsonl", *lines))
    assert str(label) in str(raised.value) or label is None


@pytest.mark.parametrize("source", ["sst_train.txt", "train.jsonl", Path("SetFit/sst5")])
def test_a_file_that_is_not_there_is_not_looked_for_on_the_hub(tmp_path, monkeypatch, source):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(FileNotFoundError, match=f"no file {source}: give the path"):
        data.sst5(source)


def test_without_datasets_the_hub_is_an_error_that_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)  # import then fails as if it were not installed
    with pytest.raises(ModuleNotFoundError, match=r"'SetFit/sst5' is not a file.*pip install datasets"):
        data.sst5()


def test_datasets_gives_the_split_asked_for(jsonl, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", jsonl.parent.parent / "cache")
    write(jsonl.parent / "test.jsonl", '{"text": "of the test split", "label": 4, "label_text": "…"}')
    folder = str(jsonl.parent)  # datasets takes a folder of such files for a data set with their splits
    assert [label for _, label in rows(data.sst5(folder))] == FIVE
    assert rows(data.sst5(folder, "test")) == [("of the test split", 1)]
    with pytest.raises(ValueError, match="tset"):
        data.sst5(folder, "tset")


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


@pytest.mark.parametrize("kind", range(6))
def test_a_comment_with_any_of_the_six_marks_is_toxic(tmp_path, kind):
    marks = ",".join("1" if i == kind else "0" for i in range(6))
    unrated = ",".join(["-1"] * 6)
    path = write(tmp_path / "train.csv", SIX, "0a,NA,0,0,0,0,0,0", f"0b,bah,{marks}", f"0c,unrated,{unrated}")
    assert rows(data.toxic_comments(path)) == [("NA", 1), ("bah", -1)]


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
    with pytest.warns(UserWarning, match=r"only 3 .* label -1, not 4.*per_class=3") as caught:
        table = data.toxic_comments(path, per_class=4)
    assert caught[0].filename == __file__
    assert table["label"].value_counts().to_dict() == {1: 4, -1: 3}
    with pytest.warns(UserWarning, match=r"only 2 .* label \+1, not 6.*per_class=2"):
        table = data.toxic_comments(comments(tmp_path / "most.csv", toxic=6, clean=2))
    assert table["label"].value_counts().to_dict() == {1: 2, -1: 6}


def test_comments_without_a_text_are_left_out_and_counted(tmp_path):
    path = write(tmp_path / "train.csv", "comment_text,target", "bah,1", '" ",1', "fine,0", ",0")
    with pytest.warns(UserWarning, match="left out 2 of 4 rows"):
        assert rows(data.toxic_comments(path)) == [("bah", -1), ("fine", 1)]


def test_a_missing_file_is_an_error_that_says_what_to_download(tmp_path):
    names = '"Jigsaw Unintended Bias in Toxicity Classification" or "Toxic Comment Classification Challenge"'
    with pytest.raises(FileNotFoundError, match=rf"no file {tmp_path}/train\.csv: .*Kaggle.*{names}"):
        data.toxic_comments(tmp_path / "train.csv")


@pytest.mark.parametrize(
    "header", ["id,comment_text", "text,label", "id,target", "comment_text,toxic,severe_toxic", "text,0,1"]
)
def test_other_columns_are_a_value_error_that_lists_them_and_those_expected(tmp_path, header):
    path = write(tmp_path / "own.csv", header, header.replace("text", "bah"))
    expected = (
        "comment_text with target, with toxicity or with toxic, .*, identity_hate; or a text and 0 or 1"
    )
    with pytest.raises(
        ValueError, match=rf"own\.csv has the columns {', '.join(header.split(','))}; .*{expected}"
    ):
        data.toxic_comments(path)


@pytest.mark.parametrize("score", ["1.5", "-0.2", "high", "nan"])
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
)
def test_a_class_without_comments_is_a_value_error_that_names_it(tmp_path, lines, missing):
    path = write(tmp_path / "train.csv", "comment_text,target", *lines)
    with pytest.raises(ValueError, match=rf"train\.csv has no {missing}"):
        data.toxic_comments(path)


@pytest.mark.parametrize("per_class", [0, -3])
def test_per_class_below_1_is_a_value_error_that_quotes_it(tmp_path, per_class):
    path = comments(tmp_path / "own.csv", toxic=2, clean=2)
    with pytest.raises(ValueError, match=f"per_class={per_class}: give at least 1"):
        data.toxic_comments(path, per_class=per_class)
