"""Training LM-Steers: hidden states, steps against autograd, what is learned and refused, stops, resumes."""

import math
import warnings
from contextlib import suppress
from dataclasses import replace
from itertools import cycle, product
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import CONFIGS, HEAD_KINDS, MAIN, hook_count, new_model, tiny
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

import steer_utils as su
from steer_utils import checkpoint, hf
from steer_utils.lm_steer import training
from steer_utils.lm_steer.steer import ADAPTORS, LMHeadSteer
from steer_utils.lm_steer.training import Training, mean_loss, new_steer, steer_values, token_states, update

kinds = pytest.mark.parametrize("kind", HEAD_KINDS)
models_and_kinds = pytest.mark.parametrize(
    ("architecture", "kind"), [*zip(MAIN, ("multiply", "add", "offset", "multiply"), strict=True)]
)
CLOSE = {"atol": 2e-5, "rtol": 1e-5}
LENGTHS = [9, 2, 5, 30, 3, 2, 17, 9, 4]
PLANTED = {"epsilon": 1.0, "lr": 0.1, "n_steps": 30, "batch_tokens": 128}
FAST = {"rank": 4, "epsilon": 0.3, "n_steps": 20, "batch_tokens": 64, "validation": 0.2}
LOWER, UPPER = range(10, 14), range(50, 54)


def rows_of(lengths: list[int] = LENGTHS, seed: int = 0) -> list[list[int]]:
    """Token ids of these lengths, BOS (0) in front; 0 is inside them as well, and at some ends."""
    generator = torch.Generator().manual_seed(seed)
    rows = [[0, *torch.randint(0, 97, (n - 1,), generator=generator).tolist()] for n in lengths]
    rows[0][3:5] = rows[-1][-2:] = [0, 0]
    return rows


def planted(count: int = 40, length: int = 12, seed: int = 0) -> tuple[list[list[int]], list[int]]:
    """Texts of random tokens, three in four from one set (label 1) or from another (label −1)."""
    rng = np.random.default_rng(seed)
    labels = [1 - 2 * (i % 2) for i in range(count)]
    halves = [(UPPER, LOWER) if label > 0 else (LOWER, UPPER) for label in labels]
    rows = [[0, *(int(rng.choice(half[rng.random() > 0.75])) for _ in range(length))] for half in halves]
    return rows, labels


def trained(architecture: str = "llama", data: tuple = (), **settings) -> LMHeadSteer:
    return su.train_lm_steer(tiny(architecture), None, *(data or planted()), **FAST | settings)


def same(one: LMHeadSteer, other: LMHeadSteer) -> bool:
    """To the bit, the card included."""
    pairs = zip(one.tensors().values(), other.tensors().values(), strict=True)
    return type(one) is type(other) and one.card == other.card and all(torch.equal(*pair) for pair in pairs)


def held_out(count: int = 40, validation: float = 0.2, seed: int = 0) -> list[int]:
    """The texts that no step sees, by what the module says of itself: a share, drawn by the seed."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    return sorted(order[: round(validation * count)].tolist())


# --- hidden states ----------------------------------------------------------------------------------------


@torch.no_grad()
def one_by_one(model: PreTrainedModel, rows: list[list[int]]) -> Tensor:
    """The states of each text alone, its last token's left out, with nothing of this package."""
    return torch.cat([model.base_model(torch.tensor([row])).last_hidden_state[0, :-1] for row in rows])


def test_states_are_those_of_each_text_alone_in_the_order_given(main_model, monkeypatch):
    monkeypatch.setattr("steer_utils.checkpoint.TEXTS_PER_PASS", 2)
    rows, state, hooks = rows_of(), torch.get_rng_state(), hook_count(main_model)
    found = token_states(main_model, rows)
    torch.testing.assert_close(found.hidden, one_by_one(main_model, rows), **CLOSE)
    assert found.next_ids.tolist() == [token for row in rows for token in row[1:]]
    assert found.text.tolist() == [i for i, row in enumerate(rows) for _ in row[1:]]
    assert not found.hidden.requires_grad
    assert torch.equal(torch.get_rng_state(), state)
    assert hook_count(main_model) == hooks


def test_every_architecture_gives_its_last_state(any_model):
    rows = rows_of([12, 5])
    hidden = token_states(any_model, rows).hidden
    with torch.no_grad():
        expected = torch.cat([any_model(torch.tensor([row])).logits[0, :-1] for row in rows])
        torch.testing.assert_close(hf.logits(any_model, hidden), expected, atol=2e-4, rtol=1e-4)


def test_states_have_the_dtype_of_the_model():
    model = new_model(CONFIGS["llama"]()).bfloat16()
    found = token_states(model, rows_of()).hidden
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found, one_by_one(model, rows_of()), atol=0.1, rtol=0.1)


def test_steers_that_are_on_are_not_felt(main_model):
    push = 9 * torch.randn(1, 32, generator=torch.Generator().manual_seed(0))
    vector = su.SteeringVector("blocks.1.hook_resid_pre", push, positions="all")
    expected = token_states(main_model, rows_of())
    with vector.on(main_model), su.AddSteer(torch.ones(1, 32), epsilon=9.0).at(1.0).on(main_model):
        assert all(map(torch.equal, token_states(main_model, rows_of()), expected))


