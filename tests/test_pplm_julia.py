"""PPLM.jl's names: the manual loops write what `sample_pplm` writes, which is what `su.generate` writes."""

import math

import pytest
import torch
from conftest import random_ids, tiny

import steer_utils as su
from steer_utils import hf
from steer_utils.generation import random_streams
from steer_utils.pplm import julia as PPLM

PROMPT = "Do I look like I give a"


@pytest.fixture
def head_folder(tmp_path) -> str:
    head, _ = PPLM.ClassifierHead(embed_size=32, class_size=3)
    head.save_pretrained(tmp_path / "head")
    return str(tmp_path / "head")


def arguments(folder: str, **settings) -> PPLM.pplm:
    discrim = {"method": "Discrim", "path": folder, "target_class_id": 2, "discrim": "custom"}
    return PPLM.pplm(**({"max_length": 6, "stepsize": 0.3, "top_k": 10} | discrim | settings))


def hidden_loop(model, tokenizer, args) -> str:
    stream = random_streams([PROMPT], 1, 0)[0, 0]
    tokens, gm = su.encode(tokenizer, PROMPT)["input_ids"], args.fusion_gm_scale
    for _ in range(args.max_length):
        outputs = model(tokens, output_hidden_states=True)
        original = PPLM.temp_softmax(outputs.logits[:, -1], t=args.temperature)
        moved = PPLM.perturb_hidden_discrim(outputs.hidden_states[-1], model, tokenizer, args)
        steered = PPLM.temp_softmax(model.lm_head(moved)[:, -1], t=args.temperature)
        token = PPLM.top_k_sample(original ** (1 - gm) * steered**gm, args.top_k, stream)
        tokens = torch.cat([tokens, token[:, None]], dim=1)
    return tokenizer.decode(tokens[0], skip_special_tokens=True)


def past_loop(model, tokenizer, args) -> str:
    stream = random_streams([PROMPT], 1, 0)[0, 0]
    tokens, gm = su.encode(tokenizer, PROMPT)["input_ids"], args.fusion_gm_scale
    for _ in range(args.max_length):
        prev, outputs = tokens[:, -1:], model(tokens[:, :-1], output_hidden_states=True, use_cache=True)
        past, hidden = outputs.past_key_values, outputs.hidden_states[-1]
        plain = model(prev, past_key_values=hf.forked(past)).logits[:, -1]
        new = PPLM.perturb_past_discrim(
            model, prev, past, plain.softmax(-1), args, hidden=hidden, tokenizer=tokenizer
        )
        logits = model(prev, past_key_values=new).logits[:, -1]
        original, steered = (PPLM.temp_softmax(x, t=args.temperature) for x in (plain, logits))
        token = PPLM.top_k_sample(original ** (1 - gm) * steered**gm, args.top_k, stream)
        tokens = torch.cat([tokens, token[:, None]], dim=1)
    return tokenizer.decode(tokens[0], skip_special_tokens=True)


@torch.no_grad()
@pytest.mark.parametrize(
    ("architecture", "loop", "method"),
    [
        ("gpt2", hidden_loop, "Discrim"),
        ("gpt2", past_loop, "BoW"),
        ("llama", hidden_loop, "BoW"),
        ("llama", past_loop, "Discrim"),
    ],
)
def test_a_manual_loop_writes_what_sample_pplm_writes(architecture, loop, method, head_folder, tokenizer):
    perturb = "hidden" if loop is hidden_loop else "past"
    bags, model = (su.Bag("b", entries=((5,), (17,))),), tiny(architecture)
    args = arguments(head_folder, perturb=perturb, method=method, bow_list=bags)
    found = PPLM.sample_pplm(args, tokenizer=tokenizer, model=model, prompt=PROMPT, seed=0)
    assert loop(model, tokenizer, args) == found
    plain = PPLM.sample_pplm(
        arguments(head_folder, stepsize=0.0), tokenizer=tokenizer, model=model, prompt=PROMPT, seed=0
    )
    assert found != plain


