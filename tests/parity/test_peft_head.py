"""PEFT's default save of an adapter on the head writes the head's own matrix beside it."""

import peft
import pytest
import torch
from helpers.models import FAMILY_CONFIGS, assert_equal_logits, random_ids, tiny_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from nanogpt_surgery import SurgeryError, load_adapter, save_model, tensor_hashes

pytestmark = [  # PEFT's own, none of which ours can help
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`"),
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True` and a tied layer"),
]


def saved_by_peft(name, folder):
    """A transformers model with an adapter on its head, saved as PEFT does by default."""
    save_model(tiny_model(FAMILY_CONFIGS[name]), folder / "base")
    base = AutoModelForCausalLM.from_pretrained(folder / "base").eval()
    targets = ["lm_head", "o_proj"] if name.startswith("llama") else ["lm_head"]
    config = peft.LoraConfig(
        r=3, lora_alpha=5, target_modules=targets, init_lora_weights=False, task_type="CAUSAL_LM"
    )
    torch.manual_seed(0)
    adapted = peft.get_peft_model(base, config).eval()
    adapted.save_pretrained(folder / "adapter")
    keys = load_file(folder / "adapter" / "adapter_model.safetensors").keys()
    assert any(key.endswith("lm_head.base_layer.weight") for key in keys)
    return adapted


@pytest.mark.parametrize("name", ["gpt2", "gpt2-gelu-untied", "llama", "llama-scaled-tied"])
def test_it_is_read_and_the_copy_is_only_compared(name, tmp_path):
    adapted = saved_by_peft(name, tmp_path)
    model, ids = tiny_model(FAMILY_CONFIGS[name]), random_ids(FAMILY_CONFIGS[name], 2, 9)
    plain, before = model(ids), tensor_hashes(model)
    load_adapter(model, tmp_path / "adapter", tied="untie")
    assert_equal_logits(model(ids), adapted(ids).logits)
    assert (model(ids) - plain).abs().max() > 0.1 * plain.std()
    after = tensor_hashes(model)
    assert set(before.values()) <= set(after.values()), "a tensor of the base was replaced"


def test_a_copy_of_another_model_s_head_is_refused(tmp_path):
    saved_by_peft("llama", tmp_path)
    model = tiny_model(FAMILY_CONFIGS["llama"], seed=1)
    with pytest.raises(SurgeryError, match=r"own lm_head"):
        load_adapter(model, tmp_path / "adapter", tied="untie")


def test_a_copy_of_what_the_model_has_not_is_refused(tmp_path):
    saved_by_peft("llama", tmp_path)
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(path)
    tensors["base_model.model.model.head.base_layer.weight"] = torch.ones(3, 4)
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(SurgeryError, match=r"\bhead\b"):
        load_adapter(tiny_model(FAMILY_CONFIGS["llama"]), tmp_path / "adapter", tied="untie")
