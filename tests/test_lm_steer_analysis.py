"""LM-Steer read and moved: directions and words, evidence and spans, values of a text, other models."""

import itertools
import math
import re

import numpy as np
import pytest
import torch
from conftest import CONFIGS, TOKENIZERS, hook_count, new_model, random_ids, small_tokenizer, tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from torch import Tensor
from transformers import GPT2Config, PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast

import steer_utils as su
from steer_utils import hf
from steer_utils.lm_steer import evidence as lm_steer_analysis
from steer_utils.lm_steer import vocabulary
from steer_utils.lm_steer.evidence import Evidence, analysed, token_evidence, token_losses
from steer_utils.lm_steer.spans import best_spans
from steer_utils.lm_steer.token_states import paired_states
from steer_utils.lm_steer.transfer import METHODS, closed_form, learned, shared_tokens, transferred
from steer_utils.lm_steer.words import directions, map_of_words, word_scores

TEXT = "a Cat sat, & sang"
WORDS = ("the", "cat", "sat", "Cat", "mat", "sang", "on")
CLOSE = {"atol": 2e-5, "rtol": 2e-5}


def some(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def steer(num_steers: int = 2, width: int = 32, rank: int = 4, **settings) -> su.LMSteer:
    left, right = (some(num_steers, width, rank, seed=seed) for seed in (1, 2))
    return su.LMSteer(left, right, **{"epsilon": 0.05} | settings)


def close(found: Tensor, expected: Tensor, atol: float = 2e-5) -> None:
    torch.testing.assert_close(found, expected, atol=atol, rtol=1e-4)


# --- spans ------------------------------------------------------------------------------------------------


def by_brute_force(numbers: list[float], max_spans: int, max_length: int, gap: int) -> float:
    """The best score of all choices of disjoint spans, by trying each."""

    def best(start: int, left: int) -> float:
        starts = range(start, len(numbers) if left else 0)
        spans = ((a, b) for a in starts for b in range(a + 1, min(a + max_length, len(numbers)) + 1))
        return max([0.0, *(sum(numbers[a:b]) + best(b + gap, left - 1) for a, b in spans)])

    return best(0, max_spans)


numbers = st.lists(st.integers(-12, 12).map(lambda n: n / 4), max_size=8)  # quarters add up exactly


@given(numbers, st.integers(1, 4), st.integers(1, 9), st.integers(0, 2))
@settings(max_examples=300, deadline=None)
def test_spans_score_as_well_as_any_choice(numbers: list[float], max_spans: int, max_length: int, gap: int):
    found = best_spans(numbers, max_spans, max_length, gap=gap)
    assert sum(sum(numbers[a:b]) for a, b in found) == by_brute_force(numbers, max_spans, max_length, gap)
    assert len(found) <= max_spans
    assert all(0 <= a < b <= len(numbers) and b - a <= max_length for a, b in found)
    assert all(sum(numbers[a:b]) > 0 for a, b in found)
    assert all(after - before >= gap for (_, before), (after, _) in itertools.pairwise(found))


def test_spans_of_equal_worth_are_few_end_early_and_start_late():
    assert best_spans([1.0] * 9, 1, 4) == [(0, 4)]
    assert best_spans([0.0, 1.0, 0.0, 0.0, 1.0, -1.0, 1.0], 1, 3) == [(1, 2)]
    assert best_spans([2.0, -1.0, 1.0], 2, 3) == [(0, 1), (2, 3)]
    assert best_spans([2.0, 0.0, 1.0], 2, 3) == [(0, 3)]


@pytest.mark.parametrize(("numbers", "spans"), [([], []), ([1.5], [(0, 1)]), ([-1], []), ([0, 0], [])])
def test_spans_of_short_rows(numbers: list[float], spans: list):
    assert best_spans(numbers) == spans


def test_spans_touch_only_without_a_gap():
    assert best_spans([1.0, 1.0, 1.0, 1.0], 2, 2, gap=0) == [(0, 2), (2, 4)]
    assert best_spans([1.0, 1.0, 1.0, 1.0], 2, 2) == [(0, 2), (3, 4)]


@pytest.mark.parametrize(
    ("numbers", "given", "message"),
    [
        ([1.0, math.nan], {}, "finite numbers in a row"),
        ([[1.0]], {}, r"\[\[1.\]\]"),
        ([1.0], {"max_spans": 0}, "max_spans must be at least 1, not 0"),
        ([1.0], {"max_length": -2}, "max_length must be at least 1, not -2"),
        ([1.0], {"gap": -1}, "gap must be at least 0, not -1"),
    ],
)
def test_spans_refuse(numbers: list, given: dict, message: str):
    with pytest.raises(ValueError, match=message):
        best_spans(numbers, **given)


# --- tokens as text ---------------------------------------------------------------------------------------


def word_tokenizer(*words: str, sentence_piece: bool) -> PreTrainedTokenizerFast:
    """Whole words, written as one of two families of tokenizers writes them, behind a few specials."""
    space, specials = ("▁", ["<s>", "<0x41>"]) if sentence_piece else ("Ġ", ["<|end|>", "Ã"])
    vocabulary = [*specials, "a", "b", space, *(space + word for word in words), *words]
    model = Tokenizer(BPE({token: i for i, token in enumerate(dict.fromkeys(vocabulary))}, []))
    if sentence_piece:
        model.pre_tokenizer = pre_tokenizers.Metaspace()
        model.decoder = decoders.Metaspace()
    else:
        model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        model.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=model, bos_token=specials[0])


