"""Any decoder-only model: what figures/models.json (so docs/models.md) says of each architecture is so."""

import copy
import json
import threading
from pathlib import Path

import accelerate
import peft
import pytest
import torch
import transformers
from conftest import head_steer, logits, new_model, random_ids, tiny
from families import (
    BAG,
    FAMILIES,
    FILE,
    LONG,
    PAIR,
    PROMPTS,
    TOKENIZER,
    family,
    logits_under,
    support,
    types,
    written,
)
from transformers import AutoTokenizer

import steer_utils as su
from steer_utils import embedded, generation, hf, hooks, probing
from steer_utils.pplm import bags
from steer_utils.pplm.steps import soft_token

KNOWN = json.loads(FILE.read_text(encoding="utf-8"))
HIDDEN = su.PPLM(bags=[BAG], perturb="hidden", stepsize=1.0, gamma=1.0)


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_each_mechanism_is_right_or_says_why_it_cannot_work(name):
    assert support(name) == KNOWN["families"][name]


@pytest.mark.slow
def test_most_causal_types_of_transformers_are_found_and_the_others_refused_with_a_reason():
    found = types()
    if transformers.__version__ == KNOWN["transformers"]:
        assert found == KNOWN["types"]
    assert list(found.values()).count("found") >= 140


# --- logits and embeddings are the model's own ------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["granite", "minicpm3", "falcon_h1", "recurrent_gemma", "gemma3", "llama4_text"]
)
def test_logits_of_hidden_states_of_any_shape_are_the_models(name):
    model, ids = family(name), random_ids(2, 9)
    with torch.no_grad():
        hidden, expected = hf.forward(model, ids, torch.ones_like(ids)).last_hidden_state, model(ids).logits
        for some, wanted in ((hidden, expected), (hidden[0], expected[0]), (hidden[0, 0], expected[0, 0])):
            torch.testing.assert_close(hf.logits(model, some), wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["gpt2", "gemma3_text", "falcon_h1", "granite", "mamba"])
def test_a_soft_token_that_is_sure_is_that_token(name):
    model, ids = family(name), random_ids(5, 1)
    sure = torch.nn.functional.one_hot(ids[:, 0], 97).float()
    with torch.no_grad():
        token = hf.forward(model, ids, torch.ones_like(ids)).last_hidden_state
        with soft_token(model, sure):
            found = hf.forward(model, torch.full_like(ids, 7), torch.ones_like(ids)).last_hidden_state
    torch.testing.assert_close(found, token, atol=1e-4, rtol=1e-4)


def test_soft_tokens_of_a_model_that_looks_tokens_up_again_are_a_value_error():
    model = family("gemma4_text")
    with (
        pytest.raises(ValueError, match=r"'gemma4_text'.*horizon_length=0"),
        soft_token(model, torch.eye(97)),
    ):
        pass


def test_branches_are_hooked_where_the_block_adds_them_and_refused_where_it_scales_them():
    scaled = transformers.GraniteConfig(**tiny("granite").config.to_dict() | {"residual_multiplier": 0.5})
    assert probing.branches(tiny("granite"), 1)
    assert probing.branches(new_model(scaled), 1) is None


# --- wrapped, compiled, copied, shared --------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of transformers, about what peft asks it
def test_an_adapter_of_peft_stays_on_and_a_prompt_of_peft_is_refused():
    how = {"task_type": "CAUSAL_LM"}
    lora = peft.LoraConfig(target_modules=["q_proj", "v_proj"], r=2, init_lora_weights=False, **how)
    model = peft.get_peft_model(copy.deepcopy(tiny("llama")), lora).eval()
    merged = copy.deepcopy(model).merge_and_unload()
    for steer in (None, PAIR, head_steer(num_steers=1).at(2.0), HIDDEN):
        assert written(model, PROMPTS[2], steer) == written(merged, PROMPTS[2], steer)
    prompt = peft.PromptTuningConfig(num_virtual_tokens=2, **how)
    with pytest.raises(ValueError, match="PROMPT_TUNING"):
        written(peft.get_peft_model(copy.deepcopy(tiny("llama")), prompt).eval(), "a", None)


