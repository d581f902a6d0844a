"""Folders as transformers writes them open here with equal logits, mapped and not read twice."""

import json
import subprocess
import sys

import pytest
import torch
from helpers.models import CONFIGS, FAMILY_CONFIGS, assert_equal_logits, random_ids, tiny_model
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
)

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

SIZES = {
    "vocab_size": 61,
    "hidden_size": 24,
    "intermediate_size": 36,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
THEIRS = {
    "gpt2": GPT2Config(vocab_size=61, n_embd=24, n_head=6, n_layer=3, n_positions=32),
    "gpt2-untied": GPT2Config(
        vocab_size=61, n_embd=24, n_head=6, n_layer=3, n_positions=32, tie_word_embeddings=False
    ),
    "llama-2": LlamaConfig(**SIZES, rms_norm_eps=3e-3),
    "llama-3.2": LlamaConfig(
        **SIZES, head_dim=8, tie_word_embeddings=True, rope_parameters=LLAMA3, rms_norm_eps=3e-3
    ),
    "mistral": MistralConfig(**SIZES, sliding_window=None, rms_norm_eps=3e-3),
    "mistral-wide-window": MistralConfig(**SIZES, sliding_window=32),
    "qwen2": Qwen2Config(**SIZES, tie_word_embeddings=True),
    "qwen2.5-untied": Qwen2Config(**SIZES, tie_word_embeddings=False),
    "qwen3": Qwen3Config(**SIZES, head_dim=10),
}


def their_model(config):
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            scale = 0.3 if parameter.dim() == 1 else parameter.shape[-1] ** -0.5
            parameter.normal_(1.0 if "norm.weight" in name or "ln_" in name else 0.0, scale)
    return model


@pytest.mark.parametrize("kind", THEIRS)
def test_their_folders_open_with_equal_logits(kind, tmp_path):
    theirs = their_model(THEIRS[kind])
    theirs.save_pretrained(tmp_path)
    ours, tokenizer = open_model(tmp_path)
    ids = torch.randint(61, (2, 32), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert_equal_logits(ours(ids), theirs(ids).logits)
    assert tokenizer is None
    assert not ours.training


@pytest.mark.parametrize("kind", ["gpt2", "llama-3.2"])
def test_shards_open_like_one_file(kind, tmp_path):
    theirs = their_model(THEIRS[kind])
    theirs.save_pretrained(tmp_path / "one")
    theirs.save_pretrained(tmp_path / "many", max_shard_size="10kB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 2
    ids = random_ids(open_model(tmp_path / "one")[0].config, 1, 9)
    one, many = (open_model(tmp_path / name)[0] for name in ("one", "many"))
    assert torch.equal(one(ids), many(ids))


@pytest.mark.parametrize("kind", CONFIGS)
def test_what_is_saved_opens_to_the_bit_and_in_any_dtype(kind, tmp_path):
    model = tiny_model(CONFIGS[kind])
    save_model(model, tmp_path / "m")
    again, rounded = open_model(tmp_path / "m")[0], open_model(tmp_path / "m", torch.bfloat16)[0]
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
        assert torch.equal(rounded.state_dict()[name], tensor.to(torch.bfloat16)), name
    assert again.config == model.config
    assert (again.lm_head.weight is again.embed_tokens.weight) == model.config.tie_head


def test_the_dtype_is_the_stored_one(tmp_path):
    save_model(tiny_model(FAMILY_CONFIGS["llama"]).to(torch.bfloat16), tmp_path / "m")
    assert {p.dtype for p in open_model(tmp_path / "m")[0].parameters()} == {torch.bfloat16}


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


_PEAK = """
import resource, sys, torch
from nanogpt_surgery import open_model
import nanogpt_surgery.formats.placing, nanogpt_surgery.formats.huggingface.tokenizer_files
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
model = open_model(sys.argv[1], getattr(torch, sys.argv[2]))[0]
total = sum(float(p.sum()) for p in model.parameters())  # every page is touched
weights = sum(p.numel() * p.element_size() for p in model.parameters())
after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print((after - before) * 1024 / weights)
"""


@pytest.mark.parametrize(
    ("family", "dtype"),
    [("llama", "float32"), ("llama", "bfloat16"), ("gpt2", "float32"), ("gpt2", "bfloat16")],
)
def test_peak_memory_is_at_most_the_weights_and_a_fifth(family, dtype, tmp_path):
    sizes = {"n_embd": 512, "n_head": 8, "n_layer": 4, "block_size": 128}
    config = GPTConfig.for_family(family, vocab_size=25_000, **sizes, tie_head=True)
    write_model_files(SimpleGPT.from_config(config), tmp_path)
    command = [sys.executable, "-c", _PEAK, str(tmp_path), dtype]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=True)
    assert float(done.stdout) <= 1.2


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
        ({"model_type": ["llama"]}, "is not one we have"),
        ({"hidden_act": "relu"}, "hidden_act 'relu'"),
        ({"rope_scaling": {"type": "yarn", "factor": 2.0}}, "rope_type 'yarn'"),
        ({"rope_scaling": {"rope_type": "llama3"}}, "lacks factor, low_freq_factor"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor 0.5"),
        ({"mlp_bias": True}, "mlp_bias without attention_bias"),
        ({"layer_types": ["sliding_attention"]}, "layer_types"),
        ({"pretraining_tp": 2}, "pretraining_tp 2"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"model_type": "mistral", "sliding_window": 4}, "sliding_window 4, below its context"),
        ({"hidden_size": "24"}, "hidden_size is '24'"),
        ({"rms_norm_eps": "small"}, "rms_norm_eps is 'small'"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings is 'yes'"),
        ({"rope_theta": "big"}, "rope_theta is 'big'"),
        ({"hidden_size": None}, "lacks hidden_size"),
        ({"num_hidden_layers": 10**9}, "1,000,000,000 layers"),
        ({"head_dim": 10**12}, "weights, its files hold"),
        ({"intermediate_size": 29}, "the config says"),
        ({"num_hidden_layers": 3}, "layers.2.* is missing"),
        ({"num_hidden_layers": 1}, "model.layers.1.*is unknown"),
    ],
)
def test_what_would_change_the_result_or_cannot_be_is_refused(llama_folder, changes, message):
    with pytest.raises(SurgeryError, match=message):
        open_model(edited(llama_folder, **changes))


def test_an_absent_sliding_window_is_mistrals_4096(llama_folder):
    edited(llama_folder, model_type="mistral", max_position_embeddings=8192)
    with pytest.raises(SurgeryError, match="sliding_window 4096, below its context of 8192"):
        open_model(llama_folder)


def test_code_in_a_folder_is_reported_and_not_run(llama_folder):
    (llama_folder / "canary.py").write_text("raise SystemExit('the canary ran')")
    edited(llama_folder, auto_map={"AutoModelForCausalLM": "canary.Model"})
    with pytest.warns(SurgeryWarning, match="code of its own"):
        open_model(llama_folder)


def test_a_head_that_is_stored_although_it_is_tied_must_be_the_embedding(tmp_path):
    model = tiny_model(FAMILY_CONFIGS["llama"])
    with torch.no_grad():
        model.lm_head.weight.copy_(model.embed_tokens.weight)
    save_model(model, tmp_path / "m")
    opened = open_model(edited(tmp_path / "m", tie_word_embeddings=True))[0]
    assert opened.lm_head.weight is opened.embed_tokens.weight
    save_model(tiny_model(FAMILY_CONFIGS["llama"]), tmp_path / "n")
    with pytest.raises(SurgeryError, match=r"lm_head\.weight differs from the embedding"):
        open_model(edited(tmp_path / "n", tie_word_embeddings=True))


@pytest.mark.parametrize("file", ["config.json", "tokenizer.json"])
@pytest.mark.parametrize("bomb", [b"[" * 300_000, b"[1]", b"{", b"\xff", b'{"a":' + b"9" * 9999])
def test_json_bombs_are_refused(llama_folder, file, bomb):
    (llama_folder / "MANIFEST.json").unlink()
    (llama_folder / file).write_bytes(bomb)
    with pytest.raises(SurgeryError):
        open_model(llama_folder)