def words_at(tokenizer: PreTrainedTokenizerBase, pairs: list[tuple[int, int]], which: int) -> list[str]:
    return [tokenizer.convert_ids_to_tokens(pair[which]) for pair in pairs]


def test_words_are_shared_however_a_tokenizer_writes_their_space():
    piece = word_tokenizer("the", "dog", "cat", sentence_piece=True)
    level = word_tokenizer("cat", "the", "mat", sentence_piece=False)
    pairs = shared_tokens(piece, level)
    assert words_at(piece, pairs, 0) == ["a", "b", "▁", "▁cat", "▁the", "cat", "the"]
    assert words_at(level, pairs, 1) == ["a", "b", "Ġ", "Ġcat", "Ġthe", "cat", "the"]


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_token_texts_leave_out_specials_and_fragments(kind: str):
    tokenizer = small_tokenizer(kind)
    texts = vocabulary.token_texts(tokenizer)
    assert not texts.keys() & set(tokenizer.all_special_ids)
    assert all(text and "\ufffd" not in text and not text.startswith("<0x") for text in texts.values())
    assert {" ", "q"} <= set(texts.values())
    assert len(texts) == len(set(texts.values()))  # bytes that stand for characters would come twice
    assert [*texts] == sorted(texts)


def test_tokenizers_of_two_families_share_every_printable_character():
    pairs = shared_tokens(small_tokenizer("llama"), small_tokenizer("gpt2"))
    texts = vocabulary.token_texts(small_tokenizer("gpt2"))
    shared = {texts[j] for _, j in pairs}
    assert shared >= {" ", "a", "Z", "~", "\n"}
    assert " the" not in shared
    assert [j for _, j in pairs] == sorted(j for _, j in pairs)


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_pieces_together_are_the_text(kind: str):
    tokenizer, text = small_tokenizer(kind), "naïve 🙂 \nfool, $5"
    ids = su.models.token_ids(tokenizer, text)[1:]
    found = vocabulary.pieces(tokenizer, ids)
    assert len(found) == len(ids)
    assert "".join(found).removeprefix(" ") == text
    assert {"ï", "🙂"} <= set(found)  # at the last of their bytes


def test_a_text_that_ends_inside_a_character_keeps_all_tokens():
    tokenizer = small_tokenizer("gpt2")
    ids = su.models.token_ids(tokenizer, "a🙂")[1:-1]
    assert vocabulary.pieces(tokenizer, ids) == ["a", "", "", "\ufffd"]


# --- transfer ---------------------------------------------------------------------------------------------


TEXTS = ["the cat sat on the mat", "A dog sang; & then", "sixty  words", "naïve, é!"] * 3


