"""PPLM as a value: its settings, its ways into a model, what it refuses, and the scores for ranking."""

import contextlib
import math
from dataclasses import FrozenInstanceError

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import CONFIGS, MAIN, WINDOW, hook_count, logits, new_model, padded, random_ids, tiny
from torch import Tensor
from transformers import (
    MaxLengthCriteria,
    PreTrainedModel,
    StoppingCriteriaList,
    SuppressTokensLogitsProcessor,
)
from transformers.generation.streamers import BaseStreamer

import steer_utils as su
from steer_utils import PPLM, Bag, hooks
from steer_utils.models import token_ids
from steer_utils.pplm.classifier import ClassifierHead

LENGTH = WINDOW + 5
IDS = (5, 17, 40)
BAG = Bag("test", entries=tuple((i,) for i in IDS))
HEAD = {"head": ClassifierHead(32, 3, seed=1), "target_class_id": 1}
KINDS = {
    "past": {"bags": BAG},
    "past head": HEAD,
    "past both": {"bags": BAG, **HEAD},
    "hidden": {"bags": BAG, "perturb": "hidden"},
    "hidden head": {**HEAD, "perturb": "hidden"},
    "probs": {"bags": BAG, "perturb": "probs"},
}
each_kind = pytest.mark.parametrize("kind", KINDS)
kinds = pytest.mark.parametrize(  # every kind, those of the past on several architectures
    ("main_model", "kind"),
    [
        *zip(MAIN, ["past", "past head", "past both", "hidden"], strict=True),
        *zip(MAIN, ["hidden head", "probs", "past", "past head"], strict=True),
    ],
    indirect=["main_model"],
)
on_gpt2 = pytest.mark.parametrize("main_model", ["gpt2"], indirect=True)
CLOSE = {"atol": 2e-4, "rtol": 2e-4}
PROMPTS = ["I hate you because", "abc", "Good day"]


def steer(kind: str = "past", **settings) -> PPLM:
    return PPLM(**{"stepsize": 0.05, "gamma": 1.0, "top_k": 0} | KINDS[kind] | settings)


def written(
    model: PreTrainedModel, steer: PPLM | None, ids: Tensor, mask: Tensor | None = None, **kwargs
) -> tuple[Tensor, Tensor]:
    """The new tokens [B, N] and the logits [B, N, V] of them, by `model.generate`, greedily by default."""
    kwargs = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "eos_token_id": None} | kwargs
    kwargs |= {"attention_mask": torch.ones_like(ids) if mask is None else mask}
    kwargs |= {"return_dict_in_generate": True, "output_logits": True}
    if steer is None:
        out = model.generate(ids, **kwargs)
    else:
        with steer.on(model):
            out = model.generate(ids, **kwargs)
    return out.sequences[:, ids.shape[1] :], torch.stack(out.logits, dim=1)