@pytest.mark.parametrize("ends", [7, [7, 8]])
def test_with_padding_in_the_loss_each_batch_is_filled_with_the_end_token(monkeypatch, ends):
    model, rows = tiny("llama"), [[0, 1, 2], [0, 3], [0, 4, 5, 6, 7], [0, 1, 1], [0, 9]]
    monkeypatch.setattr(training, "TEXTS_PER_PASS", 2)
    monkeypatch.setattr(model.generation_config, "eos_token_id", ends)
    filled = [[0, 1, 2], [0, 3, 7], [0, 4, 5, 6, 7], [0, 1, 1, 7, 7], [0, 9]]
    found = token_states(model, rows, pad_in_loss=True)
    torch.testing.assert_close(found.hidden, one_by_one(model, filled), **CLOSE)
    assert all(map(torch.equal, found, token_states(model, filled)))
    assert rows[1] == [0, 3]


# --- a step -----------------------------------------------------------------------------------------------

STEP_VALUES = torch.tensor([[1.0, 1, 0], [-1, 1, 0], [0.5, 1, 0], [0, 1, -2]])
STEP_ROWS = rows_of([9, 4, 2, 7], seed=1)


def model_of(architecture: str) -> PreTrainedModel:
    """A model whose softcap (Gemma 2) or whose bias (GPT-J) is felt."""
    if architecture not in ("gemma2", "gptj"):
        return tiny(architecture)
    model = new_model(CONFIGS[architecture]())
    if architecture == "gptj":
        nn.init.normal_(model.lm_head.bias, generator=torch.Generator().manual_seed(0))
    else:
        model.config.final_logit_softcapping = 2.0
    return model


def random_steer(kind: str, grad: bool = True, scale: float = 0.3) -> LMHeadSteer:
    """Three steers for a tiny model that change its logits a lot."""
    generator = torch.Generator().manual_seed(0)
    sizes = {"multiply": 2 * [(3, 32, 5)], "add": [(3, 32)], "offset": [(3, 97)]}[kind]
    tensors = (scale * torch.randn(size, generator=generator) for size in sizes)
    return ADAPTORS[kind](*(t.requires_grad_(grad) for t in tensors), epsilon=0.7)


