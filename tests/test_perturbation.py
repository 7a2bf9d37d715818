"""What PPLM moves at one token: gradients against finite differences of losses written here."""

import copy
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from conftest import WINDOW, padded, places, random_ids, tiny
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel

from steer_utils import PPLM, Bag
from steer_utils.pplm.classifier import ClassifierHead
from steer_utils.pplm.perturbation import (
    Moment,
    Perturbed,
    attribute_losses,
    begin_hidden,
    moved,
    next_token,
    perturb_hidden,
    perturb_past,
    perturb_probs,
)

LENGTH = WINDOW + 5
IDS = (5, 17, 40)
BAG = Bag("test", entries=tuple((i,) for i in IDS))
TARGET = 1


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
attributes = pytest.mark.parametrize("attribute", ATTRIBUTES)
every_kind = pytest.mark.parametrize(
    ("perturb", "attribute"), [(p, a) for p in ("past", "hidden") for a in ATTRIBUTES] + [("probs", "bag")]
)


def steer(attribute: str = "bag", **settings) -> PPLM:
    return PPLM(**ATTRIBUTES[attribute], **{"stepsize": 0.05, "kl_scale": 0.3} | settings)


@torch.no_grad()
def moment_after(
    model: PreTrainedModel, ids: Tensor, mask: Tensor | None = None, last: bool = False
) -> Moment:
    """Where the model stands after texts, read by transformers alone; `last`: with the last state only."""
    mask = torch.ones_like(ids) if mask is None else mask
    place, cache = places(mask).clamp(min=0), DynamicCache(config=model.config)
    kept, hidden = {"past_key_values": cache, "output_hidden_states": True}, []
    if ids.shape[1] > 1:
        read = model(ids[:, :-1], attention_mask=mask[:, :-1], position_ids=place[:, :-1], **kept)
        hidden = [read.hidden_states[-1]]
    before = copy.deepcopy(cache)
    read = model(ids[:, -1:], attention_mask=mask, position_ids=place[:, -1:], **kept)
    states = torch.cat([*hidden, read.hidden_states[-1]], dim=1).float()
    log_probs = read.logits[:, -1].float().log_softmax(dim=-1)
    return Moment(ids[:, -1:], mask, before, cache, states[:, -1:] if last else states, log_probs)


def perturbed(pplm: PPLM, model: PreTrainedModel, moment: Moment, **kwargs) -> Perturbed:
    if pplm.perturb == "past":
        return perturb_past(pplm, model, moment, **kwargs)
    if pplm.perturb == "hidden":
        return perturb_hidden(pplm, model, moment, **kwargs)
    return perturb_probs(pplm, moment, **kwargs)


def tensors_of(cache: Cache) -> list[tuple[Tensor, Tensor]]:
    return [(layer.keys, layer.values) for layer in cache.layers]


# --- losses by hand, in float64 ---------------------------------------------------------------------------


def steered_by_hand(
    model: PreTrainedModel, moment: Moment, shift: dict[tuple[int, str], Tensor]
) -> tuple[Tensor, Tensor]:
    """The last state [B, D] and log probabilities [B, V] with keys or values of some layers shifted."""
    cache = copy.deepcopy(moment.before)
    for (layer, name), by in shift.items():
        setattr(cache.layers[layer], name, getattr(cache.layers[layer], name) + by)
    read = model(
        moment.last,
        attention_mask=moment.mask,
        position_ids=places(moment.mask)[:, -1:],
        past_key_values=cache,
        output_hidden_states=True,
    )
    return read.hidden_states[-1][:, -1], read.logits[:, -1].log_softmax(dim=-1)


