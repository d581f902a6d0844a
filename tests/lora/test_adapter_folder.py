import json
import re

import pytest
import torch
from helpers.adapters import EVERY_LINEAR, adapted, change_config, unsealed
from helpers.models import (
    CONFIGS,
    FAMILY_CONFIGS,
    assert_equal_logits,
    random_ids,
    tiny_model,
    train_a_little,
)
from safetensors.torch import load_file
from torch import nn

from nanogpt_surgery import (
    SurgeryError,
    inject_lora,
    load_adapter,
    merge_lora,
    remove_lora,
    save_adapter,
)
from nanogpt_surgery.lora.several import has_lora, lora_layers

CONFIG, TENSORS, MANIFEST = "adapter_config.json", "adapter_model.safetensors", "MANIFEST.json"
LLAMA = FAMILY_CONFIGS["llama"]


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("targets", ["q_proj", EVERY_LINEAR])
def test_loaded_is_what_was_saved(config, targets, tmp_path):
    model = adapted(config, targets)
    save_adapter(model, tmp_path / "adapter")
    again = tiny_model(config)
    load_adapter(again, tmp_path / "adapter")
    assert lora_layers(again).keys() == lora_layers(model).keys()
    for layer, other in zip(lora_layers(model).values(), lora_layers(again).values(), strict=True):
        assert torch.equal(layer.lora_A, other.lora_A)
        assert torch.equal(layer.lora_B, other.lora_B)
        assert layer.rank == other.rank
    ids = random_ids(config, 2, 9)
    assert torch.equal(again(ids), model(ids))


def test_a_loaded_adapter_can_be_trained_and_removed(tmp_path):
    save_adapter(adapted(LLAMA), tmp_path / "adapter")
    model = tiny_model(LLAMA).train()
    base = model(random_ids(LLAMA, 1, 6))
    load_adapter(model, tmp_path / "adapter")
    assert all(module.training for module in model.modules())
    updates = {id(p) for layer in lora_layers(model).values() for p in (layer.lora_A, layer.lora_B)}
    assert {id(p) for p in model.parameters() if p.requires_grad} == updates
    remove_lora(model)
    assert torch.equal(model(random_ids(LLAMA, 1, 6)), base)
    assert all(p.requires_grad for p in model.parameters())


def test_a_bfloat16_model_keeps_its_update_in_float32(tmp_path):
    model = tiny_model(LLAMA).bfloat16()
    inject_lora(model, "v_proj")
    train_a_little(model)
    save_adapter(model, tmp_path / "adapter")
    again = tiny_model(LLAMA).bfloat16()
    load_adapter(again, tmp_path / "adapter")
    ids = random_ids(LLAMA, 1, 6)
    assert torch.equal(again(ids), model(ids))
    assert all(t.dtype == torch.float32 for t in load_file(tmp_path / "adapter" / TENSORS).values())


def test_the_folder_is_in_peft_s_format(tmp_path):
    save_adapter(adapted(LLAMA, ["q_proj", "down_proj"]), tmp_path / "adapter", base="some/base")
    assert {file.name for file in (tmp_path / "adapter").iterdir()} == {
        CONFIG,
        TENSORS,
        MANIFEST,
        "surgery.json",
    }
    contents = json.loads((tmp_path / "adapter" / CONFIG).read_text(encoding="utf-8"))
    names = [f"model.layers.{i}.{n}" for i in (0, 1) for n in ("mlp.down_proj", "self_attn.q_proj")]
    assert contents == {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "some/base",
        "revision": None,
        "r": 3,
        "lora_alpha": 5,
        "lora_dropout": 0.0,
        "target_modules": names,
        "rank_pattern": {},
        "alpha_pattern": {},
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
        "use_dora": False,
        "modules_to_save": None,
        "init_lora_weights": True,
        "inference_mode": True,
    }
    shapes = {k: tuple(t.shape) for k, t in load_file(tmp_path / "adapter" / TENSORS).items()}
    assert len(shapes) == 8
    q = "base_model.model.model.layers.1.self_attn.q_proj"
    assert shapes[f"{q}.lora_A.weight"] == (3, 24)
    assert shapes[f"{q}.lora_B.weight"] == (60, 3)


