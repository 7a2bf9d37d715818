"""Steers that several notebooks use and none of them derives: to compare with, or for other models.

Shapes: B prompts, T tokens, P cached positions, N states, D width, V vocabulary.
"""

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from .. import data, hf
from ..lm_steer.steer import AddSteer, LMSteer, OffsetSteer
from ..lm_steer.training import train_lm_steer
from ..lm_steer.words import token_texts
from ..models import Model, Texts, Tokenizer, encode
from ..pplm.steps import StepInputs

SIZES = {"fast": (1500, 120), "full": (8000, 1000)}  # texts and steps
TRAINING = {"fast": {"rank": 64}, "full": {"rank": 1000, "batch_tokens": 4096, "regularization": 1e-6}}


def film_snippets(count: int, *, seed: int = 0) -> tuple[list[str], list[float]]:
    """So many snippets of film reviews to train on, and their ratings as labels from −1 to 1."""
    films = data.rated_sentences("movie", split="train").sample(count, random_state=seed)
    return films["text"].tolist(), (films["rating"] / 2).clip(-1, 1).tolist()


def toward_positive(model: Model, tokenizer: Tokenizer, profile: str, scale: float = 1.0) -> LMSteer:
    """An LM-Steer towards positive film reviews, trained here; "full" has the paper's settings."""
    count, n_steps = SIZES[profile]
    snippets = film_snippets(max(100, round(scale * count)))
    n_steps = max(10, round(scale * n_steps))
    return train_lm_steer(model, tokenizer, *snippets, n_steps=n_steps, **TRAINING[profile])


def random_like(steer: LMSteer, seed: int) -> LMSteer:
    """A steer of the same shape with random numbers."""
    noise = torch.Generator().manual_seed(seed)
    drawn = {name: torch.randn(one.shape, generator=noise) for name, one in steer.tensors().items()}
    return replace(steer, **drawn)


def constant(steer: LMSteer, states: Tensor) -> AddSteer:
    """What the first map of a steer makes of the mean of states [N, D]: one vector for all contexts."""
    mean = states.float().mean(dim=0).cpu()
    read, write = (tensor[0].to(mean) for tensor in steer.tensors().values())
    return AddSteer((mean @ read @ write.T)[None], epsilon=steer.epsilon)


def of_words(model: Model, tokenizer: Tokenizer, scores: Mapping[str, float]) -> OffsetSteer:
    """Adds a word's score to the logit of each token that is a space and this word, in any case."""
    offsets = torch.zeros(1, hf.vocabulary(model))
    for i, text in token_texts(tokenizer).items():
        offsets[0, i] = scores.get(text[1:].lower(), 0) if text[0] == " " else 0
    return OffsetSteer(offsets, epsilon=1.0)


@torch.no_grad()
def step_inputs(model: Model, tokenizer: Tokenizer, prompts: Texts) -> StepInputs:
    """What a step of PPLM begins with: an unsteered pass that keeps the cache before the last token.

    Prompts are padded on the left; the cache has P = T − 1 positions, hidden is [B, T, D], logits are [B, V].
    """
    ids, mask = encode(tokenizer, prompts, device=model.device).values()
    before = hf.forward(model, ids[:, :-1], mask[:, :-1], use_cache=True)
    past, after = before.past_key_values, hf.forked(before.past_key_values)
    last = hf.forward(model, ids[:, -1:], mask, past_key_values=after, use_cache=True)
    hidden = torch.cat([before.last_hidden_state, last.last_hidden_state], dim=1)
    return StepInputs(ids, mask, past, after, hidden, hf.logits(model, hidden[:, -1]))
