"""Tables for readers: completions side by side, texts escaped and wrapped, intervals as they are read."""

import re
from collections.abc import Mapping, Sequence
from functools import partial
from html import escape
from typing import Any

import pandas as pd
from IPython.display import HTML, display
from rich.console import Console
from rich.table import Column, Table
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from ..generation import Steers, as_list, compare, generate
from ..measure.metrics import Interval
from ..models import Model, Tokenizer


def print_n_comparisons(
    model: Model,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    prompt: str,
    activation_additions: Steers = None,
    num_comparisons: int = 5,
    tokens_to_generate: int = 40,
    seed: int | None = None,
    **sampling: Any,
) -> None:
    """Print unsteered (left) and, with any steers as `activation_additions`, steered completions (right)."""
    settings = {"num_samples": num_comparisons, "max_new_tokens": tokens_to_generate, "seed": seed} | sampling
    steers = as_list(activation_additions)
    write = partial(compare, steer=steers) if steers else generate
    found = write(model, tokenizer, prompt, **settings)
    words = [word for steer in steers for word in getattr(steer, "words", ())]
    titles = ("Unsteered completions", "Steered completions")[: found["steered"].nunique()]
    texts = [
        [_coloured(prompt, text, words) for text in group["completion"]]
        for _, group in found.groupby("sample")
    ]
    if Console().is_jupyter:
        display(_as_html(titles, texts))
        return
    table = Table(*(Column(title, ratio=1) for title in titles), show_lines=True, expand=True)
    for row in texts:
        table.add_row(*row)
    Console().print(table)


def texts(columns: Mapping[str, Sequence[str]], words: Sequence[str] = ()) -> HTML:
    """A table of texts for a notebook, a column for each title; given words are coloured.

    Texts are escaped, so that tags a model has written stay text, and wrapped, so that a phone shows all.
    """
    rows = zip(*columns.values(), strict=True)
    return _as_html(
        list(columns), [[_coloured("", " ".join(one.split()), words) for one in row] for row in rows]
    )


def completions(
    model: Model,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    steers: Mapping[str, Steers],
    words: Sequence[str] = (),
    **settings: Any,
) -> HTML:
    """What `generate` writes now after each prompt, a column for each steer: see `texts`.

    settings: those of `generate`; give a seed, so that the columns draw from the same random numbers.
    """
    write = partial(generate, model, tokenizer, prompts, **settings)
    written = {title: write(steer=steer)["completion"] for title, steer in steers.items()}
    return texts({"prompt": prompts} | written, words)


def intervals(table: pd.DataFrame) -> pd.DataFrame:
    """A table of intervals, such as `measure.trials.outcomes`, as text: shares in per cent."""

    def column(values: pd.Series) -> list[str]:
        form = ".2f" if re.search("ratio|loss|perplexity|distinct", str(values.name)) else ".0%"
        return [
            f"{one:{form}}" if isinstance(one, Interval) else f"{one:g}".replace("nan", "–") for one in values
        ]

    return pd.DataFrame({name: column(values) for name, values in table.items()}, index=table.index)


def _as_html(titles: Sequence[str], rows: Sequence[Sequence[Text]]) -> HTML:
    """A table of which a phone shows all columns, as it does not of rich's."""

    def cell(text: Text) -> str:
        parts = text.render(Console(force_jupyter=False))
        spans = (
            f'<span style="{part.style.get_html_style() if part.style else ""}">{escape(part.text)}</span>'
            for part in parts
            if part.text
        )
        return (
            f'<td style="text-align: left; vertical-align: top; white-space: pre-line">{"".join(spans)}</td>'
        )

    lines = [
        "".join(f"<th>{escape(title)}</th>" for title in titles),
        *("".join(map(cell, row)) for row in rows),
    ]
    return HTML(f"<table>{''.join(f'<tr>{line}</tr>' for line in lines)}</table>")


def _coloured(prompt: str, completion: str, words: Sequence[str]) -> Text:
    """The prompt in bold and the completion with the given words in colour, in any case."""
    text = Text(completion)
    if words:
        longest_first = "|".join(map(re.escape, sorted(words, key=len, reverse=True)))
        text.highlight_regex(rf"(?i)\b(?:{longest_first})\b", "bold red")
    return Text.assemble((prompt, "bold"), text)