@pytest.mark.parametrize("method", METHODS)
def test_between_identical_tables_a_steer_stays_itself(method: str):
    words, given = some(60, 16), steer(width=16).at([1.0, -2.0])
    states = some(80, 16, seed=6)
    found = transferred(given, words, words, states=(states, states), method=method, lr=0.02)
    close(found.matrix(), given.matrix(), 1e-3 if method == "learned" else 1e-6)
    assert found.names == given.names


@pytest.mark.parametrize("normalize", ["rows", "none"])
@pytest.mark.parametrize("method", ["closed_form", "logits", "states"])
def test_between_rotated_tables_a_steer_rotates(method: str, normalize: str):
    words, given, states = some(60, 16), steer(width=16).at([1.0, -2.0]), some(80, 16, seed=6)
    rotation = torch.linalg.qr(some(16, 16, seed=3)).Q
    how = {"states": (states, states @ rotation), "method": method, "normalize": normalize}
    found = transferred(given, words, words @ rotation, **how)
    close(found.matrix(), rotation.T @ given.matrix() @ rotation)


def test_a_common_scale_is_lost_with_the_rows_length_or_squared_without():
    words, given = some(60, 16), steer(width=16).at(1.0)
    for method, normalize, factor in (
        ("closed_form", "rows", 1),
        ("closed_form", "none", 1 / 9),
        ("logits", "rows", 1),
    ):
        found = transferred(given, words, 3 * words, method=method, normalize=normalize)
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
    for method in ("logits", "states"):
        moved = transferred(given, words, target, states=(states, there), method=method)
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
    found = su.transfer(given, source, tokenizers[0], target, tokenizers[1], anchors=50)
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


@pytest.mark.parametrize("method", METHODS)
def test_a_transferred_steer_is_saved_with_its_facts(method: str, tmp_path):
    source, target = character_models()
    tokenizers = small_tokenizer("llama"), small_tokenizer("gpt2")
    how = {"method": method, "n_steps": 10, "texts": TEXTS}
    found = su.transfer(steer(), source, tokenizers[0], target, tokenizers[1], **how)
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
        su.transfer(given, *args, normalize="columns")
    for texts in ((), "one text"):
        with pytest.raises(ValueError, match=rf"reads texts: give a list .*, not {re.escape(repr(texts))}"):
            su.transfer(given, *args, method="states", texts=texts)
    with pytest.raises(ValueError, match=r"3 pairs of states are too few .* 32 and 32: give more texts"):
        su.transfer(given, *args, method="states", texts=["abc"])
    with pytest.raises(ValueError, match="needs states"):
        transferred(given, some(40, 32), some(40, 32), method="states")
    with pytest.raises(ValueError, match="width of 8; the model's is 32"):
        su.transfer(steer(width=8), *args)
    with pytest.raises(TypeError, match="only an LMSteer"):
        su.transfer(su.AddSteer(some(2, 32)), *args)


# --- directions and words ---------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [1, 4, 16, 40])
def test_directions_are_the_dense_decomposition(rank: int):
    given = steer(width=16, rank=rank, epsilon=0.2)
    found = directions(given, 1)
    matrix = given.matrix([0.0, 1.0])
    size = min(rank, 16)
    assert found.u.shape == found.v.shape == (16, size)
    close(found.u * found.values @ found.v.T, matrix)
    close(found.values, torch.linalg.svdvals(matrix)[:size], 1e-4)
    for basis in (found.u, found.v):
        close(basis.T @ basis, torch.eye(size))
    largest = found.v.gather(0, found.v.abs().argmax(dim=0)[None])
    assert (largest > 0).all()


@pytest.mark.parametrize("rank", [1, 4, 40])
def test_directions_of_states_are_the_principal_axes_of_what_they_gain(rank: int):
    given, hidden = steer(width=16, rank=rank), some(50, 16, seed=3) + 2 * some(16, seed=4)
    found, matrix = directions(given, 1, hidden), given.matrix([0.0, 1.0])
    size = min(rank, 16)
    close(found.v.T @ found.v, torch.eye(size))
    close(found.u * found.values @ found.v.T, matrix, 1e-4)
    gains = hidden @ matrix @ found.v  # [N, K]: uncorrelated, and of that mean square
    close(gains.T @ gains / len(hidden), found.values.square().diag(), 1e-3)
    evenly = torch.linalg.qr(hidden).Q * len(hidden) ** 0.5  # as much of it in any direction
    close(directions(given, 1, evenly).values, directions(given, 1).values, 1e-4)


