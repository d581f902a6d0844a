import math

import pytest
import torch
import torch.nn.functional as F
from helpers.models import randomise

from nanogpt_surgery import GPTConfig
from nanogpt_surgery.model.transformer_encoder_layer import make_feed_forward


def exact_gelu(x):
    return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))


def tanh_gelu(x):
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def squared_relu(x):
    return torch.where(x > 0, x * x, 0.0)


@pytest.mark.parametrize(
    ("mlp", "bend"),
    [("gelu", exact_gelu), ("gelu_tanh", tanh_gelu), ("relu2", squared_relu)],
)
def test_two_projections_widen_bend_and_narrow(mlp, bend):
    part = randomise(make_feed_forward(GPTConfig(31, n_embd=12, n_inner=20, mlp=mlp))).double()
    x = torch.randn(2, 5, 12, dtype=torch.float64)
    expected = F.linear(
        bend(F.linear(x, part.up_proj.weight, part.up_proj.bias)),
        part.down_proj.weight,
        part.down_proj.bias,
    )
    torch.testing.assert_close(part(x), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("bias", ["all", "none"])
def test_swiglu_lets_the_gate_scale_what_goes_up(bias):
    config = GPTConfig(31, n_embd=12, n_inner=20, mlp="swiglu", bias=bias)
    part = randomise(make_feed_forward(config)).double()
    x = torch.randn(2, 5, 12, dtype=torch.float64)
    gate, up = part.gate_proj(x), part.up_proj(x)
    expected = part.down_proj(gate / (1 + torch.exp(-gate)) * up)
    torch.testing.assert_close(part(x), expected, rtol=1e-10, atol=1e-10)
    assert (part.gate_proj.bias is None) == (bias == "none")
