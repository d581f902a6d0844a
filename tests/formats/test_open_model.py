"""Weights are mapped and not read twice; what would change the result is refused."""

import json
import subprocess
import sys

import pytest
import torch
from helpers.models import FAMILY_CONFIGS, tiny_model

from nanogpt_surgery import (
    GPTConfig,
    SimpleGPT,
    SurgeryError,
    SurgeryWarning,
    memory,
    open_model,
    save_model,
)
from nanogpt_surgery.formats.model_file import write_model_files


def test_saving_over_the_file_that_is_mapped_gives_the_right_bytes(tmp_path):
    save_model(tiny_model(FAMILY_CONFIGS["llama"], seed=1), tmp_path / "m")
    opened = open_model(tmp_path / "m")[0]
    expected = {name: tensor.clone() for name, tensor in opened.state_dict().items()}
    save_model(opened, tmp_path / "m")
    save_model(tiny_model(FAMILY_CONFIGS["llama"], seed=2), tmp_path / "other")
    other = open_model(tmp_path / "other")[0]
    save_model(other, tmp_path / "m")
    assert all(torch.equal(tensor, opened.state_dict()[name]) for name, tensor in expected.items())
    save_model(opened, tmp_path / "m")
    again = open_model(tmp_path / "m")[0].state_dict()
    assert all(torch.equal(tensor, again[name]) for name, tensor in expected.items())
    assert {path.name for path in tmp_path.iterdir()} == {"m", "other"}


def test_weights_that_cannot_be_mapped_are_counted_before_they_are_read(tmp_path, monkeypatch):
    model = tiny_model(FAMILY_CONFIGS["llama"])
    write_model_files(model, tmp_path)
    monkeypatch.setattr(memory, "WORTH_A_LOOK", 0)
    monkeypatch.setattr(memory, "available_memory", lambda: 0)
    open_model(tmp_path)
    file = tmp_path / "model.safetensors"
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = data[8 : 8 + length] + b" "  # the numbers lie one byte further on
    file.write_bytes(len(header).to_bytes(8, "little") + header + data[8 + length :])
    with pytest.raises(SurgeryError, match="weights"):
        open_model(tmp_path)
    monkeypatch.undo()
    again = open_model(tmp_path)[0].state_dict()
    assert all(torch.equal(again[name], tensor) for name, tensor in model.state_dict().items())


def test_training_an_opened_model_does_not_write_to_its_file(tmp_path):
    save_model(tiny_model(FAMILY_CONFIGS["llama"]), tmp_path / "m")
    before = (tmp_path / "m" / "model.safetensors").read_bytes()
    model = open_model(tmp_path / "m")[0]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    assert (tmp_path / "m" / "model.safetensors").read_bytes() == before


# Not ru_maxrss, which a process inherits from the one that starts it; once before, to load code.
_PEAK = """
import ctypes, gc, re, sys, torch
from pathlib import Path
from nanogpt_surgery import open_model
status = lambda key: int(re.search(key + r":\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
def opened():
    model = open_model(sys.argv[1], getattr(torch, sys.argv[2]))[0]
    total = sum(float(p.sum()) for p in model.parameters())  # every page is touched
    return sum(p.numel() * p.element_size() for p in model.parameters())
opened()
gc.collect()
ctypes.CDLL(None).malloc_trim(0)
Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
before = status("VmRSS")
weights = opened()
print((status("VmHWM") - before) * 1024 / weights)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="/proc says what the peak is")
@pytest.mark.parametrize(
    ("family", "dtype"),
    [("llama", "float32"), ("llama", "bfloat16"), ("gpt2", "float32"), ("gpt2", "bfloat16")],
)
def test_peak_memory_is_at_most_the_weights_and_a_fifth(family, dtype, tmp_path):
    sizes = {"n_embd": 512, "n_head": 8, "n_layer": 12, "block_size": 128}
    config = GPTConfig.for_family(family, vocab_size=25_000, **sizes, tie_head=True)
    write_model_files(SimpleGPT.from_config(config), tmp_path)
    command = [sys.executable, "-c", _PEAK, str(tmp_path), dtype]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=True)
    assert 0.5 < float(done.stdout) <= 1.2


def edited(folder, **changes):
    contents = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(contents))
    (folder / "MANIFEST.json").unlink(missing_ok=True)
    return folder


@pytest.fixture
def llama_folder(tmp_path):
    save_model(tiny_model(FAMILY_CONFIGS["llama"]), tmp_path / "m")
    return tmp_path / "m"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "mamba"}, "'mamba' is not one we have"),
        ({"model_type": None}, "None is not one we have"),
        ({"model_type": ["llama"]}, "llama"),
        ({"hidden_act": "relu"}, "hidden_act 'relu'"),
        ({"rope_scaling": {"type": "yarn", "factor": 2.0}}, "rope_type 'yarn'"),
        ({"rope_scaling": {"rope_type": "llama3"}}, "factor, low_freq_factor"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor 0.5"),
        ({"mlp_bias": True}, "mlp_bias.*attention_bias"),
        ({"layer_types": ["sliding_attention"]}, "layer_types"),
        ({"pretraining_tp": 2}, "pretraining_tp 2"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"model_type": "mistral", "sliding_window": 4}, "sliding_window 4"),
        ({"hidden_size": "24"}, "hidden_size.*'24'"),
        ({"rms_norm_eps": "small"}, "rms_norm_eps.*'small'"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings.*'yes'"),
        ({"rope_theta": "big"}, "rope_theta.*'big'"),
        ({"hidden_size": None}, "hidden_size"),
        ({"num_hidden_layers": 10**9}, "1,000,000,000"),
        ({"head_dim": 10**12}, r"\d{3},\d{3}"),
        ({"intermediate_size": 29}, r"_proj\.weight.*28.*29"),
        ({"num_hidden_layers": 3}, r"layers\.2\."),
        ({"num_hidden_layers": 1}, r"model\.layers\.1\."),
    ],
)
def test_what_would_change_the_result_or_cannot_be_is_refused(llama_folder, changes, message):
    with pytest.raises(SurgeryError, match=message):
        open_model(edited(llama_folder, **changes))


def test_an_absent_sliding_window_is_mistrals_4096(llama_folder):
    edited(llama_folder, model_type="mistral", max_position_embeddings=8192)
    with pytest.raises(SurgeryError, match=r"sliding_window 4096\D+8192"):
        open_model(llama_folder)


def test_code_in_a_folder_is_reported_and_not_run(llama_folder):
    (llama_folder / "canary.py").write_text("raise SystemExit('the canary ran')")
    edited(llama_folder, auto_map={"AutoModelForCausalLM": "canary.Model"})
    with pytest.warns(SurgeryWarning, match="auto_map"):
        open_model(llama_folder)


@pytest.mark.parametrize("file", ["config.json", "tokenizer.json"])
@pytest.mark.parametrize("bomb", [b"[" * 300_000, b"[1]", b"{", b"\xff", b'{"a":' + b"9" * 9999])
def test_json_bombs_are_refused(llama_folder, file, bomb):
    (llama_folder / "MANIFEST.json").unlink()
    (llama_folder / file).write_bytes(bomb)
    with pytest.raises(SurgeryError):
        open_model(llama_folder)