def test_few_states_have_few_directions_which_explain_what_they_gain():
    given, hidden = steer(1, width=16, rank=8), some(3, 16, seed=3)
    found = directions(given, 0, hidden)
    assert found.u.shape == found.v.shape == (16, 3)
    close(hidden @ found.u * found.values @ found.v.T, hidden @ given.matrix([1.0]), 1e-4)
    twice = torch.cat([hidden, hidden])
    close(directions(given, 0, twice).values, found.values)


def word_model(kind: str = "llama") -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    tokenizer = word_tokenizer(*WORDS, sentence_piece=False)
    config = type(CONFIGS[kind]()).from_dict(CONFIGS[kind]().to_dict() | {"vocab_size": len(tokenizer) + 3})
    return new_model(config), tokenizer


@pytest.mark.parametrize("kind", ["gpt2", "llama", "gemma3_text", "gpt_neox"])
def test_words_on_the_side_of_more_become_likelier(kind: str):
    """At a small value of a steer of rank 1, the first of them gains most over the texts' positions."""
    model, tokenizer = word_model(kind)
    given, texts = steer(1, rank=1, epsilon=1e-3), ["ab", "a b ab"]
    table = su.word_lists(given, model, tokenizer, texts=texts, num_words=1, whole_words=False)
    assert table["side"].tolist() == ["more", "less"]
    ids = {text: i for i, text in vocabulary.token_texts(tokenizer).items()}
    gains = []
    for text in texts:
        row = torch.tensor([su.models.token_ids(tokenizer, text)])
        plain = model(row).logits
        with given.at(1.0).on(model):
            gains.append((model(row).logits - plain)[0])
    gains = torch.cat(gains).mean(dim=0)
    likeliest, unlikeliest = (ids[words[0]] for words in table["words"])
    assert gains[likeliest].item() == pytest.approx(gains[list(ids.values())].max().item(), rel=1e-3)
    assert gains[unlikeliest].item() == pytest.approx(gains[list(ids.values())].min().item(), rel=1e-3)
    pushed = table["push"] * table["score"]  # what is on file explains the gain
    assert pushed.tolist() == pytest.approx(gains[[likeliest, unlikeliest]].tolist(), rel=1e-2)
    assert table["agreement"].between(0.01, 1).all()


def test_turning_a_steer_round_exchanges_more_and_less():
    model, tokenizer = word_model()
    given = steer(1)
    turned = su.LMSteer(-given.projector1, given.projector2, epsilon=given.epsilon)
    first, second = (
        su.word_lists(one, model, tokenizer, texts=["a"], num_words=2).set_index(["direction", "side"])
        for one in (given, turned)
    )
    for i in range(4):
        assert first.loc[(i, "more"), "words"] == second.loc[(i, "less"), "words"]


def test_whole_words_begin_a_word_and_come_once():
    model, tokenizer = word_model()
    table = su.word_lists(steer(), model, tokenizer, num_directions=2, num_words=20)
    assert table["side"].tolist() == ["high", "low"] * 2
    assert table["direction"].tolist() == [0, 0, 1, 1]
    assert table["push"].isna().all()
    for words in table["words"]:
        assert sorted(map(str.lower, words)) == ["cat", "mat", "sang", "sat", "the"]
    scores = word_scores(model, directions(steer()).v)
    assert table["score"][0] <= scores[:, 0].max().item()
    everything = su.word_lists(steer(), model, tokenizer, whole_words=False, num_words=99)["words"][0]
    assert {"a", " ", "cat", " cat", "Cat", " on"} <= set(everything)


