"""ReLU² in fewer passes over memory.

    r = max(0, x),  y = r ∘ r
    ∂x = 2 r ∘ ∂y

Written as it is read, PyTorch takes the square as a power and keeps both x and r.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from nanogpt_surgery.model.simple_gpt import SimpleGPT
from nanogpt_surgery.model.transformer_encoder_layer import squared_relu


class SquaredReLU(torch.autograd.Function):
    """x (…) → (…)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        """Keeps what is above 0."""
        positive = x.clamp_min(0)
        ctx.save_for_backward(positive)
        return positive * positive

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        """The gradient of x."""
        (positive,) = ctx.saved_tensors
        return (dy * positive).mul_(2)


def quick_squared_relu(x: Tensor) -> Tensor:
    """Computes `squared_relu`, (…) → (…)."""
    y: Tensor = SquaredReLU.apply(x)
    return y


def with_squared_relu(model: SimpleGPT) -> list[nn.Module]:
    """The feed-forwards of a model that bend by `squared_relu`."""
    return [m for m in model.layers.modules() if getattr(m, "activation", None) is squared_relu]
