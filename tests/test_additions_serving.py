"""What other engines are given: vLLM's plugin vllm-lens, its prefix cache, and control vectors of llama.cpp.

The engines themselves run in notebook 11, each in an environment of its own; here their rules are applied by
hand to the same models.
"""

import json
from base64 import b64decode
from contextlib import ExitStack
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import logits, random_ids, tiny
from gguf import GGUFReader

import steer_utils as su
from steer_utils import hf
from steer_utils.additions.serving import Request

ROWS = torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
PROMPT, NEW = 7, 4
PLACES = [(where, how) for where in ("front", "mid", "back") for how in ("own", "all", "last", "generated")]


def added_after_block(model, layer: int, change: torch.Tensor):
    """As the engines do: `change` [T, D] is added to what a block leaves."""

    def add(module, args, output):
        first, *rest = output if isinstance(output, tuple) else (output,)
        return (first + change, *rest) if rest or isinstance(output, tuple) else first + change

    return hf.block(model, layer).register_forward_hook(add)


def rows_of(part: dict) -> torch.Tensor:
    """The rows [P, D] of a vector for vllm-lens, as a tensor or as a request carries them."""
    given = part["activations"]
    if isinstance(given, dict):
        given = np.frombuffer(b64decode(given["data"]), given["dtype"]).reshape(given["shape"]).copy()
    return torch.as_tensor(given)[0]


def as_the_plugin(model, parts: list[dict], tokens: int, seen: slice = slice(None)) -> ExitStack:
    """A context with each part's rows at its absolute positions, in a pass over the positions `seen`."""
    with ExitStack() as stack:
        for part in parts:
            change = torch.zeros(tokens, 32)
            change[part["position_indices"]] += rows_of(part)
            stack.enter_context(added_after_block(model, *part["layer_indices"], change[seen]))
        return stack.pop_all()


@pytest.mark.parametrize(("where", "how"), PLACES)
def test_rows_at_the_positions_told_to_vllm_are_the_steer(main_model, where, how):
    vector = su.SteeringVector(2, ROWS, where, how)
    ids = random_ids(1, PROMPT + NEW)
    part = vector.to_vllm_lens(PROMPT, NEW)
    with su.hooks.batch(prompt_lengths=torch.tensor([PROMPT])), vector.on(main_model):
        expected = logits(main_model, ids)
    with as_the_plugin(main_model, [part], PROMPT + NEW):
        assert torch.allclose(logits(main_model, ids), expected, atol=1e-5)
    assert part["activations"].shape == (1, len(part["position_indices"]), 32)


def test_rows_added_once_at_the_front_need_no_length_and_leaving_a_block_is_entering_the_next():
    part = su.SteeringVector(2, ROWS).to_vllm_lens()
    assert part["position_indices"] == [0, 1, 2]
    assert torch.equal(part["activations"][0], ROWS)
    assert part["layer_indices"] == [1]
    assert su.SteeringVector("blocks.1.hook_resid_post", ROWS).to_vllm_lens()["layer_indices"] == [1]


@pytest.mark.parametrize(
    ("vector", "tokens", "message"),
    [
        ({"act_name": 0}, 7, "adds to what a block leaves, not at 'blocks.0.hook_resid_pre'"),
        ({"act_name": "blocks.1.hook_mlp_out"}, 7, "not at 'blocks.1.hook_mlp_out'"),
        ({"positions": "all"}, 0, r"give prompt_tokens: where \('front', 'all'\) is depends on the length"),
        ({"addition_location": "back"}, 2, "a prompt of 2 tokens is shorter than the 3 rows"),
    ],
    ids=("embeddings", "part", "length", "short"),
)
def test_what_vllm_cannot_be_told_is_refused(vector, tokens, message):
    vector = replace(su.SteeringVector(1, ROWS), **vector)
    with pytest.raises(ValueError, match=message):
        vector.to_vllm_lens(tokens, 4)


# --- the prefix cache -------------------------------------------------------------------------------------


class PrefixCache(dict):
    """vLLM's, in small: keys and values of whole prompts, looked for by tokens and salt."""

    def next_logits(self, model, request: Request) -> torch.Tensor:
        prompt, extra = request
        ids = torch.tensor([prompt["prompt_token_ids"]])
        parts, size = extra.get("apply_steering_vectors", []), ids.shape[1] + NEW
        key = tuple(prompt["prompt_token_ids"][:-1]), prompt.get("cache_salt")
        if key not in self:
            with as_the_plugin(model, parts, size, slice(ids.shape[1] - 1)):
                self[key] = model(ids[:, :-1], use_cache=True).past_key_values
        with as_the_plugin(model, parts, size, slice(ids.shape[1] - 1, ids.shape[1])):
            return model(ids[:, -1:], past_key_values=hf.repeated(self[key], 1, 1)).logits[0, -1]


