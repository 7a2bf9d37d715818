"""Call what is public with one bad argument at a time, and count what happens.

python tests/hostile.py takes two minutes at most. Verdicts: "clear" for an error that names the argument and
quotes the value; "right" where the value means something and all results are finite; "deep" for other errors;
"silent" for a value without meaning that was taken. Deep and silent ones are printed; then the status is 1.
With --keep, the counts go to figures/reliability.json, and from there to the README.
"""

import inspect
import math
import os
import re
import sys
import tempfile
import typing
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from types import NoneType, UnionType
from typing import Any

import numpy as np
import pandas as pd
import torch
from conftest import GOLDEN_MODELS, keep_reliability, new_model, tiny
from test_lm_steer_words import word_model
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase

import steer_utils as su
from steer_utils import sampling
from steer_utils.lm_steer.evidence import Evidence
from steer_utils.lm_steer.training import Training
from steer_utils.measure import evaluate, strength
from steer_utils.pplm import classifier, julia
from steer_utils.types import WrongType

MODEL, TOKENIZER = tiny("gpt2"), AutoTokenizer.from_pretrained(GOLDEN_MODELS / "T1")
LEARNING = new_model(MODEL.config).train()
NAN, INF, HALF, HUGE = math.nan, math.inf, "half a character: \ud800", 10**9
# Bad values, and the kinds of arguments for which each would do.
VALUES: list[tuple[Any, str]] = [
    (None, "None"), (True, "bool"), ("no", "str"), ("", "str"), (HALF, ""), (b"bytes", ""), (object(), ""),
    (0, "int float"), (-1, "int float"), (1.5, "float"), (NAN, "float"), (INF, "float"), (1j, ""),
    (print, "callable"), ([], "strs texts ints floats steers bags additions bools hooks"), ([None], "nones"),
    ([True], "bools"), ([NAN], "floats"), ([1.5], "floats"), ([HUGE], "ints floats hooks"), ([HALF], ""),
    ([-1], "ints floats hooks"), (["a", None], ""), ([["nested"]], "bags"), ([[0, HUGE]], "texts table"),
    ([[0, -1]], "texts table"), ([[]], "texts bags table"), ([[0, 1.5]], "table"), ({"a", "b"}, "set"),
    ({"a": 1}, ""),
    (pd.DataFrame({"text": ["a"], "other": ["b"]}), "frame"), (pd.DataFrame(), "frame"),
    (torch.full((2, 32), NAN), "tensor"), (torch.ones(2, 32, device="meta"), "tensor"),
    (torch.ones(2, 32, dtype=torch.bool), "tensor"), (torch.ones(2, 32, dtype=torch.complex64), "tensor"),
    (torch.ones(0, 32), "tensor"), (torch.ones(2, 3, 4, 5), "tensor"), (torch.ones(2, 7), "tensor"),
    (np.array([["x"]], dtype=object), "array"), (torch.nn.Linear(2, 2), "model"), (LEARNING, "model"),
]  # fmt: skip

KINDS = {
    int: "int",
    float: "float",
    bool: "bool",
    str: "str",
    Path: "str",
    NoneType: "None",
    Tensor: "tensor",
}
KINDS |= {Sequence[Sequence[float]]: "table", Sequence[int | None]: "ints nones"}
KINDS |= {torch.nn.Module: "model", pd.DataFrame: "frame", np.ndarray: "array", su.types.Texts: "strs texts"}
KINDS |= {
    Sequence[str]: "strs",
    Sequence[int]: "ints",
    Sequence[float]: "ints floats",
    Sequence[bool]: "bools",
}
KINDS |= {su.types.Prompts: "str strs", typing.Any: "", PreTrainedTokenizerBase: "tokenizer"}
BY_NAME = {"steer": "steer steers None", "activation_additions": "steers None", "additions": "additions"}
BY_NAME |= {
    "bags": "str strs bags",
    "bow_list": "str strs bags",
    "words": "strs set",
    "coeffs": "ints floats",
}
BY_NAME |= {
    "act_names": "strs ints hooks",
    "judges": "",
    "trials": "",
    "columns": "table",
    "do_sample": "bool",
    "seed": "int None",
}


def at_least(least: float) -> Callable[[Any], bool]:
    return lambda value: value is None or (isinstance(value, int | float) and least <= value < INF)


def finite(value: Any) -> bool:
    return value is None or (is_right(value) and "complex" not in str(getattr(value, "dtype", "")))


