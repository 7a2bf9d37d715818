"""Vectors on disk: what comes back, and what is refused."""

import contextlib
import json
import pickle
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import CONFIGS, KINDS, logits, new_model, padded, random_ids, tiny
from safetensors.torch import save as tensors_to_bytes
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

import steer_utils as su
from steer_utils import checkpoint

JSON, TENSORS = "steering_vector.json", "steering_vector.safetensors"


def vector(seed: int = 0, **where) -> su.SteeringVector:
    rows = torch.randn(4, 32, generator=torch.Generator().manual_seed(seed))
    return su.SteeringVector(**{"act_name": "blocks.1.hook_resid_pre", "rows": rows} | where)


def steered(model: PreTrainedModel, steer: su.SteeringVector, ids: Tensor, mask: Tensor) -> Tensor:
    with steer.on(model):
        return logits(model, ids, mask)


def same(one: su.SteeringVector, other: su.SteeringVector) -> bool:
    facts = ("act_name", "addition_location", "positions", "model_id")
    return torch.equal(one.rows, other.rows) and all(getattr(one, f) == getattr(other, f) for f in facts)


@pytest.fixture(scope="module")
def two_models(tmp_path_factory: pytest.TempPathFactory) -> list[PreTrainedModel]:
    """Two models of one width that were read from folders of different names."""
    models = []
    for name in ("one", "two"):
        folder = tmp_path_factory.mktemp("models") / name
        tiny("llama").save_pretrained(folder)
        models.append(AutoModelForCausalLM.from_pretrained(folder).eval())
    return models


# --- what comes back --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("location", "positions"), [("front", "own"), ("mid", "all"), ("back", "all")])
def test_a_saved_vector_gives_identical_logits(main_model, tokenizer, tmp_path, kind, location, positions):
    pair = su.get_x_vector("Love", "Hate", 5, f"blocks.1.hook_{kind}")
    (steer,) = su.steering_vectors(main_model, tokenizer, pair)
    steer = vector(rows=steer.rows, act_name=steer.act_name, addition_location=location, positions=positions)
    steer.save_pretrained(tmp_path)
    ids, mask = padded([12, 6], "left")
    loaded = su.SteeringVector.from_pretrained(tmp_path, main_model)
    assert same(loaded, steer)
    assert torch.equal(steered(main_model, loaded, ids, mask), steered(main_model, steer, ids, mask))
    assert not torch.allclose(steered(main_model, loaded, ids, mask), logits(main_model, ids, mask))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_rows_keep_their_dtype_and_every_bit(tmp_path, dtype):
    steer = vector(rows=vector().rows.to(dtype).T.contiguous().T)  # not contiguous
    steer.save_pretrained(tmp_path)
    loaded = su.SteeringVector.from_pretrained(tmp_path)
    assert loaded.rows.dtype == dtype
    assert torch.equal(loaded.rows, steer.rows)


def test_a_part_of_a_larger_tensor_is_saved_alone(tmp_path):
    whole = torch.randn(100, 32)
    vector(rows=whole[10:12]).save_pretrained(tmp_path)
    assert torch.equal(su.SteeringVector.from_pretrained(tmp_path).rows, whole[10:12])
    assert (tmp_path / TENSORS).stat().st_size < 1000


def test_a_folder_may_be_new_deep_and_named_in_any_script_and_a_str(tmp_path):
    folder = tmp_path / "ein Ordner" / "ベクトル"
    vector().save_pretrained(str(folder))
    assert same(su.SteeringVector.from_pretrained(str(folder)), vector())


def test_saving_again_replaces_what_was_there_and_what_a_killed_run_left(tmp_path):
    vector(0).save_pretrained(tmp_path)
    vector(1, addition_location="back").save_pretrained(tmp_path)
    assert same(su.SteeringVector.from_pretrained(tmp_path), vector(1, addition_location="back"))
    assert {path.name for path in tmp_path.iterdir()} == {JSON, TENSORS}


