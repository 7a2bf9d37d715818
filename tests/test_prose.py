"""The prose of the notebooks: no measured numbers typed by hand, no word that the glossary replaces."""

import re
from pathlib import Path

import nbformat
import pytest

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("[0-9]*.ipynb"))
each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)

# Numbers that are settings, definitions or others' results, by notebook. Everything that was measured here
# is printed by the cells that measured it.
CONSTANTS: dict[str, set[str]] = {}
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
    known = CONSTANTS.get(path.stem[:2], set())
    assert sorted(set(numbers(prose(path))) - known) == []


@each_notebook
def test_one_word_for_one_thing(path: Path):
    wrong = re.findall(
        r"(?i)\b(openings?|no steering|the model alone|plain (?:model|text|completions?))\b", prose(path)
    )
    assert wrong == []
