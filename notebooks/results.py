"""Write the tables of the README and of docs/, and the README's minutes, from the numbers in figures/.

python notebooks/results.py    `make figures` and `make bench` end with it

Only the text between the pairs of marks changes, and the last column of the table of notebooks.
"""

import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

ROOT = Path(__file__).parents[1]
FIGURES = ROOT / "figures"

Keys = tuple[str, ...]  # a path of keys into a JSON file


class Result(NamedTuple):
    """One line of the table of results.

    file: name of a JSON file in figures/; its first two characters are the notebook's number. with_it,
    without: where the steered value and the one it is compared with are. n: the sample sizes, with keys of
    the file in braces; a list or an object stands for its length. cost: where the perplexity ratio is,
    steered over unsteered. form: the number format.
    """

    label: str
    file: str
    with_it: Keys
    without: Keys | None
    n: str
    cost: Keys | None = None
    form: str = ".0%"


STEERS = ("activation addition", "class means", "LM-Steer", "constant", "lexicon", "PPLM, head", "PPLM, bag")
COMPARED = {
    "at half a nat a token": (*STEERS, "random vector"),
    "without a steer": ("prompt", "system prompt", "best of five"),
}
DETOXIFICATION = {  # file, path, the steered and the unsteered key, n
    "at 5": ("05_detoxification", "by_way", "value 5", "unsteered", "{n} prompts × {samples} completions"),
    "at 10 with filter_p 0.7": (
        *("05_filtered", "by_sampling", "filter_p 0.7", "by_way", "value 10", "value 0"),
        "{hostile} prompts × {toxic_samples} completions",
    ),
}
RESULTS = [
    Result(
        "a word about weddings: x-vector, layer 18",
        "00_wedding",
        ("topic_share", "steered"),
        ("topic_share", "unsteered"),
        "{openings} prompts, {completions_each} completions",
        ("perplexity_ratio", "steered"),
    ),
    *[
        Result(
            f"a word of the bag: {label}",
            "01_topics",
            ("outcomes", name, "bag"),
            ("outcomes", "unsteered", "bag"),
            "{prompts} prompts, {n} completions",
            ("outcomes", name, "perplexity ratio"),
        )
        for name, label in {
            "PPLM (past)": "PPLM, moving the KV cache",
            "0.8 × lexicon": "lexicon, one number on the logits of its words",
        }.items()
    ],
    Result(
        "positive by VADER: PPLM, classifier head",
        "02_sentiment",
        ("positive", "towards positive", "VADER"),
        ("positive", "unsteered", "VADER"),
        "{n} prompts × {samples} samples",
        ("perplexity_ratio", "towards positive"),
    ),
    Result(
        "positive by MiniLM: the same",
        "02_sentiment",
        ("positive", "towards positive", "MiniLM"),
        ("positive", "unsteered", "MiniLM"),
        "{n} prompts × {samples} samples",
        ("perplexity_ratio", "towards positive"),
    ),
    *[
        Result(
            f"positive by {judge}: {name}",
            "03_sentiment",
            ("positive_share", name, judge),
            ("positive_share", "unsteered", judge),
            "{openings} prompts, {completions_each} completions",
            ("perplexity_ratio", name),
        )
        for name in (
            "love − hate, at the front",
            "love − hate, at every token",
            "class means",
            "a sentence in the prompt",
        )
        for judge in ("VADER", "MiniLM")
    ],
    Result(
        "a word about weddings: pair padded with spaces on the right",
        "04_padding",
        ("topic_share", "right, spaces"),
        ("topic_share", "unsteered"),
        "{completions_each} completions",
        ("perplexity_ratio", "right, spaces"),
    ),
    *[
        Result(
            f"positive by {judge}: LM-Steer at {value}",
            "05_frontier",
            ("by_part", "all", value, judge),
            ("by_part", "all", "0", judge),
            "{n} prompts × {samples} completions",
            ("by_part", "all", value, "perplexity ratio"),
        )
        for value in ("6", "-10")
        for judge in ("MiniLM, no films",)
    ],
    *[
        Result(
            f"positive by {judge}: LM-Steer at 20 with filter_p 0.7, held-out prompts",
            "05_filtered",
            ("by_sampling", "filter_p 0.7", "by_part", "test", "20", judge),
            ("by_sampling", "filter_p 0.7", "by_part", "test", "0", judge),
            "{held_out} prompts × {samples} completions",
            ("by_sampling", "filter_p 0.7", "by_part", "test", "20", "perplexity ratio"),
        )
        for judge in ("VADER", "MiniLM, no films")
    ],
    *[
        Result(
            f"{measure} by {judge}: LM-Steer detoxification {at}, hostile prompts",
            file,
            (*path, steered, "judges", judge, key),
            (*path, unsteered, "judges", judge, key),
            n,
            (*path, steered, "perplexity ratio"),
            form,
        )
        for at, (file, *path, steered, unsteered, n) in DETOXIFICATION.items()
        for measure, key, form in (
            ("toxic", "share", ".1%"),
            ("average maximum toxicity", "average maximum", ".2f"),
        )
        for judge in ("MiniLM", "rude words")
    ],
    Result(
        "positive up less down by VADER: LM-Steer brought to Gemma 3; without: one trained there",
        "06_gemma",
        ("effects", "states", "VADER"),
        ("effects", "trained on the target", "VADER"),
        "{n} prompts",
        ("effects", "states", "perplexity ratio"),
    ),
    Result(
        "the same by MiniLM",
        "06_gemma",
        ("effects", "states", "MiniLM"),
        ("effects", "trained on the target", "MiniLM"),
        "{n} prompts",
        ("effects", "states", "perplexity ratio"),
    ),
    Result(
        "of an LM-Steer's effect on logits, in its two strongest directions",
        "07_spectrum",
        ("share", "effect", "2"),
        None,
        "{prompts} prompts",
    ),
    Result(
        "correlation of a text's rating with a steer's evidence; without: with VADER",
        "07_reading",
        ("correlation", "evidence per token"),
        ("correlation", "VADER"),
        "{n} texts",
        form=".2f",
    ),
    *[
        Result(
            f"positive by {judge}, {how}: {method}",
            "08_frontier",
            ("by_goal", "0.5", f"sentiment: {method}", judge),
            ("by_goal", "0.5", "sentiment: unsteered", judge),
            "{prompts} prompts, {n} completions",
            ("by_goal", "0.5", f"sentiment: {method}", "perplexity ratio"),
        )
        for judge in ("MiniLM", "VADER")
        for how, methods in COMPARED.items()
        for method in methods
    ],
    *[
        Result(
            f"positive by {judge}: the best cell of a sweep, on held-out prompts",
            "09_held_out",
            ("outcomes", "the best cell", judge),
            ("outcomes", "unsteered", judge),
            "{prompts} prompts, {n} completions",
            ("outcomes", "the best cell", "perplexity ratio"),
        )
        for judge in ("VADER", "MiniLM")
    ],
]
PICTURES = (
    "00_wedding",
    "03_sentiment",
    "01_topics",
    "02_sentiment",
    "05_frontier",
    "06_gemma",
    "08_frontier",
)