def test_the_files_hold_numbers_and_json_and_no_pickle(tmp_path, monkeypatch):
    def forbidden(*args, **kwargs):
        raise AssertionError("pickle was used")

    for module, name in ((pickle, "dumps"), (pickle, "loads"), (torch, "save"), (torch, "load")):
        monkeypatch.setattr(module, name, forbidden)
    steer = vector(model_id="Größe/名")
    steer.save_pretrained(tmp_path)
    assert same(su.SteeringVector.from_pretrained(tmp_path), steer)
    data = (tmp_path / TENSORS).read_bytes()
    (size,) = struct.unpack("<Q", data[:8])
    assert json.loads(data[8 : 8 + size])["rows"]["shape"] == [4, 32]
    assert data[8 + size :] == steer.rows.numpy().tobytes()
    facts = json.loads((tmp_path / JSON).read_text(encoding="utf-8"))
    assert facts["model"] == "Größe/名"
    assert facts["versions"].keys() >= {"steer_utils", "torch", "transformers"}


# --- the wrong model --------------------------------------------------------------------------------------


def test_a_vector_of_another_model_is_refused_unless_any_model_allows_it(two_models, tokenizer, tmp_path):
    one, two = two_models
    (steer,) = su.steering_vectors(one, tokenizer, [su.ActivationAddition(1.0, 1, "Love")])
    steer.save_pretrained(tmp_path)
    assert same(su.SteeringVector.from_pretrained(tmp_path, one), steer)
    with pytest.raises(ValueError, match=r"made with 'one', not with 'two'.*any_model=True"):
        su.SteeringVector.from_pretrained(tmp_path, two)
    assert same(su.SteeringVector.from_pretrained(tmp_path, two, any_model=True), steer)
    assert same(su.SteeringVector.from_pretrained(tmp_path), steer)


def test_rows_of_another_width_are_refused_whatever_any_model_says(tmp_path):
    config = CONFIGS["llama"]()
    config.hidden_size, config.head_dim = 64, 16
    wide = new_model(config)
    vector().save_pretrained(tmp_path)
    for any_model in (False, True):
        with pytest.raises(ValueError, match=r"\(4, 32\).*64"):
            su.SteeringVector.from_pretrained(tmp_path, wide, any_model=any_model)


def test_the_id_of_a_model_in_a_folder_does_not_tell_where_the_folder_is(two_models, tokenizer, tmp_path):
    (steer,) = su.steering_vectors(two_models[0], tokenizer, [su.ActivationAddition(1.0, 1, "Love")])
    steer.save_pretrained(tmp_path)
    facts = (tmp_path / JSON).read_text()
    assert steer.model_id == "one"
    assert str(Path(two_models[0].name_or_path).parent) not in facts


