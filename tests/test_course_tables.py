"""Tables for readers: comparisons in a terminal and in a notebook, texts, intervals."""

import re

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import tiny

import steer_utils as su
from steer_utils.course import tables
from steer_utils.measure.metrics import Interval

UP = su.OffsetSteer(3 * torch.arange(97.0).sin()[None], epsilon=1.0).at(1)


def cells(shown: str) -> list[list[str]]:
    """The cells of a table drawn with lines, row by row, without the spaces in their texts."""
    rows, row = [], None
    for line in shown.splitlines():
        if "│" not in line and "┃" not in line:
            row = None  # a rule
            continue
        parts = line.replace("┃", "│").strip().strip("│").split("│")
        if row is None:
            row = [""] * len(parts)
            rows.append(row)
        for i, part in enumerate(parts):
            row[i] += part.replace(" ", "")
    return rows


def squeezed(text: str) -> str:
    return "".join(text.split())


@pytest.mark.parametrize("width", ["60", "200"])
def test_comparisons_show_both_titles_and_every_completion_behind_its_prompt(
    tokenizer, capsys, monkeypatch, width
):
    monkeypatch.setenv("COLUMNS", width)
    settings = {"seed": 3, "temperature": 0.9, "freq_penalty": 1, "top_p": 0.8}
    su.print_n_comparisons(
        tiny("llama"),
        tokenizer,
        prompt="[b]I hate",
        activation_additions=[UP],
        num_comparisons=4,
        tokens_to_generate=9,
        **settings,
    )
    table = su.compare(
        tiny("llama"), tokenizer, "[b]I hate", steer=UP, num_samples=4, max_new_tokens=9, **settings
    )
    shown = [squeezed(table["prompt"][0] + text) for text in table["completion"]]
    assert cells(capsys.readouterr().out) == [
        ["Unsteeredcompletions", "Steeredcompletions"],
        *([shown[i], shown[i + 4]] for i in range(4)),
    ]


@pytest.mark.parametrize("additions", [None, []], ids=["none", "empty"])
def test_comparisons_without_additions_have_one_column(tokenizer, capsys, additions):
    su.print_n_comparisons(
        tiny("llama"),
        tokenizer,
        prompt="ab",
        activation_additions=additions,
        num_comparisons=2,
        tokens_to_generate=5,
        seed=0,
    )
    assert {len(row) for row in cells(capsys.readouterr().out)} == {1}


def test_in_a_notebook_comparisons_are_a_table_of_html(tokenizer, monkeypatch):
    shown = []
    monkeypatch.setattr("rich.console._is_jupyter", lambda: True)
    monkeypatch.setattr(tables, "display", shown.append)
    settings = {"num_comparisons": 3, "tokens_to_generate": 5, "seed": 0}
    su.print_n_comparisons(tiny("llama"), tokenizer, prompt="a<b ", activation_additions=[UP], **settings)
    table = shown[0].data
    assert re.findall(r"<th>(.*?)</th>", table) == ["Unsteered completions", "Steered completions"]
    assert table.count("<tr>") == 4
    assert table.count('<span style="font-weight: bold">a&lt;b </span>') == 6


def test_the_words_of_a_bag_are_coloured_whole_and_in_any_case():
    words = ["star", "hole", "black hole", "e.g"]
    text = tables._coloured("star ", "the STAR, a starry black hole e.g. exg", words)
    painted = [text.plain[span.start : span.end] for span in text.spans if "red" in str(span.style)]
    assert painted == ["STAR", "black hole", "e.g"]
    assert not [span for span in tables._coloured("a", "star", []).spans if "red" in str(span.style)]


def test_a_table_of_texts_is_escaped_and_colours_words_in_it():
    shown = tables.texts({"a<b": ["<script>alert(1)</script> x\n y"], "c": ["a Star"]}, words=["star"]).data
    assert "<script>" not in shown
    assert "&lt;script&gt;alert(1)&lt;/script&gt; x y" in shown
    assert "<th>a&lt;b</th>" in shown
    assert re.search(r'color: #[0-9a-f]+[^"]*"\s*>Star<', shown)


def test_completions_stand_beside_their_prompts_a_column_for_each_steer(tokenizer):
    how = {"max_new_tokens": 5, "seed": 1}
    prompts, by = ["ab", "a<b"], {"none": None, "up": UP}
    shown = tables.completions(tiny("llama"), tokenizer, prompts, by, words=["x"], **how).data
    columns = {
        name: su.generate(tiny("llama"), tokenizer, prompts, steer=one, **how)["completion"]
        for name, one in by.items()
    }
    assert shown == tables.texts({"prompt": prompts} | columns, words=["x"]).data
    assert columns["none"].tolist() != columns["up"].tolist()
    assert re.findall(r"<th>(.*?)</th>", shown) == ["prompt", "none", "up"]


def test_intervals_are_shares_in_per_cent_and_ratios_as_numbers():
    half = Interval(0.5, 0.25, 0.75)
    columns = {"VADER": {"a": half}, "perplexity ratio": {"a": half}, "loss on news": {"a": np.nan}}
    shown = tables.intervals(pd.DataFrame(columns))
    assert shown.loc["a"].tolist() == ["50% [25%, 75%]", "0.50 [0.25, 0.75]", "–"]
    assert tables.intervals(pd.DataFrame()).empty  # nothing was measured with this model