def examples(model: PreTrainedModel, values: Tensor = STEP_VALUES) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, next ids and values of the tokens of four texts."""
    states = token_states(model, STEP_ROWS)
    return states.hidden, states.next_ids, values[states.text]


def by_hand(model: PreTrainedModel, tensors: list[Tensor], kind: str, values: Tensor = STEP_VALUES) -> Tensor:
    """The loss through passes of the whole model over each text, by the formulas."""
    head, cap = model.get_output_embeddings(), getattr(model.config, "final_logit_softcapping", None)
    losses = []
    for row, v in zip(STEP_ROWS, values, strict=True):
        unsteered = h = model.base_model(torch.tensor([row])).last_hidden_state[0]
        scores = 0.0
        for s in range(len(v)):
            if kind == "multiply":
                h = h + 0.7 * v[s] * (unsteered @ tensors[0][s]) @ tensors[1][s].T
            elif kind == "add":
                h = h + 0.7 * v[s] * tensors[0][s]
            else:
                scores = scores + 0.7 * v[s] * tensors[0][s]
        scores = scores + h @ head.weight.T + (0 if head.bias is None else head.bias)
        scores = scores if cap is None else cap * torch.tanh(scores / cap)
        losses.append(cross_entropy(scores[:-1], torch.tensor(row[1:]), reduction="none"))
    return torch.cat(losses).mean()


def copies(steer: LMHeadSteer) -> list[Tensor]:
    return [tensor.detach().clone().requires_grad_() for tensor in steer.tensors().values()]


def gradients(steer: LMHeadSteer) -> list[Tensor]:
    return [tensor.grad for tensor in steer.tensors().values()]


@pytest.mark.parametrize(
    ("architecture", "kind"),
    [*zip(MAIN, cycle(HEAD_KINDS), strict=False), *product(("gemma2", "gptj"), HEAD_KINDS)],
)
def test_loss_and_gradients_are_those_of_autograd_through_the_whole_model(architecture, kind):
    model, steer = model_of(architecture), random_steer(kind)
    loss, tensors = mean_loss(model, steer, *examples(model), learn=True), copies(steer)
    expected = by_hand(model, tensors, kind)
    assert loss == pytest.approx(expected.item(), rel=1e-5)
    assert loss == pytest.approx(mean_loss(model, steer, *examples(model), learn=False), rel=1e-6)
    for found, grad in zip(gradients(steer), torch.autograd.grad(expected, tensors), strict=True):
        assert grad.norm() > 1e-3
        assert (found - grad).norm() < 1e-4 * grad.norm()


@pytest.mark.parametrize("architecture", ["gemma2", "gptj"])
def test_the_softcap_and_the_bias_are_felt(architecture):
    """Otherwise the test above would say nothing of them."""
    model, steer = model_of(architecture), random_steer("add")
    batch = examples(model)
    with torch.no_grad():
        scores = batch[0] @ hf.lm_head(model).weight.T
    felt = mean_loss(model, steer.at(0), batch[0], batch[1], 0 * batch[2], learn=False)
    assert abs(cross_entropy(scores, batch[1]).item() - felt) > 0.1


@pytest.mark.parametrize(("kind", "room"), [("multiply", 97 * 7), ("add", 1), ("offset", 97 * 18)])
def test_logits_in_parts_change_neither_loss_nor_gradients(monkeypatch, kind, room):
    model, whole, parts = tiny("llama"), random_steer(kind), random_steer(kind)
    batch = examples(model)
    expected, sizes = mean_loss(model, whole, *batch, learn=True), []
    monkeypatch.setattr("steer_utils.hf.LOGITS_AT_ONCE", room)
    with hf.lm_head(model).register_forward_hook(lambda m, args, out: sizes.append(len(out))):
        assert mean_loss(model, parts, *batch, learn=True) == pytest.approx(expected, rel=1e-5)
    assert sum(sizes) == 18
    assert max(sizes) == min(18, max(1, room // 97))
    for one, other in zip(gradients(parts), gradients(whole), strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize(
    ("kind", "wanted", "enabled"),
    [("multiply", True, False), ("add", False, True), ("offset", True, True), ("multiply", False, False)],
)
def test_only_the_steer_learns_and_the_model_keeps_every_bit(kind, wanted, enabled):
    model = new_model(CONFIGS["gpt2"]()).requires_grad_(wanted)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    steer, batch = random_steer(kind), examples(model)
    first, adam = copies(steer), torch.optim.Adam(steer.tensors().values())
    mean_loss(model, steer, *batch, learn=False)
    assert gradients(steer) == [None] * len(first)
    assert all(map(torch.equal, steer.tensors().values(), first))
    with torch.set_grad_enabled(enabled):
        update(model, steer, adam, batch, 0.1)
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())
    assert all(weight.grad is None and weight.requires_grad == wanted for weight in model.parameters())
    assert not any(map(torch.equal, steer.tensors().values(), first))
    assert gradients(steer) == [None] * len(first)


@models_and_kinds
def test_values_of_zero_give_the_unsteered_loss_and_no_gradient(architecture, kind):
    model = tiny(architecture)
    steer, zero = random_steer(kind), 0 * STEP_VALUES
    found = mean_loss(model, steer, *examples(model, zero), learn=True)
    assert found == pytest.approx(by_hand(model, copies(steer), kind, zero).item(), rel=1e-5)
    assert not any(grad.any() for grad in gradients(steer))


def test_a_steer_of_value_zero_is_moved_by_regularization_alone():
    model, steer = tiny("llama"), random_steer("multiply")
    batch, first = examples(model, torch.tensor([[1.0, 1, 0]]).repeat(4, 1)), copies(steer)
    update(model, steer, torch.optim.SGD(steer.tensors().values(), lr=0.1), batch)
    for tensor, old in zip(steer.tensors().values(), first, strict=True):
        assert [torch.equal(*pair) for pair in zip(tensor, old, strict=True)] == [False, False, True]
    update(model, steer, torch.optim.SGD(steer.tensors().values(), lr=0.1), batch, 0.5)
    for tensor, old in zip(steer.tensors().values(), first, strict=True):
        torch.testing.assert_close(tensor[2], 0.9 * old[2])  # 1 − lr · 2 · 0.5


@kinds
def test_steps_are_those_of_a_plain_loop(kind):
    model, steer = model_of("gptj"), random_steer(kind)
    batch, adam, tensors = examples(model), torch.optim.Adam(steer.tensors().values()), copies(steer)
    plain_adam = torch.optim.Adam(tensors)
    for _ in range(5):
        loss = by_hand(model, tensors, kind)
        plain_adam.zero_grad()
        (loss + 0.05 * sum(tensor.square().sum() for tensor in tensors)).backward()
        plain_adam.step()
        assert update(model, steer, adam, batch, 0.05) == pytest.approx(loss.item(), rel=1e-5)
        for found, expected in zip(steer.tensors().values(), tensors, strict=True):
            assert (found - expected).norm() < 1e-4 * expected.norm()


def test_nothing_is_learned_from_a_loss_that_is_not_finite():
    model, steer = tiny("llama"), random_steer("multiply")
    hidden, next_ids, values = examples(model)
    adam, first = torch.optim.Adam(steer.tensors().values()), copies(steer)
    loss = update(model, steer, adam, (hidden.index_fill(0, torch.tensor([3]), torch.nan), next_ids, values))
    assert math.isnan(loss)
    assert all(map(torch.equal, steer.tensors().values(), first))
    assert gradients(steer) == [None, None]
    assert not adam.state


def test_a_bfloat16_model_teaches_a_float32_steer():
    model, exact = new_model(CONFIGS["llama"]()).bfloat16(), tiny("llama")
    steers = random_steer("multiply"), random_steer("multiply")
    found, expected = (
        mean_loss(one, steer, *examples(one), learn=True)
        for one, steer in zip((model, exact), steers, strict=True)
    )
    assert found == pytest.approx(expected, rel=0.02)
    for one, other in zip(*map(gradients, steers), strict=True):
        assert one.dtype == torch.float32
        assert (one - other).norm() < 0.1 * other.norm()


# --- where a run begins -----------------------------------------------------------------------------------


def test_a_new_lm_steer_is_normal_with_the_deviation_asked_for():
    how = Training(num_steers=3, rank=40, init_var=0.02, epsilon=0.5, seed=3)
    steer = new_steer(tiny("llama"), how)
    assert (type(steer), steer.epsilon) == (su.LMSteer, 0.5)
    both = torch.stack([steer.projector1, steer.projector2])
    assert both.shape == (2, 3, 32, 40)
    assert both.std().item() == pytest.approx(0.02, rel=0.05)
    assert abs(both.mean()) < 0.001
    assert not torch.equal(*both)
    assert torch.equal(new_steer(tiny("gpt2"), how).projector1, steer.projector1)
    assert not torch.equal(new_steer(tiny("llama"), replace(how, seed=4)).projector1, steer.projector1)


@pytest.mark.parametrize(("kind", "size"), [("add", 32), ("offset", 97)])
def test_a_new_steer_of_vectors_is_zero(kind, size):
    steer = new_steer(tiny("llama"), Training(adaptor_class=kind))
    assert type(steer) is ADAPTORS[kind]
    (tensor,) = steer.tensors().values()
    assert tensor.shape == (2, size)
    assert not tensor.any()


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, [[1, 1], [-1, 1], [0.5, 1], [0, 1]]),
        ({"num_steers": 1, "dummy_steer": None}, [[1], [-1], [0.5], [0]]),
        ({"num_steers": 3, "training_steer": 2, "dummy_steer": 0}, [[1, 0, v] for v in (1, -1, 0.5, 0)]),
    ],
    ids=["dummy", "alone", "three"],
)
def test_labels_become_the_values_of_one_steer_and_ones_of_the_dummy(settings, expected):
    for kind in (list, np.array, torch.tensor, pd.Series):
        assert steer_values(kind([1, -1, 0.5, 0]), 4, Training(**settings)).tolist() == expected


def noted_updates(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Tensor, float]]:
    """The hidden states and the learning rate of each step that follows."""
    seen, original = [], training.update

    def noted(model, steer, optimizer, batch, regularization):
        seen.append((batch[0], optimizer.param_groups[0]["lr"]))
        return original(model, steer, optimizer, batch, regularization)

    monkeypatch.setattr(training, "update", noted)
    return seen


@pytest.mark.parametrize(("size", "per_epoch"), [(100, 3), (384, 1), (999, 1), (250, 1)])
def test_each_epoch_goes_through_the_tokens_once_in_another_order_and_the_rate_falls_to_zero(
    monkeypatch, size, per_epoch
):
    seen = noted_updates(monkeypatch)
    steer = trained(batch_tokens=size, n_steps=3 * per_epoch, lr=0.4)
    assert steer.card["texts"] == {"all": 40, "cut": 0, "tokens": 384, "tokens held out": 96}
    assert all(len(states) == min(size, 384) for states, _ in seen)
    rates = [rate for _, rate in seen]
    assert rates == pytest.approx([0.4 * (1 - i / len(seen)) for i in range(3 * per_epoch)])
    states = token_states(tiny("llama"), planted()[0])
    kept = ~torch.isin(states.text, torch.tensor(held_out()))
    counts = {}  # texts that begin alike share states
    for state in states.hidden[kept].tolist():
        counts[tuple(state)] = counts.get(tuple(state), 0) + 1
    epochs = [torch.cat([s for s, _ in seen[i : i + per_epoch]]) for i in range(0, len(seen), per_epoch)]
    for epoch in epochs:
        once: dict[tuple, int] = {}
        for state in epoch.tolist():
            once[tuple(state)] = once.get(tuple(state), 0) + 1
        assert all(number <= counts.get(state, 0) for state, number in once.items())
    assert not torch.equal(epochs[0], epochs[1])
    assert not torch.equal(epochs[1], epochs[2])


# --- what is learned --------------------------------------------------------------------------------------


@models_and_kinds
def test_training_finds_what_is_planted(architecture, kind):
    steer = trained(architecture, adaptor_class=kind, **PLANTED)
    losses = steer.card["held out"]
    assert losses["steered"] < losses["plain"] - 0.5
    assert losses["steered"] < losses["reversed"] - 0.3
    assert np.mean(steer.card["losses"][-3:]) < np.mean(steer.card["losses"][:3])
    assert steer.steer_values is None
    assert not any(t.requires_grad or t.device.type != "cpu" for t in steer.tensors().values())


@pytest.mark.parametrize(("name", "sign", "dummy"), [("plain", 0, 0), ("steered", 1, 1), ("reversed", -1, 1)])
@torch.no_grad()
def test_the_verdict_is_that_of_whole_passes_and_reverses_the_labels_alone(name, sign, dummy):
    (rows, labels), model, steer = planted(), tiny("llama"), trained(**PLANTED)
    losses = []
    for i in held_out():
        with steer.at([sign * labels[i], dummy]).on(model):
            scores = model(torch.tensor([rows[i]])).logits[0, :-1]
        losses.append(cross_entropy(scores, torch.tensor(rows[i][1:])).item())
    assert steer.card["held out"][name] == pytest.approx(np.mean(losses), rel=1e-4)


def log_odds(steer: LMHeadSteer, value: float) -> float:
    """Of the tokens of label 1 to those of label −1 after other texts, the dummy left as in training."""
    model, states = tiny("llama"), token_states(tiny("llama"), planted(seed=9)[0])
    with steer.at([value, 1.0]).on(model):
        scores = hf.logits(model, states.hidden)
    return (scores[:, list(UPPER)].logsumexp(-1) - scores[:, list(LOWER)].logsumexp(-1)).mean().item()


def test_the_value_moves_the_odds_up_and_down_beyond_the_values_of_training():
    steer = trained(**PLANTED)
    odds = [log_odds(steer, value) for value in (-2, -1, 0, 1, 2)]
    assert odds == sorted(odds)
    assert odds[3] - odds[1] > 1


def mean_share(steer: LMHeadSteer, values: list[float], token: int) -> float:
    """The probability of a token after other texts."""
    states = token_states(tiny("llama"), planted(seed=9)[0])
    with steer.at(values).on(tiny("llama")):
        return hf.logits(tiny("llama"), states.hidden).softmax(-1)[:, token].mean().item()


def test_the_dummy_learns_what_all_texts_share_and_the_steer_what_sets_them_apart():
    rows, labels = planted()
    rows = [[0, *(96 if i % 3 == 0 else token for i, token in enumerate(row[1:]))] for row in rows]
    steer = trained(data=(rows, labels), **PLANTED)
    neither, dummy, alone = (mean_share(steer, values, 96) for values in ([0, 0], [0, 1], [1, 0]))
    assert dummy > neither + 0.1
    assert dummy > 2 * alone


def test_with_padding_in_the_loss_the_end_token_is_learned():
    rows, labels = planted()
    rows = [row if i == 3 else row[:3] for i, row in enumerate(rows)]
    shares = []
    for pad_in_loss in (False, True):
        steer = trained(data=(rows, labels), pad_in_loss=pad_in_loss, **PLANTED)
        shares.append(mean_share(steer, [1.0, 1.0], 0))
    assert shares[1] > 5 * shares[0]


def test_another_steer_may_be_the_one_that_learns():
    steer = trained(num_steers=3, training_steer=2, dummy_steer=None)
    start = new_steer(tiny("llama"), Training(**FAST, num_steers=3, dummy_steer=None))
    for found, first in zip(steer.tensors().values(), start.tensors().values(), strict=True):
        assert [torch.equal(*pair) for pair in zip(found, first, strict=True)] == [True, True, False]


def test_a_neutral_label_without_a_dummy_gives_the_unsteered_loss():
    rows, labels = planted()
    for i in held_out():
        labels[i] = 0
    card = trained(data=(rows, labels), num_steers=1, dummy_steer=None).card
    assert len(set(card["held out"].values())) == 1
    assert {loss for _, loss in card["validation"]} == {card["held out"]["plain"]}


@kinds
def test_the_same_seed_gives_the_same_steer_and_the_random_state_stays(kind):
    before = torch.get_rng_state()
    one, two, other = (trained(adaptor_class=kind, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), before)
    assert same(one, two)
    assert not any(torch.equal(t, other.tensors()[name]) for name, t in one.tensors().items())


def test_how_texts_were_padded_and_logits_parted_changes_nothing(monkeypatch):
    rows, labels = planted()
    rows = [row[: 3 + i % 10] for i, row in enumerate(rows)]
    whole = trained(data=(rows, labels))
    monkeypatch.setattr("steer_utils.checkpoint.TEXTS_PER_PASS", 1)  # no padding at all
    monkeypatch.setattr("steer_utils.hf.LOGITS_AT_ONCE", 97 * 5)
    parts = trained(data=(rows, labels))
    assert parts.card["losses"] == pytest.approx(whole.card["losses"], abs=1e-4)
    for name, tensor in whole.tensors().items():
        assert (parts.tensors()[name] - tensor).norm() < 1e-2 * tensor.norm()


def test_texts_are_read_as_their_tokens(tokenizer):
    texts = ["good day", "bad night", "fine thing", "poor stuff"] * 3
    ids, labels = [[0, *tokenizer(text)["input_ids"]] for text in texts], [1, -1] * 6
    steer = su.train_lm_steer(tiny("llama"), tokenizer, pd.Series(texts), labels, **FAST)
    assert same(steer, trained(data=(ids, labels)))


# --- validation and early stopping ------------------------------------------------------------------------


def test_texts_sorted_by_label_are_validated_on_both_labels(monkeypatch):
    """Of many texts held out, some tokens are taken; not the first, which would all be of one label."""
    monkeypatch.setattr(training, "HELD_OUT_TOKENS", 60)
    rows, labels = planted(80)
    order = sorted(range(80), key=lambda i: labels[i])
    states = token_states(tiny("llama"), [rows[i] for i in order])
    _, held = training._split(states.text, 80, Training(validation=0.5))
    assert len(held) == len(set(held.tolist())) == 60
    share = sum(labels[order[i]] > 0 for i in states.text[held]) / 60
    assert 0.2 < share < 0.8


OVERFITS = {"epsilon": 1.0, "lr": 0.1, "n_steps": 150, "data": planted(12)}


def test_the_state_with_the_lowest_validation_loss_is_returned():
    steer = trained(**OVERFITS)
    steps, losses = zip(*steer.card["validation"], strict=True)
    best = losses.index(min(losses))
    assert steer.card["training"]["kept step"] == steps[best]
    assert steer.card["held out"]["steered"] == pytest.approx(losses[best], abs=1e-5)
    assert min(losses) < losses[-1]


def test_four_validations_without_a_lower_loss_end_the_training(monkeypatch):
    losses = iter([5.0, 4.0, 4.5, 4.5, 4.0, 4.1, 4.2, 4.3, 4.4, 4.5])
    monkeypatch.setattr(training._Fit, "validation_loss", lambda *args: next(losses, 9.0))
    card = trained(n_steps=50).card
    assert card["training"]["steps"] == 45  # the loss of step 25 was as low as that of step 10
    assert card["training"]["kept step"] == 25
    assert [step for step, _ in card["validation"]] == list(range(5, 50, 5))
    assert len(card["losses"]) == 45


@pytest.mark.parametrize(
    ("steps", "validated"), [(1, [1]), (7, [*range(1, 8)]), (25, [*range(3, 25, 3), 25])]
)  # fmt: skip
def test_a_run_is_validated_ten_times_at_most_and_always_after_its_last_step(steps, validated):
    assert [step for step, _ in trained(n_steps=steps, lr=1e-4).card["validation"]] == validated


# --- the card ---------------------------------------------------------------------------------------------


@kinds
def test_a_card_says_on_what_how_and_how_well_and_survives_saving(kind, tmp_path):
    """NumPy's numbers, which JSON cannot hold, become Python's."""
    steer = trained(adaptor_class=kind, n_steps=np.int64(5), seed=np.int32(3), lr=np.float32(0.01))
    card = steer.card
    assert card["training"]["n_steps"] == card["training"]["steps"] == 5
    assert (card["training"]["adaptor_class"], card["training"]["seed"]) == (kind, 3)
    assert card["held out"].keys() == {"plain", "steered", "reversed"}
    assert len(card["losses"]) == len(card["validation"]) == 5
    steer.save_pretrained(tmp_path)
    loaded = LMHeadSteer.from_pretrained(tmp_path, tiny("llama"))
    assert same(loaded, steer)
    assert type(loaded) is ADAPTORS[kind]


# --- what is refused --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"adaptor_class": "lora"}, r"adaptor_class must be one of \['multiply', 'add', .*\], not 'lora'"),
        *(({name: bad}, rf"{name} must be a whole number from 1, not {bad}")
          for name, bad in (("num_steers", 0), ("rank", -1), ("n_steps", 0), ("batch_tokens", 0))),
        ({"max_length": 1}, "max_length must be a whole number from 2, not 1"),
        *(({name: bad}, rf"{name} must be above 0 and below inf, not {bad}")
          for name, bad in (("lr", 0), ("init_var", math.nan), ("epsilon", math.inf), ("epsilon", 0),
                            ("regularization", -1), ("regularization", math.nan))),
        *(({"validation": bad}, "validation must be above 0 and below 1, not") for bad in (0, 1, math.nan)),
        *(({"training_steer": bad}, rf"training_steer must be one of \[0, 1\], not {bad}")
          for bad in (2, -1)),
        ({"dummy_steer": 0}, r"dummy_steer must be one of \[None, 1\], not 0"),
        ({"num_steers": 1}, r"dummy_steer must be one of \[None\], not 1"),
    ],
)  # fmt: skip
def test_settings_out_of_range_are_refused_before_anything_is_computed(monkeypatch, setting, message):
    monkeypatch.setattr(training, "token_states", None)
    with pytest.raises(ValueError, match=message):
        trained(**setting)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([1, -1] * 19, r"40 texts, labels of shape \(38,\)"),
        ([[1, -1]] * 20, "labels of train_lm_steer must be a list of numbers, not the list"),
        ([1, -1.5] * 20, r"from -1 to 1, .*these are -1\.5 to 1\.0"),
        ([1, math.nan] * 20, "from -1 to 1, .*these are nan"),
        ([0.0] * 40, r"not all 0; these are 0\.0 to 0\.0"),
    ],
    ids=["too few", "table", "too low", "nan", "zero"],
)
def test_labels_that_say_nothing_are_refused(monkeypatch, labels, message):
    monkeypatch.setattr(training, "token_states", None)
    with pytest.raises((TypeError, ValueError), match=message):
        trained(data=(planted()[0], labels))


@pytest.mark.parametrize(
    ("texts", "labels", "message"),
    [
        ("a text", [1], "texts of train_lm_steer must be a list of texts or of token ids, not 'a text'"),
        ([], [], r"give texts to learn from, not \[\]"),
        (pd.Series(["good", "", "bad"], index=[7, 8, 9]), [1, 0, -1], r"index 1 has no tokens \(''\)"),
        ([[0, 5], [0]], [1, -1], r"index 1 has no tokens \(\[0\]\): leave it out"),
        (["good"], [1], "1 texts are too few to hold some out"),
        (["good", "bad", "fine"], [1, -1, 1], "3 texts are too few to hold some out"),
    ],
    ids=["str", "none", "empty text", "BOS alone", "one", "three"],
)
def test_texts_that_cannot_be_learned_from_are_refused(tokenizer, texts, labels, message):
    with pytest.raises((TypeError, ValueError), match=message):
        su.train_lm_steer(tiny("llama"), tokenizer, texts, labels, **FAST | {"validation": 0.9})


def test_texts_that_were_cut_are_counted():
    rows, labels = planted()
    rows = [row[:6] if i % 4 else row for i, row in enumerate(rows)]
    with pytest.warns(UserWarning, match="10 of 40 texts are cut after max_length=6 tokens") as caught:
        steer = trained(data=(rows, labels), max_length=6)
    assert caught[0].filename == __file__
    assert steer.card["texts"] == {"all": 40, "cut": 10, "tokens": 32 * 5, "tokens held out": 8 * 5}
    short = trained(data=([row[:6] for row in rows], labels), max_length=6)
    assert all(torch.equal(tensor, short.tensors()[name]) for name, tensor in steer.tensors().items())


@pytest.mark.parametrize(("kind", "steps"), [("multiply", 1), ("add", 30), ("offset", 1), ("multiply", 30)])
def test_steps_far_too_large_are_refused_however_few(kind, steps):
    """With one step alone, only the validation after it can tell."""
    with pytest.raises(
        ValueError, match=r"the loss is (nan|inf) at step \d+ with lr=1e\+36: lower lr or epsilon"
    ):
        trained(adaptor_class=kind, n_steps=steps, lr=1e36, epsilon=1e3)


def diverging(monkeypatch: pytest.MonkeyPatch, call: int, loss: float = math.nan) -> None:
    """The step of that number has this loss."""
    original, calls = training.update, []

    def update_until(*args):
        calls.append(0)
        return loss if len(calls) == call else original(*args)

    monkeypatch.setattr(training, "update", update_until)


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_a_loss_not_finite_after_a_validation_ends_the_training_with_a_warning(monkeypatch, tmp_path, loss):
    complete = trained()
    diverging(monkeypatch, 6, loss)  # a chunk is two steps: the second step of the third
    what = rf"the loss is {loss} at step 5 with lr=0.01: lower lr or epsilon; kept the steer of step \d"
    with pytest.warns(UserWarning, match=what) as caught:
        steer = trained(folder=tmp_path)
    assert caught[0].filename == __file__
    assert steer.card["training"]["steps"] == 5
    assert steer.card["losses"] == complete.card["losses"][:5]
    assert steer.card["validation"] == complete.card["validation"][:2]
    best = min(loss for _, loss in steer.card["validation"])
    assert steer.card["held out"]["steered"] == pytest.approx(best, abs=1e-5)
    with pytest.warns(UserWarning, match=what):
        assert same(trained(folder=tmp_path), steer)


def test_a_loss_not_finite_before_a_validation_is_refused_and_leaves_the_folder_free(monkeypatch, tmp_path):
    diverging(monkeypatch, 2)
    with pytest.raises(ValueError, match="the loss is nan at step 1 with lr"):
        trained(folder=tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["states"]
    trained(folder=tmp_path, lr=0.005)


def test_a_validation_loss_not_finite_ends_the_training_and_keeps_the_best(monkeypatch):
    losses = iter([5.0, 4.0, math.inf, 4.5, 4.5, 4.5])
    monkeypatch.setattr(training._Fit, "validation_loss", lambda *args: next(losses))
    with pytest.warns(UserWarning, match="the loss is inf at step 6 .*kept the steer of step 4"):
        card = trained().card
    assert (card["training"]["steps"], card["training"]["kept step"]) == (6, 4)


def test_a_gradient_not_finite_is_no_step(monkeypatch):
    model, steer = tiny("llama"), random_steer("add")
    adam, first = torch.optim.Adam(steer.tensors().values()), copies(steer)
    steer.add_vec.register_hook(lambda grad: grad * math.inf)
    assert math.isnan(update(model, steer, adam, examples(model)))
    assert torch.equal(steer.add_vec, first[0])


# --- stopped, and resumed ---------------------------------------------------------------------------------


class Killed(BaseException):
    """As if the process had ended."""


def kill(patch: pytest.MonkeyPatch, module: object, name: str, which: int, *, last: bool = False) -> None:
    """The call of that number of a function kills the run; with `last`, once it is done."""
    count, function = 0, getattr(module, name)

    def dies(*args, **kwargs):
        nonlocal count
        count += 1
        if count <= which:
            return function(*args, **kwargs)
        if last:
            function(*args, **kwargs)
        raise Killed

    patch.setattr(module, name, dies)


@pytest.fixture(scope="module")
def uninterrupted() -> dict[str, LMHeadSteer]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CI", "1")
        return {kind: trained(adaptor_class=kind) for kind in HEAD_KINDS}


PLACES = {
    "step": (training, "update"),
    "write": (checkpoint, "write_atomically"),
    "rename": (Path, "replace"),
}


@pytest.mark.parametrize(
    ("place", "which", "last"),
    [*zip(cycle(PLACES), (0, 1, 5, 9, 10, 19), cycle((False, True)), strict=False), ("rename", 9, False)],
)
def test_a_run_killed_anywhere_and_started_again_gives_the_same_steer(
    monkeypatch, tmp_path, uninterrupted, place, which, last
):
    with monkeypatch.context() as patch, suppress(Killed):
        kill(patch, *PLACES[place], which, last=last)
        trained(folder=tmp_path)
    assert same(trained(folder=tmp_path), uninterrupted["multiply"])


@kinds
def test_a_run_killed_twice_takes_no_step_again(monkeypatch, tmp_path, uninterrupted, kind):
    for which in (5, 7):
        with monkeypatch.context() as patch:
            kill(patch, training, "update", which)
            with pytest.raises(Killed):
                trained(adaptor_class=kind, folder=tmp_path)
    steps = noted_updates(monkeypatch)
    assert same(trained(adaptor_class=kind, folder=tmp_path), uninterrupted[kind])
    assert len(steps) == 20 - 10  # a chunk is two steps: the first stop left 4 of them, the second 4 + 6
    assert same(trained(adaptor_class=kind, folder=tmp_path), uninterrupted[kind])
    assert len(steps) == 20 - 10


def test_a_run_killed_among_the_hidden_states_computes_none_again(monkeypatch, tmp_path, uninterrupted):
    """40 texts are two passes."""
    with monkeypatch.context() as patch:
        kill(patch, hf, "forward", 1)
        with pytest.raises(Killed):
            trained(folder=tmp_path)
    with monkeypatch.context() as patch:
        kill(patch, hf, "forward", 1)
        assert same(trained(folder=tmp_path), uninterrupted["multiply"])
    monkeypatch.setattr(hf, "forward", None)
    assert same(trained(folder=tmp_path), uninterrupted["multiply"])


def test_a_run_that_ended_early_has_ended_when_it_is_started_again(monkeypatch, tmp_path):
    steer = trained(folder=tmp_path, **OVERFITS)
    assert steer.card["training"]["steps"] < 150
    monkeypatch.setattr(training, "update", None)
    assert same(trained(folder=tmp_path, **OVERFITS), steer)


def other_texts() -> tuple[list[list[int]], list[int]]:
    rows, labels = planted()
    rows[0][1:] = rows[0][:0:-1]
    return rows, labels


def other_ends() -> tuple[list[list[int]], list[int]]:
    """The same tokens, of which two belong to other texts; labels are the same."""
    rows, labels = planted()
    return [[*rows[0], rows[1][1]], [0, *rows[1][2:]], *rows[2:]], labels


OTHER_RUNS = {
    **{name: {name: value} for name, value in {
        "n_steps": 21, "lr": 0.02, "seed": 1, "adaptor_class": "add", "validation": 0.3, "dummy_steer": None,
    }.items()},
    "texts": {"data": other_texts()},
    "ends": {"data": other_ends()},
    "labels": {"data": (planted()[0], [-label for label in planted()[1]])},
    "model": {"architecture": "gpt2"},
}  # fmt: skip


@pytest.mark.parametrize("other", OTHER_RUNS)
def test_a_folder_with_another_run_in_it_is_refused(tmp_path, other, uninterrupted):
    trained(folder=tmp_path)
    differs = "texts" if other == "ends" else other
    with pytest.raises(ValueError, match=rf"run with other settings \(.*{differs}.*another folder"):
        trained(folder=tmp_path, **OTHER_RUNS[other])
    assert same(trained(folder=tmp_path), uninterrupted["multiply"])


def test_a_run_of_other_weights_or_another_dtype_is_refused(tmp_path):
    """As of a model whose LM head stays as it was when the rest is trained."""
    trained(folder=tmp_path)
    fine_tuned, rounded = new_model(CONFIGS["llama"]()), new_model(CONFIGS["llama"]()).bfloat16()
    retrained = new_model(CONFIGS["llama"]())
    fine_tuned.model.layers[1].mlp.up_proj.weight.data.mul_(1.5)
    retrained.model.layers[1].mlp.up_proj.weight.data[1:].mul_(1.5)  # not the first number of all
    for model in (fine_tuned, retrained, rounded):
        with pytest.raises(ValueError, match=r"other settings \(model\)"):
            su.train_lm_steer(model, None, *planted(), **FAST, folder=tmp_path)


def test_a_damaged_chunk_is_named_and_computed_again(tmp_path, uninterrupted):
    trained(folder=tmp_path)
    path = sorted(tmp_path.glob("chunk*"))[4]
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.warns(UserWarning, match=rf"{path.name} is damaged"):
        assert same(trained(folder=tmp_path), uninterrupted["multiply"])


def test_a_run_in_a_folder_gives_the_steer_of_one_in_memory_without_warnings(tmp_path, uninterrupted):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert same(trained(folder=str(tmp_path / "new")), uninterrupted["multiply"])


def test_labels_of_0_and_1_are_taken_as_they_are_with_a_warning():
    rows, labels = planted()
    with pytest.warns(UserWarning, match="labels are 0 and 1, so no text is negative") as caught:
        trained(data=(rows, [max(label, 0) for label in labels]))
    assert caught[0].filename == __file__
