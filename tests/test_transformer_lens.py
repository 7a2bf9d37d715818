"""A TransformerLens bridge and the transformers model in it: steered alike, by us and by its own hooks."""

from pathlib import Path

import pandas as pd
import pytest
import torch
from conftest import (
    HEAD_KINDS,
    KINDS,
    MAIN,
    assert_same_up_to_rounding,
    head_steer,
    hook_count,
    logits,
    random_ids,
    tiny,
)
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge
from transformers import AutoModelForCausalLM

import steer_utils as su
from steer_utils import hf

CLOSE = {"atol": 1e-4, "rtol": 0}
LENGTH = 13
PROMPTS = ["I hate you because", "Good day, ", "abcdefgh"]


def boot(architecture: str, folder: Path, tokenizer) -> TransformerBridge:
    """A bridge around a model of its own, for it changes the modules of the model in place."""
    tiny(architecture).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder).eval().requires_grad_(False)
    return TransformerBridge.boot_transformers(str(folder), hf_model=model, tokenizer=tokenizer, device="cpu")


@pytest.fixture(scope="module", params=MAIN)
def bridge(request: pytest.FixtureRequest, tmp_path_factory, tokenizer) -> TransformerBridge:
    return boot(request.param, tmp_path_factory.mktemp("models") / request.param, tokenizer)


@pytest.fixture
def plain(bridge: TransformerBridge):
    """The same model without a bridge."""
    return tiny(bridge.original_model.config.model_type)


@torch.no_grad()
def bridge_logits(bridge: TransformerBridge, ids: Tensor) -> Tensor:
    return bridge(ids, return_type="logits")


def steers(kind: str) -> dict[str, list[su.ActivationAddition]]:
    name = f"blocks.1.hook_{kind}"
    love, hate = su.get_x_vector("Love", "Hate you", 5, name)
    return {
        "pair": [love, hate],
        "back": [su.ActivationAddition(3.0, name, "Love", addition_location="back")],
        "mid, all": [su.ActivationAddition(-3.0, name, "Love", addition_location="mid", positions="all")],
        "slice": [su.ActivationAddition(3.0, name, "Love", res_stream_slice=(0, 9))],
        "two hooks": [love, su.ActivationAddition(1.0, f"blocks.2.hook_{kind}", "b")],
    }


# --- the same as on the plain model -----------------------------------------------------------------------


def test_the_bridge_gives_the_logits_of_the_plain_model(bridge, plain):
    ids = random_ids(2, LENGTH)
    torch.testing.assert_close(bridge_logits(bridge, ids), logits(plain, ids), **CLOSE)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", steers("resid_pre"))
def test_additions_steer_the_bridge_like_the_plain_model(bridge, plain, tokenizer, kind, name):
    additions, ids = steers(kind)[name], random_ids(2, LENGTH)
    with su.apply_activation_additions(plain, additions, tokenizer):
        expected = logits(plain, ids)
    with su.apply_activation_additions(bridge, additions, tokenizer):
        found = bridge_logits(bridge, ids)
        inside = logits(bridge.original_model, ids)
    torch.testing.assert_close(found, expected, **CLOSE)
    torch.testing.assert_close(inside, expected, **CLOSE)
    assert (found - bridge_logits(bridge, ids)).abs().max() > 0.1


