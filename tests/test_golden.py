"""This package against numbers that the original programs computed; one test for each case on file.

The folder is $STEER_GOLDEN, else tests/golden. Test ids begin with the file's name, so -k pplm works.
"""

import json
import os
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from steer_utils import hf
from steer_utils.activation_addition import ActivationAddition, apply_activation_additions, steering_vectors
from steer_utils.metrics import word_count
from steer_utils.sampling import sampling_processors

FOLDER = Path(os.environ.get("STEER_GOLDEN", Path(__file__).parent / "golden"))
Case = dict[str, Any]


def cases() -> list:
    files = sorted(FOLDER.glob("*.json"))
    assert files, f"no golden cases in {FOLDER}; set STEER_GOLDEN to a folder that has them"
    return [
        pytest.param(file.stem, case, id=f"{file.stem}-{case['name']}")
        for file in files
        for case in json.loads(file.read_text())["cases"]
    ]


@cache
def load_arrays(stem: str) -> dict[str, Tensor]:
    return load_file(FOLDER / f"{stem}.safetensors")


@cache
def load_model(name: str) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(FOLDER / "models" / name, dtype=torch.float32).eval()


@pytest.mark.parametrize(("stem", "case"), cases())
@torch.no_grad()
def test_golden(stem: str, case: Case):
    check = CHECKS.get(stem)
    if check is None:
        pytest.skip(f"{stem}: this mechanism is not built yet")
    arrays = {label: load_arrays(stem)[place["key"]] for label, place in case.get("arrays", {}).items()}
    check(case, arrays)


# --- plain models -----------------------------------------------------------------------------------------


def check_plain_logits(case: Case, arrays: dict[str, Tensor]) -> None:
    model, tokens = load_model(case["model"]), torch.tensor(case["tokens"])
    hidden = hf.forward(model, tokens, torch.ones_like(tokens)).last_hidden_state
    near(hidden, arrays["last_hidden"], 2e-5)
    near(hf.output_head(model)(hidden), arrays["logits"], 2e-5)


# --- activation additions ---------------------------------------------------------------------------------


def check_actadd(case: Case, arrays: dict[str, Tensor]) -> None:
    kind = next((kind for kind in ACTADD if case["name"].startswith(kind)), None)
    if kind is None:
        pytest.skip(f"actadd: {case['name'].split('_')[0]} measures are not built yet")
    if case.get("location", "front") != "front":
        pytest.skip(f"actadd: location {case['location']!r} is not built yet")
    if case.get("res_stream_slice") or any(one["act_name"] for one in case.get("additions", ())):
        pytest.skip("actadd: slices of the width and other hooks are not built yet")
    ACTADD[kind](case, arrays)


def check_residuals(case: Case, arrays: dict[str, Tensor]) -> None:
    model, tokens = load_model(case["model"]), torch.tensor([case["tokens"]])
    inputs = hf.block_inputs(model, tokens, torch.ones_like(tokens), range(len(arrays["resid_pre"])))
    for layer, expected in enumerate(arrays["resid_pre"]):
        near(inputs[layer][0], expected, 2e-5)
    near(model(tokens).logits[0], arrays["logits"], 2e-4)


def check_x_vector(case: Case, arrays: dict[str, Tensor]) -> None:
    plus, minus = pair = additions(case)
    rows = {"plus": [plus], "minus": [minus]} | ({"total": pair} if "total" in arrays else {})
    for label, which in rows.items():
        (vector,) = steering_vectors(load_model(case["model"]), None, which)
        near(vector.rows, arrays[label], 2e-5 * max(1, abs(case["coeff"])))
    (total,) = steering_vectors(load_model(case["model"]), None, pair)
    near(total.rows.norm(dim=1), torch.tensor(case["steering_magnitudes"]), 1e-4 * max(1, abs(case["coeff"])))