def test_a_gpt2_s_queries_keys_and_values_are_fused(tmp_path):
    config = FAMILY_CONFIGS["gpt2"]
    save_adapter(adapted(config, ["q_proj", "v_proj", "up_proj"]), tmp_path / "adapter")
    contents = json.loads((tmp_path / "adapter" / CONFIG).read_text(encoding="utf-8"))
    assert contents["fan_in_fan_out"] is True
    shapes = {k: tuple(t.shape) for k, t in load_file(tmp_path / "adapter" / TENSORS).items()}
    c_attn = "base_model.model.transformer.h.0.attn.c_attn"
    assert shapes[f"{c_attn}.lora_A.weight"] == (2 * 3, 24)
    assert shapes[f"{c_attn}.lora_B.weight"] == (3 * 24, 2 * 3)
    assert shapes["base_model.model.transformer.h.1.mlp.c_fc.lora_B.weight"] == (40, 3)
    assert len(contents["rank_pattern"]) + len(contents["alpha_pattern"]) == 2 * 2


def test_any_module_keeps_its_own_names(tmp_path):
    def perceptron() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Sequential(nn.Linear(6, 3)))

    model, x = perceptron(), torch.randn(2, 4)
    inject_lora(model, "2.0", rank=2)
    train_a_little(model)
    save_adapter(model, tmp_path / "adapter")
    assert set(load_file(tmp_path / "adapter" / TENSORS)) == {
        "base_model.model.2.0.lora_A.weight",
        "base_model.model.2.0.lora_B.weight",
    }
    again = perceptron()
    load_adapter(again, tmp_path / "adapter")
    assert torch.equal(again(x), model(x))


def test_a_name_that_ends_another_is_told_from_it(tmp_path):
    model = nn.Sequential(nn.Linear(3, 3), nn.Sequential(nn.Linear(3, 3)))
    inject_lora(model, "^0$", rank=2)
    assert list(lora_layers(model)) == ["0"]
    save_adapter(model, tmp_path / "adapter")
    remove_lora(model)
    load_adapter(model, tmp_path / "adapter")
    assert list(lora_layers(model)) == ["0"]


def test_saving_again_replaces_what_was_there(tmp_path):
    first, second = adapted(LLAMA, "q_proj"), adapted(LLAMA, "v_proj")
    save_adapter(first, tmp_path / "adapter")
    save_adapter(second, tmp_path / "adapter")
    model = tiny_model(LLAMA)
    load_adapter(model, tmp_path / "adapter")
    assert lora_layers(model).keys() == lora_layers(second).keys()
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_a_foreign_folder_is_not_written_over(tmp_path):
    (tmp_path / "notes.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(SurgeryError, match=re.escape(str(tmp_path))):
        save_adapter(adapted(LLAMA), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_a_model_without_a_lora_has_nothing_to_save(tmp_path):
    with pytest.raises(SurgeryError, match="inject_lora"):
        save_adapter(tiny_model(LLAMA), tmp_path / "adapter")
    assert not list(tmp_path.iterdir())


def test_options_that_change_nothing_are_passed_over(tmp_path):
    model = adapted(LLAMA)
    save_adapter(model, tmp_path / "adapter")
    change_config(
        unsealed(tmp_path / "adapter"),
        init_lora_weights="gaussian",
        lora_dropout=0.1,
        peft_version="99",
        a_future_key=None,
        megatron_core="megatron.core",
    )
    again = tiny_model(LLAMA)
    load_adapter(again, tmp_path / "adapter")
    ids = random_ids(LLAMA, 1, 6)
    assert torch.equal(again(ids), model(ids))


def test_alpha_follows_its_patterns(tmp_path):
    save_adapter(adapted(LLAMA, ["q_proj", "v_proj"]), tmp_path / "adapter")
    patterns = {r"layers.0.self_attn.q_proj": 50, r".*\.1\..*v_proj": 7, "proj": 1000}
    change_config(unsealed(tmp_path / "adapter"), alpha_pattern=patterns, lora_alpha=9)
    model = tiny_model(LLAMA)
    load_adapter(model, tmp_path / "adapter")
    scales = {name: layer.scaling * 3 for name, layer in lora_layers(model).items()}
    assert scales == {
        "layers.0.self_attn.q_proj": pytest.approx(50),
        "layers.0.self_attn.v_proj": pytest.approx(9),
        "layers.1.self_attn.q_proj": pytest.approx(9),
        "layers.1.self_attn.v_proj": pytest.approx(7),
    }


def test_saved_merged_and_loaded_agree(tmp_path):
    model = adapted(LLAMA)
    save_adapter(model, tmp_path / "adapter")
    again = tiny_model(LLAMA)
    load_adapter(again, tmp_path / "adapter")
    merge_lora(again)
    assert not has_lora(again)
    ids = random_ids(LLAMA, 2, 8)
    assert_equal_logits(again(ids), model(ids))
