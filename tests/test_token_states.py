"""States of all tokens: those of a plain pass text by text, and what a folder keeps of them."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import CONFIGS, MAIN, new_model, small_tokenizer, tiny
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from torch import Tensor
from transformers import GPT2Config, PreTrainedModel, PreTrainedTokenizerFast

import steer_utils as su
from steer_utils import checkpoint, hf
from steer_utils.lm_steer import token_states
from steer_utils.lm_steer.steer import AddSteer
from steer_utils.lm_steer.token_states import TokenStates

LENGTHS = [9, 2, 5, 30, 3, 2, 17, 9, 4]
CLOSE = {"atol": 2e-5, "rtol": 1e-5}


def texts(lengths: list[int] = LENGTHS, seed: int = 0) -> list[list[int]]:
    """Rows of these lengths, BOS (0) in front; 0 is inside them as well, and at some ends."""
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randint(0, 97, (length,), generator=generator).tolist() for length in lengths]
    rows = [[0, *row[1:]] for row in rows]
    rows[0][3:5] = rows[-1][-2:] = [0, 0]
    return rows


@torch.no_grad()
def one_by_one(model: PreTrainedModel, rows: list[list[int]]) -> Tensor:
    """The states of each text alone, its last token's left out, with nothing of this package."""
    return torch.cat([model.base_model(torch.tensor([row])).last_hidden_state[0, :-1] for row in rows])


def same(one: TokenStates, other: TokenStates) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


class Killed(BaseException):
    """As if the process had ended."""


@pytest.fixture
def passes(monkeypatch) -> list[int]:
    """How many texts each forward pass read."""
    seen, forward = [], hf.forward

    def counted(model: PreTrainedModel, input_ids: Tensor, *args, **kwargs):
        seen.append(len(input_ids))
        return forward(model, input_ids, *args, **kwargs)

    monkeypatch.setattr(hf, "forward", counted)
    return seen


@pytest.fixture
def small_passes(monkeypatch) -> None:
    monkeypatch.setattr(token_states, "TEXTS_PER_PASS", 2)


def killed_before(which: int, monkeypatch: pytest.MonkeyPatch, module: object, name: str) -> None:
    """Calls of a function up to this one go through."""
    count, function = 0, getattr(module, name)

    def dies(*args, **kwargs):
        nonlocal count
        count += 1
        if count > which:
            raise Killed
        return function(*args, **kwargs)

    monkeypatch.setattr(module, name, dies)


# --- the states -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 4, 32])
def test_states_are_those_of_each_text_alone_in_the_order_given(main_model, monkeypatch, size):
    monkeypatch.setattr(token_states, "TEXTS_PER_PASS", size)
    rows = texts()
    found = token_states.token_states(main_model, rows)
    torch.testing.assert_close(found.hidden, one_by_one(main_model, rows), **CLOSE)
    assert found.next_ids.tolist() == [token for row in rows for token in row[1:]]
    assert found.text.tolist() == [i for i, row in enumerate(rows) for _ in row[1:]]
    assert len(found.hidden) == sum(LENGTHS) - len(LENGTHS)
    assert not found.hidden.requires_grad


def test_every_architecture_gives_its_last_state(any_model):
    rows = texts([12, 5])
    hidden = token_states.token_states(any_model, rows).hidden
    with torch.no_grad():
        expected = torch.cat([any_model(torch.tensor([row])).logits[0, :-1] for row in rows])
        torch.testing.assert_close(hf.logits(any_model, hidden), expected, atol=2e-4, rtol=1e-4)