@pytest.mark.parametrize("how", ["forward", "in place", "wrapper", "static cache"])
def test_a_compiled_model_is_steered_and_plain_again(how):
    model, settings, steer = copy.deepcopy(tiny("llama")), {}, head_steer(num_steers=1).at(3.0)
    if how == "forward":
        model.forward = torch.compile(model.forward, backend="eager")
    elif how == "in place":
        model.compile(backend="eager")
    elif how == "wrapper":
        model = torch.compile(model, backend="eager")
    else:
        compiled = transformers.CompileConfig(backend="eager", fullgraph=False)
        compiled._compile_all_devices = True  # what a GPU does unasked
        settings = {"cache_implementation": "static", "compile_config": compiled}
    plain = written(tiny("llama"), PROMPTS[0], None)
    assert written(model, PROMPTS[0], None, **settings) == plain
    for one in (steer, su.get_x_vector("love", "hate", coeff=3.0, act_name=1, positions="all")):
        assert written(model, PROMPTS[0], one, **settings) == written(tiny("llama"), PROMPTS[0], one)
    assert written(model, PROMPTS[0], None, **settings) == plain
    torch._dynamo.reset()


@pytest.mark.parametrize(
    "steer", [head_steer(num_steers=1).at(2.0), su.SteeringVector(1, torch.ones(3, 32)), HIDDEN]
)
def test_a_copy_made_under_a_steer_is_plain(steer):
    model, ids = tiny("llama"), random_ids(1, 6)
    with steer.on(model, TOKENIZER):
        twin = copy.deepcopy(model)
    assert torch.equal(logits(twin, ids), logits(model, ids))


def test_two_threads_do_not_write_under_each_others_steers():
    model, found = tiny("llama"), {}
    expected = {value: written(model, PROMPTS, head_steer(num_steers=1).at(value)) for value in (3.0, -3.0)}

    def write(value: float) -> None:
        found[value] = written(model, PROMPTS, head_steer(num_steers=1).at(value))

    for _ in range(3):
        threads = [threading.Thread(target=write, args=(value,)) for value in expected]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert found == expected


def test_a_model_in_training_mode_is_a_value_error_and_its_activations_have_no_dropout():
    model = copy.deepcopy(tiny("gpt2")).train()
    for call in (
        lambda: written(model, "a", None),
        lambda: su.train_lm_steer(model, TOKENIZER, ["good day", "bad night"] * 9, [1, -1] * 9, n_steps=1),
    ):
        with pytest.raises(ValueError, match=r"model\.eval\(\)"):
            call()
    one, other = (su.steering_vectors(model, TOKENIZER, PAIR)[0].rows for _ in range(2))
    assert torch.equal(one, other)
    assert model.training
    assert all(part.training for part in model.modules())


def saved(model: transformers.PreTrainedModel, folder: Path) -> Path:
    for part in (model, TOKENIZER):
        part.save_pretrained(folder)
    return folder


def test_a_model_with_an_encoder_or_without_an_order_is_refused_by_name_and_as_an_object(tmp_path):
    sizes = {"vocab_size": 97, "d_model": 32, "pad_token_id": 0, "eos_token_id": 0}
    t5 = transformers.T5Config(**sizes, d_ff=64, num_layers=1, num_heads=4, d_kv=8, decoder_start_token_id=0)
    xlnet = transformers.XLNetConfig(**sizes, n_layer=1, n_head=4, d_inner=64)
    for name, model, why in (
        ("t5", transformers.T5ForConditionalGeneration(t5).eval(), "encoder"),
        ("xlnet", transformers.XLNetLMHeadModel(xlnet).eval(), "any order"),
    ):
        with pytest.raises(ValueError, match=f"decoder-only.*{why}"):
            su.load(saved(model, tmp_path / name), device="cpu")
        for steer in (None, head_steer(num_steers=1).at(1.0), HIDDEN):
            with pytest.raises(ValueError, match=f"decoder-only.*{why}"):
                written(model, "a", steer)


def test_a_model_with_pictures_is_loaded_and_its_text_part_steered(tmp_path):
    model, _ = su.load(saved(family("gemma3"), tmp_path / "gemma3"), device="cpu", dtype="float32")
    model.generation_config = family("gemma3").generation_config
    for steer in (None, PAIR, head_steer(num_steers=1).at(2.0)):
        assert written(model, PROMPTS[2], steer) == written(family("gemma3"), PROMPTS[2], steer)


