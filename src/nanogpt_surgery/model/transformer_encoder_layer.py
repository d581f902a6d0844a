"""One block of the stack, by hand, because PyTorch's own cannot be operated on.

`torch.nn.TransformerEncoderLayer` has a fused path that skips its submodules, so a LoRA inside does
nothing, and it has no KV cache. With equal weights this one computes what PyTorch's computes with
`norm_first=True, activation="gelu"` and a causal mask.

    x ──┬── norm ── attention ──┬── norm ── feed-forward ──┬── x
        └────────── + ──────────┴─────────── + ────────────┘

The feed-forward takes each token on its own, widens it, bends it, and narrows it:

    GELU      down(gelu(up(x)))                     GPT-2; arXiv:1606.08415
    ReLU²     down(max(0, up(x))²)                  Primer; arXiv:2109.08668
    SwiGLU    down(silu(gate(x)) · up(x))           Llama; arXiv:2002.05202

Legend: B batch, T tokens, C width, I width inside the feed-forward.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn

from nanogpt_surgery.model.attention import CausalSelfAttention, RMSNorm
from nanogpt_surgery.model.config import GPTConfig
from nanogpt_surgery.model.embeddings import Rotation
from nanogpt_surgery.model.kv_cache import LayerCache


class TransformerEncoderLayer(nn.Module):
    """A pre-norm block: attention, then the feed-forward, each added to the residual stream."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.input_layernorm = make_norm(config)
        self.self_attn = CausalSelfAttention(config)
        self.post_attention_layernorm = make_norm(config)
        self.mlp = make_feed_forward(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self,
        x: Tensor,
        rotation: Rotation | None = None,
        cache: LayerCache | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """(B, T, C) → (B, T, C); for the other arguments see `CausalSelfAttention`."""
        x = x + self.dropout(self.self_attn(self.input_layernorm(x), rotation, cache, mask))
        x = x + self.dropout(self.mlp(self.post_attention_layernorm(x)))
        return x


def make_norm(config: GPTConfig) -> nn.Module:
    """Returns the norm that a config chooses, (…, C) → (…, C)."""
    if config.norm == "rmsnorm":
        return RMSNorm(config.n_embd, config.norm_eps)
    return nn.LayerNorm(config.n_embd, config.norm_eps, bias=config.bias == "all")


def make_feed_forward(config: GPTConfig) -> nn.Module:
    """Returns the feed-forward that a config chooses, (B, T, C) → (B, T, C)."""
    return SwiGLUFeedForward(config) if config.mlp == "swiglu" else PlainFeedForward(config)


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
        inner = self.activation(self.up_proj(x))  # (B, T, I)
        return self.down_proj(inner)  # (B, T, C)


class SwiGLUFeedForward(nn.Module):
    """Three projections; the gate, through SiLU, scales the output of `up_proj`."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        bias = config.bias == "all"
        self.gate_proj = nn.Linear(config.n_embd, config.n_inner, bias=bias)
        self.up_proj = nn.Linear(config.n_embd, config.n_inner, bias=bias)
        self.down_proj = nn.Linear(config.n_inner, config.n_embd, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, C) → (B, T, C)."""
        inner = F.silu(self.gate_proj(x)) * self.up_proj(x)  # (B, T, I)
        return self.down_proj(inner)  # (B, T, C)


def squared_relu(x: Tensor) -> Tensor:
    """Returns max(0, x)², for each number."""
    return F.relu(x).square()


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "relu2": squared_relu,
}
