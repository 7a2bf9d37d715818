"""Bags: how words are written in tokens, which of these are wanted after a text, and what is no bag."""

from collections import Counter
from dataclasses import FrozenInstanceError

import pytest
import torch
from conftest import small_tokenizer
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

import steer_utils as su
from steer_utils import data
from steer_utils.pplm.bags import Bag, bag_of_words

SINGLE = (" cat", " Cat", " dog", " NASA", " Mars", "head", " St", "ar")


@pytest.fixture(scope="module")
def words_tokenizer() -> PreTrainedTokenizerFast:
    """GPT-2 style, with the texts of SINGLE as whole tokens and everything else in letters."""
    vocabulary, merges = sorted(pre_tokenizers.ByteLevel.alphabet()), []
    for text in SINGLE:
        letters = text.replace(" ", "Ġ")
        merges += [(letters[:i], letters[i]) for i in range(1, len(letters))]
    vocabulary += dict.fromkeys("".join(pair) for pair in merges)
    model = Tokenizer(BPE({token: i for i, token in enumerate(vocabulary)}, list(dict.fromkeys(merges))))
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=model, eos_token="Ġcat")


def wanted_by_hand(entries: list[tuple[int, ...]], text: list[int]) -> Counter:
    """How often each token counts after a text: what goes on with a begun word, else all first tokens."""
    begun = {
        entry[i]
        for entry in entries
        for i in range(1, len(entry))
        if len(text) >= i and tuple(text[-i:]) == entry[:i]
    }
    if begun:
        return Counter(begun)
    singles = Counter(entry[0] for entry in entries if len(entry) == 1)
    return singles + Counter({entry[0] for entry in entries} - set(singles))


def wanted_by_bag(entries: list[tuple[int, ...]], texts: list[list[int]]) -> list[Counter]:
    bag = Bag("test", entries=tuple(entries))
    ids, wanted = bag.wanted(torch.tensor(texts, dtype=torch.long))
    if wanted is None:
        wanted = torch.ones(len(texts), len(ids), dtype=torch.bool)
    assert wanted.shape == (len(texts), len(ids))
    return [Counter(ids[row].tolist()) for row in wanted]


def ids_of(bag: Bag) -> list[int]:
    return bag.wanted(torch.zeros(1, 1, dtype=torch.long))[0].tolist()


# --- spellings --------------------------------------------------------------------------------------------


def texts_of(bag: Bag, tokenizer: PreTrainedTokenizerFast) -> list[list[str]]:
    return [[tokenizer.decode([token]) for token in entry] for entry in bag.entries]


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("cat", [[" cat"], [" Cat"]]),
        ("Cat", [[" Cat"], [" cat"]]),
        ("CAT", [[" cat"]]),
        ("dog", [[" dog"]]),
        ("Dog", [[" dog"]]),
        ("NASA", [[" NASA"]]),
        ("mars", [[" Mars"]]),
        ("star", [[" St", "ar"]]),
        ("Star", [[" St", "ar"]]),
        ("cat head", [[" cat", " ", "head"]]),
    ],
)
def test_of_small_and_capital_spellings_the_single_tokens_else_the_one_of_fewest(
    words_tokenizer, word, expected
):
    assert texts_of(bag_of_words([word], words_tokenizer), words_tokenizer) == expected


def test_no_bos_slips_into_a_word(any_tokenizer):
    bag = bag_of_words(["to be"], any_tokenizer)
    special = set(any_tokenizer.all_special_ids)
    assert bag.entries
    assert not any(special & set(entry) for entry in bag.entries)
    assert any_tokenizer.decode(bag.entries[-1]).strip() in ("to be", "To be")


def test_a_word_given_twice_or_in_two_spellings_counts_once(words_tokenizer):
    once = bag_of_words(["cat"], words_tokenizer)
    for words in (["cat", "cat"], ["cat", " cat "]):
        assert ids_of(bag_of_words(words, words_tokenizer)) == ids_of(once)
    both = bag_of_words(["Cat", "cat"], words_tokenizer)
    assert sorted(ids_of(both)) == sorted(ids_of(once))


def test_token_ids_given_twice_count_twice():
    assert ids_of(Bag("twice", entries=((3,), (5,), (3,)))) == [3, 5, 3]


# --- what is wanted ---------------------------------------------------------------------------------------


def test_single_tokens_are_all_wanted_always():
    bag = Bag("single", entries=((3,), (5,)))
    assert bag.wanted(torch.tensor([[1, 2], [3, 5]]))[1] is None
    assert ids_of(bag) == [3, 5]


def test_a_word_of_several_tokens_is_wanted_piece_by_piece_and_ends():
    entry = (4, 5, 6)
    found = wanted_by_bag([entry], [[9, 9, 9], [9, 9, 4], [9, 4, 5], [4, 5, 6], [9, 9, 5], [9, 4, 9]])
    assert found == [Counter(tokens) for tokens in ([4], [5], [6], [4], [4], [4])]


def test_words_with_the_same_beginning_want_each_of_their_ends():
    entries = [(4, 5), (4, 5, 6), (4, 7)]
    found = wanted_by_bag(entries, [[9, 9], [9, 4], [4, 5]])
    assert found == [Counter([4]), Counter([5, 7]), Counter([6])]


def test_a_token_wanted_twice_counts_once():
    found = wanted_by_bag([(5,), (5, 6), (4, 5), (3, 4, 5)], [[9, 9], [9, 4], [3, 4], [9, 5]])
    assert found == [Counter([5, 4, 3]), Counter([5]), Counter([5]), Counter([6])]