# The README's rows: what the lessons found, beside what could replace it; and what a steer costs.
MAIN_RESULTS = (
    "a word about weddings: x-vector, layer 18",
    "a word of the bag: PPLM, moving the KV cache",
    "a word of the bag: lexicon, one number on the logits of its words",
    "toxic by MiniLM: LM-Steer detoxification at 10 with filter_p 0.7, hostile prompts",
    *(
        f"positive by MiniLM, at half a nat a token: {one}"
        for one in ("class means", "LM-Steer", "PPLM, head")
    ),
    "positive by MiniLM, without a steer: system prompt",
)
MAIN_SPEED = (
    "decoding with an activation addition ÷ unsteered",
    "decoding with an LM-Steer ÷ unsteered, batch 8",
    "PPLM past, 16 samples × 60 ÷ the original's order",
    "LM-Steer training, a step ÷ one that runs the model",
    "25 samples of each of 64 prompts, a token ÷ one at a time",
    "sweep of every block × 8 coefficients ÷ cell by cell",
)


def main() -> None:
    for name, parts in PAGES.items():
        path = ROOT / name
        path.write_text(written(path.read_text(encoding="utf-8"), *parts), encoding="utf-8")


def written(page: str, *parts: str) -> str:
    """A page with new text between the marks of these parts, and new minutes if it lists the notebooks."""
    for part in parts:
        marks = f"<!-- {part} -->", f"<!-- end of {part} -->"
        if [page.count(one) for one in marks] != [1, 1]:
            raise ValueError(f"the page needs {' and '.join(map(repr, marks))}, each once")
        before, _, rest = page.partition(marks[0])
        page = f"{before}{marks[0]}\n\n{PARTS[part]()}\n\n{marks[1]}{rest.partition(marks[1])[2]}"
    for name, took in read("minutes").items():
        minutes = f"{math.ceil(took['seconds'] / 30) / 2:g}"
        page = re.sub(rf"(?m)^(\|.*\(notebooks/{name}\.ipynb\).*\|)[^|]*\|$", rf"\1 {minutes} |", page)
    return page


