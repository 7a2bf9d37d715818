"""PPLM's arithmetic: each loss, weight and step against a computation by hand."""

import itertools
import math
import weakref
from collections.abc import Sequence

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from steer_utils.pplm.descent import (
    Adam,
    Normalized,
    Rule,
    bag_loss,
    class_loss,
    descend,
    divergence,
    fused,
    log_of,
    row_norms,
    window_weights,
)


def some(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def some_log_probs(*shape: int, seed: int = 0) -> Tensor:
    return some(*shape, seed=seed).log_softmax(dim=-1)


NUMBERS = st.floats(-1e4, 1e4, width=32)
LOGITS = st.lists(NUMBERS, min_size=4, max_size=4)

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


@settings(max_examples=200, deadline=None)
@given(
    rows=st.lists(LOGITS, min_size=1, max_size=3),
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


def test_the_bag_loss_is_finite_for_words_of_no_probability():
    log_probs = torch.tensor([[0.0, -math.inf, -math.inf]])
    kept = log_of(log_probs.exp())
    assert bag_loss(kept, torch.tensor([1, 2])).isfinite().all()
    torch.testing.assert_close(kept, torch.tensor([[0.0, math.log(1e-12), math.log(1e-12)]]))


@pytest.mark.parametrize("target", [0, 2])
def test_the_class_loss_is_the_cross_entropy_of_each_row(target):
    logits = some(4, 3)
    probs = logits.double().softmax(dim=-1)
    expected = torch.tensor([-math.log(row[target]) for row in probs.tolist()])
    torch.testing.assert_close(class_loss(logits, target), expected)


def test_the_divergence_is_of_the_steered_from_the_plain_distribution_and_never_below_zero():
    p, q = some_log_probs(4, 6), some_log_probs(4, 6, seed=1)
    expected = [
        sum(math.exp(a) * (a - b) for a, b in zip(*rows, strict=True))
        for rows in zip(p.double().tolist(), q.double().tolist(), strict=True)
    ]
    found = divergence(p, q)
    torch.testing.assert_close(found, torch.tensor(expected), atol=1e-6, rtol=1e-5)
    assert (found > 0).all()
    assert not torch.allclose(found, divergence(q, p), atol=1e-3)
    torch.testing.assert_close(divergence(p, p), torch.zeros(4))


@pytest.mark.parametrize("gm_scale", [0.0, 0.3, 1.0])
def test_fusion_is_the_normalised_geometric_mean(gm_scale):
    p, q = some_log_probs(3, 6), some_log_probs(3, 6, seed=1)
    product = p.exp() ** gm_scale * q.exp() ** (1 - gm_scale)
    expected = product / product.sum(dim=-1, keepdim=True)
    torch.testing.assert_close(fused(p, q, gm_scale).exp(), expected)


def test_fusion_at_its_ends_is_one_of_the_two_even_where_the_other_has_no_probability():
    p = torch.tensor([[0.5, 0.5, 1e-30]]).log()
    q = torch.tensor([[1e-30, 0.5, 0.5]]).log()
    torch.testing.assert_close(fused(p, q, 1.0), p)
    torch.testing.assert_close(fused(p, q, 0.0), q)


# --- the window -------------------------------------------------------------------------------------------


def weights_by_hand(mask: list[list[int]], length: int, window: str, decay: bool) -> list[list[float | None]]:
    """The weight of each position, counted one by one; None for padding, whose weight does not matter."""
    rows = []
    for row in mask:
        tokens = sum(row)
        places, found = iter(range(tokens)), []
        for is_text in row:
            if not is_text:
                found.append(None)
                continue
            place = next(places)
            inside = place - (tokens - length) if window == "newest" else place
            if length == 0 or tokens <= length:
                found.append(1.0)
            else:
                found.append(((inside + 1) / length if decay else 1.0) if 0 <= inside < length else 0.0)
        rows.append(found)
    return rows


@settings(max_examples=200, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 7), min_size=1, max_size=4),
    length=st.integers(0, 9),
    window=st.sampled_from(["newest", "oldest"]),
    decay=st.booleans(),
    side=st.sampled_from(["left", "right"]),
)
def test_window_weights_are_those_of_a_loop_over_rows_and_positions(lengths, length, window, decay, side):
    total = max([1, *lengths])
    rows = [[0] * (total - n) + [1] * n if side == "left" else [1] * n + [0] * (total - n) for n in lengths]
    found = window_weights(torch.tensor(rows), length, window=window, decay=decay)
    found = torch.ones(len(rows), total) if found is None else found
    for row, of_row in zip(found.tolist(), weights_by_hand(rows, length, window, decay), strict=True):
        for weight, expected in zip(row, of_row, strict=True):
            assert expected is None or weight == pytest.approx(expected)


