import pytest
import torch
from helpers.adapters import EVERY_LINEAR, assert_same_bits, bits
from helpers.models import (
    CONFIGS,
    FAMILY_CONFIGS,
    assert_equal_logits,
    random_ids,
    tiny_model,
    train_a_little,
)
from torch import nn

from nanogpt_surgery import (
    LoRALinear,
    SurgeryError,
    disable_lora,
    inject_lora,
    merge_lora,
    remove_lora,
    swap_lora,
)
from nanogpt_surgery.lora.several import has_lora, lora_layers

EVERY_CONFIG = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
LLAMA = FAMILY_CONFIGS["llama"]


@EVERY_CONFIG
def test_removing_gives_back_the_very_same_tensors(config):
    model = tiny_model(config)
    model.norm.weight.requires_grad_(False)  # a choice of the user's, to be found again
    modules = dict(model.named_modules())
    tensors = dict(model.named_parameters(remove_duplicate=False))
    trainable = {name: p.requires_grad for name, p in tensors.items()}
    before = bits(model)
    inject_lora(model, EVERY_LINEAR, tied="untie")
    train_a_little(model)
    model(random_ids(config, 1, 5)).mean().backward()
    remove_lora(model)
    assert dict(model.named_modules()) == modules
    after = dict(model.named_parameters(remove_duplicate=False))
    assert list(after) == list(tensors)
    assert all(after[name] is tensors[name] for name in tensors)
    assert {name: p.requires_grad for name, p in after.items()} == trainable
    assert_same_bits(model, before)
    assert not has_lora(model)


@EVERY_CONFIG
def test_merging_computes_what_the_update_did(config):
    model = tiny_model(config)
    ids = random_ids(config, 2, 9)
    inject_lora(model, EVERY_LINEAR, rank=3, tied="untie")
    train_a_little(model)
    adapted = model(ids)
    merge_lora(model)
    assert not has_lora(model)
    assert_equal_logits(model(ids), adapted)


@EVERY_CONFIG
def test_merging_restores_what_can_be_trained(config):
    model = tiny_model(config)
    frozen = {"norm.weight", "layers.0.self_attn.q_proj.weight"}
    for name in frozen:
        model.get_parameter(name).requires_grad_(False)
    names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    inject_lora(model, EVERY_LINEAR, tied="untie")
    train_a_little(model)
    merge_lora(model)
    after = dict(model.named_parameters(remove_duplicate=False))
    assert list(after) == names
    assert {name for name, p in after.items() if not p.requires_grad} == frozen
    assert all(module.training == model.training for module in model.modules())


def test_merging_in_bfloat16_adds_in_float32():
    model = tiny_model(LLAMA).bfloat16()
    inject_lora(model, EVERY_LINEAR, tied="untie")
    train_a_little(model)
    exact = {
        name: layer.original_layer.weight.double()
        + layer.scaling * layer.lora_B.double() @ layer.lora_A.double()
        for name, layer in lora_layers(model).items()
    }
    merge_lora(model)
    for name, weight in exact.items():
        merged = model.get_submodule(name).weight
        assert merged.dtype == torch.bfloat16
        spacing = 2**-7 * 2 ** weight.abs().log2().floor()
        assert ((merged.double() - weight).abs() / spacing).max() <= 0.5 + 1e-3


@pytest.mark.parametrize("name", ["gpt2", "llama-scaled-tied", "qwen3"])
def test_a_tied_head_leaves_the_embedding_alone(name):
    config = FAMILY_CONFIGS[name]
    model = tiny_model(config)
    embedding, before = model.embed_tokens.weight, model.embed_tokens.weight.detach().clone()
    assert model.lm_head.weight is embedding
    inject_lora(model, "lm_head", tied="untie")
    train_a_little(model)
    adapted = model(random_ids(config, 1, 6))
    merge_lora(model)
    assert model.embed_tokens.weight is embedding
    assert torch.equal(embedding, before)
    assert model.lm_head.weight is not embedding
    assert_equal_logits(model(random_ids(config, 1, 6)), adapted)


