"""ReLU² by hand against autograd on the model's own."""

import pytest
import torch
from helpers.models import FAMILY_CONFIGS, random_ids, tiny_model

from nanogpt_surgery import GPTConfig, SimpleGPT
from nanogpt_surgery.model.transformer_encoder_layer import squared_relu
from nanogpt_surgery.training.fast.activations import quick_squared_relu
from nanogpt_surgery.training.fast.cpu_kernels import cpu_kernels


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_square_by_hand_and_its_gradient_are_autograd_s_to_the_bit(dtype):
    torch.manual_seed(0)
    x = (3 * torch.randn(5, 7)).to(dtype)
    x[0, :2] = torch.tensor([0.0, -0.0])
    up = torch.randn(5, 7).to(dtype)
    results = []
    for square in (squared_relu, quick_squared_relu):
        leaf = x.clone().requires_grad_()
        y = square(leaf)
        y.backward(up)
        results.append((y.detach(), leaf.grad))
    (expected, wanted), (found, gradient) = results
    assert torch.equal(found, expected)
    assert torch.equal(gradient, wanted)


def test_a_training_bends_by_it_where_the_model_bends_so_and_takes_it_back():
    config = GPTConfig(11, 12, 2, 2, 9, mlp="relu2")
    model, other = SimpleGPT.from_config(config), tiny_model(FAMILY_CONFIGS["gpt2"])
    kept = other.layers[0].mlp.activation
    ids = random_ids(config, 2, 9)
    expected = model(ids)
    with cpu_kernels(model), cpu_kernels(other):
        assert all(layer.mlp.activation is quick_squared_relu for layer in model.layers)
        assert other.layers[0].mlp.activation is kept
        torch.testing.assert_close(model(ids), expected)
    assert all(layer.mlp.activation is squared_relu for layer in model.layers)