def features_by_hand(
    model: PreTrainedModel, moment: Moment, newest: Tensor, log_probs: Tensor, horizon: int
) -> Tensor:
    """The mean over the text's states, the newest given, and over those of soft tokens read after it."""
    every = model.get_input_embeddings()(torch.arange(97))  # Gemma's are scaled when they are looked up
    cache, mask = copy.deepcopy(moment.after), moment.mask
    states = [
        [*moment.hidden[row, :-1][moment.mask[row, :-1].bool()], newest[row]] for row in range(len(newest))
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


def loss_by_hand(pplm: PPLM, plain: Tensor, log_probs: Tensor, features: Tensor | None) -> Tensor:
    """The sum of losses of each row, [B]; plain, log_probs: log probabilities [B, V]."""
    probs, total = log_probs.exp(), torch.zeros(len(log_probs), dtype=log_probs.dtype)
    if pplm.bags:
        total = total - sum(probs[:, i] for i in IDS).log()
    if pplm.head is not None:
        logits = features @ pplm.head.weight.to(features).T + pplm.head.bias.to(features)
        total = total - logits.softmax(dim=-1)[:, TARGET].log()
    return total + pplm.kl_scale * (probs * (probs.log() - plain)).sum(dim=-1)


def slope(loss: Callable[[float], Tensor], epsilon: float = 4e-3) -> Tensor:
    """The derivative at 0 by central differences of fourth order: RMS norms round to float32 in any model."""
    near, far = (loss(e) - loss(-e) for e in (epsilon, 2 * epsilon))
    return (8 * near - far) / (12 * epsilon)


# --- gradients --------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize(("attribute", "horizon"), [("bag", 1), ("head", 1), ("head", 0), ("both", 2)])
def test_a_plain_step_on_the_past_is_the_gradient_by_finite_differences(main_model, attribute, horizon):
    pplm = steer(attribute, num_iterations=1, gamma=0.0, stepsize=1.0, horizon_length=horizon)
    ids, mask = padded([LENGTH, 4], "left")
    found = perturb_past(pplm, main_model, moment_after(main_model, ids, mask))
    exact = copy.deepcopy(main_model).double()
    moment = moment_after(exact, ids, mask)._replace(hidden=None)
    moment = moment._replace(hidden=moment_after(exact, ids, mask).hidden.double())
    newest, plain = steered_by_hand(exact, moment, {})

    def loss(shift: dict[tuple[int, str], Tensor]) -> Tensor:
        state, log_probs = steered_by_hand(exact, moment, shift)
        features = None
        if pplm.head is not None:
            state = newest if horizon else state  # with a horizon, only probabilities reach the past
            features = features_by_hand(exact, moment, state, log_probs, horizon)
        return loss_by_hand(pplm, plain, log_probs, features)

    torch.testing.assert_close(sum(found.losses[0].values()).double(), loss({}), atol=1e-4, rtol=1e-4)
    generator = torch.Generator().manual_seed(0)
    for layer, pair in enumerate(found.deltas):
        for name, delta in zip(("keys", "values"), pair, strict=True):
            direction = torch.randn(delta.shape, generator=generator, dtype=torch.float64)
            expected = slope(lambda e, at=(layer, name), d=direction: loss({at: e * d}))
            by = -(delta.double() * direction).flatten(1).sum(dim=1)
            torch.testing.assert_close(by, expected, atol=2e-4, rtol=2e-3)
            entry = torch.zeros_like(direction)
            entry[:, -1, -1, 3] = 1.0
            expected = slope(lambda e, at=(layer, name), d=entry: loss({at: e * d}), epsilon=0.02)
            torch.testing.assert_close(-delta[:, -1, -1, 3].double(), expected, atol=1e-4, rtol=2e-3)


@torch.no_grad()
@attributes
def test_a_plain_step_on_hidden_states_is_the_gradient_by_finite_differences(main_model, attribute):
    pplm = steer(attribute, perturb="hidden", num_iterations=1, gamma=0.0, stepsize=1.0)
    ids, mask = padded([LENGTH, 4], "left")
    found = perturb_hidden(pplm, main_model, moment_after(main_model, ids, mask)).deltas[0][0]
    exact = copy.deepcopy(main_model).double()
    hidden = moment_after(main_model, ids, mask).hidden.double()
    embed = exact.get_output_embeddings().weight

    def log_probs_of(states: Tensor) -> Tensor:
        return (states[:, -1] @ embed.T).log_softmax(dim=-1)

    def loss(shift: Tensor) -> Tensor:
        states = hidden + shift
        features = torch.stack([row[keep.bool()].mean(dim=0) for row, keep in zip(states, mask, strict=True)])
        return loss_by_hand(pplm, log_probs_of(hidden), log_probs_of(states), features)

    for seed in range(3):
        direction = torch.randn(
            hidden.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
        )
        expected = slope(lambda e, d=direction: loss(e * d))
        by = -(found.double() * direction).flatten(1).sum(dim=1)
        torch.testing.assert_close(by, expected, atol=1e-4, rtol=1e-3)


def test_a_plain_step_on_probabilities_is_the_gradient_worked_out_on_paper(main_model):
    """d/dp of −log Σ_bag p is −1/Σ_bag p in the bag and 0 elsewhere; of kl · Σ p log(p/q) at p = q, kl."""
    pplm = steer(perturb="probs", num_iterations=1, gamma=0.0, stepsize=1e-3, kl_scale=0.3)
    moment = moment_after(main_model, random_ids(2, LENGTH))
    (delta,) = perturb_probs(pplm, moment).deltas[0]
    in_bag = torch.zeros(97).index_fill(0, torch.tensor(IDS), 1.0)
    likely = (moment.log_probs.exp() * in_bag).sum(dim=-1, keepdim=True)
    torch.testing.assert_close(delta, 1e-3 * (in_bag / likely - 0.3), rtol=1e-4, atol=1e-7)


@attributes
def test_a_second_step_starts_where_the_first_ended(main_model, attribute):
    """Steps that start from a moved past are those of one call, as long as the plain model stays the same."""
    once, twice = (steer(attribute, num_iterations=n, gamma=0.0, kl_scale=0.3) for n in (1, 2))
    moment = moment_after(main_model, random_ids(2, LENGTH))
    together = perturb_past(twice, main_model, moment)
    first = perturb_past(once, main_model, moment)
    second = perturb_past(once, main_model, moment, past=moved(moment.before, first.deltas))
    for whole, one, two in zip(together.deltas, first.deltas, second.deltas, strict=True):
        torch.testing.assert_close(list(whole), [a + b for a, b in zip(one, two, strict=True)])


# --- which positions move ---------------------------------------------------------------------------------


@pytest.mark.parametrize("gamma", [1.0, 1.5])
@pytest.mark.parametrize("window", ["newest", "oldest"])
@attributes
def test_the_past_moves_inside_the_window_only(main_model, attribute, window, gamma):
    pplm = steer(attribute, window_length=3, window=window, gamma=gamma)
    lengths = [LENGTH, 7, 4]
    ids, mask = padded(lengths, "left")
    found = perturb_past(pplm, main_model, moment_after(main_model, ids, mask))
    past = LENGTH - 1
    for pair in found.deltas:
        for delta in pair:
            size = delta.shape[
                2
            ]  # sliding layers hold fewer positions; a newest window no more than it moves
            still = torch.nn.functional.pad(delta.abs().amax(dim=(1, 3)) == 0, (past - size, 0), value=True)
            for row, n in enumerate(lengths):
                start = LENGTH - n if window == "oldest" else past - 3
                inside = [p for p in range(past) if start <= p < start + 3]
                moving = [p for p in inside if p >= past - size]
                assert still[row, [p for p in range(past) if p not in inside]].all()
                assert not still[row, moving].any()


@attributes
@pytest.mark.parametrize("perturb", ["past", "hidden"])
def test_padding_never_moves(main_model, attribute, perturb):
    ids, mask = padded([LENGTH, 6, 2], "left")
    moment = moment_after(main_model, ids, mask, last=perturb == "hidden" and attribute == "bag")
    found = perturbed(steer(attribute, perturb=perturb), main_model, moment)
    for tensor in (tensor for group in found.deltas for tensor in group):
        axis = 2 if perturb == "past" else 1
        padding = ~(mask[:, :-1] if perturb == "past" else mask)[:, -tensor.shape[axis] :].bool()
        rows = tensor.transpose(1, axis)
        assert (rows[padding] == 0).all()
        assert rows[~padding].abs().amax() > 0


@pytest.mark.parametrize(("perturb", "horizon"), [("hidden", 1), ("past", 0), ("past", 1)])
def test_what_states_of_padding_hold_does_not_matter(main_model, perturb, horizon):
    ids, mask = padded([LENGTH, 6], "left")
    moment = moment_after(main_model, ids, mask)
    odd = moment._replace(hidden=moment.hidden.masked_fill(mask[..., None] == 0, torch.nan))
    pplm = steer("head", perturb=perturb, horizon_length=horizon)
    expected, found = (perturbed(pplm, main_model, one).deltas for one in (moment, odd))
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_a_window_at_least_as_long_as_the_past_is_none(main_model):
    moment = moment_after(main_model, random_ids(2, 6))
    whole, longer = (perturb_past(steer(window_length=n, decay=n > 0), main_model, moment) for n in (0, 5))
    torch.testing.assert_close(longer.deltas, whole.deltas, rtol=0, atol=0)


def test_decay_weighs_the_gradient_by_the_place_in_the_window(main_model):
    moment = moment_after(main_model, random_ids(1, 7))
    flat, falling = (
        perturb_past(steer(window_length=4, decay=d, num_iterations=1, gamma=0.0), main_model, moment)
        for d in (False, True)
    )
    ramp = torch.tensor([0.25, 0.5, 0.75, 1.0])[:, None]
    for pair, by_ramp in zip(flat.deltas, falling.deltas, strict=True):
        torch.testing.assert_close([ramp * delta for delta in pair], list(by_ramp))


@pytest.mark.parametrize("update", ["normalized", "adam"])
def test_hidden_with_a_bag_moves_the_last_state_only(main_model, update):
    pplm = steer(perturb="hidden", update=update)
    moment = moment_after(main_model, random_ids(2, LENGTH))
    (alone,) = perturb_hidden(pplm, main_model, moment._replace(hidden=moment.hidden[:, -1:])).deltas[0]
    assert alone.shape == (2, 1, 32)
    assert (alone != 0).all()
    (whole,) = perturb_hidden(pplm, main_model, moment).deltas[0]
    assert (whole[:, :-1] == 0).all()
    torch.testing.assert_close(whole[:, -1:], alone, atol=1e-6, rtol=1e-4)


@attributes
def test_steps_that_begin_with_the_plain_logits_are_the_same_to_the_last_bit(main_model, attribute):
    pplm = steer(attribute, perturb="hidden", window_length=3)
    moment = moment_after(main_model, *padded([LENGTH, 4], "left"))
    begun = begin_hidden(main_model, moment.hidden)
    plain = main_model.get_output_embeddings()(moment.hidden[:, -1])
    torch.testing.assert_close(begun.logits.detach(), plain, rtol=0, atol=0)
    expected = perturb_hidden(pplm, main_model, moment)
    found = perturb_hidden(pplm, main_model, moment._replace(begun=begun))
    torch.testing.assert_close(found.deltas, expected.deltas, rtol=0, atol=0)
    torch.testing.assert_close(found.losses, expected.losses, rtol=0, atol=0)


# --- size and direction of steps --------------------------------------------------------------------------


@pytest.mark.parametrize("perturb", ["past", "hidden", "probs"])
def test_with_gamma_one_each_layer_moves_by_the_step_size_in_each_row(main_model, perturb):
    moment = moment_after(main_model, *padded([LENGTH, 5], "left"), last=perturb == "hidden")
    found = perturbed(steer(perturb=perturb, num_iterations=1, gamma=1.0), main_model, moment)
    assert len(found.deltas) == (3 if perturb == "past" else 1)
    for group in found.deltas:
        norms = sum(tensor.square().flatten(1).sum(dim=1) for tensor in group).sqrt()
        torch.testing.assert_close(norms, torch.full((2,), 0.05), rtol=1e-4, atol=0)


@every_kind
def test_small_steps_lower_the_loss_at_each_step(main_model, attribute, perturb):
    pplm = steer(attribute, perturb=perturb, stepsize=1e-3, num_iterations=6, gamma=1.0, kl_scale=0.01)
    found = perturbed(pplm, main_model, moment_after(main_model, *padded([LENGTH, 5], "left")))
    totals = torch.stack([sum(losses.values()) for losses in found.losses])
    assert totals.shape == (6, 2)
    assert (totals.diff(dim=0) < 0).all()


@pytest.mark.parametrize(
    ("perturb", "attribute"), [("past", "bag"), ("past", "head"), ("hidden", "bag"), ("hidden", "both")]
)
def test_a_large_kl_scale_keeps_near_the_plain_distribution(perturb, attribute):
    model, far = tiny("llama"), []
    moment = moment_after(model, random_ids(2, LENGTH))
    for kl_scale in (0.0, 1.0, 100.0):
        pplm = steer(attribute, perturb=perturb, kl_scale=kl_scale, num_iterations=60, update="adam")
        found = perturbed(replace(pplm, stepsize=5e-3), model, moment)
        if perturb == "past":
            logits = next_token(model, moment, moved(moment.before, found.deltas))[1]
        else:
            logits = model.get_output_embeddings()((moment.hidden + found.deltas[0][0])[:, -1])
        log_probs = logits.log_softmax(dim=-1)
        far.append((log_probs.exp() * (log_probs - moment.log_probs)).sum(dim=-1))
    assert (far[0] > far[1]).all()
    assert (far[1] > far[2]).all()
    assert (far[2] < 0.05 * far[0]).all()


# --- losses -----------------------------------------------------------------------------------------------


def test_each_bag_has_a_loss_of_its_own(main_model):
    bags = [Bag("a", entries=((5,), (17,))), Bag("b", entries=((40,), (41,)))]
    ids = random_ids(2, 6)
    moment = moment_after(main_model, ids)._replace(wanted=[bag.wanted(ids) for bag in bags])
    probs = moment.log_probs.exp()
    by_hand = -(probs[:, 5] + probs[:, 17]).log() - (probs[:, 40] + probs[:, 41]).log()
    found = attribute_losses(PPLM(bags=bags), moment, moment.log_probs, None)["bag"]
    torch.testing.assert_close(found, by_hand)


def test_a_later_piece_of_a_word_pulls_only_where_it_is_wanted(main_model):
    bag = Bag("long", entries=((5, 17),))
    moment = moment_after(main_model, random_ids(2, 6))
    moment = moment._replace(wanted=(bag.wanted(torch.tensor([[1, 5], [5, 1]])),))
    probs = moment.log_probs.exp()
    by_hand = -torch.stack([probs[0, 5] + probs[0, 17], probs[1, 5]]).log()
    found = attribute_losses(PPLM(bags=bag), moment, moment.log_probs, None)["bag"]
    torch.testing.assert_close(found, by_hand)


@torch.no_grad()
@pytest.mark.parametrize("horizon", [0, 1, 2, 3])
def test_a_head_sees_the_mean_state_of_the_text_and_of_soft_tokens_after_it(main_model, horizon):
    pplm = steer("head", num_iterations=1, horizon_length=horizon)
    moment = moment_after(main_model, *padded([LENGTH, 4], "left"))
    newest, log_probs = moment.hidden[:, -1], moment.log_probs
    features = features_by_hand(main_model, moment, newest, log_probs, horizon)
    by_hand = -(pplm.head.weight @ features.T + pplm.head.bias[:, None]).softmax(dim=0)[TARGET].log()
    found = perturb_past(pplm, main_model, moment).losses[0]["class"]
    torch.testing.assert_close(found, by_hand, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("perturb", ["past", "hidden", "probs"])
def test_losses_have_their_names_and_kl_none_of_weight_zero(perturb):
    moment = moment_after(tiny("gpt2"), random_ids(2, 6))
    for kl_scale, names in ((0.3, {"bag", "kl"}), (0.0, {"bag"})):
        found = perturbed(steer(perturb=perturb, kl_scale=kl_scale), tiny("gpt2"), moment)
        assert [set(losses) for losses in found.losses] == [names] * 3
        assert all(loss.shape == (2,) for losses in found.losses for loss in losses.values())


# --- batches, and what stays ------------------------------------------------------------------------------


@pytest.mark.parametrize("windowed", [{}, {"window_length": 3, "decay": True}])
@every_kind
def test_a_left_padded_batch_moves_as_its_rows_alone(main_model, perturb, attribute, windowed):
    pplm = steer(attribute, perturb=perturb, **windowed)
    lengths = [LENGTH, 6, 3]
    ids, mask = padded(lengths, "left")
    last = perturb == "hidden" and attribute == "bag"
    together = perturbed(pplm, main_model, moment_after(main_model, ids, mask, last))
    axis = {"past": 2, "hidden": 1, "probs": 1}[perturb]
    for row, n in enumerate(lengths):
        alone = perturbed(pplm, main_model, moment_after(main_model, ids[row : row + 1, -n:], last=last))
        for batch, one in zip(together.losses, alone.losses, strict=True):
            for name, loss in one.items():
                torch.testing.assert_close(batch[name][row], loss[0], atol=1e-4, rtol=1e-4)
        for group, of_row in zip(together.deltas, alone.deltas, strict=True):
            for tensor, delta in zip(group, of_row, strict=True):
                size = min(delta.shape[axis], tensor.shape[axis])
                newest = tensor[row : row + 1].narrow(axis, tensor.shape[axis] - size, size)
                torch.testing.assert_close(newest, delta, atol=2e-5, rtol=2e-3)


@every_kind
def test_nothing_that_was_given_is_changed(main_model, attribute, perturb):
    moment = moment_after(main_model, *padded([LENGTH, 5], "left"))
    before = copy.deepcopy(moment)
    weights = [weight.clone() for weight in main_model.parameters()]
    perturbed(steer(attribute, perturb=perturb, horizon_length=2), main_model, moment)
    for old, new in ((before.before, moment.before), (before.after, moment.after)):
        assert old.get_seq_length() == new.get_seq_length()
        for pair, same in zip(tensors_of(old), tensors_of(new), strict=True):
            assert all(map(torch.equal, pair, same))
    assert torch.equal(before.hidden, moment.hidden)
    assert torch.equal(before.log_probs, moment.log_probs)
    assert all(map(torch.equal, weights, main_model.parameters()))
    assert not any(weight.requires_grad for weight in main_model.parameters())


def test_moved_adds_to_the_newest_positions_and_leaves_the_cache(main_model):
    cache = moment_after(main_model, random_ids(2, 6)).before
    before = copy.deepcopy(cache)
    new = moved(
        cache, [(torch.ones_like(k[:, :, -2:]), 2 * torch.ones_like(v)) for k, v in tensors_of(cache)]
    )
    for (k, v), (new_k, new_v), (old_k, old_v) in zip(
        tensors_of(cache), tensors_of(new), tensors_of(before), strict=True
    ):
        assert torch.equal(k, old_k)
        assert torch.equal(v, old_v)
        assert torch.equal(new_k[:, :, :-2], k[:, :, :-2])
        assert torch.equal(new_k[:, :, -2:], k[:, :, -2:] + 1)
        assert torch.equal(new_v, v + 2)


@pytest.mark.parametrize("attribute", ["bag", "head"])
def test_norms_of_earlier_tokens_count_for_bags_and_not_for_heads(attribute):
    model = tiny("gpt2")
    pplm, moment = steer(attribute, num_iterations=1), moment_after(model, random_ids(2, 6))
    first = perturb_past(pplm, model, moment)
    later = perturb_past(pplm, model, moment, norms=10 * first.rule.norms)
    factor = 10**-1.5 if attribute == "bag" else 1.0
    for pair, same in zip(first.deltas, later.deltas, strict=True):
        torch.testing.assert_close([factor * delta for delta in pair], list(same))


def test_a_target_is_what_the_head_moves_towards(main_model):
    moment = moment_after(main_model, random_ids(1, LENGTH))
    for target in range(3):
        pplm = replace(steer("head", perturb="hidden", kl_scale=0.0), target_class_id=target)
        found = perturb_hidden(pplm, main_model, moment).deltas[0][0]
        mean = moment.hidden.mean(dim=1), (moment.hidden + found).mean(dim=1)
        before, after = (pplm.head(features).softmax(dim=-1)[0, target] for features in mean)
        assert after.logit() > before.logit() + 0.02