def test_a_tied_head_is_tied_again_when_removed():
    model = tiny_model(FAMILY_CONFIGS["gpt2"])
    inject_lora(model, "lm_head", tied="untie")
    train_a_little(model)
    remove_lora(model)
    assert model.lm_head.weight is model.embed_tokens.weight


def two_adapters() -> nn.Module:
    model = tiny_model(LLAMA)
    for name, target in (("a", "q_proj"), ("b", "v_proj")):
        inject_lora(model, target, rank=2, name=name)
        train_a_little(model)
    return model


def test_removing_reports_what_left_and_what_is_left():
    model = two_adapters()
    report = remove_lora(model, "b")
    assert [(row["layer"], row["adapter"]) for row in report.rows] == [
        (f"layers.{i}.self_attn.v_proj", "b") for i in (0, 1)
    ]
    assert report.summary["layers"] == 2
    assert report.summary["active"] == "none"
    assert report.summary["trainable_parameters"] == 0
    assert "swap_lora(model, 'a')" in report.summary["next"]
    assert swap_lora(model, "a").summary.keys().isdisjoint({"next"})
    report = remove_lora(model)
    assert report.summary["trainable_parameters"] == model.n_parameters
    assert report.summary["total_parameters"] == model.n_parameters
    assert "next" not in report.summary


@pytest.mark.parametrize("force", [False, True])
def test_a_merge_of_nothing_is_refused(force):
    """The adapter that waits would leave without having been merged."""
    model = two_adapters()
    remove_lora(model, "b")
    with pytest.raises(SurgeryError) as caught:
        merge_lora(model, keep_originals=False, force=force)
    assert "swap_lora(model, 'a')" in caught.value.hint
    assert list(lora_layers(model)) == [f"layers.{i}.self_attn.q_proj" for i in (0, 1)]


@pytest.mark.parametrize(
    ("size", "reason"), [(0, "ΔW is 0"), (1e-7, "lost in the rounding to bfloat16")]
)
def test_a_merge_that_changes_no_weight_is_refused(size, reason):
    model = tiny_model(LLAMA).bfloat16()
    inject_lora(model, "q_proj", rank=2)
    train_a_little(model, size=size)
    before = bits(model)
    with pytest.raises(SurgeryError, match=reason) as caught:
        merge_lora(model)
    assert "force=True" in caught.value.hint
    assert_same_bits(model, before)
    merge_lora(model, force=True)
    assert not has_lora(model)


class Perceptron(nn.Module):
    """A module that is no language model."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 5, bias=False))
        self.head = nn.Linear(5, 3)
        self.norm = nn.BatchNorm1d(3)

    def forward(self, x):
        return self.norm(self.head(torch.tanh(self.body(x))))


def test_any_module_can_be_operated_on():
    torch.manual_seed(0)
    model, x = Perceptron().eval(), torch.randn(4, 6)
    base, before = model(x), bits(model)
    report = inject_lora(model, "all-linear", rank=2)
    assert [row["layer"] for row in report.rows] == ["body.0", "body.2", "head"]
    assert torch.equal(model(x), base)
    train_a_little(model)
    adapted = model(x)
    assert not torch.allclose(adapted, base, atol=1e-3)
    disable_lora(model)
    assert torch.equal(model(x), base)
    remove_lora(model)
    assert_same_bits(model, before)
    assert all(p.requires_grad for p in model.parameters())
    inject_lora(model, r"body\.\d", rank=2)
    train_a_little(model)
    adapted = model(x)
    merge_lora(model)
    torch.testing.assert_close(model(x), adapted)


def test_layers_inside_a_list_and_a_dict_are_replaced():
    model = nn.ModuleDict({"parts": nn.ModuleList([nn.Linear(3, 4), nn.Linear(4, 2)])})
    inject_lora(model, "parts.1", rank=2)
    assert isinstance(model["parts"][1], LoRALinear)
    assert type(model["parts"][0]) is nn.Linear
