"""This package against numbers that the original programs computed; one test for each case on file.

The folder is $STEER_GOLDEN, else tests/golden. Test ids begin with the file's name, so -k pplm works.
"""

import json
import os
from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import log_prob_gains
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import pad
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from steer_utils import hf, hooks
from steer_utils.additions.addition import (
    ActivationAddition,
    AdditionSum,
    apply_activation_additions,
    padded,
    steering_vectors,
)
from steer_utils.lm_steer.evidence import SHARPNESS, best_spans, losses_at, steer_analysis
from steer_utils.lm_steer.steer import ADAPTORS, LMHeadSteer, LMSteer
from steer_utils.lm_steer.training import update
from steer_utils.lm_steer.transfer import transferred
from steer_utils.lm_steer.words import directions, top, word_scores
from steer_utils.measure.evaluate import distinct_of_group, perplexity_of_groups
from steer_utils.measure.metrics import completion_log_probs, next_token_kl, token_log_probs, word_count
from steer_utils.pplm.bags import Bag
from steer_utils.pplm.classifier import ClassifierHead, masked_mean, mean_hidden
from steer_utils.pplm.steer import PPLM
from steer_utils.pplm.steps import (
    Adam,
    Descent,
    Groups,
    Losses,
    Perturbed,
    StepInputs,
    bag_loss,
    gradient_steps,
    log_of,
    read_last,
    with_newest,
)
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


def case_named(stem: str, name: str) -> Case:
    read = json.loads((FOLDER / f"{stem}.json").read_text())["cases"]
    return next(case for case in read if case["name"] == name)


def arrays_of(stem: str, case: Case) -> dict[str, Tensor]:
    return {label: load_arrays(stem)[place["key"]] for label, place in case.get("arrays", {}).items()}


@cache
def load_model(name: str) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(FOLDER / "models" / name, dtype=torch.float32).eval()


@pytest.mark.parametrize(("stem", "case"), cases())
@torch.no_grad()
def test_golden(stem: str, case: Case):
    assert stem in CHECKS, f"{stem}.json has no check here: write one, or take the file out of the folder"
    CHECKS[stem](case, arrays_of(stem, case))


# --- plain models -----------------------------------------------------------------------------------------


def check_plain_logits(case: Case, arrays: dict[str, Tensor]) -> None:
    model, tokens = load_model(case["model"]), torch.tensor(case["tokens"])
    hidden = hf.forward(model, tokens, torch.ones_like(tokens)).last_hidden_state
    near(hidden, arrays["last_hidden"], 2e-5)
    near(hf.lm_head(model)(hidden), arrays["logits"], 2e-5)


# --- activation additions ---------------------------------------------------------------------------------


def check_actadd(case: Case, arrays: dict[str, Tensor]) -> None:
    kind = next(kind for kind in ACTADD if case["name"].startswith(kind))
    ACTADD[kind](case, arrays)


def check_residuals(case: Case, arrays: dict[str, Tensor]) -> None:
    model, tokens = load_model(case["model"]), torch.tensor([case["tokens"]])
    names = [f"blocks.{layer}.hook_resid_pre" for layer in range(len(arrays["resid_pre"]))]
    found = hooks.activations(model, tokens, torch.ones_like(tokens), names)
    for name, expected in zip(names, arrays["resid_pre"], strict=True):
        near(found[name][0], expected, 2e-5)
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
    """Mid and back stay where the prompt had them; without a cache, the original moved them along."""
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
    if case["name"] == "gen_back_l1_c5_nocache":
        cached = case_named("actadd", "gen_back_l1_c5")
        case, arrays = case | {"tokens": cached["tokens"]}, arrays_of("actadd", cached)
    assert out.sequences[0].tolist() == case["tokens"]
    near(torch.cat(out.logits), arrays["step_logits"], 2e-4)


def check_losses(case: Case, arrays: dict[str, Tensor]) -> None:
    """The original's loss: the mean over prompt and completion, read again, with the steer on and off.

    There the additions found their places in the whole row, as they do in one pass here.
    """
    model, row = load_model(case["model"]), [case["tokens"]]
    with apply_activation_additions(model, additions(case)):
        (steered,) = token_log_probs(model, None, row)
    (plain,) = token_log_probs(model, None, row)
    near(-steered.mean(), torch.tensor(case["steered_loss"]), 1e-4 * case["steered_loss"])
    near(-plain.mean(), torch.tensor(case["unsteered_loss_same_tokens"]), 1e-4 * case["steered_loss"])


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


