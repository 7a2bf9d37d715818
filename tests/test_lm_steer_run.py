"""A step of training: its loss and gradients by autograd through the whole model and by small differences."""

from dataclasses import replace

import pytest
import torch
from conftest import CONFIGS, MAIN, new_model, tiny
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from steer_utils import hf
from steer_utils.lm_steer import run as lm_steer_run
from steer_utils.lm_steer.head_steer import HeadSteer
from steer_utils.lm_steer.run import mean_loss, new_steer, update
from steer_utils.lm_steer.steer import AddSteer, LMSteer, OffsetSteer
from steer_utils.lm_steer.token_states import token_states
from steer_utils.lm_steer.training import Training

KINDS = ("multiply", "add", "offset")
MODELS = (*MAIN, "gemma2", "gptj")  # gemma2 caps its logits, GPT-J has a bias at its head
VALUES = torch.tensor([[1.0, 1, 0], [-1, 1, 0], [0.5, 1, 0], [0, 1, -2]])
LENGTHS = [9, 4, 2, 7]


def model_of(architecture: str) -> PreTrainedModel:
    """A model whose softcap and bias are felt."""
    if architecture not in ("gemma2", "gptj"):
        return tiny(architecture)
    model = new_model(CONFIGS[architecture]())
    if architecture == "gptj":
        nn.init.normal_(model.lm_head.bias, generator=torch.Generator().manual_seed(0))
    else:
        model.config.final_logit_softcapping = 2.0
    return model


def random_steer(kind: str, grad: bool = True, scale: float = 0.3, seed: int = 0) -> HeadSteer:
    """Three steers for a tiny model that change its logits a lot."""
    generator = torch.Generator().manual_seed(seed)
    sizes = {"multiply": 2 * [(3, 32, 5)], "add": [(3, 32)], "offset": [(3, 97)]}[kind]
    tensors = (scale * torch.randn(size, generator=generator) for size in sizes)
    return HeadSteer.kinds[kind](*(t.requires_grad_(grad) for t in tensors), epsilon=0.7)


def rows(lengths: list[int] = LENGTHS) -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return [[0, *torch.randint(0, 97, (n - 1,), generator=generator).tolist()] for n in lengths]