def test_bags_move_the_last_state_alone(tokenizer):
    args = PPLM.pplm(bow_list=(su.Bag("b", entries=((5,), (17,))),), stepsize=0.1, num_iterations=1)
    model = tiny("gpt2")
    hidden = hf.forward(model, random_ids(2, 6), torch.ones(2, 6, dtype=torch.long)).last_hidden_state
    change = PPLM.perturb_hidden_discrim(hidden, model, tokenizer, args) - hidden
    assert (change[:, :-1] == 0).all()
    assert change[:, -1].abs().amax() == pytest.approx(0.1, rel=1e-3)  # Adam's first step


def test_a_probability_of_zero_gives_finite_steps(tokenizer):
    args = PPLM.pplm(bow_list=(su.Bag("b", entries=((5,), (17,))),), stepsize=0.01, fusion_kl_scale=1.0)
    model, ids = tiny("gpt2"), random_ids(1, 6)
    with torch.no_grad():
        past = model(ids[:, :-1], use_cache=True).past_key_values
    plain = model(ids[:, -1:], past_key_values=hf.forked(past)).logits[:, -1].softmax(-1)
    zero = plain.index_fill(1, torch.tensor([40]), 0.0)
    found = PPLM.perturb_past_discrim(model, ids[:, -1:], past, zero, args, tokenizer=tokenizer)
    assert not torch.equal(hf.cached(found)[0][0], hf.cached(past)[0][0])
    assert all(t.isfinite().all() for pair in hf.cached(found) for t in pair)


def test_a_head_is_read_from_its_file_once(head_folder, monkeypatch):
    args = arguments(head_folder)
    head = args.steer.head
    monkeypatch.setattr(PPLM.classifier.ClassifierHead, "from_pretrained", None)
    assert args.steer.head is head


@pytest.mark.parametrize("target", [0, 4, -1])
def test_classes_are_counted_from_one(head_folder, target):
    assert arguments(head_folder).steer.target_class_id == 1
    with pytest.raises(ValueError, match=rf"target_class_id must be one of 1 0, 2 1, 3 2, not {target}"):
        _ = arguments(head_folder, target_class_id=target).steer


def test_other_methods_and_cuts_are_value_errors(head_folder, tokenizer):
    with pytest.raises(ValueError, match="method must be 'BoW' or 'Discrim', not 'Both'"):
        _ = PPLM.pplm(method="Both").steer
    with pytest.raises(ValueError, match="'top_k' or 'nucleus', not 'x'"):
        PPLM.sample_pplm(arguments(head_folder), tokenizer=tokenizer, model=tiny("gpt2"), sample_method="x")


def test_a_head_comes_by_name_from_a_path_or_at_random(head_folder):
    named, about = PPLM.ClassifierHead(load_from_pretrained=True, discrim="toxicity")
    assert named.classes == ("non_toxic", "toxic")
    assert about["model"].startswith("smollm2-135m")
    read, _ = PPLM.ClassifierHead(load_from_pretrained=True, path=head_folder)
    fresh, _ = PPLM.ClassifierHead(embed_size=32, class_size=3)
    assert torch.equal(read.weight, fresh.weight)


def test_samples_are_among_the_k_best():
    weights = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).repeat(200, 1)
    assert set(PPLM.top_k_sample(weights, 2).tolist()) == {0, 1}


def test_the_defaults_are_those_of_the_julia_package():
    known = {"stepsize": 0.01, "num_iterations": 2, "fusion_gm_scale": 0.9, "fusion_kl_scale": 0.01}
    known |= {"max_length": 100, "temperature": 1.1, "top_k": 50, "top_p": 0.8}
    given = PPLM.pplm(method="BoW", bow_list=["space"])
    assert {name: getattr(given, name) for name in known} == known


@pytest.mark.parametrize("weights", [[0.0, 0.0], [math.nan, 1.0], [math.inf, 1.0], [-1.0, 2.0]])
def test_weights_that_are_no_distribution_are_refused_and_so_are_settings_out_of_range(weights):
    with pytest.raises(ValueError, match="probs must be weights"):
        PPLM.top_k_sample(torch.tensor([weights]))
    for k in (0, -1):
        with pytest.raises(ValueError, match=f"k must be at least 1, not {k}"):
            PPLM.top_k_sample(torch.ones(1, 2), k)
    for t in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match=f"t must be above 0 and finite, not {t}"):
            PPLM.temp_softmax(torch.ones(1, 2), t)