@pytest.mark.parametrize("text", [[4], [5], [9]])
def test_a_text_shorter_than_the_longest_word_wants_what_it_can(text):
    entries = [(4, 5, 6, 7), (5, 8)]
    assert wanted_by_bag(entries, [text]) == [wanted_by_hand(entries, text)]


ENTRY = st.lists(st.integers(0, 3), min_size=1, max_size=4).map(tuple)


@settings(max_examples=300, deadline=None)
@given(
    entries=st.lists(ENTRY, min_size=1, max_size=6),
    texts=st.integers(1, 6).flatmap(
        lambda n: st.lists(st.lists(st.integers(0, 3), min_size=n, max_size=n), min_size=1, max_size=4)
    ),
)
@example(entries=[(1, 1, 1), (1,)], texts=[[1, 1], [0, 1]])
@example(entries=[(0, 0, 1), (0, 1)], texts=[[0, 0], [1, 0]])
def test_any_bag_wants_after_any_texts_what_a_loop_over_them_finds(entries, texts):
    assert wanted_by_bag(entries, texts) == [wanted_by_hand(entries, text) for text in texts]
    ids = {token for entry in entries for token in entry}
    assert set(ids_of(Bag("test", entries=tuple(entries)))) == ids


@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_writing_only_wanted_pieces_one_after_the_other_writes_the_word(data, words_tokenizer):
    word = data.draw(st.sampled_from(["star", "Star", "galaxy", "cat head", "to be"]))
    bag, text = bag_of_words([word], words_tokenizer), []
    for token in bag.entries[0]:
        (wanted,) = wanted_by_bag(list(bag.entries), [text or [0]])
        assert token in wanted
        text.append(token)
    assert words_tokenizer.decode(text).strip().lower() == word.lower()


# --- making one -------------------------------------------------------------------------------------------


def test_a_bag_by_name_a_file_and_its_words_are_the_same(tmp_path, words_tokenizer):
    words = data.words("space")
    path = tmp_path / "space.txt"
    path.write_text("\n".join(f" {word} \n" for word in words), encoding="utf-8")
    bags = [bag_of_words(source, words_tokenizer) for source in ("space", path, str(path), iter(words))]
    assert [bag.words for bag in bags] == [tuple(words)] * 4
    assert len({bag.entries for bag in bags}) == 1
    assert [bag.name for bag in bags[:3]] == ["space"] * 3


def test_a_bag_is_encoded_later_as_at_once_and_stays_as_it_was(words_tokenizer):
    later, at_once = bag_of_words(["cat", "star"]), bag_of_words(["cat", "star"], words_tokenizer)
    assert later.encoded(words_tokenizer) == at_once
    assert later.entries == ()
    assert at_once.encoded(None) is at_once


def test_a_bag_cannot_be_changed():
    with pytest.raises(FrozenInstanceError):
        Bag("mine", ("cat",)).words = ("dog",)


def test_the_package_gives_bags_at_its_top():
    assert su.bag_of_words is bag_of_words
    assert su.Bag is Bag


# --- what is no bag ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [lambda: bag_of_words([]), lambda: Bag("mine"), lambda: Bag("mine", (), ())])
def test_a_bag_without_words_is_a_value_error(make):
    with pytest.raises(ValueError, match="is empty: give at least one word"):
        make()


@pytest.mark.parametrize("words", [["cat", ""], ["  "], ["\n", "cat"]])
def test_an_empty_word_is_a_value_error_that_names_the_bag(words):
    with pytest.raises(ValueError, match=r"the bag .* holds an empty word"):
        bag_of_words(words)


def test_an_entry_without_tokens_is_a_value_error_that_names_the_bag():
    with pytest.raises(ValueError, match="the bag 'mine' holds an empty word"):
        Bag("mine", entries=((3,), ()))


def test_a_negative_id_is_a_value_error_that_quotes_it():
    with pytest.raises(ValueError, match="the bag 'mine' holds the token id -3: ids begin at 0"):
        Bag("mine", entries=((3,), (4, -3)))


def test_words_without_a_tokenizer_are_a_value_error_that_says_what_to_do():
    with pytest.raises(ValueError, match=r"bag 'cat, dog' holds words.*with_tokenizer\(tokenizer\)"):
        bag_of_words(["cat", "dog"]).encoded(None)


@pytest.mark.parametrize("source", ["no such list", "judge/no such list"])
def test_an_unknown_name_is_a_file_not_found_error_with_the_names_there_are(source):
    with pytest.raises(FileNotFoundError, match="space") as caught:
        bag_of_words(source)
    assert source in str(caught.value)


@pytest.mark.parametrize(("content", "message"), [(b"caf\xe9\n", "UTF-8"), (b"\n \n", "no words")])
def test_a_file_without_readable_words_is_a_value_error_with_its_name(tmp_path, content, message):
    path = tmp_path / "mine.txt"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        bag_of_words(path)
    assert "mine.txt" in str(caught.value)


def test_a_bag_encoded_by_another_tokenizer_is_refused(tokenizer):
    bag = bag_of_words(["sun", "moon"], small_tokenizer("gpt2"))
    assert bag.encoded(small_tokenizer("gpt2")) == bag.encoded(None) == bag
    with pytest.raises(ValueError, match="'sun, moon' was encoded by another tokenizer"):
        bag.encoded(tokenizer)
