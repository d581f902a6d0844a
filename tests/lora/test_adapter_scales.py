"""Ranks, alphas and scales that differ from layer to layer, in one adapter_config.json."""

import json

import pytest
import torch
from helpers.adapters import attach_adapter
from helpers.models import (
    FAMILY_CONFIGS,
    assert_equal_logits,
    random_ids,
    tiny_model,
    train_a_little,
)
from peft import PeftModel
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from nanogpt_surgery import inject_lora, load_adapter, remove_lora, save_adapter, save_model
from nanogpt_surgery.lora.several import lora_layers
from nanogpt_surgery.lora.stored_adapter import StoredAdapter


class Nested(nn.Module):
    """Layers whose names end each other."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(4, 4)
        self.b = nn.ModuleDict({"proj": nn.Linear(4, 4)})
        self.c = nn.ModuleDict({"proj": nn.Linear(4, 4)})
        self.config, self.prepare_inputs_for_generation = {}, None  # PEFT asks for them

    def forward(self, x: Tensor) -> Tensor:
        return self.c["proj"](self.b["proj"](self.proj(x)))


def nested() -> Nested:
    torch.manual_seed(0)
    return Nested()


# The layers that have a value of their own; the others have the usual one.
OWN = {
    "both inner": {"b.proj": 3, "c.proj": 3},
    "outer, written first": {"^proj": 1, "b.proj": 3},
    "outer alone": {"^proj": 1},
    "all": {"^proj": 1, "b.proj": 2, "c.proj": 3},
}


@pytest.mark.filterwarnings("ignore:Could not find a config file")
@pytest.mark.parametrize("own", OWN.values(), ids=OWN)
def test_a_layer_whose_name_ends_another_keeps_its_own_rank_and_alpha(own, tmp_path):
    model, x = nested(), torch.randn(3, 4)
    alphas = {name: 3.0 * rank for name, rank in own.items()}
    inject_lora(model, "proj", rank=2, alpha=4, rank_pattern=own, alpha_pattern=alphas)
    train_a_little(model, size=0.3)
    carried = {name: (layer.rank, layer.alpha) for name, layer in lora_layers(model).items()}
    save_adapter(model, tmp_path / "adapter")
    again = nested()
    load_adapter(again, tmp_path / "adapter")
    read = {name: (layer.rank, layer.alpha) for name, layer in lora_layers(again).items()}
    assert read == carried
    theirs = PeftModel.from_pretrained(nested(), tmp_path / "adapter").eval()
    torch.testing.assert_close(theirs.get_base_model()(x), model(x))
    theirs.save_pretrained(tmp_path / "peft")  # which sorts the patterns
    load_adapter(back := nested(), tmp_path / "peft")
    torch.testing.assert_close(back(x), model(x))


@pytest.mark.parametrize("kind", [{}, {"pissa": True}, {"dora": True}], ids=str)
@pytest.mark.parametrize("one", [["q_proj"], ["v_proj", "o_proj"], ["q_proj", "k_proj", "v_proj"]])
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_a_rank_of_1_among_rslora_s_others_is_saved(name, one, kind, tmp_path):
    """At rank 1 both scales are the same number, so it does not tell which of them is meant."""
    config = FAMILY_CONFIGS[name]
    model, ids = tiny_model(config), random_ids(config, 2, 9)
    targets = ["q_proj", "k_proj", "v_proj", "o_proj"]
    ranks = dict.fromkeys(one, 1)
    inject_lora(model, targets, rank=4, alpha=6, rslora=True, rank_pattern=ranks, **kind)
    for layer in lora_layers(model).values():
        nn.init.normal_(layer.lora_B, std=0.2)
    adapted = model(ids)
    save_adapter(model, tmp_path / "adapter")
    assert json.loads((tmp_path / "adapter/adapter_config.json").read_text("utf-8"))["use_rslora"]
    load_adapter(again := tiny_model(config), tmp_path / "adapter")
    assert_equal_logits(again(ids), adapted)
    for path, layer in lora_layers(model).items():
        other = lora_layers(again)[path]
        assert (other.rank, other.alpha) == (layer.rank, pytest.approx(layer.alpha, rel=1e-12))
        assert other.scaling == pytest.approx(layer.scaling, rel=1e-12)


def test_scales_set_by_hand_beside_rslora_s_are_saved(tmp_path):
    config = FAMILY_CONFIGS["gpt2"]
    model, ids = tiny_model(config), random_ids(config, 2, 9)
    inject_lora(model, ["q_proj", "v_proj", "o_proj"], rank=3, rslora=True)
    train_a_little(model, size=0.2)
    lora_layers(model)["layers.0.self_attn.q_proj"].update.scaling = 0.7
    lora_layers(model)["layers.1.self_attn.o_proj"].update.scaling = 1.3
    save_adapter(model, tmp_path / "adapter")
    load_adapter(again := tiny_model(config), tmp_path / "adapter")
    assert_equal_logits(again(ids), model(ids))


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize("name", ["gpt2-gelu-untied", "llama"])
def test_modules_replaced_whole_are_an_adapter_without_any_update(name, tmp_path):
    config = FAMILY_CONFIGS[name]
    model, ids = tiny_model(config), random_ids(config, 2, 9)
    base = model(ids)
    attach_adapter(model, StoredAdapter({}, {"lm_head.weight": torch.randn(53, 24)}))
    adapted = model(ids)
    save_adapter(model, tmp_path / "adapter")
    remove_lora(model)
    assert torch.equal(model(ids), base)
    load_adapter(model, tmp_path / "adapter")
    assert torch.equal(model(ids), adapted)
    remove_lora(model)
    save_model(model, tmp_path / "base")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    theirs = PeftModel.from_pretrained(theirs, tmp_path / "adapter").eval()
    assert_equal_logits(theirs(ids).logits, adapted)