def assert_same(found: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> None:
    assert torch.equal(found[0], expected[0])
    torch.testing.assert_close(found[1], expected[1], **CLOSE)


def differ(found: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> bool:
    return not torch.allclose(found[1], expected[1], atol=1e-2)


def test_settings_cannot_be_changed_and_one_bag_needs_no_list():
    with pytest.raises(FrozenInstanceError):
        steer().stepsize = 1.0
    assert PPLM(BAG).bags == PPLM([BAG]).bags == (BAG,)
    assert PPLM("space").bags[0].words == tuple(su.data.words("space"))
    assert PPLM(["space", BAG]).bags[1] is BAG


def test_uncut_keeps_every_token_and_a_factor_scales_the_steps():
    one = steer(top_k=5, top_p=0.5)
    assert one.uncut() == steer(top_k=0, top_p=1.0)
    assert 2 * one == one * 2 == steer(top_k=5, top_p=0.5, stepsize=0.1)
    with pytest.raises(ValueError, match=r"stepsize .*-0\.05"):
        -1 * one


def test_a_class_may_be_given_by_name():
    head = ClassifierHead(32, 2, classes=["bad", "good"])
    assert PPLM(head=head, target_class_id="good").target_class_id == 1


CALLS = {
    "greedy": {},
    "sampling": {"do_sample": True, "temperature": 1.3, "top_k": 20},
    "sequences": {"do_sample": True, "num_return_sequences": 2},
    "processor": {"logits_processor": [SuppressTokensLogitsProcessor(list(range(0, 97, 2)))]},
    "stopping": {"stopping_criteria": StoppingCriteriaList([MaxLengthCriteria(LENGTH + 3)])},
    "end": {"eos_token_id": list(range(40))},
}


@pytest.mark.parametrize(
    ("main_model", "kind", "call"),
    [(MAIN[i % 4], ["past", "hidden head"][i % 2], call) for i, call in enumerate(CALLS)],
    indirect=["main_model"],
)
def test_generate_with_pplm_as_its_loop_is_generate_inside_pplm(main_model, kind, call):
    ids, mask = padded([LENGTH, 6], "left")
    kwargs = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None} | CALLS[call]
    pplm = steer(kind, persist=False)
    torch.manual_seed(5)
    with pplm.on(main_model):
        inside = main_model.generate(ids, attention_mask=mask, **kwargs)
    torch.manual_seed(5)
    found = main_model.generate(ids, attention_mask=mask, custom_generate=pplm, **kwargs)
    assert torch.equal(found, inside)
    if call == "stopping":
        assert found.shape[1] == LENGTH + 3
    if call == "processor":
        assert (found[:, LENGTH:] % 2 == 1).all()


class Listener(BaseStreamer):
    """Keeps what it is told, and whether it was told the end."""

    def __init__(self) -> None:
        self.heard: list[int] = []
        self.ended = False

    def put(self, value: Tensor) -> None:
        self.heard += value.flatten().tolist()

    def end(self) -> None:
        self.ended = True


@on_gpt2
def test_a_streamer_hears_the_prompt_and_every_token(main_model):
    ids, listener = random_ids(1, LENGTH), Listener()
    kwargs = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 5, "do_sample": False}
    kwargs |= {"pad_token_id": 0, "eos_token_id": None, "streamer": listener}
    with steer().on(main_model):
        row = main_model.generate(ids, **kwargs)[0]
    assert listener.heard == row.tolist()
    assert listener.ended
    assert torch.equal(row[None, LENGTH:], written(main_model, steer(), ids, max_new_tokens=5)[0])


@kinds
def test_the_model_is_restored_after_the_context_and_after_an_exception(main_model, kind):
    ids, hooks, names = random_ids(2, LENGTH), hook_count(main_model), dict(vars(main_model))
    plain, weights = logits(main_model, ids), [weight.clone() for weight in main_model.parameters()]

    def write_and_fail() -> None:
        with steer(kind).on(main_model):
            written(main_model, None, ids)
            raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        write_and_fail()
    written(main_model, steer(kind), ids)
    main_model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=2,
        pad_token_id=0,
        custom_generate=steer(kind),
    )
    assert vars(main_model) == names
    assert hook_count(main_model) == hooks
    assert torch.equal(logits(main_model, ids), plain)
    assert all(map(torch.equal, weights, main_model.parameters()))
    assert all(weight.grad is None for weight in main_model.parameters())


