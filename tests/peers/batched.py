"""Six prompts steered in one left-padded batch and one by one: for how many is the text the same?

python tests/peers/batched.py steer_utils|hook|transformer_lens|steering_vectors|repeng [--model FOLDER]

Every program gets the same task: add rows to the activations that enter a block, at the first tokens of each
prompt; repeng adds its row to every token and cannot do otherwise. Install one with its line of
requirements.txt; steering-vectors needs a transformers below 5, where this package does not run. The model is
the embedded one by default; where it is not installed, name a folder or a model of the Hub.
"""

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

PROMPTS = (  # of six lengths
    "He said",
    "The weather is",
    "I hate you because",
    "After the rain we went out",
    "Yesterday I went up to my friend and said",
    "My sister called to tell me that the kitchen of her new flat was",
)
LAYER, COEFF, NEW_TOKENS = 6, 5.0, 12
PAIR = "Love", "Hate"

Logits = Callable[[Tensor, Tensor], Tensor]  # of ids [B, T] and mask [B, T], each row's last [B, V]


def plain(model: PreTrainedModel) -> Logits:
    """The model's own, with positions counted from the mask."""

    def logits(ids: Tensor, mask: Tensor) -> Tensor:
        places = (mask.cumsum(1) - 1).clamp(min=0)
        return model(ids, attention_mask=mask, position_ids=places, use_cache=False).logits[:, -1]

    return logits


# --- the programs -----------------------------------------------------------------------------------------


@contextmanager
def steer_utils(model: PreTrainedModel, tokenizer: Any, rows: Tensor) -> Iterator[Logits]:
    import steer_utils as su

    with su.SteeringVector(LAYER, rows).on(model):
        yield plain(model)


@contextmanager
def hook(model: PreTrainedModel, tokenizer: Any, rows: Tensor) -> Iterator[Logits]:
    """What one writes by hand."""

    def add(module: Any, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        hidden = args[0].clone()
        hidden[:, : len(rows)] += rows
        return (hidden, *args[1:]), kwargs

    handle = model.get_decoder().layers[LAYER].register_forward_pre_hook(add, with_kwargs=True)
    yield plain(model)
    handle.remove()


@contextmanager
def transformer_lens(model: PreTrainedModel, tokenizer: Any, rows: Tensor) -> Iterator[Logits]:
    """A hook as in the original program of activation additions."""
    from transformer_lens.model_bridge import TransformerBridge

    name = model.name_or_path
    bridge = TransformerBridge.boot_transformers(name, hf_model=model, tokenizer=tokenizer, device="cpu")

    def add(resid_pre: Tensor, hook: Any) -> Tensor:
        resid_pre[:, : len(rows)] += rows
        return resid_pre

    with bridge.hooks(fwd_hooks=[(f"blocks.{LAYER}.hook_resid_pre", add)]):
        yield lambda ids, mask: bridge(ids, attention_mask=mask, return_type="logits")[:, -1]


@contextmanager
def steering_vectors(model: PreTrainedModel, tokenizer: Any, rows: Tensor) -> Iterator[Logits]:
    """One row for a layer: the last one, added to the last of the tokens that the others add to."""
    from steering_vectors import SteeringVector

    vector, at = SteeringVector({LAYER - 1: rows[-1]}), [len(rows) - 1]
    with vector.apply(model, token_indices=at, min_token_index=None):
        yield plain(model)


@contextmanager
def repeng(model: PreTrainedModel, tokenizer: Any, rows: Tensor) -> Iterator[Logits]:
    """The last row, added to every token."""
    from repeng import ControlModel

    control = ControlModel(model, [LAYER - 1])
    control.set_raw_control({LAYER - 1: rows[-1]})
    yield plain(model)
    control.unwrap()


PROGRAMS = {one.__name__: one for one in (steer_utils, hook, transformer_lens, steering_vectors, repeng)}


# --- the measurement --------------------------------------------------------------------------------------


def encoded(tokenizer: Any, text: str) -> Tensor:
    """Token ids [T] with BOS in front, or what the tokenizer has instead of one."""
    begin = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    return torch.tensor([begin, *tokenizer(text, add_special_tokens=False)["input_ids"]])


def difference(model: PreTrainedModel, tokenizer: Any) -> Tensor:
    """COEFF times the difference of the pair's activations entering the block, [S, D]."""
    one, other = (
        model(encoded(tokenizer, text)[None], output_hidden_states=True).hidden_states[LAYER][0]
        for text in PAIR
    )
    size = min(len(one), len(other))
    return COEFF * (one[:size] - other[:size])


def written(logits: Logits, prompts: list[Tensor]) -> Tensor:
    """The token ids that greedy search adds to each prompt, [B, NEW_TOKENS]; the cache is off."""
    ids = torch.nn.utils.rnn.pad_sequence(prompts, batch_first=True, padding_side="left")
    masks = [torch.ones_like(one) for one in prompts]
    mask = torch.nn.utils.rnn.pad_sequence(masks, batch_first=True, padding_side="left")
    for _ in range(NEW_TOKENS):
        ids = torch.cat([ids, logits(ids, mask).argmax(-1, keepdim=True)], dim=1)
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
    return ids[:, -NEW_TOKENS:]


def loaded(name: str | None) -> tuple[PreTrainedModel, Any]:
    if name is None:
        import steer_utils as su

        return su.load(dtype="float32")
    model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32).eval()
    return model, PreTrainedTokenizerFast.from_pretrained(name)


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("program", choices=PROGRAMS)
    parser.add_argument("--model", help="a folder or a name on the Hub; by default the embedded model")
    given = parser.parse_args()
    model, tokenizer = loaded(given.model)
    prompts = [encoded(tokenizer, text) for text in PROMPTS]
    rows, unsteered = difference(model, tokenizer), written(plain(model), prompts)
    with PROGRAMS[given.program](model, tokenizer, rows) as logits:
        batched = written(logits, prompts)
        alone = torch.cat([written(logits, [one]) for one in prompts])
    same, moved = ((a == b).all(1).sum().item() for a, b in ((batched, alone), (alone, unsteered)))
    print(f"{given.program}: {same} of {len(PROMPTS)} alike, {len(PROMPTS) - moved} of them steered")


if __name__ == "__main__":
    main()