def test_a_map_of_words_has_their_scores():
    model, tokenizer = word_model()
    given = steer()
    table = map_of_words(given, model, tokenizer, ["mat", "on", "a"], 1)
    ids = [tokenizer.convert_tokens_to_ids(token) for token in ("Ġmat", "Ġon", "a")]
    expected = hf.lm_head(model).weight[ids] @ directions(given, 1).v[:, :2]
    close(torch.tensor(table[["direction 0", "direction 1"]].to_numpy()), expected)
    assert table["word"].tolist() == ["mat", "on", "a"]
    of_its_own = map_of_words(given, model, tokenizer, num_words=2)
    lists = su.word_lists(given, model, tokenizer, num_directions=2, num_words=2)["words"]
    assert set(of_its_own["word"]) == {word for words in lists for word in words}


def test_words_refuse(tokenizer):
    model, words = word_model()
    with pytest.raises(ValueError, match=r"s must be 0 to 1 \(0, 1\), not 2"):
        su.word_lists(steer(), model, words, 2)
    with pytest.raises(ValueError, match="width of 8; the model's is 32"):
        su.word_lists(steer(width=8), model, words)
    with pytest.raises(ValueError, match="no token of this tokenizer is a whole word"):
        su.word_lists(steer(), tiny("gpt2"), tokenizer)
    with pytest.raises(ValueError, match="1 or more directions and words, not 10 and 0"):
        su.word_lists(steer(), model, words, num_words=0)
    with pytest.raises(ValueError, match="no texts"):
        su.word_lists(steer(), model, words, texts=[])
    with pytest.raises(ValueError, match="'Dogs', 'x y': not one token"):
        map_of_words(steer(), model, words, ["cat", "Dogs", "x y"])
    with pytest.raises(ValueError, match="this steer has rank 1"):
        map_of_words(steer(rank=1), model, words)


# --- evidence ---------------------------------------------------------------------------------------------


def log_probs_by_hand(model: PreTrainedModel, given: su.LMSteer, ids: list[int], values: list) -> Tensor:
    """Log probabilities of ids[1:], from a whole pass of a folded model."""
    row = torch.tensor([ids])
    logits = given.fold(model, values)(row).logits[0, :-1]
    return logits.log_softmax(dim=-1).gather(1, row[0, 1:, None])[:, 0]


def test_evidence_is_the_difference_of_two_whole_passes(main_model, tokenizer):
    given, a, b = steer(), [1.0, 0.5], [-2.0, 0.0]
    ids, hooks = su.models.token_ids(tokenizer, TEXT), hook_count(main_model)
    found = su.evidence_spans(given, main_model, tokenizer, TEXT, a, b)
    expected = log_probs_by_hand(main_model, given, ids, a) - log_probs_by_hand(main_model, given, ids, b)
    close(torch.tensor(found.evidence).float(), expected)
    assert found.tokens == list(TEXT)
    assert found.spans == best_spans(found.evidence)
    assert hook_count(main_model) == hooks


def test_evidence_turns_with_its_values_and_vanishes_without_a_difference(tokenizer):
    model, given = tiny("llama"), steer()
    one, other = (su.evidence_spans(given, model, tokenizer, TEXT, v, -v) for v in (2.0, -2.0))
    assert one.evidence.tolist() == (-other.evidence).tolist()
    same = su.evidence_spans(given, model, tokenizer, TEXT, 2.0, 2.0)
    assert isinstance(same, Evidence)
    assert (same.evidence == 0).all()
    assert same.spans == []
    single = su.evidence_spans(given, model, tokenizer, "a", 2.0, -2.0, max_spans=1, max_length=1)
    assert single.tokens == ["a"]
    assert len(single.evidence) == 1


def test_one_pass_whose_length_needs_no_more_memory(monkeypatch, tokenizer):
    model, given, ids = tiny("gpt2"), steer(), random_ids(1, 40)[0].tolist()
    passes, rows = [], []
    with (
        hf.blocks(model)[0].register_forward_hook(lambda *_: passes.append(1)),
        hf.lm_head(model).register_forward_hook(lambda *call: rows.append(len(call[2]))),
    ):
        evidence = token_evidence(given, model, ids, 1.0, -1.0)
        losses = token_losses(given, model, ids, 0, np.linspace(-3, 3, 13))
        assert (len(passes), len(rows)) == (2, 4)
        monkeypatch.setattr(lm_steer_analysis, "LOGITS_AT_ONCE", 97 * 7)
        assert token_evidence(given, model, ids, 1.0, -1.0) == pytest.approx(evidence, abs=1e-5)
        assert token_losses(given, model, ids, 0, np.linspace(-3, 3, 13)) == pytest.approx(losses, abs=1e-5)
        assert max(rows[4:]) == 7


