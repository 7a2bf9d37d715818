"""A classifier head: one affine map from the mean hidden state of a text to the logits of its classes.

With h_t the last hidden state of token t, after the final norm, of a text of T tokens, BOS included:

    log p(class | text) = log_softmax(W · (1/T) Σ_t h_t + b)

Three heads for the embedded model are in data/heads. Source: Dathathri et al. 2020, section 3.2. Its authors
fit W and b by Adam; this is logistic regression.
"""

import math
from collections.abc import Sequence
from numbers import Integral
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
import pandas as pd
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import confusion_matrix, f1_score
from sklearn.model_selection import train_test_split
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn

from .. import checkpoint, hf
from ..models import Model, Texts, Tokenizer, model_id, own_tokenizer, text_ids
from ..types import holds, require

C = 0.01  # inverse strength of the L2 penalty, for features scaled to unit variance


class ClassifierHead(nn.Module, checkpoint.Saved):
    """Weight [C, D] and bias [C] for C classes and hidden states of width D, frozen and at first random.

    classes: their names, by default "0", "1", …. metadata: "model", the id of the model that the head belongs
    to, or "", and facts of its training. ValueError for D < 1, C < 2, or names that are not C different ones.
    """

    file_name = "classifier_head"
    shipped = "heads"
    facts = ("classes", "embed_size", "card")

    def __init__(
        self, embed_size: int, class_size: int, *, classes: Sequence[str] | None = None, seed: int = 0
    ) -> None:
        super().__init__()
        if embed_size < 1 or class_size < 2:
            raise ValueError(f"give embed_size ≥ 1 and class_size ≥ 2, not {embed_size} and {class_size}")
        self.embed_size, self.class_size = embed_size, class_size
        self.classes = tuple(map(str, range(class_size) if classes is None else classes))
        if not len(self.classes) == len(set(self.classes)) == class_size:
            raise ValueError(f"class_size={class_size} needs as many different classes, not {self.classes}")
        self.metadata: dict[str, Any] = {"model": ""}
        bound, generator = 1 / math.sqrt(embed_size), torch.Generator().manual_seed(seed)  # as nn.Linear
        shapes = (class_size, embed_size), (class_size,)
        numbers = (torch.empty(shape).uniform_(-bound, bound, generator=generator) for shape in shapes)
        self.weight, self.bias = (nn.Parameter(each, requires_grad=False) for each in numbers)

    def forward(self, features: Tensor) -> Tensor:
        """Logits [..., C] of features [..., D], in float32; gradients flow to the features."""
        known = holds("float", features) and features.shape[-1] == self.embed_size
        require(known, f"hidden states of width {self.embed_size}", features=features)
        features = features.float()  # on whatever device: a head is loaded to the CPU, a model to the GPU
        return nn.functional.linear(features, self.weight.to(features), self.bias.to(features))

    def class_id(self, target: int | str | None) -> int:
        """The index of a class given by index, from 0, or by name; ValueError if there is no such class."""
        known = range(self.class_size) if isinstance(target, Integral) else self.classes
        if target not in known:
            names = ", ".join(f"{i} {name!r}" for i, name in enumerate(self.classes))
            raise ValueError(f"this head has no class {target!r}: give one of {names}")
        return known.index(target)

    def log_probs(self, model: Model, tokenizer: Tokenizer, texts: Texts) -> Tensor:
        """Log probability of each class for each text, [N, C] on the CPU; texts as for `mean_hidden`."""
        self.require_fit(model)
        return self(mean_hidden(model, tokenizer, texts)).log_softmax(dim=-1)

    def probabilities(self, model: Model, tokenizer: Tokenizer, texts: Texts) -> Tensor:
        """Probability of each class for each text, [N, C] on the CPU."""
        return self.log_probs(model, tokenizer, texts).exp()

    def require_fit(self, model: Model) -> None:
        """ValueError if the model's last hidden states have another width."""
        if self.embed_size != (width := hf.last_width(hf.unwrapped(model))):
            what = f"head of width {self.embed_size}, model of {width}"
            raise ValueError(f"{what}: train_classifier_head fits one")

    def to_files(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """For `save_pretrained`."""
        card = {name: fact for name, fact in self.metadata.items() if name != "model"}
        facts = {"model": self.metadata.get("model", ""), "embed_size": self.embed_size}
        return {"weight": self.weight, "bias": self.bias}, facts | {"classes": self.classes, "card": card}

    @classmethod
    def from_files(cls, tensors: dict[str, Tensor], facts: dict[str, Any]) -> Self:
        """For `from_pretrained`; RuntimeError or ValueError if classes and width do not fit the tensors."""
        head = cls(facts["embed_size"], len(facts["classes"]), classes=facts["classes"])
        head.load_state_dict(tensors)
        head.metadata = {"model": facts["model"], **facts["card"]}
        return head


def mean_hidden(
    model: Model,
    tokenizer: Tokenizer,
    texts: Texts,
    *,
    max_tokens: int = 256,
    folder: str | Path | None = None,
) -> Tensor:
    """Mean of the unsteered model's last hidden states over a text's tokens, [N, D] in float32 on the CPU.

    Texts are cut after max_tokens tokens, BOS included. Tokens of id 0 count, unlike in the authors' program.
    folder: keeps the means of each batch, so that a call that was stopped goes on.
    ValueError for a text without tokens, and max_tokens below 1.
    """
    require(max_tokens >= 1, "at least 1", max_tokens=max_tokens)
    tokenizer, model = own_tokenizer(model, tokenizer), hf.unwrapped(model)
    rows = [row[:max_tokens] for row in text_ids(tokenizer, texts, as_data=True)]
    found = torch.empty(len(rows), hf.last_width(model))
    for i, mean in checkpoint.last_states(model, rows, of_text=_mean, folder=folder):
        found[i] = mean
    return found


def _mean(states: Tensor) -> Tensor:
    return states.float().mean(dim=0)


def masked_mean(hidden: Tensor, mask: Tensor) -> Tensor:
    """Mean over positions of hidden states [B, T, D] where mask [B, T] is 1, [B, D] in float32."""
    mask = mask[..., None].bool()
    return hidden.float().masked_fill(~mask, 0).sum(dim=1) / mask.sum(dim=1)  # padding may hold NaN


def train_classifier_head(
    model: Model,
    tokenizer: Tokenizer,
    texts: Texts,
    labels: Sequence[int],
    *,
    classes: Sequence[str] | None = None,  # their names
    validation: float = 0.1,
    max_tokens: int = 256,
    seed: int = 0,
    folder: str | Path | None = None,
) -> ClassifierHead:
    """Fit a head for a model to labelled texts; its `metadata` says on what, how, and how well.

    labels: one for each text, 0, 1, …. validation: the share of texts held out, of each class alike;
    metadata["validation"] has the accuracy on them. folder: as for `mean_hidden`. ValueError for labels that
    are not one of 0, 1, … for each text, or that leave out a class, and for too few texts to hold some out.
    """
    require(0 < validation < 1, "above 0 and below 1", validation=validation)
    wanted = np.asarray(labels)
    require(seed >= 0, "at least 0", seed=seed)
    require(classes is None or len(classes) >= 2, "two names or more", classes=classes)
    known = set(range(max(2, len(np.unique(wanted))) if classes is None else len(classes)))
    if len(texts) != len(wanted) or set(wanted.tolist()) != known:
        given = f"at least once, not {len(wanted)} of {np.unique(wanted).tolist()[:5]}"
        raise ValueError(f"give {len(texts)} labels, each of 0 to {len(known) - 1} {given}")
    wanted = wanted.astype(np.int64)
    counts, rows = np.bincount(wanted).tolist(), torch.arange(len(wanted))
    fitted, held = train_test_split(rows, test_size=validation, stratify=wanted, random_state=seed)
    features = mean_hidden(model, tokenizer, texts, max_tokens=max_tokens, folder=folder)
    scaler, logistic = StandardScaler(), LogisticRegression(C=C, max_iter=1000)
    logistic.fit(scaler.fit_transform(features[fitted].numpy()), wanted[fitted])
    weight, bias = logistic.coef_ / scaler.scale_, logistic.intercept_
    bias = bias - weight @ scaler.mean_
    if len(counts) == 2:  # scikit-learn fits the difference of the two logits
        weight, bias = (np.concatenate([-difference, difference]) / 2 for difference in (weight, bias))
    head = ClassifierHead(features.shape[1], len(counts), classes=classes)
    head.load_state_dict({"weight": torch.tensor(weight), "bias": torch.tensor(bias)})
    accuracy = float(report(head, features[held], wanted[held]).correct.mean())
    head.metadata = {
        "model": model_id(model),
        "weights": checkpoint.weights_of(model),
        "texts": {"all": len(wanted), "held out": len(held), **dict(zip(head.classes, counts, strict=True))},
        "training": {"C": C, "validation": validation, "seed": seed, "max_tokens": max_tokens},
        "validation": {"n": len(held), "accuracy": accuracy},
    }
    return head


class HeadReport(NamedTuple):
    """What a head gets right among N texts."""

    correct: np.ndarray  # whether the likeliest class is the true one, [N] of bool
    macro_f1: float  # the mean of the classes' F1
    calibration_error: float  # the mean over texts of |accuracy − confidence| of their range in `reliability`
    reliability: pd.DataFrame  # n, confidence, accuracy for ten ranges of the likeliest class's probability
    confusion: pd.DataFrame  # a row for each true class, a column for each predicted one


def report(head: ClassifierHead, features: Tensor, labels: Sequence[int]) -> HeadReport:
    """Judge a head on features [N, D] of texts whose classes [N] are known."""
    labels, known = np.asarray(labels), range(head.class_size)
    if features.shape[:1] != labels.shape or not holds("float", features) or not features.isfinite().all():
        shapes = f"{tuple(features.shape)} and {len(labels)} labels"
        raise ValueError(f"give finite features [N, D] and a label for each, not features {shapes}")
    confidence, guess = (found.cpu().numpy() for found in head(features).double().softmax(dim=-1).max(dim=-1))
    table = pd.DataFrame({"confidence": confidence, "accuracy": guess == labels})
    tenth = pd.Series(np.minimum(np.floor(10 * confidence), 9) / 10, name="from")
    table = table.assign(n=1).groupby(tenth).agg({"n": "size", "confidence": "mean", "accuracy": "mean"})
    error = np.average((table["accuracy"] - table["confidence"]).abs(), weights=table["n"])
    f1 = f1_score(labels, guess, labels=known, average="macro", zero_division=0.0)
    names = (pd.Index(head.classes, name=name) for name in ("class", "taken for"))
    confusion = pd.DataFrame(confusion_matrix(labels, guess, labels=known), *names)
    return HeadReport(guess == labels, float(f1), float(error), table, confusion)
