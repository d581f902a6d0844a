"""A model folder and an adapter folder become a merged one: planned, measured, in which files."""

import json
from dataclasses import replace

import pytest
import torch
from helpers.adapters import adapted, attach_adapter
from helpers.merged_folders import bytes_of, model_and_adapter
from helpers.models import CONFIGS, train_a_little
from safetensors.torch import load_file, save_file

from nanogpt_surgery import (
    SurgeryError,
    SurgeryWarning,
    inject_lora,
    open_model,
    remove_lora,
    save_adapter,
    save_model,
)
from nanogpt_surgery.cli.framework.app import run as surgery
from nanogpt_surgery.files.atomic import MANIFEST
from nanogpt_surgery.files.writing import write_json
from nanogpt_surgery.formats.folders.merging import merge_adapter, merge_into_gguf
from nanogpt_surgery.history.folder_history import folder_log, undo_folder
from nanogpt_surgery.lora.several import lora_layers
from nanogpt_surgery.lora.stored_adapter import extract_adapter


@pytest.fixture
def place(tmp_path):
    return model_and_adapter(tmp_path)


def test_an_adapter_for_another_base_takes_force(place):
    merge_adapter(place / "model", place / "adapter")
    with pytest.raises(SurgeryError, match="another"):
        merge_adapter(place / "model", place / "adapter")
    with pytest.warns(SurgeryWarning):
        merge_adapter(place / "model", place / "adapter", force=True)


def test_the_files_of_a_foreign_folder_stay_but_for_the_weights(place):
    """Shards become one file, and come back; a config keeps what it says."""
    model = place / "model"
    tensors = load_file(model / "model.safetensors")
    names = sorted(tensors)
    index = {"weight_map": {}}
    for number, part in enumerate((names[::2], names[1::2])):
        file = f"model-0000{number + 1}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, model / file)
        index["weight_map"] |= dict.fromkeys(part, file)
    (model / "model.safetensors").unlink()
    (model / MANIFEST).unlink()
    write_json(model / "model.safetensors.index.json", index)
    config = json.loads((model / "config.json").read_text())
    config |= {"transformers_version": "4.1", "torch_dtype": config.pop("dtype")}
    write_json(model / "config.json", config)
    first = bytes_of(model)
    merge_adapter(model, place / "adapter", dtype="bfloat16", force=True)
    assert {n for n in bytes_of(model) if "safetensors" in n} == {"model.safetensors"}
    now = json.loads((model / "config.json").read_text())
    assert now == config | {"tie_word_embeddings": False, "torch_dtype": "bfloat16"}
    assert not (model / MANIFEST).exists()
    undo_folder(model)
    assert bytes_of(model) == first


def test_the_precision_is_chosen_and_its_loss_is_told(place):
    model = place / "model"
    whole = merge_adapter(model, place / "adapter", place / "whole")
    half = merge_adapter(model, place / "adapter", place / "half", dtype="bfloat16", tolerance=1)
    assert {t.dtype for t in load_file(place / "half" / "model.safetensors").values()} == {
        torch.bfloat16
    }
    assert half.summary["kl"] > 1000 * whole.summary["kl"]
    assert all(row["largest error"] > 0 and row["change kept"] < 1 for row in half.rows)
    exact = adapted(CONFIGS["llama-scaled-tied"], ["q_proj", "lm_head"])
    layer = lora_layers(exact)["lm_head"]
    wanted = (layer.original_layer.weight + layer.delta_weight()).bfloat16()
    assert torch.equal(open_model(place / "half")[0].lm_head.weight, wanted), "rounded once"
    first = bytes_of(model)
    with pytest.raises(SurgeryError, match="nats"):
        merge_adapter(model, place / "adapter", dtype="bfloat16", tolerance=1e-9)
    assert bytes_of(model) == first
    assert folder_log(place / "half").rows[0]["state"] == "done, cannot be undone"


def test_a_merge_that_would_change_no_weight_is_refused(place):
    """An adapter that was never trained, and one that rounding swallows, whose KL is small."""
    save_model(open_model(place / "model")[0].bfloat16(), place / "half")
    for base, name, size in (("model", "newborn", 0.0), ("half", "faint", 3e-5)):
        model = open_model(place / base)[0].float()
        inject_lora(model, "q_proj", rank=2)
        train_a_little(model, size=size)
        save_adapter(model, place / name)
    first = bytes_of(place)
    with pytest.raises(SurgeryError, match="newborn would change no weight: ΔW is 0 in all 2"):
        merge_adapter(place / "model", place / "newborn")
    with pytest.raises(SurgeryError, match=r"lost in the rounding to bfloat16[\s\S]*float32"):
        merge_adapter(place / "half", place / "faint")
    assert bytes_of(place) == first
    merge_adapter(place / "model", place / "newborn", place / "same", force=True)
    report = merge_adapter(place / "half", place / "faint", place / "other", dtype="float32")
    assert all(0 < row["weights changed"] <= 1 for row in report.rows)