# --- limits, settings, prompts ----------------------------------------------------------------------------


def test_a_text_beyond_the_positions_is_a_value_error_with_both_numbers_and_its_index():
    model, long = tiny("gpt2"), "abcde " * 25  # 128 positions
    texts, calls = ["bad night", long], {}
    calls["prompt"] = lambda: written(model, texts, None)
    calls["completion"] = lambda: written(model, ["a", "abc"], None, max_new_tokens=126)
    calls["sweep"] = lambda: su.sweep(model, TOKENIZER, texts, PAIR, act_names=[1], coeffs=[1.0])
    calls["training"] = lambda: su.train_lm_steer(model, TOKENIZER, texts * 9, [1, -1] * 9, n_steps=1)
    calls["head"] = lambda: su.train_classifier_head(model, TOKENIZER, texts * 20, [1, 0] * 20)
    calls["logits"] = lambda: su.measure.metrics.next_token_logits(model, TOKENIZER, texts)
    calls["perplexity"] = lambda: su.measure.metrics.perplexity(model, TOKENIZER, ["a", "a"], texts)
    calls["addition"] = lambda: written(
        model, "a", [su.ActivationAddition(1.0, 1, "a"), su.ActivationAddition(1.0, 1, long)]
    )
    for call in calls.values():
        with pytest.raises(ValueError, match=r"index 1 has \d+ tokens.*128 positions"):
            call()
    assert written(model, "abc", None, max_new_tokens=125)
    with pytest.raises(ValueError, match=r"129 tokens.*128"), torch.no_grad():
        hf.forward(model, random_ids(1, 129), torch.ones(1, 129))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_return_sequences", 2),
        ("return_dict_in_generate", True),
        ("min_p", 0.1),
        ("prompt_lookup_num_tokens", 3),
    ],
)
def test_a_setting_that_does_not_fit_is_named_however_it_comes(name, value):
    model = copy.deepcopy(tiny("llama"))
    given = {"do_sample": True}
    with pytest.raises(ValueError, match=name):
        written(
            model,
            "a",
            None,
            **given,
            generation_config=transformers.GenerationConfig(do_sample=True, **{name: value}),
        )
    setattr(model.generation_config, name, value)
    with pytest.raises(ValueError, match=name):
        written(model, "a", None, **given)


def test_settings_that_change_who_calls_the_model_are_right_or_refused():
    model = tiny("llama")
    guided = su.generate(model, TOKENIZER, "abc", guidance_scale=2.0, do_sample=False, max_new_tokens=5)
    assert guided["loss"].isna().all()
    with pytest.raises(ValueError, match="guidance_scale"):
        written(model, "abc", HIDDEN, guidance_scale=2.0)
    given = {"max_new_tokens": 9, "do_sample": False, "prompt_lookup_num_tokens": 3}
    batch = su.encode(TOKENIZER, "abcabcabcabc")
    with HIDDEN.on(model, TOKENIZER), pytest.raises(ValueError, match="prompt_lookup_num_tokens"):
        model.generate(**batch, **given)


def test_pplm_grows_a_cache_of_its_own_where_the_model_stores_another_kind():
    model, steps = copy.deepcopy(tiny("llama")), su.PPLM(bags=[BAG], stepsize=0.05, gamma=1.0)
    model.generation_config.cache_implementation = "static"
    assert written(model, PROMPTS[0], steps) == written(tiny("llama"), PROMPTS[0], steps)


def test_a_sweep_needs_no_cache():
    how = {"act_names": [0, 1], "coeffs": [1.0, -1.0], "max_new_tokens": 5, "do_sample": False}
    one, other = (
        su.sweep(tiny("gpt2"), TOKENIZER, PROMPTS[::2], PAIR, use_cache=use, **how) for use in (True, False)
    )
    assert one["completion"].tolist() == other["completion"].tolist()


CHAT = "{% for m in messages %}<|im_start|>{{ m['role'] }} {{ m['content'] }}<|im_end|>{% endfor %}"
CHAT += "<|im_start|>assistant "