# --- results ----------------------------------------------------------------------------------------------


def effect() -> str:
    """The picture that a reader sees first."""
    return picture("00_wedding", "figures")


def main_results() -> str:
    """The README's rows of the table of results."""
    return of_results([one for name in MAIN_RESULTS for one in RESULTS if one.label == name])


def results() -> str:
    """The table of results, and the figures."""
    return "\n\n".join([of_results(RESULTS), *(picture(name, "../figures") for name in PICTURES)])


def of_results(rows: Iterable[Result]) -> str:
    return table(("", "measured", "without", "with", "perplexity", "n"), map(cells, rows))


def picture(name: str, folder: str) -> str:
    return f"![{alt(name)}]({folder}/{name}.png)"


def alt(name: str) -> str:
    """What a figure shows, as the notebook that drew it says."""
    with Image.open(FIGURES / f"{name}.png") as picture:
        return picture.text["Description"]


def cells(result: Result) -> Sequence[str]:
    """The cells of one line of results."""
    numbers = read(result.file)
    without, with_it = (shown(numbers, keys, result.form) for keys in (result.without, result.with_it))
    counts = {name: len(it) if isinstance(it, list | dict) else it for name, it in numbers.items()}
    cost = shown(numbers, result.cost, "× .2f")
    return result.file[:2], result.label, without, with_it, cost, result.n.format_map(counts)


def shown(numbers: dict[str, Any], path: Keys | None, form: str) -> str:
    """The number at that path, or a mean and its interval, such as "82% [70%, 92%]"."""
    if path is None:
        return "–"
    found: Any = numbers
    for key in path:
        found = found[key]
    times, form = ("×\u202f", form[2:]) if form.startswith("× ") else ("", form)
    if not isinstance(found, list):
        return f"{times}{found:{form}}"
    mean, low, high = found
    return f"{times}{mean:{form}} [{low:{form}}, {high:{form}}]"


# --- speed ------------------------------------------------------------------------------------------------


def main_speed() -> str:
    """The README's rows of the CPU's table."""
    rows = {row["name"]: row for row in read("bench")["rows"]}
    return of_speed([rows[name] for name in MAIN_SPEED])


def speed() -> str:
    """The benchmark's table for the CPU, and the one for the GPU if it is on file."""
    files = [name for name in ("bench", "bench_cuda") if (FIGURES / f"{name}.json").exists()]
    return "\n\n".join(on_machine(read(name)) for name in files)


def on_machine(bench: dict[str, Any]) -> str:
    """A machine's name, versions and table."""
    versions = ", ".join(f"{name} {version}" for name, version in bench["versions"].items())
    return f"{bench['machine']}; {versions}:\n\n{of_speed(bench['rows'])}"


def of_speed(rows: Iterable[dict[str, Any]]) -> str:
    return table(("", "median [lowest, highest run]", "at most", "holds"), map(timed, rows))


