"""Exercises of notebook 03: rows of a pair, both hooks with a KV cache, a random baseline, wrong ways."""

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

import steer_utils as su

from . import exercise

HIDDEN = torch.linspace(-1, 1, 48).reshape(2, 6, 4)
ROWS = torch.arange(1.0, 13).reshape(3, 4)
PASSES = [(HIDDEN, ROWS, 0), (HIDDEN[:, :1], ROWS, 6), (HIDDEN[:, :2], ROWS, 1), (HIDDEN, ROWS, 2)]


@exercise(
    lambda model, tokenizer: [
        (model, tokenizer, "I love you because", "I hate you because", 3.0, 2),
        (model, tokenizer, "Love", "Hate it", 5.0, 1),
    ],
    hint="model(ids, output_hidden_states=True).hidden_states[layer][0] enters block `layer`, [S, D].",
)
def rows_of(model, tokenizer, plus, minus, coeff, layer):
    def entering(text):
        ids = su.encode(tokenizer, text, device=model.device)["input_ids"]
        with torch.no_grad():
            return model(ids, output_hidden_states=True).hidden_states[layer][0]

    terms = [coeff * entering(plus), -coeff * entering(minus)]
    return pad_sequence(terms, batch_first=True).sum(dim=0)


def _rows(model, tokenizer, plus, minus, layer, encode=su.models.token_ids):
    """The hidden states of both texts, padded with zeros to one length, [2, S, D]."""
    found = []
    for text in (plus, minus):
        ids = torch.tensor([encode(tokenizer, text)], device=model.device)
        with torch.no_grad():
            found.append(model(ids, output_hidden_states=True).hidden_states[layer][0])
    return pad_sequence(found, batch_first=True)


@rows_of.mistake("A row is missing: the texts have no BOS. Encode them with su.encode(tokenizer, text).")
def _(model, tokenizer, plus, minus, coeff, layer):
    def bare(tokenizer, text):
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    one, other = _rows(model, tokenizer, plus, minus, layer, bare)
    return coeff * (one - other)


@rows_of.mistake("Off by one block: hidden_states[layer] enters block `layer`, the next one leaves it.")
def _(model, tokenizer, plus, minus, coeff, layer):
    one, other = _rows(model, tokenizer, plus, minus, layer + 1)
    return coeff * (one - other)


@rows_of.mistake("The sign is wrong: add the first text and subtract the second.")
def _(model, tokenizer, plus, minus, coeff, layer):
    one, other = _rows(model, tokenizer, plus, minus, layer)
    return coeff * (other - one)


@rows_of.mistake("The coefficient is missing.")
def _(model, tokenizer, plus, minus, coeff, layer):
    one, other = _rows(model, tokenizer, plus, minus, layer)
    return one - other


@rows_of.mistake("The longer text is cut: keep all its rows, as if the shorter text ended in zeros.")
def _(model, tokenizer, plus, minus, coeff, layer):
    one, other = _rows(model, tokenizer, plus, minus, layer)
    shorter = min(len(su.models.token_ids(tokenizer, text)) for text in (plus, minus))
    return coeff * (one - other)[:shorter]


@exercise(
    lambda: PASSES,
    hint="The tokens of this pass have positions start, start + 1, …; which of them are below len(rows)?",
)
def add_at_front(hidden, rows, start):
    steered = hidden.clone()
    mine = rows[start : start + hidden.shape[1]]
    steered[:, : len(mine)] += mine
    return steered


@add_at_front.mistake("You ignore start: a pass that begins at position 6 gets row 0 once more.")
def _(hidden, rows, start):
    return add_at_front(hidden, rows, 0)


@add_at_front.mistake("Only the first text of the batch is steered: index the batch with a colon.")
def _(hidden, rows, start):
    return torch.cat([add_at_front(hidden, rows, start)[:1], hidden[1:]])


@add_at_front.mistake("The rows take the place of the hidden states. Add them.")
def _(hidden, rows, start):
    steered = hidden.clone()
    mine = rows[start : start + hidden.shape[1]]
    steered[:, : len(mine)] = mine
    return steered