def check_measures(case: Case, arrays: dict[str, Tensor]) -> None:
    model, tokens = load_model(case["model"]), torch.tensor([case["tokens"]])
    with apply_activation_additions(model, additions(case)):
        steered = model(tokens).logits[0]
        (log_probs,) = token_log_probs(model, None, [case["tokens"]])
    plain = model(tokens).logits[0]
    near(steered.softmax(-1), arrays["probs_steered"], 2e-5)
    near(log_probs, torch.tensor(case["logprob_actual_next_steered"]), 2e-4)
    near(next_token_kl(steered, plain), torch.tensor(case["kl_steered_unsteered"]), 1e-5)
    aligned = [case["aligned_tokens"].get(str(i), []) for i in range(len(case["tokens"]))]
    for name, measure in (("effectiveness", effectiveness), ("disruption", disruption)):
        found = [measure(p, q, set_).item() for p, q, set_ in zip(steered, plain, aligned, strict=True)]
        near(torch.tensor(found), torch.tensor(case[f"{name}_all"]), 1e-5)
    for skip, name in ((0, "all"), (case["mask_len"], "masked")):
        (gains,) = log_prob_gains(
            model, None, [case["tokens"]], AdditionSum(tuple(additions(case))), skip=skip
        )
        near((-gains.mean()).exp(), torch.tensor(case[f"perplexity_ratio_{name}"]), 1e-4)


def effectiveness(steered: Tensor, unsteered: Tensor, tokens: list[int]) -> Tensor:
    """By how many nats steering raises the log probability of a set of tokens; logits [..., V] -> [...].

    0 for an empty set. Source: Turner et al. 2023, the analysis of OpenWebText.
    """
    log_p, log_q = (x.log_softmax(dim=-1)[..., list(tokens)].logsumexp(dim=-1) for x in (steered, unsteered))
    return log_p - log_q if tokens else torch.zeros_like(log_p)


def disruption(steered: Tensor, unsteered: Tensor, tokens: list[int]) -> Tensor:
    """KL within a set of tokens plus KL outside it, weighted by steered probability; [..., V] -> [...].

    What remains of the KL is due to the set's total probability. Source: as for `effectiveness`.
    """
    inside = torch.zeros(steered.shape[-1], dtype=torch.bool, device=steered.device)
    inside[list(tokens)] = True
    parts = [(steered[..., part], unsteered[..., part]) for part in (inside, ~inside) if part.any()]
    total = steered.logsumexp(dim=-1)
    return sum((p.logsumexp(dim=-1) - total).exp() * next_token_kl(p, q) for p, q in parts)


def check_corpus(case: Case, arrays: dict[str, Tensor]) -> None:
    """ "pad" makes room for the additions in every text, and skips their length as the masked method does."""
    model, length = load_model(case["model"]), max(map(len, case["phrases"]))
    texts, skip = case["texts"], 0 if case["method"] == "normal" else length
    for group in case["grouped"]:
        phrases = zip(case["weights"], case["phrases"], strict=True)
        added = [ActivationAddition(w * group["coeff"], group["layer"], tokens=t) for w, t in phrases]
        added = padded(added, None, custom_pad_id=case["pad_id"])
        chosen = [text for text, label in zip(texts, case["labels"], strict=True) if label == group["label"]]
        if case["method"] == "pad":
            chosen = [make_room(text, added, case["pad_id"]) for text in chosen]
        gains = torch.cat(log_prob_gains(model, None, chosen, AdditionSum(added), skip=skip))
        assert len(gains) == group["count"]
        near((-gains.mean()).exp(), torch.tensor(group["perplexity_ratio"]), 1e-4)


def check_corpus_statistics(case: Case, arrays: dict[str, Tensor]) -> None:
    sentences = [sentence for text in case["sentences"] for sentence in text]
    with apply_activation_additions(load_model(case["model"]), additions(case)):
        found = token_log_probs(load_model(case["model"]), None, sentences, batch_size=2)
    kept = torch.cat([one[case["mask_len"] :] for one in found])
    expected = torch.tensor(case["logprobs_sorted_by_length"])
    near(kept.sort().values, expected.sort().values, 2e-4)
    near((-kept.mean()).exp(), torch.tensor(case["perplexity"]), 1e-3 * case["perplexity"])


def check_padded_additions(case: Case, arrays: dict[str, Tensor]) -> None:
    rows = []
    for phrases in case["phrases"]:
        for layer in case["layers"]:
            one = [ActivationAddition(p["weight"], layer, tokens=p["tokens"]) for p in phrases]
            rows += [[coeff * a for a in padded(one, None, custom_pad_id=1)] for coeff in case["coeffs"]]
    assert rows == [additions(row) for row in case["rows"]]


def make_room(ids: list[int], added: list[ActivationAddition], pad_id: int) -> list[int]:
    """The ids with pads after BOS, so that the additions meet these and none of the other tokens."""
    return [ids[0], *[pad_id] * (max(len(one.tokens) for one in added) - 1), *ids[1:]]


