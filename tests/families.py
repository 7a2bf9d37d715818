"""Tiny random models of many architectures, and what each mechanism can do with them.

python tests/families.py writes figures/models.json, from which notebooks/results.py makes docs/models.md.
"""

import functools
import json
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
import transformers as hf_transformers
from conftest import CONFIGS, GOLDEN_MODELS, OTHERS, _gemma, _gpt, _ids, _llama, _neox, head_steer, new_model
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig, PreTrainedModel

import steer_utils as su
from steer_utils import hf
from steer_utils.generation import Steers
from steer_utils.lm_steer.training import mean_loss, token_states
from steer_utils.measure.metrics import next_token_logits

FILE = Path(__file__).parents[1] / "figures" / "models.json"
TOKENIZER = AutoTokenizer.from_pretrained(GOLDEN_MODELS / "T1")
PROMPTS = ["Hello there friend", "A", "The moon is made of cheese and so on"]
SHORT = "Hello"  # so that what is added is in reach of its last token, whatever the attention
LONG = [PROMPTS[0], PROMPTS[2]]  # than the texts of the addition
BAG = su.Bag("bag", entries=((40,), (41,), (50,)))
PAIR = su.get_x_vector("love", "hate", coeff=3.0, act_name=1)

_moe = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
_mixed = ["linear_attention", "full_attention", "linear_attention"]
_linear = {f"linear_{name}": size for name, size in zip(
    ("num_key_heads", "num_value_heads", "key_head_dim", "value_head_dim"), (2, 4, 8, 8), strict=True
)}  # fmt: skip
_state = {"mamba_n_groups": 1, "mamba_d_state": 8, "mamba_chunk_size": 8, "mamba_d_head": 8}
_latent = {"q_lora_rank": 16, "kv_lora_rank": 16, "v_head_dim": 8, "num_key_value_heads": 4}
_latent |= {"qk_rope_head_dim": 4, "qk_nope_head_dim": 4}
_experts = {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1}
_experts |= {"moe_intermediate_size": 32, "first_k_dense_replace": 1, "n_shared_experts": 1}
_shared = {"num_hidden_layers": 4, "sliding_window": 8, "num_kv_shared_layers": 2}
_shared |= {"layer_types": ["sliding_attention", "full_attention"] * 2}
_picture = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
_ends = {f"{one}_token_id": 0 for one in ("bos", "eos", "pad")}
_tokens = {"image_token_index": 96, "boi_token_index": 95, "eoi_token_index": 94}