def test_window_weights_in_numbers():
    mask = torch.tensor([[0, 1, 1, 1, 1], [0, 0, 0, 1, 1]])
    newest = window_weights(mask, 3, decay=True)
    torch.testing.assert_close(newest[0], torch.tensor([0, 0, 1 / 3, 2 / 3, 1]))
    torch.testing.assert_close(newest[1, 3:], torch.ones(2))
    oldest = window_weights(mask, 3, window="oldest", decay=True)
    torch.testing.assert_close(oldest[0], torch.tensor([0, 1 / 3, 2 / 3, 1, 0]))


@pytest.mark.parametrize("length", [0, 5, 6])
def test_there_are_no_weights_where_every_position_moves(length):
    assert window_weights(torch.ones(2, 5, dtype=torch.long), length, decay=True) is None


# --- normalized steps -------------------------------------------------------------------------------------

SHAPES = ((3, 2, 4), (3, 5))  # of the tensors of a group; rows first


def groups(count: int = 2, seed: int = 0) -> list[tuple[Tensor, ...]]:
    return [
        tuple(some(*shape, seed=seed + 10 * g + i) for i, shape in enumerate(SHAPES)) for g in range(count)
    ]


def zeros_like(of: list[tuple[Tensor, ...]]) -> list[tuple[Tensor, ...]]:
    return [tuple(map(torch.zeros_like, group)) for group in of]


def one_step(rule: Rule, moved: list[tuple[Tensor, ...]], gradients: list[tuple[Tensor, ...]]) -> None:
    """One step of every group, the last first, as a backward pass comes to them."""
    for index in reversed(range(len(moved))):
        rule.step(index, moved[index], gradients[index])


def norm_by_hand(group: tuple[Tensor, ...], row: int) -> float:
    return math.sqrt(sum(number**2 for tensor in group for number in tensor[row].flatten().tolist()))


def test_the_norm_of_a_row_is_that_of_all_tensors_of_its_group():
    group = groups(1)[0]
    torch.testing.assert_close(row_norms(group), torch.tensor([norm_by_hand(group, row) for row in range(3)]))


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 1.5])
def test_a_normalized_step_is_the_gradient_over_a_power_of_its_groups_norm_in_each_row(gamma):
    gradients = groups()
    moved = zeros_like(gradients)
    one_step(Normalized(0.3, gamma), moved, gradients)
    for group, by in zip(gradients, moved, strict=True):
        for row in range(3):
            scale = 0.3 / norm_by_hand(group, row) ** gamma
            for gradient, tensor in zip(group, by, strict=True):
                torch.testing.assert_close(tensor[row], -scale * gradient[row], atol=1e-6, rtol=1e-5)


def test_with_gamma_one_each_group_of_each_row_moves_by_the_step_size():
    gradients = [tuple(100.0**g * tensor for tensor in group) for g, group in enumerate(groups(3))]
    moved = zeros_like(gradients)
    one_step(Normalized(0.07, 1.0), moved, gradients)
    norms = torch.tensor([[norm_by_hand(group, row) for row in range(3)] for group in moved])
    torch.testing.assert_close(norms, torch.full((3, 3), 0.07), rtol=1e-5, atol=0)


def test_with_gamma_zero_a_step_is_plain_gradient_descent():
    gradients, moved = groups(), groups(seed=50)
    expected = [
        [t - 0.2 * g for t, g in zip(*pair, strict=True)] for pair in zip(moved, gradients, strict=True)
    ]
    one_step(Normalized(0.2, 0.0), moved, gradients)
    torch.testing.assert_close([list(group) for group in moved], expected)


@pytest.mark.parametrize("running", [True, False])
def test_running_norms_are_the_largest_so_far_and_others_those_of_the_step(running):
    earlier = torch.tensor([[0.1, 100.0, 0.1], [100.0, 0.1, 100.0]])
    gradients = groups()
    current = torch.tensor([[norm_by_hand(group, row) for row in range(3)] for group in gradients])
    rule, moved = Normalized(0.3, 1.0, running=running, norms=earlier), zeros_like(gradients)
    for factor in (1.0, 0.5, 2.0):
        one_step(rule, moved, [tuple(factor * tensor for tensor in group) for group in gradients])
        torch.testing.assert_close(rule.trace[:, -1], factor * current)
    torch.testing.assert_close(rule.norms, torch.maximum(earlier, 2 * current) if running else 2 * current)
    # Row 1 of group 0: its norm is below 100 at each step, so it moves by a fraction of the step size.
    steps = [0.3 * f * current[0, 1] / 100 if running else 0.3 for f in (1.0, 0.5, 2.0)]
    assert norm_by_hand(moved[0], 1) == pytest.approx(float(sum(steps)), rel=1e-5)


