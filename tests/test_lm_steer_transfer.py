"""Transfer: the four methods on tables made by hand, on models, and what they refuse."""

import pytest
import torch
from conftest import CONFIGS, new_model, random_ids, small_tokenizer, tiny
from test_lm_steer_words import WORDS, close, some, steer, word_tokenizer
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from torch import Tensor
from transformers import GPT2Config, PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast

import steer_utils as su
from steer_utils import hf
from steer_utils.lm_steer.transfer import (
    USES,
    closed_form,
    learned,
    paired_states,
    shared_tokens,
    transferred,
)
from steer_utils.lm_steer.words import token_texts

CLOSE = {"atol": 2e-5, "rtol": 1e-5}


# --- what two models share ----------------------------------------------------------------------------------


def words_at(tokenizer: PreTrainedTokenizerBase, pairs: list[tuple[int, int]], which: int) -> list[str]:
    return [tokenizer.convert_ids_to_tokens(pair[which]) for pair in pairs]


def test_words_are_shared_however_a_tokenizer_writes_their_space():
    piece = word_tokenizer("the", "dog", "cat", sentence_piece=True)
    level = word_tokenizer("cat", "the", "mat", sentence_piece=False)
    pairs = shared_tokens(piece, level)
    assert words_at(piece, pairs, 0) == ["a", "b", "▁", "▁cat", "▁the", "cat", "the"]
    assert words_at(level, pairs, 1) == ["a", "b", "Ġ", "Ġcat", "Ġthe", "cat", "the"]


def test_tokenizers_of_two_families_share_every_printable_character():
    pairs = shared_tokens(small_tokenizer("llama"), small_tokenizer("gpt2"))
    texts = token_texts(small_tokenizer("gpt2"))
    shared = {texts[j] for _, j in pairs}
    assert shared >= {" ", "a", "Z", "~", "\n"}
    assert " the" not in shared
    assert [j for _, j in pairs] == sorted(j for _, j in pairs)


def state_after(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, text: str) -> Tensor:
    with torch.no_grad():
        return model.base_model(torch.tensor([su.models.token_ids(tokenizer, text)])).last_hidden_state[0, -1]


def test_states_of_two_models_are_paired_after_the_same_characters():
    """Every pair is the state of both models after the same beginning of a text, read alone."""
    vocabulary = {token: i for i, token in enumerate(["<s>", "▁", "▁the", "▁cat", *"aceht"])}
    pieces = Tokenizer(BPE(vocabulary, [], ignore_merges=True))  # "the" is one token, as is " cat"
    pieces.pre_tokenizer, pieces.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    wordwise = PreTrainedTokenizerFast(tokenizer_object=pieces, bos_token="<s>")
    wide = {"n_embd": 24, "n_layer": 1, "n_head": 2, "vocab_size": 270, "bos_token_id": 0, "eos_token_id": 0}
    one, other, tokenizers = tiny("llama"), new_model(GPT2Config(**wide)), (wordwise, small_tokenizer("gpt2"))
    text = "the cat"
    left, right = paired_states((one, tokenizers[0]), (other, tokenizers[1]), [text])
    beginnings = ["the", "the cat"]  # one token each, and seven characters
    assert len(left) == len(right) == len(beginnings)
    for i, beginning in enumerate(beginnings):
        torch.testing.assert_close(left[i], state_after(one, tokenizers[0], beginning), **CLOSE)
        torch.testing.assert_close(right[i], state_after(other, tokenizers[1], beginning), **CLOSE)


def test_no_state_inside_a_character_is_paired():
    """GPT-2's tokens here are bytes, of which é has two; the other tokenizer has a token for it."""
    model, other = character_models()
    vocabulary = {token: i for i, token in enumerate(["<s>", "a", "b", "é"])}
    whole = Tokenizer(BPE(vocabulary, []))
    whole.decoder = decoders.Fuse()
    letters = PreTrainedTokenizerFast(tokenizer_object=whole, bos_token="<s>")
    left, right = paired_states((model, letters), (other, small_tokenizer("gpt2")), ["aéb"])
    assert len(left) == len(right) == 3
    for i, beginning in enumerate(["a", "aé", "aéb"]):
        torch.testing.assert_close(left[i], state_after(model, letters, beginning), **CLOSE)
        torch.testing.assert_close(right[i], state_after(other, small_tokenizer("gpt2"), beginning), **CLOSE)


# --- transfer -----------------------------------------------------------------------------------------------


TEXTS = ["the cat sat on the mat", "A dog sang; & then", "sixty  words", "naïve, é!"] * 3


@pytest.mark.parametrize("method", USES)
def test_between_identical_tables_a_steer_stays_itself(method: str):
    words, given = some(60, 16), steer(width=16).at([1.0, -2.0])
    states = some(80, 16, seed=6)
    how = {"learned": {"lr": 0.02}, "states": {"states": (states, states)}}.get(method, {})
    found = transferred(given, words, words, method=method, **how)
    close(found.matrix(), given.matrix(), 1e-3 if method == "learned" else 1e-6)
    assert found.names == given.names


