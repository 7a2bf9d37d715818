"""A TransformerLens bridge and the transformers model in it: steered alike, by us and by its own hooks."""

import itertools

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
from steer_utils import hf, hooks

CLOSE = {"atol": 1e-4, "rtol": 0}
LENGTH = 13
PROMPTS = ["I hate you because", "Good day, ", "abcdefgh"]


@pytest.fixture(scope="module", params=MAIN)
def bridge(request: pytest.FixtureRequest, tmp_path_factory, tokenizer) -> TransformerBridge:
    """A bridge around a model of its own, for it changes the modules of the model in place."""
    folder = tmp_path_factory.mktemp("models") / request.param
    tiny(request.param).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder).eval().requires_grad_(False)
    return TransformerBridge.boot_transformers(str(folder), hf_model=model, tokenizer=tokenizer, device="cpu")


@pytest.fixture
def model(bridge: TransformerBridge):
    """The same model without a bridge."""
    return tiny(bridge.original_model.config.model_type)


def only(*architectures: str) -> pytest.MarkDecorator:
    """Bridges of these architectures only."""
    return pytest.mark.parametrize("bridge", architectures, indirect=True)


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


# --- the same as without the bridge -----------------------------------------------------------------------


def test_additions_steer_the_bridge_like_the_model_and_leave_it_as_it_was(bridge, model, tokenizer):
    ids = random_ids(2, LENGTH)
    before, same = bridge_logits(bridge, ids), logits(bridge.original_model, ids)
    hooks = hook_count(bridge)  # transformers sets some of its own in the first pass
    torch.testing.assert_close(before, logits(model, ids), **CLOSE)
    torch.testing.assert_close(before, same, **CLOSE)
    for additions in (some for kind in KINDS for some in steers(kind).values()):
        with su.apply_activation_additions(model, additions, tokenizer):
            expected = logits(model, ids)
        with su.apply_activation_additions(bridge, additions, tokenizer):
            torch.testing.assert_close(bridge_logits(bridge, ids), expected, **CLOSE)
            torch.testing.assert_close(logits(bridge.original_model, ids), expected, **CLOSE)
        assert (expected - before).abs().max() > 0.1
    assert hook_count(bridge) == hooks
    assert torch.equal(bridge_logits(bridge, ids), before)


@only("gpt2", "gemma3_text")
def test_steers_at_the_lm_head_steer_the_bridge_like_the_model(bridge, model, tokenizer):
    ids = random_ids(2, LENGTH)
    before, hooks = bridge_logits(bridge, ids), hook_count(bridge)
    for kind, values in itertools.product(HEAD_KINDS, ([5.0, -3.0], [[5.0, 0.0], [0.0, -3.0]])):
        steer = head_steer(kind).at(values)
        with steer.on(model):
            expected = logits(model, ids)
        with steer.on(bridge):
            torch.testing.assert_close(bridge_logits(bridge, ids), expected, **CLOSE)
            torch.testing.assert_close(logits(bridge.original_model, ids), expected, **CLOSE)
        assert (before - expected).abs().max() > 0.1
        kwargs = {"steer": steer, "max_new_tokens": 3, "seed": 1}
        on_bridge = su.generate(bridge, None, PROMPTS[:2], **kwargs)
        assert_same_up_to_rounding(on_bridge, su.generate(model, tokenizer, PROMPTS[:2], **kwargs))
    assert hook_count(bridge) == hooks
    assert torch.equal(bridge_logits(bridge, ids), before)


@only("llama", "gpt_neox")
def test_a_steer_is_folded_into_a_copy_of_the_model_of_a_bridge(bridge, model):
    steer, ids = head_steer().at([5.0, -3.0]), random_ids(2, LENGTH)
    before = bridge_logits(bridge, ids)
    folded = steer.fold(bridge)
    with steer.on(model):
        torch.testing.assert_close(logits(folded, ids), logits(model, ids), **CLOSE)
    assert torch.equal(bridge_logits(bridge, ids), before)


