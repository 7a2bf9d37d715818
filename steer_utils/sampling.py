"""From logits to the next token: penalties, top-k, top-p, and sampling with given random numbers.

Each step is a logits processor of transformers, so it works in any `model.generate`. `sampling_processors`
applies them in the order of the original experiments: temperature, frequency penalty, top-p.
Shapes: B batch rows, all beams included, T tokens so far, V vocabulary; input_ids [B, T], scores [B, V].
"""

import inspect
import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor
from torch.nn.functional import pad
from transformers import LogitsProcessor, LogitsProcessorList

from .types import require


class FrequencyPenalty(LogitsProcessor):
    """Lower each logit by penalty × how often its token occurs so far: BOS, prompt and completion.

    attention_mask: [B, T] of the prompts; padding is not counted.
    Raises ValueError for a penalty that is not finite. Source: TransformerLens, `sample_logits`.
    """

    def __init__(self, penalty: float, attention_mask: Tensor) -> None:
        require(np.isfinite(penalty), "a finite number", freq_penalty=penalty)
        self.penalty, self.mask = penalty, attention_mask

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        mask = self.mask.repeat_interleave(len(input_ids) // len(self.mask), dim=0)
        counted = pad(mask, (0, input_ids.shape[1] - mask.shape[1]), value=1).to(scores.dtype)
        return scores - self.penalty * torch.zeros_like(scores).scatter_add_(1, input_ids, counted)


class TopP(transformers.TopPLogitsWarper):
    """Top-p; on a CPU without a sort of all tokens, a third of sampling's time, where 1,024 are enough."""

    def __call__(self, input_ids: Tensor | None, scores: Tensor) -> Tensor:
        if scores.is_cuda:
            return super().__call__(input_ids, scores)
        best, tokens = scores.topk(min(1024, scores.shape[1]))
        p = (best.float() - scores.float().logsumexp(dim=-1, keepdim=True)).exp()
        better = p.cumsum(dim=-1) - p  # the share of all better tokens
        kept = best.where(better < self.top_p, -torch.inf)
        found = torch.full_like(scores, -torch.inf).scatter(1, tokens, kept)
        if (wide := better[:, -1] < self.top_p).any():
            found[wide] = super().__call__(input_ids, scores[wide])
        return found


class Draw(LogitsProcessor):
    """Inverse-CDF sampling at given uniform numbers: every logit but the sampled token's becomes −inf.

    uniforms: [B, N] in [0, 1), one column for each new token. Greedy search then picks the sampled token.
    """

    def __init__(self, uniforms: Tensor, prompt_tokens: int) -> None:
        self.uniforms, self.prompt_tokens = uniforms, prompt_tokens

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        cumulative = scores.float().softmax(dim=-1).cumsum(dim=-1)
        total = cumulative[:, -1:]
        level = self.uniforms[:, input_ids.shape[1] - self.prompt_tokens, None] * total
        drawn = torch.searchsorted(cumulative, level, right=True).clamp(max=scores.shape[1] - 1)
        return torch.full_like(scores, -torch.inf).scatter_(1, drawn, 0.0)


class TokenLosses(LogitsProcessor):
    """Losses of the chosen tokens under the logits before any processor, which the hook `note` records.

    finite: whether these logits always were; one check at the end waits for the GPU once.
    """

    raw: Tensor
    finite: Tensor | bool = True

    def __init__(self) -> None:
        self.tokens, self.losses = [], []

    def note(self, model: torch.nn.Module, args: tuple, output: Any) -> None:
        self.raw = output.logits[:, -1]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        token, raw = scores.argmax(dim=-1, keepdim=True), self.raw.float().to(scores.device)
        total = raw.logsumexp(dim=-1, keepdim=True)
        self.finite = total.isfinite().all() & self.finite
        self.tokens.append(token)
        self.losses.append(total - raw.gather(1, token))
        return scores

    def means(self, written: Tensor, ends: int | Sequence[int] | None) -> Tensor:
        """Mean loss [B] over the tokens [B, N] up to the first of the ids `ends`, or up to the padding."""
        tokens, losses = torch.cat(self.tokens, dim=1), torch.cat(self.losses, dim=1)
        is_end = torch.isin(written, torch.tensor([] if ends is None else ends, device=written.device))
        counted = (written == tokens).cumprod(dim=1) * (is_end.cumsum(dim=1) - is_end.long() == 0)
        return (losses * counted).sum(dim=1) / counted.sum(dim=1)


def sampling_processors(
    attention_mask: Tensor,
    *,
    temperature: float | None = 1.0,
    top_p: float | None = 0.9,
    top_k: int | None = 0,
    repetition_penalty: float | None = 1.0,
    freq_penalty: float | None = 0.0,
) -> LogitsProcessorList:
    """The processors to sample with: repetition penalty, temperature, frequency penalty, top-k, top-p.

    attention_mask: [B, T] of the prompts. None is off. Raises ValueError for settings out of range.
    """
    require(top_p is None or 0 < top_p <= 1, "above 0 and at most 1", top_p=top_p)
    require(top_k is None or top_k >= 0, "at least 0", top_k=top_k)
    for name, value in (("temperature", temperature), ("repetition_penalty", repetition_penalty)):
        require(value is None or 0 < value < math.inf, "above 0 and finite", **{name: value})
    steps = [  # setting, its value for off, processor
        (repetition_penalty, 1.0, transformers.RepetitionPenaltyLogitsProcessor),
        (temperature, 1.0, transformers.TemperatureLogitsWarper),
        (freq_penalty, 0.0, partial(FrequencyPenalty, attention_mask=attention_mask)),
        (top_k, 0, transformers.TopKLogitsWarper),
        (top_p, 1.0, TopP),
    ]
    return LogitsProcessorList(make(type(off)(x)) for x, off, make in steps if x not in (None, off))


SAMPLING = frozenset(inspect.signature(sampling_processors).parameters) - {"attention_mask"}