@add_at_front.mistake("Off by one: row 0 belongs to position 0, which is BOS.")
def _(hidden, rows, start):
    padded = torch.cat([torch.zeros_like(rows[:1]), rows])
    return add_at_front(hidden, padded, start)


@exercise(
    lambda: PASSES,
    hint="positions = start + torch.arange(T); position p gets rows[p], from S on rows[-1]: clamp.",
)
def add_everywhere(hidden, rows, start):
    positions = start + torch.arange(hidden.shape[1], device=rows.device)
    return hidden + rows[positions.clamp(max=len(rows) - 1)]


@add_everywhere.mistake("You ignore start: a pass that begins at position 6 gets row 0, not the last row.")
def _(hidden, rows, start):
    return add_everywhere(hidden, rows, 0)


@add_everywhere.mistake("The tokens after the first S get nothing. They get the last row.")
def _(hidden, rows, start):
    return add_at_front(hidden, rows, start)


@add_everywhere.mistake("The first S tokens get their own rows; the last row is for the tokens after them.")
def _(hidden, rows, start):
    return hidden + rows[-1]


@add_everywhere.mistake("Position S − 1 gets the last row twice: the later tokens begin at position S.")
def _(hidden, rows, start):
    twice = torch.cat([rows[:-1], 2 * rows[-1:], rows[-1:]])
    return add_everywhere(hidden, twice, start)


@add_everywhere.mistake("Only the first text of the batch is steered: hidden is [B, T, D].")
def _(hidden, rows, start):
    return torch.cat([add_everywhere(hidden, rows, start)[:1], hidden[1:]])


@exercise(
    lambda: [(ROWS, 0), (ROWS.flip(1)[:2] ** 2, 7)],
    hint="Divide each row of the noise by its own norm, noise.norm(dim=1, keepdim=True), then scale it.",
)
def random_rows(rows, seed):
    noise = torch.randn(rows.shape, generator=torch.Generator().manual_seed(seed)).to(rows)
    return noise * rows.norm(dim=1, keepdim=True) / noise.norm(dim=1, keepdim=True)


def _noise(rows, seed):
    return torch.randn(rows.shape, generator=torch.Generator().manual_seed(seed)).to(rows)


@random_rows.mistake("The noise keeps its own norm: divide each row by its norm before you scale it.")
def _(rows, seed):
    return _noise(rows, seed) * rows.norm(dim=1, keepdim=True)


@random_rows.mistake("All rows have norm 1: multiply each by the norm of the row that it replaces.")
def _(rows, seed):
    return torch.nn.functional.normalize(_noise(rows, seed), dim=1)


@random_rows.mistake("Only the norm of the whole matrix is right: each row needs the norm of its own row.")
def _(rows, seed):
    noise = _noise(rows, seed)
    return noise * rows.norm() / noise.norm()


@random_rows.mistake("The norms are taken over dim=0, the positions. A row's norm is over dim=1.")
def _(rows, seed):
    noise = _noise(rows, seed)
    return noise * rows.norm(dim=0, keepdim=True) / noise.norm(dim=0, keepdim=True)


BEFORE = np.array([[0.9, 0.2, 0.1], [0.1, 0.2, 0.3], [0.9, 0.8, 0.7], [0.1, 0.9, 0.6], [0.9, 0.9, 0.3]])
AFTER = np.array([[0.1, 0.9, 0.9], [0.4, 0.3, 0.2], [0.6, 0.7, 0.2], [0.6, 0.7, 0.1], [0.3, 0.2, 0.1]])


@exercise(
    lambda: [(BEFORE, AFTER), (AFTER, BEFORE)],
    hint="(scores > 0.5).mean(axis=1) is each prompt's share of positive completions.",
)
def wrong_way(unsteered, steered):
    before, after = ((scores > 0.5).mean(axis=1) for scores in (unsteered, steered))
    return float((after < before).mean())