COUNTS = "num_samples batch_size max_new_tokens tokens num_comparisons tokens_to_generate n_steps rank bins n"
COUNTS += (
    " num_directions num_words max_spans max_length max_tokens per_class num_steers batch_tokens embed_size"
)
MEANS: dict[str, Callable[[Any], bool]] = dict.fromkeys(COUNTS.split(), at_least(1))
MEANS |= dict.fromkeys(["target_class_id", "num_iterations", "window_length", "horizon_length"], at_least(0))
MEANS |= dict.fromkeys(
    ["stepsize", "gamma", "kl_scale", "grad_length", "top_k", "k", "s", "dim", "regularization"], at_least(0)
)
MEANS |= dict.fromkeys(
    ["temperature", "repetition_penalty", "lr", "epsilon", "init_var", "nats", "t"], at_least(1e-9)
)
MEANS |= dict.fromkeys(["gm_scale", "min_distinct"], lambda value: 0 <= value <= 1)
MEANS |= {"validation": lambda value: 0 < value < 1, "top_p": lambda value: value is None or 0 < value <= 1}
MEANS |= dict.fromkeys(
    ["coeff", "freq_penalty", "scale", "min_value", "max_value", "coeffs", "values"], finite
)
MEANS |= {"model": lambda value: value is None or hasattr(value, "config"), "act_name": at_least(0)}
MEANS |= {"class_size": at_least(2), "res_stream_slice": lambda value: value is None or 0 < len(value) < 4}
MEANS["dtype"] = lambda value: value is None
# Beside an argument's own name, words by which an error may speak of it.
SAYS = """
act_name act_names: hook layer nothing
name path source bags bow_list: no cannot load file holds bag source
text texts other_texts prompts completions: text prompt completion lists label
tokens custom_pad_id pad_method: token pad_method custom_pad_id
values steer_values values_a values_b columns: values steer_values strongly prompts
sums counts steered unsteered: sums scores steered
target target_class_id classes: class class_size
num_comparisons tokens_to_generate max_length: num_samples max_new_tokens
fusion_kl_scale fusion_gm_scale coeffs k: kl_scale gm_scale coefficient top_k
num_words num_directions labels min_value max_value: words directions label bins
add_vec offset_vec trials other: steer baseline table
source_tokenizer target_tokenizer source_model target_model: tokenizer model
"""
SAYS = {
    name: words.split()
    for names, words in (line.split(": ") for line in SAYS.strip().split("\n"))
    for name in names.split()
}


@dataclass
class Call:
    """A public function, arguments with which it works, and what to do with what it returns."""

    function: Callable[..., Any]
    good: dict[str, Any]
    then: Callable[[Any], Any] = lambda found: found
    settings: Callable[..., Any] | None = None  # whose arguments go in by **
    skip: str = ""  # arguments that are only tried as they are
    name: str = ""

    def title(self) -> str:
        return self.name or self.function.__qualname__

    def kinds(self, name: str) -> set[str]:
        """For which kinds of values an argument is meant."""
        if name in BY_NAME:
            return set(BY_NAME[name].split())
        functions = [self.function] if self.settings is None else [self.function, self.settings]
        hints = [hint for one in functions for hint in [annotations(one).get(name)] if hint is not None]
        return {kind for hint in hints[:1] for kind in kinds_of(hint)}

    def run(self, **bad: Any) -> Any:
        return self.then(self.function(**{**self.good, **bad}))


def annotations(function: Callable[..., Any]) -> dict[str, Any]:
    bare = inspect.unwrap(function.__init__ if inspect.isclass(function) else function)
    return typing.get_type_hints(getattr(bare, "__func__", bare), include_extras=True)


def kinds_of(hint: Any) -> Iterator[str]:
    if hint in KINDS:
        yield from KINDS[hint].split()
    elif typing.get_origin(hint) in (typing.Union, UnionType):
        for one in typing.get_args(hint):
            yield from kinds_of(one)
    elif "Callable" in str(hint):
        yield "callable"


def is_right(found: Any) -> bool:
    """Whether all numbers in a result are finite."""
    if isinstance(found, pd.DataFrame):
        return all(map(is_right, found.select_dtypes("number").to_numpy().tolist()))
    if isinstance(found, float | Tensor | np.ndarray | np.floating) and "object" not in str(
        getattr(found, "dtype", "")
    ):
        values = torch.as_tensor(np.array(found) if isinstance(found, np.ndarray) else found)
        return not values.is_meta and not (values.is_floating_point() and not values.isfinite().all())
    if isinstance(found, Mapping):
        return all(map(is_right, found.values()))
    return all(map(is_right, found)) if isinstance(found, list | tuple) else True


