"""PPLM's arithmetic at one token: losses, update rules, windows and steps, against computations by hand."""

import copy
import itertools
import math
from collections.abc import Callable

import pytest
import torch
from conftest import WINDOW, padded, places, random_ids, tiny
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel

from steer_utils import PPLM, Bag, hooks
from steer_utils.measure.metrics import next_token_kl
from steer_utils.pplm.classifier import ClassifierHead
from steer_utils.pplm.steps import (
    Adam,
    Descent,
    Normalized,
    Perturbed,
    StepInputs,
    bag_loss,
    gradient_steps,
    log_of,
    perturb_past,
    read_last,
    soft_token,
    start_hidden,
    with_newest,
)

LENGTH = WINDOW + 5
IDS = (5, 17, 40)
BAG = Bag("test", entries=tuple((i,) for i in IDS))
TARGET = 1


def some(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def some_log_probs(*shape: int, seed: int = 0) -> Tensor:
    return some(*shape, seed=seed).log_softmax(dim=-1)


# --- losses -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ids", [[3], [0, 4, 5], [2, 2, 1]])
def test_the_bag_loss_is_minus_the_log_of_the_sum_of_probabilities(ids):
    logits = 3 * some(5, 7)
    probs = logits.double().softmax(dim=-1)
    expected = [-math.log(sum(row[i] for i in ids)) for row in probs.tolist()]
    found = bag_loss(logits.log_softmax(dim=-1), torch.tensor(ids))
    torch.testing.assert_close(found, torch.tensor(expected), atol=1e-6, rtol=1e-6)


def test_the_bag_loss_counts_in_each_row_the_tokens_wanted_there():
    log_probs, ids = some_log_probs(3, 7), torch.tensor([1, 4, 4])
    wanted = torch.tensor([[True, True, True], [False, True, False], [True, False, False]])
    probs = log_probs.exp()
    expected = -torch.stack([probs[0, 1] + 2 * probs[0, 4], probs[1, 4], probs[2, 1]]).log()
    torch.testing.assert_close(bag_loss(log_probs, ids, wanted), expected)


@settings(max_examples=100, deadline=None)
@given(
    rows=st.lists(st.lists(st.floats(-1e4, 1e4, width=32), min_size=4, max_size=4), min_size=1, max_size=3),
    wanted=st.lists(st.booleans(), min_size=2, max_size=2),
    scale=st.sampled_from([1.0, 1e10, 1e30]),
)
def test_the_bag_loss_and_its_gradient_are_never_infinite_and_never_nan(rows, wanted, scale):
    logits = (scale * torch.tensor(rows)).requires_grad_()
    assume(logits.isfinite().all())
    each = torch.tensor([wanted] * len(rows))
    loss = bag_loss(logits.log_softmax(dim=-1), torch.tensor([1, 3]), each)
    (gradient,) = torch.autograd.grad(loss.sum(), logits)
    assert loss.isfinite().all()
    assert (loss >= -1e-6).all()
    assert gradient.isfinite().all()


def test_the_logarithm_of_a_probability_of_zero_or_below_is_finite():
    found = log_of(torch.tensor([[1.0, 0.0, -0.5]]))
    torch.testing.assert_close(found, torch.tensor([[0.0, math.log(1e-12), math.log(1e-12)]]))


def test_the_class_loss_is_the_cross_entropy_of_each_row():
    logits = some(4, 3)
    for target in range(3):
        expected = [-math.log(row[target]) for row in logits.double().softmax(dim=-1).tolist()]
        found = Descent(Adam(0.1), head=lambda x: x, target=target).losses(logits, logits, logits)
        torch.testing.assert_close(found, {"class": torch.tensor(expected)})


def test_the_kl_loss_is_of_the_steered_from_the_unsteered_distribution():
    p, q = some_log_probs(4, 6), some_log_probs(4, 6, seed=1)
    pairs = zip(p.double().tolist(), q.double().tolist(), strict=True)
    expected = [sum(math.exp(a) * (a - b) for a, b in zip(*rows, strict=True)) for rows in pairs]
    loss = Descent(Adam(0.1), kl_scale=0.5).losses
    torch.testing.assert_close(loss(p, q)["kl"], 0.5 * torch.tensor(expected), atol=1e-6, rtol=1e-5)
    assert (loss(p, q)["kl"] > 0).all()
    assert not torch.allclose(loss(p, q)["kl"], loss(q, p)["kl"], atol=1e-3)
    torch.testing.assert_close(loss(p, p)["kl"], torch.zeros(4))


@pytest.mark.parametrize("gm_scale", [0.0, 0.3, 1.0])
def test_fusion_is_the_normalised_geometric_mean(gm_scale):
    p, q = some_log_probs(3, 97), some_log_probs(3, 97, seed=1)
    product = p.exp() ** gm_scale * q.exp() ** (1 - gm_scale)
    expected = product / product.sum(dim=-1, keepdim=True)
    inputs = StepInputs(random_ids(3, 4), torch.ones(3, 4, dtype=torch.long), logits=q)
    found = PPLM(BAG, gm_scale=gm_scale, top_k=0).fuse(p, inputs)
    torch.testing.assert_close(found.exp(), expected)


def test_each_bag_has_a_loss_of_its_own_and_a_kl_scale_of_zero_adds_none():
    log_probs, unsteered = some_log_probs(2, 50), some_log_probs(2, 50, seed=1)
    probs, one, two = log_probs.exp(), torch.tensor([5, 17]), torch.tensor([40, 41])
    wanted, rule = torch.tensor([[True, True], [True, False]]), Adam(0.1)
    found = Descent(rule, bags=[(one, None), (two, wanted)]).losses(log_probs, unsteered)
    second = torch.stack([probs[0, 40] + probs[0, 41], probs[1, 40]])
    assert set(found) == {"bag"}
    torch.testing.assert_close(found["bag"], -(probs[:, 5] + probs[:, 17]).log() - second.log())
    found = Descent(rule, head=lambda x: 2 * x, target=2, kl_scale=0.3).losses(
        log_probs, unsteered, some(2, 3)
    )
    assert set(found) == {"class", "kl"}
    torch.testing.assert_close(found["class"], -(2 * some(2, 3)).log_softmax(dim=-1)[:, 2])
    torch.testing.assert_close(found["kl"], 0.3 * next_token_kl(log_probs, unsteered))


# --- the window -------------------------------------------------------------------------------------------


def weights_by_hand(mask: list[list[int]], length: int, side: str, decay: bool) -> list[list[float | None]]:
    """The weight of each position, counted one by one; None for padding, whose weight does not matter."""
    rows = []
    for row in mask:
        tokens = sum(row)
        count, found = iter(range(tokens)), []
        for is_text in row:
            if not is_text:
                found.append(None)
                continue
            place = next(count)
            inside = place - (tokens - length) if side == "newest" else place
            if length == 0 or tokens <= length:
                found.append(1.0)
            else:
                found.append(((inside + 1) / length if decay else 1.0) if 0 <= inside < length else 0.0)
        rows.append(found)
    return rows


@settings(max_examples=200, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 7), min_size=1, max_size=4),
    window=st.tuples(st.integers(0, 9), st.sampled_from(["newest", "oldest"]), st.booleans()),
    side=st.sampled_from(["left", "right"]),
)
def test_window_weights_are_those_of_a_loop_over_rows_and_positions(lengths, window, side):
    total = max([1, *lengths])
    rows = [[0] * (total - n) + [1] * n if side == "left" else [1] * n + [0] * (total - n) for n in lengths]
    length, newest_or_oldest, decay = window
    descent = Descent(Adam(0.1), window_length=length, window=newest_or_oldest, decay=decay)
    found = descent.weights(torch.tensor(rows))
    found = torch.ones(len(rows), total) if found is None else found
    for row, of_row in zip(found.tolist(), weights_by_hand(rows, *window), strict=True):
        for weight, expected in zip(row, of_row, strict=True):
            assert expected is None or weight == pytest.approx(expected)


