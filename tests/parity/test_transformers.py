"""Folders both ways: what transformers writes opens here, and what is written here opens there."""

import json

import pytest
import torch
import transformers
from helpers.models import (
    FAMILY_CONFIGS,
    SCALING,
    assert_equal_logits,
    random_ids,
    randomise,
    tiny_model,
)
from safetensors import safe_open
from transformers import GPT2Config, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

from nanogpt_surgery import CharacterTokenizer, SimpleGPT, generate, open_model, save_model
from nanogpt_surgery.formats.huggingface.config import config_from_json

GPT2 = {
    "vocab_size": 53,
    "n_embd": 24,
    "n_head": 3,
    "n_layer": 2,
    "n_positions": 19,
    "layer_norm_epsilon": 2e-3,
}
LLAMA = {
    "vocab_size": 53,
    "hidden_size": 24,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 10,
    "num_hidden_layers": 2,
    "max_position_embeddings": 19,
    "intermediate_size": 28,
    "rms_norm_eps": 2e-3,
}
THETA = {"rope_parameters": {"rope_theta": 300.0, "rope_type": "default"}}
LLAMA_3 = {
    "rope_parameters": {
        "rope_theta": 300.0,
        "rope_type": "llama3",
        "factor": SCALING.factor,
        "low_freq_factor": SCALING.low_freq_factor,
        "high_freq_factor": SCALING.high_freq_factor,
        "original_max_position_embeddings": SCALING.original_max_position_embeddings,
    }
}

THEIRS = {
    "gpt2": (GPT2Config, GPT2),
    "gpt2-untied-narrow": (GPT2Config, GPT2 | {"tie_word_embeddings": False, "n_inner": 40}),
    "gpt2-gelu": (GPT2Config, GPT2 | {"activation_function": "gelu"}),
    "llama": (LlamaConfig, LLAMA | THETA),
    "llama-usual-theta": (LlamaConfig, LLAMA),
    "llama-one-width": (LlamaConfig, LLAMA | THETA | {"head_dim": None}),
    "llama-ungrouped": (LlamaConfig, LLAMA | THETA | {"num_key_value_heads": None}),
    "llama-scaled-tied": (LlamaConfig, LLAMA | LLAMA_3 | {"tie_word_embeddings": True}),
    "llama-attention-bias": (LlamaConfig, LLAMA | THETA | {"attention_bias": True}),
    "llama-all-bias": (LlamaConfig, LLAMA | THETA | {"attention_bias": True, "mlp_bias": True}),
    "mistral": (MistralConfig, LLAMA | THETA | {"sliding_window": None}),
    "mistral-wide-window": (MistralConfig, LLAMA | THETA | {"sliding_window": 19}),
    "qwen2": (Qwen2Config, LLAMA | THETA),
    "qwen2-tied": (Qwen2Config, LLAMA | THETA | {"tie_word_embeddings": True}),
    "qwen2-scaled-tied": (Qwen2Config, LLAMA | LLAMA_3 | {"tie_word_embeddings": True}),
    "qwen3": (Qwen3Config, LLAMA | THETA),
    "qwen3-bias-tied": (
        Qwen3Config,
        LLAMA | THETA | {"attention_bias": True, "tie_word_embeddings": True},
    ),
    "qwen3-uneven-width": (Qwen3Config, LLAMA | THETA | {"hidden_size": 20}),
}


def their_model(name):
    """A model of transformers, every weight random."""
    kind, options = THEIRS[name]
    model = transformers.AutoModelForCausalLM.from_config(kind(**options))
    randomise(model)
    return model.eval()


@torch.no_grad()
def their_logits(model, ids):
    return model(input_ids=ids, use_cache=False).logits


@torch.no_grad()
def their_greedy_ids(model, ids, count):
    new = model.generate(ids, max_new_tokens=count, do_sample=False, pad_token_id=0)
    return new[0, ids.size(1) :].tolist()


@pytest.mark.parametrize("name", THEIRS)
@torch.no_grad()
def test_what_transformers_writes_opens_here(name, tmp_path):
    theirs = their_model(name)
    theirs.save_pretrained(tmp_path)
    ours, tokenizer = open_model(tmp_path)
    assert tokenizer is None
    assert not ours.training
    ids = random_ids(ours.config, 2, 19)
    assert_equal_logits(ours(ids), their_logits(theirs, ids))
    assert sum(p.numel() for p in theirs.parameters()) == ours.n_parameters
    assert ours.config.tie_head == theirs.config.tie_word_embeddings


