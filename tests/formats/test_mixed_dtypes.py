"""A base stored in several dtypes: a merge rounds what it changes, and nothing else."""

import json

import pytest
import torch
from operated import train_updates
from operated_folders import bytes_of
from safetensors.torch import load_file, save_file
from tiny import FAMILY_CONFIGS, tiny_model

from nanogpt_surgery import (
    SurgeryError,
    inject_lora,
    open_model,
    save_adapter,
    save_model,
)
from nanogpt_surgery.files import MANIFEST
from nanogpt_surgery.formats.folder_operation import undo_folder
from nanogpt_surgery.formats.merging import merge_adapter, plan_merge
from nanogpt_surgery.lora.lora_layer import lora_layers

WEIGHTS = "model.safetensors"
SUMMED = "model.layers.1.self_attn.q_proj.weight"
HEAD = "lm_head.weight"
GPT2 = "transformer.h.1.attn.c_attn.weight"


def write_mixed(folder, config="llama", kept=torch.float32):
    """A model folder whose matrices are bfloat16; the head and every vector are `kept`."""
    save_model(tiny_model(FAMILY_CONFIGS[config]).bfloat16(), folder)
    exact = {
        name: tensor.to(kept) + torch.rand_like(tensor.to(kept)) * 1e-3
        if tensor.dim() == 1 or name == HEAD
        else tensor
        for name, tensor in load_file(folder / WEIGHTS).items()
    }
    (folder / MANIFEST).unlink()
    save_file(exact, folder / WEIGHTS, {"format": "pt"})
    return exact


def write_adapter(base, folder, targets):
    """An adapter for a base, and what W + ΔW is, in float32, by our name."""
    model, _ = open_model(base, torch.float32)
    inject_lora(model, targets, rank=2, tied="untie")
    train_updates(model)
    save_adapter(model, folder)
    layers = lora_layers(model).items()
    return {n: (w.original_layer.weight + w.delta_weight()).detach() for n, w in layers}


@pytest.mark.parametrize("out", [None, "merged"])
@pytest.mark.parametrize("config", ["llama", "gpt2-gelu-untied"])
def test_what_has_no_update_keeps_its_bits(tmp_path, config, out):
    first = write_mixed(tmp_path / "base", config)
    sums = write_adapter(tmp_path / "base", tmp_path / "adapter", "q_proj")
    before = bytes_of(tmp_path / "base")
    report = merge_adapter(
        tmp_path / "base", tmp_path / "adapter", out and tmp_path / out, tolerance=1
    )
    goal = tmp_path / (out or "base")
    now = load_file(goal / WEIGHTS)
    assert now.keys() == first.keys()
    touched = [name for name in first if "q_proj" in name or "c_attn.weight" in name]
    assert len(touched) == 2
    for name, tensor in first.items():
        assert now[name].dtype == tensor.dtype, name
        assert torch.equal(now[name], tensor) == (name not in touched), name
    summed = sums["layers.1.self_attn.q_proj"].bfloat16()
    stored = now[SUMMED] if config == "llama" else now[GPT2].t()[: len(summed)]
    assert torch.equal(stored, summed), "rounded once, to its own dtype"
    assert json.loads((goal / "config.json").read_text())["dtype"] == "bfloat16"
    assert report.summary["dtype"] == "bfloat16 and float32"
    if out is None:
        undo_folder(goal)
        assert bytes_of(goal) == before


def test_each_merged_weight_is_rounded_to_its_own_dtype(tmp_path):
    write_mixed(tmp_path / "base")
    sums = write_adapter(tmp_path / "base", tmp_path / "adapter", ["q_proj", "lm_head"])
    report = merge_adapter(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", tolerance=1)
    now = load_file(tmp_path / "out" / WEIGHTS)
    assert torch.equal(now[SUMMED], sums["layers.1.self_attn.q_proj"].bfloat16())
    assert torch.equal(now[HEAD], sums["lm_head"])
    rows = {row["layer"]: row for row in report.rows}
    assert rows["lm_head"]["dtype"] == "float32"
    assert rows["lm_head"]["energy left"] > 0.9999999
    assert rows["layers.1.self_attn.q_proj"]["dtype"] == "bfloat16"
    assert rows["layers.1.self_attn.q_proj"]["energy left"] < 0.99999


def test_a_dtype_that_is_asked_for_is_that_of_every_tensor(tmp_path):
    first = write_mixed(tmp_path / "base")
    write_adapter(tmp_path / "base", tmp_path / "adapter", "q_proj")
    plan = plan_merge(tmp_path / "base", tmp_path / "adapter", dtype="float32")
    assert plan.summary["model_bytes"] == 4 * sum(tensor.numel() for tensor in first.values())
    merge_adapter(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", dtype="float32")
    now = load_file(tmp_path / "out" / WEIGHTS)
    assert {tensor.dtype for tensor in now.values()} == {torch.float32}
    assert torch.equal(now[HEAD], first[HEAD])


def test_a_plan_counts_each_dtype(tmp_path):
    first = write_mixed(tmp_path / "base")
    write_adapter(tmp_path / "base", tmp_path / "adapter", "q_proj")
    plan = plan_merge(tmp_path / "base", tmp_path / "adapter")
    assert plan.summary["model_bytes"] == sum(t.nbytes for t in first.values())
    assert plan.summary["dtype"] == "bfloat16 and float32"


def test_float64_is_refused_where_it_would_be_rounded_unasked(tmp_path):
    write_mixed(tmp_path / "base", kept=torch.float64)
    write_adapter(tmp_path / "base", tmp_path / "adapter", "q_proj")
    with pytest.raises(SurgeryError, match=r"float64[\s\S]*--dtype float32"):
        merge_adapter(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    merge_adapter(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", dtype="float32")


def test_opened_each_as_it_is_stored(tmp_path):
    first = write_mixed(tmp_path / "base")
    model, _ = open_model(tmp_path / "base", "each")
    assert model.lm_head.weight.dtype == torch.float32
    assert torch.equal(model.lm_head.weight, first[HEAD])
    assert torch.equal(model.layers[1].self_attn.q_proj.weight, first[SUMMED])
    usual = {p.dtype for p in open_model(tmp_path / "base")[0].parameters()}
    assert usual == {torch.bfloat16}, "by default as most numbers are stored"