def check_room(case: Case, arrays: dict[str, Tensor]) -> None:
    assert make_room(case["tokens"], additions(case), 1) == case["padded"]


def check_pad_remove(case: Case, arrays: dict[str, Tensor]) -> None:
    model, added = load_model(case["model"]), additions(case)
    with apply_activation_additions(model, added):
        logits = model(torch.tensor([make_room(case["tokens"], added, 1)])).logits[0]
    near(logits, arrays["logits_padded"], 2e-4)
    near(torch.cat([logits[:1], logits[max(len(a.tokens) for a in added) :]]), arrays["logits_removed"], 2e-4)


def check_forward_with_additions(case: Case, arrays: dict[str, Tensor]) -> None:
    """The original function could not be called at all; here one runs the padded text, as below."""
    derived = case_named("actadd", "derived_pad_remove")
    check_pad_remove(derived, arrays_of("actadd", derived))


def check_word_count(case: Case, arrays: dict[str, Tensor]) -> None:
    sensitive = case["case_sensitive"]
    assert word_count(case["texts"], case["words"], case_sensitive=sensitive).tolist() == case["counts"]


# --- PPLM -------------------------------------------------------------------------------------------------


def check_perturb(case: Case, arrays: dict[str, Tensor]) -> None:
    """One token's steps on the past. A batch is its rows alone; the original coupled them."""
    if case.get("expected_error"):  # a decay without a window; the original divided by zero
        with pytest.raises(ValueError, match="window_length"):
            pplm(case)
        return
    if len(case["context"]) > 1:
        check_rows_alone(case)
        return
    corrected = CORRECTED.get(case["name"])
    if corrected is not None:
        corrected(case, arrays)
        return
    found, inputs = perturbed(case)
    check_steps(case, arrays, found)
    model = load_model("T1")
    near(read_last(model, inputs, hf.forked(inputs.past))[1], arrays["unpert_logits"], 2e-5)
    near(read_last(model, inputs, with_newest(inputs.past, found.moved))[1], arrays["pert_logits"], 1e-4)


def check_steps(case: Case, arrays: dict[str, Tensor], found: Perturbed) -> None:
    delta = torch.stack([torch.stack(pair) for pair in found.deltas])
    near(delta, arrays["delta"], 2e-6 + 1e-4 * case["delta_absmax"])
    total = [sum(losses.values()).item() for losses in found.losses]
    torch.testing.assert_close(total, case["loss"], rtol=2e-5, atol=2e-6)
    for name, part in {"bag": "bow_loss", "class": "discrim_loss", "kl": "kl_loss"}.items():
        if part in case["parts"]:
            values = torch.stack([losses[name][0] for losses in found.losses])
            near(values, torch.tensor(case["parts"][part]), 1e-4)
    near(torch.stack(found.rule.trace)[..., 0], torch.tensor(case["grad_norm_trace"]), 2e-5)
    near(found.rule.norms[:, 0], torch.tensor(case["grad_norms_out"]), 2e-5)


def check_rows_alone(case: Case) -> None:
    together = perturbed(case)[0]
    for row, context in enumerate(case["context"]):
        alone = perturbed(case | {"context": [context]})[0]
        for pair, of_batch in zip(alone.deltas, together.deltas, strict=True):
            for tensor, rows in zip(pair, of_batch, strict=True):
                near(rows[row : row + 1], tensor, 1e-6)


def check_fresh_soft_tokens(case: Case, arrays: dict[str, Tensor]) -> None:
    """Each soft token comes from the newest prediction, as in the later copy; this one fed one twice."""
    found, *_ = perturbed(case)
    later = next(
        other
        for other in json.loads((FOLDER / "pplm_perturb.json").read_text())["cases"]
        if other["code"] == "hf"
        and all(case[key] == other[key] for key in ("context", "head", "class_label", "bags", "hparams"))
    )
    check_steps(later, arrays_of("pplm_perturb", later), found)


def check_no_horizon(case: Case, arrays: dict[str, Tensor]) -> None:
    """Without a horizon the newest state carries the gradient; in the original there was none, only noise."""
    found, *_ = perturbed(case)
    near(found.losses[0]["class"], torch.tensor(case["parts"]["discrim_loss"][:1]), 1e-5)
    assert found.losses[-1]["class"] < found.losses[0]["class"]


def perturbed(case: Case) -> tuple[Perturbed, StepInputs]:
    """Our steps for a case, and what is known before the token that follows its context."""
    model, inputs = load_model("T1"), inputs_after(load_model("T1"), torch.tensor(case["context"]))
    norms = case.get("grad_norms_in")
    norms = None if norms is None else torch.tensor(norms)[:, None]
    return pplm(case).take_steps(model, inputs, norms), inputs