FAMILIES: dict[str, Callable[[], PreTrainedConfig]] = CONFIGS | OTHERS
for _name, _kind, _sizes in [
    ("bloom", "Bloom", {**_ids, "hidden_size": 32, "n_layer": 3, "n_head": 4, "initializer_range": 0.3}),
    ("gpt_bigcode", "GPTBigCode", _gpt),
    ("phi", "Phi", _neox),
    ("falcon", "Falcon", {**_neox, "new_decoder_architecture": True, "num_kv_heads": 2}),
    ("mixtral", "Mixtral", {**_llama, "num_local_experts": 4, "num_experts_per_tok": 2}),
    ("qwen3_moe", "Qwen3Moe", _gemma | _moe),
    ("deepseek_v3", "DeepseekV3", _llama | _latent | _experts),
    ("minicpm3", "MiniCPM3", _llama | _latent | {"dim_model_base": 8}),
    ("lfm2", "Lfm2", _llama | {"conv_L_cache": 3, "block_auto_adjust_ff_dim": False,
                               "layer_types": ["conv", "full_attention", "conv"]}),
    ("qwen3_next", "Qwen3Next", _gemma | _moe | _linear | {"layer_types": _mixed}),
    ("falcon_h1", "FalconH1", _gemma | _state | {"mamba_d_ssm": 32, "mamba_n_heads": 4,
                                                 "embedding_multiplier": 1.7, "lm_head_multiplier": 0.5}),
    ("granitemoehybrid", "GraniteMoeHybrid", _llama | _state | {
        "mamba_n_heads": 8, "layer_types": ["mamba", "attention", "mamba"], "num_local_experts": 4,
        "num_experts_per_tok": 2, "shared_intermediate_size": 32, "residual_multiplier": 0.5}),
    ("jamba", "Jamba", _llama | {"num_hidden_layers": 4, "num_experts": 4, "attn_layer_period": 2,
                                 "attn_layer_offset": 1, "mamba_d_state": 8, "use_mamba_kernels": False}),
    ("mamba", "Mamba", {**_ids, "hidden_size": 32, "state_size": 8, "num_hidden_layers": 3}),
    ("recurrent_gemma", "RecurrentGemma", _llama | {
        "lru_width": 32, "attention_window_size": 8, "block_types": ["recurrent", "recurrent", "attention"]}),
    ("rwkv", "Rwkv", {**_ids, "hidden_size": 32, "num_hidden_layers": 3, "attention_hidden_size": 32}),
    ("minimax", "MiniMax", _gemma | {"num_local_experts": 4, "layer_types": _mixed, "block_size": 8}),
    ("gemma3n_text", "Gemma3nText", _gemma | _shared | {
        "intermediate_size": [64] * 4, "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 97,
        "laurel_rank": 4, "altup_num_inputs": 2, "activation_sparsity_pattern": [0.0] * 4}),
    ("gemma4_text", "Gemma4Text", _gemma | _shared | {
        "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 97, "global_head_dim": 8}),
    ("llama4_text", "Llama4Text", _gemma | {
        "intermediate_size_mlp": 64, "num_local_experts": 4, "num_experts_per_tok": 1,
        "attention_chunk_size": 8, "interleave_moe_layer_step": 2}),
    ("gemma3", "Gemma3", {"text_config": _gemma, "vision_config": _picture | {
        "image_size": 28, "patch_size": 14}, **_tokens, **_ends}),
]:  # fmt: skip
    FAMILIES[_name] = functools.partial(getattr(hf_transformers, f"{_kind}Config"), **_sizes)


@functools.cache
def family(name: str) -> PreTrainedModel:
    """A tiny random model that does not end a text by itself."""
    model = new_model(FAMILIES[name]())
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
    for weight in model.parameters():
        if not weight.isfinite().all():  # some classes leave weights as they find them in memory
            nn.init.normal_(weight, std=0.3)
    return model


def support(name: str) -> dict[str, str]:
    """What works: "yes", or the error that says what does not. AssertionError for a wrong result."""
    model = family(name)
    steps = {"stepsize": 0.05, "num_iterations": 2, "gamma": 1.0, "top_k": 0}
    pplm = {kind: su.PPLM(bags=[BAG], perturb=kind, **steps) for kind in ("past", "hidden", "probs")}
    checks: dict[str, Callable[[], None]] = {
        "text": lambda: same_text(model, None, PROMPTS),
        "additions": lambda: check_addition(model),
        "attn_out, mlp_out": lambda: same_text(model, moved(PAIR, "attn_out"), LONG),
        **{f"PPLM {kind}": functools.partial(check_pplm, model, steer) for kind, steer in pplm.items()},
        "LM-Steer": lambda: check_lm_steer(model),
    }
    return {what: outcome(check) for what, check in checks.items()}


def outcome(check: Callable[[], None]) -> str:
    try:
        check()
    except ValueError as error:
        return str(error)
    return "yes"


def moved(additions: Iterable[su.ActivationAddition], kind: str) -> list[su.ActivationAddition]:
    names = {"act_name": f"blocks.1.hook_{kind}"}
    return [su.ActivationAddition(one.coeff, prompt=one.prompt, **names) for one in additions]


def written(model: PreTrainedModel, prompts: str | list[str], steer: Steers, **settings: Any) -> list[str]:
    settings = {"do_sample": False, "max_new_tokens": 8, "seed": 0} | settings
    return su.generate(model, TOKENIZER, prompts, steer=steer, **settings)["completion"].tolist()


def transformers_alone(model: PreTrainedModel, prompt: str) -> str:
    batch = su.encode(TOKENIZER, prompt)
    ids = model.generate(**batch, max_new_tokens=8, do_sample=False)
    start = TOKENIZER.decode(batch["input_ids"][0], skip_special_tokens=True)
    return TOKENIZER.decode(ids[0], skip_special_tokens=True)[len(start) :]


def same_text(model: PreTrainedModel, steer: Steers, prompts: list[str]) -> None:
    """A batch, with and without cache, is its prompts one by one; unsteered, what transformers writes."""
    alone = [written(model, prompt, steer)[0] for prompt in prompts]
    assert written(model, prompts, steer) == alone
    assert written(model, prompts, steer, use_cache=False) == alone
    if steer is None:
        assert [transformers_alone(model, prompt) for prompt in prompts] == alone
        state = torch.get_rng_state()
        sampled = [written(model, prompts, None, do_sample=True, num_samples=n, seed=1) for n in (2, 2, 1)]
        assert sampled[0] == sampled[1]
        assert sampled[0][::2] == sampled[2]  # a sample does not depend on how many there are
        assert torch.equal(torch.get_rng_state(), state)


def logits_under(model: PreTrainedModel, steer: Steers, prompts: list[str]) -> Tensor:
    with su.generation.all_on(steer, model, TOKENIZER):
        return next_token_logits(model, TOKENIZER, prompts).log_softmax(dim=-1)


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-3)


def check_addition(model: PreTrainedModel) -> None:
    """Rows that hooks of this test add to what enters block 1 give the same logits."""
    block, seen = hf.blocks(model)[1], []

    def change(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        hidden = args[0] if args else kwargs["hidden_states"]
        seen.append(hidden)
        if len(seen) == 3:  # after both texts of the addition
            rows, other = 3 * seen[0][0], 3 * seen[1][0]
            hidden = hidden.clone()
            hidden[:, : len(rows)] += rows - other
        return ((hidden, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": hidden})

    steered = logits_under(model, PAIR, [SHORT])
    texts = [su.encode(TOKENIZER, text)["input_ids"] for text in ("love", "hate", SHORT)]
    with torch.no_grad(), block.register_forward_pre_hook(change, with_kwargs=True):
        by_hand = [model(ids, use_cache=False).logits[:, -1].log_softmax(dim=-1) for ids in texts][-1]
    close(steered, by_hand)
    assert (steered - logits_under(model, None, [SHORT])).abs().max() > 0.01
    same_text(model, PAIR, LONG)


def check_pplm(model: PreTrainedModel, steer: su.PPLM) -> None:
    """Without steps the distribution is the model's; with them the bag is likelier, in any batch."""
    whole = [logits_under(model, one, LONG[:1]) for one in (None, 0 * steer, steer)]
    close(whole[1], whole[0])
    before, after = (one[:, [40, 41, 50]].logsumexp(dim=-1) for one in whole[1:])
    assert (after > before).all()
    alone = [written(model, prompt, steer, max_new_tokens=4)[0] for prompt in PROMPTS]
    assert written(model, PROMPTS, steer, max_new_tokens=4) == alone


def check_lm_steer(model: PreTrainedModel) -> None:
    """At 0 the model's own logits and loss; folded, saved and loaded the steered ones."""
    steer = head_steer(width=hf.last_width(model), num_steers=1, epsilon=0.05)
    ids = su.encode(TOKENIZER, PROMPTS[0])["input_ids"]
    with torch.no_grad():
        own = model(ids, labels=ids)
    close(logits_under(model, steer.at(0.0), PROMPTS[:1]), own.logits[:, -1].log_softmax(dim=-1))
    hidden, next_ids, _ = token_states(model, ids.tolist())
    values = torch.zeros(len(next_ids), 1)
    assert abs(mean_loss(model, steer, hidden, next_ids, values, learn=False) - own.loss.item()) < 1e-3
    steered = logits_under(model, steer.at(3.0), PROMPTS[:1])
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        steer.fold(model, 3.0).save_pretrained(folder)
        loaded = type(model).from_pretrained(folder, dtype=torch.float32).eval()
        close(loaded(ids).logits[:, -1].log_softmax(dim=-1), steered)
    same_text(model, steer.at(3.0), PROMPTS)


def types() -> dict[str, str]:
    """Each causal model type of transformers: "found", "refused" and why, or "not built" and why."""
    return {
        name: found(name)
        for name in sorted(hf_transformers.models.auto.modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    }


def found(name: str) -> str:
    try:
        config = AutoConfig.for_model(name)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config).eval()
    except Exception as error:  # a config without sizes, a package that is missing
        return f"not built: {type(error).__name__}"
    try:
        model = hf.unwrapped(model)
        hf.block(model, len(hf.blocks(model)) - 1)
    except ValueError as error:
        return f"refused: {error}"
    return "found"


if __name__ == "__main__":
    known = {"types": types(), "families": {name: support(name) for name in FAMILIES}}
    known |= {"transformers": hf_transformers.__version__}
    FILE.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")
