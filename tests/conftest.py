"""What several test files share: tiny random models, small tokenizers, batches, and steering by hand."""

import functools
import json
import logging
import resource
import shutil
import string
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
import transformers as hf_transformers
from tokenizers import AddedToken, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

import steer_utils as su
from steer_utils import data, hf, hooks, probing
from steer_utils.checkpoint import write_atomically
from steer_utils.measure.metrics import token_log_probs

GOLDEN_MODELS = Path(__file__).parent / "golden" / "models"
torch.set_num_threads(1)  # tiny matrices gain nothing from threads, and lose where other work runs
WINDOW = 8  # of the architectures with sliding attention: shorter than most test prompts

_ids = {"vocab_size": 97, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
_gpt = {**_ids, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 128, "initializer_range": 0.3}
_llama = {
    **_ids,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.3,
}
_neox = {name: value for name, value in _llama.items() if name != "num_key_value_heads"}
_opt = {
    **_ids,
    "hidden_size": 32,
    "word_embed_proj_dim": 32,
    "ffn_dim": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "init_std": 0.3,
}
_gemma = {**_llama, "head_dim": 8}
_alternating = ["sliding_attention", "full_attention", "sliding_attention"]


def keep_reliability(**counts: dict[str, int]) -> None:
    """Put counts by verdict into figures/reliability.json, beside those of other programs."""
    path = Path(__file__).parents[1] / "figures" / "reliability.json"
    known = json.loads(path.read_text()) if path.exists() else {}
    write_atomically(path, json.dumps(known | counts, indent=1, sort_keys=True) + "\n")


CONFIGS: dict[str, Callable[[], PreTrainedConfig]] = {
    "gpt2": lambda: hf_transformers.GPT2Config(**_gpt),
    "gptj": lambda: hf_transformers.GPTJConfig(**_gpt, rotary_dim=4),
    "gpt_neo": lambda: hf_transformers.GPTNeoConfig(
        **_ids,
        hidden_size=32,
        num_layers=2,
        num_heads=4,
        attention_types=[[["global", "local"], 1]],
        window_size=WINDOW,
        max_position_embeddings=128,
        initializer_range=0.3,
    ),
    "gpt_neox": lambda: hf_transformers.GPTNeoXConfig(**_neox),
    "opt": lambda: hf_transformers.OPTConfig(**_opt),
    "llama": lambda: hf_transformers.LlamaConfig(**_llama),
    "mistral": lambda: hf_transformers.MistralConfig(**_llama, sliding_window=WINDOW),
    "qwen2": lambda: hf_transformers.Qwen2Config(**_llama),
    "qwen3": lambda: hf_transformers.Qwen3Config(**_gemma),
    "gemma": lambda: hf_transformers.GemmaConfig(**_gemma),
    "gemma2": lambda: hf_transformers.Gemma2Config(**_gemma, sliding_window=WINDOW, layer_types=_alternating),
    "gemma3_text": lambda: hf_transformers.Gemma3TextConfig(
        **_gemma, sliding_window=WINDOW, layer_types=_alternating
    ),
    "phi3": lambda: hf_transformers.Phi3Config(**_llama),
    "olmo2": lambda: hf_transformers.Olmo2Config(**_llama),
    "smollm3": lambda: hf_transformers.SmolLM3Config(**_llama),
}
# Architectures whose logits are not just the LM head's output, or whose blocks have other parts.
OTHERS: dict[str, Callable[[], PreTrainedConfig]] = {
    "cohere": lambda: hf_transformers.CohereConfig(**_llama, logit_scale=0.3),
    "granite": lambda: hf_transformers.GraniteConfig(**_llama, logits_scaling=4.0),
    "mpt": lambda: hf_transformers.MptConfig(**_ids, d_model=32, n_heads=4, n_layers=2, max_seq_len=128),
}
MAIN = ("gpt2", "llama", "gemma3_text", "gpt_neox")
KINDS = ("resid_pre", "attn_out", "mlp_out", "resid_post")


def new_model(config: PreTrainedConfig) -> PreTrainedModel:
    """A random model in evaluation mode, the same at every call."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        # Architectures that set the padding row to zero would make BOS, which is id 0 as well, invisible.
        torch.nn.init.normal_(model.get_input_embeddings().weight, std=0.5)
        # Gemma's scaled embeddings would outweigh what its blocks add, and it would repeat its last token.
        for name, weight in model.named_parameters():
            if config.model_type in ("gemma2", "gemma3_text") and "post_" in name:
                torch.nn.init.normal_(weight, mean=2.0, std=0.3)
    return model.eval().requires_grad_(False)


@functools.cache
def tiny(architecture: str) -> PreTrainedModel:
    """The tiny model of an architecture (a key of CONFIGS or OTHERS); shared, so no test may change it."""
    model = new_model({**CONFIGS, **OTHERS}[architecture]())
    for layer in range(len(hf.blocks(model))):
        probing.branches(model, layer)  # which takes a pass at its first call only; tests count passes
    return model


@pytest.fixture(params=MAIN)
def main_model(request: pytest.FixtureRequest) -> PreTrainedModel:
    return tiny(request.param)


@pytest.fixture(params=("gpt2", "gemma3_text"))
def unlike_model(request: pytest.FixtureRequest) -> PreTrainedModel:
    """Two models that differ most: learned positions; rotary ones, grouped keys and a sliding window."""
    return tiny(request.param)


@pytest.fixture(params=CONFIGS)
def any_model(request: pytest.FixtureRequest) -> PreTrainedModel:
    return tiny(request.param)


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerBase:
    """Characters as tokens, GPT-2 style: 0 is BOS and EOS, 1 space, 2..95 ASCII, 96 newline."""
    return AutoTokenizer.from_pretrained(GOLDEN_MODELS / "T1")


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    """Progress bars stay off whether or not the tests run in continuous integration."""
    monkeypatch.setenv("CI", "1")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Notebooks run first: they take minutes, and with several workers what comes last should be short."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


@pytest.fixture
def transformers_warnings() -> Iterator[list[str]]:
    """The messages that transformers logs at level WARNING or above during a test."""
    messages: list[str] = []

    class Collect(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            messages.append(record.getMessage())

    collect, logger = Collect(logging.WARNING), logging.getLogger("transformers")
    hf_transformers.utils.logging.warning_once.cache_clear()  # otherwise only the first test would see them
    logger.addHandler(collect)
    yield messages
    logger.removeHandler(collect)


# --- tokenizers like the well-known ones ------------------------------------------------------------------


def _wrapped(model: Tokenizer, **special: str) -> PreTrainedTokenizerFast:
    model.add_special_tokens([AddedToken(text, special=True) for text in dict.fromkeys(special.values())])
    return PreTrainedTokenizerFast(tokenizer_object=model, **special)


def _byte_level(specials: tuple[str, ...]) -> Tokenizer:
    """One token for each byte, as GPT-2 has before its merges; the special tokens come first."""
    vocabulary = [*specials, *sorted(pre_tokenizers.ByteLevel.alphabet()), "Ġthe"]
    model = Tokenizer(BPE({token: i for i, token in enumerate(vocabulary)}, []))
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    return model


def _sentence_piece(specials: tuple[str, ...], *, prefix: bool) -> Tokenizer:
    """Characters, ▁ for a space, bytes for the rest; with `prefix` a space precedes each text (Llama)."""
    letters = ["▁", *(c for c in string.printable if c != " ")]
    vocabulary = [*specials, *(f"<0x{byte:02X}>" for byte in range(256)), *letters]
    model = Tokenizer(
        BPE({token: i for i, token in enumerate(vocabulary)}, [], byte_fallback=True, fuse_unk=True)
    )
    spaces = normalizers.Replace(" ", "▁")
    model.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), spaces]) if prefix else spaces
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    model.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if prefix else steps)
    return model


def _adds(model: Tokenizer, bos: str, *eos: str) -> Tokenizer:
    """Make the tokenizer add BOS before each text, and EOS after it if one is given."""
    special = [(token, model.token_to_id(token)) for token in (bos, *eos)]
    model.post_processor = processors.TemplateProcessing(
        single=" ".join([bos, "$A", *eos]), special_tokens=special
    )
    return model


def gpt2_like() -> PreTrainedTokenizerFast:
    """BOS and EOS are one token; no padding token; adds no special tokens on its own."""
    return _wrapped(_byte_level(("<|endoftext|>",)), bos_token="<|endoftext|>", eos_token="<|endoftext|>")


def neox_like() -> PreTrainedTokenizerFast:
    """As GPT-2, with Unicode normalisation and a padding token."""
    model = _byte_level(("<|endoftext|>", "<|padding|>"))
    model.normalizer = normalizers.NFC()
    return _wrapped(model, bos_token="<|endoftext|>", eos_token="<|endoftext|>", pad_token="<|padding|>")


def llama_like() -> PreTrainedTokenizerFast:
    """Adds <s> and a space before each text; no padding token."""
    model = _adds(_sentence_piece(("<unk>", "<s>", "</s>"), prefix=True), "<s>")
    return _wrapped(model, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def closing_like() -> PreTrainedTokenizerFast:
    """Adds <s> before each text and </s> after it, as tokenizers for training or embeddings do."""
    model = _adds(_sentence_piece(("<unk>", "<s>", "</s>"), prefix=False), "<s>", "</s>")
    return _wrapped(model, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def gemma_like() -> PreTrainedTokenizerFast:
    """Adds <bos> before each text; BOS, EOS and padding are three tokens."""
    model = _adds(_sentence_piece(("<pad>", "<eos>", "<bos>", "<unk>"), prefix=False), "<bos>")
    return _wrapped(model, pad_token="<pad>", eos_token="<eos>", bos_token="<bos>", unk_token="<unk>")


def qwen_like() -> PreTrainedTokenizerFast:
    """No BOS token; the padding token differs from EOS."""
    return _wrapped(
        _byte_level(("<|endoftext|>", "<|im_end|>")), eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )


TOKENIZERS = {
    "gpt2": gpt2_like,
    "neox": neox_like,
    "llama": llama_like,
    "closing": closing_like,
    "gemma": gemma_like,
    "qwen": qwen_like,
}


@functools.cache
def small_tokenizer(kind: str) -> PreTrainedTokenizerFast:
    return TOKENIZERS[kind]()


@pytest.fixture(params=TOKENIZERS)
def any_tokenizer(request: pytest.FixtureRequest) -> PreTrainedTokenizerFast:
    return small_tokenizer(request.param)


# --- what several test files measure ----------------------------------------------------------------------


def places(mask: Tensor) -> Tensor:
    """Absolute position of each token, −1 for padding, counted in a loop; mask [B, T]."""
    rows = []
    for row in mask.tolist():
        count, found = 0, []
        for keep in row:
            found.append(count if keep else -1)
            count += keep
        rows.append(found)
    return torch.tensor(rows)


@torch.no_grad()
def logits(model: PreTrainedModel, ids: Tensor, mask: Tensor | None = None, **kwargs) -> Tensor:
    """Logits [B, T, V], with position ids counted from the mask, as inside `model.generate`."""
    mask = torch.ones_like(ids) if mask is None else mask
    return model(ids, attention_mask=mask, position_ids=places(mask).clamp(min=0), **kwargs).logits


def hook_count(model: PreTrainedModel) -> int:
    """The number of hooks of every kind on all modules, but for those that transformers leaves there."""
    return sum(
        not getattr(hook, "__module__", "").startswith("transformers")
        for module in model.modules()
        for name, hooks in vars(module).items()
        if name.endswith("_hooks") and isinstance(hooks, dict)
        for hook in hooks.values()
    )


def random_ids(*shape: int, seed: int = 0) -> Tensor:
    """Random token ids, with BOS in the first column and nowhere else."""
    ids = torch.randint(1, 97, shape, generator=torch.Generator().manual_seed(seed))
    ids[:, 0] = 0
    return ids


def padded(lengths: list[int], side: str, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A padded batch of random token ids of these lengths: ids and mask, [B, T]."""
    rows = [random_ids(1, length, seed=seed + i)[0] for i, length in enumerate(lengths)]
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_side=side)
    ones = [torch.ones_like(row) for row in rows]
    return ids, torch.nn.utils.rnn.pad_sequence(ones, batch_first=True, padding_side=side)


