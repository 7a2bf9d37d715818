"""Load a model and its tokenizer, and turn text into token ids."""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import model_info, try_to_load_from_cache
from safetensors import SafetensorError
from torch.nn.utils.rnn import pad_sequence
from transformers import BatchEncoding, PreTrainedModel, PreTrainedTokenizerBase

from . import hf
from .embedded import DEFAULT, EMBEDDED, at_home, no_bars, unpacked
from .types import Messages, Prompts, Texts, require

Tokenizer = PreTrainedTokenizerBase | None  # None: a bridge brings its own, or none is needed
Model = torch.nn.Module  # transformers' own, or what wraps one: PEFT, TransformerLens, torch.compile
Device = str | torch.device
SHARED = ("revision", "token", "cache_dir", "local_files_only")  # by the tokenizer, too


def load(
    name: str | Path = DEFAULT,
    *,
    device: Device | None = None,
    dtype: str | torch.dtype | None = None,
    **kwargs: Any,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a decoder-only model and its tokenizer, in evaluation mode, with frozen parameters.

    name: an embedded model ("smollm2-135m", "gemma3-270m"), a local folder, or a Hub id such as "gpt2-xl".
    device: by default the accelerator that torch finds, else the CPU. dtype: by default bfloat16 on a GPU
    that computes in it, else float32; float16 overflows in some models (Gemma 3). kwargs: for transformers'
    `from_pretrained`, such as device_map="auto", quantization_config, or trust_remote_code=True to run Python
    code that comes with a model.
    Raises ModuleNotFoundError without an embedded model's package, FileNotFoundError for a folder without a
    whole model, ValueError for a model that is no decoder-only language model (T5, BERT) or needs code of its
    own, and for a name that is both an embedded model and a folder, OSError for a name that neither the disk
    nor the Hub knows.
    """
    device = torch.device(device or torch.accelerator.current_accelerator(check_available=True) or "cpu")
    found = getattr(torch, str(dtype).removeprefix("torch."), None)
    known = dtype in (None, "auto") or isinstance(found, torch.dtype)
    require(known, "one of torch's, such as 'bfloat16'", dtype=dtype)
    source = _source(name)
    if "quantization_config" in kwargs:  # such weights cannot be moved
        kwargs.setdefault("device_map", {"": device})
    if dtype is None:
        native = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        dtype = torch.bfloat16 if native else torch.float32
    try:
        with no_bars() if isinstance(source, Path) else nullcontext():  # a download shows its bars
            where = {name: kwargs[name] for name in SHARED if name in kwargs}
            kwargs = {"trust_remote_code": False} | kwargs  # else transformers asks at the keyboard
            trust = kwargs["trust_remote_code"]
            if "local_files_only" not in where:
                where["local_files_only"] = isinstance(source, Path) or is_only_cached(source, **where)
            config = transformers.AutoConfig.from_pretrained(source, trust_remote_code=trust, **where)
            if config.is_encoder_decoder:
                raise ValueError(f"{str(name)!r} is no decoder-only model: it has an encoder")
            tokenizer = transformers.AutoTokenizer.from_pretrained(source, trust_remote_code=trust, **where)
            # transformers looks for adapters of PEFT by a call of its own.
            how = {"dtype": dtype, "output_loading_info": True, "adapter_kwargs": where} | where | kwargs
            own = "AutoModelForCausalLM" in getattr(config, "auto_map", {})  # code of its own
            of_text = own or type(config) in transformers.MODEL_FOR_CAUSAL_LM_MAPPING  # or of pictures, too
            kind = transformers.AutoModelForCausalLM if of_text else transformers.AutoModelForImageTextToText
            model, report = kind.from_pretrained(source, **how)
    except (OSError, SafetensorError) as error:
        if isinstance(source, Path):
            raise FileNotFoundError(f"{str(name)!r} holds no complete model: {error}") from error
        what = f"no embedded model ({', '.join(EMBEDDED)}), no local folder, and the Hub gave no such model"
        advice = (
            "Check spelling and network, and HF_HOME, where it is kept; gated models need `hf auth login`."
        )
        raise OSError(f"cannot load {str(name)!r}: {what}. {advice}\n{error}") from error
    missing = sorted(report["missing_keys"])[:3]
    why = f"saved as {config.architectures}, without {missing}" if missing else hf.not_decoder_only(model)
    if why:
        raise ValueError(f"{str(name)!r} is no decoder-only model: {why}")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    model = model if "device_map" in kwargs else model.to(device)
    return model.eval().requires_grad_(False), tokenizer


def _source(name: str | Path) -> str | Path:
    """What `from_pretrained` is given: an embedded model's folder, a local folder, or a Hub id."""
    folder = at_home(name)
    if name in EMBEDDED and folder.exists():
        what = f"{name!r} is an embedded model and also a path here: write './{name}' for the path"
        raise ValueError(f"{what}, or load the embedded model from another folder")
    if name in EMBEDDED:
        return unpacked(name)
    is_local = isinstance(name, Path) or name.startswith((".", "/", "~")) or folder.exists()
    if is_local and not (folder / "config.json").is_file():
        advice = "Save one there with model.save_pretrained and tokenizer.save_pretrained, or load"
        raise FileNotFoundError(f"{str(name)!r} holds no config.json. {advice} {' or '.join(EMBEDDED)}.")
    return folder if is_local else name


def is_only_cached(
    name: str, *, token: Any = None, revision: str | None = None, cache_dir: Any = None, **_: Any
) -> bool:
    """Whether the Hub does not answer for that id, and an earlier download of it is in the cache.

    It asks once; transformers would ask for each file five times, a minute in all. OSError if neither has it.
    """
    try:
        model_info(name, timeout=10, token=token, revision=revision)
    except Exception as error:  # the Hub's own errors and those of its HTTP library have no class in common
        if isinstance(try_to_load_from_cache(name, "config.json", cache_dir, revision), str):
            return True
        raise OSError(f"neither the Hub nor its cache here has {name!r}: {error}") from error
    return False


def own_tokenizer(model: torch.nn.Module | None, tokenizer: Tokenizer) -> Tokenizer:
    """The given tokenizer, or the one that a TransformerLens `TransformerBridge` has."""
    return getattr(model, "tokenizer", None) if tokenizer is None else tokenizer


def model_id(model: Model) -> str:
    """The model's id on the Hub, or the name of its folder without the path to it.

    The folder of an embedded model is named after the model and its checksum, the same on every machine.
    """
    model = hf.inner(model)
    name = model.name_or_path or model.config.name_or_path
    return Path(name).name if Path(name).is_absolute() or Path(name).exists() else name


def bos_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id that begins every text: BOS, or EOS for tokenizers without one (Qwen)."""
    for token_id in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if token_id is not None:
            return token_id
    raise ValueError(f"{tokenizer.name_or_path!r} has neither BOS nor EOS: set tokenizer.bos_token")


def token_ids(tokenizer: PreTrainedTokenizerBase, text: str, *, as_data: bool = False) -> list[int]:
    """The token ids of a text with exactly one BOS in front, whatever the tokenizer adds on its own.

    Control tokens that are spelled out in it, such as "<|im_end|>", are read as these, as transformers does;
    as_data: as the letters that they are made of.
    """
    bos = bos_id(tokenizer)
    how = {"split_special_tokens": True} if as_data else {}
    ids = tokenizer(text, add_special_tokens=False, **how)["input_ids"]
    if tokenizer.bos_token_id is None and ids and ids[0] in {*tokenizer.all_special_ids} - {bos}:
        return ids  # a chat template of a model that was trained without BOS
    first = next((i for i, token in enumerate(ids) if token != bos), len(ids))
    return [bos, *ids[first:]]


def prompt_texts(tokenizer: Tokenizer, prompts: Prompts, *, special_tokens: bool = True) -> list[str]:
    """Prompts as a list of texts, messages by the chat template, which needs special tokens."""
    prompts = [prompts] if isinstance(prompts, str) else list(prompts)
    if prompts and isinstance(prompts[0], Mapping):
        prompts = [prompts]
    if not special_tokens and not all(isinstance(one, str) for one in prompts):
        raise ValueError("special_tokens=False would spell out those of the chat template: give texts")
    return [one if isinstance(one, str) else _in_chat(tokenizer, one) for one in prompts]


def _in_chat(tokenizer: PreTrainedTokenizerBase, messages: Messages) -> str:
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


def require_readable(model: Model, rows: Sequence[Sequence[int]], new_tokens: int = 0) -> None:
    """ValueError for ids that the model lacks, and a text that is too long with its new tokens."""
    limit, size = hf.longest_text(model), hf.vocabulary(model)
    for i, row in enumerate(rows):
        if (wanted := len(row) + max(0, new_tokens - 1)) > limit:  # the last new one is not read
            after = f" and {new_tokens} new ones" if new_tokens else ""
            more = f"{wanted - limit} more than the model's {limit} positions"
            raise ValueError(f"the text of index {i} has {len(row)} tokens{after}, {more}: shorten it")
        if beyond := [token for token in row if not 0 <= token < size]:
            raise ValueError(f"the text of index {i} has the token id {beyond[0]}, but ids end at {size - 1}")


def text_ids(tokenizer: Tokenizer, texts: Texts, **how: bool) -> list[list[int]]:
    """Token ids of each text, as `token_ids` gives them; ValueError for a text without tokens."""
    rows = [token_ids(tokenizer, text, **how) if isinstance(text, str) else [*text] for text in texts]
    if [] in rows:
        raise ValueError(f"the text of index {rows.index([])} has no tokens: its ids must begin with BOS")
    return rows


def encode(
    tokenizer: Tokenizer,
    texts: str | Sequence[str],
    *,
    padding_side: str = "left",
    device: Device = "cpu",
    special_tokens: bool = True,
) -> BatchEncoding:
    """Encode texts as one padded batch: `input_ids` and `attention_mask`, each [B, T], each with one BOS.

    special_tokens: False reads those that are spelled out in a text, such as `</s>`, as letters.
    """
    texts = [texts] if isinstance(texts, str) else texts
    rows = [token_ids(tokenizer, text, as_data=not special_tokens) for text in texts]
    if not rows:
        raise ValueError("no texts to encode: give at least one")
    return pad(rows, padding_side, device)


def batch_of(model: Model, rows: Sequence[Sequence[int]], padding_side: str) -> BatchEncoding:
    """Token ids of texts as one batch where the model takes its input."""
    return pad(rows, padding_side, hf.input_device(model))


def pad(rows: Sequence[Sequence[int]], padding_side: str, device: Device = "cpu") -> BatchEncoding:
    """Token ids of texts as one batch with an attention mask, each padded with its own first id.

    That is BOS, which a text has anyway: a repetition penalty does not look at the mask.
    """
    require(padding_side in ("left", "right"), "left or right", padding_side=padding_side)
    whole = pad_sequence([torch.tensor(row, dtype=torch.long) for row in rows], True, -1, padding_side)
    mask, firsts = whole >= 0, torch.tensor([[*row[:1], 0][:1] for row in rows])
    return BatchEncoding({"input_ids": whole.where(mask, firsts), "attention_mask": mask.long()}).to(device)