def test_steers_that_are_on_are_not_felt_by_the_reading(tokenizer):
    model, given = tiny("llama"), steer()
    addition = su.SteeringVector(1, 5 * some(2, 32))
    plain = su.evidence_spans(given, model, tokenizer, TEXT, 1.0, -1.0)
    with addition.on(model):
        inside = su.evidence_spans(given, model, tokenizer, TEXT, 1.0, -1.0)
    assert inside.evidence.tolist() == plain.evidence.tolist()


@pytest.mark.parametrize("kind", [su.AddSteer, su.OffsetSteer])
def test_evidence_of_other_kinds_of_steers(kind: type, tokenizer):
    model = tiny("gpt2")
    given = kind(some(2, 32 if kind is su.AddSteer else 97), epsilon=0.1)
    found = su.evidence_spans(given, model, tokenizer, TEXT, [1.0, 0.0], 0.0)
    row = torch.tensor([su.models.token_ids(tokenizer, TEXT)])
    with given.at(1.0).on(model):
        steered = model(row).logits[0, :-1].log_softmax(-1)
    gains = (steered - model(row).logits[0, :-1].log_softmax(-1)).gather(1, row[0, 1:, None])[:, 0]
    close(torch.tensor(found.evidence).float(), gains)


def test_evidence_refuses(tokenizer):
    model, given = tiny("gpt2"), steer()
    with pytest.raises(ValueError, match="an empty text"):
        su.evidence_spans(given, model, tokenizer, "", 1.0, -1.0)
    with pytest.raises(ValueError, match=r"one row of values, not \(1, 2\)"):
        su.evidence_spans(given, model, tokenizer, TEXT, [[1.0, 0.0]], -1.0)
    with pytest.raises(ValueError, match="take a number for the first"):
        su.evidence_spans(given, model, tokenizer, TEXT, [1.0], -1.0)
    with pytest.raises(ValueError, match="width of 8; the model's is 32"):
        su.evidence_spans(steer(width=8), model, tokenizer, TEXT, 1.0, -1.0)
    with pytest.raises(ValueError, match="max_spans must be at least 1"):
        su.evidence_spans(given, model, tokenizer, TEXT, 1.0, -1.0, max_spans=0)


# --- the values of a text ---------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ["gpt2", "llama", "gemma3_text", "gpt_neox", "gemma2", "gptj"])
@pytest.mark.parametrize(("dim", "ends"), [(0, (-3, 3)), (1, (1, 2.5)), (1, (-2, -1))])
def test_losses_are_those_of_a_whole_pass_at_each_value(architecture, dim, ends, tokenizer):
    """Gemma 2 caps its logits, which are then no longer affine in the value, and GPT-J's head has a bias."""
    model, given = new_model(CONFIGS[architecture]()), steer()
    if hf.lm_head(model).bias is not None:
        torch.nn.init.normal_(hf.lm_head(model).bias)
    ids = su.models.token_ids(tokenizer, TEXT)
    found = su.steer_analysis(
        given, model, tokenizer, TEXT, dim=dim, min_value=ends[0], max_value=ends[1], bins=4
    )
    rows = np.eye(2)[dim] * np.append(np.linspace(*ends, 4), 0)[:, None]
    expected = [-log_probs_by_hand(model, given, ids, row.tolist()).mean().item() for row in rows]
    assert [*found.losses, found.unsteered_loss] == pytest.approx(expected, rel=1e-5)
    assert found.values.tolist() == pytest.approx(np.linspace(*ends, 4).tolist())
    assert found.best_value == found.values[np.argmin(expected[:-1])]
    assert found.distribution.sum() == pytest.approx(1)
    weights = np.exp(-10 * np.array(expected[:-1]))
    assert found.distribution == pytest.approx(weights / weights.sum(), rel=1e-3)
    assert hook_count(model) == 0