def learned(model: PreTrainedModel, values: Tensor = VALUES) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, next ids and values of the tokens of four texts."""
    states = token_states(model, rows())
    return states.hidden, states.next_ids, values[states.text]


def by_hand(model: PreTrainedModel, steer: HeadSteer, values: Tensor = VALUES) -> tuple[Tensor, list[Tensor]]:
    """The loss and its gradients through passes of the whole model over each text, by the formulas."""
    tensors = [tensor.detach().clone().requires_grad_() for tensor in steer.tensors().values()]
    head, cap = model.get_output_embeddings(), getattr(model.config, "final_logit_softcapping", None)
    losses = []
    for row, v in zip(rows(), values, strict=True):
        plain = h = model.base_model(torch.tensor([row])).last_hidden_state[0]
        scores = 0.0
        for s in range(len(v)):
            if steer.adaptor_class == "multiply":
                h = h + steer.epsilon * v[s] * (plain @ tensors[0][s]) @ tensors[1][s].T
            elif steer.adaptor_class == "add":
                h = h + steer.epsilon * v[s] * tensors[0][s]
            else:
                scores = scores + steer.epsilon * v[s] * tensors[0][s]
        scores = scores + h @ head.weight.T + (0 if head.bias is None else head.bias)
        scores = scores if cap is None else cap * torch.tanh(scores / cap)
        losses.append(cross_entropy(scores[:-1], torch.tensor(row[1:]), reduction="none"))
    loss = torch.cat(losses).mean()
    loss.backward()
    return loss.detach(), [tensor.grad for tensor in tensors]


def gradients(steer: HeadSteer) -> list[Tensor]:
    return [tensor.grad for tensor in steer.tensors().values()]


def adam_of(steer: HeadSteer, lr: float = 0.01) -> torch.optim.Adam:
    return torch.optim.Adam(steer.tensors().values(), lr=lr)


# --- loss and gradients -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("architecture", MODELS)
def test_loss_and_gradients_are_those_of_autograd_through_the_whole_model(architecture, kind):
    model, steer = model_of(architecture), random_steer(kind)
    loss = mean_loss(model, steer, *learned(model), learn=True)
    expected, grads = by_hand(model, steer)
    assert loss == pytest.approx(expected.item(), rel=1e-5)
    for found, grad in zip(gradients(steer), grads, strict=True):
        assert grad.norm() > 1e-3
        assert (found - grad).norm() < 1e-4 * grad.norm()


@pytest.mark.parametrize("architecture", ["gemma2", "gptj"])
def test_the_softcap_and_the_bias_are_felt(architecture):
    """Otherwise the test above would say nothing of them."""
    model, steer = model_of(architecture), random_steer("add")
    batch = learned(model)
    with torch.no_grad():
        scores = batch[0] @ hf.lm_head(model).weight.T
    felt = mean_loss(model, steer.at(0), batch[0], batch[1], 0 * batch[2], learn=False)
    assert abs(cross_entropy(scores, batch[1]).item() - felt) > 0.1


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("architecture", MODELS)
def test_gradients_are_those_of_small_differences(architecture, kind):
    model, steer = model_of(architecture), random_steer(kind)
    batch, step = learned(model), 1e-2
    mean_loss(model, steer, *batch, learn=True)
    for i, name in enumerate(steer.parameters):
        tensor, grad = getattr(steer, name).detach(), gradients(steer)[i]
        along = grad / grad.norm()
        up, down = (
            mean_loss(model, replace(steer, **{name: tensor + sign * step * along}), *batch, learn=False)
            for sign in (1, -1)
        )
        assert (up - down) / (2 * step) == pytest.approx(grad.norm().item(), rel=0.01)


@pytest.mark.parametrize("spread", [0.0, 1.0, 30.0, 1e4])
def test_losses_and_slopes_are_those_of_torch_and_overwrite_the_logits(spread):
    generator = torch.Generator().manual_seed(0)
    logits = spread * torch.randn(7, 97, generator=generator, dtype=torch.float64) + 1e3
    next_ids = torch.randint(97, (7,), generator=generator)
    exact = logits.clone().requires_grad_()
    expected = cross_entropy(exact, next_ids, reduction="none")
    (grad,) = torch.autograd.grad(expected.sum(), exact)
    losses, slope = lm_steer_run._cross_entropy(logits, next_ids)
    torch.testing.assert_close(losses, expected.detach())
    torch.testing.assert_close(slope, grad)
    assert slope.data_ptr() == logits.data_ptr()


@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
def test_a_logit_that_is_not_finite_gives_a_loss_that_is_not(poison):
    logits = torch.zeros(2, 5)
    logits[0, 3] = poison
    losses, _ = lm_steer_run._cross_entropy(logits, torch.tensor([1, 1]))
    assert losses.isfinite().tolist() == [False, True]


@pytest.mark.parametrize("room", [1, 97, 200, 97 * 7, 97 * 17, 97 * 18, 97 * 19])
@pytest.mark.parametrize("kind", KINDS)
def test_logits_in_parts_change_neither_loss_nor_gradients(monkeypatch, kind, room):
    model, whole, parts = tiny("llama"), random_steer(kind), random_steer(kind)
    batch = learned(model)
    assert len(batch[0]) == 18
    expected, sizes = mean_loss(model, whole, *batch, learn=True), []
    monkeypatch.setattr(lm_steer_run, "ROOM", room)
    with hf.lm_head(model).register_forward_hook(lambda m, args, out: sizes.append(len(out))):
        assert mean_loss(model, parts, *batch, learn=True) == pytest.approx(expected, rel=1e-5)
    assert sum(sizes) == 18
    assert max(sizes) == min(18, max(1, room // 97))
    for one, other in zip(gradients(parts), gradients(whole), strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-4)


def test_gradients_join_those_that_are_there():
    model, steer = tiny("llama"), random_steer("multiply")
    batch = learned(model)
    mean_loss(model, steer, *batch, learn=True)
    once = [grad.clone() for grad in gradients(steer)]
    mean_loss(model, steer, *batch, learn=True)
    for twice, grad in zip(gradients(steer), once, strict=True):
        torch.testing.assert_close(twice, 2 * grad)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("wanted", [False, True])
@pytest.mark.parametrize("enabled", [False, True])
def test_only_the_steer_learns_and_the_model_keeps_every_bit(kind, wanted, enabled):
    model = new_model(CONFIGS["gpt2"]()).requires_grad_(wanted)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    steer, batch = random_steer(kind), learned(model)
    first, adam = [tensor.clone() for tensor in steer.tensors().values()], adam_of(steer)
    with torch.set_grad_enabled(enabled):
        update(model, steer, adam, batch, 0.1)
        update(model, steer, adam, batch)
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())
    assert all(weight.grad is None and weight.requires_grad == wanted for weight in model.parameters())
    assert not any(torch.equal(*pair) for pair in zip(steer.tensors().values(), first, strict=True))
    assert gradients(steer) == [None] * len(first)


@pytest.mark.parametrize("kind", KINDS)
def test_looking_at_a_loss_teaches_nothing(kind):
    model, steer = tiny("llama"), random_steer(kind)
    batch = learned(model)
    before = [tensor.clone() for tensor in steer.tensors().values()]
    found = mean_loss(model, steer, *batch, learn=False)
    assert gradients(steer) == [None] * len(before)
    assert found == mean_loss(model, random_steer(kind, grad=False), *batch, learn=False)
    assert all(torch.equal(*pair) for pair in zip(steer.tensors().values(), before, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_values_of_zero_give_the_plain_loss_and_no_gradient(main_model, kind):
    hidden, next_ids, values = learned(main_model)
    steer = random_steer(kind)
    with torch.no_grad():
        plain = [main_model(torch.tensor([row])).logits[0, :-1].log_softmax(-1) for row in rows()]
    expected = [-p[range(len(p)), row[1:]] for p, row in zip(plain, rows(), strict=True)]
    found = mean_loss(main_model, steer, hidden, next_ids, 0 * values, learn=True)
    assert found == pytest.approx(torch.cat(expected).mean().item(), rel=1e-5)
    assert not any(grad.any() for grad in gradients(steer))


def test_a_steer_of_value_zero_is_moved_by_regularization_alone():
    model, steer = tiny("llama"), random_steer("multiply")
    batch = learned(model, torch.tensor([[1.0, 1, 0]]).repeat(4, 1))
    first = [tensor.detach().clone() for tensor in steer.tensors().values()]
    update(model, steer, torch.optim.SGD(steer.tensors().values(), lr=0.1), batch)
    for tensor, old in zip(steer.tensors().values(), first, strict=True):
        assert torch.equal(tensor[2], old[2])
        assert not torch.equal(tensor[0], old[0])
        assert not torch.equal(tensor[1], old[1])
    update(model, steer, torch.optim.SGD(steer.tensors().values(), lr=0.1), batch, 0.5)
    for tensor, old in zip(steer.tensors().values(), first, strict=True):
        torch.testing.assert_close(tensor[2], 0.9 * old[2])  # 1 − lr · 2 · 0.5


# --- steps ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("regularization", [0.0, 0.05])
def test_steps_are_those_of_a_plain_loop(kind, regularization):
    model, steer = model_of("gptj"), random_steer(kind)
    batch, adam = learned(model), adam_of(steer)
    hidden, next_ids, values = batch
    tensors = [tensor.detach().clone().requires_grad_() for tensor in steer.tensors().values()]
    plain_adam, head = torch.optim.Adam(tensors, lr=0.01), hf.lm_head(model)
    for _ in range(5):
        if kind == "multiply":
            moves = torch.einsum("nd,sdr,ser,ns->ne", hidden, *tensors, values)
        else:
            moves = values @ tensors[0]
        scores = head(hidden) + 0.7 * moves if kind == "offset" else head(hidden + 0.7 * moves)
        loss = cross_entropy(scores, next_ids)
        plain_adam.zero_grad()
        (loss + regularization * sum(tensor.square().sum() for tensor in tensors)).backward()
        plain_adam.step()
        assert update(model, steer, adam, batch, regularization) == pytest.approx(loss.item(), rel=1e-5)
        for found, expected in zip(steer.tensors().values(), tensors, strict=True):
            assert (found - expected).norm() < 1e-4 * expected.norm()


def test_nothing_is_learned_from_a_loss_that_is_not_finite():
    model, steer = tiny("llama"), random_steer("multiply")
    hidden, next_ids, values = learned(model)
    adam, first = adam_of(steer), [tensor.detach().clone() for tensor in steer.tensors().values()]
    loss = update(model, steer, adam, (hidden.index_fill(0, torch.tensor([3]), torch.nan), next_ids, values))
    assert loss != loss
    assert all(torch.equal(*pair) for pair in zip(steer.tensors().values(), first, strict=True))
    assert gradients(steer) == [None, None]
    assert not adam.state


@pytest.mark.parametrize("kind", KINDS)
def test_steps_lower_the_loss(main_model, kind):
    steer, batch = random_steer(kind, scale=0.01), learned(main_model)
    adam = adam_of(steer, lr=0.02)
    losses = [update(main_model, steer, adam, batch) for _ in range(15)]
    assert mean_loss(main_model, steer, *batch, learn=False) < losses[0] - 0.1


def test_a_bfloat16_model_teaches_a_float32_steer():
    model = new_model(CONFIGS["llama"]()).bfloat16()
    steer, exact = random_steer("multiply"), random_steer("multiply")
    found = mean_loss(model, steer, *learned(model), learn=True)
    assert found == pytest.approx(
        mean_loss(tiny("llama"), exact, *learned(tiny("llama")), learn=True), rel=0.02
    )
    for one, other in zip(gradients(steer), gradients(exact), strict=True):
        assert one.dtype == torch.float32
        assert (one - other).norm() < 0.1 * other.norm()


# --- where a run begins -----------------------------------------------------------------------------------


def test_a_new_steer_of_projectors_is_normal_with_the_deviation_asked_for():
    how = Training(num_steers=3, rank=40, init_var=0.02, epsilon=0.5, seed=3)
    before = torch.get_rng_state()
    steer = new_steer(tiny("llama"), how)
    assert torch.equal(torch.get_rng_state(), before)
    assert isinstance(steer, LMSteer)
    assert (steer.epsilon, steer.num_steers, steer.rank) == (0.5, 3, 40)
    both = torch.stack([steer.projector1, steer.projector2])
    assert both.shape == (2, 3, 32, 40)
    assert both.std().item() == pytest.approx(0.02, rel=0.05)
    assert abs(both.mean()) < 0.001
    assert not torch.equal(*both)
    assert torch.equal(new_steer(tiny("gpt2"), how).projector1, steer.projector1)
    assert not torch.equal(new_steer(tiny("llama"), replace(how, seed=4)).projector1, steer.projector1)


@pytest.mark.parametrize(("kind", "width"), [(AddSteer, 32), (OffsetSteer, 97)])
def test_a_new_steer_of_vectors_is_zero(kind, width):
    steer = new_steer(tiny("llama"), Training(adaptor_class=kind.adaptor_class, num_steers=2))
    assert type(steer) is kind
    (tensor,) = steer.tensors().values()
    assert tensor.shape == (2, width)
    assert not tensor.any()


# --- the order of steps -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("count", "size"), [(12, 4), (12, 12), (12, 1), (13, 4), (5, 9)])
def test_each_round_goes_through_the_tokens_once_in_another_order(count, size):
    tokens, how = torch.arange(100, 100 + count), Training(batch_tokens=size, seed=2)
    places = max(1, count // size)
    seen = []
    for round_ in range(3):
        steps = [lm_steer_run._batch(tokens, round_ * places + i, how) for i in range(places)]
        assert all(len(step) == min(size, count) for step in steps)
        seen.append(torch.cat(steps).tolist())
        assert len(set(seen[-1])) == len(seen[-1]) == places * min(size, count)
        assert set(seen[-1]) <= set(tokens.tolist())
    assert seen[0] != seen[1] != seen[2]
    other = [lm_steer_run._batch(tokens, i, replace(how, seed=9)) for i in range(places)]
    assert torch.cat(other).tolist() != seen[0]


def test_tokens_that_a_round_leaves_over_have_their_turn_in_another():
    how = Training(batch_tokens=4)
    seen = torch.cat([lm_steer_run._batch(torch.arange(7), i, how) for i in range(12)])
    assert set(seen.tolist()) == set(range(7))