@pytest.mark.parametrize("length", [0, 5, 6])
def test_there_are_no_weights_where_every_position_moves(length):
    descent = Descent(Adam(0.1), window_length=length, decay=True)
    assert descent.weights(torch.ones(2, 5, dtype=torch.long)) is None


# --- update rules -----------------------------------------------------------------------------------------

SHAPES = ((3, 2, 4), (3, 5))  # of the tensors of a group; rows first


def groups(count: int = 2, seed: int = 0) -> list[tuple[Tensor, ...]]:
    return [
        tuple(some(*shape, seed=seed + 10 * g + i) for i, shape in enumerate(SHAPES)) for g in range(count)
    ]


def zeros_like(of: list[tuple[Tensor, ...]]) -> list[tuple[Tensor, ...]]:
    return [tuple(map(torch.zeros_like, group)) for group in of]


def norm_by_hand(group: tuple[Tensor, ...], row: int) -> float:
    return math.sqrt(sum(number**2 for tensor in group for number in tensor[row].flatten().tolist()))


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 1.5])
def test_a_normalized_step_is_the_gradient_over_a_power_of_its_groups_norm_in_each_row(gamma):
    gradients, moved = groups(), groups(seed=50)
    start = copy.deepcopy(moved)
    Normalized(0.3, gamma).step(moved, gradients)
    for group, before, after in zip(gradients, start, moved, strict=True):
        for row in range(3):
            scale = 0.3 / norm_by_hand(group, row) ** gamma
            for gradient, old, new in zip(group, before, after, strict=True):
                torch.testing.assert_close(new[row], old[row] - scale * gradient[row], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("running", [True, False])
def test_running_norms_are_the_largest_so_far_and_others_those_of_the_step(running):
    earlier = torch.tensor([[0.1, 100.0, 0.1], [100.0, 0.1, 100.0]])
    gradients = groups()
    current = torch.tensor([[norm_by_hand(group, row) for row in range(3)] for group in gradients])
    rule, moved = Normalized(0.3, 1.0, running=running, norms=earlier), zeros_like(gradients)
    for factor in (1.0, 0.5, 2.0):
        rule.step(moved, [tuple(factor * tensor for tensor in group) for group in gradients])
        torch.testing.assert_close(rule.trace[-1], factor * current)
    torch.testing.assert_close(rule.norms, torch.maximum(earlier, 2 * current) if running else 2 * current)
    # Row 1 of group 0: its norm is below 100 at each step, so it moves by a fraction of the step size.
    steps = [0.3 * f * current[0, 1] / 100 if running else 0.3 for f in (1.0, 0.5, 2.0)]
    assert norm_by_hand(moved[0], 1) == pytest.approx(float(sum(steps)), rel=1e-5)


@pytest.mark.parametrize(("gamma", "running"), [(0.0, True), (1.0, False), (1.5, True), (3.0, True)])
def test_a_gradient_of_zero_moves_nothing(gamma, running):
    gradients, moved = groups(), groups(seed=50)
    for tensor in gradients[0]:
        tensor[1] = 0
    before = [tensor[1].clone() for tensor in moved[0]]
    Normalized(0.3, gamma, running=running).step(moved, gradients)
    assert all(torch.equal(tensor[1], old) for tensor, old in zip(moved[0], before, strict=True))
    assert all(tensor.isfinite().all() for group in moved for tensor in group)


def test_adam_is_adam():
    """m ← 0.9 m + 0.1 g, v ← 0.999 v + 0.001 g², x ← x − α m̂ / (√v̂ + 10⁻⁸), each number by itself."""
    moved, rule = groups(), Adam(0.05)
    flat = [tensor.clone() for group in moved for tensor in group]
    first, second = ([torch.zeros_like(tensor) for tensor in flat] for _ in range(2))
    for step in range(1, 5):
        gradients = groups(seed=100 * step)
        rule.step(moved, gradients)
        for i, gradient in enumerate(g for group in gradients for g in group):
            first[i] = 0.9 * first[i] + 0.1 * gradient
            second[i] = 0.999 * second[i] + 0.001 * gradient**2
            m, v = first[i] / (1 - 0.9**step), second[i] / (1 - 0.999**step)
            flat[i] = flat[i] - 0.05 * m / (v.sqrt() + 1e-8)
    found = [tensor.detach() for group in moved for tensor in group]
    torch.testing.assert_close(found, flat, atol=1e-6, rtol=1e-5)
    assert all(tensor.grad is None for group in moved for tensor in group)  # they would stay in memory


# --- gradient descent -------------------------------------------------------------------------------------


def curved(moved: list[tuple[Tensor, ...]]) -> dict[str, Tensor]:
    """Two losses [B] that mix the tensors of both groups."""
    (a, b), (c, d) = moved
    first = (a.flatten(1).sin().sum(dim=1) * b.sum(dim=1)).tanh()
    return {"one": first, "two": (c.square().flatten(1).sum(dim=1) + d.exp().sum(dim=1)).log()}


def test_one_step_is_the_gradient_of_the_sum_of_losses_by_finite_differences():
    start = [tuple(tensor.double() / 3 for tensor in group) for group in groups()]
    moved = copy.deepcopy(start)
    trace = gradient_steps(moved, lambda step: curved(moved), Descent(Normalized(1.0, 0.0)))
    torch.testing.assert_close(trace, [curved(start)])
    for g, group in enumerate(start):
        for i, tensor in enumerate(group):
            for place in [(0,) * tensor.ndim, tuple(n - 1 for n in tensor.shape)]:
                sides = []
                for epsilon in (1e-5, -1e-5):
                    shifted = [[t.clone() for t in one] for one in start]
                    shifted[g][i][place] += epsilon
                    sides.append(sum(curved(shifted).values()).sum())
                expected = (sides[0] - sides[1]) / 2e-5
                step = tensor[place] - moved[g][i][place]
                torch.testing.assert_close(step, expected, atol=1e-6, rtol=1e-5)


def test_losses_fall_are_those_before_each_step_and_leave_nothing_that_wants_a_gradient():
    moved, numbers = groups(), []
    with torch.no_grad():
        trace = gradient_steps(
            moved, lambda step: numbers.append(step) or curved(moved), Descent(Normalized(0.01, 1.0), 20)
        )
    totals = [sum(losses.values()).sum().item() for losses in trace]
    assert numbers == list(range(20))
    assert len(totals) == 20
    assert all(later < earlier for earlier, later in itertools.pairwise(totals))
    assert totals[0] == pytest.approx(sum(curved(groups()).values()).sum().item())
    assert not any(tensor.requires_grad for group in moved for tensor in group)
    assert not any(loss.requires_grad for losses in trace for loss in losses.values())


def test_weights_multiply_the_gradient_before_its_norm_is_taken():
    """They are those of the newest positions, which are the last axis but one."""
    moved = [(some(3, 2, 4), some(3, 2, 4, 5, seed=1))]
    start, weights = copy.deepcopy(moved), torch.tensor([[9.0, 9, 0, 1, 0, 0.5]] * 3)

    def losses(step: int) -> dict[str, Tensor]:
        return {"sum": moved[0][0].sum(dim=(1, 2)) + 2 * moved[0][1].sum(dim=(1, 2, 3))}

    rule = Normalized(0.2, 1.0)
    gradient_steps(moved, losses, Descent(rule), weights)
    states, keys = Perturbed(moved, start, [], rule).deltas[0]
    norm = math.sqrt(4 * 0.5**2 + 2 * 5 * 2**2 * (1 + 0.5**2))
    torch.testing.assert_close(states, -0.2 / norm * torch.tensor([0, 0.5])[:, None].expand(3, 2, 4))
    shape = torch.tensor([0, 1, 0, 0.5])[:, None].expand(3, 2, 4, 5)
    torch.testing.assert_close(keys, -0.4 / norm * shape)


# --- steps on a model: losses by hand, in float64 ---------------------------------------------------------


def head(scale: float = 3.0) -> ClassifierHead:
    found = ClassifierHead(32, 3, seed=1)
    with torch.no_grad():
        found.weight.mul_(scale)
    return found


ATTRIBUTES = {
    "bag": {"bags": BAG},
    "head": {"head": head(), "target_class_id": TARGET},
    "both": {"bags": BAG, "head": head(), "target_class_id": TARGET},
}
two_models = pytest.mark.parametrize("main_model", ["gpt2", "gemma3_text"], indirect=True)
every_kind = pytest.mark.parametrize(
    ("main_model", "perturb", "attribute"),
    [
        ("gpt2", "past", "bag"),
        ("llama", "past", "both"),
        ("gemma3_text", "past", "head"),
        ("gemma3_text", "past", "bag"),
        ("gpt_neox", "hidden", "bag"),
        ("gpt2", "hidden", "both"),
        ("llama", "probs", "bag"),
    ],
    indirect=["main_model"],
)


def steer(attribute: str = "bag", **given) -> PPLM:
    return PPLM(**ATTRIBUTES[attribute], **{"stepsize": 0.05, "kl_scale": 0.3} | given)


@torch.no_grad()
def inputs_after(
    model: PreTrainedModel, ids: Tensor, mask: Tensor | None = None, last: bool = False
) -> StepInputs:
    """Inputs after texts, read by transformers alone; `last`: with the last hidden state only."""
    mask = torch.ones_like(ids) if mask is None else mask
    place, cache = places(mask).clamp(min=0), DynamicCache(config=model.config)
    kept, hidden = {"past_key_values": cache, "output_hidden_states": True}, []
    if ids.shape[1] > 1:
        read = model(ids[:, :-1], attention_mask=mask[:, :-1], position_ids=place[:, :-1], **kept)
        hidden = [read.hidden_states[-1]]
    before = copy.deepcopy(cache)
    read = model(ids[:, -1:], attention_mask=mask, position_ids=place[:, -1:], **kept)
    states = torch.cat([*hidden, read.hidden_states[-1]], dim=1)
    return StepInputs(ids, mask, before, cache, states[:, -1:] if last else states, read.logits[:, -1])


def tensors_of(cache: Cache) -> list[tuple[Tensor, Tensor]]:
    return [(layer.keys, layer.values) for layer in cache.layers]


def steered_by_hand(
    model: PreTrainedModel, inputs: StepInputs, shift: dict[tuple[int, str], Tensor]
) -> tuple[Tensor, Tensor]:
    """The last state [B, D] and log probabilities [B, V] with keys or values of some layers shifted."""
    cache = copy.deepcopy(inputs.past)
    for (layer, name), by in shift.items():
        setattr(cache.layers[layer], name, getattr(cache.layers[layer], name) + by)
    read = model(
        inputs.ids[:, -1:],
        attention_mask=inputs.mask,
        position_ids=places(inputs.mask)[:, -1:],
        past_key_values=cache,
        output_hidden_states=True,
    )
    return read.hidden_states[-1][:, -1], read.logits[:, -1].log_softmax(dim=-1)


def features_by_hand(
    model: PreTrainedModel, inputs: StepInputs, newest: Tensor, log_probs: Tensor, horizon: int
) -> Tensor:
    """The mean over the text's states, the newest given, and over those of soft tokens read after it."""
    every = model.get_input_embeddings()(torch.arange(97))  # Gemma's are scaled when they are looked up
    cache, mask = copy.deepcopy(inputs.past_and_last), inputs.mask
    states = [
        [*inputs.hidden[row, :-1][inputs.mask[row, :-1].bool()], newest[row]] for row in range(len(newest))
    ]
    for _ in range(horizon):
        soft = torch.stack([sum(p * e for p, e in zip(row, every, strict=True)) for row in log_probs.exp()])
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
        read = model(
            inputs_embeds=soft[:, None],
            attention_mask=mask,
            position_ids=places(mask)[:, -1:],
            past_key_values=cache,
            output_hidden_states=True,
        )
        log_probs = read.logits[:, -1].log_softmax(dim=-1)
        for row, of_row in enumerate(states):
            of_row.append(read.hidden_states[-1][row, -1])
    return torch.stack([torch.stack(of_row).mean(dim=0) for of_row in states])


def loss_by_hand(pplm: PPLM, unsteered: Tensor, log_probs: Tensor, features: Tensor | None) -> Tensor:
    """The sum of losses of each row, [B]; unsteered, log_probs: log probabilities [B, V]."""
    probs, total = log_probs.exp(), torch.zeros(len(log_probs), dtype=log_probs.dtype)
    if pplm.bags:
        total = total - sum(probs[:, i] for i in IDS).log()
    if pplm.head is not None:
        logits = features @ pplm.head.weight.to(features).T + pplm.head.bias.to(features)
        total = total - logits.softmax(dim=-1)[:, TARGET].log()
    return total + pplm.kl_scale * (probs * (probs.log() - unsteered)).sum(dim=-1)


def slope(loss: Callable[[float], Tensor], epsilon: float = 4e-3) -> Tensor:
    """The derivative at 0 by central differences of fourth order: RMS norms round to float32 in any model."""
    near, far = (loss(e) - loss(-e) for e in (epsilon, 2 * epsilon))
    return (8 * near - far) / (12 * epsilon)


@torch.no_grad()
@pytest.mark.parametrize(("attribute", "horizon"), [("bag", 1), ("head", 1), ("head", 0), ("both", 2)])
@two_models
def test_a_step_on_the_past_is_the_gradient_by_finite_differences(main_model, attribute, horizon):
    pplm = steer(attribute, num_iterations=1, gamma=0.0, stepsize=1.0, horizon_length=horizon)
    ids, mask = padded([LENGTH, 4], "left")
    found = pplm.take_steps(main_model, inputs_after(main_model, ids, mask))
    exact = copy.deepcopy(main_model).double()
    inputs = inputs_after(exact, ids, mask)
    newest, unsteered = steered_by_hand(exact, inputs, {})

    def loss(shift: dict[tuple[int, str], Tensor]) -> Tensor:
        state, log_probs = steered_by_hand(exact, inputs, shift)
        features = None
        if pplm.head is not None:
            state = newest if horizon else state  # with a horizon, only probabilities reach the past
            features = features_by_hand(exact, inputs, state, log_probs, horizon)
        return loss_by_hand(pplm, unsteered, log_probs, features)

    torch.testing.assert_close(sum(found.losses[0].values()).double(), loss({}), atol=1e-4, rtol=1e-4)
    generator = torch.Generator().manual_seed(0)
    for layer, pair in enumerate(found.deltas):
        for name, delta in zip(("keys", "values"), pair, strict=True):
            direction = torch.randn(delta.shape, generator=generator, dtype=torch.float64)
            expected = slope(lambda e, at=(layer, name), d=direction: loss({at: e * d}))
            by = -(delta.double() * direction).flatten(1).sum(dim=1)
            torch.testing.assert_close(by, expected, atol=2e-4, rtol=2e-3)


@torch.no_grad()
@pytest.mark.parametrize("attribute", ATTRIBUTES)
@two_models
def test_a_step_on_hidden_states_is_the_gradient_by_finite_differences(main_model, attribute):
    pplm = steer(attribute, perturb="hidden", num_iterations=1, gamma=0.0, stepsize=1.0)
    ids, mask = padded([LENGTH, 4], "left")
    found = pplm.take_steps(main_model, inputs_after(main_model, ids, mask)).deltas[0][0]
    exact = copy.deepcopy(main_model).double()
    hidden = inputs_after(exact, ids, mask).hidden
    embed = exact.get_output_embeddings().weight

    def log_probs_of(states: Tensor) -> Tensor:
        return (states[:, -1] @ embed.T).log_softmax(dim=-1)

    def loss(shift: Tensor) -> Tensor:
        states = hidden + shift
        features = torch.stack([row[keep.bool()].mean(dim=0) for row, keep in zip(states, mask, strict=True)])
        return loss_by_hand(pplm, log_probs_of(hidden), log_probs_of(states), features)

    for seed in range(3):
        direction = some(*hidden.shape, seed=seed).double()
        expected = slope(lambda e, d=direction: loss(e * d))
        by = -(found.double() * direction).flatten(1).sum(dim=1)
        torch.testing.assert_close(by, expected, atol=1e-4, rtol=1e-3)


def test_a_step_on_probabilities_is_the_gradient_worked_out_on_paper():
    """d/dp of −log Σ_bag p is −1/Σ_bag p in the bag and 0 elsewhere; of kl · Σ p log(p/q) at p = q, kl."""
    pplm = steer(perturb="probs", num_iterations=1, gamma=0.0, stepsize=1e-3, kl_scale=0.3)
    inputs = StepInputs(ids=random_ids(2, 4), logits=some(2, 97))
    (delta,) = pplm.take_steps(tiny("gpt2"), inputs).deltas[0]
    in_bag = torch.zeros(97).index_fill(0, torch.tensor(IDS), 1.0)
    likely = (inputs.log_probs.exp() * in_bag).sum(dim=-1, keepdim=True)
    torch.testing.assert_close(delta, 1e-3 * (in_bag / likely - 0.3), rtol=1e-4, atol=1e-7)


@torch.no_grad()
def test_a_soft_token_enters_the_model_as_the_mean_of_what_its_tokens_do(any_model):
    ids, act_name = random_ids(6, 1), "blocks.0.hook_resid_pre"
    entering = hooks.activations(any_model, ids, torch.ones_like(ids), [act_name])[act_name]
    probabilities = torch.nn.functional.one_hot(ids[:, 0], 97).float().mean(dim=0)
    with soft_token(any_model, probabilities[None]):
        found = hooks.activations(any_model, ids[:1], torch.ones_like(ids[:1]), [act_name])[act_name]
    torch.testing.assert_close(found, entering.mean(dim=0, keepdim=True), atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("horizon", [0, 1, 3])
@two_models
def test_a_head_sees_the_mean_state_of_the_text_and_of_soft_tokens_after_it(main_model, horizon):
    pplm = steer("head", num_iterations=1, horizon_length=horizon)
    inputs = inputs_after(main_model, *padded([LENGTH, 4], "left"))
    features = features_by_hand(main_model, inputs, inputs.hidden[:, -1], inputs.log_probs, horizon)
    by_hand = -(pplm.head.weight @ features.T + pplm.head.bias[:, None]).softmax(dim=0)[TARGET].log()
    found = pplm.take_steps(main_model, inputs).losses[0]["class"]
    torch.testing.assert_close(found, by_hand, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("attribute", ["bag", "both"])
@two_models
def test_a_second_step_starts_where_the_first_ended(main_model, attribute):
    once, twice = (steer(attribute, num_iterations=n, gamma=0.0) for n in (1, 2))
    inputs = inputs_after(main_model, random_ids(2, LENGTH))
    together = twice.take_steps(main_model, inputs)
    first = once.take_steps(main_model, inputs)
    second = once.take_steps(main_model, inputs._replace(past=with_newest(inputs.past, first.moved)))
    torch.testing.assert_close(together.moved, second.moved)


def test_a_model_of_16_bits_has_a_past_that_moves_in_32():
    """Each of the steps is below the resolution of bfloat16."""
    model = copy.deepcopy(tiny("llama")).bfloat16()
    inputs = inputs_after(model, random_ids(1, LENGTH))
    pplm = steer(stepsize=1e-3, gamma=1.0, num_iterations=20, kl_scale=0.0)
    found = pplm.take_steps(model, inputs)
    for group in found.deltas:
        assert group[0].dtype == torch.float32
        moved = torch.stack([tensor.norm() for tensor in group]).norm()
        assert 0.01 < moved <= 0.0201
    read = with_newest(inputs.past, found.moved)
    assert torch.equal(read.layers[0].keys, found.moved[0][0].bfloat16())


# --- which positions move ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("window", "attribute"), [("newest", "bag"), ("oldest", "bag"), ("newest", "both")])
@two_models
def test_the_past_moves_inside_the_window_only(main_model, attribute, window):
    pplm = steer(attribute, window_length=3, window=window)
    lengths = [LENGTH, 7, 4]
    ids, mask = padded(lengths, "left")
    found = pplm.take_steps(main_model, inputs_after(main_model, ids, mask))
    past = LENGTH - 1
    for delta in itertools.chain(*found.deltas):
        size = delta.shape[2]  # sliding layers hold fewer positions; a newest window no more than it moves
        still = torch.nn.functional.pad(delta.abs().amax(dim=(1, 3)) == 0, (past - size, 0), value=True)
        for row, n in enumerate(lengths):
            start = LENGTH - n if window == "oldest" else past - 3
            inside = [p for p in range(past) if start <= p < start + 3]
            assert still[row, [p for p in range(past) if p not in inside]].all()
            assert not still[row, [p for p in inside if p >= past - size]].any()


@pytest.mark.parametrize(("perturb", "attribute"), [("past", "bag"), ("past", "head"), ("hidden", "both")])
@two_models
def test_padding_never_moves_whatever_its_states_hold(main_model, perturb, attribute):
    ids, mask = padded([LENGTH, 6, 2], "left")
    inputs = inputs_after(main_model, ids, mask)
    odd = inputs._replace(hidden=inputs.hidden.masked_fill(mask[..., None] == 0, torch.nan))
    pplm = steer(attribute, perturb=perturb)
    found, of_odd = (pplm.take_steps(main_model, one) for one in (inputs, odd))
    axis = 2 if perturb == "past" else 1
    for tensor, same in zip(itertools.chain(*found.deltas), itertools.chain(*of_odd.deltas), strict=True):
        text = (mask[:, :-1] if perturb == "past" else mask)[:, -tensor.shape[axis] :].bool()
        assert (tensor.transpose(1, axis)[~text] == 0).all()
        assert tensor.transpose(1, axis)[text].abs().amax() > 0
        assert torch.equal(same.transpose(1, axis)[text], tensor.transpose(1, axis)[text])


def test_a_window_as_long_as_the_past_is_none_and_decay_weighs_by_the_place_in_it(main_model):
    inputs, once = inputs_after(main_model, random_ids(1, 7)), {"num_iterations": 1, "gamma": 0.0}
    whole, longer = (steer(window_length=n, decay=n > 0).take_steps(main_model, inputs) for n in (0, 6))
    torch.testing.assert_close(longer.moved, whole.moved, rtol=0, atol=0)
    flat, falling = (
        steer(window_length=4, decay=d, **once).take_steps(main_model, inputs).deltas for d in (False, True)
    )
    ramp = torch.tensor([0.25, 0.5, 0.75, 1.0])[:, None]
    for pair, by_ramp in zip(flat, falling, strict=True):
        torch.testing.assert_close([ramp * delta for delta in pair], list(by_ramp))


@pytest.mark.parametrize("update", ["normalized", "adam"])
@two_models
def test_hidden_with_a_bag_moves_the_last_state_only(main_model, update):
    pplm, inputs = steer(perturb="hidden", update=update), inputs_after(main_model, random_ids(2, LENGTH))
    (alone,) = pplm.take_steps(main_model, inputs._replace(hidden=inputs.hidden[:, -1:])).deltas[0]
    assert alone.shape == (2, 1, 32)
    assert (alone != 0).all()
    (whole,) = pplm.take_steps(main_model, inputs).deltas[0]
    assert (whole[:, :-1] == 0).all()
    torch.testing.assert_close(whole[:, -1:], alone, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("attribute", ATTRIBUTES)
@pytest.mark.parametrize("main_model", ["llama"], indirect=True)
def test_steps_that_begin_with_the_unsteered_logits_are_the_same_to_the_last_bit(main_model, attribute):
    pplm = steer(attribute, perturb="hidden", window_length=3)
    inputs = inputs_after(main_model, *padded([LENGTH, 4], "left"))
    start = start_hidden(main_model, inputs.hidden)
    unsteered = main_model.get_output_embeddings()(inputs.hidden[:, -1])
    torch.testing.assert_close(start[1].detach(), unsteered)
    expected = pplm.take_steps(main_model, inputs)
    found = pplm.take_steps(main_model, inputs._replace(start=start))
    torch.testing.assert_close(found.moved, expected.moved, rtol=0, atol=0)
    torch.testing.assert_close(found.losses, expected.losses, rtol=0, atol=0)


# --- size and direction of steps --------------------------------------------------------------------------


@pytest.mark.parametrize("perturb", ["past", "hidden", "probs"])
@two_models
def test_with_gamma_one_each_layer_moves_by_the_step_size_in_each_row(main_model, perturb):
    inputs = inputs_after(main_model, *padded([LENGTH, 5], "left"), last=perturb == "hidden")
    found = steer(perturb=perturb, num_iterations=1, gamma=1.0).take_steps(main_model, inputs)
    assert len(found.deltas) == (3 if perturb == "past" else 1)
    for group in found.deltas:
        norms = sum(tensor.square().flatten(1).sum(dim=1) for tensor in group).sqrt()
        torch.testing.assert_close(norms, torch.full((2,), 0.05), rtol=1e-4, atol=0)


@every_kind
def test_small_steps_lower_the_loss_at_each_step(main_model, attribute, perturb):
    pplm = steer(attribute, perturb=perturb, stepsize=1e-3, num_iterations=6, gamma=1.0, kl_scale=0.01)
    found = pplm.take_steps(main_model, inputs_after(main_model, *padded([LENGTH, 5], "left")))
    totals = torch.stack([sum(losses.values()) for losses in found.losses])
    assert totals.shape == (6, 2)
    assert (totals.diff(dim=0) < 0).all()


@pytest.mark.parametrize(("perturb", "attribute"), [("past", "bag"), ("hidden", "both")])
def test_a_large_kl_scale_keeps_near_the_unsteered_distribution(perturb, attribute):
    model, far = tiny("llama"), []
    inputs = inputs_after(model, random_ids(2, LENGTH))
    for kl_scale in (0.0, 1.0, 100.0):
        pplm = steer(
            attribute, perturb=perturb, kl_scale=kl_scale, num_iterations=60, update="adam", stepsize=5e-3
        )
        moved = pplm.take_steps(model, inputs).moved
        if perturb == "past":
            logits = read_last(model, inputs, with_newest(inputs.past, moved))[1]
        else:
            logits = model.get_output_embeddings()(moved[0][0][:, -1])
        far.append(next_token_kl(logits, inputs.logits))
    assert (far[0] > far[1]).all()
    assert (far[1] > far[2]).all()
    assert (far[2] < 0.05 * far[0]).all()


def test_a_target_is_what_the_head_moves_towards(main_model):
    inputs, one = inputs_after(main_model, random_ids(1, LENGTH)), head()
    for target in range(3):
        pplm = PPLM(head=one, target_class_id=target, perturb="hidden", stepsize=0.05, kl_scale=0.0)
        found = pplm.take_steps(main_model, inputs).moved[0][0]
        before, after = (
            one(states.mean(dim=1)).softmax(dim=-1)[0, target] for states in (inputs.hidden, found)
        )
        assert after.logit() > before.logit() + 0.02


@pytest.mark.parametrize("attribute", ["bag", "head"])
def test_norms_of_earlier_tokens_count_for_bags_and_not_for_heads(attribute):
    model = tiny("gpt2")
    pplm, inputs = steer(attribute, num_iterations=1), inputs_after(model, random_ids(2, 6))
    first = pplm.take_steps(model, inputs)
    later = pplm.take_steps(model, inputs, 10 * first.rule.norms)
    factor = 10**-1.5 if attribute == "bag" else 1.0
    for pair, same in zip(first.deltas, later.deltas, strict=True):
        torch.testing.assert_close([factor * delta for delta in pair], list(same))


# --- batches, and what stays ------------------------------------------------------------------------------


@pytest.mark.parametrize("windowed", [{}, {"window_length": 3, "decay": True}])
@every_kind
def test_a_left_padded_batch_moves_as_its_rows_alone(main_model, perturb, attribute, windowed):
    pplm = steer(attribute, perturb=perturb, **windowed)
    lengths = [LENGTH, 6, 3]
    ids, mask = padded(lengths, "left")
    last = perturb == "hidden" and attribute == "bag"
    together = pplm.take_steps(main_model, inputs_after(main_model, ids, mask, last))
    axis = {"past": 2, "hidden": 1, "probs": 1}[perturb]
    for row, n in enumerate(lengths):
        alone = pplm.take_steps(main_model, inputs_after(main_model, ids[row : row + 1, -n:], last=last))
        for batch, one in zip(together.losses, alone.losses, strict=True):
            for name, loss in one.items():
                torch.testing.assert_close(batch[name][row], loss[0], atol=1e-4, rtol=1e-4)
        pairs = zip(itertools.chain(*together.deltas), itertools.chain(*alone.deltas), strict=True)
        for tensor, delta in pairs:
            size = min(delta.shape[axis], tensor.shape[axis])
            newest = tensor[row : row + 1].narrow(axis, tensor.shape[axis] - size, size)
            torch.testing.assert_close(newest, delta, atol=2e-5, rtol=2e-3)


@every_kind
def test_nothing_that_was_given_is_changed(main_model, attribute, perturb):
    model = main_model
    inputs = inputs_after(model, *padded([LENGTH, 5], "left"))
    before, weights = copy.deepcopy(inputs), [weight.clone() for weight in model.parameters()]
    steer(attribute, perturb=perturb, horizon_length=2).take_steps(model, inputs)
    for old, new in ((before.past, inputs.past), (before.past_and_last, inputs.past_and_last)):
        assert old.get_seq_length() == new.get_seq_length()
        for pair, same in zip(tensors_of(old), tensors_of(new), strict=True):
            assert all(map(torch.equal, pair, same))
    assert torch.equal(before.hidden, inputs.hidden)
    assert torch.equal(before.logits, inputs.logits)
    assert all(map(torch.equal, weights, model.parameters()))
    assert not any(weight.requires_grad for weight in model.parameters())


def test_an_empty_past_is_a_value_error():
    model = tiny("gpt2")
    inputs = StepInputs(random_ids(1, 1), torch.ones(1, 1), past=DynamicCache(), logits=some(1, 97))
    with pytest.raises(ValueError, match="no past to move"):
        perturb_past(model, inputs, Descent(Adam(0.1)))
