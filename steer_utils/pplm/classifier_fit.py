"""Training a classifier head, and what it gets right: accuracy, F1, calibration, confusions.

The model stays as it is. Each text's mean hidden state is computed once; on them one affine map is trained
by Adam on the mean cross-entropy, and the epoch with the lowest loss on texts held out is the one that is
kept. Source: Dathathri et al. 2020, section 3.2, and the authors' run_pplm_discrim_train.py.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from sklearn.metrics import confusion_matrix, f1_score
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .. import hf
from ..generation import progress
from ..measure.metrics import Interval, bootstrap
from ..models import model_id
from .classifier import ClassifierHead, mean_hidden

BINS = 10  # of the reliability table


def train_classifier_head(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    texts: Sequence[str | Sequence[int]],
    labels: Sequence[int],
    *,
    classes: Sequence[str] | None = None,
    epochs: int = 40,
    lr: float = 1e-3,
    batch_size: int = 64,
    validation: float = 0.1,
    max_tokens: int = 256,
    seed: int = 0,
) -> ClassifierHead:
    """Train a head for a model on labelled texts; its `metadata` says on what, how, and how well.

    texts: as for `mean_hidden`. labels: 0 … C−1, one a text. classes: their names. validation: the share of
    texts held out, as many of each class, to choose the epoch by; metadata["validation"] is the `HeadReport`
    on them, a little flattering for that reason. ValueError for no texts, labels that are not 0 … C−1 with
    each of them present, or too few texts to hold some out. The same seed gives the same head.
    """
    wanted = _labels(texts, labels, classes)
    rows, held = _split(wanted, validation, seed)
    width = hf.last_width(hf.unwrapped(model))
    head = ClassifierHead(width, int(wanted.max()) + 1, classes=classes, seed=seed)
    features = mean_hidden(model, tokenizer, texts, batch_size=batch_size, max_tokens=max_tokens)
    losses = fit_best(
        head,
        (features[rows], wanted[rows]),
        (features[held], wanted[held]),
        epochs=epochs,
        lr=lr,
        batch_size=batch_size,
        generator=torch.Generator().manual_seed(seed),
    )
    counts = zip(head.classes, wanted.bincount().tolist(), strict=True)
    head.metadata = {
        "model": model_id(model),
        "texts": {"all": len(wanted), "held out to choose the epoch": len(held)} | dict(counts),
        "training": {"epochs": epochs, "lr": lr, "batch_size": batch_size, "seed": seed}
        | {"max_tokens": max_tokens, "kept epoch": losses["validation"].index(min(losses["validation"]))},
        "losses": losses,
        "validation": report(head, features[held], wanted[held]).card(),
    }
    return head


def _labels(texts: Sequence, labels: Sequence[int], classes: Sequence[str] | None) -> Tensor:
    """Labels as integers [N]. ValueError if they are not one of 0 … C−1 for each text, with each present."""
    if len(texts) != len(labels) or not len(texts):
        raise ValueError(
            f"give a label for each text, and at least one: {len(texts)} texts, {len(labels)} labels"
        )
    found = np.asarray(labels)
    if found.dtype.kind not in "iub":
        raise ValueError(f"labels must be whole numbers from 0, not {found.tolist()[:5]}")
    known = range(len(classes)) if classes is not None else range(max(2, int(found.max()) + 1))
    if odd := set(found.tolist()) ^ set(known):
        raise ValueError(
            f"labels must be 0 to {len(known) - 1}, each of them for some text; missing or unknown: "
            f"{sorted(odd)[:5]}"
        )
    return torch.tensor(found.astype(np.int64))


def _split(labels: Tensor, validation: float, seed: int) -> tuple[Tensor, Tensor]:
    """Rows to train on and rows held out, with the classes in the same proportions."""
    if not 0 < validation < 1:
        raise ValueError(f"validation is a share of the texts, between 0 and 1, not {validation}")
    rows = torch.arange(len(labels))
    try:
        return tuple(train_test_split(rows, test_size=validation, stratify=labels, random_state=seed))
    except ValueError as error:
        raise ValueError(
            f"{len(labels)} texts, {labels.bincount().tolist()} of the classes, are too few to hold out "
            f"{validation} of each class ({error}): give more texts, or another validation"
        ) from error


# --- steps ------------------------------------------------------------------------------------------------


class Step(NamedTuple):
    """One update of a head: its epoch from 0, and the loss of its batch before it, in nats."""

    epoch: int
    loss: float


def fit(
    head: ClassifierHead,
    features: Tensor,
    labels: Tensor,
    *,
    lr: float,
    batch_size: int,
    epochs: int,
    generator: torch.Generator | None = None,
) -> Iterator[Step]:
    """Train the head in place by Adam (0.9, 0.999, no decay), one update for each step that is asked for.

    features: [N, D], labels: [N]. generator: shuffles the rows anew in each epoch; without it they keep
    their order. Between the steps the head is frozen, as ever.
    """
    optimizer = torch.optim.Adam(head.parameters(), lr=lr)
    for epoch in range(epochs):
        count = len(features)
        order = torch.arange(count) if generator is None else torch.randperm(count, generator=generator)
        for rows in order.split(batch_size):
            yield Step(epoch, _update(head, optimizer, features[rows], labels[rows]))


@torch.enable_grad()
def _update(head: ClassifierHead, optimizer: torch.optim.Adam, features: Tensor, labels: Tensor) -> float:
    """One step of the optimiser; the loss before it."""
    head.requires_grad_(True)
    loss = nn.functional.cross_entropy(head(features), labels)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    head.requires_grad_(False)
    return loss.item()


def fit_best(
    head: ClassifierHead,
    train: tuple[Tensor, Tensor],
    held: tuple[Tensor, Tensor],
    *,
    epochs: int,
    batch_size: int,
    **settings: Any,
) -> dict[str, list[float]]:
    """`fit`, after which the head is what it was after the epoch with the lowest loss on `held`.

    train, held: features [N, D] and labels [N]. Returns the mean losses of each epoch, in nats.
    """
    if epochs < 1:
        raise ValueError(f"epochs must be at least 1, not {epochs}")
    steps = fit(head, *train, epochs=epochs, batch_size=batch_size, **settings)
    losses, best = {"train": [], "validation": []}, {}
    with progress(epochs, unit="epoch") as bar:
        for _ in range(epochs):
            epoch = [step.loss for step in islice(steps, -(-len(train[0]) // batch_size))]
            losses["train"].append(round(float(np.mean(epoch)), 5))
            losses["validation"].append(round(nn.functional.cross_entropy(head(held[0]), held[1]).item(), 5))
            if losses["validation"][-1] < min(losses["validation"][:-1], default=np.inf):
                best = {name: value.clone() for name, value in head.state_dict().items()}
            bar.update()
    if not best:
        raise ValueError(f"the loss on the held-out texts is {losses['validation']}, never finite: lower lr")
    head.load_state_dict(best)
    return losses


# --- report -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class HeadReport:
    """What a head gets right among n texts.

    accuracy: share of texts whose likeliest class is theirs, with its 95 % interval. f1: of each class.
    brier: mean over texts of half the squared distance between the probabilities and the class, 0 … 1.
    calibration_error: mean over texts of |accuracy − confidence| of their row in `reliability` (ECE), whose
    rows are ten equal ranges of the likeliest class's probability: n, confidence, accuracy.
    confusion: a row for each class of the texts, a column for each class that they were taken for.
    """

    n: int
    accuracy: Interval
    f1: dict[str, float]
    brier: float
    calibration_error: float
    reliability: pd.DataFrame
    confusion: pd.DataFrame

    @property
    def macro_f1(self) -> float:
        """The mean of the classes' F1, each counting alike."""
        return float(np.mean(list(self.f1.values())))

    def __str__(self) -> str:
        return (
            f"accuracy {self.accuracy:.3f} of {self.n:,} texts, macro F1 {self.macro_f1:.3f}, "
            f"Brier {self.brier:.3f}, calibration error {self.calibration_error:.3f}"
        )

    def card(self) -> dict[str, Any]:
        """The same as numbers and lists that JSON can hold."""
        return {
            "n": self.n,
            "accuracy": [round(value, 4) for value in self.accuracy],
            "macro F1": round(self.macro_f1, 4),
            "F1": {name: round(value, 4) for name, value in self.f1.items()},
            "Brier": round(self.brier, 4),
            "calibration error": round(self.calibration_error, 4),
            "reliability": self.reliability.reset_index().round(4).to_dict("records"),
            "confusion": self.confusion.to_numpy().tolist(),
        }