@wrong_way.mistake("Those are completions. Average the completions of each prompt first, over axis 1.")
def _(unsteered, steered):
    return float(((steered > 0.5) < (unsteered > 0.5)).mean())


@wrong_way.mistake("Prompts that did not move count as wrong: use <, not <=.")
def _(unsteered, steered):
    before, after = ((scores > 0.5).mean(axis=1) for scores in (unsteered, steered))
    return float((after <= before).mean())


@wrong_way.mistake("Those are the prompts that went the right way.")
def _(unsteered, steered):
    before, after = ((scores > 0.5).mean(axis=1) for scores in (unsteered, steered))
    return float((after > before).mean())


@wrong_way.mistake("You average scores. Count completions with a score above 0.5 instead.")
def _(unsteered, steered):
    return float((steered.mean(axis=1) < unsteered.mean(axis=1)).mean())


def _retyped(model, tokenizer):
    pair = ("I love you because", "I hate you because")
    steer = su.get_x_vector(*pair, coeff=1, act_name=len(su.hf.blocks(model)) // 2)
    return [(model, tokenizer, steer, pair[1], pair[0], more) for more in ([" you", " are"], [" the"])]


@exercise(_retyped, hint="Steer only the first: put `with su.apply_activation_additions(…)` around it.")
def parting(model, tokenizer, steer, prompt, typed, more):
    found = []
    for n in range(len(more) + 1):
        end = "".join(more[:n])
        with su.apply_activation_additions(model, steer, tokenizer):
            steered = su.metrics.next_token_logits(model, tokenizer, [prompt + end])
        other = su.metrics.next_token_logits(model, tokenizer, [typed + end])
        found.append(su.metrics.next_token_kl(steered, other)[0])
    return torch.stack(found)


def _kls(model, tokenizer, steer, ones, others, swap=False):
    """KL of the next token after each of some texts, steered, from that after others."""
    with su.apply_activation_additions(model, steer, tokenizer):
        steered = [su.metrics.next_token_logits(model, tokenizer, [text]) for text in ones]
    typed = [su.metrics.next_token_logits(model, tokenizer, [text]) for text in others]
    pairs = zip(typed, steered, strict=True) if swap else zip(steered, typed, strict=True)
    return torch.stack([su.metrics.next_token_kl(*pair)[0] for pair in pairs])


def _ends(more):
    return ["".join(more[:n]) for n in range(len(more) + 1)]


@parting.mistake("The model is not steered: that is the KL between two prompts.")
def _(model, tokenizer, steer, prompt, typed, more):
    ones, others = ([text + end for end in _ends(more)] for text in (prompt, typed))
    return _kls(model, tokenizer, (), ones, others)


@parting.mistake("The typed text is steered as well. Leave the context before you run it.")
def _(model, tokenizer, steer, prompt, typed, more):
    ones, others = ([text + end for end in _ends(more)] for text in (prompt, typed))
    with su.apply_activation_additions(model, steer, tokenizer):
        pairs = zip(ones, others, strict=True)
        both = [su.metrics.next_token_logits(model, tokenizer, texts) for texts in pairs]
    return torch.stack([su.metrics.next_token_kl(*one) for one in both])


@parting.mistake("The KL has the wrong direction: the steered distribution comes first.")
def _(model, tokenizer, steer, prompt, typed, more):
    ones, others = ([text + end for end in _ends(more)] for text in (prompt, typed))
    return _kls(model, tokenizer, steer, ones, others, swap=True)


@parting.mistake("Append the words to both texts, not to the prompt alone.")
def _(model, tokenizer, steer, prompt, typed, more):
    ends = _ends(more)
    return _kls(model, tokenizer, steer, [prompt + end for end in ends], [typed] * len(ends))


@parting.mistake("The first number is missing: begin with the two texts as they are.")
def _(model, tokenizer, steer, prompt, typed, more):
    ones, others = ([text + end for end in _ends(more)[1:]] for text in (prompt, typed))
    return _kls(model, tokenizer, steer, ones, others)
