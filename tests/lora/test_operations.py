import json

import pytest
import torch
from helpers.adapters import EVERY_LINEAR, assert_same_bits, bits
from helpers.models import CONFIGS, FAMILY_CONFIGS, random_ids, tiny_model, train_a_little
from torch import nn

from nanogpt_surgery import (
    LoRALinear,
    SimpleGPT,
    SurgeryError,
    disable_lora,
    enable_lora,
    inject_lora,
    merge_lora,
    remove_lora,
)
from nanogpt_surgery.lora.several import lora_layers

EVERY_CONFIG = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
LLAMA = FAMILY_CONFIGS["llama"]


def linears(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]


@EVERY_CONFIG
@pytest.mark.parametrize("training", [True, False])
def test_injecting_changes_no_logit(config, training):
    model = tiny_model(config).train(training)
    ids = random_ids(config, 2, 9)
    expected = model(ids)
    inject_lora(model, EVERY_LINEAR, tied="untie")
    assert all(module.training == training for module in model.modules())
    assert torch.equal(model(ids), expected)


def test_injecting_leaves_a_model_s_own_dropout_as_it_falls():
    model = SimpleGPT(31, 16, 2, 2, 12, dropout=0.3).train()
    ids = random_ids(model.config, 2, 9)
    torch.manual_seed(3)
    expected = model(ids)
    inject_lora(model, EVERY_LINEAR, tied="untie")
    torch.manual_seed(3)
    assert torch.equal(model(ids), expected)


@EVERY_CONFIG
def test_every_linear_can_be_adapted_and_shows_in_both_modes(config):
    """One layer at a time: the logits change when its update does, and come back without it."""
    model = tiny_model(config)
    ids = random_ids(config, 2, 7)
    base = model(ids)
    names = linears(model)
    assert len(names) == config.n_layer * (7 if config.mlp == "swiglu" else 6) + 1
    for name in names:
        inject_lora(model, name, rank=2, tied="untie")
        assert list(lora_layers(model)) == [name]
        train_a_little(model)
        for training in (True, False):
            model.train(training)
            change = (model(ids) - base).abs().max() / base.std()
            assert change > 1e-3, f"{name} does nothing in {'train' if training else 'eval'} mode"
            assert_reaches_the_update(model, ids, name)
        disable_lora(model)
        assert torch.equal(model(ids), base)
        remove_lora(model)


def assert_reaches_the_update(model: nn.Module, ids: torch.Tensor, name: str) -> None:
    layer = lora_layers(model)[name]
    model.zero_grad()
    model(ids).square().mean().backward()
    assert layer.lora_A.grad.abs().max() > 0
    assert layer.lora_B.grad.abs().max() > 0


@EVERY_CONFIG
def test_only_a_and_b_are_trained(config):
    model = tiny_model(config)
    inject_lora(model, "all-linear")
    train_a_little(model)
    model(random_ids(config, 2, 7)).square().mean().backward()
    updates = [p for layer in lora_layers(model).values() for p in (layer.lora_A, layer.lora_B)]
    trainable = [p for p in model.parameters() if p.requires_grad]
    assert {id(p) for p in trainable} == {id(p) for p in updates}
    assert all(p.grad is not None and p.grad.any() for p in updates)
    others = [p for p in model.parameters() if all(p is not u for u in updates)]
    assert others
    assert all(p.grad is None for p in others)


def test_modes_switch_nothing():
    model = tiny_model(LLAMA)
    inject_lora(model)
    train_a_little(model)
    ids = random_ids(LLAMA, 1, 8)
    before, adapted = bits(model), model(ids)
    for training in (True, False, True, False):
        model.train(training)
        assert torch.equal(model(ids), adapted)
        assert_same_bits(model, before)
        assert all(isinstance(layer, LoRALinear) for layer in lora_layers(model).values())


def test_disabled_is_the_base_and_enabled_the_same_as_before():
    model = tiny_model(LLAMA)
    ids = random_ids(LLAMA, 2, 8)
    base = model(ids)
    inject_lora(model, EVERY_LINEAR, tied="untie")
    train_a_little(model)
    adapted = model(ids)
    for verb, expected in [(disable_lora, base), (enable_lora, adapted)] * 2:
        for _ in range(2):
            verb(model)
            assert torch.equal(model(ids), expected)


def test_injecting_twice_is_refused():
    model = tiny_model(LLAMA)
    inject_lora(model, "q_proj")
    train_a_little(model)
    before, modules = bits(model), dict(model.named_modules())
    with pytest.raises(SurgeryError, match="'default', on 2 layers"):
        inject_lora(model, "q_proj")
    assert dict(model.named_modules()) == modules
    assert_same_bits(model, before)


@pytest.mark.parametrize("verb", [enable_lora, disable_lora, merge_lora, remove_lora])
def test_operations_without_a_lora_say_so(verb):
    with pytest.raises(SurgeryError) as caught:
        verb(tiny_model(LLAMA))
    assert "inject_lora" in caught.value.hint


@pytest.mark.parametrize(
    "wrong", [{"targets": "q_prj"}, {"rank": 0}, {"dropout": 2.0}, {"targets": ["q_proj", "x"]}]
)
def test_a_refused_injection_leaves_the_model_untouched(wrong):
    model = tiny_model(LLAMA)
    modules, before = dict(model.named_modules()), bits(model)
    with pytest.raises(SurgeryError):
        inject_lora(model, **wrong)
    assert dict(model.named_modules()) == modules
    assert all(p.requires_grad for p in model.parameters())
    assert_same_bits(model, before)


def test_the_report_counts_what_is_there():
    model = tiny_model(LLAMA)
    report = inject_lora(model, ["q_proj", "down_proj"], rank=3, alpha=6)
    assert [row["layer"] for row in report.rows] == [
        f"layers.{i}.{name}" for i in (0, 1) for name in ("self_attn.q_proj", "mlp.down_proj")
    ]
    q, down = report.rows[0], report.rows[1]
    assert (q["in"], q["out"], q["rank"], q["alpha"]) == (24, 60, 3, 6)
    assert (down["in"], down["out"]) == (28, 24)
    assert q["parameters"] == 3 * (24 + 60)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trainable == sum(row["parameters"] for row in report.rows)
    assert report.summary["trainable_parameters"] == trainable
    assert report.summary["total_parameters"] == model.n_parameters + trainable


def test_the_report_prints_as_a_table_and_as_json():
    model = tiny_model(LLAMA)
    report = inject_lora(model, "q_proj", rank=2)
    contents = json.loads(report.to_json())
    assert contents == report.to_dict()
    assert contents["rows"] == report.rows
    assert contents["trainable_parameters"] == 2 * 2 * (24 + 60)
    lines = str(report).split("\n")
    assert [line.split()[0] for line in lines if "layers." in line] == [
        "layers.0.self_attn.q_proj",
        "layers.1.self_attn.q_proj",
    ]
    assert any("trainable parameters: 336" in line for line in lines)


@pytest.mark.parametrize("verb", [enable_lora, disable_lora, merge_lora, remove_lora])
def test_every_operation_reports_the_layers_it_touched(verb):
    model = tiny_model(LLAMA)
    inject_lora(model, "v_proj")
    train_a_little(model)
    report = verb(model)
    assert [row["layer"] for row in report.rows] == [
        "layers.0.self_attn.v_proj",
        "layers.1.self_attn.v_proj",
    ]