def test_a_forward_of_the_models_own_is_put_back():
    model = new_model(CONFIGS["gpt2"]())
    own = model.forward
    calls = []

    def forward(*args, **kwargs):
        calls.append(1)
        return own(*args, **kwargs)

    model.forward = forward
    with pytest.raises(RuntimeError, match="inside"), steer().on(model):
        raise RuntimeError("inside")
    assert model.forward is forward
    logits(model, random_ids(1, 4))
    assert calls == [1]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"bags": ()}, "nothing to steer by"),
        ({"bags": [[]]}, "is empty"),
        ({"bags": "no such list"}, "no such list"),
        ({"target_class_id": 1}, r"target_class_id=1 is a class of a head: give head="),
        ({"head": HEAD["head"]}, "no class None: give one of 0 '0'"),
        ({**HEAD, "target_class_id": 3}, "no class 3"),
        ({**HEAD, "target_class_id": -1}, "no class -1"),
        ({**HEAD, "target_class_id": "happy"}, "no class 'happy'"),
        ({**HEAD, "perturb": "probs"}, "perturb='probs'.*'hidden' or 'past'"),
        ({"perturb": "logits"}, "perturb must be one of past, hidden, probs, not 'logits'"),
        ({"update": "sgd"}, "update .*'sgd'"),
        ({"window": "middle"}, "window .*'middle'"),
        ({"stepsize": -0.1}, r"stepsize .*-0\.1"),
        ({"stepsize": math.nan}, "stepsize .*nan"),
        ({"stepsize": math.inf}, "stepsize .*inf"),
        ({"gamma": -1.0}, r"gamma .*-1\.0"),
        ({"kl_scale": -0.5}, r"kl_scale .*-0\.5"),
        ({"gm_scale": 1.5}, r"gm_scale .*1\.5"),
        ({"gm_scale": -0.5}, r"gm_scale .*-0\.5"),
        ({"temperature": math.inf}, "temperature must be above 0 and finite, not inf"),
        ({"temperature": 0.0}, r"temperature must be above 0.*not 0\.0"),
        ({"repetition_penalty": 0.0}, r"repetition_penalty must be above 0.*not 0\.0"),
        ({"top_p": 0.0}, r"top_p must be above 0.*not 0\.0"),
        ({"top_p": 1.5}, r"top_p .*1\.5"),
        ({"num_iterations": -1}, "num_iterations must be a whole number from 0, not -1"),
        ({"num_iterations": 1.5}, r"num_iterations .*1\.5"),
        ({"num_iterations": None}, "num_iterations .*None"),
        ({"window_length": -2}, "window_length .*-2"),
        ({"horizon_length": -1}, "horizon_length .*-1"),
        ({"grad_length": -1}, "grad_length .*-1"),
        ({"top_k": -1}, "top_k .*-1"),
        ({"decay": True}, "give window_length"),
    ],
)
def test_a_setting_out_of_range_is_an_error_that_names_it_and_its_value(settings, message):
    with pytest.raises((TypeError, ValueError, FileNotFoundError), match=message):
        PPLM(**{"bags": BAG} | settings)


@on_gpt2
def test_a_head_of_another_width_is_a_value_error_with_both_widths(main_model):
    pplm, names = PPLM(head=ClassifierHead(31, 2), target_class_id=0), dict(vars(main_model))
    with pytest.raises(ValueError, match=r"width 31.*32"), pplm.on(main_model):
        pass
    with pytest.raises(ValueError, match=r"width 31.*32"):
        main_model.generate(random_ids(1, 3), custom_generate=pplm, max_new_tokens=2)
    assert vars(main_model) == names


@on_gpt2
def test_words_without_a_tokenizer_are_a_value_error(main_model):
    with pytest.raises(ValueError, match=r"bag 'space' holds words"), PPLM("space").on(main_model):
        pass


@on_gpt2
def test_words_are_encoded_with_the_tokenizer_at_hand(main_model, tokenizer):
    ids, pplm = random_ids(1, LENGTH), PPLM("space", stepsize=0.1)
    before = written(main_model, pplm.with_tokenizer(tokenizer), ids)
    with pplm.on(main_model, tokenizer):
        assert_same(written(main_model, None, ids), before)


@on_gpt2
def test_a_token_beyond_the_vocabulary_is_an_error_that_names_it(main_model):
    with pytest.raises(ValueError, match="token id 97, but the vocabulary ends at 96"):
        written(main_model, PPLM(Bag("beyond", entries=((1,), (2, 97)))), random_ids(1, 4))


@pytest.mark.parametrize("own_loop", [True, False])
@on_gpt2
def test_beams_are_refused(main_model, own_loop):
    ids = random_ids(1, LENGTH)
    kwargs = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 3, "pad_token_id": 0, "num_beams": 2}
    kwargs["do_sample"] = False
    kwargs |= {"custom_generate": steer()} if own_loop else {}
    inside = contextlib.nullcontext() if own_loop else steer().on(main_model)
    with pytest.raises(ValueError, match="beams"), inside:
        main_model.generate(ids, **kwargs)
    assert "forward" not in vars(main_model)


