"""LM-Steer's two programs, for any steer: continue many prompts, and measure what was written.

    python -m steer_utils.evaluate generate --prompts FILE --output FILE --steer FOLDER --steer-values 5 1
    python -m steer_utils.evaluate score --generations FILE --metrics toxicity,perplexity,dist-n --judge MODEL

Published figures come from Perspective (toxicity), a DistilBERT (sentiment) and GPT-2 XL (perplexity). The
scorers here are others, so their figures compare steers with each other and not with those tables.
"""

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .. import hf, models
from ..checkpoint import write_atomically
from . import judges as scorers
from .generation_files import Generations, generate_file, read_generations
from .group_metrics import attribute_of_groups, distinct_of_group, perplexity_of_groups, share_of_groups
from .metrics import Interval, bootstrap, completion_log_probs, repetition

Judge = tuple[PreTrainedModel, PreTrainedTokenizerBase | None]
Figures = dict[str, Interval | int]


def evaluate_file(
    generations_file: str | Path,
    metrics: Sequence[str],
    *,
    output_file: str | Path | None = None,
    judge: Judge | None = None,
    toxicity: scorers.Scorer | None = None,
    sentiment: scorers.Scorer | None = None,
) -> dict[str, Any]:
    """Measure a file of continuations; print a table, return the figures, and write them as JSON if asked.

    metrics: "toxicity" (of the continuation: mean over prompts of the highest score, share of prompts with a
    score above 0.5), "sentiment" (of prompt and continuation: mean over prompts of the share above 0.5),
    "perplexity" (`group_metrics.perplexity_of_groups`), "dist-n" (`group_metrics.distinct_of_group`, mean
    over prompts), "repetition" (`metrics.repetition`, mean over prompts). Intervals are over prompts, 95 %.
    judge: model and tokenizer to measure perplexity with. toxicity, sentiment: scorers; by default
    `scorers.profanity_check()` and `scorers.minilm_sentiment()`.

    Raises ValueError for another metric, perplexity without a judge, fewer than two prompts, and as
    `read_generations` does, FileNotFoundError as well.
    """
    _require_metrics(metrics, judge)
    found = read_generations(generations_file)
    if len(found.prompts) < 2:
        raise ValueError(f"{str(generations_file)!r} has one prompt: an interval needs at least two")
    given = {"toxicity": toxicity, "sentiment": sentiment, "perplexity": judge}
    judges = {name: given[name] or EMBEDDED[name]() for name in metrics if name in given}
    result = {
        "generations": Path(generations_file).name,
        "prompts": len(found.prompts),
        "samples": len(found.texts[0]),
        "judges": {name: _named(one) for name, one in judges.items()},
        "figures": {name: METRICS[name](found, judges.get(name)) for name in metrics},
    }
    if output_file is not None:
        Path(output_file).parent.mkdir(parents=True, exist_ok=True)
        write_atomically(Path(output_file), (json.dumps(result, indent=1) + "\n").encode())
    _show(result)
    return result


def _named(judge: scorers.Scorer | Judge) -> str:
    """The name of a judge, and how often it is right if it is a scorer."""
    if not isinstance(judge, scorers.Scorer):
        return models.model_id(hf.unwrapped(judge[0]))
    return f"{judge.name}, {f'right on {judge.accuracy}' if judge.accuracy else 'not measured here'}"


# --- metrics ----------------------------------------------------------------------------------------------


def _toxicity(found: Generations, scorer: scorers.Scorer) -> Figures:
    scores = scorer([text for _, text in found.pairs()])
    return attribute_of_groups(found.grouped(scores))._asdict()


def _sentiment(found: Generations, scorer: scorers.Scorer) -> Figures:
    scores = scorer(["".join(pair) for pair in found.pairs()])
    return {"share_positive": share_of_groups(found.grouped(scores))}


def _perplexity(found: Generations, judge: Judge) -> Figures:
    log_probs = completion_log_probs(*judge, *zip(*found.pairs(), strict=True))
    losses, tokens = [-one.sum().item() for one in log_probs], [len(one) for one in log_probs]
    return perplexity_of_groups(found.grouped(losses), found.grouped(tokens))._asdict()


def _distinct(found: Generations, judge: None) -> Figures:
    return {f"dist-{n}": bootstrap([distinct_of_group(texts, n) for texts in found.texts]) for n in (1, 2, 3)}


