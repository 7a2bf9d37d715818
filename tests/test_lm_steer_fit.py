"""Training LM-Steers: what they learn, what is refused, and runs that are killed and go on."""

import math
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import CONFIGS, new_model, tiny

from steer_utils import checkpoint, hf
from steer_utils.lm_steer import run as lm_steer_run
from steer_utils.lm_steer import token_states
from steer_utils.lm_steer import training as lm_steer_fit
from steer_utils.lm_steer.head_steer import HeadSteer
from steer_utils.lm_steer.steer import AddSteer, LMSteer, OffsetSteer
from steer_utils.lm_steer.training import Training, steer_values, train_lm_steer

KINDS = ("multiply", "add", "offset")
PLANTED = {"epsilon": 1.0, "lr": 0.1, "n_steps": 30, "batch_tokens": 128}
FAST = {"rank": 4, "epsilon": 0.3, "n_steps": 20, "batch_tokens": 64, "validation": 0.2}
LOWER, UPPER = range(10, 14), range(50, 54)


def planted(count: int = 40, length: int = 12, seed: int = 0) -> tuple[list[list[int]], list[int]]:
    """Texts of random tokens, three in four from one set (label 1) or from another (label −1)."""
    rng = np.random.default_rng(seed)
    labels = [1 - 2 * (i % 2) for i in range(count)]
    halves = [(UPPER, LOWER) if label > 0 else (LOWER, UPPER) for label in labels]
    rows = [[0, *(int(rng.choice(half[rng.random() > 0.75])) for _ in range(length))] for half in halves]
    return rows, labels


def trained(architecture: str = "llama", data: tuple = (), **settings) -> HeadSteer:
    return train_lm_steer(tiny(architecture), None, *(data or planted()), **FAST | settings)


def same(one: HeadSteer, other: HeadSteer) -> bool:
    """To the bit, the card included."""
    pairs = zip(one.tensors().values(), other.tensors().values(), strict=True)
    return type(one) is type(other) and one.card == other.card and all(torch.equal(*pair) for pair in pairs)


def log_odds(steer: HeadSteer, value: float) -> float:
    """Of the tokens of label 1 to those of label −1 after other texts, the dummy left as in training."""
    model, states = tiny("llama"), token_states.token_states(tiny("llama"), planted(seed=9)[0])
    with steer.at([value, 1.0]).on(model):
        scores = hf.logits(model, states.hidden)
    return (scores[:, list(UPPER)].logsumexp(-1) - scores[:, list(LOWER)].logsumexp(-1)).mean().item()


class Killed(BaseException):
    """As if the process had ended."""


def killed(
    monkeypatch: pytest.MonkeyPatch, module: object, name: str, which: int, last: bool = False
) -> None:
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

    monkeypatch.setattr(module, name, dies)


# --- what is learned --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_training_finds_what_is_planted(main_model, kind):
    steer = train_lm_steer(main_model, None, *planted(), **FAST | PLANTED | {"adaptor_class": kind})
    losses = steer.card["held out"]
    assert losses["steered"] < losses["plain"] - 0.5
    assert losses["steered"] < losses["reversed"] - 0.3
    assert losses["plain"] == pytest.approx(plain_loss(main_model, steer), rel=1e-3)
    assert np.mean(steer.card["losses"][-3:]) < np.mean(steer.card["losses"][:3])
    assert steer.steer_values is None
    assert not any(t.requires_grad or t.device.type != "cpu" for t in steer.tensors().values())


