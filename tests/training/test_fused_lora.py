"""The quick way through a frozen matrix is the plain way's result, where it is taken at all."""

import copy

import pytest
import torch
from helpers.models import FAMILY_CONFIGS, random_ids, tiny_model, train_a_little
from helpers.training import hashes
from torch import Tensor, nn

from nanogpt_surgery import (
    FitSettings,
    GPTDataset,
    LoRALinear,
    SimpleGPT,
    blend_lora,
    disable_lora,
    fit,
    inject_lora,
    lora_rows,
    swap_lora,
)
from nanogpt_surgery.training.fast.fused_lora import (
    FrozenProduct,
    FusedLoRALinear,
    fused_classes,
    fused_products,
)

SETTINGS = FitSettings(
    max_steps=5, batch_size=4, warmup_steps=0, learning_rate=1e-2,
    device="cpu", precision="float32", compile="off",
)  # fmt: skip
DATA = GPTDataset.from_ids(random_ids(FAMILY_CONFIGS["llama"], 1, 60)[0], 9, stride=3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("adapted", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_a_product_and_its_gradients_are_autograd_s(dtype, adapted, bias):
    torch.manual_seed(0)
    x = torch.randn(3, 5, 7, requires_grad=True)
    weight, offset = torch.randn(11, 7).to(dtype), torch.randn(11).to(dtype) if bias else None
    a, b = (torch.randn(shape, requires_grad=True) for shape in ((2, 7), (11, 2)))
    direction = torch.randn(3, 5, 11)
    plain = x @ weight.float().t() + (0 if offset is None else offset.float())
    inputs = [x, a, b] if adapted else [x]
    if adapted:
        plain = plain + 0.7 * (x @ a.t()) @ b.t()
    found = FrozenProduct.apply(x, weight, offset, *((a, b) if adapted else (None, None)), 0.7)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, plain, rtol=1e-5, atol=1e-5)
    wanted = torch.autograd.grad(plain, inputs, direction)
    for one, other in zip(torch.autograd.grad(found, inputs, direction), wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-4)


def prepared(name: str, targets: object, dtype: torch.dtype) -> SimpleGPT:
    torch.manual_seed(0)
    model = tiny_model(FAMILY_CONFIGS[name]).to(dtype)
    inject_lora(model, targets, rank=2, tied="untie")
    train_a_little(model)
    return model


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "lm_head"], "embed_tokens"])
@pytest.mark.parametrize("name", ["gpt2", "qwen2"])
def test_a_model_stored_in_bfloat16_trains_as_the_plain_one_in_float32(name, targets):
    quick = prepared(name, targets, torch.bfloat16)
    plain = copy.deepcopy(quick).float()
    losses = [step.loss for step in fit(quick, DATA, SETTINGS)]
    wanted = [step.loss for step in fit(plain, DATA, SETTINGS, fast=False)]
    assert losses == pytest.approx(wanted, rel=1e-5)
    for one, other in zip(quick.parameters(), plain.parameters(), strict=True):
        assert one.dtype == (torch.float32 if one.requires_grad else torch.bfloat16)
        torch.testing.assert_close(one.float(), other, rtol=1e-3, atol=1e-4)


def kinds() -> dict[str, tuple[object, bool]]:
    def two(model: nn.Module) -> None:
        inject_lora(model, "q_proj", name="one")
        inject_lora(model, "q_proj", name="other")
        blend_lora(model, {"one": 0.5, "other": 0.5})

    def one_of_two(model: nn.Module) -> None:
        two(model)
        swap_lora(model, "other")

    def off(model: nn.Module) -> None:
        inject_lora(model, "q_proj")
        disable_lora(model)

    def watched(model: nn.Module) -> None:
        inject_lora(model, "q_proj")
        model.layers[0].self_attn.q_proj.original_layer.register_forward_hook(lambda *_: None)
        model.layers[1].self_attn.q_proj.original_layer.register_forward_pre_hook(lambda *_: None)

    return {
        "plain": (lambda model: inject_lora(model, "q_proj"), True),
        "rslora": (lambda model: inject_lora(model, "q_proj", rslora=True), True),
        "one of two": (one_of_two, True),
        "dora": (lambda model: inject_lora(model, "q_proj", dora=True), False),
        "pissa": (lambda model: inject_lora(model, "q_proj", pissa=True), False),
        "dropout": (lambda model: inject_lora(model, "q_proj", dropout=0.1), False),
        "two": (two, False),
        "off": (off, False),
        "watched": (watched, False),
    }


@pytest.mark.parametrize("prepare, taken", kinds().values(), ids=kinds())
def test_only_one_plain_update_is_folded(prepare, taken):
    model = tiny_model(FAMILY_CONFIGS["llama"])
    prepare(model)
    layers = {module for module in model.modules() if isinstance(module, LoRALinear)}
    assert set(fused_classes(model, torch.float32)) == (layers if taken else set())
    assert fused_classes(model, torch.bfloat16) == {}  # there W would swallow the update


def test_rows_with_adapters_of_their_own_are_not_folded():
    model = tiny_model(FAMILY_CONFIGS["llama"])
    inject_lora(model, "q_proj")
    with lora_rows(model, ["default", None]):
        assert fused_classes(model, torch.float32) == {}


def test_what_learns_is_never_cast():
    model = tiny_model(FAMILY_CONFIGS["llama"]).bfloat16()
    assert fused_classes(model, torch.float32) == {}
    model.requires_grad_(False)
    assert len(fused_classes(model, torch.float32)) == 2 * 7 + 2


def test_outside_of_a_step_the_layers_are_what_they_were():
    model = prepared("llama", "all-linear", torch.float32)
    classes, before = [type(module) for module in model.modules()], hashes(model)
    with pytest.raises(ZeroDivisionError), fused_products(model, torch.float32):
        assert any(type(module) is FusedLoRALinear for module in model.modules())
        raise ZeroDivisionError
    assert [type(module) for module in model.modules()] == classes
    assert hashes(model) == before


def test_no_gradient_is_made_for_an_input_that_needs_none():
    x, weight = torch.randn(3, 7), torch.randn(11, 7)
    a, b = (torch.randn(shape, requires_grad=True) for shape in ((2, 7), (11, 2)))
    shapes: list[tuple[int, ...]] = []

    class Watch(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            if function in (Tensor.__matmul__, Tensor.matmul):
                shapes.append(tuple(result.shape))
            return result

    y = FrozenProduct.apply(x, weight, None, a, b, 1.0)
    with Watch():
        FrozenProduct.backward(y.grad_fn, torch.ones_like(y))
    assert shapes and (3, 7) not in shapes