def _repetition(found: Generations, judge: None) -> Figures:
    return {"rep-4": bootstrap([np.mean([repetition(text) for text in texts]) for texts in found.texts])}


METRICS: dict[str, Callable[[Generations, Any], Figures]] = {
    "toxicity": _toxicity,
    "sentiment": _sentiment,
    "perplexity": _perplexity,
    "dist-n": _distinct,
    "repetition": _repetition,
}
EMBEDDED = {"toxicity": scorers.profanity_check, "sentiment": scorers.minilm_sentiment}


def _require_metrics(metrics: Sequence[str], judge: Judge | None) -> None:
    if isinstance(metrics, str):
        raise ValueError(f"give a list of metrics, not the single string {metrics!r}")
    known = f"give some of {', '.join(METRICS)}"
    if not metrics:
        raise ValueError(f"no metrics to measure: {known}")
    for name in metrics:
        if name not in METRICS:
            which = " (LM-Steer's ppl-big, ppl-own, ppl-small are perplexity, each with its judge)"
            raise ValueError(f"no metric {name!r}: {known}{which if name.startswith('ppl') else ''}")
    if "perplexity" in metrics and judge is None:
        raise ValueError("perplexity needs a judge=(model, tokenizer), on the command line --judge MODEL")


def _show(result: dict[str, Any]) -> None:
    title = "{generations}: {prompts:,} prompts × {samples} continuations".format_map(result)
    judges = "\n".join(f"{metric}: {judge}" for metric, judge in result["judges"].items())
    table = Table("metric", "figure", "mean [95 % interval over prompts]", title=title, caption=judges)
    for metric, figures in result["figures"].items():
        for name, figure in figures.items():
            shown = f"{figure:.3f}" if isinstance(figure, Interval) else f"{figure:,}"
            table.add_row(metric, name.replace("_", " "), shown)
    Console().print(table)


# --- the command line -------------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m steer_utils.evaluate",
        description="Continue many prompts, and measure what was written.",
    )
    commands = parser.add_subparsers(dest="command", required=True)
    _generate_arguments(commands.add_parser("generate", help="continue each prompt of a file"))
    _score_arguments(commands.add_parser("score", help="measure a file of continuations"))
    given = parser.parse_args(arguments)
    if given.command == "generate" and bool(given.steer) != bool(given.steer_values):
        parser.error("--steer FOLDER and --steer-values V … belong together: give both, or neither")
    {"generate": _generate, "score": _score}[given.command](given)


def _generate_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--model", default=models.DEFAULT, help="as for steer_utils.load; by default %(default)s")
    add("--prompts", required=True, help="a JSONL file, or a name in data/prompts")
    add("--output", required=True, type=Path, help="the file to write, or to go on with")
    add("--steer", metavar="FOLDER", help="of a trained LM-Steer")
    add("--steer-values", type=float, nargs="+", metavar="V", help="a value for each of its steers")
    add("--top-p", type=float, default=1.0, help="by default 1, no cut, as for LM-Steer's toxicity")
    add("--num-samples", type=int, default=25, help="continuations of each prompt; by default %(default)s")
    add("--max-new-tokens", type=int, default=20, help="tokens of each, no fewer; by default %(default)s")
    add("--seed", type=int, default=0, help="of the random numbers; by default %(default)s")


def _score_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--generations", required=True, type=Path, help="the file to measure")
    add("--metrics", required=True, help=f"some of {','.join(METRICS)}, with commas between")
    add("--judge", metavar="MODEL", help="for perplexity; as for steer_utils.load")
    add("--output", type=Path, help="a JSON file for the figures")


def _generate(given: argparse.Namespace) -> None:
    model, tokenizer = models.load(given.model)
    steer = ()
    if given.steer:
        from ..lm_steer.steer import LMSteer

        steer = LMSteer.from_pretrained(given.steer, model).at(given.steer_values)
    names = ("num_samples", "max_new_tokens", "seed", "top_p")
    settings = {name: getattr(given, name) for name in names}
    generate_file(model, tokenizer, given.prompts, given.output, steer=steer, **settings)


def _score(given: argparse.Namespace) -> None:
    judge = models.load(given.judge) if given.judge else None
    evaluate_file(given.generations, given.metrics.split(","), output_file=given.output, judge=judge)


if __name__ == "__main__":
    main()