@pytest.mark.parametrize("method", ["tokens_right", "tokens_left"])
@only("gpt2")
def test_padded_pairs_take_the_tokenizer_of_the_bridge_and_steer_it_like_the_model(
    bridge, model, tokenizer, method
):
    given = {"coeff": 4, "act_name": 1, "pad_method": method, "custom_pad_id": 1}
    ours = su.get_x_vector("I talk", "I do", model=bridge, **given)
    assert ours == su.get_x_vector("I talk", "I do", tokenizer=tokenizer, **given)
    ids = random_ids(2, LENGTH)
    with su.apply_activation_additions(model, ours):
        expected = logits(model, ids)
    with su.apply_activation_additions(bridge, ours):
        torch.testing.assert_close(bridge_logits(bridge, ids), expected, **CLOSE)


def test_vectors_of_the_bridge_are_those_of_the_model_and_may_be_saved_for_it(
    bridge, model, tokenizer, tmp_path
):
    additions = [one for kind in KINDS for one in steers(kind)["two hooks"]]
    found = su.steering_vectors(bridge, None, additions)
    expected = su.steering_vectors(model, tokenizer, additions)
    assert [one.act_name for one in found] == [one.act_name for one in expected]
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.rows, other.rows, **CLOSE)
        assert one.model_id == bridge.original_model.config.model_type  # the name of its folder
    found[0].save_pretrained(tmp_path)
    loaded = su.SteeringVector.from_pretrained(tmp_path, bridge)
    assert loaded.where == found[0].where
    assert torch.equal(loaded.rows, found[0].rows)


# --- what TransformerLens sees ----------------------------------------------------------------------------


def test_activations_are_those_that_the_bridge_caches_under_the_same_names(bridge, model):
    ids, names = random_ids(2, LENGTH), [f"blocks.{i}.hook_{kind}" for i in range(3) for kind in KINDS]
    with torch.no_grad():
        _, cache = bridge.run_with_cache(ids)
    for one in (model, hf.unwrapped(bridge)):
        found = hooks.activations(one, ids, torch.ones_like(ids), names)
        for name in names:
            torch.testing.assert_close(found[name], cache[name], **CLOSE)