@on_gpt2
def test_a_second_pplm_is_refused_and_the_first_goes_on(main_model):
    ids = random_ids(1, LENGTH)
    assert not hooks.has_stand_in(main_model)
    with steer().on(main_model):
        assert hooks.has_stand_in(main_model)
        with pytest.raises(ValueError, match="another PPLM is on"), steer("hidden").on(main_model):
            pass
        found = main_model(ids).logits
    torch.testing.assert_close(found, written(main_model, steer(), ids, max_new_tokens=1)[1], **CLOSE)


def bag_score_by_hand(model: PreTrainedModel, tokenizer, prompt: str, completion: str, wanted) -> float:
    """Mean log probability, at each token of the completion, of the ids that are wanted there."""
    ids, start = token_ids(tokenizer, prompt + completion), len(token_ids(tokenizer, prompt))
    log_probs = logits(model, torch.tensor([ids]))[0].log_softmax(-1)
    found = [log_probs[t - 1, wanted(ids[:t])].logsumexp(-1).item() for t in range(start, len(ids))]
    return float(np.mean(found))


@on_gpt2
def test_bags_score_the_probability_their_words_had_at_each_token(main_model, tokenizer):
    bags = [su.Bag("a", entries=((5,), (17,))), su.Bag("b", entries=((40, 41),))]
    table = pd.DataFrame({"prompt": ["go", "stop it"], "completion": [" HIH", " I"]})
    found = su.attribute_scores(su.PPLM(bags), main_model, tokenizer, table)
    for row, score in zip(table.itertuples(), found, strict=True):
        text = (row.prompt, row.completion)
        one = bag_score_by_hand(main_model, tokenizer, *text, lambda ids: [5, 17])
        two = bag_score_by_hand(main_model, tokenizer, *text, lambda ids: [40, 41] if ids[-1] == 40 else [40])
        assert score == pytest.approx(one + two, abs=1e-4)


@on_gpt2
def test_a_head_scores_its_class_and_both_add_up(main_model, tokenizer):
    head, bag = ClassifierHead(32, 3, seed=2), su.Bag("a", entries=((5,), (17,)))
    table = pd.DataFrame({"prompt": ["go", "stop it"], "completion": [" on", " now"]})
    of_head = su.PPLM(head=head, target_class_id=2)
    both = su.PPLM(bag, head=head, target_class_id=2)
    scores = [su.attribute_scores(s, main_model, tokenizer, table) for s in (of_head, su.PPLM(bag), both)]
    for i, text in enumerate(table["prompt"] + table["completion"]):
        states = main_model(torch.tensor([token_ids(tokenizer, text)]), output_hidden_states=True)
        mean = states.hidden_states[-1][0].mean(dim=0)
        assert scores[0][i] == pytest.approx(head(mean).log_softmax(-1)[2].item(), abs=1e-4)
    np.testing.assert_allclose(scores[2], scores[0] + scores[1], atol=1e-4)


def test_an_empty_completion_has_the_lowest_score_of_bags(tokenizer):
    table = pd.DataFrame({"prompt": ["go"], "completion": [""]})
    bag = su.PPLM(su.Bag("a", entries=((5,),)))
    assert su.attribute_scores(bag, tiny("gpt2"), tokenizer, table)[0] == -np.inf


def test_the_words_of_all_bags_are_known_for_colouring():
    assert PPLM(bags=[Bag("a", ("sea", "black hole")), Bag("b", ("sun",))]).words == (
        "sea",
        "black hole",
        "sun",
    )


def test_the_defaults_are_those_of_the_authors_program():
    known = {"stepsize": 0.02, "num_iterations": 3, "gamma": 1.5, "kl_scale": 0.01, "gm_scale": 0.9}
    known |= {"top_k": 10, "window_length": 0, "horizon_length": 1, "decay": False, "temperature": 1.0}
    pplm = PPLM(bags=["space"])
    assert {name: getattr(pplm, name) for name in known} == known
