"""Exercises of notebook 04: padding a text, a hook for padded batches, a pair's rows, where rows begin."""

import torch
from torch.nn.utils.rnn import pad_sequence

import steer_utils as su

from . import exercise

SHORT, LONG = [1, 40, 41], [1, 50, 51, 52, 53]


@exercise(
    lambda: [(ids, 7, 9, method) for ids in (SHORT, LONG) for method in ("tokens_right", "tokens_left")],
    hint="BOS stays first on both sides: padding on the left goes between BOS and the text.",
)
def padded_ids(ids, length, pad_id, pad_method):
    filling = [pad_id] * (length - len(ids))
    return [*ids, *filling] if pad_method == "tokens_right" else [ids[0], *filling, *ids[1:]]


@padded_ids.mistake("With tokens_left the padding stands before BOS. BOS must stay first.")
def _(ids, length, pad_id, pad_method):
    filling = [pad_id] * (length - len(ids))
    return [*ids, *filling] if pad_method == "tokens_right" else [*filling, *ids]


@padded_ids.mistake("The sides are swapped: tokens_right pads after the end of the text.")
def _(ids, length, pad_id, pad_method):
    return padded_ids(ids, length, pad_id, "tokens_left" if pad_method == "tokens_right" else "tokens_right")


@padded_ids.mistake("You pad on the right in both cases: look at pad_method.")
def _(ids, length, pad_id, pad_method):
    return padded_ids(ids, length, pad_id, "tokens_right")


@padded_ids.mistake("Off by one: BOS counts as one of the tokens of the length.")
def _(ids, length, pad_id, pad_method):
    return padded_ids(ids, length + 1, pad_id, pad_method)


ROWS = torch.arange(1.0, 13).reshape(3, 4)
HIDDEN = torch.linspace(-1, 1, 72).reshape(3, 6, 4)
MASK = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1], [0, 0, 0, 1, 1, 1]])


@exercise(
    lambda: [(HIDDEN, MASK, ROWS), (HIDDEN[:2], MASK[:2], ROWS[:2])],
    hint="attention_mask.cumsum(-1) − 1 numbers the tokens of each text; padding needs a number of its own.",
)
def add_by_position(hidden, attention_mask, rows):
    positions = torch.where(attention_mask.bool(), attention_mask.cumsum(-1) - 1, -1)  # [B, T]
    for s, row in enumerate(rows):
        hidden = hidden + (positions == s)[..., None] * row
    return hidden


@add_by_position.mistake("You add to the first columns. In a padded text these hold padding, not BOS.")
def _(hidden, attention_mask, rows):
    steered = hidden.clone()
    steered[:, : len(rows)] += rows
    return steered


@add_by_position.mistake("Only the first batch row is steered: index the batch with a colon.")
def _(hidden, attention_mask, rows):
    steered = hidden.clone()
    steered[:1] = add_by_position(hidden[:1], attention_mask[:1], rows)
    return steered


@add_by_position.mistake("All batch rows use the padding of the first: each text has its own.")
def _(hidden, attention_mask, rows):
    return add_by_position(hidden, attention_mask[:1].expand_as(attention_mask), rows)


@add_by_position.mistake("Off by one: cumsum counts from 1, positions from 0.")
def _(hidden, attention_mask, rows):
    places = torch.where(attention_mask.bool(), attention_mask.cumsum(-1), -1)
    for s, row in enumerate(rows):
        hidden = hidden + (places == s)[..., None] * row
    return hidden


@add_by_position.mistake("Row 0 goes to the padding as well: give padding a position that is no row's, −1.")
def _(hidden, attention_mask, rows):
    places = (attention_mask.cumsum(-1) - 1).clamp(min=0)
    for s, row in enumerate(rows):
        hidden = hidden + (places == s)[..., None] * row
    return hidden


PLUS, MINUS = torch.tensor([[0, 5, 9, 7]]), torch.tensor([[0, 5, 3, 4, 8, 2]])


@exercise(
    lambda model: [
        (model, plus.to(model.device), minus.to(model.device), len(su.hf.blocks(model)) // 2, coeff)
        for plus, minus, coeff in ((PLUS, MINUS, 2.0), (MINUS, PLUS, 3.0))
    ],
    hint="Make a zero matrix of the longer length, then add c·h⁺ to its first rows and subtract c·h⁻.",
)
def unpadded_rows(model, plus, minus, layer, coeff):
    with torch.no_grad():
        first, second = (model(ids, output_hidden_states=True).hidden_states for ids in (plus, minus))
    rows = torch.zeros(max(plus.shape[1], minus.shape[1]), first[layer].shape[-1]).to(first[layer])
    rows[: plus.shape[1]] += coeff * first[layer][0]
    rows[: minus.shape[1]] -= coeff * second[layer][0]
    return rows


@unpadded_rows.mistake("You cut the longer text. Its last rows stay, with nothing to set against them.")
def _(model, plus, minus, layer, coeff):
    return unpadded_rows(model, plus, minus, layer, coeff)[: min(plus.shape[1], minus.shape[1])]


@unpadded_rows.mistake("The sign is wrong: add the first text and subtract the second.")
def _(model, plus, minus, layer, coeff):
    return -unpadded_rows(model, plus, minus, layer, coeff)


@unpadded_rows.mistake("The coefficient is missing.")
def _(model, plus, minus, layer, coeff):
    return unpadded_rows(model, plus, minus, layer, 1.0)


@unpadded_rows.mistake("The texts are aligned at their ends. Both begin at BOS, position 0.")
def _(model, plus, minus, layer, coeff):
    with torch.no_grad():
        first, second = (model(ids, output_hidden_states=True).hidden_states for ids in (plus, minus))
    pair = [coeff * first[layer][0].flip(0), -coeff * second[layer][0].flip(0)]
    return pad_sequence(pair).sum(1).flip(0)


@unpadded_rows.mistake(
    "Off by one: hidden_states[layer] enters the block, hidden_states[layer + 1] leaves it."
)
def _(model, plus, minus, layer, coeff):
    return unpadded_rows(model, plus, minus, layer + 1, coeff)


@exercise(
    lambda: [
        (count, length, 12, place)
        for count, length in ((4, 9), (3, 10), (3, 9), (4, 12))
        for place in ("front", "mid", "back")
    ],
    hint="A text of `length` tokens begins in column width − length. Where in the text do the rows begin?",
)
def first_column(count, length, width, addition_location):
    start = {"front": 0, "mid": length // 2 - count // 2, "back": length - count}[addition_location]
    return width - length + start


@first_column.mistake("That is the position in the text. With padding on the left, the text begins later.")
def _(count, length, width, addition_location):
    return first_column(count, length, length, addition_location)


@first_column.mistake("You place the rows in the whole width. They belong to the text, without its padding.")
def _(count, length, width, addition_location):
    return first_column(count, width, width, addition_location)


@first_column.mistake(
    "For “mid”, the original rounds both halves, length // 2 − count // 2. Yours differs for some lengths."
)
def _(count, length, width, addition_location):
    if addition_location == "mid":
        return width - length + (length - count) // 2
    return first_column(count, length, width, addition_location)


@first_column.mistake("Off by one at the back: the last row belongs to the last token, in the last column.")
def _(count, length, width, addition_location):
    return first_column(count, length, width, addition_location) - (addition_location == "back")