def inputs_after(model: PreTrainedModel, ids: Tensor) -> StepInputs:
    mask, cache = torch.ones_like(ids), hf.new_cache(model)
    first = hf.forward(model, ids[:, :-1], mask[:, :-1], past_key_values=cache, use_cache=True)
    start = StepInputs(ids, mask, past=hf.forked(cache), past_and_last=cache)
    newest, logits = read_last(model, start, cache)
    hidden = torch.cat([first.last_hidden_state, newest[:, None]], dim=1)
    return start._replace(hidden=hidden, logits=logits)


def pplm(case: Case) -> PPLM:
    """A case's settings as ours; its window is at the oldest positions, and it had no top-p."""
    hparams = {k: v for k, v in case["hparams"].items() if k != "perturb"}
    bags = [Bag("golden", entries=tuple((i,) for i in ids)) for ids in case["bags"] or ()]
    if case["head"] is not None:
        hparams |= {"head": head_named(case["head"]), "target_class_id": case["class_label"]}
    return PPLM(bags, window="oldest", **hparams)


def head_named(name: str, times: float = 1.0) -> ClassifierHead:
    """A head on file; `times` makes it answer to so many times what it is given."""
    arrays = load_arrays("pplm_perturb")
    weight, bias = arrays[f"shared/{name}/weight"], arrays[f"shared/{name}/bias"]
    head = ClassifierHead(weight.shape[1], weight.shape[0])
    head.load_state_dict({"weight": times * weight, "bias": bias})
    return head


def check_generate(case: Case, arrays: dict[str, Tensor]) -> None:
    """Greedy text, and the fused distribution and raw logits at each step."""
    model, ids = load_model("T1"), torch.tensor([case["context"]])
    length, known = case["length"], case["tokens"]
    steer = pplm(case) if case["bags"] or case["head"] else pplm(case | {"bags": [[1]]})
    if not case["hparams"]["perturb"]:
        steer = replace(steer, num_iterations=0)
    with steer.on(model):
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=length,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
            output_logits=True,
            return_dict_in_generate=True,
        )
    probs = torch.cat(out.logits).softmax(-1)
    if case["name"] == "gen_discrim_root_h2":  # soft tokens are fresh ones here; see below, the later copy's
        assert out.sequences[0].tolist() == case_named("pplm_generate", "gen_discrim_hf_h2")["tokens"]
        return
    assert out.sequences[0].tolist() == known
    near(probs, arrays["fused_probs"], 5e-5)


def check_julia(case: Case, arrays: dict[str, Tensor]) -> None:
    """PPLM.jl's objective for one token, by our losses and our Adam.

    There KL(old ‖ new) is a mean over columns, and in the past mode old is what the text without its last
    token predicts; a head sees the sum of hidden states, or the newest alone. Our own settings correct these.
    """
    model, ids, hparams = load_model("T1"), torch.tensor([case["context"]]), case["hparams"]
    inputs, t = inputs_after(model, ids), hparams["temperature"]
    old = (hf.logits(model, inputs.hidden) / t).log_softmax(-1)  # [1, T, V]
    near(old[0, -1].exp(), arrays["orig_probs"], 2e-5)
    start, log_probs_of = JULIA[case["mode"], case["kind"]](model, inputs, t)
    kept = old[:, -2:-1] if case["mode"] == "past" else old[:, -start[0][0].shape[1] :]

    def losses(step: int) -> Losses:
        states, log_probs = log_probs_of(start)  # [1, T, D], [1, T, V]
        near_zero = (log_probs.exp() + 1.19e-7).log()
        kl = (kept.exp() * (kept - near_zero)).sum(-1).mean(-1)
        found = {"kl": hparams["kl_scale"] * kl}
        if case["bag"]:
            return found | {"bag": bag_loss(log_probs[:, -1], torch.tensor(case["bag"]))}
        head = head_named(case["head"], states.shape[1])
        wanted = torch.tensor([case["class_label"]]).expand(len(states))
        loss = torch.nn.functional.cross_entropy(head(states.mean(1)), wanted, reduction="none")
        return found | {"class": loss}

    trace = gradient_steps(start, losses, Descent(Adam(hparams["stepsize"]), hparams["num_iterations"]))
    found = [sum(one.values()).item() for one in trace]
    torch.testing.assert_close(found, case["loss"], rtol=1e-4, atol=1e-5)
    new = log_probs_of(start)[1][:, -1].exp().clamp(min=0)
    near(new[0], arrays["new_probs"], 2e-5)
    gm = hparams["gm_scale"]
    near((old[0, -1].exp() ** (1 - gm) * new[0] ** gm), arrays["fused"], 2e-5)
    if case["mode"] == "past":
        delta = torch.stack([torch.stack(pair) for pair in start])
        close_but_for_noise(delta, arrays["delta_past"], hparams["stepsize"])
    elif case["mode"] == "hidden":
        close_but_for_noise(log_probs_of(start)[0][0], arrays["pert_hidden"], hparams["stepsize"])
    else:
        near(new[0], arrays["pert_probs"].clamp(min=0), 2e-5)


