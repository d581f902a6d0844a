"""An adapter for vLLM: within its limits, and in peft it computes what ours computes."""

import json
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers.commands import called
from helpers.models import FAMILY_CONFIGS, random_ids, tiny_model, train_a_little
from safetensors.torch import load_file

from nanogpt_surgery import (
    SurgeryError,
    inject_lora,
    remove_lora,
    save_adapter,
    save_model,
    save_vllm_adapter,
)
from nanogpt_surgery.lora.several import lora_layers

LLAMA = replace(FAMILY_CONFIGS["llama"], n_inner=40)


def adapted(targets, config=LLAMA, **settings):
    model = tiny_model(config)
    inject_lora(model, targets, **{"rank": 3, "alpha": 7} | settings)
    train_a_little(model, size=0.3)
    return model


def written(model, folder, **options):
    report = save_vllm_adapter(model, folder, **options)
    config = json.loads((folder / "adapter_config.json").read_text())
    return report, config, load_file(folder / "adapter_model.safetensors")


@pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
)  # peft
@pytest.mark.parametrize(
    ("targets", "settings", "names"),
    [
        (["q_proj", "down_proj"], {}, ["down_proj", "q_proj"]),
        (["q_proj", "lm_head"], {"rslora": True}, ["lm_head", "q_proj"]),
        (["q_proj", "v_proj"], {"rank_pattern": {"v_proj": 9}}, ["q_proj", "v_proj"]),
        (["layers.1.self_attn.q_proj"], {"pissa": False}, ["model.layers.1.self_attn.q_proj"]),
    ],
)
def test_one_rank_no_patterns_and_the_same_logits_in_peft(tmp_path, targets, settings, names):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = adapted(targets, **settings)
    report, config, tensors = written(model, tmp_path / "lora")
    rank = 16 if "rank_pattern" in settings else 8
    assert config["r"] == config["lora_alpha"] == rank == report.summary["rank"]
    assert config["target_modules"] == names
    assert not config["rank_pattern"]
    assert not config["alpha_pattern"]
    assert (config["use_rslora"], config["use_dora"]) == (False, False)
    assert config["modules_to_save"] is None
    for name, tensor in tensors.items():
        assert tensor.size(0 if name.endswith("lora_A.weight") else 1) == rank
    ids = random_ids(LLAMA, 2, 9)
    ours = model(ids)
    base = deepcopy(model)
    remove_lora(base)
    save_model(base, tmp_path / "base")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    loaded = PeftModel.from_pretrained(theirs, tmp_path / "lora")
    torch.testing.assert_close(loaded(ids).logits, ours, rtol=1e-4, atol=1e-5)
    assert report.summary["largest_layer_error"] == 0


def test_a_smaller_rank_is_the_nearest_with_its_error(tmp_path):
    model = adapted(["q_proj"], rank=6)
    report, config, tensors = written(model, tmp_path / "lora", rank=1)
    assert config["r"] == 1
    for row, layer in zip(report.rows, lora_layers(model).values(), strict=True):
        values = torch.linalg.svdvals(layer.delta_weight())
        expected = float(values[1:].norm() / values.norm())
        assert row["error"] == pytest.approx(expected, rel=1e-3)
        assert row["rank"] == 6
    assert len(tensors) == 4


def test_dora_goes_in_as_its_nearest_product_alone(tmp_path):
    model = adapted(["q_proj"], dora=True)
    with pytest.raises(SurgeryError, match=r"DoRA.*\n.*rank=64"):
        save_vllm_adapter(model, tmp_path / "lora")
    assert not (tmp_path / "lora").exists()
    report, config, tensors = written(model, tmp_path / "lora", rank=64)
    assert config["r"] == 32  # the smaller side of q_proj has 24
    assert report.summary["largest_layer_error"] < 1e-5
    for name, layer in lora_layers(model).items():
        key = f"base_model.model.model.{name}"
        found = tensors[f"{key}.lora_B.weight"] @ tensors[f"{key}.lora_A.weight"]
        torch.testing.assert_close(found, layer.delta_weight(), rtol=1e-3, atol=1e-5)


def test_a_head_that_was_trained_whole_goes_in_as_its_nearest_product(tmp_path):
    from nanogpt_surgery import load_adapter

    model = tiny_model(LLAMA)
    folder = whole_head(tmp_path / "whole")
    load_adapter(model, folder)
    with pytest.raises(SurgeryError, match="lm_head"):
        save_vllm_adapter(model, tmp_path / "lora")
    report, _, tensors = written(model, tmp_path / "lora", rank=512)
    assert report.summary["largest_layer_error"] < 1e-5
    copy = load_file(folder / "adapter_model.safetensors")["base_model.model.lm_head.weight"]
    found = (
        tensors["base_model.model.lm_head.lora_B.weight"]
        @ tensors["base_model.model.lm_head.lora_A.weight"]
    )
    base = tiny_model(LLAMA).lm_head.weight.detach()
    torch.testing.assert_close(found, copy - base, rtol=1e-3, atol=1e-5)


def whole_head(folder: Path) -> Path:
    """An adapter folder of q_proj, and of a head that was trained whole."""
    from safetensors.torch import save_file

    save_adapter(adapted(["q_proj"]), folder)
    (folder / "MANIFEST.json").unlink()
    tensors = load_file(folder / "adapter_model.safetensors")
    head = tiny_model(LLAMA).lm_head.weight.detach()
    draw = torch.Generator().manual_seed(1)
    tensors["base_model.model.lm_head.weight"] = head + torch.randn(head.shape, generator=draw)
    save_file(tensors, folder / "adapter_model.safetensors")
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text()) | {"modules_to_save": ["lm_head"]}
    path.write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(
    ("config", "targets", "word"),
    [
        (FAMILY_CONFIGS["gpt2"], ["q_proj"], "GPT-2"),
        (LLAMA, ["embed_tokens"], "embed_tokens"),
        (FAMILY_CONFIGS["llama-scaled-tied"], ["lm_head"], "lm_head"),
    ],
)
def test_what_these_engines_have_no_place_for_is_refused(tmp_path, config, targets, word):
    model = adapted(targets, config, tied="untie")
    for rank in (None, 8):
        with pytest.raises(SurgeryError, match=word):
            save_vllm_adapter(model, tmp_path / "lora", rank=rank)
    for rank in (0, 513):
        with pytest.raises(SurgeryError, match=str(rank)):
            save_vllm_adapter(model, tmp_path / "lora", rank=rank)


def test_the_command_says_how_it_is_served(tmp_path):
    model = adapted(["q_proj"])
    save_adapter(model, tmp_path / "adapter")
    remove_lora(model)
    save_model(model, tmp_path / "base")
    arguments = ["export", tmp_path / "base", "--adapter", tmp_path / "adapter"]
    _, said = called(*arguments, "--format", "vllm", "--out", tmp_path / "lora")
    for part in ("vllm serve", "--enable-lora", f"={tmp_path / 'lora'}", "--max-lora-rank 8"):
        assert part in " ".join(said.split())
    called(*arguments, "--rank", 8, "--out", tmp_path / "a.gguf", check=1)
    called("export", tmp_path / "base", "--format", "vllm", "--out", tmp_path / "no", check=1)
