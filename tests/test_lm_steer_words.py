"""What an LM-Steer does to words: directions, word lists, and tokens as text."""

import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
from conftest import CONFIGS, TOKENIZERS, head_steer, new_model, small_tokenizer, tiny
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast

import steer_utils as su
from steer_utils import hf, lm_steer
from steer_utils.lm_steer.words import directions, is_word, map_of_words, pieces, token_texts, word_scores
from steer_utils.pplm.classifier import mean_hidden

WORDS = ("the", "cat", "sat", "Cat", "mat", "sang", "on")


def some(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def steer(num_steers: int = 2, width: int = 32, rank: int = 4, **settings) -> su.LMSteer:
    left, right = (some(num_steers, width, rank, seed=seed) for seed in (1, 2))
    return su.LMSteer(left, right, **{"epsilon": 0.05} | settings)


def close(found: Tensor, expected: Tensor, atol: float = 2e-5) -> None:
    torch.testing.assert_close(found, expected, atol=atol, rtol=1e-4)


def test_the_files_of_the_room_are_there_without_an_import_of_their_own():
    """Notebooks say `su.lm_steer.words`."""
    names = [path.stem for path in Path(lm_steer.__file__).parent.glob("[a-z]*.py")]
    code = "import sys; import steer_utils as su; [getattr(su.lm_steer, name) for name in sys.argv[1:]]"
    subprocess.run([sys.executable, "-c", code, *names], check=True)


# --- tokens as text -----------------------------------------------------------------------------------------


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


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_token_texts_leave_out_specials_and_fragments(kind: str):
    tokenizer = small_tokenizer(kind)
    texts = token_texts(tokenizer)
    assert not texts.keys() & set(tokenizer.all_special_ids)
    assert all(text and "\ufffd" not in text and not text.startswith("<0x") for text in texts.values())
    assert {" ", "q"} <= set(texts.values())
    assert len(texts) == len(set(texts.values()))  # bytes that stand for characters would come twice
    assert [*texts] == sorted(texts)


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_pieces_together_are_the_text(kind: str):
    tokenizer, text = small_tokenizer(kind), "naïve 🙂 \nfool, $5"
    ids = su.models.token_ids(tokenizer, text)[1:]
    found = pieces(tokenizer, ids)
    assert len(found) == len(ids)
    assert "".join(found).removeprefix(" ") == text
    assert {"ï", "🙂"} <= set(found)  # at the last of their bytes


def test_a_text_that_ends_inside_a_character_keeps_all_tokens():
    tokenizer = small_tokenizer("gpt2")
    ids = su.models.token_ids(tokenizer, "a🙂")[1:-1]
    assert pieces(tokenizer, ids) == ["a", "", "", "\ufffd"]


# --- directions and words -----------------------------------------------------------------------------------


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


def word_model(kind: str = "llama") -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    tokenizer = word_tokenizer(*WORDS, sentence_piece=False)
    config = type(CONFIGS[kind]()).from_dict(CONFIGS[kind]().to_dict() | {"vocab_size": len(tokenizer) + 3})
    return new_model(config), tokenizer


@pytest.mark.parametrize("kind", ["gpt2", "llama", "gemma3_text", "gpt_neox"])
def test_words_on_the_side_of_more_become_likelier(kind: str):
    """At a small value of a steer of rank 1, the first of them gains most over the texts' positions."""
    model, tokenizer = word_model(kind)
    given, texts = steer(1, rank=1, epsilon=1e-3), ["ab", "a b ab"]
    table = su.word_lists(given, model, tokenizer, texts=texts, num_words=1)
    assert table["side"].tolist() == ["more", "less"]
    ids = {text[1:]: i for i, text in token_texts(tokenizer).items() if is_word(text)}
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
    table = su.word_lists(steer(), model, tokenizer, texts=["a b"], num_directions=2, num_words=20)
    assert table["side"].tolist() == ["more", "less"] * 2
    assert table["direction"].tolist() == [0, 0, 1, 1]
    for words in table["words"]:
        assert sorted(map(str.lower, words)) == ["cat", "mat", "sang", "sat", "the"]
    scores = word_scores(model, directions(steer()).v)
    assert abs(table["score"][0]) <= scores[:, 0].abs().max().item()


def test_a_map_of_words_has_their_scores():
    model, tokenizer = word_model()
    given = steer()
    table = map_of_words(given, model, tokenizer, ["mat", "on", "a"], 1)
    ids = [tokenizer.convert_tokens_to_ids(token) for token in ("Ġmat", "Ġon", "a")]
    expected = hf.lm_head(model).weight[ids] @ directions(given, 1).v[:, :2]
    close(torch.tensor(table[["direction 0", "direction 1"]].to_numpy()), expected)
    assert table["word"].tolist() == ["mat", "on", "a"]


def test_words_refuse(tokenizer):
    model, words = word_model()
    with pytest.raises(ValueError, match=r"s must be 0 to 1 \(0, 1\), not 2"):
        su.word_lists(steer(), model, words, 2, texts=["a"])
    with pytest.raises(ValueError, match="width of 8; the model's is 32"):
        su.word_lists(steer(width=8), model, words, texts=["a"])
    with pytest.raises(ValueError, match="no token of this tokenizer is a space and a word"):
        su.word_lists(steer(), tiny("gpt2"), tokenizer, texts=["a"])
    with pytest.raises(ValueError, match=r"1 or more directions, words and texts, not \(10, 0, 1\)"):
        su.word_lists(steer(), model, words, texts=["a"], num_words=0)
    with pytest.raises(ValueError, match=r"not \(10, 20, 0\)"):
        su.word_lists(steer(), model, words, texts=[])
    with pytest.raises(ValueError, match="'Dogs', 'x y': not one token"):
        map_of_words(steer(), model, words, ["cat", "Dogs", "x y"])
    with pytest.raises(ValueError, match="this steer has rank 1"):
        map_of_words(steer(rank=1), model, words, ["cat"])
    with pytest.raises(ValueError, match="width of 8; the model's is 32"):
        map_of_words(steer(width=8), model, words, ["cat"])
    for work in (directions, lambda one: map_of_words(one, model, words, ["cat"])):
        with pytest.raises(TypeError, match="must be LMSteer, not the AddSteer"):
            work(head_steer("add"))


def test_features_word_lists_and_scores_are_those_of_the_unsteered_model_while_a_steer_is_on():
    model, tokenizer = word_model("gpt2")
    bag = su.PPLM(bags=[su.Bag("mine", entries=((5,), (17,)))], num_iterations=1)
    table = pd.DataFrame({"prompt": ["the a", "a"], "completion": [" the", " a"]})
    given = head_steer().at(1.0)

    def measured() -> list:
        texts, words = ["the a", "a the"], {"texts": ["a", "the"], "num_directions": 1, "num_words": 1}
        return [
            mean_hidden(model, tokenizer, texts).tolist(),
            su.mean_difference(model, tokenizer, texts, texts[:1], 1).rows.tolist(),
            su.word_lists(given, model, tokenizer, **words).to_json(),
            su.attribute_scores(bag, model, tokenizer, table).tolist(),
            su.metrics.perplexity(model, tokenizer, *map(list, table.to_numpy().T)).tolist(),
        ]

    expected = measured()
    for other in (given, su.SteeringVector(0, torch.ones(1, 32), positions="all"), bag):
        with other.on(model, tokenizer):
            assert measured() == expected
