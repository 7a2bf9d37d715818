"""Requests to vLLM that are steered, with the plugin vllm-lens, each at the positions of its own prompt.

vLLM keeps the keys and values of prompts that it has read, for later requests that begin alike. They depend
on the steer, but by default it looks for them by the tokens alone: an unsteered request then goes on from a
steered one's prompt, without a word. So a steered request here carries a salt, which keeps its prompt apart.
"""

import base64
import hashlib
import json
from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor

from .vector import SteeringVector

Request = tuple[dict[str, Any], dict[str, Any]]


def vllm_request(
    prompt: Sequence[int], steer: SteeringVector | Iterable[SteeringVector] | None = None
) -> Request:
    """The prompt to give to `LLM.generate`, and the extra_args of its `SamplingParams`; both fit into JSON.

    prompt: token ids, BOS included. steer: vectors, as `steering_vectors` makes them of additions, or None.
    Rows of a prompt need `enable_chunked_prefill=False`: the plugin counts each chunk from 0. ValueError for
    what `SteeringVector.to_vllm_lens` refuses.

        prompt, extra = vllm_request(ids, vectors)
        llm.generate([prompt], SamplingParams(max_tokens=24, extra_args=extra))
    """
    vectors = [steer] if isinstance(steer, SteeringVector) else list(steer or ())
    given = {"prompt_token_ids": list(map(int, prompt))}
    if not vectors:
        return given, {}
    parts = [one.to_vllm_lens(len(given["prompt_token_ids"])) for one in vectors]
    parts = [part | {"activations": _as_json(part["activations"])} for part in parts]
    salt = hashlib.sha256(json.dumps(parts).encode()).hexdigest()
    return given | {"cache_salt": salt}, {"apply_steering_vectors": parts}


def _as_json(tensor: Tensor) -> dict[str, Any]:
    """A float32 tensor as vllm-lens reads it from a request over HTTP."""
    data = base64.b64encode(tensor.numpy().tobytes()).decode()
    return {"data": data, "dtype": "float32", "shape": list(tensor.shape)}