@pytest.mark.parametrize("bos", ["<|im_start|>", None])
def test_messages_are_read_as_the_chat_template_writes_them(bos):
    tokenizer = copy.deepcopy(TOKENIZER)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.bos_token, tokenizer.eos_token, tokenizer.chat_template = bos, "<|im_end|>", CHAT
    messages = [{"role": "user", "content": "Hi"}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    theirs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)[
        "input_ids"
    ]
    assert su.models.token_ids(tokenizer, text) == list(theirs)
    assert su.models.prompt_texts(tokenizer, messages) == [text]
    assert su.models.prompt_texts(tokenizer, [messages, "a"]) == [text, "a"]
    with pytest.raises(TypeError, match="3"):
        su.models.prompt_texts(tokenizer, ["a", 3])


def test_a_text_without_bos_gives_a_warning_under_an_addition_only():
    model, ids = tiny("llama"), random_ids(1, 9)[:, 1:]
    with su.apply_activation_additions(model, PAIR, TOKENIZER):
        logits(model, random_ids(1, 9))
        with pytest.warns(UserWarning, match="does not begin with BOS"):
            logits(model, ids)


# --- where an addition acts, and what it costs ------------------------------------------------------------


@pytest.mark.parametrize(
    ("positions", "where"), [("last", [3]), ("generated", [4, 5]), ("all", [0, 1, 2, 3, 4, 5])]
)
def test_positions_are_the_prompts_last_token_generated_ones_or_all(positions, where):
    model, ids, seen = tiny("llama"), random_ids(2, 6), []
    vector, block = su.SteeringVector(1, torch.ones(1, 32), positions=positions), hf.blocks(model)[1]
    for steer in ([], [vector]):
        with (
            generation.all_on(steer, model, None),
            hooks.batch(prompt_lengths=4),
            # After the steer's hook, so that it sees what that one leaves.
            block.register_forward_pre_hook(lambda block, args: seen.append(args[0])),
        ):
            logits(model, ids)
    moved = (seen[1] - seen[0]).abs().amax(dim=-1) > 0.5
    assert moved.tolist() == [[place in where for place in range(6)]] * 2


@pytest.mark.parametrize("positions", ["own", "last"])
def test_an_addition_costs_no_operation_after_the_prompt(positions):
    model, ids = tiny("llama"), random_ids(2, 8)
    vector = su.SteeringVector(1, torch.ones(3, 32), positions=positions)

    def operations(steer: list) -> int:
        cache = hf.new_cache(model)
        with torch.no_grad(), generation.all_on(steer, model, None):
            for end in (6, 7):
                hf.forward(
                    model,
                    ids[:, :end][:, -1 if end > 6 else None :],
                    torch.ones(2, end),
                    past_key_values=cache,
                    use_cache=True,
                )
            with torch.profiler.profile() as profile:
                hf.forward(model, ids[:, 7:], torch.ones(2, 8), past_key_values=cache, use_cache=True)
        return sum(event.count for event in profile.key_averages())

    assert operations([vector]) == operations([])


# --- weights elsewhere ------------------------------------------------------------------------------------


def test_a_steer_follows_the_hidden_states_to_a_second_device():
    model = copy.deepcopy(tiny("llama"))
    for module in (*hf.blocks(model)[1:], model.model.norm, model.lm_head):  # meta stands for another GPU
        module.to("meta")
        hook = accelerate.hooks.AlignDevicesHook(execution_device="meta", io_same_device=False)
        accelerate.hooks.add_hook_to_module(module, hook)
    steers = [su.SteeringVector(layer, torch.ones(3, 32)) for layer in (0, 2)]
    steers += [head_steer(kind, num_steers=1).at(1.0) for kind in ("multiply", "add", "offset")]
    for steer in steers:
        with steer.on(model), torch.no_grad():
            assert model(random_ids(1, 6), use_cache=False).logits.device.type == "meta"


def test_an_offloaded_model_generates_and_trains_and_is_not_folded(tmp_path):
    expected = written(tiny("llama"), PROMPTS, None)
    folder = saved(tiny("llama"), tmp_path / "model")
    names = ["model.embed_tokens", *(f"model.layers.{i}" for i in range(3)), "model.norm", "model.rotary_emb"]
    where = dict.fromkeys([*names, "lm_head"], "disk")
    model, _ = su.load(folder, device_map=where, offload_folder=tmp_path / "weights")
    model.generation_config = tiny("llama").generation_config
    assert written(model, PROMPTS, None) == expected
    steer = su.train_lm_steer(model, TOKENIZER, ["good day", "bad night"] * 9, [1, -1] * 9, n_steps=2, rank=2)
    assert written(model, PROMPTS, 0.0 * steer.at(1.0)) == expected
    with pytest.raises(ValueError, match="quantised or offloaded"):
        steer.fold(model, 1.0)