@pytest.mark.parametrize("name", ["pair", "back", "mid, all"])
@only("llama")
def test_the_cache_of_the_bridge_shows_the_steered_residual_stream(bridge, model, tokenizer, name):
    (addition, *_) = additions = steers("resid_pre")[name]
    ids, hook = random_ids(2, LENGTH), addition.act_name
    with torch.no_grad():
        _, before = bridge.run_with_cache(ids)
        with su.apply_activation_additions(bridge, additions, tokenizer):
            _, inside = bridge.run_with_cache(ids)
    added = torch.zeros(LENGTH, 32)
    (vector,) = su.steering_vectors(model, tokenizer, additions)
    size = len(vector.rows)
    start = {"pair": 0, "back": LENGTH - size, "mid, all": LENGTH // 2 - size // 2}[name]
    added[start : start + size] = vector.rows
    if name == "mid, all":
        added[start + size :] = vector.rows[-1]
    torch.testing.assert_close(inside[hook], before[hook] + added, **CLOSE)
    torch.testing.assert_close(inside["blocks.0.hook_resid_post"], before["blocks.0.hook_resid_post"])


def test_the_same_by_hand_with_transformer_lens_alone(bridge, tokenizer):
    """Turner et al.'s way: cache the activations of two prompts, add their difference in a hook."""
    ids, texts = (
        random_ids(2, LENGTH),
        [torch.tensor([[0, *tokenizer(t)["input_ids"]]]) for t in ("Love", "Hate")],
    )
    with torch.no_grad():
        caches = [bridge.run_with_cache(text)[1] for text in texts]
    for name in (f"blocks.1.hook_{kind}" for kind in KINDS):

        def add(value: Tensor, hook: object, name: str = name) -> Tensor:
            value = value.clone()
            value[:, :5] += 5 * (caches[0][name][0] - caches[1][name][0])
            return value

        with torch.no_grad():
            expected = bridge.run_with_hooks(ids, return_type="logits", fwd_hooks=[(name, add)])
        with su.apply_activation_additions(bridge, su.get_x_vector("Love", "Hate", 5, name)):
            found = bridge_logits(bridge, ids)
        torch.testing.assert_close(found, expected, **CLOSE)
        assert (found - bridge_logits(bridge, ids)).abs().max() > 0.1


@only("gpt2", "gemma3_text")
def test_hooks_of_transformer_lens_and_additions_may_be_on_together(bridge, tokenizer):
    name, ids, seen = "blocks.1.hook_resid_pre", random_ids(2, LENGTH), []
    double = [(name, lambda value, hook: seen.append(value) or 2 * value)]
    (addition,) = steers("resid_pre")["back"]
    with addition.on(bridge, tokenizer), torch.no_grad():
        alone = bridge_logits(bridge, ids)
        both = bridge.run_with_hooks(ids, return_type="logits", fwd_hooks=double)
    with torch.no_grad():
        before = bridge.run_with_cache(ids)[1][name]
    assert (seen[0] - before)[:, :-5].abs().max() < 1e-4
    assert (seen[0] - before)[:, -5:].abs().max() > 0.1
    assert (both - alone).abs().max() > 0.1


@only("gpt_neox")
def test_errors_on_the_bridge_leave_it_as_it_was(bridge, tokenizer):
    ids = random_ids(2, LENGTH)
    before, hooks = bridge_logits(bridge, ids), hook_count(bridge)
    with pytest.raises(ValueError, match="layer 3"), su.ActivationAddition(1.0, 3, "Love").on(bridge):
        pass
    addition = su.ActivationAddition(1.0, 1, "Love")
    with pytest.raises(ValueError, match=r"prompt of 4 tokens.*addition of 5"), addition.on(bridge):
        bridge_logits(bridge, random_ids(1, 4))
    for additions in (some for kind in KINDS for some in steers(kind).values()):
        with (
            pytest.raises(RuntimeError, match="inside"),
            su.apply_activation_additions(bridge, additions, tokenizer),
        ):
            raise RuntimeError("inside")
    assert hook_count(bridge) == hooks
    assert torch.equal(bridge_logits(bridge, ids), before)


# --- text -------------------------------------------------------------------------------------------------


def test_generate_and_sweep_on_the_bridge_are_those_on_the_model(bridge, model, tokenizer):
    additions = steers("attn_out")["mid, all"] + steers("resid_pre")["pair"]
    given = {"steer": additions, "num_samples": 2, "max_new_tokens": 6, "seed": 0}
    expected = su.generate(model, tokenizer, PROMPTS, **given)
    for own in (None, tokenizer):
        assert_same_up_to_rounding(su.generate(bridge, own, PROMPTS, **given), expected)
    given = {"act_names": [2, "blocks.1.hook_attn_out"], "coeffs": [1.0, -1.0], "max_new_tokens": 5}
    pair = su.get_x_vector("Love", "Hate", 2, 0)
    expected = su.sweep(model, tokenizer, PROMPTS, pair, **given)
    assert_same_up_to_rounding(su.sweep(bridge, None, PROMPTS, pair, **given), expected)


@only("gpt2")
def test_comparisons_as_the_original_programs_write_them(bridge, model, tokenizer, capsys, monkeypatch):
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
        (0, *tokenizer(text)["input_ids"]) for text in ("I talk  ", "I do not")
    ]
    given = {"tokens_to_generate": 9, "num_comparisons": 3, "seed": 42}
    given |= {"temperature": 1, "freq_penalty": 1, "top_p": 0.3}
    su.print_n_comparisons(prompt="I hate you because", model=bridge, activation_additions=[*pair], **given)
    shown = capsys.readouterr().out
    su.print_n_comparisons(model, tokenizer, prompt="I hate you because", activation_additions=pair, **given)
    assert shown == capsys.readouterr().out
    assert "Steered completions" in shown


def test_the_bridges_own_generate_is_steered(bridge, model, tokenizer):
    (addition,) = steers("resid_pre")["mid, all"]
    ids = random_ids(1, LENGTH)
    given = {"attention_mask": torch.ones_like(ids), "eos_token_id": None}
    with addition.on(model, tokenizer):
        expected = model.generate(ids, max_new_tokens=6, do_sample=False, **given)
    given = {"stop_at_eos": False, "return_type": "tokens", "verbose": False}
    for use in (True, False):
        with addition.on(bridge):
            found = bridge.generate(ids, max_new_tokens=6, do_sample=False, use_past_kv_cache=use, **given)
        assert torch.equal(found, expected)


@only("llama")
def test_a_classifier_head_reads_the_bridge_like_the_model(bridge, model, tokenizer):
    head = su.ClassifierHead(32, 2)
    expected = head.log_probs(model, tokenizer, PROMPTS)
    torch.testing.assert_close(head.log_probs(bridge, None, PROMPTS), expected, **CLOSE)
