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
ROWS[0] = 0  # as BOS's of a pair
CONSTANT = su.SteeringVector(2, ROWS[2:], "front", "all")
SENT = {where: su.SteeringVector(2, ROWS, where) for where in ("front", "mid", "back")}
SENT |= {"last": su.SteeringVector(2, ROWS, positions="last"), "constant": CONSTANT}


def rows_of(part: dict) -> torch.Tensor:
    """The rows [P, D] of a vector for vllm-lens, as a tensor or as a request carries them."""
    given = part["activations"]
    if isinstance(given, dict):
        given = np.frombuffer(b64decode(given["data"]), given["dtype"]).reshape(given["shape"]).copy()
    return torch.as_tensor(given).reshape(-1, 32)


def as_the_plugin(model, parts: list[dict], start: int = 0) -> ExitStack:
    """A context for a pass whose first token has position `start`: what vllm-lens 1.3.0 adds in it."""

    def changes(part: dict):
        rows, places = rows_of(part), part.get("position_indices")

        def add(module, args, output):
            first, *rest = output if isinstance(output, tuple) else (output,)
            change = rows.expand(first.shape[1], -1).clone() if places is None else torch.zeros_like(first[0])
            for row, place in zip(rows, places or (), strict=False):
                if start <= place < start + len(change):
                    change[place - start] = row
            return (first + change, *rest) if rest or isinstance(output, tuple) else first + change

        return hf.block(model, *part["layer_indices"]).register_forward_hook(add)

    with ExitStack() as stack:
        for part in parts:
            stack.enter_context(changes(part))
        return stack.pop_all()


@pytest.mark.parametrize("kind", SENT)
def test_what_is_told_to_vllm_is_the_steer_in_the_prompt_and_while_writing(main_model, kind):
    ids = random_ids(1, PROMPT + NEW)
    with su.hooks.batch(prompt_lengths=torch.tensor([PROMPT])), SENT[kind].on(main_model):
        expected = logits(main_model, ids)
    with as_the_plugin(main_model, [SENT[kind].to_vllm_lens(PROMPT)]):
        assert torch.allclose(logits(main_model, ids), expected, atol=1e-5)


def test_a_row_of_zeros_is_left_out_and_leaving_a_block_is_entering_the_next():
    part = su.SteeringVector(2, ROWS).to_vllm_lens(PROMPT)
    assert part["position_indices"] == [1, 2]
    assert torch.equal(part["activations"][0], ROWS[1:])
    assert part["layer_indices"] == [1]
    left = su.SteeringVector("blocks.1.hook_resid_post", ROWS)
    assert left.to_vllm_lens(PROMPT)["layer_indices"] == [1]


@pytest.mark.parametrize(
    ("vector", "tokens", "message"),
    [
        ({"act_name": 0}, 7, "adds to what a block leaves, not at 'blocks.0.hook_resid_pre'"),
        ({"act_name": "blocks.1.hook_mlp_out"}, 7, "not at 'blocks.1.hook_mlp_out'"),
        ({"positions": "all"}, 7, "cannot add positions='all' with 3 rows at the front while it writes"),
        ({"positions": "generated"}, 7, "cannot add positions='generated'"),
        ({"rows": ROWS + 1}, 7, "would add the row of BOS to each token written"),
        ({"addition_location": "back"}, 2, "a prompt of 2 tokens is shorter than the 3 rows"),
    ],
    ids=("embeddings", "part", "all", "generated", "BOS", "short"),
)
def test_what_vllm_cannot_be_told_is_refused(vector, tokens, message):
    vector = replace(su.SteeringVector(1, ROWS), **vector)
    with pytest.raises(ValueError, match=message):
        vector.to_vllm_lens(tokens)


# --- the prefix cache -------------------------------------------------------------------------------------


class PrefixCache(dict):
    """vLLM's, in small: keys and values of whole prompts, looked for by tokens and salt."""

    def next_logits(self, model, request: Request) -> torch.Tensor:
        prompt, extra = request
        ids, parts = torch.tensor([prompt["prompt_token_ids"]]), extra.get("apply_steering_vectors", [])
        key = tuple(prompt["prompt_token_ids"][:-1]), prompt.get("cache_salt")
        if key not in self:
            with as_the_plugin(model, parts):
                self[key] = model(ids[:, :-1], use_cache=True).past_key_values
        with as_the_plugin(model, parts, start=ids.shape[1] - 1):
            return model(ids[:, -1:], past_key_values=hf.repeated(self[key], 1, 1)).logits[0, -1]


def test_a_salt_keeps_steered_and_unsteered_prompts_apart():
    model, ids = tiny("llama"), random_ids(1, PROMPT)[0].tolist()
    one, other = su.SteeringVector(1, ROWS), su.SteeringVector(2, -ROWS)
    plain = su.vllm_request(ids)
    assert plain == ({"prompt_token_ids": ids}, {})
    assert json.loads(json.dumps(su.vllm_request(ids, one))) == [*su.vllm_request(ids, one)]
    wanted = PrefixCache().next_logits(model, plain)
    steered = su.vllm_request(ids, one)

    trap = PrefixCache()
    trap.next_logits(model, ({"prompt_token_ids": ids}, steered[1]))  # without the salt
    assert not torch.allclose(trap.next_logits(model, plain), wanted, atol=1e-3)

    cache = PrefixCache()
    for request in (steered, plain, su.vllm_request(ids, [one, other]), plain, steered):
        found = cache.next_logits(model, request)
        assert torch.allclose(found, PrefixCache().next_logits(model, request), atol=1e-5)
        if request is plain:
            assert torch.allclose(found, wanted, atol=1e-5)
    assert len(cache) == 3


def test_equal_steers_share_a_salt_and_any_difference_makes_another():
    def salt(vector):
        return su.vllm_request(range(7), vector)[0]["cache_salt"]

    vector = su.SteeringVector(1, ROWS)
    assert salt(vector) == salt([replace(vector, rows=ROWS.clone())])
    nearby = ROWS.clone()
    nearby[2, 31] += 1e-6
    others = [replace(vector, act_name=2), replace(vector, rows=nearby), [vector, vector], 2 * vector]
    others += [replace(vector, addition_location="back"), replace(vector, positions="last")]
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
    part = {"activations": np.array(tensor.data)[None], "layer_indices": [int(tensor.name.split(".")[1])]}
    with as_the_plugin(model, [part]):
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