# --- what once went wrong without a word ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("location", "positions"), [("back", "own"), ("front", "last"), ("front", "generated")]
)
def test_every_chunk_of_samples_is_steered_at_the_end_of_the_prompt(location, positions):
    rows = 6 * torch.randn(4, 32, generator=torch.Generator().manual_seed(0))
    vector = su.SteeringVector(1, rows, location, positions)
    how = {"steer": vector, "num_samples": 6, "seed": 0, "max_new_tokens": 6}
    one, other = (su.generate(tiny("llama"), TOKENIZER, LONG, batch_size=size, **how) for size in (64, 2))
    assert one["completion"].tolist() == other["completion"].tolist()


def test_soft_tokens_of_pplm_do_not_end_an_addition_at_the_end_of_the_prompt():
    vector = su.SteeringVector(1, 6 * torch.ones(1, 32), positions="last")
    head = su.ClassifierHead(32, 2)
    steps = su.PPLM(head=head, target_class_id=1, stepsize=1e-7, num_iterations=2, gm_scale=1.0, top_k=0)
    alone, both = (logits_under(tiny("llama"), steers, PROMPTS[:1]) for steers in ([vector], [vector, steps]))
    torch.testing.assert_close(both, alone, atol=1e-3, rtol=1e-3)


def test_steers_on_two_models_at_once_leave_torch_as_it_was():
    one, other, ids = head_steer(num_steers=1).at(3.0), copy.deepcopy(tiny("llama")), random_ids(1, 6)
    other.forward = torch.compile(other.forward, backend="eager")
    plain = logits(other, ids)
    first, second = one.on(tiny("gpt2")), one.on(other)
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert not torch.allclose(logits(other, ids), plain)
    second.__exit__(None, None, None)
    assert torch.equal(logits(other, ids), plain)
    assert torch._dynamo.eval_frame._stance.stance == "default"
    torch._dynamo.reset()


def test_a_model_whose_positions_count_padding_gets_prompts_of_one_length():
    sizes = {"vocab_size": 97, "d_model": 32, "decoder_layers": 2, "decoder_ffn_dim": 32}
    sizes |= {"decoder_attention_heads": 2, "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0}
    model = new_model(transformers.BartConfig(**sizes, is_decoder=True, is_encoder_decoder=False))
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
    assert probing.padding_changes(model)
    assert not probing.padding_changes(tiny("gpt2"))
    assert written(model, PROMPTS, None) == [written(model, prompt, None)[0] for prompt in PROMPTS]


def test_a_prompt_in_chunks_says_where_it_ends_or_is_refused():
    model, vector = tiny("llama"), su.SteeringVector(1, torch.ones(2, 32), "back")
    batch = su.encode(TOKENIZER, PROMPTS[0])
    given = {"max_new_tokens": 4, "do_sample": False, "prefill_chunk_size": 4}
    with vector.on(model), pytest.raises(ValueError, match="prompt_lengths"):
        model.generate(**batch, **given)


def test_a_prefix_of_characters_cut_into_bytes_is_told_from_whole_ones():
    tokenizer = AutoTokenizer.from_pretrained(embedded.unpacked(embedded.DEFAULT))
    ids = tokenizer("🚀天", add_special_tokens=False)["input_ids"]
    inside = [bags._ends_inside(ids[: end + 1], tokenizer) for end in range(len(ids))]
    assert inside == [tokenizer.decode(ids[: end + 1]).endswith("\ufffd") for end in range(len(ids))]
    two = [su.bag_of_words([word], tokenizer) for word in ("🚀", "天文")]
    text = torch.tensor([ids[:1]])
    flat = torch.zeros(1, len(tokenizer)).log_softmax(dim=-1)
    found = [bags.finished(pair, flat.clone(), flat, text) for pair in (two, two[::-1])]
    assert torch.equal(*found)
    assert 0 < found[0].isfinite().sum() < 10
