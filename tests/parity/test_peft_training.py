"""What a training step computes: the gradients, and the outputs under dropout, are PEFT's."""

import peft
import pytest
import torch
from torch import Tensor, nn

from nanogpt_surgery import inject_lora, lora_rows
from nanogpt_surgery.lora.several import lora_layers

PADDING = 3
MASK = torch.tensor([0.0, 2, 0, 2, 2, 0])


class FixedDropout(nn.Module):
    """Zeroes the same inputs for both sides."""

    p = 0.5

    def forward(self, x: Tensor) -> Tensor:
        return x * MASK


def table() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(11, 6, padding_idx=PADDING), nn.Linear(6, 5))


def theirs(target: str, **options: object) -> nn.Module:
    config = peft.LoraConfig(target_modules=[target], r=2, lora_alpha=3, **options)
    return peft.get_peft_model(table(), config)


@pytest.mark.parametrize("dora", [False, True])
def test_the_padding_of_an_embedding_learns_nothing(dora):
    model, other = table(), theirs("0", use_dora=dora)
    inject_lora(model, "0", rank=2, alpha=3, dora=dora)
    ids = torch.tensor([[1, PADDING, 4], [PADDING, 4, 4]])
    update, layer = lora_layers(model)["0"].update, other.base_model.model[0]
    a, b = layer.lora_embedding_A["default"], layer.lora_embedding_B["default"]
    a.data.normal_()
    update.lora_A.data, update.lora_B.data = a.data.clone(), b.data.clone()
    model(ids).square().sum().backward()
    other(ids).square().sum().backward()
    torch.testing.assert_close(update.lora_A.grad, a.grad)
    torch.testing.assert_close(update.lora_B.grad, b.grad)
    assert bool(update.lora_A.grad[:, 4].any())
    assert not update.lora_A.grad[:, PADDING].any()
    alone, update.lora_A.grad = update.lora_A.grad, None
    with lora_rows(model, ["default", "default"]):
        model(ids).square().sum().backward()
    torch.testing.assert_close(update.lora_A.grad, alone)


@pytest.mark.parametrize("pissa", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_dora_drops_the_input_of_all_that_it_adds(bias, pissa):
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(6, 5, bias=bias))
    config = peft.LoraConfig(
        target_modules=["0"], r=4 if pissa else 2, lora_alpha=2, lora_dropout=0.5, use_dora=True
    )
    other = peft.get_peft_model(nn.Sequential(nn.Linear(6, 5, bias=bias)), config)
    other.base_model.model[0].base_layer.load_state_dict(base[0].state_dict())
    inject_lora(base, "0", rank=2, alpha=1 if pissa else 2, dropout=0.5, dora=True, pissa=pissa)
    update, layer = base[0].update, other.base_model.model[0]
    for parameter in update.trainable():
        parameter.data *= 1.5
        parameter.data += 0.1 * torch.randn_like(parameter)
    a, b = update.factors()
    layer.lora_A["default"].weight.data = a.detach().clone()
    layer.lora_B["default"].weight.data = b.detach().clone()
    layer.lora_magnitude_vector["default"].weight.data = update.lora_magnitude.data.clone()
    update.dropout, layer.lora_dropout["default"] = FixedDropout(), FixedDropout()
    x = torch.randn(3, 6)
    torch.testing.assert_close(base.eval()(x), other.eval()(x))
    torch.testing.assert_close(base.train()(x), other.train()(x))
    assert not torch.allclose(base(x), base.eval()(x))
    base.train()(x).square().sum().backward()
    other(x).square().sum().backward()
    lengths = layer.lora_magnitude_vector["default"].weight
    torch.testing.assert_close(update.lora_magnitude.grad, lengths.grad)
    for ours, their in ((update.lora_A, layer.lora_A), (update.lora_B, layer.lora_B)):
        wanted = their["default"].weight.grad
        wanted = wanted[: len(ours)] if ours is update.lora_A else wanted[:, : ours.size(1)]
        torch.testing.assert_close(ours.grad, wanted)