@contextmanager
def disk_of(size: int) -> Iterator[None]:
    """While inside, no file can grow beyond so many bytes; the system's error is like that of a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


# --- public data ------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def package_index(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Skips a test where pip reaches no package index; a wheel needs nothing else to be downloaded."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--retries", "1"]
    command += ["--dest", str(tmp_path_factory.mktemp("wheel")), "--only-binary", ":all:"]
    wheel = f"{data.RATED_PACKAGE}=={data.RATED_VERSION}"
    if subprocess.run([*command, wheel], capture_output=True).returncode:
        pytest.skip("pip cannot reach a package index")


@pytest.fixture(scope="session")
def rated(package_index: None, tmp_path_factory: pytest.TempPathFactory) -> dict[str, pd.DataFrame]:
    """The rated sentences of every kind, fetched into a cache of their own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STEER_UTILS_CACHE", str(tmp_path_factory.mktemp("rated")))
        return {kind: data.rated_sentences(kind) for kind in data.RATED}


# --- steering by hand, with nothing of this package -------------------------------------------------------

# Where blocks, attention and MLP are; Gemma 3 normalises both before it adds them to the residual stream.
PARTS = {
    "gpt2": ("transformer.h", "attn", "mlp"),
    "llama": ("model.layers", "self_attn", "mlp"),
    "gemma3_text": ("model.layers", "post_attention_layernorm", "post_feedforward_layernorm"),
    "gpt_neox": ("gpt_neox.layers", "attention", "mlp"),
}


