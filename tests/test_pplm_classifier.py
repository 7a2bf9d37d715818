"""Classifier heads: features by a plain loop, classes, files, training, reports, and the shipped ones."""

import json
import math

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import CONFIGS, new_model, random_ids, tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import train_test_split
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

import steer_utils as su
from steer_utils import hf
from steer_utils.models import token_ids
from steer_utils.pplm.classifier import (
    ClassifierHead,
    masked_mean,
    mean_hidden,
    report,
    train_classifier_head,
)

LENGTHS = (7, 1, 12, 12, 3, 30)
CLOSE = {"atol": 1e-5, "rtol": 1e-5}


@pytest.fixture
def llama() -> PreTrainedModel:
    return tiny("llama")


def rows(lengths: tuple[int, ...] = LENGTHS) -> list[list[int]]:
    """Texts of random ids behind BOS."""
    return [random_ids(1, length, seed=i)[0].tolist() for i, length in enumerate(lengths)]


@torch.no_grad()
def by_hand(model: PreTrainedModel, ids: list[int]) -> Tensor:
    """The mean of what the output head reads, alone, without mask or padding, position by position."""
    seen = []
    head = model.get_output_embeddings()
    with head.register_forward_pre_hook(lambda module, args: seen.append(args[0])):
        model(torch.tensor([ids]))
    total = sum(state for state in seen[0][0])
    return total / len(ids)


def head_of(model: PreTrainedModel, **given) -> ClassifierHead:
    return ClassifierHead(model.config.hidden_size, 3, **given)


def vowels(count: int = 120) -> tuple[list[str], list[int]]:
    """Texts of which half hold only a and half only o between the same consonants."""
    rng = np.random.default_rng(0)
    words = ["".join(rng.choice(list("bcdfgklmnprst"), 6)) for _ in range(count)]
    return ["".join(c + "ao"[i % 2] for c in word) for i, word in enumerate(words)], [0, 1] * (count // 2)


def test_features_are_the_mean_over_all_tokens_in_every_architecture(any_model):
    expected = torch.stack([by_hand(any_model, row) for row in rows()])
    torch.testing.assert_close(mean_hidden(any_model, None, rows()), expected, **CLOSE)


@settings(max_examples=20, deadline=None)
@given(texts=st.lists(st.text("ab ,!\n", max_size=20), max_size=6), seed=st.integers(0, 5))
def test_features_of_strings_come_back_in_their_order(tokenizer, texts, seed):
    model = tiny("llama")
    order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(seed)).tolist()
    found = mean_hidden(model, tokenizer, texts)
    shuffled = mean_hidden(model, tokenizer, [texts[i] for i in order])
    torch.testing.assert_close(shuffled, found[order], **CLOSE)
    alone = mean_hidden(model, None, [token_ids(tokenizer, text) for text in texts])
    torch.testing.assert_close(alone, found, **CLOSE)


def test_a_token_with_id_0_inside_a_text_counts(main_model):
    row = [0, 17, 0, 24, 0]
    others = [i for i, token in enumerate(row) if token != 0]
    with torch.no_grad():
        states = main_model.base_model(torch.tensor([row])).last_hidden_state[0]
    (found,) = mean_hidden(main_model, None, [row, [0] * 9])[:1]
    torch.testing.assert_close(found, states.mean(0), **CLOSE)
    assert not torch.allclose(found, states[others].mean(0), atol=1e-2)


def test_padding_does_not_count_whatever_it_holds_and_on_which_side_it_stands():
    hidden, mask = torch.randn(2, 5, 4), torch.tensor([[1, 1, 0, 0, 0], [0, 0, 0, 1, 1]])
    expected = torch.stack([hidden[0, :2].mean(0), hidden[1, 3:].mean(0)])
    for what in (0, 1e6, math.inf, math.nan):
        torch.testing.assert_close(
            masked_mean(hidden.masked_fill(mask[..., None] == 0, what), mask), expected, **CLOSE
        )


