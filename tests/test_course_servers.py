"""What notebook 11 compares servers with; the servers themselves run where they are installed."""

import sys

import pytest
import torch
from conftest import tiny
from gguf import GGUFReader

import steer_utils as su
from steer_utils.course import servers


def test_greedy_tokens_are_the_likeliest_one_after_another_also_from_a_cache():
    model, prompt = tiny("llama"), [0, 5, 7]
    found = servers.greedy(model, prompt, 4)
    for length in range(4):
        with torch.no_grad():
            logits = model(torch.tensor([prompt + found[:length]])).logits[0, -1]
        assert found[length] == logits.argmax()
    with torch.no_grad():
        known = model(torch.tensor([prompt[:-1]]), use_cache=True).past_key_values
    assert servers.greedy(model, prompt, 4, past_key_values=known) == found


def test_tokens_count_up_to_the_first_that_differs():
    assert servers.agreement([[1, 2, 3], [4, 5]], [[1, 2, 3], [4, 6, 7]]) == "4 of 6"
    assert servers.agreement([[9, 2, 3]], [[1, 2, 3]]) == "0 of 3"


def test_a_program_gets_its_job_and_an_error_says_what_it_said(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    lines = ("import json, sys", "job = json.load(open(sys.argv[1]))")
    program = "\n".join([*lines, "json.dump({'y': job['x']}, open(sys.argv[2], 'w'))"])
    (tmp_path / "copy.py").write_text(program)
    assert servers.run(sys.executable, "copy.py", x=[1, 2]) == {"y": [1, 2]}
    with pytest.raises(RuntimeError, match=r"(?s)copy.py failed: .*KeyError: 'x'"):
        servers.run(sys.executable, "copy.py", y=1)


@pytest.mark.slow
def test_the_unpacked_file_has_the_numbers_of_the_embedded_model(tmp_path):
    servers.unpacked_gguf("smollm2-135m", tmp_path / "model.gguf", "llama")
    tensors = {one.name: one.data for one in GGUFReader(tmp_path / "model.gguf").tensors}
    weights = su.load(dtype="float32", device="cpu")[0].state_dict()
    for name, ours in (
        ("token_embd.weight", "embed_tokens"),
        ("blk.3.ffn_up.weight", "layers.3.mlp.up_proj"),
    ):
        assert torch.equal(torch.tensor(tensors[name]), weights[f"model.{ours}.weight"])