def timed(row: dict[str, Any]) -> Sequence[str]:
    """The cells of one line of the benchmark."""
    runs = " [{:.3g}, {:.3g}]".format(*row["interval"])
    return row["name"], f"{row['ratio']:.3g}{runs}", f"{row['bound']:g}", "yes" if row["holds"] else "**no**"


# --- the full profile -------------------------------------------------------------------------------------


def full() -> str:
    """Minutes of the full profile on each device, and gigabytes, both counted."""
    found = read("full")
    devices = list(next(iter(found.values()))["minutes"])
    rows = (
        (
            name[:2],
            ", ".join(one["GB"]),
            *(f"{one['minutes'][device]:,.0f}" for device in devices),
            f"{sum(one['GB'].values()):.1f}",
        )
        for name, one in found.items()
    )
    return table(("", "models", *(f"minutes, {device}" for device in devices), "GB"), rows)


# --- architectures ----------------------------------------------------------------------------------------


def types() -> str:
    """The models in three sentences."""
    known = read("models")
    found = sum(one == "found" for one in known["types"].values())
    whole = sum({*one.values()} == {"yes"} for one in known["families"].values())
    return (
        f"transformers {known['transformers']} has {len(known['types'])} types of causal model. The blocks "
        f"of {found} are found. Of {len(known['families'])} types that were tried, with random weights, "
        f"every kind of every method works on {whole}; [a table](docs/models.md) says what works on the "
        "others."
    )


def models() -> str:
    """How many causal types of transformers are found, and what works on those that were tried."""
    known = read("models")
    counts = Counter(found.partition(":")[0] for found in known["types"].values())
    groups: dict[tuple[str, ...], list[str]] = {}
    for name, found in known["families"].items():
        groups.setdefault(tuple("yes" if one == "yes" else "no" for one in found.values()), []).append(name)
    rows = ([", ".join(names), *cells] for cells, names in groups.items())
    tried = len(known["families"])
    return (
        f"transformers {known['transformers']} has {counts.total()} types of causal model. The blocks of "
        f"{counts['found']} are found; {counts['refused']} are refused with a reason (BERT and its like, "
        f"which read from both sides, and a few with blocks inside blocks); {counts['not built']} cannot be "
        f"built without a checkpoint's sizes. On tiny random models of {tried} types:\n\n"
    ) + table(("", *next(iter(known["families"].values()))), rows)


# --- reliability ------------------------------------------------------------------------------------------


def reliability() -> str:
    """What came of bad arguments, kills and damaged files."""
    known = read("reliability")
    inputs, kills, damages = known["inputs"], known["kills"], known["damages"]
    silent, deep = (inputs.get(name, 0) for name in ("silent", "deep"))
    return (
        f"`make reliability` calls all that is public with one bad argument at a time. Of "
        f"{sum(inputs.values()):,} calls, {inputs['clear']:,} ended in an error that names the argument, "
        f"{inputs['right']:,} had a meaning and gave it, {deep} ended in another error, and {silent} were "
        f"silently wrong. {kills['all']} jobs were killed and called again: {kills['wrong']} results differ "
        f"from undisturbed ones. Of {sum(damages.values())} damaged files, {damages['clear']} gave an error "
        f"that names them, {damages['right']} did not change the result, and {damages.get('wrong', 0)} did."
    )


PARTS = {
    "effect": effect,
    "main results": main_results,
    "main speed": main_speed,
    "types": types,
    "reliability": reliability,
    "results": results,
    "speed": speed,
    "full": full,
    "models": models,
}
PAGES = {  # and the parts between their marks
    "README.md": ("effect", "main results", "main speed", "types", "reliability"),
    "docs/results.md": ("results",),
    "docs/speed.md": ("speed", "full"),
    "docs/models.md": ("models",),
}


# --- files and tables -------------------------------------------------------------------------------------


def read(name: str) -> dict[str, Any]:
    return json.loads((FIGURES / f"{name}.json").read_text(encoding="utf-8"))


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    main()