@pytest.mark.parametrize("values", [[5.0, -3.0], [[5.0, 0.0], [0.0, -3.0]]], ids=["for all", "for each"])
@pytest.mark.parametrize("kind", HEAD_KINDS)
def test_steers_at_the_head_steer_the_bridge_like_the_plain_model(bridge, plain, tokenizer, kind, values):
    steer, ids = head_steer(kind).at(values), random_ids(2, LENGTH)
    before, hooks = bridge_logits(bridge, ids), hook_count(bridge)
    with steer.on(plain):
        expected = logits(plain, ids)
    with steer.on(bridge):
        torch.testing.assert_close(bridge_logits(bridge, ids), expected, **CLOSE)
        torch.testing.assert_close(logits(bridge.original_model, ids), expected, **CLOSE)
    assert hook_count(bridge) == hooks
    assert torch.equal(bridge_logits(bridge, ids), before)
    assert (before - expected).abs().max() > 0.1
    kwargs = {"steer": steer, "max_new_tokens": 3, "seed": 1}
    on_bridge = su.generate(bridge, None, PROMPTS[:2], **kwargs)
    assert_same_up_to_rounding(on_bridge, su.generate(plain, tokenizer, PROMPTS[:2], **kwargs))


def test_a_steer_is_folded_into_a_copy_of_the_model_of_a_bridge(bridge, plain):
    steer, ids = head_steer().at([5.0, -3.0]), random_ids(2, LENGTH)
    before = bridge_logits(bridge, ids)
    folded = steer.fold(bridge)
    with steer.on(plain):
        torch.testing.assert_close(logits(folded, ids), logits(plain, ids), **CLOSE)
    assert torch.equal(bridge_logits(bridge, ids), before)


@pytest.mark.parametrize("method", ["tokens_right", "tokens_left"])
@pytest.mark.parametrize("kind", KINDS)
def test_padded_pairs_steer_the_bridge_like_the_plain_model(bridge, plain, tokenizer, kind, method):
    given = {"coeff": 4, "act_name": f"blocks.1.hook_{kind}", "pad_method": method, "custom_pad_id": 1}
    ours = su.get_x_vector("I talk", "I do", model=bridge, **given)
    assert ours == su.get_x_vector("I talk", "I do", tokenizer=tokenizer, **given)
    ids = random_ids(2, LENGTH)
    with su.apply_activation_additions(plain, ours):
        expected = logits(plain, ids)
    with su.apply_activation_additions(bridge, ours):
        torch.testing.assert_close(bridge_logits(bridge, ids), expected, **CLOSE)


def test_vectors_of_the_bridge_are_those_of_the_plain_model(bridge, plain, tokenizer):
    additions = [one for kind in KINDS for one in steers(kind)["two hooks"]]
    found = su.steering_vectors(bridge, None, additions)
    expected = su.steering_vectors(plain, tokenizer, additions)
    assert [one.act_name for one in found] == [one.act_name for one in expected]
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.rows, other.rows, **CLOSE)
        assert one.model_id == bridge.original_model.config.model_type  # the name of its folder


def test_a_vector_of_the_bridge_may_be_saved_and_loaded_for_it(bridge, tmp_path):
    (steer,) = su.steering_vectors(bridge, None, [su.ActivationAddition(3.0, 1, "Love")])
    steer.save_pretrained(tmp_path)
    loaded, ids = su.SteeringVector.from_pretrained(tmp_path, bridge), random_ids(1, LENGTH)
    with steer.on(bridge):
        expected = bridge_logits(bridge, ids)
    with loaded.on(bridge):
        assert torch.equal(bridge_logits(bridge, ids), expected)


# --- what TransformerLens sees ----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_activations_are_those_that_the_bridge_caches_under_the_same_names(bridge, plain, kind):
    ids, names = random_ids(2, LENGTH), [f"blocks.{layer}.hook_{kind}" for layer in range(3)]
    with torch.no_grad():
        _, cache = bridge.run_with_cache(ids)
    for model in (plain, hf.unwrapped(bridge)):
        found = hf.activations(model, ids, torch.ones_like(ids), names)
        for name in names:
            torch.testing.assert_close(found[name], cache[name], **CLOSE)