def test_the_planted_value_is_found(tokenizer):
    """Of a long text that the model writes at value 2, no value explains more than 2 itself."""
    model, given = tiny("llama"), steer(1, epsilon=0.1)
    torch.manual_seed(0)
    start = torch.zeros(8, 1, dtype=torch.long)
    with given.at(2.0).on(model):
        written = model.generate(
            start, attention_mask=start + 1, max_new_tokens=100, do_sample=True, eos_token_id=None, top_k=0
        )
    values = np.arange(-4.0, 5.0)
    losses = np.concatenate([token_losses(given, model, row, 0, values) for row in written.tolist()], axis=1)
    found = analysed(values, losses, [""] * losses.shape[1])
    assert found.best_value == 2
    assert found.distribution.argmax() == 6


def test_words_average_their_tokens(tokenizer):
    model, given = tiny("gpt2"), steer()
    found = su.steer_analysis(given, model, tokenizer, TEXT)
    assert found.words.tokens == ["a", " Cat", " sat,", " &", " sang"]
    ids = su.models.token_ids(tokenizer, TEXT)
    best = log_probs_by_hand(model, given, ids, [found.best_value, 0.0])
    gains = 10 * (best - log_probs_by_hand(model, given, ids, [0.0, 0.0]))
    sizes = [len(word) for word in found.words.tokens]
    expected = [part.mean().item() for part in gains.split(sizes)]
    assert found.words.evidence.tolist() == pytest.approx(expected, abs=1e-3)
    assert found.words.spans == []


def test_in_bfloat16_interpolated_losses_are_as_good_as_separate_ones(tokenizer):
    model, given = new_model(CONFIGS["gpt2"]()), steer()
    ids = su.models.token_ids(tokenizer, TEXT * 3)
    exact = token_losses(given, model, ids, 0, np.linspace(-3, 3, 7)).mean(axis=1)
    rough = token_losses(given, model.bfloat16(), ids, 0, np.linspace(-3, 3, 7)).mean(axis=1)
    assert rough == pytest.approx(exact, abs=0.05)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"dim": 2}, r"dim must be 0 to 1 \(0, 1\), not 2"),
        ({"dim": -1}, "not -1"),
        ({"min_value": 3}, "not 7 from 3 to 3"),
        ({"bins": 1}, "at least 2 bins .* not 1 from -3 to 3"),
        ({"max_value": math.inf}, "not 7 from -3 to inf"),
        ({"max_value": math.nan}, "not 7 from -3 to nan"),
    ],
)
def test_analysis_refuses(given: dict, message: str, tokenizer):
    with pytest.raises(ValueError, match=message):
        su.steer_analysis(steer(), tiny("gpt2"), tokenizer, TEXT, **given)


def test_analysis_refuses_an_empty_text(tokenizer):
    with pytest.raises(ValueError, match="an empty text"):
        su.steer_analysis(steer(), tiny("gpt2"), tokenizer, "")


# --- as a notebook shows it -------------------------------------------------------------------------------


def test_highlight_escapes_colours_and_underlines():
    evidence = Evidence(["a", " <b>", "&", " c"], np.array([2.0, 1.0, -0.5, 0.0]), [(0, 2), (3, 4)])
    found = su.highlight(evidence)
    assert found._repr_html_() == found
    styles = re.findall(r"rgba\((\d+),\d+,\d+,([\d.]+)\)", found)
    assert styles == [("0", "0.55"), ("0", "0.28"), ("213", "0.14"), ("213", "0.00")]
    underlined = re.findall(r"<u>(.*?)</u>", found)
    assert [re.sub("<[^>]*>", "", part) for part in underlined] == ["a &lt;b&gt;", " c"]
    assert re.sub("<[^>]*>", "", found) == "a &lt;b&gt;&amp; c"
    assert re.findall(r'title="(.*?)"', found) == ["+2.00", "+1.00", "-0.50", "+0.00"]


def test_highlight_of_nothing_and_of_no_evidence():
    assert "span" not in su.highlight(Evidence([], np.array([]), []))
    assert "nan" not in su.highlight(Evidence(["a"], np.array([0.0]), []))
