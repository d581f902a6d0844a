"""A base stored in several dtypes: a merge rounds what it changes, and nothing else."""

import json

import gguf
import pytest
import torch
from gguf.quants import dequantize
from helpers.commands import called
from helpers.merged_folders import bytes_of
from helpers.models import FAMILY_CONFIGS, tiny_model, train_a_little
from safetensors.torch import load_file, save_file

from nanogpt_surgery import (
    SurgeryError,
    inject_lora,
    open_model,
    save_adapter,
    save_model,
)
from nanogpt_surgery.files.atomic import MANIFEST
from nanogpt_surgery.formats.folders.merging import merge_adapter
from nanogpt_surgery.history.folder_history import undo_folder
from nanogpt_surgery.lora.several import lora_layers

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
    train_a_little(model)
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
    assert rows["lm_head"]["change kept"] > 0.9999999
    assert rows["layers.1.self_attn.q_proj"]["dtype"] == "bfloat16"
    assert rows["layers.1.self_attn.q_proj"]["change kept"] < 0.99999


def test_a_dtype_that_is_asked_for_is_that_of_every_tensor(tmp_path):
    first = write_mixed(tmp_path / "base")
    write_adapter(tmp_path / "base", tmp_path / "adapter", "q_proj")
    plan = merge_adapter(tmp_path / "base", tmp_path / "adapter", dtype="float32", plan=True)
    assert plan.summary["model_bytes"] == 4 * sum(tensor.numel() for tensor in first.values())
    merge_adapter(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", dtype="float32")
    now = load_file(tmp_path / "out" / WEIGHTS)
    assert {tensor.dtype for tensor in now.values()} == {torch.float32}
    assert torch.equal(now[HEAD], first[HEAD])


def test_a_plan_counts_each_dtype(tmp_path):
    first = write_mixed(tmp_path / "base")
    write_adapter(tmp_path / "base", tmp_path / "adapter", "q_proj")
    plan = merge_adapter(tmp_path / "base", tmp_path / "adapter", plan=True)
    assert plan.summary["model_bytes"] == sum(t.nbytes for t in first.values())
    assert plan.summary["dtype"] == "bfloat16 and float32"


def test_float64_is_refused_where_it_would_be_rounded_unasked(tmp_path):
    write_mixed(tmp_path / "base", kept=torch.float64)
    write_adapter(tmp_path / "base", tmp_path / "adapter", "q_proj")
    with pytest.raises(SurgeryError, match=r"float64[\s\S]*dtype='float32'"):
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


def read_raw(path):
    """The numbers of a GGUF file in float64, and their types, as the `gguf` package reads them."""
    tensors = gguf.GGUFReader(path).tensors
    numbers = {t.name: torch.from_numpy(dequantize(t.data, t.tensor_type).copy()) for t in tensors}
    return numbers, {t.name: t.tensor_type.name for t in tensors}


@pytest.mark.parametrize("kept", [torch.float32, torch.float64])
@pytest.mark.parametrize("config", ["llama", "gpt2-gelu-untied", "qwen2-untied"])
def test_a_folder_written_from_mixed_dtypes_has_the_bits_of_its_source(tmp_path, config, kept):
    first = write_mixed(tmp_path / "base", config, kept)
    called("export", tmp_path / "base", "--format", "huggingface", "--out", tmp_path / "out")
    now = load_file(tmp_path / "out" / WEIGHTS)
    assert now.keys() == first.keys()
    for name, tensor in first.items():
        assert now[name].dtype == tensor.dtype, name
        assert torch.equal(now[name], tensor), name


STEPS = {"F32": 0.0, "F16": 2**-11, "BF16": 2**-8, "Q8_0": 0.51 / 127}


@pytest.mark.parametrize("form", STEPS)
def test_a_gguf_file_is_rounded_once_from_what_is_stored(tmp_path, form):
    first = write_mixed(tmp_path / "base")
    out, _ = called(
        "export", tmp_path / "base", "--format", form, "--out", tmp_path / "m.gguf", "--json"
    )
    numbers, _ = read_raw(tmp_path / "m.gguf")
    norm, matrix = "model.norm.weight", "model.layers.1.mlp.up_proj.weight"
    assert torch.equal(numbers["output_norm.weight"], first[norm]), "vectors stay float32"
    head = first[HEAD]
    stored = numbers["output.weight"].float()
    scale = head.abs().amax(-1, keepdim=True)
    move = float(((stored - head).abs() / scale).max())
    assert move <= STEPS[form]
    rows = {row["stored as"]: row["largest error"] for row in json.loads(out)["rows"]}
    assert rows["F32"] == 0
    assert (json.loads(out)["largest_logit_error"] == 0) == (form == "F32")
    if form in ("F16", "BF16"):
        assert rows[form] >= move > 0, "the error is that of the stored head, not of a rounded one"
    if form == "BF16":
        assert torch.equal(numbers["blk.1.ffn_up.weight"], first[matrix].float())


def test_a_gguf_file_is_written_again_from_the_numbers_it_holds(tmp_path):
    write_mixed(tmp_path / "base")
    called("export", tmp_path / "base", "--format", "F16", "--out", tmp_path / "a.gguf")
    called("export", tmp_path / "a.gguf", "--format", "F32", "--out", tmp_path / "b.gguf")
    numbers, types = read_raw(tmp_path / "a.gguf")
    again, _ = read_raw(tmp_path / "b.gguf")
    assert {types["output.weight"], types["output_norm.weight"]} == {"F16", "F32"}
    for name, tensor in numbers.items():
        assert torch.equal(again[name].float(), tensor.float()), name
    called("export", tmp_path / "a.gguf", "--format", "huggingface", "--out", tmp_path / "out")
    now = load_file(tmp_path / "out" / WEIGHTS)
    assert torch.equal(now["model.norm.weight"], numbers["output_norm.weight"])


def test_the_error_of_float64_is_that_of_its_rounding(tmp_path):
    write_mixed(tmp_path / "base", kept=torch.float64)
    out, _ = called(
        "export", tmp_path / "base", "--format", "F32", "--out", tmp_path / "m.gguf", "--json"
    )
    rows = json.loads(out)["rows"]
    assert 0 < rows[0]["largest error"] < 2**-23


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("form", ["huggingface", "F32", "Q8_0"])
def test_weights_that_are_not_finite_are_named_and_not_exported(tmp_path, form, value):
    first = write_mixed(tmp_path / "base")
    first["model.layers.1.mlp.up_proj.weight"][2, 3] = value
    save_file(first, tmp_path / "base" / WEIGHTS, {"format": "pt"})
    _, errors = called(
        "export", tmp_path / "base", "--format", form, "--out", tmp_path / "o", check=1
    )
    assert "layers.1.mlp.up_proj.weight" in errors
    assert not (tmp_path / "o").exists()


def test_a_base_that_is_not_finite_is_not_merged_into(tmp_path):
    first = write_mixed(tmp_path / "base")
    write_adapter(tmp_path / "base", tmp_path / "adapter", "q_proj")
    first["model.layers.0.mlp.up_proj.weight"][2, 3] = float("nan")
    save_file(first, tmp_path / "base" / WEIGHTS, {"format": "pt"})
    with pytest.raises(SurgeryError, match=r"layers\.0\.mlp\.up_proj"):
        merge_adapter(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", force=True)


def test_logits_that_are_not_finite_are_an_error(tmp_path):
    model = tiny_model(FAMILY_CONFIGS["llama"])
    with torch.no_grad():
        for layer in model.layers:
            layer.mlp.up_proj.weight *= 1e30
            layer.mlp.gate_proj.weight *= 1e30
    save_model(model, tmp_path / "base")
    _, errors = called(
        "export", tmp_path / "base", "--format", "F32", "--out", tmp_path / "o", check=1
    )
    assert "logits" in errors
    assert not (tmp_path / "o").exists()