@pytest.mark.parametrize("name", ["pair", "back", "mid, all"])
def test_the_cache_of_the_bridge_shows_the_steered_residual_stream(bridge, plain, tokenizer, name):
    (addition, *_) = additions = steers("resid_pre")[name]
    ids, hook = random_ids(2, LENGTH), addition.act_name
    with torch.no_grad():
        _, before = bridge.run_with_cache(ids)
        with su.apply_activation_additions(bridge, additions, tokenizer):
            _, inside = bridge.run_with_cache(ids)
    added = torch.zeros(LENGTH, 32)
    (vector,) = su.steering_vectors(plain, tokenizer, additions)
    size = len(vector.rows)
    start = {"pair": 0, "back": LENGTH - size, "mid, all": LENGTH // 2 - size // 2}[name]
    added[start : start + size] = vector.rows
    if name == "mid, all":
        added[start + size :] = vector.rows[-1]
    torch.testing.assert_close(inside[hook], before[hook] + added, **CLOSE)
    torch.testing.assert_close(inside["blocks.0.hook_resid_post"], before["blocks.0.hook_resid_post"])


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_by_hand_with_transformer_lens_alone(bridge, tokenizer, kind):
    """Turner et al.'s way: cache the activations of two prompts, add their difference in a hook."""
    name, ids = f"blocks.1.hook_{kind}", random_ids(2, LENGTH)
    with torch.no_grad():
        rows = [
            bridge.run_with_cache(torch.tensor([[0, *tokenizer(text)["input_ids"]]]))[1][name][0]
            for text in ("Love", "Hate")
        ]

    def add(value: Tensor, hook: object) -> Tensor:
        value = value.clone()
        value[:, :5] += 5 * (rows[0] - rows[1])
        return value

    with torch.no_grad():
        expected = bridge.run_with_hooks(ids, return_type="logits", fwd_hooks=[(name, add)])
    with su.apply_activation_additions(bridge, su.get_x_vector("Love", "Hate", 5, name)):
        found = bridge_logits(bridge, ids)
    torch.testing.assert_close(found, expected, **CLOSE)
    assert (found - bridge_logits(bridge, ids)).abs().max() > 0.1


def test_hooks_of_transformer_lens_and_additions_may_be_on_together(bridge, tokenizer):
    name, ids = "blocks.1.hook_resid_pre", random_ids(2, LENGTH)
    (addition,) = steers("resid_pre")["back"]
    seen = []
    with addition.on(bridge, tokenizer), torch.no_grad():
        alone = bridge_logits(bridge, ids)
        both = bridge.run_with_hooks(
            ids, return_type="logits", fwd_hooks=[(name, lambda value, hook: seen.append(value) or 2 * value)]
        )
    with torch.no_grad():
        plain_hidden = bridge.run_with_cache(ids)[1][name]
    assert (seen[0] - plain_hidden)[:, :-5].abs().max() < 1e-4
    assert (seen[0] - plain_hidden)[:, -5:].abs().max() > 0.1
    assert (both - alone).abs().max() > 0.1


def test_the_bridge_is_as_before_after_the_context_and_after_an_exception(bridge, tokenizer):
    ids, hooks = random_ids(2, LENGTH), hook_count(bridge)
    before = bridge_logits(bridge, ids)
    for kind in KINDS:
        for additions in steers(kind).values():
            with (
                pytest.raises(RuntimeError, match="inside"),
                su.apply_activation_additions(bridge, additions, tokenizer),
            ):
                raise RuntimeError("inside")
    assert hook_count(bridge) == hooks
    assert torch.equal(bridge_logits(bridge, ids), before)


def test_a_layer_beyond_the_bridge_and_a_short_prompt_are_value_errors(bridge):
    with pytest.raises(ValueError, match="layer 3"), su.ActivationAddition(1.0, 3, "Love").on(bridge):
        pass
    with (
        su.ActivationAddition(1.0, 1, "Love").on(bridge),
        pytest.raises(ValueError, match=r"prompt of 4 tokens.*addition of 5"),
    ):
        bridge_logits(bridge, random_ids(1, 4))


# --- text -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_generate_on_the_bridge_is_generate_on_the_plain_model(bridge, plain, tokenizer, kind):
    additions = steers(kind)["mid, all"] + steers(kind)["pair"]
    given = {"steer": additions, "num_samples": 2, "max_new_tokens": 6, "seed": 0}
    prompts = ["I hate you because", "Good day, ", "abcdefgh"]
    expected = su.generate(plain, tokenizer, prompts, **given)
    assert_same_up_to_rounding(su.generate(bridge, None, prompts, **given), expected)
    assert_same_up_to_rounding(su.generate(bridge, tokenizer, prompts, **given), expected)


def test_comparisons_as_the_original_programs_write_them(bridge, plain, tokenizer, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    pair = su.get_x_vector(
        prompt1="I talk",
        prompt2="I do not",
        coeff=4,
        act_name=1,
        pad_method="tokens_right",
        model=bridge,
        custom_pad_id=bridge.to_single_token(" "),
    )
    assert [one.tokens for one in pair] == [
        (0, *tokenizer("I talk  ")["input_ids"]),
        (0, *tokenizer("I do not")["input_ids"]),
    ]
    given = {"tokens_to_generate": 9, "num_comparisons": 3, "seed": 42}
    given |= {"temperature": 1, "freq_penalty": 1, "top_p": 0.3}
    su.print_n_comparisons(prompt="I hate you because", model=bridge, activation_additions=[*pair], **given)
    shown = capsys.readouterr().out
    su.print_n_comparisons(plain, tokenizer, prompt="I hate you because", activation_additions=pair, **given)
    assert shown == capsys.readouterr().out
    assert "Steered completions" in shown


@pytest.mark.parametrize("architecture", MAIN)
def test_a_sweep_on_the_bridge_is_a_sweep_on_the_plain_model_and_leaves_it_as_it_was(
    architecture, tokenizer, tmp_path
):
    bridge, plain = boot(architecture, tmp_path / architecture, tokenizer), tiny(architecture)
    ids = random_ids(2, LENGTH)
    before = bridge_logits(bridge, ids)
    given = {
        "act_names": [2, "blocks.1.hook_attn_out"],
        "coeffs": [1.0, -1.0],
        "max_new_tokens": 5,
        "seed": 0,
    }
    pair = su.get_x_vector("Love", "Hate", 2, 0)
    found = su.sweep(bridge, None, PROMPTS, pair, **given)
    assert_same_up_to_rounding(found, su.sweep(plain, tokenizer, PROMPTS, pair, **given))
    assert torch.equal(bridge_logits(bridge, ids), before)
    assert not [module for module in bridge.modules() if "forward" in vars(module)]


def test_the_bridges_own_generate_is_steered(bridge, plain, tokenizer):
    (addition,) = steers("resid_pre")["mid, all"]
    ids = random_ids(1, LENGTH)
    with addition.on(plain, tokenizer):
        expected = plain.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False, eos_token_id=None
        )
    for use_past_kv_cache in (True, False):
        with addition.on(bridge):
            found = bridge.generate(
                ids,
                max_new_tokens=6,
                do_sample=False,
                stop_at_eos=False,
                use_past_kv_cache=use_past_kv_cache,
                return_type="tokens",
                verbose=False,
            )
        assert torch.equal(found, expected)


def test_the_table_of_a_bridge_has_the_columns_of_any(bridge):
    table = su.compare(bridge, None, "I hate you", steer=su.ActivationAddition(1.0, 1, "b"), max_new_tokens=2)
    assert isinstance(table, pd.DataFrame)
    assert list(table.columns) == ["prompt", "sample", "completion", "steered", "loss"]


def test_a_classifier_head_reads_the_bridge_like_the_plain_model(bridge, plain, tokenizer):
    head = su.ClassifierHead(32, 2)
    expected = head.log_probs(plain, tokenizer, PROMPTS)
    torch.testing.assert_close(head.log_probs(bridge, None, PROMPTS), expected, **CLOSE)
