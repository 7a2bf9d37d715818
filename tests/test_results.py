"""README and docs/ say what the files in figures/ say, and every measuring notebook is in them."""

import importlib.util
import json
import re
from pathlib import Path
from types import ModuleType

import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

ROOT = Path(__file__).parents[1]


def load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("results", ROOT / "notebooks" / "results.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


results = load()
PARTS = ("results", "speed")
MARKED = "a\n<!-- results -->\nSTALE\n<!-- end of results -->\nb\n<!-- speed -->\n<!-- end of speed -->\nc\n"


@pytest.fixture
def figures(tmp_path, monkeypatch):
    """A folder of figures with a benchmark and one notebook's numbers."""
    row = {"name": "a ÷ b", "ratio": 1.01, "interval": [0.99, 1.2], "bound": 1.03, "holds": True}
    slow = {"name": "c ÷ d", "ratio": 2.3274, "interval": [2.0, 3.0], "bound": 2.0, "holds": False}
    bench = {"machine": "cpu, 2 threads", "versions": {"torch": "9"}, "rows": [row, slow]}
    cost, topics = [1.5, 1.25, 2], {"x": 1, "y": 2}
    numbers = {"on": [0.8182, 0.7, 0.9], "off": 0.03, "n": 12, "topics": topics, "cost": cost}
    (tmp_path / "bench.json").write_text(json.dumps(bench), encoding="utf-8")
    (tmp_path / "00_one.json").write_text(json.dumps(numbers), encoding="utf-8")
    (tmp_path / "minutes.json").write_text('{"00_one": {"seconds": 61, "GB": 2}}', encoding="utf-8")
    full = {"00_one": {"minutes": {"T4": 12.4, "CPU": 1400.6}, "GB": {"a": 6.2, "b": 1.5}}}
    (tmp_path / "full.json").write_text(json.dumps(full), encoding="utf-8")
    tried = {"gpt2": {"text": "yes", "additions": "yes"}, "bloom": {"text": "yes", "additions": "two"}}
    known = {"types": {"gpt2": "found", "bert": "refused: a: b"}, "transformers": "9", "families": tried}
    (tmp_path / "models.json").write_text(json.dumps(known), encoding="utf-8")
    about = PngInfo()
    about.add_text("Description", "Share of x")
    Image.new("L", (1, 1)).save(tmp_path / "00_one.png", pnginfo=about)
    monkeypatch.setattr(results, "FIGURES", tmp_path)
    monkeypatch.setattr(results, "PICTURES", ["00_one"])
    line = results.Result("it", "00_one", ("on",), ("off",), "{n} openings × {topics} topics", ("cost",))
    monkeypatch.setattr(results, "RESULTS", [line])
    return tmp_path


# --- the repository's own ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", results.PAGES)
def test_a_page_says_what_the_files_say(name: str):
    page = (ROOT / name).read_text(encoding="utf-8")
    assert results.written(page, *results.PAGES[name]) == page, "type: .venv/bin/python notebooks/results.py"


def test_each_part_is_on_one_page_and_the_readme_is_short():
    assert sorted(part for parts in results.PAGES.values() for part in parts) == sorted(results.PARTS)
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150
    assert results.main_results().count("\n") == 1 + len(results.MAIN_RESULTS) <= 9
    assert results.main_speed().count("\n") == 1 + len(results.MAIN_SPEED) <= 7


def test_every_notebook_has_a_line_of_results_and_every_picture_is_there():
    notebooks = {path.stem[:2] for path in (ROOT / "notebooks").glob("0*.ipynb")}  # of the lessons
    assert {one.file[:2] for one in results.RESULTS} == notebooks, "list it in notebooks/results.py"
    assert [name for name in results.PICTURES if not (ROOT / "figures" / f"{name}.png").is_file()] == []


# --- what is made of numbers ------------------------------------------------------------------------------


def test_architectures_with_the_same_support_share_a_line(figures):
    said = results.models()
    assert "9 has 2 types of causal model. The blocks of 1 are found; 1 are refused" in said
    assert said.endswith("| gpt2 | yes | yes |\n| bloom | yes | no |")


def test_the_readme_counts_the_models_on_which_everything_works(figures):
    said = results.types()
    assert "9 has 2 types of causal model. The blocks of 1 are found. " in said
    assert "Of 2 types that were tried, with random weights, every kind of every method works on 1;" in said


def test_only_what_stands_between_marks_is_made_anew_and_twice_is_as_once(figures):
    once = results.written(MARKED, *PARTS)
    assert once.startswith("a\n<!-- results -->\n\n| ")
    assert "STALE" not in once
    assert re.findall(r"^[abc]$", once, re.MULTILINE) == ["a", "b", "c"]
    assert results.written(once, *PARTS) == once


def test_the_full_profile_has_a_column_for_each_device_and_the_sum_of_the_models(figures):
    assert results.full().splitlines()[2] == "| 00 | a, b | 12 | 1,401 | 7.7 |"


def test_minutes_come_from_the_run(figures):
    line = "| [00 One](notebooks/00_one.ipynb) | what you do | 9 |\n"
    other = "| [01 Two](notebooks/01_two.ipynb) | what you do | 9 |\n"
    done = results.written(line + other)
    assert line.replace("| 9 |", "| 1.5 |") + other in done


def test_a_line_has_numbers_intervals_counts_and_cost(figures):
    line = "| 00 | it | 3% | 82% [70%, 90%] | ×\u202f1.50 [1.25, 2.00] | 12 openings × 2 topics |"
    assert line in results.results().splitlines()
    assert "![Share of x](../figures/00_one.png)" in results.results()


def test_a_line_of_the_benchmark_says_whether_its_bound_holds(figures):
    assert results.speed().splitlines() == [
        "cpu, 2 threads; torch 9:",
        "",
        "|  | median [lowest, highest run] | at most | holds |",
        "| --- | --- | --- | --- |",
        "| a ÷ b | 1.01 [0.99, 1.2] | 1.03 | yes |",
        "| c ÷ d | 2.33 [2, 3] | 2 | **no** |",
    ]


def test_a_gpu_has_a_table_of_its_own(figures):
    bench = json.loads((figures / "bench.json").read_text(encoding="utf-8")) | {"machine": "cuda, a GPU"}
    (figures / "bench_cuda.json").write_text(json.dumps(bench), encoding="utf-8")
    first, second = results.speed().split("cuda, a GPU; torch 9:")
    assert first.strip().endswith(second.strip())


def test_a_changed_number_changes_the_page(figures):
    before = results.written(MARKED, *PARTS)
    numbers = json.loads((figures / "00_one.json").read_text(encoding="utf-8"))
    (figures / "00_one.json").write_text(json.dumps(numbers | {"on": [0.5, 0.4, 0.6]}), encoding="utf-8")
    assert results.written(before, *PARTS) != before


@pytest.mark.parametrize("page", ["no marks", MARKED.replace("<!-- end of speed -->", ""), MARKED + MARKED])
def test_a_page_without_its_marks_is_an_error_that_quotes_them(figures, page):
    with pytest.raises(ValueError, match=r"<!-- (results|speed) -->"):
        results.written(page, *PARTS)


def test_a_path_that_leads_nowhere_is_an_error(figures):
    (figures / "00_one.json").write_text('{"on": 1, "n": 2, "topics": 3, "cost": 4}', encoding="utf-8")
    with pytest.raises(KeyError, match="off"):
        results.results()