def test_a_module_replaced_whole_is_a_change(place):
    """The adapter's B is 0, and its head is another one."""
    model, _ = open_model(place / "model")
    inject_lora(model, "q_proj", rank=2)
    head = {"lm_head.weight": torch.randn(model.lm_head.weight.shape)}
    adapter = replace(extract_adapter(model), whole=head, tied="untie")
    remove_lora(model)
    attach_adapter(model, adapter)
    save_adapter(model, place / "head")
    merge_adapter(place / "model", place / "head", place / "merged")
    merged, _ = open_model(place / "merged")
    assert torch.equal(merged.lm_head.weight, head["lm_head.weight"])


def test_a_plan_says_what_survives_and_writes_nothing(place):
    first = bytes_of(place)
    plan = merge_adapter(place / "model", place / "adapter", dtype="float16", plan=True)
    assert bytes_of(place) == first
    assert not (place / "model" / "operations").exists()
    assert {"bfloat16", "float16", "int8", "int4"} <= plan.rows[0].keys()
    merge_adapter(place / "model", place / "adapter", dtype="float16", tolerance=1)
    header = 4096
    size = (place / "model" / "model.safetensors").stat().st_size
    assert abs(size - header - plan.summary["model_bytes"]) < header
    kept = folder_log(place / "model").summary["kept_bytes"]
    assert abs(kept - plan.summary["kept_originals_bytes"]) < header


@pytest.mark.parametrize("out", ["model", "other/../model", "link"])
def test_merging_over_the_model_itself_is_refused_since_it_has_no_undo(place, out):
    (place / "other").mkdir()
    (place / "link").symlink_to(place / "model")
    before = bytes_of(place / "model")
    for plan in (True, False):
        with pytest.raises(SurgeryError, match=r"(?s)the model itself.*in place, with undo"):
            merge_adapter(place / "model", place / "adapter", place / out, plan=plan)
    assert bytes_of(place / "model") == before


def test_from_the_command_line(place, capsys):
    model, first = str(place / "model"), bytes_of(place / "model")
    (place / "probe.txt").write_text("text")
    surgery(["merge", model, str(place / "adapter"), "--plan", "--json"])
    assert "lowest_int4" in json.loads(capsys.readouterr().out)
    with pytest.raises(SystemExit):
        surgery(["merge", model, str(place / "adapter"), "--probe", str(place / "probe.txt")])
    assert "no tokenizer" in capsys.readouterr().err
    surgery(["merge", model, str(place / "adapter"), "--json"])
    assert json.loads(capsys.readouterr().out)["measured_on"] == "64 random tokens"
    surgery(["undo", model])
    assert bytes_of(place / "model") == first
    surgery(["redo", model, "--json"])
    surgery(["undo", model])
    capsys.readouterr()
    surgery(["log", model])
    out = capsys.readouterr().out
    assert "can redo: merge" in out
    with pytest.raises(SystemExit):
        surgery(["undo", model])
    assert "no operation to undo" in capsys.readouterr().err
    surgery(["merge", model, str(place / "adapter"), "--drop-originals"])
    assert "cannot be undone" in capsys.readouterr().err


def save_large_adapter(place):
    """An adapter that makes weights beyond float16 in one layer."""
    model, _ = open_model(place / "model")
    inject_lora(model, "q_proj")
    train_a_little(model)
    layer = lora_layers(model)["layers.0.self_attn.q_proj"]
    layer.lora_A.data[:, 0], layer.lora_B.data[0] = 3e3, 3e3
    save_adapter(model, place / "large")


def test_a_merge_that_makes_infinite_weights_is_refused_before_anything_is_written(place):
    """Whatever tolerance is given for the probe."""
    save_large_adapter(place)
    first = bytes_of(place)
    wrong = r"NaN or infinite in 1 layers \(layers\.0\.self_attn\.q_proj\); float16 ends"
    with pytest.raises(SurgeryError, match=wrong) as caught:
        merge_adapter(place / "model", place / "large", place / "out", dtype="float16", tolerance=9)
    assert "float32" in caught.value.hint
    assert bytes_of(place) == first
    merge_adapter(place / "model", place / "large", place / "out", dtype="bfloat16", force=True)


def test_a_gguf_whose_type_ends_below_the_weights_is_refused_with_their_layer(place):
    save_large_adapter(place)
    first = bytes_of(place)
    with pytest.raises(SurgeryError, match=r"in 1 layers \(layers\.0\.self_attn\.q_proj\)"):
        merge_into_gguf(place / "model", place / "large", place / "out.gguf", "F16", tolerance=9)
    assert bytes_of(place) == first
