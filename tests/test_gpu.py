"""A GPU computes what the CPU computes: every steer and every kind of work, on tiny models in float32."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, is_dataclass
from typing import Any

import pandas as pd
import pytest
import torch
from conftest import CONFIGS, head_steer, new_model, padded, random_ids, small_tokenizer, tiny
from test_invariants import BAG, HEAD, STEERS, table, written, x_vector
from torch import Tensor
from transformers import PreTrainedModel

import steer_utils as su
from steer_utils.measure import strength

DEVICE = "cuda"
if not torch.cuda.is_available():
    pytest.skip("needs a GPU", allow_module_level=True)

CLOSE = {"atol": 1e-3, "rtol": 1e-3}
PROMPTS = ["I hate you because", "abcde", "Good day"]
TEXTS = [f"{letter * 3} {word}" for letter in "abcdefghijklmnop" for word in ("good", "bad")]
LABELS = [i % 2 for i in range(len(TEXTS))]


def on_gpu(architecture: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The same tiny model on the GPU."""
    return new_model(CONFIGS[architecture]()).to(DEVICE, dtype)


def assert_agree(found: Any, expected: Any) -> None:
    """Tensors, tables and numbers, or sequences of them, agree up to rounding; texts agree exactly."""
    if isinstance(expected, pd.DataFrame):
        pd.testing.assert_frame_equal(found, expected, **CLOSE)
    elif isinstance(expected, Sequence):
        for pair in zip(found, expected, strict=True):
            assert_agree(*pair)
    else:
        found, expected = (torch.as_tensor(one).cpu() for one in (found, expected))
        torch.testing.assert_close(found, expected, check_dtype=False, **CLOSE)


@table()
def test_every_steer_gives_the_same_logits_and_texts_and_leaves_no_memory_behind(
    name, architecture, tokenizer
):
    model, moved, steer = tiny(architecture), on_gpu(architecture), STEERS[name].at(0.5)
    ids, mask = padded([13, 6], "left")
    given = {"steer": steer, "max_new_tokens": 4, "num_samples": 2, "seed": 1}
    expected = su.generate(model, tokenizer, PROMPTS, **given)
    assert_agree(su.generate(moved, tokenizer, PROMPTS, **given), expected)
    before = torch.cuda.memory_allocated() if DEVICE == "cuda" else 0
    found = [one.cpu() for one in written(moved, tokenizer, steer, ids.to(DEVICE), mask.to(DEVICE))]
    assert_agree(found, list(written(model, tokenizer, steer, ids, mask)))
    assert (torch.cuda.memory_allocated() if DEVICE == "cuda" else 0) == before


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_half_precision_gives_finite_losses_under_every_steer(tokenizer, dtype):
    for architecture in ("gpt2", "llama"):
        model = on_gpu(architecture, dtype)
        for steer in STEERS.values():
            given = {"steer": steer.at(0.3), "max_new_tokens": 4, "seed": 1}
            assert su.generate(model, tokenizer, PROMPTS, **given)["loss"].notna().all()


# --- work other than generation ---------------------------------------------------------------------------


def trained_steers(model: PreTrainedModel, tokenizer: Any) -> list[Tensor]:
    rows = [row.tolist() for row in random_ids(40, 12)]
    how = {"rank": 4, "epsilon": 0.3, "n_steps": 10, "batch_tokens": 64}
    labels = [(-1) ** i for i in range(len(rows))]
    steers = [
        su.train_lm_steer(model, None, rows, labels, **how, adaptor_class=kind)
        for kind in ("multiply", "add", "offset")
    ]
    return [tensor for steer in steers for tensor in steer.tensors().values()]


def trained_head(model: PreTrainedModel, tokenizer: Any) -> Tensor:
    head = su.train_classifier_head(model, tokenizer, TEXTS, LABELS, classes=("good", "bad"))
    return head.probabilities(model, tokenizer, PROMPTS)


def folded(model: PreTrainedModel, tokenizer: Any) -> Tensor:
    return head_steer().fold(model, [1.0, 0.5])(random_ids(2, 6).to(model.device)).logits


def swept(model: PreTrainedModel, tokenizer: Any) -> pd.DataFrame:
    grid = {"act_names": range(2), "coeffs": [0.5, 1.0]}
    return su.sweep(model, tokenizer, PROMPTS, x_vector(0.1), **grid, max_new_tokens=3, seed=0)


def equal_strengths(model: PreTrainedModel, tokenizer: Any) -> list[float]:
    steer = su.at_kl(head_steer().at([1.0, 0.0]), 0.2, model, tokenizer, PROMPTS, tokens=3)
    pplm = su.PPLM(**BAG, stepsize=0.05, gamma=1.0, top_k=0)
    return [steer.values()[0].item(), su.at_kl(pplm, 0.1, model, tokenizer, PROMPTS, tokens=2).stepsize]


def measured(model: PreTrainedModel, tokenizer: Any) -> list[Any]:
    steer = head_steer().at([1.0, 0.0])
    return [
        su.metrics.perplexity(model, tokenizer, PROMPTS, TEXTS[:3]),
        strength.kl_along(steer, model, tokenizer, PROMPTS, tokens=3),
        *numbers(strength.loss_increase(model, tokenizer, TEXTS, steer, start=2)),
    ]


def numbers(result: Any) -> list[float]:
    """The numbers in a dataclass or a named tuple."""
    values = asdict(result).values() if is_dataclass(result) else result
    return [value for value in values if isinstance(value, float)]


def analysed(model: PreTrainedModel, tokenizer: Any) -> list[float]:
    about = head_steer(), model, tokenizer, "Good day, bad night"
    evidence = su.evidence_spans(*about, [1.0, 0.0], [-1.0, 0.0])
    return [*su.steer_analysis(*about).losses, *evidence.evidence]


def ranked(model: PreTrainedModel, tokenizer: Any) -> Tensor:
    texts = pd.DataFrame({"prompt": PROMPTS, "completion": TEXTS[:3]})
    return torch.as_tensor(su.attribute_scores(su.PPLM(**BAG, **HEAD), model, tokenizer, texts))


WORK = [trained_steers, trained_head, folded, swept, equal_strengths, measured, analysed, ranked]


@pytest.mark.parametrize("work", WORK, ids=lambda work: work.__name__)
def test_other_work_gives_the_same_results(work: Callable, tokenizer):
    for architecture in ("gpt2", "gemma3_text"):
        assert_agree(work(on_gpu(architecture), tokenizer), work(tiny(architecture), tokenizer))


@pytest.mark.parametrize("method", ["closed_form", "logits", "states"])
def test_transfer_to_a_model_of_another_width_gives_the_same_steer(method):
    tokenizers = small_tokenizer("llama"), small_tokenizer("gpt2")
    configs = CONFIGS["llama"](), CONFIGS["gpt2"]()
    configs[1].n_embd = 16
    for config, tokenizer in zip(configs, tokenizers, strict=True):
        config.vocab_size = len(tokenizer)

    def transferred(device: str) -> list[Tensor]:
        source, target = (new_model(config).to(device) for config in configs)
        how = {"method": method, "anchors": 50} | ({"texts": TEXTS} if method == "states" else {})
        steer = su.transfer(head_steer(), source, tokenizers[0], target, tokenizers[1], **how)
        return list(steer.tensors().values())

    assert_agree(transferred(DEVICE), transferred("cpu"))
