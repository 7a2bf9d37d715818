"""A classifier head: one affine map from the mean hidden state of a text to the logits of its classes.

With h_t the last hidden state of token t, after the final norm, of a text of T tokens, BOS included:

    log p(class | text) = log_softmax(W · (1/T) Σ_t h_t + b)

Source: Dathathri et al. 2020, Plug and Play Language Models, section 3.2. Three heads for the embedded model
are in data/heads; `python -m steer_utils.classifier_head sentiment` trains one of them again, and
`python -m steer_utils.classifier_head NAME --csv FILE --text COLUMN --label COLUMN` one on texts of yours.
"""

import math
from collections.abc import Sequence
from numbers import Integral
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .. import checkpoint, data, hf
from ..generation import progress
from ..models import own_tokenizer, pad, token_ids

HEADS = data.DATA / "heads"


class ClassifierHead(nn.Module):
    """Weight [C, D] and bias [C] for C classes and hidden states of width D; frozen, at first random.

    classes: the names of the classes, by default "0", "1", …; metadata: {"model": id of the model that the
    head belongs to, "" if none} and whatever is known of its training. It computes in float32. Same seed,
    same head; the global random state does not move. ValueError for D < 1, C < 2, or not C different names.
    """

    def __init__(
        self, embed_size: int, class_size: int, *, classes: Sequence[str] | None = None, seed: int = 0
    ) -> None:
        super().__init__()
        if embed_size < 1 or class_size < 2:
            raise ValueError(
                f"a head needs embed_size ≥ 1 and class_size ≥ 2, not {embed_size} and {class_size}"
            )
        self.embed_size, self.class_size = embed_size, class_size
        self.classes = tuple(map(str, range(class_size) if classes is None else classes))
        if not len(self.classes) == len(set(self.classes)) == class_size:
            raise ValueError(f"class_size={class_size} needs as many different classes, not {self.classes}")
        self.metadata: dict[str, Any] = {"model": ""}
        bound, generator = 1 / math.sqrt(embed_size), torch.Generator().manual_seed(seed)  # as nn.Linear
        self.weight, self.bias = (
            nn.Parameter(torch.empty(shape).uniform_(-bound, bound, generator=generator), requires_grad=False)
            for shape in ((class_size, embed_size), (class_size,))
        )

    def forward(self, features: Tensor) -> Tensor:
        """Logits [..., C] of features [..., D], in float32; gradients flow to the features."""
        features = features.float()  # wherever they are: a head is loaded to the CPU, a model to the GPU
        return nn.functional.linear(features, self.weight.to(features), self.bias.to(features))

    def extra_repr(self) -> str:
        return f"{self.embed_size}, {self.class_size}, classes={self.classes}"

    def class_id(self, target: int | str) -> int:
        """The index of a class given by index, from 0, or by name; ValueError if there is no such class."""
        known = range(self.class_size) if isinstance(target, Integral) else self.classes
        if target not in known:
            names = ", ".join(f"{i} {name!r}" for i, name in enumerate(self.classes))
            raise ValueError(f"this head has no class {target!r}: give one of {names}")
        return known.index(target)

    def require_width(self, model: PreTrainedModel) -> None:
        """ValueError if the head does not fit the model's last hidden states."""
        width = hf.last_width(hf.unwrapped(model))
        if self.embed_size != width:
            raise ValueError(
                f"this head takes hidden states of width {self.embed_size}; the model's have {width}: train "
                f"one for it with train_classifier_head"
            )

    def log_probs(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None,
        texts: Sequence[str | Sequence[int]],
    ) -> Tensor:
        """Log probability of each class for each text, [N, C] on the CPU; texts as for `mean_hidden`."""
        self.require_width(model)
        features = mean_hidden(model, tokenizer, texts).to(self.weight.device)
        return self(features).log_softmax(dim=-1).cpu()

    def probabilities(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None,
        texts: Sequence[str | Sequence[int]],
    ) -> Tensor:
        """Probability of each class for each text, [N, C] on the CPU."""
        return self.log_probs(model, tokenizer, texts).exp()

    # --- files --------------------------------------------------------------------------------------------

    def save_pretrained(self, folder: str | Path) -> None:
        """Write `classifier_head.safetensors` and `classifier_head.json` into the folder."""
        card = {name: fact for name, fact in self.metadata.items() if name != "model"}
        facts = {"model": self.metadata.get("model", ""), "embed_size": self.embed_size}
        facts |= {"classes": self.classes, "card": card}
        checkpoint.save(folder, "classifier_head", {"weight": self.weight, "bias": self.bias}, **facts)

    @classmethod
    def from_pretrained(
        cls, source: str | Path, model: PreTrainedModel | None = None, *, any_model: bool = False
    ) -> Self:
        """Read a head that comes with this package ("sentiment", "sentiment5", …), or a saved one's folder.

        FileNotFoundError or ValueError if it is not there whole. With `model` also ValueError if the head
        has another width, or if it was made with another model and `any_model` does not allow that.
        """
        folder, needed = data.find("heads", source), ("classes", "embed_size", "card")
        tensors, facts = checkpoint.load(folder, "classifier_head", model, any_model=any_model, needed=needed)
        try:
            head = cls(facts["embed_size"], len(facts["classes"]), classes=facts["classes"])
            head.load_state_dict(tensors)
        except (ValueError, RuntimeError) as error:  # classes and width that are not those of the tensors
            raise ValueError(f"the classifier_head in {str(folder)!r} is damaged ({error})") from error
        head.metadata = {"model": facts["model"], **facts["card"]}
        if model is not None:
            head.require_width(model)
        return head


