"""What the CPU computes, a GPU computes too: every steer and every kind of work, on the main architectures.

Float32 on both, so that they agree up to rounding. Skipped where there is no GPU.
"""

from collections.abc import Callable, Sequence
from typing import Any

import pandas as pd
import pytest
import torch
from conftest import CONFIGS, head_steer, new_model, padded, random_ids, small_tokenizer
from test_invariants import BAG, HEAD, STEERS, Mechanism, written, x_vector
from test_lm_steer_transfer import TEXTS as SENTENCES
from test_lm_steer_transfer import character_models
from torch import Tensor
from transformers import PreTrainedModel

import steer_utils as su
from steer_utils.measure import metrics, strength

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

CLOSE = {"atol": 1e-3, "rtol": 1e-3}
PROMPTS = ["I hate you because", "abcde", "Good day"]
TEXTS = [f"{letter * 3} {word}" for letter in "abcdefghijklmnop" for word in ("good", "bad")]
LABELS = [i % 2 for i in range(len(TEXTS))]
ROWS = [row.tolist() for row in random_ids(40, 12)]
PPLM = su.PPLM(**BAG, stepsize=0.05, gamma=1.0, top_k=0)


@pytest.fixture
def moved(main_model: PreTrainedModel) -> PreTrainedModel:
    """The same tiny model on the GPU."""
    return new_model(CONFIGS[main_model.config.model_type]()).to("cuda")


@pytest.fixture(params=STEERS)
def mechanism(request: pytest.FixtureRequest) -> Mechanism:
    return STEERS[request.param]


def assert_agree(found: Any, expected: Any) -> None:
    """Tensors, tables, or sequences of such, up to rounding; texts exactly."""
    if isinstance(expected, pd.DataFrame):
        pd.testing.assert_frame_equal(found, expected, **CLOSE)
    elif isinstance(expected, Sequence):
        for pair in zip(found, expected, strict=True):
            assert_agree(*pair)
    else:
        found, expected = (torch.as_tensor(one).cpu() for one in (found, expected))
        torch.testing.assert_close(found, expected, check_dtype=False, **CLOSE)


def test_a_left_padded_batch_under_every_steer(main_model, moved, tokenizer, mechanism):
    ids, mask = padded([13, 6], "left")
    steer = mechanism.at(0.5)
    expected = written(main_model, tokenizer, steer, ids, mask)
    assert_agree(written(moved, tokenizer, steer, ids.cuda(), mask.cuda()), expected)


def test_sampled_texts_under_every_steer(main_model, moved, tokenizer, mechanism):
    kwargs = {"steer": mechanism.at(0.5), "max_new_tokens": 4, "num_samples": 2, "seed": 1}
    expected = su.generate(main_model, tokenizer, PROMPTS, **kwargs)
    assert_agree(su.generate(moved, tokenizer, PROMPTS, **kwargs), expected)


# --- work other than writing ------------------------------------------------------------------------------


def trained_steer(model: PreTrainedModel, kind: str) -> list[Tensor]:
    labels = [(-1) ** i for i in range(len(ROWS))]
    how = {"rank": 4, "epsilon": 0.3, "n_steps": 10, "batch_tokens": 64, "adaptor_class": kind}
    return list(su.train_lm_steer(model, None, ROWS, labels, **how).tensors().values())


def trained_head(model: PreTrainedModel, tokenizer: Any) -> Tensor:
    head = su.train_classifier_head(model, tokenizer, TEXTS, LABELS, classes=("good", "bad"), epochs=3)
    return head.probabilities(model, tokenizer, PROMPTS)


def folded(model: PreTrainedModel, tokenizer: Any) -> Tensor:
    return head_steer().fold(model, [1.0, 0.5])(random_ids(2, 6).to(model.device)).logits


def swept(model: PreTrainedModel, tokenizer: Any) -> pd.DataFrame:
    pair, grid = x_vector(0.1), {"act_names": range(2), "coeffs": [0.5, 1.0]}
    return su.sweep(model, tokenizer, PROMPTS, pair, **grid, max_new_tokens=3, seed=0)


def strengths(model: PreTrainedModel, tokenizer: Any) -> list[float]:
    """By halving and by reading, for a value and for a step size."""
    found = su.at_kl(head_steer().at([1.0, 0.0]), 0.2, model, tokenizer, PROMPTS, tokens=3)
    return [found.values()[0].item(), su.at_kl(PPLM, 0.1, model, tokenizer, PROMPTS, tokens=2).stepsize]


def analysed(model: PreTrainedModel, tokenizer: Any) -> list[float]:
    about = head_steer(), model, tokenizer, "Good day, bad night"
    evidence = su.evidence_spans(*about, [1.0, 0.0], [-1.0, 0.0])
    return [*su.steer_analysis(*about).losses, *evidence.evidence]


def measured(model: PreTrainedModel, tokenizer: Any) -> list[Any]:
    steer = head_steer().at([1.0, 0.0])
    return [
        metrics.perplexity(model, tokenizer, PROMPTS, TEXTS[:3]),
        strength.kl_along(steer, model, tokenizer, PROMPTS, tokens=3),
        strength.loss_increase(model, tokenizer, TEXTS, steer, start=2).mean,
    ]


def ranked(model: PreTrainedModel, tokenizer: Any) -> Tensor:
    table = pd.DataFrame({"prompt": PROMPTS, "completion": TEXTS[:3]})
    return torch.as_tensor(su.attribute_scores(su.PPLM(**BAG, **HEAD), model, tokenizer, table))


WORK = [trained_head, folded, swept, strengths, analysed, measured, ranked]


@pytest.mark.parametrize("kind", ["multiply", "add", "offset"])
def test_training_a_steer(main_model, moved, kind):
    assert_agree(trained_steer(moved, kind), trained_steer(main_model, kind))


@pytest.mark.parametrize("work", WORK, ids=lambda work: work.__name__)
def test_other_work(main_model, moved, tokenizer, work: Callable):
    assert_agree(work(moved, tokenizer), work(main_model, tokenizer))


@pytest.mark.parametrize("method", ["closed_form", "logits", "states"])
def test_transfer_to_another_width_on_the_gpu(method):
    tokenizers = small_tokenizer("llama"), small_tokenizer("gpt2")
    how = {"method": method, "texts": SENTENCES, "anchors": 50}

    def moved(device: str) -> list[Tensor]:
        source, target = (model.to(device) for model in character_models())
        steer = su.transfer(head_steer(), source, tokenizers[0], target, tokenizers[1], **how)
        return list(steer.tensors().values())

    assert_agree(moved("cuda"), moved("cpu"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_writes_finite_text_under_every_steer(tokenizer, mechanism, dtype):
    for architecture in ("gpt2", "llama"):
        model = new_model(CONFIGS[architecture]()).to("cuda", dtype)
        kwargs = {"steer": mechanism.at(0.3), "max_new_tokens": 4, "seed": 1}
        table = su.generate(model, tokenizer, PROMPTS, **kwargs)
        assert table["loss"].notna().all()