@pytest.mark.parametrize("normalize", ["rows", "none"])
def test_between_rotated_tables_a_steer_rotates(normalize: str):
    words, given, states = some(60, 16), steer(width=16).at([1.0, -2.0]), some(80, 16, seed=6)
    rotation = torch.linalg.qr(some(16, 16, seed=3)).Q
    for how in (
        {"normalize": normalize},
        {"method": "logits"},
        {"method": "states", "states": (states, states @ rotation)},
    ):
        found = transferred(given, words, words @ rotation, **how)
        close(found.matrix(), rotation.T @ given.matrix() @ rotation)


def test_a_common_scale_is_lost_with_the_rows_length_or_squared_without():
    words, given = some(60, 16), steer(width=16).at(1.0)
    for how, factor in (({}, 1), ({"normalize": "none"}, 1 / 9), ({"method": "logits"}, 1)):
        found = transferred(given, words, 3 * words, **how)
        close(found.matrix(), factor * given.matrix())


def test_logits_keeps_every_change_of_probability_where_closed_form_cannot():
    """E_t = E_s Q + b for any invertible Q and any b: states h_t = h_s Q⁻ᵀ give the same probabilities."""
    words, given, states = some(200, 16), steer(width=16, epsilon=0.3).at(1.0), some(5, 16, seed=4)
    mix, shift = some(16, 16, seed=3) + 2 * torch.eye(16), some(16, seed=5)
    target, inverse = words @ mix + shift, torch.linalg.inv(mix).T

    def log_probs(steer: su.LMSteer, states: Tensor, words: Tensor) -> Tensor:
        return ((states + states @ steer.matrix()) @ words.T).log_softmax(dim=-1)

    expected = log_probs(given, states, words)
    plain = (states @ words.T).log_softmax(dim=-1)
    close((states @ inverse @ target.T).log_softmax(dim=-1), plain, 1e-3)
    off = {}
    for method in ("closed_form", "logits"):
        moved = transferred(given, words, target, method=method)
        off[method] = (log_probs(moved, states @ inverse, target) - expected).abs().max()
    assert off["logits"] < 1e-3
    assert off["closed_form"] > 0.1 * (expected - plain).abs().max()


def test_states_keeps_what_words_do_not_see():
    """Words in half of the dimensions, states in all of them: only pairs of states tell the other half."""
    mix = some(16, 16, seed=3) + 2 * torch.eye(16)
    words, given, states = some(200, 16), steer(width=16, epsilon=0.3).at(1.0), some(90, 16, seed=4)
    words[:, 8:] = 0
    target, there = words @ mix, states @ torch.linalg.inv(mix).T
    expected = states @ given.matrix() @ words.T
    off = {}
    for method, how in {"logits": {}, "states": {"states": (states, there)}}.items():
        moved = transferred(given, words, target, method=method, **how)
        off[method] = (there @ moved.matrix() @ target.T - expected).norm() / expected.norm()
    assert off["states"] < 1e-4
    assert off["logits"] > 0.3


def test_closed_form_is_no_worse_than_what_is_learned():
    given, wanted = some(80, 12).double(), some(80, 9, seed=1).double()
    exact = closed_form(given, wanted)
    slow = learned(given, wanted, n_steps=3000, lr=0.01, seed=0)
    losses = [(given @ found - wanted).square().mean().item() for found in (exact, slow)]
    assert losses[0] <= losses[1] < 1.001 * losses[0]
    close(exact, torch.linalg.pinv(given) @ wanted)


def test_a_table_without_full_rank_gives_the_smallest_solution():
    words = some(60, 16)
    words[:, 3] = words[:, 2]
    facts = transferred(steer(width=16), words, words).card["transfer"]
    assert facts["condition"] > 1e12
    assert facts["residual"] < 1e-6
    assert closed_form(words.double(), words.double()).norm() < 5


def test_a_map_does_not_live_on_rounding():
    rows = some(400, 16)
    rows[:, 3] = -rows[:, :3].sum(dim=1) - rows[:, 4:].sum(dim=1)  # as behind a LayerNorm
    assert closed_form(rows.double(), some(400, 9, seed=1).double()).norm() < 5


def character_models() -> tuple[PreTrainedModel, PreTrainedModel]:
    """Of different widths; the first goes with SentencePiece's characters, the second with GPT-2's."""
    configs = (
        {**CONFIGS["llama"]().to_dict(), "vocab_size": 400, "model_type": "llama"},
        {"n_embd": 24, "n_layer": 1, "n_head": 2, "vocab_size": 270, "n_positions": 64},
    )
    llama = type(CONFIGS["llama"]()).from_dict(configs[0])
    return new_model(llama), new_model(GPT2Config(**configs[1], bos_token_id=0, eos_token_id=0))


