"""What notebook 11 needs to run servers in an environment of their own, and to compare what they write."""

import json
import os
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import requests
import torch
from gguf import GGUFReader, GGUFValueType, GGUFWriter, dequantize
from requests.adapters import HTTPAdapter
from urllib3.util import Retry

from .. import embedded
from ..models import Model

VLLM = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"}
ENVIRONMENT = VLLM | {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "HF_HUB_OFFLINE": "1"}
PORT = "8123"


@torch.no_grad()
def greedy(model: Model, prompt: Sequence[int], new: int, **settings: Any) -> list[int]:
    """The greedy tokens after token ids, at most `new`; settings: others of `model.generate`."""
    given = torch.tensor([prompt], device=model.device)
    how = {"attention_mask": torch.ones_like(given), "max_new_tokens": new, "do_sample": False}
    return model.generate(given, **how, **settings)[0, len(prompt) :].tolist()


def agreement(theirs: Sequence[Sequence[int]], ours: Sequence[Sequence[int]]) -> str:
    """How many tokens of all texts are equal before the first that is not, as in "70 of 72"."""
    count = 0
    for one, other in zip(theirs, ours, strict=True):
        equal = [a == b for a, b in zip(one, other, strict=False)]
        count += equal.index(False) if False in equal else len(equal)
    return f"{count} of {sum(map(len, ours))}"


def run(python: str, program: str, **job: Any) -> dict[str, Any]:
    """What a program makes of a job, given as a JSON file; RuntimeError with what it said if it fails."""
    Path("job.json").write_text(json.dumps(job), encoding="utf-8")
    command, environment = [python, program, "job.json", "out.json"], os.environ | ENVIRONMENT
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{program} failed: {done.stderr}")
    return json.loads(Path("out.json").read_text(encoding="utf-8"))


def chat(python: str, folder: str, messages: Sequence[dict[str, str]], max_tokens: int) -> str:
    """What `transformers serve` answers to messages, greedily, with the model in a folder."""
    program = [str(Path(python).with_name("transformers")), "serve", folder, "--port", PORT]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    server = subprocess.Popen([*program, "--device", "cpu", "--dtype", "float32"], **quiet)
    body = {"model": folder, "messages": list(messages), "max_tokens": max_tokens, "temperature": 0}
    try:
        with requests.Session() as session:
            session.mount("http://", HTTPAdapter(max_retries=Retry(backoff_factor=0.5, total=9)))
            answer = session.post(f"http://localhost:{PORT}/v1/chat/completions", json=body)
        return answer.json()["choices"][0]["message"]["content"]
    finally:
        server.terminate()


def unpacked_gguf(name: str, path: str | Path, architecture: str) -> None:
    """Write an embedded model's GGUF file again with float32 numbers, which llama.cpp does not round."""
    source, *_ = (file for file in embedded.EMBEDDED[name].files() if file.suffix == ".gguf")
    reader, writer = GGUFReader(source), GGUFWriter(path, architecture)
    for key, field in reader.fields.items():
        kind = field.types[0]
        inner = field.types[-1] if kind == GGUFValueType.ARRAY else None
        if not key.startswith("GGUF.") and key not in ("general.architecture", "general.file_type"):
            writer.add_key_value(key, field.contents(), kind, sub_type=inner)
    for one in reader.tensors:
        writer.add_tensor(one.name, dequantize(one.data, one.tensor_type).astype("float32"))
    for write in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
        write()
    writer.close()