def close_but_for_noise(found: Tensor, expected: Tensor, stepsize: float) -> None:
    """Adam makes whole steps of gradients that are nothing but rounding: few may differ, by few steps."""
    off = (found - expected).abs()
    assert (off > 1e-4 * stepsize + 1e-6).float().mean() < 0.02
    assert off.max() <= 2 * stepsize


Objective = tuple[Groups, Callable[[Groups], tuple[Tensor | None, Tensor]]]


def julia_probs(model: PreTrainedModel, inputs: StepInputs, t: float) -> Objective:
    probs = (hf.logits(model, inputs.hidden[:, -1:]) / t).softmax(-1)
    return [(torch.zeros_like(probs),)], lambda moved: (None, log_of(probs + moved[0][0]))


def julia_hidden(model: PreTrainedModel, inputs: StepInputs, t: float, moving: int = 0) -> Objective:
    """moving: how many of the newest states move, 0 for all."""

    def log_probs_of(moved: Groups) -> tuple[Tensor, Tensor]:
        (delta,) = moved[0]
        states = inputs.hidden + pad(delta, (0, 0, inputs.hidden.shape[1] - delta.shape[1], 0))
        return states, (hf.logits(model, states[:, -moving:]) / t).log_softmax(-1)

    return [(torch.zeros_like(inputs.hidden[:, -moving:]),)], log_probs_of


def julia_past(model: PreTrainedModel, inputs: StepInputs, t: float) -> Objective:
    def log_probs_of(deltas: Groups) -> tuple[Tensor, Tensor]:
        pairs = zip(hf.cached(inputs.past), deltas, strict=True)
        moved = [tuple(t + delta for t, delta in zip(*pair, strict=True)) for pair in pairs]
        state, logits = read_last(model, inputs, with_newest(inputs.past, moved))
        return state[:, None], (logits / t).log_softmax(-1)[:, None]

    return [tuple(map(torch.zeros_like, pair)) for pair in hf.cached(inputs.past)], log_probs_of


JULIA = {
    ("probs", "bow"): julia_probs,
    ("hidden", "bow"): partial(julia_hidden, moving=1),  # Adam would blow up the rounding of the others
    ("hidden", "discrim"): julia_hidden,
    ("past", "bow"): julia_past,
    ("past", "discrim"): julia_past,
}


# --- classifier heads -------------------------------------------------------------------------------------


def check_discrim_train(case: Case, arrays: dict[str, Tensor]) -> None:
    """Every token counts in a feature; the original left out those with id 0, whose mask it stored."""
    rows, hidden, mask = (
        case["sequences"],
        arrays["last_hidden"],
        arrays["mask"].reshape(len(arrays["mask"]), -1),
    )
    near(masked_mean(hidden, mask), arrays["features"], 1e-5)
    expected = torch.stack([states[: len(row)].mean(0) for states, row in zip(hidden, rows, strict=True)])
    near(mean_hidden(load_model("T1"), None, rows), expected, 1e-5)
    assert torch.allclose(expected, arrays["features"], atol=1e-5) == all(0 not in row for row in rows)
    check_training(case, arrays)


def check_training(case: Case, arrays: dict[str, Tensor]) -> None:
    """Loss before and head after each step of the original's training, on its own features."""
    settings, features, labels = case["hparams"], arrays["features"], torch.tensor(case["labels"])
    head = ClassifierHead(features.shape[1], case["class_size"])
    head.load_state_dict({"weight": arrays["weight_init"], "bias": arrays["bias_init"]})
    near(head(features).log_softmax(-1), arrays["log_probs_initial"], 1e-5)
    adam, losses, shares = torch.optim.Adam(head.parameters(), settings["lr"]), [], []
    batches = [*torch.arange(len(labels)).split(settings["batch_size"])]
    assert len(case["train_loss"]) == len(batches) * settings["epochs"]
    for i, rows in enumerate(batches * settings["epochs"]):
        with torch.enable_grad():
            loss = torch.nn.functional.cross_entropy(head.requires_grad_()(features[rows]), labels[rows])
            adam.zero_grad()
            loss.backward()
        adam.step()
        assert loss.item() == pytest.approx(case["train_loss"][i], rel=1e-4)
        near(head.weight, arrays["weights_after"][i], 2e-4)
        near(head.bias, arrays["bias_after"][i], 2e-4)
        if (i + 1) % len(batches) == 0:
            losses.append(torch.nn.functional.cross_entropy(head(features), labels).item())
            shares.append((head(features).argmax(-1) == labels).float().mean().item())
    assert losses == pytest.approx(case["eval_loss_per_epoch"], rel=1e-4)
    assert shares == pytest.approx(case["eval_accuracy_per_epoch"])