def quotes(message: str, value: Any) -> bool:
    """Whether a message shows a value, or what is wrong in it."""
    if isinstance(value, Tensor):
        said = [str(tuple(value.shape)), f"of {value.shape[-1]}", "Tensor", "NaN"]
    elif isinstance(value, list | tuple | set | dict):
        inside = [x for one in value if isinstance(one, list) for x in one]
        said = [repr(value), *map(repr, [*value, *inside])]
    elif isinstance(value, int | float) and not isinstance(value, bool):
        said = [repr(value), f"{value:g}", f"{value:,}"]
    else:
        said = [repr(value)[:20], type(value).__name__]
    if value is None or value is LEARNING:
        said += ["needs", "give ", "say ", "no ", "training mode"]
    if isinstance(value, list | pd.DataFrame):  # how many items it has, or what it lacks
        counts = "not 0|not {0}|, {0})|of {0} texts|{0} labels|and {0}|({0},".format(len(value))
        said += [*counts.split("|"), "=()", "not ()", "empty", "nothing", "at least one", "lacks", "no "]
    if isinstance(value, str) and not value:
        said += ["no ", "1 tokens"]
    return any(one in message for one in said)


def verdict(call: Call, name: str, value: Any, means: bool) -> tuple[str, str]:
    """What comes of a call with one other argument, and the message or the result."""
    try:
        with redirect_stdout(StringIO()), redirect_stderr(StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = call.run(**{name: value})
    except Exception as error:
        at, message = error.__traceback__, " ".join(str(error).split())
        while at.tb_next:
            at = at.tb_next
        where = at.tb_frame.f_code.co_filename
        ours = "steer_utils" in where or isinstance(error, WrongType)
        named = any(re.search(rf"\b{word}", message) for word in [name, *SAYS.get(name, ())])
        kind = "clear" if ours and named and quotes(message, value) else "deep"
        return (kind, f"{type(error).__name__}: {message} ({Path(where).name}:{at.tb_lineno})")
    same = value is not LEARNING or repr(found) == repr(call.run())
    return ("right" if means and same and is_right(found) else "silent"), " ".join(repr(found).split())


def inputs(calls: Sequence[Call]) -> Iterator[tuple[Call, str, Any, bool]]:
    """Each call with each value in each place, and whether it means something there."""
    for call in calls:
        for name in (name for name in call.good if name not in call.skip.split()):
            kinds, known = call.kinds(name), MEANS.get(name, lambda value: True)
            for value, fits in VALUES:
                fits = bool(kinds & set(fits.split()))
                yield call, name, value, fits and known(value)


def main() -> int:
    counts: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as folder:
        known = calls(Path(folder))
        os.chdir(folder)
        for call in known:
            assert is_right(call.run()), call.title()
        for call, name, value, means in inputs(known):
            os.chdir(tempfile.mkdtemp(dir=folder))  # some values are names of files
            kind, message = verdict(call, name, value, means)
            counts[kind] += 1
            if kind in ("deep", "silent"):
                print(f"{kind}: {call.title()}({name}={' '.join(repr(value).split())[:60]}): {message[:200]}")
    print(", ".join(f"{counts[kind]} {kind}" for kind in ("clear", "right", "deep", "silent")))
    if "--keep" in sys.argv:
        keep_reliability(inputs=counts)
    return int(counts["deep"] + counts["silent"] > 0)


TEXTS = [
    f"{word} {other}"
    for word in ("good", "fine", "bad", "sad")
    for other in ("day", "cat", "sea", "sky", "tea")
]
LABELS = [1.0] * 10 + [-1.0] * 10
FEW = {"max_new_tokens": 2, "seed": 0}
NOISE = torch.Generator().manual_seed(0)
PAIR = torch.randn(2, 2, 32, 4, generator=NOISE)


def some(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=NOISE)


def used(steer: Any) -> pd.DataFrame:
    """What a steer writes."""
    return su.generate(MODEL, TOKENIZER, ["Hello there friend"], steer=steer, **FEW)


def calls(folder: Path) -> list[Call]:
    """One call of each public function that works."""
    model = {"model": MODEL, "tokenizer": TOKENIZER}
    prompts, texts = ["Hello there friend", "A bee"], ["good day", "bad day"]
    addition, vector = su.ActivationAddition(2.0, 1, "ab"), su.SteeringVector(1, some(1, 32))
    steer = su.LMSteer(projector1=PAIR[0], projector2=PAIR[1], epsilon=0.1).at(1.0)
    head, bag = su.ClassifierHead(32, 2), su.Bag("mine", entries=((10,), (23, 5)))
    pplm = su.PPLM(bags=[bag], num_iterations=1)
    table = su.generate(*model.values(), prompts, num_samples=2, **FEW)
    trial = su.trials.trial(*model.values(), prompts, judges={"length": lambda all: [0.7] * len(all)}, **FEW)
    MODEL.save_pretrained(folder / "model")
    TOKENIZER.save_pretrained(folder / "model")
    vector.save_pretrained(folder / "vector")
    steer.save_pretrained(folder / "steer")
    head.save_pretrained(folder / "head")
    evaluate.generate_file(*model.values(), prompts, folder / "some.jsonl", num_samples=2, max_new_tokens=2)
    (folder / "words.txt").write_text("sun\nmoon\n")
    (folder / "toxic.csv").write_text("comment_text,target\na bad one,0.9\na good one,0\n")
    sampled = {"temperature": 1.0, "top_p": 0.9, "top_k": 5, "repetition_penalty": 1.1, "freq_penalty": 0.1}
    many = {"num_samples": 1, "batch_size": 2, **FEW}
    strong = {"stepsize": 0.1, "num_iterations": 1, "gamma": 1.0, "persist": True, "kl_scale": 0.01}
    strong |= {
        "gm_scale": 0.9,
        "window_length": 2,
        "horizon_length": 1,
        "grad_length": 1,
        "top_k": 5,
        "top_p": 1.0,
    }
    strong |= {
        "temperature": 1.0,
        "repetition_penalty": 1.0,
        "decay": False,
        "perturb": "past",
        "update": "adam",
    }
    learned = {"rank": 2, "n_steps": 2, "batch_tokens": 16, "lr": 0.01, "epsilon": 0.1, "validation": 0.2}
    learned |= {"seed": 0, "max_length": 8, "init_var": 0.01, "regularization": 0.0, "pad_in_loss": False}
    learned |= {"num_steers": 2, "training_steer": 0, "dummy_steer": 1, "adaptor_class": "multiply"}
    on_text = model | {"steer": steer, "text": "good day"}
    between = {"steer": steer, "source_model": MODEL, "source_tokenizer": TOKENIZER}
    between |= {"target_model": MODEL, "target_tokenizer": TOKENIZER}
    hidden = classifier.mean_hidden(*model.values(), TEXTS)
    jl = {"method": "BoW", "perturb": "hidden", "bow_list": [bag], "stepsize": 0.01, "num_iterations": 1}
    jl |= {"fusion_gm_scale": 0.9, "fusion_kl_scale": 0.01, "max_length": 2, "temperature": 1.0}

    words = dict(zip(("model", "tokenizer"), word_model("gpt2"), strict=True)) | {"steer": steer}

    def enter(context: Any) -> str:
        with context:
            return "entered"

    return [
        Call(su.load, {"name": str(folder / "model"), "device": "cpu", "dtype": "float32"}),
        Call(su.encode, {"tokenizer": TOKENIZER, "texts": texts, "padding_side": "left"}, dict),
        Call(
            su.generate,
            model | {"prompts": prompts, "steer": addition, **many, **sampled, "do_sample": True},
            settings=sampling.sampling_processors,
        ),
        Call(su.compare, model | {"prompts": prompts, "steer": [addition], "seed": 0, "max_new_tokens": 2}),
        Call(
            su.print_n_comparisons,
            model
            | {"prompt": "Hello there", "activation_additions": [addition], "num_comparisons": 1}
            | {"tokens_to_generate": 2, "seed": 0},
        ),
        Call(
            su.ActivationAddition,
            {
                "coeff": 1.0,
                "act_name": 1,
                "prompt": "ab",
                "addition_location": "front",
                "positions": "own",
                "res_stream_slice": (0, 4),
            },
            used,
        ),
        Call(su.ActivationAddition, {"coeff": 1.0, "act_name": 1, "tokens": [0, 5]}, used),
        Call(
            su.get_x_vector,
            {
                "prompt1": "ab",
                "prompt2": "a",
                "coeff": 1.0,
                "act_name": 1,
                "tokenizer": TOKENIZER,
                "pad_method": "tokens_right",
                "custom_pad_id": 1,
            },
            used,
        ),
        Call(su.padded, {"additions": [addition], "tokenizer": TOKENIZER, "custom_pad_id": 1}, used),
        Call(su.steering_vectors, model | {"additions": [addition]}, used),
        Call(su.apply_activation_additions, model | {"additions": [addition]}, enter),
        Call(
            su.SteeringVector,
            {
                "act_name": 1,
                "rows": some(2, 32),
                "addition_location": "front",
                "positions": "own",
                "model_id": "",
            },
            used,
        ),
        Call(vector.on, model | {"scale": 1.0}, enter),
        Call(vector.randomized, {"seed": 0}, used),
        Call(
            su.SteeringVector.from_pretrained,
            {"source": str(folder / "vector"), "model": MODEL, "any_model": True},
            used,
        ),
        Call(vector.save_pretrained, {"folder": str(folder / "again")}),
        Call(su.Ablation, {"direction": some(32)}, used),
        Call(su.mean_difference, model | {"texts": texts, "other_texts": texts[:1], "act_name": 1}, used),
        Call(
            su.sweep,
            model
            | {"prompts": prompts, "additions": [addition], "act_names": [1], "coeffs": [1.0], "folder": None}
            | many,
        ),
        Call(su.Bag, {"name": "mine", "words": ("sun",)}, lambda found: used(su.PPLM(bags=[found]))),
        Call(su.Bag, {"name": "mine", "entries": ((5,),)}, lambda found: used(su.PPLM(bags=[found]))),
        Call(su.bag_of_words, {"source": str(folder / "words.txt"), "tokenizer": TOKENIZER}),
        Call(su.PPLM, {"bags": [bag], **strong}, used),
        Call(su.PPLM, {"head": head, "target_class_id": 1, "num_iterations": 1}, used),
        Call(su.attribute_scores, model | {"steer": pplm, "table": table}),
        Call(
            su.ClassifierHead,
            {"embed_size": 32, "class_size": 2, "classes": ["bad", "good"], "seed": 0},
            lambda found: found.probabilities(*model.values(), texts),
        ),
        Call(head.forward, {"features": some(2, 32)}, skip="features"),
        Call(head.class_id, {"target": 1}),
        Call(head.probabilities, model | {"texts": texts}),
        Call(
            su.ClassifierHead.from_pretrained,
            {"source": str(folder / "head"), "model": MODEL, "any_model": True},
        ),
        Call(
            su.train_classifier_head,
            model
            | {
                "texts": TEXTS,
                "labels": [1] * 10 + [0] * 10,
                "validation": 0.2,
                "classes": ["bad", "good"],
                "max_tokens": 8,
                "seed": 0,
            },
        ),
        Call(classifier.report, {"head": head, "features": hidden, "labels": [1] * 10 + [0] * 10}),
        Call(
            su.LMSteer,
            {
                "projector1": PAIR[0],
                "projector2": PAIR[1],
                "epsilon": 0.1,
                "steer_values": [1.0, 0.0],
                "names": ["a", "b"],
            },
            used,
        ),
        Call(su.AddSteer, {"add_vec": some(2, 32), "epsilon": 0.1, "steer_values": 1.0}, used),
        Call(su.OffsetSteer, {"offset_vec": some(2, 97), "epsilon": 0.1, "steer_values": 1.0}, used),
        Call(steer.at, {"values": [1.0, 2.0]}, used),
        Call(steer.matrix, {"values": [1.0, 2.0]}),
        Call(steer.fold, {"model": MODEL, "values": [1.0, 2.0]}),
        Call(
            su.LMSteer.from_pretrained, {"source": str(folder / "steer"), "model": MODEL, "any_model": True}
        ),
        Call(
            su.train_lm_steer,
            model | {"texts": TEXTS, "labels": LABELS, "folder": None} | learned,
            used_at_one,
            settings=Training,
        ),
        Call(su.transfer, {**between, "anchors": 90, "method": "closed_form"}, used),
        Call(su.transfer, {**between, "method": "states", "texts": TEXTS}, used, name="transfer by states"),
        Call(su.word_lists, words | {"s": 0, "texts": ["a", "b"], "num_directions": 1, "num_words": 1}),
        Call(
            su.evidence_spans, on_text | {"values_a": 1.0, "values_b": 0.0, "max_spans": 1, "max_length": 2}
        ),
        Call(su.steer_analysis, on_text | {"dim": 0, "min_value": -1.0, "max_value": 1.0, "bins": 3}),
        Call(su.highlight, {"evidence": Evidence(["a"], np.ones(1), [(0, 1)])}),
        Call(su.best_of, {"table": table, "scores": [0.1, 0.2, 0.3, 0.4], "min_distinct": 0.5}),
        Call(
            su.at_kl,
            model | {"steer": vector, "nats": 0.01, "prompts": prompts, "tokens": 2, "seed": 0},
            used,
            settings=strength.continuations,
        ),
        Call(
            strength.kl_along,
            model
            | {"steer": vector, "prompts": prompts, "own_text": False, "prefix": ""}
            | {"tokens": 2, "seed": 0},
            settings=strength.continuations,
        ),
        Call(strength.forced, model | {"prompts": texts, "completions": texts, "steer": vector}),
        Call(strength.loss_increase, model | {"texts": TEXTS, "steer": vector, "start": 3}),
        Call(su.metrics.word_count, {"texts": texts, "words": ["good"], "case_sensitive": False}),
        Call(su.metrics.distinct, {"text": "a b c", "n": 1}),
        Call(su.metrics.bootstrap, {"values": [0.1, 0.2, 0.4]}),
        Call(su.metrics.bootstrapped, {"columns": [[0.1, 0.2, 0.4]], "statistic": np.mean}, skip="statistic"),
        Call(su.metrics.ratio, {"sums": [0.1, 0.2], "counts": [2, 3]}),
        Call(su.metrics.wrong_way, {"unsteered": [0.1, 0.2], "steered": [0.3, 0.1]}),
        Call(su.metrics.next_token_kl, {"steered": some(2, 97), "unsteered": some(2, 97)}),
        Call(su.metrics.next_token_logits, model | {"prompts": prompts}),
        Call(su.metrics.token_log_probs, model | {"texts": texts, "batch_size": 2}),
        Call(su.metrics.perplexity, model | {"prompts": texts, "completions": texts}),
        Call(su.judges.vader().__call__, {"texts": texts}),
        Call(su.judges.toxic_words().__call__, {"texts": texts}),
        Call(
            su.trials.trial,
            model | {"prompts": prompts, "judges": {"x": su.judges.vader()}, "num_samples": 1, **FEW},
        ),
        Call(su.trials.by_prompt, {"table": trial, "column": "length"}),
        Call(su.trials.outcomes, {"trials": {"one": trial, "other": trial}}),
        Call(su.trials.difference, {"table": trial, "other": trial, "column": "length"}),
        Call(su.trials.differences, {"trials": {"one": trial, "other": trial}, "baseline": "one"}),
        Call(su.data.prompts, {"source": "openings", "split": "test"}),
        Call(su.data.words, {"source": str(folder / "words.txt")}),
        Call(su.data.rated_sentences, {"kind": "movie", "split": "test"}, skip="kind split"),
        Call(su.data.toxic_comments, {"path": str(folder / "toxic.csv"), "per_class": 1, "seed": 0}),
        Call(su.costs.counted, {"model": MODEL}, enter),
        Call(su.costs.Count().per_token, {"tokens": 3}),
        Call(
            evaluate.generate_file,
            model
            | {
                "prompts": prompts,
                "output_file": "new.jsonl",
                "steer": vector,
                "num_samples": 2,
                "max_new_tokens": 2,
                "seed": 0,
            },
        ),
        Call(
            evaluate.evaluate_file,
            model | {"path": str(folder / "some.jsonl"), "judge": su.judges.vader(), "with_prompt": True},
        ),
        Call(julia.pplm, jl, lambda args: julia.sample_pplm(args, **model, prompt="Hello there", seed=0)),
        Call(
            julia.sample_pplm,
            model | {"args": julia.pplm(**jl), "prompt": "Hello", "sample_method": "top_k", "seed": 0},
        ),
        Call(julia.perturb_hidden_discrim, model | {"args": julia.pplm(**jl), "hidden": some(1, 3, 32)}),
        Call(julia.temp_softmax, {"x": some(2, 5), "t": 1.2}),
        Call(julia.top_k_sample, {"probs": some(2, 5).exp(), "k": 2, "stream": None}),
        Call(su.tables.texts, {"columns": {"prompt": texts}, "words": ["good"]}),
    ]


def used_at_one(steer: Any) -> pd.DataFrame:
    return used(steer.at(1.0))


if __name__ == "__main__":
    os.environ |= {"CI": "1", "HF_HUB_OFFLINE": "1"}
    sys.exit(main())
