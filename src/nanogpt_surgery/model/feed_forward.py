"""The feed-forward of a block: each token on its own, widened, bent, narrowed.

GELU      down(gelu(up(x)))                     GPT-2; arXiv:1606.08415
SwiGLU    down(silu(gate(x)) · up(x))           Llama; arXiv:2002.05202
"""

from __future__ import annotations

from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn

from nanogpt_surgery.model.config import GPTConfig


class GeluFeedForward(nn.Module):
    """Two projections around a GELU, exact or in GPT-2's tanh form."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        bias = config.bias == "all"
        self.up_proj = nn.Linear(config.n_embd, config.n_inner, bias=bias)
        self.down_proj = nn.Linear(config.n_inner, config.n_embd, bias=bias)
        form = "tanh" if config.mlp == "gelu_tanh" else "none"
        self.activation = partial(F.gelu, approximate=form)

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
    return SwiGLUFeedForward(config) if config.mlp == "swiglu" else GeluFeedForward(config)