# --- LM-Steer ---------------------------------------------------------------------------------------------


def check_head(case: Case, arrays: dict[str, Tensor]) -> None:
    (check_greedy_head if "prompt_tokens" in case else check_head_logits)(case, arrays)


def steer_of(case: Case, arrays: dict[str, Tensor]) -> LMHeadSteer:
    kind = ADAPTORS[case["adaptor_class"]]
    tensors = {name: arrays[name] for name in kind.parameters}
    steer = kind(**tensors, epsilon=case["epsilon"], steer_values=case["steer_values"])
    assert steer.num_steers == case["num_steers"]
    return steer


def check_head_logits(case: Case, arrays: dict[str, Tensor]) -> None:
    """The loss is over the tokens of the texts; the original counts padding as well."""
    model, tokens = load_model(case["model"]), torch.tensor(case["tokens"])
    mask, steer = torch.tensor(case["attention_mask"]), steer_of(case, arrays)
    near(hf.forward(model, tokens, mask).last_hidden_state[mask.bool()], arrays["hidden"][mask.bool()], 2e-5)
    texts = [row[keep].tolist() for row, keep in zip(tokens, mask.bool(), strict=True)]
    with steer.on(model):
        found = model(tokens, attention_mask=mask).logits
        log_probs = token_log_probs(model, None, texts)
    near(found, arrays["logits"], 1e-4)
    losses = torch.nn.functional.cross_entropy(found[:, :-1].mT, tokens[:, 1:], reduction="none")
    near(losses.mean(), torch.tensor(case["loss"]), 0)
    near(-torch.cat(log_probs), losses[mask[:, 1:].bool()], 1e-4)
    loss = -torch.cat(log_probs).mean().item()
    assert (loss == pytest.approx(case["loss"], rel=1e-5)) == bool(mask.all())


def check_greedy_head(case: Case, arrays: dict[str, Tensor]) -> None:
    model, tokens = load_model(case["model"]), torch.tensor([case["prompt_tokens"]])
    steer, new = steer_of(case, arrays), case["new_tokens"]
    kwargs = {"attention_mask": torch.ones_like(tokens), "do_sample": False, "pad_token_id": 0}
    kwargs |= {"min_new_tokens": new, "max_new_tokens": new}
    kwargs |= {"output_logits": True, "return_dict_in_generate": True}
    with steer.on(model):
        steered = model.generate(tokens, **kwargs)
    for out in (steered, steer.fold(model).generate(tokens, **kwargs)):
        assert out.sequences[0].tolist() == case["tokens"]
        near(torch.cat(out.logits), arrays["step_logits"], 1e-4)


# --- LM-Steer: what it says of texts and words, and how it is judged --------------------------------------


def check_lmsteer_analysis(case: Case, arrays: dict[str, Tensor]) -> None:
    kind = next(kind for kind in LMSTEER_ANALYSIS if case["name"].startswith(kind))
    LMSTEER_ANALYSIS[kind](case, arrays)


def lm_steer(case: Case, arrays: dict[str, Tensor]) -> LMSteer:
    return LMSteer(arrays["projector1"], arrays["projector2"], epsilon=case.get("epsilon", 1.0))


def check_spans(case: Case, arrays: dict[str, Tensor]) -> None:
    """A single number can be a span, where the original gave none."""
    found = best_spans(case["sequence"], case["max_segments"], case["max_length"])
    assert [list(span) for span in found] == ([[0, 1]] if len(case["sequence"]) == 1 else case["spans"])
    assert sum(sum(case["sequence"][a:b]) for a, b in found) == pytest.approx(case["score"])


def check_evidence(case: Case, arrays: dict[str, Tensor]) -> None:
    """Values however close give evidence and spans as others do; the original then computed nothing."""
    model, ids, steer = load_model(case["model"]), case["prompt_tokens"], lm_steer(case, arrays)
    at_a, at_b = losses_at(steer, model, ids, case["values"])
    found = at_b - at_a
    spans = best_spans(found, case["max_segments"], case["max_length"])
    if case["evidence"] is None:
        folded = (steer.fold(model, values) for values in case["values"])
        (of_a,), (of_b,) = (token_log_probs(one, None, [ids]) for one in folded)
        near(torch.tensor(found), of_a - of_b, 2e-5)
    else:
        near(torch.tensor(found), torch.tensor(case["evidence"]), 2e-4)
        assert [[start + 1, end + 1] for start, end in spans] == case["segments"]


