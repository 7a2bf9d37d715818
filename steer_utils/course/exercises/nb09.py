"""Exercises of notebook 09: who makes which chunk, what is missing, the best cell, the time of N workers."""

import math

from . import exercise


@exercise(
    lambda: [("0/3", 10), ("2/3", 10), ("0/1", 4), ("5/8", 3)],
    hint='Split "I/N" at the slash. Chunk k belongs to shard I if k % N == I.',
)
def own_chunks(shard, count):
    own, shards = map(int, shard.split("/"))
    return list(range(own, count, shards))


@own_chunks.mistake(
    "Those are neighbouring chunks. Chunks are ordered by length, so one shard would get all long texts. "
    "Take every N-th chunk."
)
def _(shard, count):
    own, shards = map(int, shard.split("/"))
    size = math.ceil(count / shards)
    return list(range(own * size, min((own + 1) * size, count)))


@own_chunks.mistake("Shards count from 0: 0/3, 1/3 and 2/3. There is no 3/3.")
def _(shard, count):
    own, shards = map(int, shard.split("/"))
    return list(range(own - 1, count, shards)) if own else []


@own_chunks.mistake("The last, incomplete round of chunks is missing.")
def _(shard, count):
    own, shards = map(int, shard.split("/"))
    return list(range(own, count - count % shards, shards))


FILES = ["run.json", "chunk-00000.safetensors", "chunk-00002.safetensors", ".chunk-00003.safetensors.77.tmp"]


@exercise(
    lambda: [(FILES, 5), (FILES[:2], 1), ([], 2)],
    hint="Build the name of each chunk, f'chunk-{number:05}.safetensors', and look for it in the list.",
)
def still_missing(files, count):
    return [number for number in range(count) if f"chunk-{number:05}.safetensors" not in files]


@still_missing.mistake("A .tmp file is what a killed process left behind: its chunk is not done.")
def _(files, count):
    return [number for number in range(count) if not any(f"chunk-{number:05}" in name for name in files)]


@still_missing.mistake("Chunks need not be done in order: look for each number.")
def _(files, count):
    done = sum(name.startswith("chunk-") for name in files)
    return list(range(done, count))


@still_missing.mistake("Chunks count from 0.")
def _(files, count):
    return [number for number in range(1, count + 1) if f"chunk-{number:05}.safetensors" not in files]


CELLS = [((6, 1.0), 0.5, 1.1), ((6, 2.0), 0.8, 1.3), ((12, 1.0), 0.8, 1.2), ((12, 2.0), 0.9, 1.6)]


@exercise(
    lambda: [(CELLS, 1.3), (CELLS, 1.1), (CELLS, 2.0), (CELLS[:2], 1.3)],
    hint="Keep the cells with a ratio of at most the bound; take the largest (share, −ratio).",
)
def best_within(cells, bound):
    within = [cell for cell in cells if cell[2] <= bound]
    return max(within, key=lambda cell: (cell[1], -cell[2]))[0]


@best_within.mistake("The bound is not used.")
def _(cells, bound):
    return max(cells, key=lambda cell: (cell[1], -cell[2]))[0]


@best_within.mistake("A cell that costs exactly the bound is allowed.")
def _(cells, bound):
    within = [cell for cell in cells if cell[2] < bound]
    return max(within, key=lambda cell: (cell[1], -cell[2]))[0] if within else None


@best_within.mistake("Of two cells with equal shares, take the one that costs less.")
def _(cells, bound):
    return max((cell for cell in cells if cell[2] <= bound), key=lambda cell: cell[1])[0]


@exercise(
    lambda: [(1000, 1, 2.0, 30.0), (1000, 64, 2.0, 30.0), (10, 64, 2.0, 30.0), (10, 4, 3.0, 5.0)],
    hint="The worker with the most chunks ends last. How many has it?",
)
def seconds_needed(chunks, workers, per_chunk, start):
    busiest = -(-chunks // workers)  # rounded up
    return start + busiest * per_chunk


@seconds_needed.mistake("A chunk cannot be divided: the busiest worker has ⌈chunks / workers⌉ of them.")
def _(chunks, workers, per_chunk, start):
    return start + chunks / workers * per_chunk


@seconds_needed.mistake("The workers start at the same time: the start counts once.")
def _(chunks, workers, per_chunk, start):
    return workers * start + math.ceil(chunks / workers) * per_chunk


@seconds_needed.mistake("The start is missing: each worker imports torch and loads the model first.")
def _(chunks, workers, per_chunk, start):
    return math.ceil(chunks / workers) * per_chunk
