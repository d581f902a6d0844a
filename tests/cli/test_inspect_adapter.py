"""`surgery inspect` of an adapter: norms, and on GPT-2 one update for up to three asked for."""

import json
from pathlib import Path

import pytest
import torch
from helpers.adapters import adapted, change_config, unsealed
from helpers.commands import called
from helpers.models import FAMILY_CONFIGS, tiny_model
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel

from nanogpt_surgery import inject_lora, save_adapter
from nanogpt_surgery.formats.peft.reading import TENSORS, read_adapter


@pytest.mark.parametrize("known", [True, False])
def test_a_fused_update_is_explained(tmp_path: Path, known: bool) -> None:
    """Also where nothing says what it was put together from, as in an adapter of peft's own."""
    model = tiny_model(FAMILY_CONFIGS["gpt2"])
    inject_lora(model, ["q_proj", "v_proj"], rank=2, alpha=4, rank_pattern={"v_proj": 3})
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.ones_(parameter)
    save_adapter(model, tmp_path / "a")
    if not known:
        (tmp_path / "a" / "surgery.json").unlink()
        (tmp_path / "a" / "MANIFEST.json").unlink()
    rows = json.loads(called("inspect", tmp_path / "a", "--json")[0])["rows"]
    assert [row["r"] for row in rows] == [5] * len(rows)
    assert [row["r of its parts"] for row in rows] == ["q_proj 2, v_proj 3"] * len(rows)
    [line] = [n for n in called("inspect", tmp_path / "a")[0].splitlines() if "c_attn is" in n]
    assert "q_proj, k_proj and v_proj" in line
    assert "A stacked" in line and "block diagonal" in line


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_parts_that_share_a_have_its_rank(tmp_path: Path) -> None:
    """As peft makes them; and beside them a layer that is not fused."""
    sizes = {"vocab_size": 30, "n_embd": 24, "n_head": 3, "n_layer": 1}
    model = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0))
    wanted = LoraConfig(r=4, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True)
    tuned = get_peft_model(model, wanted)
    tuned.save_pretrained(tmp_path / "a")
    rows = json.loads(called("inspect", tmp_path / "a", "--json")[0])["rows"]
    found = {row["layer"].rpartition(".")[2]: row["r of its parts"] for row in rows}
    assert found == {"c_attn": "q_proj 4, k_proj 4, v_proj 4", "c_fc": None}


def test_an_update_that_is_not_fused_needs_no_explanation(tmp_path: Path) -> None:
    model = tiny_model(FAMILY_CONFIGS["llama"])
    inject_lora(model, "q_proj", rank=2)
    save_adapter(model, tmp_path / "a")
    out, _ = called("inspect", tmp_path / "a")
    assert "c_attn" not in out and "parts" not in out


def test_norms_are_those_of_the_products(tmp_path: Path) -> None:
    """Several layers have one shape; one is no longer finite; alpha is below zero."""
    save_adapter(adapted(FAMILY_CONFIGS["llama"]), tmp_path / "a")
    change_config(unsealed(tmp_path / "a"), lora_alpha=-3)
    tensors = load_file(tmp_path / "a" / TENSORS)
    broken = "model.layers.1.self_attn.q_proj"
    tensors[f"base_model.model.{broken}.lora_A.weight"][0, 0] = torch.nan
    save_file(tensors, tmp_path / "a" / TENSORS)
    report = json.loads(called("inspect", tmp_path / "a", "--json")[0])
    rows = {row["layer"]: row for row in report["rows"]}
    assert report["layers that are not finite"] == 1
    assert rows.pop(broken)["norm of ΔW"] is None
    assert len({row["shape"] for row in rows.values()}) < len(rows)
    for name, update in read_adapter(tmp_path / "a").in_float32().updates.items():
        if name != broken:
            values = torch.linalg.svdvals(update.delta_weight.double())
            row = rows[name]
            assert row["norm of ΔW"] == pytest.approx(float(values.norm()), rel=1e-5)
            assert row["largest singular value"] == pytest.approx(float(values[0]), rel=1e-5)
            assert row["rank of ΔW"] == 3
