"""A steer along texts that are given instead of written: at each token, how far it is from the plain model.

The prompt is read first and then one token after the other, on a cache, as when the model writes. So it works
for every steer, for PPLM too, which has no distribution for the middle of a text that is read in one pass.
Shapes: B rows, T tokens of a completion, N texts.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel, PreTrainedTokenizerBase

from .. import hf
from ..generation import Steer, all_on
from ..models import own_tokenizer, pad, token_ids
from .group_metrics import ratio
from .metrics import Interval, next_token_kl, rows_of_ids

Row = tuple[list[int], int]  # token ids, and at which of them the completion begins


class Forced(NamedTuple):
    """What is known of each of the T tokens of a completion, in nats, [T]."""

    kl: Tensor  # KL(steered ‖ plain) of the distributions that the token could have been drawn from
    gain: Tensor  # by how much steering raises the log probability of the token; −inf where it was cut


@torch.no_grad()
def forced(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    prompts: Sequence[str | Sequence[int]],
    completions: Sequence[str | Sequence[int]],
    steer: Steer | Iterable[Steer],
    *,
    batch_size: int = 64,
) -> list[Forced]:
    """Follow each completion after its prompt, with a steer or several on and without, [N].

    Prompts, completions, and which tokens count: as for `metrics.completion_log_probs`. A PPLM that cuts to
    its top_k is measured with the cut; top_k=0 measures the steps alone. Raises what the steer raises, and
    ValueError for different numbers of prompts and completions.
    """
    tokenizer, model = own_tokenizer(model, tokenizer), hf.unwrapped(model)
    rows = rows_of_ids(tokenizer, prompts, completions)
    found: list[Forced] = []
    with all_on(steer, model, tokenizer):
        for i in range(0, len(rows), batch_size):
            some = rows[i : i + batch_size]
            with hf.batch(texts=range(i, i + len(some)), of=len(rows)):
                found += _forced_batch(model, some)
    return found


def loss_increase(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    texts: Sequence[str],
    steer: Steer | Iterable[Steer],
    *,
    start: int = 8,
    batch_size: int = 64,
) -> Interval:
    """What a steer costs on texts that it is not about: by how many nats a token it raises their loss.

    start: how many tokens, BOS included, stand for the prompt; those after them are what is measured. The
    interval is over texts. ValueError unless two texts or more have tokens after the first `start`.
    """
    if start < 1:
        raise ValueError(f"start must be at least 1, for BOS, not {start!r}")
    rows = [token_ids(own_tokenizer(model, tokenizer), text) for text in texts]
    rows = [row for row in rows if len(row) > start]
    if len(rows) < 2:
        raise ValueError(f"{len(rows)} of {len(texts)} texts have more than {start} tokens: give longer ones")
    pairs = [row[:start] for row in rows], [row[start:] for row in rows]
    found = forced(model, tokenizer, *pairs, steer, batch_size=batch_size)
    return ratio([-one.gain.sum().item() for one in found], [len(one.gain) for one in found])


def _forced_batch(model: PreTrainedModel, rows: Sequence[Row]) -> list[Forced]:
    """`forced` of rows that are read side by side: prompts padded on the left, completions on the right."""
    blank, device = rows[0][0][0], model.device
    batch = pad([row[:start] for row, start in rows], blank, padding_side="left", device=device)
    given = pad([row[start:] for row, start in rows], blank, padding_side="right", device=device)["input_ids"]
    found = Forced(*torch.zeros(2, *given.shape, device=device))
    with hf.batch(prompt_lengths=batch["attention_mask"].sum(dim=1)):
        both = zip(along(model, batch, given), along(model, batch, given, plain=True), strict=True)
        for t, (steered, plain) in enumerate(both):
            found.kl[:, t] = next_token_kl(steered, plain)
            found.gain[:, t] = (steered - plain).gather(1, given[:, t, None])[:, 0]
    lengths = [len(row) - start for row, start in rows]
    return [Forced(*(values[i, :length].cpu() for values in found)) for i, length in enumerate(lengths)]


@torch.no_grad()
def along(
    model: PreTrainedModel, batch: Mapping[str, Tensor], ids: Tensor, *, plain: bool = False
) -> Iterator[Tensor]:
    """Log probabilities [B, V] of token t after prompts, given those before, for each column of ids [B, T].

    batch: input_ids and attention_mask of the prompts, padded on the left. One token is read at a time, as in
    decoding, because PPLM's forward pass knows no other way; a column may be written while its turn comes.
    plain: of the plain model, whatever steers it. Wants to run inside `hf.prompt_length`.
    """
    mask, new, cache = batch["attention_mask"], batch["input_ids"], hf.new_cache(model)
    read = _plain if plain else _as_it_is
    for token in ids.T:
        yield read(model, new, mask, cache).log_softmax(dim=-1)
        new, mask = token[:, None], torch.nn.functional.pad(mask, (0, 1), value=1)


def _as_it_is(model: PreTrainedModel, ids: Tensor, mask: Tensor, cache: Cache) -> Tensor:
    """Logits [B, V] after tokens ids [B, T], as `model.generate` gets them."""
    places = hf.token_positions(ids.shape[1], past=cache.get_seq_length(), attention_mask=mask)
    told = {"attention_mask": mask, "position_ids": places.clamp(min=0), "logits_to_keep": 1}
    return model(ids, past_key_values=cache, use_cache=True, **told).logits[:, -1].float()


def _plain(model: PreTrainedModel, ids: Tensor, mask: Tensor, cache: Cache) -> Tensor:
    """The same of the plain model, whatever steers it; the decoder's own call is none of PPLM's."""
    with hf.unsteered():
        read = hf.forward(model, ids, mask, past_key_values=cache, use_cache=True)
        return hf.logits(model, read.last_hidden_state[:, -1]).float()
