"""The prose of the notebooks: no measured numbers typed by hand, no word that the glossary replaces."""

import re
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("[0-9]*.ipynb"))
each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)

# Numbers that are settings, definitions or others' results, by notebook. Everything that was measured here
# is printed by the cells that measured it.
CONSTANTS = {
    "00": "0 1 2 30 90 95",
    "01": "0 0.01 0.03 0.1 0.11 0.15 0.5 0.8 0.99 1 1.5 2 2.5 3 5 10 11.1 15 25 "
    "39.85 43.62 44.04 46.9 50 51.7 100 345",
    "02": "0 1 10 30 100 768 0.004 0.008 -2 -3",
    "03": "0 0.5 1 1.3 2 2.5 5 6 14 15 16.0 18.5 20 20.4 25 29.3 35 50 90 100",
    "04": "0 1 −1 2 4 12 20 48",
    "05": "0 0.001 0.15 0.7 0.9 1 5 6 −6 8 24 25 25.5 28.3 32 50 61 62 64 80 82 85 90.7 200 240 320 1000 "
    "1,000 4,096 10,000",
    "06": "0 0.2 1 1.5 5 10 25 32 120 135 270 400 1,500 4,000 5,000",
    "07": "0 1 2 3 4 5 6 7 8 9 10 13 20 50 100 2,000 290,000 −1 −3 −4 −6",
    "08": "0 0.1 0.25 0.5 1 1.5 2 6 20 90 95 100",
    "09": "0 1 2 3 4 6 8 1.3 20 24 50 60 64 256",
    "10": "0 1 2 3 6",
    "11": "0 1 2,000 1.3.0",
}
NAMES = r"GPT-2|gpt2-\w+|Gemma \d\w*|SmolLM2(-135M)?|MiniLM-L6|SST-?5|T4|A100|PPLM\.jl 0\.1\.0|Python 3\.\d+"


def prose(path: Path) -> str:
    """A notebook's Markdown without code, formulas, links, tables' rules, answers and headings."""
    cells = [cell.source for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "markdown"]
    text = "\n".join(cells)
    text = re.sub(r"## References.*", "", text, flags=re.DOTALL)
    for noise in (
        r"<details>.*?</details>",
        r"```.*?```",
        r"`[^`]*`",
        r"\$\$.*?\$\$",
        r"\$[^$]*\$",
        r"!?\[[^\]]*\]\([^)]*\)",
        r"^#+ .*$",
        r"^\*\*Time and memory\*\*.*$",
        NAMES,
    ):
        text = re.sub(noise, " ", text, flags=re.DOTALL if noise[0] != "^" else re.MULTILINE)
    return text


def numbers(text: str) -> list[str]:
    """Numbers that are not years, dates of works, or numbers of lessons, sections, exercises and lists."""
    text = re.sub(r"\b(19|20)\d\d\b", " ", text)
    text = re.sub(
        r"(?i)\b(notebooks?|sections?|exercises?|tables?|figures?|steps?) \d+( (and|to|or) \d+)*", " ", text
    )
    text = re.sub(r"\(?(easy|medium|hard|harder|open), \d+ minutes?\)?", " ", text)
    text = re.sub(r"^\s*\d+\. ", " ", text, flags=re.MULTILINE)
    return re.findall(r"(?<![\w.])[−-]?\d[\d,.]*\d|(?<![\w.])[−-]?\d(?![\w])", text)


@each_notebook
def test_numbers_in_prose_are_constants_of_a_list(path: Path):
    known = {path.stem[:2], *(f"0{i}" for i in range(9)), *CONSTANTS[path.stem[:2]].split()}
    assert sorted(set(numbers(prose(path))) - known) == []


@each_notebook
def test_one_word_for_one_thing(path: Path):
    wrong = re.findall(
        r"(?i)\b(openings?|no steering|the model alone|plain (?:model|text|completions?))\b", prose(path)
    )
    assert wrong == []


def test_every_file_that_is_named_is_there():
    texts = [*ROOT.glob("*.md"), *(ROOT / "notebooks").glob("*.[mi]*"), *(ROOT / "data").glob("*.md")]
    named = r"[`(]((?:data|figures|notebooks|steer_utils|tests)/[\w./-]+?)/?[`)]"
    found = {name for path in texts for name in re.findall(named, path.read_text(encoding="utf-8"))}
    assert len(found) > 20
    assert sorted(name for name in found if not (ROOT / name).exists()) == []