def test_transfer_between_tokenizers_uses_shared_words_in_the_targets_order():
    source, target = character_models()
    tokenizers = small_tokenizer("llama"), small_tokenizer("gpt2")
    given = steer(card={"loss": 1.0}, names=("mood", "dummy")).at([2.0, 1.0])
    found = su.transfer(given, source, tokenizers[0], target, tokenizers[1], method="closed_form", anchors=50)
    ids = torch.tensor(shared_tokens(*tokenizers)[:50])
    tables = [hf.lm_head(model).weight[one] for model, one in zip((source, target), ids.T, strict=True)]
    expected = transferred(given, *tables)
    torch.testing.assert_close(found.projector1, expected.projector1)
    torch.testing.assert_close(found.projector2, expected.projector2)
    assert found.projector1.shape == (2, 24, 4)
    assert (found.names, found.epsilon, found.card["loss"]) == (given.names, given.epsilon, 1.0)
    facts = found.card["transfer"]
    assert (facts["shared words"], facts["anchors"]) == (len(shared_tokens(*tokenizers)), 50)
    assert 0 < facts["residual"] < 1 < facts["condition"]
    with found.on(target):
        assert target(random_ids(1, 5)).logits.isfinite().all()


@pytest.mark.parametrize("method", USES)
def test_a_transferred_steer_is_saved_with_its_facts(method: str, tmp_path):
    source, target = character_models()
    tokenizers = small_tokenizer("llama"), small_tokenizer("gpt2")
    how = {"learned": {"n_steps": 10}, "states": {"texts": TEXTS}}.get(method, {})
    found = su.transfer(steer(), source, tokenizers[0], target, tokenizers[1], method=method, **how)
    found.save_pretrained(tmp_path)
    assert su.LMSteer.from_pretrained(tmp_path, target).card == found.card


def test_transfer_by_states_fits_those_that_both_models_have_after_the_same_characters():
    (source, target), tokenizers = character_models(), (small_tokenizer("llama"), small_tokenizer("gpt2"))
    states = paired_states((source, tokenizers[0]), (target, tokenizers[1]), TEXTS)
    tables = [hf.lm_head(model).weight for model in (source, target)]
    ids = torch.tensor(shared_tokens(*tokenizers)[:4000])
    words = [table[one] for table, one in zip(tables, ids.T, strict=True)]
    expected = transferred(steer(), *words, states=states, method="states")
    found = su.transfer(steer(), source, tokenizers[0], target, tokenizers[1], method="states", texts=TEXTS)
    close(found.projector1, expected.projector1)
    facts = found.card["transfer"]
    assert facts["states"] == len(states[0])
    assert facts["residual of states"] < 1


def test_rows_of_a_head_beyond_the_tokenizer_and_ids_beyond_the_head_are_no_anchors(tokenizer):
    model = tiny("gpt2")
    small = new_model(replace_config(model, vocab_size=60))
    found = su.transfer(steer(), model, tokenizer, small, tokenizer, method="logits")
    assert found.card["transfer"]["shared words"] == 59


def replace_config(model: PreTrainedModel, **changes) -> GPT2Config:
    return GPT2Config.from_dict(model.config.to_dict() | changes)


def test_transfer_refuses(tokenizer):
    model, given = tiny("gpt2"), steer()
    args = (model, tokenizer, model, tokenizer)
    with pytest.raises(ValueError, match=r"31 anchors of 96 shared .* 32 and 32: set anchors to 32 or more"):
        su.transfer(given, *args, anchors=31)
    words = word_tokenizer(*WORDS, sentence_piece=False)
    with pytest.raises(ValueError, match=r"^3 anchors of 3 shared words .* train a steer instead"):
        su.transfer(given, model, tokenizer, model, words)
    with pytest.raises(ValueError, match=r"method must be one of closed_form.*'best'"):
        su.transfer(given, *args, method="best")
    with pytest.raises(ValueError, match="normalize must be one of rows, none, not 'columns'"):
        su.transfer(given, *args, method="closed_form", normalize="columns")
    of_another = {"logits": "normalize", "closed_form": "lr", "learned": "steps", "states": "lr"}
    for method, unused in of_another.items():
        how = {"texts": TEXTS} if method == "states" else {}
        with pytest.raises(ValueError, match=rf"method='{method}' uses .*: leave out {unused}"):
            su.transfer(given, *args, method=method, **how, **{unused: 1})
    with pytest.raises(ValueError, match="method='closed_form' uses normalize: leave out texts"):
        su.transfer(given, *args, method="closed_form", texts=TEXTS)
    with pytest.raises(ValueError, match=r"need texts: give a list .*, not \(\)"):
        su.transfer(given, *args, texts=())
    with pytest.raises(TypeError, match="texts of transfer must be a list of texts, not 'one text'"):
        su.transfer(given, *args, texts="one text")
    with pytest.raises(
        ValueError, match=r"3 pairs of states are too few for widths \(32, 32\): give more texts"
    ):
        su.transfer(given, *args, method="states", texts=["abc"])
    with pytest.raises(ValueError, match="width of 8; the model's is 32"):
        su.transfer(steer(width=8), *args)
    with pytest.raises(TypeError, match="steer of transfer must be LMSteer, not the AddSteer"):
        su.transfer(su.AddSteer(some(2, 32)), *args)