def hooked_by_hand(model: PreTrainedModel, name: str, change: Callable[[Tensor], Tensor]) -> RemovableHandle:
    """A hook that replaces an activation of one of the MAIN models by `change(activation)`."""
    _, layer, kind = name.replace("hook_", "").split(".")
    blocks, attention, mlp = PARTS[model.config.model_type]
    block = model.get_submodule(blocks)[int(layer)]
    if kind == "resid_pre":
        return block.register_forward_pre_hook(lambda module, args: (change(args[0]), *args[1:]))

    def after(module: nn.Module, args: tuple, output: Tensor | tuple) -> Tensor | tuple:
        return (change(output[0]), *output[1:]) if isinstance(output, tuple) else change(output)

    part = {"attn_out": attention, "mlp_out": mlp, "resid_post": ""}[kind]
    return block.get_submodule(part).register_forward_hook(after)


def added_by_hand(model: PreTrainedModel, name: str, what: Tensor) -> RemovableHandle:
    """A hook that adds `what` [T, D] to an activation [B, T, D]."""
    return hooked_by_hand(model, name, lambda value: value + what)


def kept_by_hand(model: PreTrainedModel, name: str, seen: list[Tensor]) -> RemovableHandle:
    """A hook that appends an activation [B, T, D], as earlier hooks left it, to the list `seen`."""
    return hooked_by_hand(model, name, lambda value: seen.append(value) or value)


