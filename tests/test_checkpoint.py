"""Values on disk and on the Hub: what comes back, what is refused; and jobs that go on after a stop."""

import contextlib
import json
import os
import pickle
import random
import shutil
import struct
import subprocess
import sys
import threading
import warnings
from base64 import b64decode
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from hashlib import sha1, sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import CONFIGS, GOLDEN_MODELS, disk_of, head_steer, new_model, tiny
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import steer_utils as su
from steer_utils import checkpoint, data, hf
from steer_utils.additions.contrast import mean_difference

JSON, TENSORS = "toy.json", "toy.safetensors"


@dataclass(frozen=True)
class Toy(checkpoint.Saved):
    """Rows [S, D] and a label, made for a model."""

    file_name = "toy"
    shipped = "toys"
    facts = ("label",)

    rows: Tensor
    label: str = "joy"
    model_id: str = ""
    weights: str = ""

    def to_files(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        return {"rows": self.rows}, {"label": self.label, "model": self.model_id, "weights": self.weights}

    @classmethod
    def from_files(cls, tensors: dict[str, Tensor], facts: dict[str, Any]) -> "Toy":
        if not isinstance(facts["label"], str):
            raise TypeError(f"label is {facts['label']!r}")
        return cls(tensors["rows"], facts["label"], facts["model"], facts["weights"])

    def require_fit(self, model: PreTrainedModel) -> None:
        if self.rows.shape[1] != model.config.hidden_size:
            raise ValueError(f"rows of {tuple(self.rows.shape)} for a width of {model.config.hidden_size}")


def toy(seed: int = 0, width: int = 32, **facts: str) -> Toy:
    return Toy(torch.randn(4, width, generator=torch.Generator().manual_seed(seed)), **facts)


def same(one: Toy, other: Toy) -> bool:
    return torch.equal(one.rows, other.rows) and (one.label, one.model_id) == (other.label, other.model_id)


@pytest.fixture(scope="module")
def two_models(tmp_path_factory: pytest.TempPathFactory) -> list[PreTrainedModel]:
    """Two models of one width that were read from folders called one and two."""
    models = []
    for name in ("one", "two"):
        folder = tmp_path_factory.mktemp("models") / name
        tiny("llama").save_pretrained(folder)
        models.append(AutoModelForCausalLM.from_pretrained(folder).eval())
    return models


# --- what comes back --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=["32", "b16", "64"])
def test_a_value_comes_back_with_its_dtype_and_every_bit(tmp_path, dtype):
    value = Toy(toy().rows.to(dtype).T.contiguous().T, "naïve ☕", "Größe/名")  # not contiguous
    folder = tmp_path / "ein Ordner" / "ベクトル"  # new, deep, and given as a str
    value.save_pretrained(str(folder))
    found = Toy.from_pretrained(str(folder))
    assert found.rows.dtype == dtype
    assert same(found, value)


def test_a_part_of_a_larger_tensor_is_saved_alone_and_without_gradients(tmp_path):
    whole = nn.Parameter(torch.randn(1000, 32))
    Toy(whole[10:12]).save_pretrained(tmp_path)
    found = Toy.from_pretrained(tmp_path).rows
    assert torch.equal(found, whole[10:12])
    assert (found.requires_grad, type(found)) == (False, Tensor)
    assert (tmp_path / TENSORS).stat().st_size < 1000


def test_saving_again_replaces_what_was_there(tmp_path):
    toy(0).save_pretrained(tmp_path)
    toy(1, label="grief").save_pretrained(tmp_path)
    assert same(Toy.from_pretrained(tmp_path), toy(1, label="grief"))
    assert {path.name for path in tmp_path.iterdir()} == {JSON, TENSORS}


def test_the_files_hold_numbers_and_json_and_no_pickle(tmp_path, monkeypatch):
    def forbidden(*args, **kwargs):
        raise AssertionError("pickle was used")

    for module, name in ((pickle, "dumps"), (pickle, "loads"), (torch, "save"), (torch, "load")):
        monkeypatch.setattr(module, name, forbidden)
    toy(model_id="m").save_pretrained(tmp_path)
    assert same(Toy.from_pretrained(tmp_path), toy(model_id="m"))
    content = (tmp_path / TENSORS).read_bytes()
    (size,) = struct.unpack("<Q", content[:8])
    assert json.loads(content[8 : 8 + size])["rows"]["shape"] == [4, 32]
    assert content[8 + size :] == toy().rows.numpy().tobytes()
    facts = json.loads((tmp_path / JSON).read_text(encoding="utf-8"))
    assert (facts["model"], facts["label"]) == ("m", "joy")
    assert facts["versions"].keys() >= {"steer_utils", "torch", "transformers"}


def test_two_values_may_be_in_one_folder(tmp_path):
    class Other(Toy):
        file_name = "other"

    toy(0, model_id="naïve ☕").save_pretrained(tmp_path)
    Other(toy(1).rows, "grief").save_pretrained(tmp_path)
    assert same(Toy.from_pretrained(tmp_path), toy(0, model_id="naïve ☕"))
    assert same(Other.from_pretrained(tmp_path), toy(1, label="grief"))


# --- the wrong model --------------------------------------------------------------------------------------


def test_a_value_of_another_model_is_refused_unless_any_model_allows_it(two_models, tmp_path):
    one, two = two_models
    value = toy(model_id="one")  # the name of its folder, not the path to it
    value.save_pretrained(tmp_path)
    assert same(Toy.from_pretrained(tmp_path, one), value)
    with pytest.raises(ValueError, match=r"made with 'one', not with 'two'.*any_model=True"):
        Toy.from_pretrained(tmp_path, two)
    assert same(Toy.from_pretrained(tmp_path, two, any_model=True), value)
    assert same(Toy.from_pretrained(tmp_path), value)


def rounded(dtype: torch.dtype) -> PreTrainedModel:
    return new_model(CONFIGS["llama"]()).to(dtype)


def scaled(name: str, factor: float = 1.01) -> PreTrainedModel:
    model = new_model(CONFIGS["llama"]())
    model.get_parameter(name).data.mul_(factor)
    return model


def one_row_changed() -> PreTrainedModel:
    model = new_model(CONFIGS["llama"]())
    model.model.layers[1].mlp.down_proj.weight.data[3] *= 3
    return model


def learned_a_little() -> PreTrainedModel:
    """After one step of Adam."""
    model = new_model(CONFIGS["llama"]()).requires_grad_()
    adam, ids = torch.optim.Adam(model.parameters(), lr=1e-4), torch.arange(40)[None]
    model(ids, labels=ids).loss.backward()
    adam.step()
    return model.requires_grad_(False)


CHANGED = {
    "head": lambda: scaled("lm_head.weight"),
    "norm": lambda: scaled("model.norm.weight"),
    "block": lambda: scaled("model.layers.1.mlp.up_proj.weight"),
    "row": one_row_changed,
    "learned": learned_a_little,
}


@pytest.mark.parametrize("change", CHANGED.values(), ids=CHANGED)
def test_a_value_is_refused_when_the_weights_of_its_model_have_changed(tmp_path, change):
    name, weights = (of(tiny("llama")) for of in (checkpoint.model_id, checkpoint.weights_of))
    toy(model_id=name, weights=weights).save_pretrained(tmp_path)
    changed = change()
    with pytest.raises(ValueError, match=r"not with the weights that '' has now; any_model=True takes it"):
        Toy.from_pretrained(tmp_path, changed)
    assert same(Toy.from_pretrained(tmp_path, changed, any_model=True), toy(model_id=name))
    assert same(Toy.from_pretrained(tmp_path, new_model(CONFIGS["llama"]())), toy(model_id=name))


DTYPES = torch.float32, torch.bfloat16, torch.float16


@pytest.mark.parametrize("made", DTYPES, ids=str)
@pytest.mark.parametrize("read", DTYPES, ids=str)
def test_a_model_is_the_same_one_in_each_dtype(tmp_path, made, read):
    toy(weights=checkpoint.weights_of(rounded(made))).save_pretrained(tmp_path)
    assert same(Toy.from_pretrained(tmp_path, rounded(read)), toy())


@pytest.mark.parametrize("unreadable", ["packed", "offloaded"])
def test_of_weights_that_cannot_be_read_the_name_alone_counts(tmp_path, unreadable):
    model = new_model(CONFIGS["llama"]())
    if unreadable == "packed":
        model.lm_head.weight.data.mul_(2)
        model.config.quantization_config = {"bits": 4}
    else:
        model.lm_head.to("meta")
    toy(weights=checkpoint.weights_of(tiny("llama"))).save_pretrained(tmp_path)
    assert same(Toy.from_pretrained(tmp_path, model), toy())


def test_a_file_that_was_made_without_weights_is_read(tmp_path):
    toy().save_pretrained(tmp_path)
    facts = json.loads((tmp_path / JSON).read_text())
    del facts["weights"], facts["sha256"]
    content = checkpoint._content({"rows": toy().rows}, json.dumps(facts))
    (tmp_path / TENSORS).write_bytes(content)
    (tmp_path / JSON).write_text(json.dumps(facts | {"sha256": sha256(content).hexdigest()}))
    assert same(Toy.from_pretrained(tmp_path, tiny("llama")), toy())


def made_with(kind: str, model: PreTrainedModel) -> checkpoint.Saved:
    """A value that a public function computes with a model."""
    tokenizer, letters = AutoTokenizer.from_pretrained(GOLDEN_MODELS / "T1"), list("abcdefghij" * 4)
    texts = [4 * letter for letter in letters]
    labels, small = [-1, 1] * 20, {"rank": 2, "n_steps": 2, "batch_tokens": 8}
    pair = su.get_x_vector("Love", "Hate", coeff=1, act_name=1)
    match kind:
        case "LMSteer":
            return su.train_lm_steer(model, tokenizer, texts, labels, **small)
        case "sum":
            one, other = (su.train_lm_steer(model, tokenizer, texts, labels, **small, seed=i) for i in (0, 1))
            return one + other
        case "transfer":
            steer = head_steer()
            return su.transfer(steer, model, tokenizer, model, tokenizer, anchors=80, method="logits")
        case "head":
            return su.train_classifier_head(model, tokenizer, texts, [int(label > 0) for label in labels])
        case "mean":
            return mean_difference(model, tokenizer, texts[:3], texts[3:], 1)
    return su.steering_vectors(model, tokenizer, pair)[0]


@pytest.mark.parametrize("kind", ["LMSteer", "sum", "transfer", "head", "mean", "x-vector"])
def test_what_is_computed_with_a_model_knows_its_weights(tmp_path, kind):
    value = made_with(kind, tiny("llama"))
    value.save_pretrained(tmp_path)
    back = type(value).from_pretrained(tmp_path, tiny("llama"))
    back.save_pretrained(tmp_path)  # and it keeps them
    with pytest.raises(ValueError, match="not with the weights that '' has now"):
        type(value).from_pretrained(tmp_path, scaled("lm_head.weight"))


@pytest.mark.parametrize("any_model", [False, True])
def test_a_value_that_does_not_fit_is_refused_whatever_any_model_says(tmp_path, any_model):
    class Bridge(nn.Module):
        original_model = tiny("llama")

    toy(width=64).save_pretrained(tmp_path)
    for model in (tiny("llama"), Bridge()):
        with pytest.raises(ValueError, match=r"\(4, 64\) for a width of 32"):
            Toy.from_pretrained(tmp_path, model, any_model=any_model)


# --- damage -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [JSON, TENSORS])
def test_a_missing_file_or_folder_is_a_file_not_found_error_that_names_it(tmp_path, name):
    toy().save_pretrained(tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(FileNotFoundError, match=f"holds no toy.*{name}"):
        Toy.from_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        Toy.from_pretrained(tmp_path / "nowhere")


@pytest.mark.parametrize("name", [JSON, TENSORS])
def test_a_file_that_is_cut_short_is_a_value_error_and_one_of_another_save_a_warning(tmp_path, name):
    toy().save_pretrained(tmp_path)
    content = (tmp_path / name).read_bytes()
    for kept in (0, 1, len(content) // 2, len(content) - 1 - (name == JSON)):  # the JSON ends with a newline
        (tmp_path / name).write_bytes(content[:kept])
        with pytest.raises(ValueError, match="is damaged"):
            Toy.from_pretrained(tmp_path)
    toy(1, label="other").save_pretrained(tmp_path)
    (tmp_path / name).write_bytes(content)
    with pytest.warns(UserWarning, match="is of another save; took the tensors' own"):
        found = Toy.from_pretrained(tmp_path)
    assert same(found, toy() if name == TENSORS else toy(1, label="other"))


def test_a_wrong_byte_anywhere_among_the_tensors_is_a_value_error(tmp_path):
    toy().save_pretrained(tmp_path)
    content = (tmp_path / TENSORS).read_bytes()
    for place in range(0, len(content), 7):
        (tmp_path / TENSORS).write_bytes(flipped(content, place))
        with pytest.raises(ValueError, match="is damaged"):
            Toy.from_pretrained(tmp_path)


def flipped(content: bytes, place: int) -> bytes:
    return content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]


def test_a_json_file_with_something_else_in_it_is_a_value_error(tmp_path):
    toy().save_pretrained(tmp_path)
    facts = json.loads((tmp_path / JSON).read_text())
    others = [
        "",
        "[]",
        "null",
        "3",
        '{"sha256": 5}',
        "\x00",
        "{'model': 'x'}",
        json.dumps(facts | {"label": 3}),
    ]
    lacking = [{name: value for name, value in facts.items() if name != left_out} for left_out in facts]
    for text in [*others, *map(json.dumps, lacking)]:
        (tmp_path / JSON).write_text(text)
        with pytest.raises(ValueError, match=r"the toy in .* is damaged"):
            Toy.from_pretrained(tmp_path)


class Killed(BaseException):
    """What no handler of errors may catch."""


def killed_at(step: int, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Kill the process at the file operation of that number, a write after 20 bytes; lists those done."""
    done = []

    def patch(name: str, last_deed: Callable) -> None:
        real = getattr(Path, name)

        def deed(self: Path, argument: bytes | Path) -> object:
            if len(done) == step:
                last_deed(real, self, argument)
                raise Killed
            done.append(name)
            return real(self, argument)

        monkeypatch.setattr(Path, name, deed)

    patch("write_bytes", lambda real, path, content: real(path, content[:20]))
    patch("replace", lambda real, path, target: None)
    return done


@pytest.mark.parametrize(("step", "left"), [(0, "old"), (1, "old"), (2, "cut"), (3, "cut"), (4, "new")])
@pytest.mark.parametrize("saved_before", [True, False])
def test_a_process_killed_while_saving_leaves_the_old_value_or_the_new_one(
    tmp_path, monkeypatch, saved_before, step, left
):
    if saved_before:
        toy(0).save_pretrained(tmp_path)
    done = killed_at(step, monkeypatch)
    with contextlib.suppress(Killed):
        toy(1).save_pretrained(tmp_path)
    monkeypatch.undo()
    assert done == ["write_bytes", "replace", "write_bytes", "replace"][:step]
    if saved_before or left == "new":
        assert same(Toy.from_pretrained(tmp_path), toy(0 if left == "old" else 1))
    else:
        with pytest.raises(FileNotFoundError):
            Toy.from_pretrained(tmp_path)
    toy(1).save_pretrained(tmp_path)
    assert same(Toy.from_pretrained(tmp_path), toy(1))


# --- names that come with the package, and the Hub --------------------------------------------------------


@pytest.fixture
def shipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Toy:
    """A value that comes with the package under the name "delight"; the working directory is empty."""
    toy(5).save_pretrained(tmp_path / "data" / "toys" / "delight")
    monkeypatch.setattr(data, "DATA", tmp_path / "data")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return toy(5)


def test_a_name_is_a_value_that_comes_with_the_package(shipped):
    assert same(Toy.from_pretrained("delight"), shipped)
    with pytest.raises(FileNotFoundError, match=r"no toys 'delihgt'.*delight"):
        Toy.from_pretrained("delihgt")


def test_a_name_that_is_a_folder_too_is_a_value_error_that_names_both(shipped):
    toy(6).save_pretrained("delight")
    with pytest.raises(ValueError, match=r"'\./delight'.*DATA / 'toys' / 'delight'"):
        Toy.from_pretrained("delight")
    for path in ("./delight", Path("delight"), Path.cwd() / "delight", str(Path.cwd() / "delight")):
        assert same(Toy.from_pretrained(path), toy(6))
    assert same(Toy.from_pretrained(data.DATA / "toys" / "delight"), shipped)


def test_an_id_on_the_hub_is_downloaded_unless_a_folder_is_called_so(shipped, monkeypatch, tmp_path):
    asked = []

    def download(repo_id: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        asked.append((repo_id, revision, sorted(allow_patterns)))
        toy(7).save_pretrained(tmp_path / "snapshot")
        return str(tmp_path / "snapshot")

    monkeypatch.setattr(checkpoint, "snapshot_download", download)
    assert same(Toy.from_pretrained("some-one/my_toy.v2", revision="abc"), toy(7))
    assert asked == [("some-one/my_toy.v2", "abc", [JSON, TENSORS])]
    toy(8).save_pretrained("some-one/my_toy.v2")
    assert same(Toy.from_pretrained("some-one/my_toy.v2"), toy(8))
    for path in (Path("no/folder"), "./no/folder", "/no/folder", "no/such/folder"):
        with pytest.raises(FileNotFoundError):
            Toy.from_pretrained(path)
    assert len(asked) == 1


class Hub(BaseHTTPRequestHandler):
    """As much of the Hub as a push and a download need; `server.files` holds what was committed, by path."""

    def log_message(self, *_: Any) -> None:
        pass

    def answer(self, content: Any, status: int = 200, **headers: str) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(body))} | headers).items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_POST(self) -> None:
        given = self.rfile.read(int(self.headers["Content-Length"])).decode()
        where = f"http://{self.headers['Host']}/me/toy"
        if self.path.endswith("/preupload/main"):
            names = [one["path"] for one in json.loads(given)["files"]]
            modes = [{"path": name, "uploadMode": "regular", "shouldIgnore": False} for name in names]
            self.answer({"files": modes})
        elif self.path.endswith("/commit/main"):
            for line in map(json.loads, given.splitlines()):
                if line["key"] == "file":
                    self.server.files[line["value"]["path"]] = b64decode(line["value"]["content"])
            self.answer({"commitUrl": f"{where}/commit/{40 * '1'}", "commitOid": 40 * "1", "success": True})
        else:  # create, and a check of the card's head
            self.answer({"url": where, "name": "me/toy", "errors": [], "warnings": []})

    def do_GET(self) -> None:
        name = self.path.rpartition("/")[2]
        if "/api/models/me/toy/tree/" in self.path:
            about = {
                name: {"size": len(one), "oid": sha1(one).hexdigest()}
                for name, one in self.server.files.items()
            }
            self.answer([{"type": "file", "path": name} | facts for name, facts in about.items()])
        elif "/api/models/me/toy" in self.path:
            siblings = [{"rfilename": name} for name in self.server.files]
            self.answer({"id": "me/toy", "sha": 40 * "1", "siblings": siblings})
        elif name in self.server.files:
            content = self.server.files[name]
            self.answer(content, ETag=f'"{sha256(content).hexdigest()}"', X_Repo_Commit=40 * "1")
        else:
            self.answer({"error": "Entry not found"}, 404, X_Error_Code="EntryNotFound")

    do_HEAD = do_GET


PUSH = """
import torch, steer_utils as su
steer = su.LMSteer(torch.ones(2, 32, 4), torch.ones(2, 32, 4), model_id="me/model", names=("a", "b"))
print(steer.push_to_hub("me/toy", token="secret"))
back = su.LMSteer.from_pretrained("me/toy")
print(torch.equal(back.projector1, steer.projector1), back.names, back.model_id)
steer.push_to_hub("me/toy", token="secret")
"""


def test_a_steer_goes_to_the_hub_with_a_model_card_and_comes_back_by_its_id(tmp_path):
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        server.files = {}
        threading.Thread(target=server.serve_forever, daemon=True).start()
        where = f"http://127.0.0.1:{server.server_port}"
        env = os.environ | {"HF_ENDPOINT": where, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "0"}
        done = subprocess.run([sys.executable, "-c", PUSH], env=env, capture_output=True, text=True)
        server.shutdown()
    assert done.returncode == 0, done.stderr
    url, back = done.stdout.splitlines()
    assert url == f"{where}/me/toy/commit/{40 * '1'}"
    assert back == "True ('a', 'b') me/model"
    assert sorted(server.files) == ["README.md", "lm_steer.json", "lm_steer.safetensors"]
    card = server.files["README.md"].decode()
    assert "base_model: me/model" in card.split("---")[1]
    assert 'steer = su.LMSteer.from_pretrained("me/toy", model)' in card


# --- jobs that can be stopped -----------------------------------------------------------------------------

SETTINGS = {"model": "m", "seed": 3, "grid": (0.5, 1.0), "note": "naïve ☕", "none": None}


class Job:
    """Three chunks of random numbers in a run; `made` lists the chunks that were computed."""

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        self.made: list[int] = []

    def results(self) -> list[dict[str, Any]]:
        run = checkpoint.Run(self.folder, SETTINGS)
        return [run.chunk(number, lambda number=number: self.make(number)) for number in range(3)]

    def make(self, number: int) -> dict[str, Any]:
        self.made.append(number)
        rows = torch.randn(2, 3, generator=torch.Generator().manual_seed(number))
        tensors = {"rows": rows.T, "half": rows.bfloat16(), "count": torch.tensor(number), "no": rows[:0] > 0}
        return {**tensors, "texts": [f"ünïcode {number}\n"], "loss": float("inf"), "none": None}

    def assert_same(self, found: list[dict[str, Any]]) -> None:
        for values, expected in zip(found, map(Job(None).make, range(3)), strict=True):
            assert values.keys() == expected.keys()
            for name, value in expected.items():
                if isinstance(value, Tensor):
                    assert (values[name].dtype, values[name].shape) == (value.dtype, value.shape)
                    assert torch.equal(values[name], value)
                else:
                    assert values[name] == value


def test_a_chunk_that_is_done_is_read_and_not_computed_again(tmp_path):
    job = Job(tmp_path / "new" / "run")
    for _ in range(3):
        job.assert_same(job.results())
    assert job.made == [0, 1, 2]
    names = sorted(path.name for path in job.folder.iterdir())
    assert names == [*(f"chunk-0000{number}.safetensors" for number in range(3)), "run.json"]


def test_without_a_folder_nothing_is_kept(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    job = Job(None)
    job.assert_same(job.results())
    job.assert_same(job.results())
    assert job.made == [0, 1, 2] * 2
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("step", range(8))  # a write and a rename for the settings and for each chunk
def test_a_run_killed_while_writing_goes_on_with_equal_results(tmp_path, monkeypatch, step):
    job = Job(tmp_path)
    killed_at(step, monkeypatch)
    with pytest.raises(Killed):
        job.results()
    monkeypatch.undo()
    finished = max(0, step // 2 - 1)
    assert job.made == list(range(finished + 1))
    job.made.clear()
    job.assert_same(job.results())
    assert job.made == list(range(finished, 3))


def test_settings_are_written_with_the_first_chunk_unless_another_run_was_faster(tmp_path):
    first, second = (checkpoint.Run(tmp_path, SETTINGS | {"seed": seed}) for seed in (3, 4))
    with pytest.raises(Killed):
        first.chunk(0, failing)
    assert not [*tmp_path.iterdir()]
    second.chunk(0, dict)
    with pytest.raises(ValueError, match=r"other settings \(seed\)"):
        first.chunk(1, dict)


def test_a_full_disk_is_an_error_with_size_and_place_and_leaves_the_old_value(tmp_path):
    toy(0).save_pretrained(tmp_path)
    size = f"{(tmp_path / TENSORS).stat().st_size:,} bytes"
    message = rf"{size} cannot be written to '{tmp_path / TENSORS}' \(File too large\): make room there"
    with disk_of(300), pytest.raises(OSError, match=message):
        toy(1).save_pretrained(tmp_path)
    assert same(Toy.from_pretrained(tmp_path), toy(0))
    assert {path.name for path in tmp_path.iterdir()} == {JSON, TENSORS}


def test_a_run_on_a_full_disk_keeps_its_chunks_and_goes_on_when_there_is_room(tmp_path):
    job = Job(tmp_path)
    job.results()
    (tmp_path / "chunk-00001.safetensors").unlink()
    with disk_of(100), pytest.raises(OSError, match=r"bytes cannot be written to '.*chunk-00001"):
        job.results()
    assert len([*tmp_path.iterdir()]) == 3
    job.made.clear()
    job.assert_same(job.results())
    assert job.made == [1]


def test_a_place_where_nothing_can_be_written_is_an_error_that_names_it():
    with pytest.raises(OSError, match=r"cannot be written to '/dev/null/new/toy\.safetensors' \(Not a dir"):
        toy().save_pretrained("/dev/null/new")


def test_threads_that_save_into_one_folder_all_succeed_and_leave_one_of_their_values(tmp_path):
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda seed: toy(seed % 8).save_pretrained(tmp_path), range(200)))
    with warnings.catch_warnings(action="ignore"):
        found = Toy.from_pretrained(tmp_path)
    assert any(same(found, toy(seed)) for seed in range(8))
    assert {path.name for path in tmp_path.iterdir()} == {JSON, TENSORS}


@pytest.mark.parametrize("other", ["number", "run"])
def test_a_chunk_of_another_number_or_run_is_computed_again(tmp_path, other):
    job, run = Job(tmp_path), checkpoint.Run(tmp_path / "other", SETTINGS | {"seed": 4})
    job.results()
    run.chunk(1, lambda: job.make(0))
    folder, number = (tmp_path, 0) if other == "number" else (tmp_path / "other", 1)
    shutil.copy(folder / f"chunk-0000{number}.safetensors", tmp_path / "chunk-00001.safetensors")
    job.made.clear()
    with pytest.warns(UserWarning, match=r"chunk-00001.* is damaged \(its hash does not fit\)"):
        job.assert_same(job.results())
    assert job.made == [1]


def test_settings_that_cannot_be_read_are_a_value_error_that_names_the_file(tmp_path):
    job = Job(tmp_path)
    job.results()
    for content in (b"", b"\xff\xfe", b"null", b"[" * 10_000):
        (tmp_path / "run.json").write_bytes(content)
        with pytest.raises(ValueError, match=r"run\.json holds no whole JSON object"):
            job.results()


def failing() -> dict[str, Any]:
    raise Killed


def test_a_run_killed_inside_a_chunk_goes_on_with_that_chunk(tmp_path, monkeypatch):
    job = Job(tmp_path)
    make = job.make

    def killed_in_the_second(number: int) -> dict[str, Any]:
        if number == 1:
            raise Killed
        return make(number)

    monkeypatch.setattr(job, "make", killed_in_the_second)
    with pytest.raises(Killed):
        job.results()
    monkeypatch.undo()
    job.assert_same(job.results())
    assert job.made == [0, 1, 2]


@pytest.mark.parametrize(
    ("change", "named"),
    [({"seed": 4}, "seed"), ({"grid": [0.5], "model": "n"}, "model, grid"), ({"new": 1}, "new")],
    ids=["other", "two", "new"],
)
def test_other_settings_are_a_value_error_that_names_them_and_changes_nothing(tmp_path, change, named):
    job = Job(tmp_path)
    job.results()
    with pytest.raises(ValueError, match=rf"other settings \({named}\): give another folder"):
        checkpoint.Run(tmp_path, SETTINGS | change)
    with pytest.raises(ValueError, match="seed"):
        checkpoint.Run(tmp_path, {name: value for name, value in SETTINGS.items() if name != "seed"})
    checkpoint.Run(tmp_path, dict(reversed(SETTINGS.items())))  # their order makes no difference
    job.assert_same(job.results())
    assert job.made == [0, 1, 2]


def test_a_chunk_that_is_cut_short_is_computed_again_with_a_warning(tmp_path):
    job = Job(tmp_path)
    job.results()
    path = tmp_path / "chunk-00001.safetensors"
    whole = path.read_bytes()
    for kept in (0, 4, 50, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:kept])
        job.made.clear()
        with pytest.warns(UserWarning, match=rf"{path} is damaged .*; computing it again") as caught:
            job.assert_same(job.results())
        assert caught[0].filename == __file__  # the warning points at the line that asked for the chunk
        assert job.made == [1]
        assert path.stat().st_size == len(whole)


def test_a_wrong_byte_anywhere_in_a_chunk_is_noticed(tmp_path):
    run, path = checkpoint.Run(tmp_path, {}), tmp_path / "chunk-00000.safetensors"
    make = lambda: {"rows": torch.ones(2, 2), "no": torch.zeros(0, 4), "texts": ["a", "é"]}  # noqa: E731
    run.chunk(0, make)
    whole = path.read_bytes()
    for place in range(len(whole)):
        path.write_bytes(flipped(whole, place))
        with pytest.warns(UserWarning, match="is damaged"):
            found = run.chunk(0, make)
        assert found["texts"] == ["a", "é"]
        assert torch.equal(found["rows"], torch.ones(2, 2))


@pytest.mark.parametrize("content", [b"whole", "ganz ☕"])
def test_a_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch, content):
    path = tmp_path / "deep" / "file"
    checkpoint.write_atomically(path, content)
    for step in (0, 1):
        killed_at(step, monkeypatch)
        with pytest.raises(Killed):
            checkpoint.write_atomically(path, b"other")
        monkeypatch.undo()
        assert path.read_bytes() == (content if isinstance(content, bytes) else content.encode())


def test_a_save_that_is_cut_between_its_two_files_leaves_the_new_value(tmp_path):
    toy(0, label="old").save_pretrained(tmp_path)
    before = (tmp_path / JSON).read_bytes()
    new = toy(1, label="new")
    new.save_pretrained(tmp_path)
    (tmp_path / JSON).write_bytes(before)
    with pytest.warns(UserWarning, match="took the tensors' own"):
        found = Toy.from_pretrained(tmp_path)
    assert (found.label, found.rows.tolist()) == ("new", new.rows.tolist())


def test_every_changed_byte_of_both_files_is_noticed_or_changes_nothing(tmp_path):
    toy(0, label="joy").save_pretrained(tmp_path)
    kept, generator = Toy.from_pretrained(tmp_path), random.Random(0)
    for name in (JSON, TENSORS):
        whole = (tmp_path / name).read_bytes()
        for place in generator.sample(range(len(whole)), 100):
            damaged = bytearray(whole)
            damaged[place] ^= 1 << generator.randrange(8)
            (tmp_path / name).write_bytes(damaged)
            with contextlib.suppress(ValueError):
                found = Toy.from_pretrained(tmp_path)
                assert (found.label, found.rows.tolist()) == (kept.label, kept.rows.tolist())
        (tmp_path / name).write_bytes(whole)


# --- last hidden states -----------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 9])
def test_last_states_are_those_of_each_text_alone_without_a_steer_that_is_on(any_model, size, monkeypatch):
    rows = [[0, *range(1, length)] for length in (3, 1, 12, 3, 7)]
    monkeypatch.setattr(checkpoint, "TEXTS_PER_PASS", size)
    with su.AddSteer(torch.ones(1, 32), epsilon=9.0).at(1.0).on(any_model):
        found = dict(checkpoint.last_states(any_model, rows))
    assert sorted(found) == list(range(len(rows)))
    for i, row in enumerate(rows):
        ids = torch.tensor([row])
        alone = hf.forward(any_model, ids, torch.ones_like(ids)).last_hidden_state[0]
        torch.testing.assert_close(found[i], alone, atol=1e-4, rtol=1e-4)
        assert not found[i].requires_grad


def test_a_text_that_a_model_cannot_read_has_no_states():
    with pytest.raises(ValueError, match="the text of index 1 has the token id 97"):
        next(checkpoint.last_states(tiny("gpt2"), [[0], [0, 97]]))