# --- damage -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [JSON, TENSORS])
def test_a_missing_file_is_a_file_not_found_error_that_names_it(tmp_path, name):
    vector().save_pretrained(tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(FileNotFoundError, match=f"holds no steering_vector.*{name}"):
        su.SteeringVector.from_pretrained(tmp_path)


def test_a_missing_folder_is_a_file_not_found_error_that_names_it(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        su.SteeringVector.from_pretrained(tmp_path / "nowhere")


@pytest.mark.parametrize("name", [JSON, TENSORS])
@pytest.mark.parametrize("keep", [0, 1, 0.5, 0.99])
def test_a_file_that_ends_early_is_a_value_error(tmp_path, name, keep):
    vector().save_pretrained(tmp_path)
    data = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(data[: int(keep * len(data)) if keep < 1 else keep])
    with pytest.raises(ValueError, match=r"damaged.*save it again"):
        su.SteeringVector.from_pretrained(tmp_path)


@pytest.mark.parametrize("place", [0, 8, 40, -1, -300])
def test_one_wrong_byte_among_the_tensors_is_a_value_error(tmp_path, place):
    vector().save_pretrained(tmp_path)
    data = bytearray((tmp_path / TENSORS).read_bytes())
    data[place] ^= 1
    (tmp_path / TENSORS).write_bytes(data)
    with pytest.raises(ValueError, match=r"damaged.*save it again"):
        su.SteeringVector.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "text", ["", "{}", "[]", "null", "3", '"text"', '{"sha256": 5}', "\x00", "{'model': 'x'}"], ids=repr
)
def test_a_json_file_with_something_else_in_it_is_a_value_error(tmp_path, text):
    vector().save_pretrained(tmp_path)
    (tmp_path / JSON).write_text(text)
    with pytest.raises(ValueError, match=r"damaged.*save it again"):
        su.SteeringVector.from_pretrained(tmp_path)


@pytest.mark.parametrize("fact", ["model", "versions", "sha256", "act_name"])
def test_a_json_file_without_one_of_its_facts_is_a_value_error(tmp_path, fact):
    vector(addition_location="back").save_pretrained(tmp_path)
    facts = json.loads((tmp_path / JSON).read_text())
    del facts[fact]
    (tmp_path / JSON).write_text(json.dumps(facts))
    with pytest.raises(ValueError, match="damaged"):
        su.SteeringVector.from_pretrained(tmp_path)


class Killed(BaseException):
    """What no handler of errors may catch."""


def killed_at(step: int, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Let the file operation of that number kill the run, a write after 20 bytes; listed are those done."""
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

    patch("write_bytes", lambda real, path, data: real(path, data[:20]))
    patch("replace", lambda real, path, target: None)
    return done


@pytest.mark.parametrize(("step", "left"), [(0, "old"), (1, "old"), (2, "damage"), (3, "damage"), (4, "new")])
@pytest.mark.parametrize("saved_before", [True, False])
def test_a_run_killed_while_saving_leaves_the_old_vector_or_damage_that_is_noticed(
    tmp_path, monkeypatch, saved_before, step, left
):
    if saved_before:
        vector(0).save_pretrained(tmp_path)
    done = killed_at(step, monkeypatch)
    with contextlib.suppress(Killed):
        vector(1).save_pretrained(tmp_path)
    monkeypatch.undo()
    assert done == ["write_bytes", "replace", "write_bytes", "replace"][:step]
    if left == "new" or (left == "old" and saved_before):
        assert same(su.SteeringVector.from_pretrained(tmp_path), vector(1 if left == "new" else 0))
    else:
        with pytest.raises(ValueError if saved_before else FileNotFoundError):
            su.SteeringVector.from_pretrained(tmp_path)
    vector(1).save_pretrained(tmp_path)
    assert same(su.SteeringVector.from_pretrained(tmp_path), vector(1))


def test_tensors_and_facts_of_any_kind_come_back(tmp_path):
    tensors = {"a": torch.arange(6).reshape(2, 3), "b": torch.zeros(0, 4), "c": torch.tensor(2.5)}
    facts = {"epsilon": 0.001, "hook": None, "list": [1, "two"], "note": "naïve ☕"}
    checkpoint.save(tmp_path, "thing", tensors, model="m", **facts)
    found, about = checkpoint.load(tmp_path, "thing")
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[key], tensors[key]) for key in tensors)
    assert about == {"model": "m", **facts}


def test_two_things_may_lie_in_one_folder(tmp_path):
    checkpoint.save(tmp_path, "one", {"x": torch.ones(2)}, model="m")
    checkpoint.save(tmp_path, "two", {"x": torch.zeros(2)}, model="m")
    assert checkpoint.load(tmp_path, "one")[0]["x"].tolist() == [1, 1]
    assert checkpoint.load(tmp_path, "two")[0]["x"].tolist() == [0, 0]


def test_gradients_and_a_parameter_do_not_come_along(tmp_path):
    checkpoint.save(tmp_path, "thing", {"x": torch.nn.Parameter(torch.ones(2))}, model="m")
    found = checkpoint.load(tmp_path, "thing")[0]["x"]
    assert (found.requires_grad, type(found)) == (False, Tensor)


def test_a_loaded_vector_takes_part_in_arithmetic_with_a_new_one(tokenizer, tmp_path):
    model, ids = tiny("gpt2"), random_ids(1, 9)
    (steer,) = su.steering_vectors(model, tokenizer, [su.ActivationAddition(1.0, 1, "Love")])
    steer.save_pretrained(tmp_path)
    difference = su.SteeringVector.from_pretrained(tmp_path) - steer
    assert torch.equal(difference.rows, torch.zeros(5, 32))
    assert torch.equal(steered(model, difference, ids, torch.ones_like(ids)), logits(model, ids))


# --- one file, written again and again --------------------------------------------------------------------


def test_one_file_holds_tensors_and_facts_of_any_kind(tmp_path):
    tensors = {"a.b": torch.arange(6.0).reshape(2, 3).T, "c": torch.tensor(2.5), "d": torch.zeros(0, 4)}
    tensors |= {"e": torch.randn(3).bfloat16(), "f": torch.nn.Parameter(torch.ones(2))}
    facts = {"step": 3, "losses": [0.1, float("inf")], "note": "naïve ☕", "none": None}
    checkpoint.save_one(tmp_path / "run.safetensors", tensors, facts)
    found, about = checkpoint.load_one(tmp_path / "run.safetensors")
    assert about == facts
    assert found.keys() == tensors.keys()
    for key, tensor in tensors.items():
        assert found[key].dtype == tensor.dtype
        assert torch.equal(found[key], tensor)
        assert not found[key].requires_grad
    assert [path.name for path in tmp_path.iterdir()] == ["run.safetensors"]


def test_what_was_read_from_a_file_stays_when_the_file_is_written_again(tmp_path):
    path = tmp_path / "run.safetensors"
    checkpoint.save_one(path, {"x": torch.ones(1000)}, {"step": 1})
    found, _ = checkpoint.load_one(path)
    checkpoint.save_one(path, {"x": torch.zeros(1000)}, {"step": 2})
    assert found["x"].sum() == 1000
    tensors, facts = checkpoint.load_one(path)
    assert (tensors["x"].sum(), facts) == (0, {"step": 2})


@pytest.mark.parametrize("left", [0, 4, 50, 0.5, -1])
def test_a_file_that_is_cut_short_is_damaged(tmp_path, left):
    path = tmp_path / "run.safetensors"
    checkpoint.save_one(path, {"x": torch.ones(100)}, {"step": 1})
    data = path.read_bytes()
    path.write_bytes(data[: int(left * len(data)) if isinstance(left, float) else left])
    with pytest.raises(ValueError, match=r"run\.safetensors is damaged .*: delete it"):
        checkpoint.load_one(path)


def test_a_file_that_holds_no_facts_or_no_tensors_is_damaged(tmp_path):
    path = tmp_path / "run.safetensors"
    for metadata in (None, {"other": "1"}, {"facts": "{"}):
        path.write_bytes(tensors_to_bytes({"x": torch.ones(2)}, metadata=metadata))
        with pytest.raises(ValueError, match=r"is damaged .*: delete it"):
            checkpoint.load_one(path)
    path.write_text("no tensors at all")
    with pytest.raises(ValueError, match=r"is damaged .*: delete it"):
        checkpoint.load_one(path)
    with pytest.raises(FileNotFoundError):
        checkpoint.load_one(tmp_path / "none.safetensors")


@pytest.mark.parametrize("step", [0, 1, 2])
def test_a_run_killed_while_writing_one_file_leaves_the_old_or_the_new_one(tmp_path, monkeypatch, step):
    path = tmp_path / "run.safetensors"
    checkpoint.save_one(path, {"x": torch.zeros(9)}, {"step": 0})
    done = killed_at(step, monkeypatch)
    with contextlib.suppress(Killed):
        checkpoint.save_one(path, {"x": torch.ones(9)}, {"step": 1})
    monkeypatch.undo()
    assert done == ["write_bytes", "replace"][:step]
    tensors, facts = checkpoint.load_one(path)
    assert (tensors["x"].sum(), facts["step"]) == ((9, 1) if step == 2 else (0, 0))