def test_the_next_ids_are_as_likely_as_the_model_says(main_model):
    rows = texts()
    hidden, next_ids, text = token_states.token_states(main_model, rows)
    found = hf.logits(main_model, hidden).log_softmax(-1).gather(1, next_ids[:, None])[:, 0]
    for i, expected in enumerate(su.metrics.token_log_probs(main_model, None, rows)):
        torch.testing.assert_close(found[text == i], expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("architecture", MAIN)
def test_a_model_in_bfloat16_gives_and_keeps_its_own_dtype(architecture, tmp_path):
    model, rows = new_model(CONFIGS[architecture]()).bfloat16(), texts()
    found = token_states.token_states(model, rows, folder=tmp_path)
    assert found.hidden.dtype == torch.bfloat16
    assert (tmp_path / "states.bin").stat().st_size == 2 * found.hidden.numel()
    torch.testing.assert_close(found.hidden, one_by_one(model, rows), atol=0.1, rtol=0.1)
    assert same(token_states.token_states(model, rows, folder=tmp_path), found)


@pytest.mark.parametrize("place", ["block", "head"])
def test_steers_that_are_on_are_not_felt(main_model, place):
    rows, push = texts(), 9 * torch.randn(1, 32, generator=torch.Generator().manual_seed(0))
    vector = su.SteeringVector("blocks.1.hook_resid_pre", push, positions="all")
    steer = vector if place == "block" else AddSteer(torch.ones(1, 32), epsilon=9.0).at(1.0)
    plain = token_states.token_states(main_model, rows)
    with steer.on(main_model):
        assert same(token_states.token_states(main_model, rows), plain)


def test_nothing_is_left_on_the_model_and_the_random_state_stays(main_model):
    before, hooks = torch.get_rng_state(), [len(m._forward_hooks) for m in main_model.modules()]
    token_states.token_states(main_model, texts())
    assert torch.equal(torch.get_rng_state(), before)
    assert [len(m._forward_hooks) for m in main_model.modules()] == hooks


@pytest.mark.usefixtures("small_passes")
@pytest.mark.parametrize("ends", [7, [7, 8]])
def test_with_padding_in_the_loss_each_batch_is_filled_with_the_end_token(monkeypatch, ends):
    model, rows = tiny("llama"), [[0, 1, 2], [0, 3], [0, 4, 5, 6, 7], [0, 1, 1], [0, 9]]
    monkeypatch.setattr(model.generation_config, "eos_token_id", ends)
    filled = [[0, 1, 2], [0, 3, 7], [0, 4, 5, 6, 7], [0, 1, 1, 7, 7], [0, 9]]
    found = token_states.token_states(model, rows, pad_in_loss=True)
    torch.testing.assert_close(found.hidden, one_by_one(model, filled), **CLOSE)
    assert same(found, token_states.token_states(model, filled))
    assert rows[1] == [0, 3]


# --- in a folder ------------------------------------------------------------------------------------------


def test_what_is_in_the_folder_is_the_same_and_is_not_computed_again(main_model, passes, tmp_path):
    rows = texts()
    plain = token_states.token_states(main_model, rows)
    first = token_states.token_states(main_model, rows, folder=str(tmp_path / "new" / "deep"))
    assert same(first, plain)
    assert passes == [9, 9]
    again = token_states.token_states(main_model, rows, folder=tmp_path / "new" / "deep")
    assert same(again, plain)
    assert passes == [9, 9]


@pytest.mark.usefixtures("small_passes")
@pytest.mark.parametrize(
    ("module", "name"), [(hf, "forward"), (checkpoint, "write_atomically"), (Path, "replace")]
)
@pytest.mark.parametrize("which", [0, 1, 2, 4, 5])
def test_killed_in_the_middle_and_resumed_gives_the_same(monkeypatch, tmp_path, module, name, which, request):
    rows, model = texts(), tiny("llama")
    plain = token_states.token_states(model, rows)
    killed_before(which, monkeypatch, module, name)
    done = 0
    try:
        token_states.token_states(model, rows, folder=tmp_path)
    except Killed:
        if (tmp_path / "states.json").is_file():
            done = json.loads((tmp_path / "states.json").read_text())["texts"]
    else:
        done = len(rows)
    monkeypatch.undo()
    monkeypatch.setenv("CI", "1")
    monkeypatch.setattr(token_states, "TEXTS_PER_PASS", 2)
    seen = request.getfixturevalue("passes")
    assert same(token_states.token_states(model, rows, folder=tmp_path), plain)
    assert sum(seen) == len(rows) - done
    assert module is not hf or done == min(2 * which, len(rows))


def changed_dtype() -> tuple[PreTrainedModel, list[list[int]]]:
    return new_model(CONFIGS["llama"]()).bfloat16(), texts()


def changed_ids() -> tuple[PreTrainedModel, list[list[int]]]:
    rows = texts()
    rows[3][7:9] = rows[3][8:6:-1]
    return tiny("llama"), rows


def changed_order() -> tuple[PreTrainedModel, list[list[int]]]:
    return tiny("llama"), texts()[::-1]


def changed_lengths() -> tuple[PreTrainedModel, list[list[int]]]:
    return tiny("llama"), texts([*LENGTHS, 5])


def fewer() -> tuple[PreTrainedModel, list[list[int]]]:
    return tiny("llama"), texts(LENGTHS[:-2])


def changed_architecture() -> tuple[PreTrainedModel, list[list[int]]]:
    return tiny("gpt2"), texts()


def changed_weights() -> tuple[PreTrainedModel, list[list[int]]]:
    """As a model whose head stays as it was when the rest is trained."""
    model = new_model(CONFIGS["llama"]())
    model.model.layers[1].mlp.up_proj.weight.data.mul_(1.5)
    return model, texts()


CHANGES = [
    changed_ids, changed_order, changed_lengths, fewer, changed_dtype, changed_architecture, changed_weights
]  # fmt: skip
Changed = Callable[[], tuple[PreTrainedModel, list[list[int]]]]


@pytest.mark.parametrize("change", CHANGES)
def test_states_of_something_else_in_the_folder_are_recognised(tmp_path, passes, change: Changed):
    token_states.token_states(tiny("llama"), texts(), folder=tmp_path)
    model, rows = change()
    expected = token_states.token_states(model, rows)
    assert same(token_states.token_states(model, rows, folder=tmp_path), expected)
    count = len(passes)
    assert same(token_states.token_states(model, rows, folder=tmp_path), expected)
    assert len(passes) == count, "these states should have been in the folder by now"


def test_states_that_are_in_use_stay_when_the_folder_gets_others(tmp_path):
    rows = texts()
    found = token_states.token_states(tiny("llama"), rows, folder=tmp_path)
    expected = found.hidden.clone()
    token_states.token_states(*changed_ids(), folder=tmp_path)
    assert torch.equal(found.hidden, expected)


@pytest.mark.usefixtures("small_passes")
@pytest.mark.parametrize("which", range(3))
def test_the_first_texts_come_back_right_after_a_killed_run_over_others(tmp_path, monkeypatch, which):
    """What is said of the folder must not outlive what was in it."""
    (model, others), rows = changed_order(), texts()
    plain = token_states.token_states(model, rows)
    token_states.token_states(model, rows, folder=tmp_path)
    with monkeypatch.context() as patch:
        killed_before(which, patch, checkpoint, "write_atomically")
        with pytest.raises(Killed):
            token_states.token_states(model, others, folder=tmp_path)
    assert same(token_states.token_states(model, rows, folder=tmp_path), plain)


@pytest.mark.usefixtures("small_passes")
@pytest.mark.parametrize("which", range(3))
@pytest.mark.parametrize("left", [0.0, 0.4, 1.1])
def test_a_file_of_another_size_is_computed_anew_even_if_that_is_killed(tmp_path, monkeypatch, which, left):
    model, rows = tiny("llama"), texts()
    plain = token_states.token_states(model, rows, folder=tmp_path)
    expected = TokenStates(plain.hidden.clone(), *plain[1:])
    data = (tmp_path / "states.bin").read_bytes()
    (tmp_path / "states.bin").unlink()
    (tmp_path / "states.bin").write_bytes((data + data)[: int(left * len(data))])
    with monkeypatch.context() as patch:
        killed_before(which, patch, checkpoint, "write_atomically")
        with pytest.raises(Killed):
            token_states.token_states(model, rows, folder=tmp_path)
    assert same(token_states.token_states(model, rows, folder=tmp_path), expected)


@pytest.mark.parametrize("note", ["", "{", "[]", "3", '{"of": 3}', '{"texts": 9}', None])
def test_states_with_a_note_that_says_nothing_are_computed_anew(tmp_path, passes, note):
    model, rows = tiny("llama"), texts()
    plain = token_states.token_states(model, rows, folder=tmp_path)
    (tmp_path / "states.json").unlink()
    if note is not None:
        (tmp_path / "states.json").write_text(note)
    assert same(token_states.token_states(model, rows, folder=tmp_path), plain)
    assert sum(passes) == 2 * len(rows)


def test_padding_in_the_loss_is_not_taken_for_the_same_texts(tmp_path):
    model, rows = tiny("llama"), texts()
    token_states.token_states(model, rows, folder=tmp_path)
    expected = token_states.token_states(model, rows, pad_in_loss=True)
    assert same(token_states.token_states(model, rows, folder=tmp_path, pad_in_loss=True), expected)


# --- of two models ----------------------------------------------------------------------------------------


def state_after(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, text: str) -> Tensor:
    with torch.no_grad():
        return model.base_model(torch.tensor([su.models.token_ids(tokenizer, text)])).last_hidden_state[0, -1]


def test_states_of_two_models_are_paired_where_they_have_read_the_same_characters():
    """Every pair is the state of both models after the same beginning of a text, read alone."""
    vocabulary = {token: i for i, token in enumerate(["<s>", "▁", "▁the", "▁cat", *"aceht"])}
    pieces = Tokenizer(BPE(vocabulary, [], ignore_merges=True))  # "the" is one token, as is " cat"
    pieces.pre_tokenizer, pieces.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    wordwise = PreTrainedTokenizerFast(tokenizer_object=pieces, bos_token="<s>")
    wide = {"n_embd": 24, "n_layer": 1, "n_head": 2, "vocab_size": 270, "bos_token_id": 0, "eos_token_id": 0}
    one, other, tokenizers = tiny("llama"), new_model(GPT2Config(**wide)), (wordwise, small_tokenizer("gpt2"))
    text = "the cat"
    left, right = token_states.paired_states((one, tokenizers[0]), (other, tokenizers[1]), [text])
    beginnings = ["the", "the cat"]  # one token each, and seven characters
    assert len(left) == len(right) == len(beginnings)
    for i, beginning in enumerate(beginnings):
        torch.testing.assert_close(left[i], state_after(one, tokenizers[0], beginning), **CLOSE)
        torch.testing.assert_close(right[i], state_after(other, tokenizers[1], beginning), **CLOSE)