def check_steer_analysis(case: Case, arrays: dict[str, Tensor]) -> None:
    """Words as on file: the original cut them elsewhere, took 0 for the first token and left out the last."""
    steer, model = lm_steer(case, arrays), load_model(case["model"])
    dim, bins = case["steer_dim"], {name: case[name] for name in ("min_value", "max_value", "bins")}
    settings = [[value * (s == dim) for s in range(steer.num_steers)] for value in [*case["bin_values"], 0.0]]
    losses = losses_at(steer, model, case["text_tokens"], settings)
    near(torch.tensor(losses), arrays["token_losses"], 2e-4)
    tokenizer = AutoTokenizer.from_pretrained(FOLDER / "models" / case["model"])
    found = steer_analysis(steer, model, tokenizer, case["text_tokens"], dim=dim, **bins)
    assert found.values.tolist() == pytest.approx(case["bin_values"])
    assert found.losses.tolist() == pytest.approx(case["losses"], rel=1e-4)
    assert found.unsteered_loss == pytest.approx(case["loss_unsteered"], rel=1e-4)
    assert found.distribution.tolist() == pytest.approx(case["distribution"], abs=1e-3)
    assert found.best_value == case["best_value"]
    gains = np.append(0, losses[-1] - losses[found.losses.argmin()])
    words = [SHARPNESS * gains[word["start"] : word["end"]].mean() for word in case["words"]]
    assert words == pytest.approx([word["evidence"] for word in case["words"]], abs=2e-3)


def check_transfer(case: Case, arrays: dict[str, Tensor]) -> None:
    source, target = (hf.lm_head(load_model(case[which])).weight for which in ("source", "target"))
    steer = lm_steer(case, arrays)
    exact = transferred(steer, source, target)
    for name, tensor in exact.tensors().items():
        near(tensor, arrays[f"{name}_closed"], 1e-4)
    near(exact.projector1 @ exact.projector2.mT, arrays["M_closed"], 1e-4)
    squares = source.square().mean() * exact.card["transfer"]["residual"] ** 2
    assert squares.item() == pytest.approx(case["mse_closed"], rel=1e-4)
    slow = transferred(steer, source, target, method="learned", n_steps=case["adam"]["steps"])
    for name, tensor in slow.tensors().items():  # another random start than the original's
        near(tensor, arrays[f"{name}_adam"], 5 * case["max_abs_diff_B"])


def check_directions(case: Case, arrays: dict[str, Tensor]) -> None:
    """A direction's sign is arbitrary, so the two lists of each may be exchanged."""
    found = directions(lm_steer(case, arrays), case["steer"])
    assert found.values.tolist() == pytest.approx(case["singular_values"], rel=1e-4)
    signs = (found.v * arrays["directions"].T).sum(dim=0).sign()
    near((found.v * signs).T, arrays["directions"], 2e-5)
    scores = word_scores(load_model(case["model"]), found.v)
    near((scores * signs).T, arrays["scores"], 2e-5)
    everything = {i: str(i) for i in range(len(scores))}
    for which, side in (("rank_high", 1), ("rank_low", -1)):
        lists = [top(side * column, everything, case["top"]) for column in (scores * signs).T]
        assert lists == case[which]


def check_distinct(case: Case, arrays: dict[str, Tensor]) -> None:
    found = [[distinct_of_group(texts, n) for texts in case["groups"]] for n in (1, 2, 3)]
    assert [sum(row) / len(row) for row in found] == pytest.approx(case["dist"])


def check_perplexity(case: Case, arrays: dict[str, Tensor]) -> None:
    """Token ids as they are, without a BOS of ours in front."""
    model, losses, tokens = load_model(case["model"]), [], []
    for one in case["prompts"]:
        given = [one["prompt_tokens"]] * len(one["continuations"])
        found = completion_log_probs(model, None, given, one["continuations"], batch_size=2)
        losses.append([-log_probs.sum().item() for log_probs in found])
        tokens.append([len(log_probs) for log_probs in found])
    each = case["per_continuation"]
    assert [*chain(*losses)] == pytest.approx([one["nll"] for one in each], rel=1e-4)
    assert [*chain(*tokens)] == [one["tokens"] for one in each]
    summary = perplexity_of_groups(losses, tokens)
    assert summary["perplexity"].mean == pytest.approx(case["mean_ppl"], rel=1e-4)
    assert summary["total perplexity"].mean == pytest.approx(case["total_ppl"], rel=1e-4)
    assert summary["left out"] == 0