@pytest.mark.parametrize("name", ["gpt2", "llama-scaled-tied"])
def test_shards_open_like_one_file(name, tmp_path):
    theirs = their_model(name)
    theirs.save_pretrained(tmp_path / "one")
    theirs.save_pretrained(tmp_path / "many", max_shard_size="10kB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 2
    one, many = (open_model(tmp_path / folder)[0].state_dict() for folder in ("one", "many"))
    assert one.keys() == many.keys()
    assert all(torch.equal(tensor, many[key]) for key, tensor in one.items())


@pytest.mark.parametrize("name", FAMILY_CONFIGS)
@torch.no_grad()
def test_what_is_written_here_opens_in_transformers(name, tmp_path):
    ours = tiny_model(FAMILY_CONFIGS[name])
    save_model(ours, tmp_path / "model")
    theirs, report = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", output_loading_info=True
    )
    assert not any(report.values()), f"tensors missing, left over or misshapen: {report}"
    ids = random_ids(ours.config, 2, 19)
    assert_equal_logits(ours(ids), their_logits(theirs, ids))
    prompt = ids[:1, :5]
    assert list(generate(ours, prompt, 12, temperature=0)) == their_greedy_ids(theirs, prompt, 12)
    tied = theirs.get_output_embeddings().weight is theirs.get_input_embeddings().weight
    assert tied == ours.config.tie_head


@pytest.mark.parametrize("name", FAMILY_CONFIGS)
def test_a_folder_goes_there_and_back(name, tmp_path):
    ours = tiny_model(FAMILY_CONFIGS[name])
    save_model(ours, tmp_path / "model")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    theirs.save_pretrained(tmp_path / "back")
    back, _ = open_model(tmp_path / "back")
    assert back.config == ours.config
    tensors, expected = back.state_dict(), ours.state_dict()
    assert all(torch.equal(tensors[key], expected[key]) for key in expected)
    assert shapes(tmp_path / "model") == shapes(tmp_path / "back")


def shapes(folder):
    with safe_open(folder / "model.safetensors", "pt") as file:
        return {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118


@pytest.mark.parametrize("spelling", ["type", "rope_type"])
@torch.no_grad()
def test_the_older_spelling_of_rotary_options_means_the_same_to_both(spelling, tmp_path):
    theirs = their_model("llama-scaled-tied")
    theirs.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    contents = json.loads(path.read_text())
    options = contents.pop("rope_parameters")
    contents["rope_theta"] = options.pop("rope_theta")
    contents["rope_scaling"] = options | {spelling: options.pop("rope_type")}
    path.write_text(json.dumps(contents))
    ours, _ = open_model(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    ids = random_ids(ours.config, 2, 19)
    assert_equal_logits(ours(ids), their_logits(theirs, ids))
    assert_equal_logits(ours(ids), their_logits(again, ids))


LLAMA_SIZES = {
    "vocab_size": 53,
    "hidden_size": 48,
    "num_attention_heads": 6,
    "num_key_value_heads": None,
    "num_hidden_layers": 2,
    "intermediate_size": 28,
    "max_position_embeddings": 19,
}
SIZES = {
    GPT2Config: {"vocab_size": 53, "n_embd": 48, "n_head": 3, "n_layer": 2, "n_positions": 19},
    **dict.fromkeys((LlamaConfig, Qwen2Config, Qwen3Config), LLAMA_SIZES),
}


@pytest.mark.parametrize("kind", SIZES)
def test_what_a_config_leaves_out_means_the_same_to_both(kind):
    short = {"model_type": kind.model_type} | SIZES[kind]
    assert config_from_json(short) == config_from_json(kind(**SIZES[kind]).to_dict())


@torch.no_grad()
def test_a_model_in_bfloat16_opens_in_transformers_as_it_is(tmp_path):
    ours = tiny_model(FAMILY_CONFIGS["llama"]).bfloat16()
    save_model(ours, tmp_path / "model")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert theirs.dtype == torch.bfloat16
    tensors = theirs.state_dict()
    for name, tensor in ours.state_dict().items():
        assert torch.equal(tensor, tensors[name if name == "lm_head.weight" else f"model.{name}"])


def test_transformers_reads_the_character_tokenizer(tmp_path):
    text = "To be,  or not to be:\n\nthat is the question — ¿no?"
    ours = CharacterTokenizer(text)
    save_model(SimpleGPT(ours.vocab_size, n_embd=16, n_layer=1), tmp_path / "model", ours)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "model")
    assert theirs.encode(text) == ours.encode(text)
    assert theirs.decode(ours.encode(text)) == text
    assert len(theirs) == ours.vocab_size