def test_norms_ten_times_as_large_make_a_step_smaller_by_ten_to_the_gamma():
    gradients, steps = groups(), []
    norms = torch.stack([row_norms(group) for group in gradients])
    for earlier in (norms, 10 * norms):
        moved = zeros_like(gradients)
        one_step(Normalized(1.0, 1.5, running=True, norms=earlier), moved, gradients)
        steps.append(moved)
    for small, large in zip(steps[1], steps[0], strict=True):
        torch.testing.assert_close([10**1.5 * tensor for tensor in small], list(large))


@pytest.mark.parametrize("gamma", [0.0, 1.0, 1.5, 3.0])
@pytest.mark.parametrize("running", [True, False])
def test_a_gradient_of_zero_moves_nothing(gamma, running):
    gradients, moved = groups(), groups(seed=50)
    for tensor in gradients[0]:
        tensor[1] = 0
    before = [[tensor[1].clone() for tensor in group] for group in moved]
    one_step(Normalized(0.3, gamma, running=running), moved, gradients)
    assert all(torch.equal(tensor[1], old) for tensor, old in zip(moved[0], before[0], strict=True))
    assert all(tensor.isfinite().all() for group in moved for tensor in group)


@settings(max_examples=50, deadline=None)
@given(gamma=st.floats(0, 3), row=st.integers(0, 2), scale=st.sampled_from([1e-6, 1.0, 1e6]))
def test_the_rows_of_a_batch_move_as_alone_whatever_the_others_do(gamma, row, scale):
    gradients = groups()
    for group in gradients:
        for tensor in group:
            tensor[[r for r in range(3) if r != row]] *= scale
    moved = zeros_like(gradients)
    one_step(Normalized(0.3, gamma, running=True), moved, gradients)
    alone = [tuple(tensor[row : row + 1] for tensor in group) for group in gradients]
    of_row = zeros_like(alone)
    one_step(Normalized(0.3, gamma, running=True), of_row, alone)
    for group, one in zip(moved, of_row, strict=True):
        torch.testing.assert_close(
            [tensor[row : row + 1] for tensor in group], list(one), rtol=1e-5, atol=1e-7
        )


# --- Adam -------------------------------------------------------------------------------------------------


def test_adam_is_adam():
    """m ← 0.9 m + 0.1 g, v ← 0.999 v + 0.001 g², x ← x − α m̂ / (√v̂ + 10⁻⁸), each number by itself."""
    moved, rule = groups(), Adam(0.05)
    flat = [tensor.clone() for group in moved for tensor in group]
    first, second = ([torch.zeros_like(tensor) for tensor in flat] for _ in range(2))
    for step in range(1, 5):
        gradients = groups(seed=100 * step)
        one_step(rule, moved, gradients)
        for i, gradient in enumerate(g for group in gradients for g in group):
            first[i] = 0.9 * first[i] + 0.1 * gradient
            second[i] = 0.999 * second[i] + 0.001 * gradient**2
            m, v = first[i] / (1 - 0.9**step), second[i] / (1 - 0.999**step)
            flat[i] = flat[i] - 0.05 * m / (v.sqrt() + 1e-8)
    found = [tensor.detach() for group in moved for tensor in group]
    torch.testing.assert_close(found, flat, atol=1e-6, rtol=1e-5)
    assert all(tensor.grad is None for group in moved for tensor in group)  # they would stay in memory


def test_the_first_step_of_adam_is_the_step_size_for_each_number_however_small_its_gradient():
    gradients = [(torch.tensor([[1e-3, -1e3, 0.0]]),)]
    moved = zeros_like(gradients)
    one_step(Adam(0.1), moved, gradients)
    torch.testing.assert_close(moved[0][0].detach(), torch.tensor([[-0.1, 0.1, 0.0]]), atol=1e-5, rtol=0)


# --- descent ----------------------------------------------------------------------------------------------


def curved(moved: list[tuple[Tensor, ...]]) -> dict[str, Tensor]:
    """Two losses [B] that mix the tensors of both groups."""
    (a, b), (c, d) = moved
    first = (a.flatten(1).sin().sum(dim=1) * b.sum(dim=1)).tanh()
    return {"one": first, "two": (c.square().flatten(1).sum(dim=1) + d.exp().sum(dim=1)).log()}