def check_lm_steer_training(case: Case, arrays: dict[str, Tensor]) -> None:
    """Losses, sums of squares and tensors along the original's steps, from its batches and first tensors."""
    if "gamma" in case:
        check_running_mean(case["values"], case["gamma"], case["means"])
        return
    model, settings = load_model(case["model"]), case["hparams"]
    kind = ADAPTORS[settings["adaptor_class"]]
    tensors = {name: arrays[f"{name}_init"].clone().requires_grad_() for name in kind.parameters}
    steer, adam = (
        kind(**tensors, epsilon=settings["epsilon"]),
        torch.optim.Adam(tensors.values(), settings["lr"]),
    )
    losses, terms, last = [], [], len(case["losses"])
    assert last == len(case["batches"]) == settings["n_steps"]
    for step, batch in enumerate(case["batches"], 1):
        terms.append(sum(tensor.square().sum().item() for tensor in tensors.values()))
        learned = batch_of_tokens(model, batch, pad_in_loss=settings["pad_in_loss"])
        losses.append(update(model, steer, adam, learned, settings["regularization"]))
        labels = {1: ["step1"], 5: ["step5"]}.get(step, []) + ["final"] * (step == last)
        for name, label in ((name, label) for name in tensors for label in labels):
            expected = arrays[f"{name}_{label}"]
            assert (tensors[name] - expected).norm() < 1e-3 * expected.norm(), (name, label)
    assert losses == pytest.approx(case["losses"], rel=1e-4)
    assert terms == pytest.approx(case["regularization_terms"], rel=1e-4)
    check_running_mean(losses, settings["gamma_mean"], [case["loss_ema"]])
    probe = torch.tensor(case["probe"]["tokens"])
    with steer.at(case["probe"]["steer_values"]).on(model):
        near(model(probe).logits, arrays["probe_logits"], 2e-3)


def batch_of_tokens(
    model: PreTrainedModel, batch: Case, *, pad_in_loss: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, next ids and values of a batch; what padding follows counts if it is in the loss."""
    ids, mask, values = (torch.tensor(batch[key]) for key in ("input_ids", "attention_mask", "steer_values"))
    hidden = model.base_model(ids, attention_mask=mask).last_hidden_state[:, :-1]
    counts = torch.ones_like(mask[:, 1:]).bool() if pad_in_loss else mask[:, 1:].bool()
    return hidden[counts], ids[:, 1:][counts], values[:, None].expand(-1, counts.shape[1], -1)[counts]


def check_running_mean(values: list[float], gamma: float, expected: list[float]) -> None:
    """The original's bias-corrected mean, a display alone, is pandas' `ewm`; no function here computes it."""
    means = pd.Series(values).ewm(alpha=1 - gamma, adjust=True).mean().tolist()
    assert means[-len(expected) :] == pytest.approx(expected, rel=1e-4)


def additions(case: Case) -> list[ActivationAddition]:
    where = {
        "addition_location": case.get("location", "front"),
        "res_stream_slice": case.get("res_stream_slice"),
    }
    return [
        ActivationAddition(
            one["coeff"],
            one["layer"] if one["act_name"] is None else one["act_name"],
            tokens=one["tokens"],
            **where,
        )
        for one in case["additions"]
    ]


def both(*checks: Callable[[Case, dict[str, Tensor]], None]) -> Callable[[Case, dict[str, Tensor]], None]:
    def check_all(case: Case, arrays: dict[str, Tensor]) -> None:
        for check in checks:
            check(case, arrays)

    return check_all


def near(actual: Tensor, expected: Tensor, atol: float) -> None:
    torch.testing.assert_close(actual.float(), expected, atol=atol, rtol=1e-5)


ACTADD: dict[str, Callable[[Case, dict[str, Tensor]], None]] = {
    "resid_": check_residuals,
    "xvec_": check_x_vector,
    "inject_error": check_too_short,
    "inject_T1_noop": check_too_short,
    "inject_": check_injection,
    "gen_": both(check_greedy, check_losses),
    "sample_": both(check_sampling, check_losses),
    "word_count": check_word_count,
    "metrics_": check_measures,
    "corpus_": check_corpus,
    "stats_": check_corpus_statistics,
    "make_additions": check_padded_additions,
    "pad_text": check_room,
    "quirk_forward": check_forward_with_additions,
    "derived_pad_remove": check_pad_remove,
}
LMSTEER_ANALYSIS: dict[str, Callable[[Case, dict[str, Tensor]], None]] = {
    "spans_": check_spans,
    "evidence_": check_evidence,
    "analysis_": check_steer_analysis,
    "transfer_": check_transfer,
    "svd_": check_directions,
    "dist_": check_distinct,
    "ppl_": check_perplexity,
}
CORRECTED = {"discrim_root_h2": check_fresh_soft_tokens, "discrim_root_h0": check_no_horizon}
CHECKS = {
    "plain_logits": check_plain_logits,
    "actadd": check_actadd,
    "pplm_perturb": check_perturb,
    "pplm_generate": check_generate,
    "pplm_julia_derived": check_julia,
    "pplm_discrim_train": check_discrim_train,
    "lmsteer_analysis": check_lmsteer_analysis,
    "lmsteer_head": check_head,
    "lmsteer_train": check_lm_steer_training,
}
