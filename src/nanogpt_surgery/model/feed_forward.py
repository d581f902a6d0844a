"""The feed-forward of a block: each token on its own, widened, bent, narrowed.

GELU      down(gelu(up(x)))                     GPT-2; arXiv:1606.08415
ReLU²     down(max(0, up(x))²)                  Primer; arXiv:2109.08668
SwiGLU    down(silu(gate(x)) · up(x))           Llama; arXiv:2002.05202
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn

from nanogpt_surgery.model.config import GPTConfig


def squared_relu(x: Tensor) -> Tensor:
    """max(0, x)², for each number."""
    return F.relu(x).square()


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "relu2": squared_relu,
}


class PlainFeedForward(nn.Module):
    """Two projections around an activation."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        bias = config.bias == "all"
        self.up_proj = nn.Linear(config.n_embd, config.n_inner, bias=bias)
        self.down_proj = nn.Linear(config.n_inner, config.n_embd, bias=bias)
        self.activation = ACTIVATIONS[config.mlp]

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, C) → (B, T, C)."""
        out: Tensor = self.down_proj(self.activation(self.up_proj(x)))
        return out


class SwiGLUFeedForward(nn.Module):
    """Three projections; the gate, through SiLU, scales what the other lets up."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        bias = config.bias == "all"
        self.gate_proj = nn.Linear(config.n_embd, config.n_inner, bias=bias)
        self.up_proj = nn.Linear(config.n_embd, config.n_inner, bias=bias)
        self.down_proj = nn.Linear(config.n_inner, config.n_embd, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, C) → (B, T, C)."""
        out: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return out


def make_feed_forward(config: GPTConfig) -> nn.Module:
    """The config's feed-forward."""
    return SwiGLUFeedForward(config) if config.mlp == "swiglu" else PlainFeedForward(config)