def test_long_texts_are_cut(llama):
    cut = [row[:5] for row in rows()]
    assert torch.equal(mean_hidden(llama, None, rows(), max_tokens=5), mean_hidden(llama, None, cut))


def test_no_texts_give_no_features(llama, tokenizer):
    assert mean_hidden(llama, tokenizer, []).shape == (0, 32)
    assert head_of(llama).probabilities(llama, tokenizer, []).shape == (0, 3)


def test_features_are_those_of_the_plain_model(llama):
    plain = mean_hidden(llama, None, rows())
    steer = su.SteeringVector(1, torch.full((1, 32), 9.0), positions="all")
    with steer.on(llama):
        assert torch.equal(mean_hidden(llama, None, rows()), plain)


def test_features_of_a_model_in_bfloat16_are_float32(llama):
    model = new_model(llama.config).to(torch.bfloat16)
    found = mean_hidden(model, None, rows())
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, mean_hidden(llama, None, rows()), atol=0.3, rtol=0)


def test_narrow_last_hidden_states_set_the_width():
    config = CONFIGS["opt"]()
    config.word_embed_proj_dim = 16
    model = new_model(config)
    assert mean_hidden(model, None, rows()).shape == (len(LENGTHS), 16)
    ClassifierHead(16, 2).require_fit(model)
    with pytest.raises(ValueError, match=r"width 32.* 16"):
        ClassifierHead(32, 2).require_fit(model)


def test_a_model_with_its_own_tokenizer_needs_no_other(tokenizer):
    model = new_model(CONFIGS["llama"]())
    model.tokenizer = tokenizer
    assert torch.equal(mean_hidden(model, None, ["Hello"]), mean_hidden(model, tokenizer, ["Hello"]))


def test_what_is_no_list_of_texts_is_refused(tokenizer):
    model = tiny("gpt2")
    with pytest.raises(TypeError, match="must be a list of texts or of token ids, not 'Hello'"):
        mean_hidden(model, tokenizer, "Hello")
    with pytest.raises(ValueError, match="index 1 has no tokens"):
        mean_hidden(model, tokenizer, ["a", []])
    with pytest.raises(ValueError, match="max_tokens must be at least 1, not 0"):
        mean_hidden(model, tokenizer, ["a"], max_tokens=0)


@pytest.mark.parametrize(
    ("shape", "dtype"), [((32,), torch.float32), ((5, 32), torch.bfloat16), ((2, 3, 32), torch.float64)]
)
def test_logits_are_affine_in_the_features_and_float32(shape, dtype):
    head = ClassifierHead(32, 4, seed=3)
    features = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    expected = features.double() @ head.weight.double().T + head.bias.double()
    assert head(features).dtype == torch.float32
    torch.testing.assert_close(head(features).double(), expected, **CLOSE)


def test_gradients_flow_to_the_features_and_not_to_the_head():
    head, features = ClassifierHead(8, 2), torch.randn(3, 8, requires_grad=True)
    head(features)[:, 1].sum().backward()
    torch.testing.assert_close(features.grad, head.weight[1].expand(3, 8))
    assert all(not p.requires_grad and p.grad is None for p in head.parameters())


