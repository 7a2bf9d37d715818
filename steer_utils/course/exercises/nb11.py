"""Exercises of notebook 11: absolute positions, shared prefixes, the block of a control vector, one BOS."""

import re

from . import exercise


@exercise(
    lambda: [
        (2, 5, 3, "front", "own"),
        (2, 5, 3, "front", "all"),
        (3, 5, 2, "back", "own"),
        (3, 5, 2, "back", "all"),
    ],
    hint="Row 0 is added at position start: 0 at the front, prompt − count at the back. List pairs in order.",
)
def acts_at(count, prompt, new, addition_location, positions):
    start = 0 if addition_location == "front" else prompt - count
    own = [(start + row, row) for row in range(count)]
    later = [(position, count - 1) for position in range(start + count, prompt + new)]
    return own + later if positions == "all" else own


@acts_at.mistake('"all" goes on while the model writes: up to position prompt + new − 1.')
def _(count, prompt, new, addition_location, positions):
    start = 0 if addition_location == "front" else prompt - count
    own = [(start + row, row) for row in range(count)]
    later = [(position, count - 1) for position in range(start + count, prompt)]
    return own + later if positions == "all" else own


@acts_at.mistake('At the "back" the last row meets the last token of the prompt, position prompt − 1.')
def _(count, prompt, new, addition_location, positions):
    start = 0 if addition_location == "front" else prompt - count - 1
    own = [(start + row, row) for row in range(count)]
    later = [(position, count - 1) for position in range(start + count, prompt + new)]
    return own + later if positions == "all" else own


@acts_at.mistake("The position comes first in a pair, then the row.")
def _(count, prompt, new, addition_location, positions):
    start = 0 if addition_location == "front" else prompt - count
    own = [(row, start + row) for row in range(count)]
    later = [(count - 1, position) for position in range(start + count, prompt + new)]
    return own + later if positions == "all" else own


PLAIN, LOVE, MORE = ([0, 5, 6, 7], "", 0.0), ([0, 5, 6, 8], "love", 1.0), ([0, 5, 6, 7], "love", 2.0)


@exercise(
    lambda: [
        (PLAIN, ([0, 5, 9], "", 0.0)),
        (PLAIN, LOVE),
        (LOVE, MORE),
        (MORE, MORE),
        (PLAIN, ([0, 5, 6, 7], "love", 0.0)),
    ],
    hint="Compare steers first; a steer at strength 0 is no steer. Then count tokens from the start.",
)
def shared_prefix(one, other):
    (tokens, name, strength), (others, other_name, other_strength) = one, other
    steers = [
        (name, strength) if strength else None,
        (other_name, other_strength) if other_strength else None,
    ]
    if steers[0] != steers[1]:
        return 0
    differ = [i for i, (a, b) in enumerate(zip(tokens, others, strict=False)) if a != b]
    return differ[0] if differ else min(len(tokens), len(others))


def _common(tokens, others):
    pairs = zip(tokens, others, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(tokens), len(others)))


@shared_prefix.mistake("That is the trap: keys and values depend on the steer as well as on the tokens.")
def _(one, other):
    return _common(one[0], other[0])


@shared_prefix.mistake("The same steer at another strength leaves other keys and values.")
def _(one, other):
    names = [name if strength else "" for _, name, strength in (one, other)]
    return _common(one[0], other[0]) if names[0] == names[1] else 0


@shared_prefix.mistake("At strength 0 nothing is added, so such a request is an unsteered one.")
def _(one, other):
    return _common(one[0], other[0]) if one[1:] == other[1:] else 0


@exercise(
    lambda: [
        ("blocks.6.hook_resid_post", 12),
        ("blocks.6.hook_resid_pre", 12),
        ("blocks.0.hook_resid_pre", 12),
        ("blocks.1.hook_resid_pre", 12),
        ("blocks.3.hook_mlp_out", 12),
        ("blocks.12.hook_resid_post", 12),
    ],
    hint="What enters block l has left block l − 1. llama.cpp adds after blocks 1 to blocks − 1; else None.",
)
def control_vector_block(act_name, blocks):
    _, layer, kind = act_name.split(".")
    after = int(layer) - (kind == "hook_resid_pre")
    return after if kind in ("hook_resid_pre", "hook_resid_post") and 0 < after < blocks else None


@control_vector_block.mistake("What enters block l is what left block l − 1.")
def _(act_name, blocks):
    layer, kind = re.fullmatch(r"blocks\.(\d+)\.hook_(\w+)", act_name).groups()
    return int(layer) if kind in ("resid_pre", "resid_post") and 0 < int(layer) < blocks else None


@control_vector_block.mistake("llama.cpp has no control vector after block 0: return None there.")
def _(act_name, blocks):
    layer, kind = re.fullmatch(r"blocks\.(\d+)\.hook_(\w+)", act_name).groups()
    after = int(layer) - (kind == "resid_pre")
    return after if kind in ("resid_pre", "resid_post") and 0 <= after < blocks else None


@control_vector_block.mistake("The output of the MLP alone is not the residual stream: return None for it.")
def _(act_name, blocks):
    layer, kind = re.fullmatch(r"blocks\.(\d+)\.hook_(\w+)", act_name).groups()
    after = int(layer) - (kind == "resid_pre")
    return after if 0 < after < blocks else None


@exercise(
    lambda: [([5, 6], 0), ([0, 5, 6], 0), ([0, 0, 5], 0), ([], 0)],
    hint="Take all BOS tokens off the front, then put one there.",
)
def with_one_bos(ids, bos):
    while ids and ids[0] == bos:
        ids = ids[1:]
    return [bos, *ids]


@with_one_bos.mistake("A server may have added BOS already: then there are two.")
def _(ids, bos):
    return [bos, *ids]


@with_one_bos.mistake("Two BOS tokens at the front are one too many.")
def _(ids, bos):
    return ids if ids and ids[0] == bos else [bos, *ids]


@with_one_bos.mistake("An empty text has a BOS too.")
def _(ids, bos):
    while ids and ids[0] == bos:
        ids = ids[1:]
    return [bos, *ids] if ids else ids