def test_a_salt_keeps_steered_and_unsteered_prompts_apart():
    model, ids = tiny("llama"), random_ids(1, PROMPT)[0].tolist()
    one, other = su.SteeringVector(1, ROWS), su.SteeringVector(2, -ROWS)
    plain = su.vllm_request(ids, None, NEW)
    assert json.loads(json.dumps(su.vllm_request(ids, one, NEW))) == [*su.vllm_request(ids, one, NEW)]
    assert plain == ({"prompt_token_ids": ids}, {})
    wanted = PrefixCache().next_logits(model, plain)
    steered = su.vllm_request(ids, one, NEW)

    trap = PrefixCache()
    trap.next_logits(model, ({"prompt_token_ids": ids}, steered[1]))  # without the salt
    assert not torch.allclose(trap.next_logits(model, plain), wanted, atol=1e-3)

    cache = PrefixCache()
    for request in (steered, plain, su.vllm_request(ids, [one, other], NEW), plain, steered):
        found = cache.next_logits(model, request)
        assert torch.allclose(found, PrefixCache().next_logits(model, request), atol=1e-5)
        if request is plain:
            assert torch.allclose(found, wanted, atol=1e-5)
    assert len(cache) == 3


def test_equal_steers_share_a_salt_and_any_difference_makes_another():
    def salt(vector, ids=range(7), tokens=NEW):
        return su.vllm_request(ids, vector, tokens)[0]["cache_salt"]

    vector = su.SteeringVector(1, ROWS)
    assert salt(vector) == salt([replace(vector, rows=ROWS.clone())])
    nearby = ROWS.clone()
    nearby[2, 31] += 1e-6
    others = [replace(vector, act_name=2), replace(vector, rows=nearby), [vector, vector], 2 * vector]
    others += [replace(vector, addition_location="back"), replace(vector, positions="all")]
    assert len({salt(vector), *map(salt, others)}) == 7


# --- control vectors --------------------------------------------------------------------------------------


def test_a_control_vector_is_the_steer_by_the_rules_of_llama_cpp(tmp_path):
    model, ids = tiny("llama"), random_ids(1, PROMPT)
    vector = su.SteeringVector(2, ROWS[:1], "front", "all")
    reader = GGUFReader(vector.to_gguf(tmp_path / "v.gguf", model))
    (tensor,) = reader.tensors
    assert (tensor.name, tensor.tensor_type.name) == ("direction.1", "F32")
    facts = {name: field.contents() for name, field in reader.fields.items()}
    assert facts["general.architecture"] == "controlvector"
    assert facts["controlvector.model_hint"] == "llama"
    assert facts["controlvector.layer_count"] == 3
    with vector.on(model):
        expected = logits(model, ids)
    with added_after_block(model, int(tensor.name.split(".")[1]), torch.from_numpy(np.array(tensor.data))):
        assert torch.allclose(logits(model, ids), expected, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rows": ROWS}, r"one row at every token \('front', 'all'\), not 3 rows, 'front', 'all'"),
        ({"positions": "own"}, "not 1 rows, 'front', 'own'"),
        ({"positions": "generated"}, "not 1 rows, 'front', 'generated'"),
        ({"addition_location": "back"}, "not 1 rows, 'back', 'all'"),
        ({"act_name": 1}, "after blocks 1 to 2, not after block 0"),
        ({"act_name": "blocks.3.hook_resid_post"}, "after blocks 1 to 2, not after block 3"),
        ({"act_name": "blocks.1.hook_attn_out"}, "llama.cpp adds to what a block leaves"),
        ({"rows": ROWS[:1, :5]}, r"rows \(1, 5\) do not fit"),
    ],
    ids=("rows", "own", "generated", "back", "first", "beyond", "part", "width"),
)
def test_what_llama_cpp_cannot_express_is_refused_and_nothing_is_written(tmp_path, changes, message):
    vector = replace(su.SteeringVector(2, ROWS[:1], "front", "all"), **changes)
    with pytest.raises(ValueError, match=message):
        vector.to_gguf(tmp_path / "v.gguf", tiny("llama"))
    assert not (tmp_path / "v.gguf").exists()
