"""Adapter folders that PEFT writes with its less usual options: read with equal logits, or refused.

Each refusal says what the option did, and its next step leads to a folder that opens.
"""

import peft
import pytest
import torch
from helpers.models import (
    FAMILY_CONFIGS,
    assert_equal_logits,
    random_ids,
    tiny_model,
    train_a_little,
)
from torch import nn
from transformers import AutoModelForCausalLM

from nanogpt_surgery import (
    SurgeryError,
    load_adapter,
    merge_lora,
    open_model,
    save_adapter,
    save_model,
)

pytestmark = pytest.mark.filterwarnings("ignore")  # PEFT's own remarks, on ties above all


def saved_by_peft(name, folder, base=None, embeddings="auto", **options) -> nn.Module:
    """A transformers model with an adapter that has been trained, written by PEFT."""
    base = base or theirs(name, folder)
    options.setdefault("init_lora_weights", False)
    config = peft.LoraConfig(
        r=3, lora_alpha=5, task_type="CAUSAL_LM", fan_in_fan_out=name.startswith("gpt2"), **options
    )
    torch.manual_seed(0)
    adapted = peft.get_peft_model(base, config).eval()
    train_a_little(adapted)
    adapted.save_pretrained(folder / "adapter", save_embedding_layers=embeddings)
    return adapted


def theirs(name, folder) -> nn.Module:
    save_model(tiny_model(FAMILY_CONFIGS[name]), folder / "base")
    return AutoModelForCausalLM.from_pretrained(folder / "base").eval()


READ = {
    "a container": ("llama", {"modules_to_save": ["mlp"]}),
    "a container of one layer": ("qwen2", {"modules_to_save": ["layers.1"]}),
    "a container of GPT-2": ("gpt2", {"target_modules": ["c_attn"], "modules_to_save": ["mlp"]}),
    "tied targets": ("llama-scaled-tied", {"target_modules": ["lm_head"]}),
    "tied embedding": ("qwen2", {"target_modules": ["embed_tokens", "q_proj"]}),
    "tied modules": ("llama-scaled-tied", {"modules_to_save": ["lm_head"]}),
    "tied modules of GPT-2": ("gpt2", {"target_modules": ["c_fc"], "modules_to_save": ["lm_head"]}),
}


@pytest.mark.parametrize("case", READ)
def test_read_with_equal_logits_written_again_and_merged(case, tmp_path):
    name, options = READ[case]
    options = {"target_modules": ["q_proj"], "ensure_weight_tying": "tied" in case} | options
    if case == "a container of one layer":
        options |= {"layers_to_transform": [0]}
    adapted = saved_by_peft(name, tmp_path, **options)
    model, ids = tiny_model(FAMILY_CONFIGS[name]), random_ids(FAMILY_CONFIGS[name], 2, 9)
    plain, wanted = model(ids), adapted(ids).logits
    load_adapter(model, tmp_path / "adapter")
    assert_equal_logits(model(ids), wanted)
    assert (model(ids) - plain).abs().max() > 0.1 * plain.std()
    save_adapter(model, tmp_path / "again")
    back = peft.PeftModel.from_pretrained(theirs(name, tmp_path), tmp_path / "again").eval()
    assert_equal_logits(back(ids).logits, wanted)
    merge_lora(model)
    assert_equal_logits(model(ids), wanted)
    save_model(model, tmp_path / "merged")
    assert_equal_logits(open_model(tmp_path / "merged")[0](ids), wanted)


@pytest.mark.parametrize("name", ["gpt2", "llama", "llama-scaled-tied"])
def test_copies_of_the_base_that_were_asked_for_are_compared(name, tmp_path):
    targets = ["c_fc" if name == "gpt2" else "q_proj"]
    adapted = saved_by_peft(name, tmp_path, embeddings=True, target_modules=targets)
    model, ids = tiny_model(FAMILY_CONFIGS[name]), random_ids(FAMILY_CONFIGS[name], 2, 9)
    load_adapter(model, tmp_path / "adapter")
    assert_equal_logits(model(ids), adapted(ids).logits)
    with pytest.raises(SurgeryError, match="embed_tokens"):
        load_adapter(tiny_model(FAMILY_CONFIGS[name], seed=1), tmp_path / "adapter")


BOTH = ["lm_head", "embed_tokens"]
REFUSED = {
    "bias": ("gpt2", {"bias": "lora_only", "target_modules": ["c_attn"]}, "bias"),
    "tokens": ("llama", {"trainable_token_indices": [1, 2]}, "trainable_token_indices"),
    "pissa": ("llama", {"init_lora_weights": "pissa"}, "init_lora_weights 'pissa'"),
    "olora": ("llama", {"init_lora_weights": "olora"}, "init_lora_weights 'olora'"),
    "resized": ("llama", {}, r"53\D+61.*embed_tokens"),
    "resized, trained": ("llama", {"modules_to_save": BOTH}, r"lm_head\.modules_to_save"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_in_words_and_the_next_step_leads_on(case, tmp_path):
    name, options, match = REFUSED[case]
    base = theirs(name, tmp_path)
    if "resized" in case:
        base.resize_token_embeddings(61, mean_resizing=False)
    adapted = saved_by_peft(name, tmp_path, base, **({"target_modules": ["q_proj"]} | options))
    ids = random_ids(FAMILY_CONFIGS[name], 2, 9)
    wanted = adapted(ids).logits
    with pytest.raises(SurgeryError, match=match) as caught:
        load_adapter(tiny_model(FAMILY_CONFIGS[name]), tmp_path / "adapter")
    assert "PeftModel.from_pretrained(base, adapter).merge_and_unload()" in caught.value.hint
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    if "resized" in case:
        assert "base.resize_token_embeddings(n)" in caught.value.hint
        base.resize_token_embeddings(61, mean_resizing=False)
    merged = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").merge_and_unload()
    merged.save_pretrained(tmp_path / "folder")
    assert_equal_logits(open_model(tmp_path / "folder")[0](ids), wanted)


def test_a_module_that_peft_wraps_within_another_is_not_read_as_if_it_were_whole(tmp_path):
    """PEFT takes `c_attn` for an `attn` too; it cannot read what it wrote either."""
    saved_by_peft("gpt2", tmp_path, target_modules=["c_fc"], modules_to_save=["attn"])
    with pytest.raises(SurgeryError, match=r"c_attn\.\w+ by attn"):
        load_adapter(tiny_model(FAMILY_CONFIGS["gpt2"]), tmp_path / "adapter")