def check_injection(case: Case, arrays: dict[str, Tensor]) -> None:
    model, tokens = load_model(case["model"]), torch.tensor(case["tokens"])
    tokens = tokens[None] if tokens.ndim == 1 else tokens
    seen = {}
    with apply_activation_additions(model, additions(case)):
        hooks = [
            block.register_forward_pre_hook(
                lambda _, args, kwargs, i=i: seen.update({i: args[0]}), with_kwargs=True
            )
            for i, block in enumerate(hf.blocks(model))
        ]
        logits = model(tokens).logits
        for hook in hooks:
            hook.remove()
    strongest = max(abs(one["coeff"]) for one in case["additions"])
    near(logits.squeeze(0), arrays["logits"].squeeze(0), 1e-3 if strongest >= 10 else 2e-4)
    if "resid_pre_after" in arrays:
        for layer, expected in enumerate(arrays["resid_pre_after"]):
            near(seen[layer].squeeze(0), expected.squeeze(0), 2e-4)


def check_too_short(case: Case, arrays: dict[str, Tensor]) -> None:
    """A prompt shorter than the addition is an error; for one token too, where the original did nothing."""
    model, tokens = load_model(case["model"]), torch.tensor([case["tokens"]])
    longest = max(len(one["tokens"]) for one in case["additions"])
    with (
        apply_activation_additions(model, additions(case)),
        pytest.raises(ValueError, match=rf"{tokens.shape[1]} tokens.* {longest}:"),
    ):
        model(tokens)


def check_greedy(case: Case, arrays: dict[str, Tensor]) -> None:
    model, tokens = load_model(case["model"]), torch.tensor([case["prompt_tokens"]])
    with apply_activation_additions(model, additions(case)):
        out = model.generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            max_new_tokens=case["new_tokens"],
            do_sample=False,
            use_cache=case["use_cache"],
            eos_token_id=case["eos_token_id"],
            pad_token_id=0,
            output_logits=True,
            return_dict_in_generate=True,
        )
    assert out.sequences[0].tolist() == case["tokens"]
    near(torch.cat(out.logits), arrays["step_logits"], 2e-4)


def check_sampling(case: Case, arrays: dict[str, Tensor]) -> None:
    """Top-k and top-p together apply both, as everywhere in transformers; the original ignored top-p then."""
    start, settings = torch.tensor([case["prompt_tokens"]]), {"top_p": 1.0} | case["sampling"]
    row = torch.tensor([case["tokens"]])
    if settings.get("top_k"):
        settings["top_p"] = (
            1.0  # what the original computed; the stricter rule is tested in test_generation.py
        )
    processors = sampling_processors(torch.ones_like(start), **settings)
    for step, (logits, expected) in enumerate(zip(arrays["step_logits"], arrays["step_probs"], strict=True)):
        scores = processors(row[:, : start.shape[1] + step], logits[None].clone())
        near(scores.softmax(-1)[0], expected, 2e-5)


def check_word_count(case: Case, arrays: dict[str, Tensor]) -> None:
    sensitive = case["case_sensitive"]
    assert [word_count(text, case["words"], case_sensitive=sensitive) for text in case["texts"]] == case[
        "counts"
    ]


def additions(case: Case) -> list[ActivationAddition]:
    return [ActivationAddition(one["coeff"], one["layer"], tokens=one["tokens"]) for one in case["additions"]]


def near(actual: Tensor, expected: Tensor, atol: float) -> None:
    torch.testing.assert_close(actual.float(), expected, atol=atol, rtol=1e-5)


ACTADD: dict[str, Callable[[Case, dict[str, Tensor]], None]] = {
    "resid_": check_residuals,
    "xvec_": check_x_vector,
    "inject_error": check_too_short,
    "inject_T1_noop": check_too_short,
    "inject_": check_injection,
    "gen_": check_greedy,
    "sample_": check_sampling,
    "word_count": check_word_count,
}
CHECKS = {"plain_logits": check_plain_logits, "actadd": check_actadd}