def test_one_plain_step_is_the_gradient_of_the_sum_of_losses_by_finite_differences():
    start = [tuple(tensor.double() / 3 for tensor in group) for group in groups()]
    moved = [tuple(tensor.clone() for tensor in group) for group in start]
    trace = descend(moved, curved, Normalized(1.0, 0.0), 1)
    assert [set(losses) for losses in trace] == [{"one", "two"}]
    torch.testing.assert_close(trace[0], curved(start))
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
    moved = groups()
    trace = descend(moved, curved, Normalized(0.01, 1.0), 20)
    totals = [sum(losses.values()).sum().item() for losses in trace]
    assert len(totals) == 20
    assert all(later < earlier for earlier, later in itertools.pairwise(totals))
    assert totals[0] == pytest.approx(sum(curved(groups()).values()).sum().item())
    assert not any(tensor.requires_grad for group in moved for tensor in group)
    assert not any(loss.requires_grad for losses in trace for loss in losses.values())


def test_weights_multiply_the_gradient_before_its_norm_is_taken():
    moved = groups()
    start = [tuple(tensor.clone() for tensor in group) for group in moved]

    def first_column(gradient: Tensor) -> Tensor:
        return gradient * (torch.arange(gradient.shape[-1]) == 0)

    descend(moved, curved, Normalized(0.2, 1.0), 1, first_column)
    by = [tuple(a - b for a, b in zip(*pair, strict=True)) for pair in zip(moved, start, strict=True)]
    assert all(torch.equal(t[..., 1:], torch.zeros_like(t[..., 1:])) for group in by for t in group)
    norms = [norm_by_hand(group, row) for group in by for row in range(3)]
    assert norms == pytest.approx([0.2] * 6, rel=1e-4)


def test_no_iterations_move_nothing():
    moved, start = groups(), groups()
    assert descend(moved, curved, Normalized(0.2, 1.0), 0) == []
    torch.testing.assert_close(moved, start, rtol=0, atol=0)


def test_descent_works_where_gradients_are_off():
    moved = groups()
    with torch.no_grad():
        descend(moved, curved, Adam(0.1), 2)
    assert not torch.allclose(moved[0][0], groups()[0][0])


def test_a_group_steps_as_soon_as_its_gradients_are_there_and_none_are_kept():
    """In a chain of groups the last steps first, while the backward pass is on its way to the others."""
    chain = [(torch.ones(2, 3), torch.ones(2, 3)) for _ in range(4)]
    alive: set[tuple[int, int]] = set()
    steps = []

    class Watch:
        def step(self, index: int, moved: Sequence[Tensor], gradients: Sequence[Tensor]) -> None:
            steps.append(index)
            for place, gradient in enumerate(gradients):
                alive.add((index, place))
                weakref.finalize(gradient, alive.discard, (index, place))
            assert alive == {(index, 0), (index, 1)}  # the gradients of the groups before this one are gone

    def losses(groups: list[tuple[Tensor, ...]]) -> dict[str, Tensor]:
        state = torch.zeros(2, 3)
        for keys, values in groups:
            state = torch.tanh(state + 3 * keys) + 2 * values  # so each gradient is a tensor of its own
        return {"sum": state.sum(dim=1)}

    descend(chain, losses, Watch(), 2)
    assert steps == [3, 2, 1, 0] * 2


class Breaks(Normalized):
    """A rule that fails at the second group it comes to."""

    def step(self, index: int, moved: Sequence[Tensor], gradients: Sequence[Tensor]) -> None:
        if self.trace is not None:
            raise RuntimeError("out of memory")
        super().step(index, moved, gradients)


def test_an_error_inside_leaves_nothing_that_wants_a_gradient_or_steps():
    moved, start = groups(), groups()

    def broken(_: list[tuple[Tensor, ...]]) -> dict[str, Tensor]:
        raise RuntimeError("out of memory")

    for losses, rule in ((broken, Normalized(0.2, 1.0)), (curved, Breaks(0.2, 1.0))):
        with pytest.raises(RuntimeError, match="out of memory"):
            descend(moved, losses, rule, 1)
        assert not any(tensor.requires_grad for group in moved for tensor in group)
        assert not any(tensor._backward_hooks for group in moved for tensor in group)
    pairs = [pair for both in zip(moved, start, strict=True) for pair in zip(*both, strict=True)]
    assert sum(not torch.equal(*pair) for pair in pairs) == 2  # one of the groups, whole


def test_a_rule_that_made_no_step_knows_no_norms():
    assert Normalized(0.2, 1.0).norms is None
    assert Normalized(0.2, 1.0).trace is None