# --- features ---------------------------------------------------------------------------------------------


def mean_hidden(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    texts: Sequence[str | Sequence[int]],
    *,
    batch_size: int = 64,
    max_tokens: int = 256,
) -> Tensor:
    """Mean of the plain model's last hidden states over all tokens of each text, [N, D] float32, on the CPU.

    texts: strings, or token ids with BOS in front; cut after max_tokens tokens, BOS included. Every token
    counts, and padding never does; the original left out each token whose id is 0, a word like any other.
    ValueError for a text without tokens, TypeError for one string in place of a list.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, not {batch_size}")
    rows = _rows(own_tokenizer(model, tokenizer), texts, max_tokens)
    model = hf.unwrapped(model)
    found = torch.empty(len(rows), hf.last_width(model))
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))  # of one length, less padding
    with progress(len(rows), unit="text") as bar:
        for i in range(0, len(rows), batch_size):
            chunk = order[i : i + batch_size]
            found[chunk] = _means(model, [rows[j] for j in chunk])
            bar.update(len(chunk))
    return found


@torch.no_grad()
def _means(model: PreTrainedModel, rows: Sequence[Sequence[int]]) -> Tensor:
    batch = pad(rows, rows[0][0], padding_side="right", device=model.device)
    with hf.unsteered():
        hidden = hf.forward(model, **batch, use_cache=False).last_hidden_state.float()
    return masked_mean(hidden, batch["attention_mask"]).cpu()


def masked_mean(hidden: Tensor, mask: Tensor) -> Tensor:
    """Mean over positions of hidden states [B, T, D] where mask [B, T] is 1, [B, D]."""
    mask = mask[..., None].bool()
    return hidden.masked_fill(~mask, 0).sum(dim=1) / mask.sum(dim=1)  # padding may hold NaN


def _rows(
    tokenizer: PreTrainedTokenizerBase | None, texts: Sequence[str | Sequence[int]], max_tokens: int
) -> list[list[int]]:
    """Token ids of each text, at most max_tokens."""
    if isinstance(texts, str):
        raise TypeError(f"give a list of texts, not the single text {texts!r}")
    if max_tokens < 1:
        raise ValueError(f"max_tokens must be at least 1, not {max_tokens}")
    rows = [token_ids(tokenizer, text) if isinstance(text, str) else list(text) for text in texts]
    if empty := [i for i, row in enumerate(rows) if not row]:
        raise ValueError(f"the text of index {empty[0]} has no tokens: its ids must begin with BOS")
    return [row[:max_tokens] for row in rows]
