"""Exercises of notebook 00: a next-token probability, the hook and the rows of an addition, a gain."""

import torch

import steer_utils as su

from . import exercise

PROMPTS = ["Yesterday I went up to my friend and said", "The weather"]


@exercise(
    lambda model, tokenizer: [
        (model, tokenizer, prompt, word) for prompt in PROMPTS for word in (" she", " the")
    ],
    hint="Encode with su.encode, which puts BOS in front; the last position predicts the next token.",
)
def probability_of(model, tokenizer, prompt, word):
    ids = su.encode(tokenizer, prompt, device=model.device)["input_ids"]
    first = tokenizer(word, add_special_tokens=False)["input_ids"][0]
    with torch.no_grad():
        return model(ids).logits[0, -1].softmax(-1)[first].item()


@probability_of.mistake("The text has no BOS: encode it with su.encode(tokenizer, prompt).")
def _(model, tokenizer, prompt, word):
    ids = torch.tensor([tokenizer(prompt, add_special_tokens=False)["input_ids"]])
    first = tokenizer(word, add_special_tokens=False)["input_ids"][0]
    with torch.no_grad():
        return model(ids.to(model.device)).logits[0, -1].softmax(-1)[first].item()


@probability_of.mistake("That is the logit. A probability is what softmax makes of all of them.")
def _(model, tokenizer, prompt, word):
    ids = su.encode(tokenizer, prompt, device=model.device)["input_ids"]
    with torch.no_grad():
        return model(ids).logits[0, -1][tokenizer(word, add_special_tokens=False)["input_ids"][0]].item()


@probability_of.mistake("That is the prediction after the first token: take the last position, [0, -1].")
def _(model, tokenizer, prompt, word):
    ids = su.encode(tokenizer, prompt, device=model.device)["input_ids"]
    first = tokenizer(word, add_special_tokens=False)["input_ids"][0]
    with torch.no_grad():
        return model(ids).logits[0, 0].softmax(-1)[first].item()


@probability_of.mistake("Keep the space in front of the word: inside a text it is part of the token.")
def _(model, tokenizer, prompt, word):
    return probability_of(model, tokenizer, prompt, word.strip())


ROWS = torch.arange(12.0).reshape(3, 4)
HIDDEN = torch.linspace(-1, 1, 40).reshape(2, 5, 4)


@exercise(
    lambda: [(HIDDEN, ROWS), (HIDDEN[:, :3], ROWS)],
    hint="The hidden states are [B, T, D]: row s of the addition goes to position s of every batch row.",
)
def add_at_front(hidden, rows):
    steered = hidden.clone()
    steered[:, : len(rows)] += rows
    return steered


@add_at_front.mistake("Only the first text of the batch is steered: index the batch with a colon.")
def _(hidden, rows):
    steered = hidden.clone()
    steered[0, : len(rows)] += rows
    return steered


@add_at_front.mistake(
    "The rows are added at the end of the text. The first row belongs to the first token, BOS."
)
def _(hidden, rows):
    steered = hidden.clone()
    steered[:, -len(rows) :] += rows
    return steered


@add_at_front.mistake("Off by one: the first row is added to the second token.")
def _(hidden, rows):
    steered = hidden.clone()
    room = steered[:, 1 : 1 + len(rows)]
    room += rows[: room.shape[1]]
    return steered


@add_at_front.mistake("The rows take the place of the hidden states. Add them.")
def _(hidden, rows):
    steered = hidden.clone()
    steered[:, : len(rows)] = rows
    return steered


PLUS, MINUS = torch.tensor([[0, 5, 9, 7]]), torch.tensor([[0, 5, 3, 4]])


@exercise(
    lambda model: [
        (model, plus.to(model.device), minus.to(model.device), len(su.hf.blocks(model)) // 2, coeff)
        for plus, minus, coeff in ((PLUS, MINUS, 2.0), (MINUS, PLUS[:, [0, 2, 1, 3]], -3.0))
    ],
    hint="model(ids, output_hidden_states=True).hidden_states[l] holds what enters block l, [1, S, D].",
)
def x_vector_rows(model, plus, minus, layer, coeff):
    with torch.no_grad():
        first, second = (model(ids, output_hidden_states=True).hidden_states for ids in (plus, minus))
    return coeff * (first[layer][0] - second[layer][0])


@x_vector_rows.mistake("The sign is wrong: subtract the second text from the first.")
def _(model, plus, minus, layer, coeff):
    return -x_vector_rows(model, plus, minus, layer, coeff)


@x_vector_rows.mistake("The coefficient is missing.")
def _(model, plus, minus, layer, coeff):
    return x_vector_rows(model, plus, minus, layer, 1.0)


@x_vector_rows.mistake("The coefficient multiplies the first text only: put the difference in parentheses.")
def _(model, plus, minus, layer, coeff):
    with torch.no_grad():
        first, second = (model(ids, output_hidden_states=True).hidden_states for ids in (plus, minus))
    return coeff * first[layer][0] - second[layer][0]


@x_vector_rows.mistake(
    "Off by one: hidden_states[0] are the embeddings, so hidden_states[layer] enters the block."
)
def _(model, plus, minus, layer, coeff):
    return x_vector_rows(model, plus, minus, layer + 1, coeff)


@x_vector_rows.mistake("That is the last row alone. Keep all of them, [S, D].")
def _(model, plus, minus, layer, coeff):
    return x_vector_rows(model, plus, minus, layer, coeff)[-1]


STEERED = torch.tensor([[1.0, 1, 1], [1, 1, 0], [0, 0, 0], [1, 0, 1], [1, 1, 1], [0, 1, 0]])
UNSTEERED = torch.tensor([[0.0, 0, 0], [1, 1, 0], [0, 0, 0], [0, 0, 1], [0, 0, 0], [0, 1, 0]])


@exercise(
    lambda: [(STEERED, UNSTEERED), (STEERED[1:, :2], UNSTEERED[1:, 1:])],
    hint="Take the mean over the samples (dim 1) of steered − unsteered, then su.metrics.bootstrap.",
)
def gain(steered, unsteered):
    return su.metrics.bootstrap((steered - unsteered).mean(1))


@gain.mistake("The sign is wrong: a steer that helps has a positive gain.")
def _(steered, unsteered):
    return gain(unsteered, steered)


@gain.mistake("That is the share itself. How much of it is there without steering?")
def _(steered, unsteered):
    return su.metrics.bootstrap(steered.mean(1))


@gain.mistake(
    "You resample completions. Those of one prompt resemble each other, so the interval is too narrow: "
    "average them first, then resample the prompts."
)
def _(steered, unsteered):
    return su.metrics.bootstrap((steered - unsteered).flatten())


@gain.mistake("You averaged over the prompts: they are in dim 0, and the samples in dim 1.")
def _(steered, unsteered):
    return su.metrics.bootstrap((steered - unsteered).mean(0))


@gain.mistake(
    "Two intervals cannot be subtracted end from end: subtract prompt by prompt, then resample the "
    "differences."
)
def _(steered, unsteered):
    pair = [su.metrics.bootstrap(one.mean(1)) for one in (steered, unsteered)]
    return [a - b for a, b in zip(*pair, strict=True)]
