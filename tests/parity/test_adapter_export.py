"""Adapters handed on to llama.cpp change its text as they change ours; MLX's compute the same."""

import json
from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from helpers.llama_cpp import assert_goes_on_alike, greedy_text
from helpers.models import FAMILY_CONFIGS, OWN_CONFIGS, tiny_model
from safetensors.torch import load_file

from nanogpt_surgery import CharacterTokenizer, SurgeryError, generate, inject_lora
from nanogpt_surgery.formats.gguf.writing import save_gguf
from nanogpt_surgery.formats.peft.export import save_lora_gguf, save_mlx_adapter
from nanogpt_surgery.lora.several import lora_layers

LETTERS = CharacterTokenizer("the quick brown fox jumps over the lazy dog\n 0123456789")


def adapted(kind, targets, **sizes):
    config = FAMILY_CONFIGS[kind]
    sizes = {"n_embd": 96, "head_dim": 16, "n_inner": 160} | sizes
    if config.positions == "learned":
        sizes["n_embd"] = 48
    model = tiny_model(replace(config, **sizes, vocab_size=LETTERS.vocab_size, block_size=64))
    torch.manual_seed(5)  # of A; with some, no choice of the model changes
    inject_lora(model, targets, rank=3, alpha=7, tied="untie")
    draw = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for layer in lora_layers(model).values():
            layer.lora_B.copy_(0.3 * torch.randn(layer.lora_B.shape, generator=draw))
    return model


@pytest.mark.parametrize(
    ("kind", "targets"),
    [
        ("llama", ["q_proj", "k_proj", "down_proj"]),
        ("llama", "all-linear"),
        ("llama", ["lm_head"]),
        ("gpt2", ["q_proj", "v_proj", "up_proj"]),
        ("qwen2", ["q_proj", "o_proj"]),
        ("qwen3", ["k_proj", "gate_proj"]),
    ],
)
def test_llama_cpp_adapts_its_base_as_we_do(kind, targets, tmp_path):
    from nanogpt_surgery import remove_lora

    model = adapted(kind, targets)
    save_lora_gguf(model, tmp_path / "lora.gguf")
    copied = deepcopy(model)
    ours = list(generate(model, LETTERS.encode("the fox"), 16, 0))
    remove_lora(model)
    save_gguf(model, tmp_path / "base.gguf", LETTERS, "F32")
    assert list(generate(model, LETTERS.encode("the fox"), 16, 0)) != ours
    theirs = greedy_text(tmp_path / "base.gguf", "the fox", 16, tmp_path / "lora.gguf")
    assert_goes_on_alike(copied, LETTERS, "the fox", theirs, 16)


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_an_mlx_adapter_holds_the_same_updates_transposed(kind, tmp_path):
    model = adapted(kind, ["layers.1.self_attn.q_proj", "layers.1.mlp.up_proj"])
    save_mlx_adapter(model, tmp_path / "mlx")
    tensors = load_file(tmp_path / "mlx" / "adapters.safetensors")
    config = json.loads((tmp_path / "mlx" / "adapter_config.json").read_text())
    assert config["num_layers"] == 1
    assert config["lora_parameters"] == {
        "rank": 3,
        "scale": 1.0,
        "dropout": 0.0,
        "keys": ["mlp.up_proj", "self_attn.q_proj"],
    }
    for name, layer in lora_layers(model).items():
        x = torch.randn(4, layer.original_layer.in_features)
        a, b = tensors.pop(f"model.{name}.lora_a"), tensors.pop(f"model.{name}.lora_b")
        expected = x @ layer.delta_weight().t()
        assert torch.allclose(x @ a @ b, expected, rtol=1e-4, atol=1e-5)
    assert not tensors


def test_layers_between_get_updates_of_zero(tmp_path):
    model = adapted("llama", ["layers.0.self_attn.q_proj", "layers.1.mlp.up_proj"])
    save_mlx_adapter(model, tmp_path / "mlx")
    tensors = load_file(tmp_path / "mlx" / "adapters.safetensors")
    assert len(tensors) == 8
    assert not tensors["model.layers.1.self_attn.q_proj.lora_b"].any()
    assert tensors["model.layers.0.self_attn.q_proj.lora_b"].any()


def test_what_the_formats_have_no_place_for_is_refused(tmp_path):
    with pytest.raises(SurgeryError, match=r"head.*tied.*embedding"):
        save_lora_gguf(adapted("qwen2", ["lm_head"]), tmp_path / "a.gguf")
    with pytest.raises(SurgeryError, match="lm_head"):
        save_mlx_adapter(adapted("llama", ["lm_head", "q_proj"]), tmp_path / "a")
    with pytest.raises(SurgeryError, match="GPT-2"):
        save_mlx_adapter(adapted("gpt2", ["q_proj"]), tmp_path / "a")
    with pytest.raises(SurgeryError, match="no LoRA"):
        save_lora_gguf(tiny_model(FAMILY_CONFIGS["llama"]), tmp_path / "a.gguf")
    own = tiny_model(OWN_CONFIGS["rotary-layernorm-gelu"])
    with pytest.raises(SurgeryError, match=r"family.*axes"):
        save_lora_gguf(own, tmp_path / "a.gguf")
    assert list(tmp_path.iterdir()) == []