def test_a_new_head_is_spread_like_a_linear_layer_and_leaves_the_global_random_state():
    before = torch.get_rng_state()
    head, other = ClassifierHead(400, 50, seed=1), ClassifierHead(400, 50, seed=2)
    assert torch.equal(torch.get_rng_state(), before)
    with torch.random.fork_rng():
        linear = torch.nn.Linear(400, 50)
    for mine, its in ((head.weight, linear.weight), (head.bias, linear.bias)):
        assert mine.shape == its.shape
        assert mine.abs().max() <= 0.05
        assert mine.std().item() == pytest.approx(0.05 / math.sqrt(3), rel=0.25)
    assert torch.equal(head.weight, ClassifierHead(400, 50, seed=1).weight)
    assert not torch.equal(head.weight, other.weight)
    assert {name for name, _ in head.named_parameters()} == {"weight", "bias"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"embed_size": 0, "class_size": 2}, "not 0 and 2"),
        ({"embed_size": 8, "class_size": 1}, "not 8 and 1"),
        ({"embed_size": 8, "class_size": 2, "classes": ["a"]}, r"class_size=2.*\('a',\)"),
        ({"embed_size": 8, "class_size": 2, "classes": ["a", "a"]}, r"different.*\('a', 'a'\)"),
    ],
)
def test_an_impossible_head_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        ClassifierHead(**arguments)


def test_classes_are_known_by_index_and_by_name():
    head = ClassifierHead(8, 3, classes=("bad", "so-so", "good"))
    assert [head.class_id(i) for i in range(3)] == [0, 1, 2]
    assert [head.class_id(name) for name in head.classes] == [0, 1, 2]
    assert head.class_id(torch.tensor([2]).numpy()[0]) == 2
    assert ClassifierHead(8, 3).class_id("1") == 1
    for odd in (3, -1, "nice", "0", None):
        with pytest.raises(ValueError, match=rf"no class {odd!r}: give one of 0 'bad', 1 'so-so', 2 'good'"):
            head.class_id(odd)


def test_probabilities_are_those_of_the_features(llama, tokenizer):
    texts, head = ["One text.", "", "Another, longer one!"], head_of(llama)
    found = head.probabilities(llama, tokenizer, texts)
    expected = head(mean_hidden(llama, tokenizer, texts)).softmax(-1)
    torch.testing.assert_close(found, expected, **CLOSE)
    torch.testing.assert_close(found.sum(-1), torch.ones(3))
    torch.testing.assert_close(head.log_probs(llama, tokenizer, texts), expected.log(), **CLOSE)


def test_a_head_of_another_width_is_refused(llama, tokenizer):
    with pytest.raises(ValueError, match=r"width 31.* 32: train"):
        ClassifierHead(31, 2).log_probs(llama, tokenizer, ["a"])


def named_model(folder) -> PreTrainedModel:
    tiny("llama").save_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(folder).eval()


def test_a_saved_head_comes_back_whole(llama, tokenizer, tmp_path):
    head = head_of(llama, classes=["schlecht", "mittel", "größer"], seed=5)
    head.metadata = {"model": "one", "what": "ein Kopf", "losses": {"train": [0.5, 0.25]}}
    head.save_pretrained(tmp_path / "a head")
    loaded = ClassifierHead.from_pretrained(tmp_path / "a head")
    assert (loaded.classes, loaded.embed_size, loaded.class_size) == (head.classes, 32, 3)
    assert loaded.metadata == head.metadata
    assert not any(p.requires_grad for p in loaded.parameters())
    texts = ["One text.", ""]
    found = [one.log_probs(llama, tokenizer, texts) for one in (head, loaded)]
    assert torch.equal(*found)


def test_a_head_of_another_model_is_refused_unless_any_model_allows_it(tmp_path):
    one, two = named_model(tmp_path / "one"), named_model(tmp_path / "two")
    head = head_of(one)
    head.metadata["model"] = "one"
    head.save_pretrained(tmp_path / "head")
    for model, any_model in ((one, False), (two, True)):
        found = ClassifierHead.from_pretrained(tmp_path / "head", model, any_model=any_model)
        assert torch.equal(found.weight, head.weight)
    with pytest.raises(ValueError, match="made with 'one', not with 'two'"):
        ClassifierHead.from_pretrained(tmp_path / "head", two)


