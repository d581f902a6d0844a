"""PEFT's `lora_bias`: what an update adds to a layer's bias; read, computed, merged, written."""

import peft
import pytest
import torch
from helpers.adapters import assert_same_bits, bits
from helpers.models import (
    CONFIGS,
    assert_equal_logits,
    random_ids,
    tiny_model,
    train_a_little,
)
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from nanogpt_surgery import (
    SurgeryError,
    blend_lora,
    inject_lora,
    load_adapter,
    lora_rows,
    merge_lora,
    open_model,
    save_adapter,
    save_lora_gguf,
    save_model,
    undo_lora,
)
from nanogpt_surgery.formats.folders.merging import merge_adapter
from nanogpt_surgery.generation.engine import chosen_engine
from nanogpt_surgery.lora.stored_adapter import extract_adapter
from nanogpt_surgery.surgery import ablate, combine, compress

pytestmark = [  # PEFT's own, none of which ours can help
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Adapter 'default'. . LoRA tensor.s. have invalid shape"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to True but the target module is"),
]
IDS = random_ids(CONFIGS["gpt2"], 2, 7)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A GPT-2, and an adapter of it that PEFT made with lora_bias, with PEFT's logits."""
    place = tmp_path_factory.mktemp("bias")
    save_model(tiny_model(CONFIGS["gpt2"]), place / "base")
    config = peft.LoraConfig(
        r=3, lora_alpha=5, lora_bias=True, task_type="CAUSAL_LM", fan_in_fan_out=True,
        target_modules=["c_attn", "c_proj"],
    )  # fmt: skip
    torch.manual_seed(0)
    adapted = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(place / "base"), config)
    train_a_little(adapted, size=0.3)
    adapted.eval().save_pretrained(place / "adapter")
    save_file({"logits": logits(adapted)}, place / "theirs.safetensors")
    return place


@torch.no_grad()
def logits(model, ids=IDS):
    out = model(ids)
    return getattr(out, "logits", out).contiguous()


def adapted(place):
    model, _ = open_model(place / "base")
    load_adapter(model, place / "adapter")
    return model, load_file(place / "theirs.safetensors")["logits"]


def test_it_is_read_computed_and_written(place, tmp_path):
    model, expected = adapted(place)
    assert_equal_logits(logits(model), expected)
    updates = extract_adapter(model).updates
    assert all(update.bias is not None for update in updates.values())
    save_adapter(model, tmp_path / "again")
    base = AutoModelForCausalLM.from_pretrained(place / "base")
    again = peft.PeftModel.from_pretrained(base, tmp_path / "again").eval()
    assert_equal_logits(logits(again), expected)
    with pytest.raises(SurgeryError, match="bias"):
        save_lora_gguf(model, tmp_path / "adapter.gguf")


def test_it_is_merged_blended_and_undone(place, tmp_path):
    model, expected = adapted(place)
    before = bits(model)
    merge_lora(model, probe=IDS)
    assert_equal_logits(logits(model), expected)
    undo_lora(model)
    assert_same_bits(model, before)
    blend_lora(model, {"default": 0.5})
    half = logits(model)
    merge_lora(model)
    assert_equal_logits(logits(model), half)
    report = merge_adapter(place / "base", place / "adapter", tmp_path / "merged")
    assert report.summary["kl"] < 1e-6
    assert_equal_logits(logits(open_model(tmp_path / "merged")[0]), expected)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    assert_equal_logits(logits(theirs), expected)


def test_rows_have_their_own(place):
    model, expected = adapted(place)
    inject_lora(model, "q_proj", rank=2, name="plain")
    train_a_little(model)
    plain = logits(model)
    with lora_rows(model, ["default", "plain"]):
        both = logits(model)
    assert_equal_logits(both[:1], expected[:1])
    assert_equal_logits(both[1:], plain[1:])


def test_a_layer_without_one_is_an_untouched_one(tmp_path):
    """PEFT has a bias beside each layer, zero where nothing is added; a base may have none."""
    model = tiny_model(CONFIGS["llama"])
    inject_lora(model, "q_proj", rank=2)
    train_a_little(model)
    save_adapter(model, tmp_path / "adapter")
    (tmp_path / "adapter" / "MANIFEST.json").unlink()
    file, config = (
        tmp_path / "adapter" / n for n in ("adapter_model.safetensors", "adapter_config.json")
    )
    config.write_text(config.read_text().replace('"r": 2', '"lora_bias": true, "r": 2'))
    tensors = load_file(file)
    with pytest.raises(SurgeryError, match=r"lora_B\.bias of length 60"):
        load_adapter(tiny_model(CONFIGS["llama"]), tmp_path / "adapter")
    names = [name.removesuffix(".weight") for name in tensors if "lora_B" in name]
    save_file(tensors | {f"{name}.bias": torch.zeros(60) for name in names}, file)
    again = tiny_model(CONFIGS["llama"])
    load_adapter(again, tmp_path / "adapter")
    assert torch.equal(logits(again), logits(model))
    save_file(tensors | {f"{name}.bias": torch.ones(60) for name in names}, file)
    with pytest.raises(SurgeryError, match=r"q_proj has no bias"):
        load_adapter(tiny_model(CONFIGS["llama"]), tmp_path / "adapter")


def test_a_direction_is_cut_from_the_biases_in_peft_too(place, tmp_path):
    model, direction = open_model(place / "base")[0], torch.randn(24)
    ablate(model, "cut", direction=direction)
    save_adapter(model, tmp_path / "cut")
    base = AutoModelForCausalLM.from_pretrained(place / "base")
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "cut").eval()
    assert_equal_logits(logits(theirs), logits(model))
    for block in theirs.base_model.model.transformer.h:
        for layer in (block.attn.c_proj, block.mlp.c_proj):
            out = layer(torch.randn(5, layer.in_features))
            assert (out @ direction).abs().max() <= 1e-6 * out.norm() * direction.norm()


@pytest.mark.parametrize("kind", ["combine", "compress"])
def test_adapters_made_of_it_keep_the_bias(kind, place):
    model, expected = adapted(place)
    if kind == "combine":
        combine(model, {"default": 2.0}, "made")
        blend_lora(model, {"made": 0.5})
    else:
        compress(model, "default", "made", energy=1.0)
    torch.testing.assert_close(logits(model), expected, atol=1e-4, rtol=1e-4)


def test_the_compiled_decoder_leaves_it_to_the_readable_code(place):
    model, _ = adapted(place)
    assert chosen_engine(model, "auto").name == "plain"
