import json

import pytest
import torch
from tiny import CONFIGS, FAMILY_CONFIGS, assert_equal_logits, random_ids, tiny_model
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
from nanogpt_surgery.lora.operations import has_lora, lora_layers

EVERY_CONFIG = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
EVERY_LINEAR = r".*_proj|lm_head"
LLAMA = FAMILY_CONFIGS["llama"]


def train(model: nn.Module, seed: int = 5) -> None:
    """Give every update values as training leaves them: nowhere zero."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in lora_layers(model).values():
            layer.lora_B.copy_(torch.randn(layer.lora_B.shape, generator=draw) / 10)


def linears(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]


def bits(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def assert_same_bits(model: nn.Module, before: dict[str, torch.Tensor]) -> None:
    now = model.state_dict()
    assert list(now) == list(before)
    for name, tensor in now.items():
        assert torch.equal(tensor, before[name]), name


@EVERY_CONFIG
@pytest.mark.parametrize("training", [True, False])
def test_injecting_changes_no_logit(config, training):
    model = tiny_model(config).train(training)
    ids = random_ids(config, 2, 9)
    expected = model(ids)
    inject_lora(model, EVERY_LINEAR)
    assert all(module.training == training for module in model.modules())
    assert torch.equal(model(ids), expected)


def test_injecting_leaves_a_model_s_own_dropout_as_it_falls():
    model = SimpleGPT(31, 16, 2, 2, 12, dropout=0.3).train()
    ids = random_ids(model.config, 2, 9)
    torch.manual_seed(3)
    expected = model(ids)
    inject_lora(model, EVERY_LINEAR)
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
        inject_lora(model, name, rank=2)
        assert list(lora_layers(model)) == [name]
        train(model)
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
    train(model)
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
    train(model)
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
    inject_lora(model, EVERY_LINEAR)
    train(model)
    adapted = model(ids)
    for verb, expected in [(disable_lora, base), (enable_lora, adapted)] * 2:
        for _ in range(2):
            verb(model)
            assert torch.equal(model(ids), expected)


@EVERY_CONFIG
def test_removing_gives_back_the_very_same_tensors(config):
    model = tiny_model(config)
    model.norm.weight.requires_grad_(False)  # a choice of the user's, to be found again
    modules = dict(model.named_modules())
    tensors = dict(model.named_parameters(remove_duplicate=False))
    trainable = {name: p.requires_grad for name, p in tensors.items()}
    before = bits(model)
    inject_lora(model, EVERY_LINEAR)
    train(model)
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
    inject_lora(model, EVERY_LINEAR, rank=3)
    train(model)
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
    inject_lora(model, EVERY_LINEAR)
    merge_lora(model)
    after = dict(model.named_parameters(remove_duplicate=False))
    assert list(after) == names
    assert {name for name, p in after.items() if not p.requires_grad} == frozen
    assert all(module.training == model.training for module in model.modules())


def test_merging_in_bfloat16_adds_in_float32():
    model = tiny_model(LLAMA).bfloat16()
    inject_lora(model, EVERY_LINEAR)
    train(model)
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
    inject_lora(model, "lm_head")
    train(model)
    adapted = model(random_ids(config, 1, 6))
    merge_lora(model)
    assert model.embed_tokens.weight is embedding
    assert torch.equal(embedding, before)
    assert model.lm_head.weight is not embedding
    assert_equal_logits(model(random_ids(config, 1, 6)), adapted)


def test_a_tied_head_is_tied_again_when_removed():
    model = tiny_model(FAMILY_CONFIGS["gpt2"])
    inject_lora(model, "lm_head")
    train(model)
    remove_lora(model)
    assert model.lm_head.weight is model.embed_tokens.weight


def test_injecting_twice_is_refused():
    model = tiny_model(LLAMA)
    inject_lora(model, "q_proj")
    train(model)
    before, modules = bits(model), dict(model.named_modules())
    with pytest.raises(SurgeryError, match="LoRA already"):
        inject_lora(model, "q_proj")
    assert dict(model.named_modules()) == modules
    assert_same_bits(model, before)


@pytest.mark.parametrize("verb", [enable_lora, disable_lora, merge_lora, remove_lora])
def test_operations_without_a_lora_say_so(verb):
    with pytest.raises(SurgeryError, match="no LoRA") as caught:
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
    report = verb(model)
    assert [row["layer"] for row in report.rows] == [
        "layers.0.self_attn.v_proj",
        "layers.1.self_attn.v_proj",
    ]


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
    train(model)
    adapted = model(x)
    assert not torch.allclose(adapted, base, atol=1e-3)
    disable_lora(model)
    assert torch.equal(model(x), base)
    remove_lora(model)
    assert_same_bits(model, before)
    assert all(p.requires_grad for p in model.parameters())
    inject_lora(model, r"body\.\d", rank=2)
    train(model)
    adapted = model(x)
    merge_lora(model)
    torch.testing.assert_close(model(x), adapted)


def test_layers_inside_a_list_and_a_dict_are_replaced():
    model = nn.ModuleDict({"parts": nn.ModuleList([nn.Linear(3, 4), nn.Linear(4, 2)])})
    inject_lora(model, "parts.1")
    assert isinstance(model["parts"][1], LoRALinear)
    assert type(model["parts"][0]) is nn.Linear