@pytest.mark.parametrize("any_model", [False, True])
def test_a_head_of_another_width_is_never_read_for_a_model(tmp_path, any_model):
    model, head = named_model(tmp_path / "one"), ClassifierHead(16, 2)
    head.metadata["model"] = "one"
    head.save_pretrained(tmp_path / "head")
    with pytest.raises(ValueError, match=r"width 16.* 32"):
        ClassifierHead.from_pretrained(tmp_path / "head", model, any_model=any_model)


def test_an_unknown_name_lists_the_heads_there_are(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no heads 'anger': give sentiment, sentiment5"):
        ClassifierHead.from_pretrained("anger")
    with pytest.raises(FileNotFoundError, match=r"classifier_head\.json is missing"):
        ClassifierHead.from_pretrained(tmp_path)


@pytest.mark.parametrize("change", [{"classes": ["a", "b", "c"]}, {"embed_size": 7}, {"classes": ["a", "a"]}])
def test_a_card_that_does_not_fit_its_tensors_is_a_value_error(tmp_path, change):
    ClassifierHead(8, 2).save_pretrained(tmp_path)
    path = tmp_path / "classifier_head.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match="damaged"):
        ClassifierHead.from_pretrained(tmp_path)


# --- training ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("classes", [2, 3])
def test_a_head_has_the_probabilities_of_scikit_learns_regression_on_scaled_features(tokenizer, classes):
    model, (texts, _) = tiny("llama"), vowels()
    labels = [i % classes for i in range(len(texts))]
    head = train_classifier_head(model, tokenizer, texts, labels, validation=0.25, seed=3)
    features = mean_hidden(model, tokenizer, texts).double().numpy()
    order = train_test_split(np.arange(len(texts)), test_size=0.25, stratify=labels, random_state=3)[0]
    mean, deviation = features[order].mean(axis=0), features[order].std(axis=0)
    scaled = (features - mean) / deviation
    expected = LogisticRegression(C=0.01, max_iter=1000).fit(scaled[order], np.array(labels)[order])
    found = head(torch.tensor(features)).softmax(dim=-1)
    np.testing.assert_allclose(found, expected.predict_proba(scaled), atol=2e-3)
    assert not any(parameter.requires_grad for parameter in head.parameters())


def test_features_that_are_in_the_folder_are_not_computed_again(tokenizer, tmp_path, monkeypatch):
    """Texts that were read before a stop, and for another seed, but not those of another model."""
    (texts, labels), passes, forward = vowels(), [], hf.forward

    def counted(model: PreTrainedModel, *args, **kwargs) -> object:
        passes.append(0)
        if len(passes) == 2:
            raise KeyboardInterrupt
        return forward(model, *args, **kwargs)

    whole = train_classifier_head(tiny("llama"), tokenizer, texts, labels)
    monkeypatch.setattr(hf, "forward", counted)
    with pytest.raises(KeyboardInterrupt):
        train_classifier_head(tiny("llama"), tokenizer, texts, labels, folder=tmp_path)
    head = train_classifier_head(tiny("llama"), tokenizer, texts, labels, folder=tmp_path)
    assert (len(passes) - 1) * 32 >= len(texts) > (len(passes) - 2) * 32
    assert torch.equal(head.weight, whole.weight)
    before = len(passes)
    train_classifier_head(tiny("llama"), tokenizer, texts, labels, folder=tmp_path, seed=1)
    assert len(passes) == before
    train_classifier_head(tiny("gpt2"), tokenizer, texts, labels, folder=tmp_path)
    assert len(passes) > before


def test_a_head_learns_what_a_random_model_shows(llama, tokenizer):
    texts, labels = vowels()
    before = torch.get_rng_state()
    head = train_classifier_head(llama, tokenizer, texts[:80], labels[:80], classes=("a", "o"))
    assert torch.equal(torch.get_rng_state(), before)
    p = head.probabilities(llama, tokenizer, texts[80:])
    assert (p.argmax(-1) == torch.tensor(labels[80:])).float().mean() > 0.95
    facts = head.metadata
    assert facts["texts"] == {"all": 80, "held out": 8, "a": 40, "o": 40}
    assert facts["validation"]["n"] == 8
    assert not any(p.requires_grad for p in head.parameters())


def test_the_same_seed_gives_the_same_head_and_its_card_survives_saving(tokenizer, tmp_path):
    texts, labels = vowels(40)
    one, two, other = (
        train_classifier_head(tiny("llama"), tokenizer, texts, labels, seed=seed) for seed in (0, 0, 1)
    )
    assert torch.equal(one.weight, two.weight)
    assert not torch.equal(one.weight, other.weight)
    one.save_pretrained(tmp_path)
    assert ClassifierHead.from_pretrained(tmp_path, tiny("llama")).metadata == one.metadata
    assert one.classes == ("0", "1")


@pytest.mark.parametrize("kind", [list, np.array, torch.tensor, pd.Series])
def test_labels_may_come_in_any_sequence(tokenizer, kind):
    texts, labels = vowels(40)
    head = train_classifier_head(tiny("gpt2"), tokenizer, texts, kind(labels))
    assert head.metadata["texts"]["1"] == 20


@pytest.mark.parametrize(
    ("texts", "labels", "given", "message"),
    [
        (40, [0, 1] * 19, {}, r"give 40 labels, each of 0 to 1 at least once, not 38 of \[0, 1\]"),
        (0, [], {}, "give 0 labels"),
        (40, [0, 2] * 20, {}, r"0 to 1 .*\[0, 2\]"),
        (40, [0] * 40, {}, r"0 to 1 .*\[0\]"),
        (40, [0, 1] * 20, {"classes": ["a", "b", "c"]}, "0 to 2 "),
        (40, [0, 0.5] * 20, {}, r"labels of train_classifier_head must be a list of whole numbers, .*0\.5"),
        (40, ["a", "b"] * 20, {}, "labels of train_classifier_head must be a list of whole numbers, .*'a'"),
        (4, [0, 1] * 2, {}, "test_size = 1"),
        (40, [0] * 39 + [1], {}, "only 1 member"),
        (40, [0, 1] * 20, {"validation": 1.0}, "validation must be above 0 and below 1, not 1.0"),
        (40, [0, 1] * 20, {"validation": 5}, "validation must be above 0 and below 1, not 5"),
    ],
)
def test_what_cannot_be_learned_from_is_refused(tokenizer, texts, labels, given, message):
    with pytest.raises((TypeError, ValueError), match=message):
        train_classifier_head(tiny("gpt2"), tokenizer, vowels(40)[0][:texts], labels, **given)


# --- the report -------------------------------------------------------------------------------------------


def test_a_report_counts_what_is_right_and_what_was_taken_for_what():
    head = ClassifierHead(3, 3, classes=[*"abc"])
    head.load_state_dict({"weight": torch.eye(3), "bias": torch.zeros(3)})  # the class is the largest feature
    taken, labels = torch.tensor([0, 0, 0, 1, 1, 0]), torch.tensor([0, 0, 1, 1, 2, 2])
    found = report(head, 50 * torch.eye(3)[taken], labels)
    assert found.confusion.values.tolist() == [[2, 0, 0], [1, 1, 0], [1, 1, 0]]
    assert found.confusion.loc["b", "a"] == 1
    assert found.correct.tolist() == [True, True, False, True, False, False]
    assert found.macro_f1 == pytest.approx(7 / 18)
    assert found.calibration_error == pytest.approx(0.5)
    assert found.reliability.values.tolist() == [[6, 1, 0.5]]
    only_a = report(head, torch.eye(3)[:1], torch.tensor([0]))
    assert only_a.macro_f1 == pytest.approx(1 / 3)  # a class that is neither there nor guessed counts 0


def test_the_calibration_error_is_near_zero_for_labels_drawn_from_the_probabilities():
    head, generator = ClassifierHead(8, 4, seed=2), torch.Generator().manual_seed(0)
    features = 4 * torch.randn(20_000, 8, generator=generator)
    labels = torch.multinomial(head(features).softmax(-1), 1, generator=generator)[:, 0]
    found = report(head, features, labels)
    assert found.calibration_error < 0.02
    assert found.reliability["n"].sum() == 20_000
    head.weight *= 3  # too sure of itself
    assert report(head, features, labels).calibration_error > 0.1


def test_a_reliability_table_has_a_row_for_each_range_with_texts_in_it():
    head = ClassifierHead(2, 2)
    head.load_state_dict({"weight": torch.eye(2), "bias": torch.zeros(2)})
    confidence = torch.tensor([0.55, 0.51, 0.91, 0.99, 1.0])
    features = torch.stack([confidence, 1 - confidence], dim=1).clamp(min=1e-30).log()
    table = report(head, features, torch.tensor([0, 1, 0, 0, 1])).reliability
    assert table.index.tolist() == [0.5, 0.9]
    assert table["n"].tolist() == [2, 3]
    assert table["accuracy"].tolist() == pytest.approx([0.5, 2 / 3])
    assert table["confidence"].tolist() == pytest.approx([0.53, 2.9 / 3])


# --- the heads that come with the package -----------------------------------------------------------------

CLEAR = {
    "positive": [
        "A wonderful film, warm, funny and beautifully acted from start to finish.",
        "The best movie of the year, I loved every minute of it.",
        "A charming and touching story that stays with you.",
        "Brilliant, moving and full of surprises, a real delight.",
        "Superb performances make this drama a joy to watch.",
    ],
    "negative": [
        "A terrible film, dull, stupid and badly acted from start to finish.",
        "The worst movie of the year, I hated every minute of it.",
        "A tedious and pointless story that you forget at once.",
        "Boring, predictable and far too long, a complete waste of time.",
        "Awful performances make this drama painful to watch.",
    ],
}


@pytest.fixture(scope="module")
def smollm2():
    return su.load(dtype="float32", device="cpu")


@pytest.mark.parametrize("name", ["sentiment", "sentiment5"])
def test_shipped_heads_know_clear_sentences(smollm2, name):
    model, tokenizer = smollm2
    head = ClassifierHead.from_pretrained(name, model)
    half = head.class_size // 2
    for side, texts in CLEAR.items():
        p = head.probabilities(model, tokenizer, texts)
        bad, good = p[:, :half].sum(1), p[:, -half:].sum(1)
        assert ((good > bad) == (side == "positive")).sum() >= 4, (side, p)


@pytest.mark.parametrize("name", ["sentiment", "sentiment5", "toxicity"])
def test_shipped_heads_fit_the_embedded_model_and_say_how_good_they_are(smollm2, name):
    head = ClassifierHead.from_pretrained(name, smollm2[0])
    assert head.metadata["command"].startswith(f"python data/make/heads.py {name}")
    for found in head.metadata["judged"].values():
        mean, low, high = found["accuracy"]
        assert low < mean < high
        assert np.sum(found["confusion"]) == found["n"]
        assert np.trace(found["confusion"]) / found["n"] == pytest.approx(mean, abs=1e-4)


def test_a_head_that_holds_nan_is_neither_saved_nor_read(tmp_path):
    head = ClassifierHead(8, 2)
    head.save_pretrained(tmp_path)
    head.weight[1, 3] = float("nan")
    with pytest.raises(ValueError, match="weight holds inf or NaN"):
        head.save_pretrained(tmp_path)
    assert torch.equal(ClassifierHead.from_pretrained(tmp_path).weight, ClassifierHead(8, 2).weight)
    head.weight[1, 3], head.metadata["loss"] = 0.0, float("nan")
    with pytest.raises(ValueError, match="JSON has no NaN"):
        head.save_pretrained(tmp_path)