def addend(
    rows: Tensor, prompt: int, total: int, addition_location: str = "front", positions: str = "own"
) -> Tensor:
    """What rows [S, D] add to a text of `total` tokens whose first `prompt` are the prompt, [total, D]."""
    size, what = len(rows), torch.zeros(total, rows.shape[1])
    start = {"front": 0, "back": prompt - size, "mid": prompt // 2 - size // 2}[addition_location]
    for s in range(size):
        what[start + s] = rows[s]
    if positions == "all":
        for t in range(start + size, total):
            what[t] = rows[-1]
    return what


HEAD_KINDS = ("multiply", "add", "offset")


def head_steer(
    kind: str = "multiply", num_steers: int = 2, *, rank: int = 4, width: int = 32, seed: int = 0, **facts
) -> Any:
    """A random steer at the LM head of a tiny model, without steer values."""
    generator, facts = torch.Generator().manual_seed(seed), {"epsilon": 0.1} | facts

    def some(*shape: int) -> Tensor:
        return torch.randn(num_steers, *shape, generator=generator)

    if kind == "multiply":
        return su.LMSteer(some(width, rank), some(width, rank), **facts)
    return su.AddSteer(some(width), **facts) if kind == "add" else su.OffsetSteer(some(97), **facts)


def head_input(model: PreTrainedModel, ids: Tensor, mask: Tensor | None = None) -> Tensor:
    """The last hidden states [B, T, D], which the LM head is given."""
    seen = []
    with model.get_output_embeddings().register_forward_pre_hook(lambda module, args: seen.append(args[0])):
        logits(model, ids, mask)
    return seen[0]


def head_by_hand(
    model: PreTrainedModel, steer: Any, values: list[list[float]], ids: Tensor, mask: Tensor | None = None
) -> Tensor:
    """Steered logits [B, T, V] by the formulas, in a loop over batch rows and steers; values [B, S]."""
    head, found = model.get_output_embeddings(), []
    for hidden, of_text in zip(head_input(model, ids, mask), values, strict=True):
        what, shift = torch.eye(hidden.shape[-1]), torch.zeros(hidden.shape[-1])
        offset = torch.zeros(len(head.weight))
        for s, value in enumerate(of_text):
            if isinstance(steer, su.LMSteer):
                what = what + steer.epsilon * value * steer.projector1[s] @ steer.projector2[s].T
            elif isinstance(steer, su.AddSteer):
                shift = shift + steer.epsilon * value * steer.add_vec[s]
            else:
                offset = offset + steer.epsilon * value * steer.offset_vec[s]
        scores = (hidden @ what + shift) @ head.weight.T + offset + (0 if head.bias is None else head.bias)
        cap = getattr(model.config, "final_logit_softcapping", None)
        found.append(scores if cap is None else cap * (scores / cap).tanh())
    return torch.stack(found)


def assert_same_up_to_rounding(found: pd.DataFrame, expected: pd.DataFrame) -> None:
    """Two tables of completions have the same texts, and losses equal up to rounding."""
    pd.testing.assert_frame_equal(found, expected, rtol=0, atol=1e-4)


def log_prob_gains(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, texts: list, steer: Any, skip: int = 0
) -> list[Tensor]:
    """By how many nats a steer raises the log probability of each token, [T − 1 − skip] for each text.

    skip: how many of the first tokens to leave out. exp(−mean) is the perplexity ratio of Turner et al. 2023.
    """
    with hooks.unsteered():
        before = token_log_probs(model, tokenizer, texts)
    with steer.on(model, tokenizer):
        after = token_log_probs(model, tokenizer, texts)
    return [(one - other)[skip:] for one, other in zip(after, before, strict=True)]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Debian's Chromium, driven by playwright, which is imported only where a test needs it."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        how = {"executable_path": shutil.which("chromium"), "args": ["--no-sandbox"]}
        browser = playwright.chromium.launch(**how)
        yield browser
        browser.close()