def held_out(count: int, validation: float = 0.2, seed: int = 0) -> list[int]:
    """Which texts no step sees, by what the module says of itself: a share, drawn by the seed."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    return sorted(order[: round(validation * count)].tolist())


@torch.no_grad()
def plain_loss(model: torch.nn.Module, steer: HeadSteer) -> float:
    rows = [planted()[0][i] for i in held_out(40)]
    assert steer.card["texts"]["tokens held out"] == 12 * len(rows)
    probs = [model(torch.tensor([row])).logits[0, :-1].log_softmax(-1) for row in rows]
    return -torch.cat([p[range(len(p)), row[1:]] for p, row in zip(probs, rows, strict=True)]).mean().item()


@pytest.mark.parametrize(("name", "sign", "dummy"), [("plain", 0, 0), ("steered", 1, 1), ("reversed", -1, 1)])
@torch.no_grad()
def test_the_verdict_is_that_of_whole_passes_and_reverses_the_labels_alone(name, sign, dummy):
    (rows, labels), model, steer = planted(), tiny("llama"), trained(**PLANTED)
    losses = []
    for i in held_out(40):
        with steer.at([sign * labels[i], dummy]).on(model):
            scores = model(torch.tensor([rows[i]])).logits[0, :-1]
        losses.append(torch.nn.functional.cross_entropy(scores, torch.tensor(rows[i][1:])).item())
    assert steer.card["held out"][name] == pytest.approx(np.mean(losses), rel=1e-4)


def test_the_value_moves_the_odds_up_and_down_beyond_the_values_of_training():
    steer = trained(**PLANTED)
    odds = [log_odds(steer, value) for value in (-2, -1, 0, 1, 2)]
    assert odds == sorted(odds)
    assert odds[3] - odds[1] > 1


def test_the_dummy_learns_what_all_texts_share_and_the_steer_what_sets_them_apart():
    rows, labels = planted()
    rows = [[0, *(96 if i % 3 == 0 else token for i, token in enumerate(row[1:]))] for row in rows]
    steer = trained(data=(rows, labels), **PLANTED)
    states = token_states.token_states(tiny("llama"), planted(seed=9)[0])
    shares = {}
    for name, values in {"plain": [0, 0], "dummy": [0, 1], "steer": [1, 0]}.items():
        with steer.at(values).on(tiny("llama")):
            shares[name] = hf.logits(tiny("llama"), states.hidden).softmax(-1)[:, 96].mean().item()
    assert shares["dummy"] > shares["plain"] + 0.1
    assert shares["dummy"] > 2 * shares["steer"]


def test_another_steer_may_be_the_one_that_learns():
    steer = trained(num_steers=3, training_steer=2, dummy_steer=None)
    start = lm_steer_run.new_steer(tiny("llama"), Training(**FAST, num_steers=3, dummy_steer=None))
    for found, first in zip(steer.tensors().values(), start.tensors().values(), strict=True):
        assert torch.equal(found[:2], first[:2])
        assert not torch.equal(found[2], first[2])


def test_a_neutral_label_without_a_dummy_gives_the_plain_loss():
    rows, labels = planted()
    for i in (held := held_out(40)):
        labels[i] = 0
    losses = trained(data=(rows, labels), num_steers=1, dummy_steer=None).card
    assert len(set(losses["held out"].values())) == 1
    assert {loss for _, loss in losses["validation"]} == {losses["held out"]["plain"]}
    assert len(held) == 8


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, [[1, 1], [-1, 1], [0.5, 1], [0, 1]]),
        ({"num_steers": 1, "dummy_steer": None}, [[1], [-1], [0.5], [0]]),
        ({"num_steers": 3, "training_steer": 2, "dummy_steer": 0}, [[1, 0, v] for v in (1, -1, 0.5, 0)]),
    ],
)  # fmt: skip
@pytest.mark.parametrize("kind", [list, np.array, torch.tensor, pd.Series, tuple])
def test_labels_become_the_values_of_one_steer_and_ones_of_the_dummy(settings, expected, kind):
    assert steer_values(kind([1, -1, 0.5, 0]), 4, Training(**settings)).tolist() == expected


# --- what has no influence --------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_seed_gives_the_same_steer_and_the_random_state_stays(kind):
    before = torch.get_rng_state()
    one, two, other = (trained(adaptor_class=kind, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), before)
    assert same(one, two)
    assert not any(torch.equal(t, other.tensors()[name]) for name, t in one.tensors().items())
    torch.manual_seed(99)
    assert same(one, trained(adaptor_class=kind))


@pytest.mark.parametrize("wanted", [False, True])
def test_the_model_keeps_every_bit_and_every_flag(wanted):
    model = new_model(CONFIGS["gpt2"]()).requires_grad_(wanted)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    steer = train_lm_steer(model, None, *planted(), **FAST)
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())
    assert all(weight.grad is None and weight.requires_grad == wanted for weight in model.parameters())
    assert same(steer, trained("gpt2"))


@pytest.mark.parametrize("kind", KINDS)
def test_how_texts_were_padded_and_logits_parted_changes_nothing(monkeypatch, kind):
    rows, labels = planted()
    rows = [row[: 3 + i % 10] for i, row in enumerate(rows)]
    whole = trained(data=(rows, labels), adaptor_class=kind)
    monkeypatch.setattr(token_states, "TEXTS_PER_PASS", 1)  # no padding at all
    monkeypatch.setattr(lm_steer_run, "ROOM", 97 * 5)
    parts = trained(data=(rows, labels), adaptor_class=kind)
    assert parts.card["losses"] == pytest.approx(whole.card["losses"], abs=1e-4)
    for name, tensor in whole.tensors().items():
        assert (parts.tensors()[name] - tensor).norm() < 1e-2 * tensor.norm()


def test_texts_are_read_as_their_tokens(tokenizer):
    texts = ["good day", "bad night", "fine thing", "poor stuff"] * 3
    ids = [[0, *tokenizer(text)["input_ids"]] for text in texts]
    labels = [1, -1] * 6
    steer = train_lm_steer(tiny("llama"), tokenizer, texts, labels, **FAST)
    assert same(steer, trained(data=(ids, labels)))
    assert same(steer, train_lm_steer(tiny("llama"), tokenizer, pd.Series(texts), labels, **FAST))


def test_with_padding_in_the_loss_the_end_token_is_learned():
    rows, labels = planted()
    rows = [row if i == 3 else row[:3] for i, row in enumerate(rows)]
    settings = PLANTED | {"data": (rows, labels)}
    states = token_states.token_states(tiny("llama"), planted(seed=9)[0])
    shares = []
    for pad_in_loss in (False, True):
        steer = trained(pad_in_loss=pad_in_loss, **settings)
        with steer.at([1.0, 1.0]).on(tiny("llama")):
            shares.append(hf.logits(tiny("llama"), states.hidden).softmax(-1)[:, 0].mean().item())
    assert shares[1] > 5 * shares[0]


# --- what is held out -------------------------------------------------------------------------------------


def test_no_step_sees_a_text_held_out(monkeypatch):
    rows, _ = planted()
    seen, update = [], lm_steer_run.update

    def noted(model, steer, optimizer, batch, regularization):
        seen.append(batch[0])
        return update(model, steer, optimizer, batch, regularization)

    monkeypatch.setattr(lm_steer_run, "update", noted)
    steer = trained()
    states, seen = token_states.token_states(tiny("llama"), rows), torch.cat(seen)
    whose = [states.text[(states.hidden == state).all(-1)].tolist() for state in seen]
    texts = {where[0] for where in whose if len(where) == 1}  # texts that begin alike share states
    assert len(texts) > 25
    assert texts & set(held_out(40)) == set()
    assert steer.card["texts"] == {"all": 40, "cut": 0, "tokens": 32 * 12, "tokens held out": 8 * 12}


def test_texts_sorted_by_label_are_tried_on_both_labels(monkeypatch):
    """Of many texts held out, some tokens are taken; not the first, which would all be of one label."""
    monkeypatch.setattr(lm_steer_fit, "HELD_TOKENS", 60)
    rows, labels = planted(80)
    order = sorted(range(80), key=lambda i: labels[i])
    states = token_states.token_states(tiny("llama"), [rows[i] for i in order])
    _, held = lm_steer_fit._split(states, 80, Training(validation=0.5))
    assert len(held) == len(set(held.tolist())) == 60
    share = sum(labels[order[i]] > 0 for i in states.text[held]) / 60
    assert 0.2 < share < 0.8


def test_the_state_with_the_lowest_loss_on_texts_held_out_is_returned():
    settings = {"epsilon": 1.0, "lr": 0.1, "n_steps": 150, "data": planted(12)}  # it overfits soon
    steer = trained(**settings)
    steps, losses = zip(*steer.card["validation"], strict=True)
    best = losses.index(min(losses))
    assert steer.card["training"]["kept step"] == steps[best]
    assert steer.card["held out"]["steered"] == pytest.approx(losses[best], abs=1e-5)
    assert min(losses) < losses[-1]


def test_four_looks_without_a_lower_loss_end_the_training(monkeypatch):
    looks = iter([5.0, 4.0, 4.5, 4.5, 4.0, 4.1, 4.2, 4.3, 4.4, 4.5])
    monkeypatch.setattr(lm_steer_run.Run, "_loss", lambda *args: next(looks, 9.0))
    run = trained(n_steps=50).card
    assert run["training"]["steps"] == 45  # the loss of step 25 was as low as that of step 10
    assert run["training"]["kept step"] == 25
    assert [step for step, _ in run["validation"]] == list(range(5, 50, 5))
    assert len(run["losses"]) == 45


@pytest.mark.parametrize(
    ("steps", "looks"),
    [
        (1, [1]),
        (7, list(range(1, 8))),
        (10, list(range(1, 11))),
        (25, [*range(2, 25, 2), 25]),
        (40, list(range(4, 41, 4))),
    ],
)  # fmt: skip
def test_the_run_looks_at_texts_held_out_and_always_after_its_last_step(steps, looks):
    assert [step for step, _ in trained(n_steps=steps, lr=1e-4).card["validation"]] == looks


def test_the_learning_rate_falls_to_zero_in_a_straight_line(monkeypatch):
    rates, update = [], lm_steer_run.update

    def noted(model, steer, optimizer, *args):
        rates.append(optimizer.param_groups[0]["lr"])
        return update(model, steer, optimizer, *args)

    monkeypatch.setattr(lm_steer_run, "update", noted)
    trained(n_steps=8, lr=0.4)
    assert rates == pytest.approx([0.4 * (1 - i / 8) for i in range(8)])


# --- the card ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_card_says_on_what_how_and_how_well_and_survives_saving(kind, tmp_path):
    steer = trained(adaptor_class=kind, n_steps=5, seed=3)
    card = steer.card
    assert card["training"]["n_steps"] == card["training"]["steps"] == 5
    assert (card["training"]["adaptor_class"], card["training"]["seed"]) == (kind, 3)
    assert card["held out"].keys() == {"plain", "steered", "reversed"}
    assert len(card["losses"]) == len(card["validation"]) == 5
    steer.save_pretrained(tmp_path)
    loaded = HeadSteer.from_pretrained(tmp_path, tiny("llama"))
    assert same(loaded, steer)
    assert type(loaded) is {"multiply": LMSteer, "add": AddSteer, "offset": OffsetSteer}[kind]


def test_settings_in_numpys_numbers_can_be_saved(tmp_path):
    steer = trained(n_steps=np.int64(2), lr=np.float32(0.01), seed=np.int32(4), folder=tmp_path)
    steer.save_pretrained(tmp_path)
    assert HeadSteer.from_pretrained(tmp_path).card["training"]["n_steps"] == 2


# --- what is refused --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"adaptor_class": "lora"}, "adaptor_class must be one of multiply, add, offset, not 'lora'"),
        *(({name: bad}, rf"{name} must be a whole number from 1, not {bad}")
          for name in ("num_steers", "rank", "n_steps", "batch_tokens") for bad in (0, -1, 1.5)),
        *(({name: bad}, rf"{name} must be above 0 and finite, not {bad}")
          for name in ("lr", "init_var", "epsilon") for bad in (0, -1, math.nan, math.inf)),
        *(({"regularization": bad}, "regularization must be 0 or more, finite")
          for bad in (-1, math.nan, math.inf)),
        *(({"max_length": bad}, "max_length must be a whole number from 2") for bad in (1, -3, 2.5)),
        *(({"validation": bad}, "validation must be a share between 0 and 1") for bad in (0, 1, math.nan)),
        *(({"training_steer": bad}, r"training_steer must be one of \[0, 1\]") for bad in (2, -1)),
        ({"dummy_steer": 0}, r"dummy_steer must be one of \[None, 1\], not 0"),
        ({"dummy_steer": 2}, r"dummy_steer must be one of \[None, 1\], not 2"),
        ({"num_steers": 1}, r"dummy_steer must be one of \[None\], not 1"),
        ({"training_steer": 1}, r"dummy_steer must be one of \[None, 0\], not 1"),
    ],
)  # fmt: skip
def test_settings_out_of_range_are_refused_before_anything_is_computed(monkeypatch, setting, message):
    monkeypatch.setattr(lm_steer_fit, "token_states", None)
    with pytest.raises(ValueError, match=message):
        trained(**setting)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([1, -1] * 19, r"40 texts, labels of shape \(38,\)"),
        ([[1, -1]] * 20, r"40 texts, labels of shape \(20, 2\)"),
        (1.0, r"40 texts, labels of shape \(\)"),
        ([1, -1.5] * 20, r"from -1 to 1, not -1\.5"),
        ([2, 0] * 20, r"from -1 to 1, not 2\.0"),
        ([1, math.nan] * 20, "from -1 to 1, not nan"),
        ([1, math.inf] * 20, "from -1 to 1, not inf"),
        ([0.0] * 40, "all labels are 0, so there is nothing to learn"),
    ],
)
def test_labels_that_say_nothing_are_refused(monkeypatch, labels, message):
    monkeypatch.setattr(lm_steer_fit, "token_states", None)
    with pytest.raises(ValueError, match=message):
        trained(data=(planted()[0], labels))


@pytest.mark.parametrize(
    ("texts", "labels", "message"),
    [
        ("a text", [1], "give a list of texts, not 'a text'"),
        ([], [], r"give a list of texts, not \[\]"),
        (["good", "", "bad"], [1, 0, -1], r"index 1 has no tokens \(''\): leave it out"),
        (pd.Series(["good", "", "bad"], index=[7, 8, 9]), [1, 0, -1], r"index 1 has no tokens \(''\)"),
        ([[0, 5], [0]], [1, -1], r"index 1 has no tokens \(\[0\]\)"),
        (["good"], [1], "1 texts are too few to hold some out"),
        (["good", "bad", "fine"], [1, -1, 1], "3 texts are too few to hold some out"),
    ],
)
def test_texts_that_cannot_be_learned_from_are_refused(tokenizer, texts, labels, message):
    with pytest.raises(ValueError, match=message):
        train_lm_steer(tiny("llama"), tokenizer, texts, labels, **FAST | {"validation": 0.9})


def test_texts_that_were_cut_are_counted():
    rows, labels = planted()
    rows = [row[:6] if i % 4 else row for i, row in enumerate(rows)]
    with pytest.warns(UserWarning, match="10 of 40 texts are cut after max_length=6 tokens") as caught:
        steer = trained(data=(rows, labels), max_length=6)
    assert caught[0].filename == __file__
    assert steer.card["texts"] == {"all": 40, "cut": 10, "tokens": 32 * 5, "tokens held out": 8 * 5}
    short = trained(data=([row[:6] for row in rows], labels), max_length=6)
    assert all(torch.equal(tensor, short.tensors()[name]) for name, tensor in steer.tensors().items())


# --- losses that are not finite ---------------------------------------------------------------------------


def broken_from(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """From that step on, the loss is NaN."""
    count, update = 0, lm_steer_run.update

    def breaks(*args):
        nonlocal count
        count += 1
        return update(*args) if count <= step else math.nan

    monkeypatch.setattr(lm_steer_run, "update", breaks)


def test_a_loss_that_is_not_finite_from_the_start_is_refused(monkeypatch):
    broken_from(monkeypatch, 0)
    with pytest.raises(ValueError, match=r"the loss is nan at step 0 with lr=0\.01: lower lr or epsilon"):
        trained()


@pytest.mark.parametrize(("step", "kept"), [(2, 2), (3, 2), (15, 14)])
def test_a_loss_that_is_not_finite_later_ends_training_with_the_best_state(monkeypatch, step, kept):
    whole = trained()
    broken_from(monkeypatch, step)
    with pytest.warns(
        UserWarning, match=rf"nan at step {step} .*Training ends; the steer of step {kept}"
    ) as caught:
        steer = trained()
    assert caught[0].filename == __file__
    assert (steer.card["training"]["kept step"], steer.card["training"]["steps"]) == (kept, step)
    assert steer.card["losses"] == whole.card["losses"][:step]
    assert steer.card["held out"]["steered"] == dict(whole.card["validation"])[kept]


@pytest.mark.parametrize("steps", [1, 2, 30])
@pytest.mark.parametrize("kind", KINDS)
def test_steps_far_too_large_are_refused_however_few(kind, steps):
    """With one step alone, only the look after it can tell."""
    with pytest.raises(ValueError, match=r"lower lr or epsilon"):
        trained(adaptor_class=kind, n_steps=steps, lr=1e36, epsilon=1e3)


@pytest.mark.parametrize("odd", [math.nan, math.inf])
@pytest.mark.parametrize("at", [1, 2])
def test_one_odd_look_does_not_hide_those_that_follow(monkeypatch, odd, at):
    losses = [5.0, 4.0, 3.0, 2.0, 2.5]  # the first look may not be odd: see above
    losses[at] = odd
    looks = iter(losses)
    monkeypatch.setattr(lm_steer_run.Run, "_loss", lambda *args: next(looks, 9.0))
    assert trained(n_steps=5).card["training"]["kept step"] == 4


# --- killed, and gone on ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def uninterrupted() -> dict[str, HeadSteer]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CI", "1")
        return {kind: trained(adaptor_class=kind) for kind in KINDS}


@pytest.mark.parametrize(
    ("module", "name"),
    [(lm_steer_run, "update"), (checkpoint, "save_one"), (checkpoint, "write_atomically"), (Path, "replace")],
)  # fmt: skip
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("which", [0, 1, 2, 3, 5, 8, 9, 11, 19])
def test_a_run_killed_anywhere_and_started_again_gives_the_same_steer(
    monkeypatch, tmp_path, uninterrupted, module, name, which, last
):
    with monkeypatch.context() as patch, suppress(Killed):
        killed(patch, module, name, which, last)
        trained(folder=tmp_path)
    assert same(trained(folder=tmp_path), uninterrupted["multiply"])


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_killed_twice_reads_no_text_and_takes_no_step_again(monkeypatch, tmp_path, uninterrupted, kind):
    steps, update = [], lm_steer_run.update
    for which in (5, 7):
        with monkeypatch.context() as patch:
            killed(patch, lm_steer_run, "update", which)
            with pytest.raises(Killed):
                trained(adaptor_class=kind, folder=tmp_path)
    monkeypatch.setattr(hf, "forward", None)
    monkeypatch.setattr(lm_steer_run, "update", lambda *args: steps.append(1) or update(*args))
    assert same(trained(adaptor_class=kind, folder=tmp_path), uninterrupted[kind])
    assert len(steps) == 20 - 10  # looks, and so writes, after each second step: at 4, and 4 + 6
    assert same(trained(adaptor_class=kind, folder=tmp_path), uninterrupted[kind])
    assert len(steps) == 20 - 10


def test_a_run_that_ended_early_has_ended_when_it_is_started_again(monkeypatch, tmp_path):
    settings = {"epsilon": 1.0, "lr": 0.1, "n_steps": 150, "data": planted(12)}  # it overfits soon
    steer = trained(folder=tmp_path, **settings)
    assert steer.card["training"]["steps"] < 150
    monkeypatch.setattr(lm_steer_run, "update", None)
    assert same(trained(folder=tmp_path, **settings), steer)


def other_ids() -> dict:
    """The same tokens in another order."""
    rows, labels = planted()
    rows[0][1:] = rows[0][:0:-1]
    return {"data": (rows, labels)}


def other_ends() -> dict:
    """The same tokens, of which two belong to other texts; labels are the same."""
    rows, labels = planted()
    flat = [token for row in rows for token in row[1:]]
    lengths = [11, 12, 13, *[12] * 37]
    starts = np.cumsum([0, *lengths])
    return {"data": ([[0, *flat[s : s + n]] for s, n in zip(starts, lengths, strict=False)], labels)}


def other_labels() -> dict:
    rows, labels = planted()
    return {"data": (rows, [-label for label in labels])}


OTHERS = [
    *(lambda name=name, value=value: {name: value} for name, value in {
        "n_steps": 21, "lr": 0.02, "seed": 1, "rank": 5, "epsilon": 0.2, "batch_tokens": 32,
        "adaptor_class": "add", "regularization": 0.1, "init_var": 0.1, "validation": 0.3,
        "dummy_steer": None}.items()),
    other_ids, other_ends, other_labels, lambda: {"architecture": "gpt2"},
]  # fmt: skip


@pytest.mark.parametrize("other", OTHERS)
def test_a_folder_with_another_run_in_it_is_refused(tmp_path, other: Callable[[], dict]):
    steer = trained(folder=tmp_path)
    with pytest.raises(
        ValueError, match=r"training\.safetensors belongs to a run with other .*another folder"
    ):
        trained(folder=tmp_path, **other())
    assert same(trained(folder=tmp_path), steer)


def test_a_damaged_run_is_named(tmp_path):
    trained(folder=tmp_path)
    path = tmp_path / "training.safetensors"
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ValueError, match=r"training\.safetensors is damaged"):
        trained(folder=tmp_path)


def test_a_run_in_a_folder_gives_the_steer_of_one_in_memory_without_warnings(tmp_path, uninterrupted):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert same(trained(folder=str(tmp_path / "new")), uninterrupted["multiply"])