def report(head: ClassifierHead, features: Tensor, labels: Tensor) -> HeadReport:
    """Judge a head on features [N, D] of texts whose classes are known, [N]; two texts at least."""
    probabilities = head(features).softmax(dim=-1).double().cpu().numpy()
    labels = np.asarray(labels.cpu())
    guess, confidence = probabilities.argmax(axis=1), probabilities.max(axis=1)
    correct, known = guess == labels, range(head.class_size)
    f1 = f1_score(labels, guess, labels=known, average=None, zero_division=0.0)
    table = reliability(confidence, correct)
    gaps = (table["accuracy"] - table["confidence"]).abs()
    names = pd.Index(head.classes, name="class"), pd.Index(head.classes, name="taken for")
    return HeadReport(
        n=len(labels),
        accuracy=bootstrap(correct),
        f1=dict(zip(head.classes, map(float, f1), strict=True)),
        brier=float(((probabilities - np.eye(head.class_size)[labels]) ** 2).sum(axis=1).mean() / 2),
        calibration_error=float((gaps * table["n"]).sum() / len(labels)),
        reliability=table,
        confusion=pd.DataFrame(confusion_matrix(labels, guess, labels=known), *names),
    )


def reliability(confidence: np.ndarray, correct: np.ndarray) -> pd.DataFrame:
    """How often texts of like confidence are right: n, confidence, accuracy, by the range's lower end."""
    lower = pd.Series(np.minimum(np.floor(confidence * BINS), BINS - 1) / BINS, name="from")
    table = pd.DataFrame({"n": 1, "confidence": confidence, "accuracy": correct.astype(float)})
    return table.groupby(lower).agg({"n": "size", "confidence": "mean", "accuracy": "mean"})
