"""One block of the stack: causal self-attention with its cache, and the feed-forward.

    x ──┬── norm ── attention ──┬── norm ── feed-forward ──┬── x
        └────────── + ──────────┴─────────── + ────────────┘

It has the name of PyTorch's block without cross-attention, `torch.nn.TransformerEncoderLayer`, and
with equal weights it computes what that computes with `norm_first=True, activation="gelu"` and a
causal mask, which makes it a decoder's. It is written by hand because PyTorch's has no KV cache,
and a fused path that skips its submodules, so that a LoRA inside does nothing.

In attention each token looks at itself and at those before it. Grouped queries (arXiv:2305.13245)
let several query heads share one key-value head:

    query heads  H = 6     q0 q1 q2   q3 q4 q5
                             ╲ │ ╱      ╲ │ ╱
    key-value    G = 2        kv0        kv1

The feed-forward takes each token alone: widens it to I numbers, bends each, and narrows it again:

    GELU      down(gelu(up(x)))                     GPT-2; arXiv:1606.08415
    ReLU²     down(max(0, up(x))²)                  Primer; arXiv:2109.08668
    SwiGLU    down(silu(gate(x)) · up(x))           Llama; arXiv:2002.05202

Legend: B batch, T new tokens, S keys (past and new), C width, H heads, G KV heads, D head width,
I width inside the feed-forward.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanogpt_surgery.arguments import check_arguments
from nanogpt_surgery.model.config import GPTConfig
from nanogpt_surgery.model.embeddings import Rotation, identity, rotate

if TYPE_CHECKING:
    from nanogpt_surgery.model.kv_cache import LayerCache


class TransformerEncoderLayer(nn.Module):
    """A pre-norm block: attention, then the feed-forward, each added to the residual stream."""

    @check_arguments
    def __init__(self, config: GPTConfig):
        super().__init__()
        # The norms have Hugging Face's names; the second is the one before the feed-forward.
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
        """Returns the stream after both sums, (B, T, C); arguments as in `CausalSelfAttention`."""
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
        """Takes each token on its own, (B, T, C) → (B, T, C)."""
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
        """Takes each token on its own, (B, T, C) → (B, T, C)."""
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


class RMSNorm(nn.Module):
    """Divides by the root mean square, multiplies by a learned weight (arXiv:1910.07467).

    Works in float32 and casts back before the weight, as Llama's does. Shape (…, width) → same.
    """

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        """Normalises the last dimension."""
        y = x.float()
        y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * y.to(x.dtype)

    def extra_repr(self) -> str:
        """Returns the text that `print(model)` shows."""
        return f"{self.weight.numel()}, eps={self.eps}"


class CausalSelfAttention(nn.Module):
    """Four projections, with Hugging Face's names, around `causal_attention`.

    With `qk_norm` each head's queries and keys are normalised (Qwen3); with rotary positions they
    are turned by their positions. Values are neither.
    """

    def __init__(self, config: GPTConfig):
        super().__init__()
        q_width, kv_width = config.n_head * config.head_dim, config.n_kv_head * config.head_dim
        qkv_bias, o_bias = config.bias != "none", config.bias in ("all", "attention")
        self.head_dim, self.dropout = config.head_dim, config.dropout
        self.q_proj = nn.Linear(config.n_embd, q_width, bias=qkv_bias)
        self.k_proj = nn.Linear(config.n_embd, kv_width, bias=qkv_bias)
        self.v_proj = nn.Linear(config.n_embd, kv_width, bias=qkv_bias)
        self.o_proj = nn.Linear(q_width, config.n_embd, bias=o_bias)
        self.q_norm = RMSNorm(config.head_dim, config.norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(config.head_dim, config.norm_eps) if config.qk_norm else nn.Identity()
        self.rotate: Callable[..., Tensor] = rotate if config.positions == "rotary" else identity
        # An attribute, so that `training/fast` can put its own in this place and take it back.
        self.attend: Callable[..., Tensor] = causal_attention

    def forward(
        self,
        x: Tensor,
        rotation: Rotation | None = None,
        cache: LayerCache | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """Lets each token of (B, T, C) gather from those it may see: (B, T, C).

        With a cache, the T tokens follow the S − T it holds. A mask (B, 1, T, S), true where a
        token may look, takes the place of the causal one.
        """
        q = self.q_norm(self._split_heads(self.q_proj(x)))  # (B, H, T, D)
        k = self.k_norm(self._split_heads(self.k_proj(x)))  # (B, G, T, D)
        v = self._split_heads(self.v_proj(x))  # (B, G, T, D)
        q, k = self.rotate(q, rotation), self.rotate(k, rotation)
        if cache is not None:
            k, v = cache.append(k, v)  # (B, G, S, D)
        dropout = self.dropout if self.training else 0.0
        y = self.attend(q, k, v, dropout, mask)  # (B, H, T, D)
        return self.o_proj(y.transpose(1, 2).flatten(2))  # (B, T, C)

    def _split_heads(self, x: Tensor) -> Tensor:
        batch, tokens, _ = x.shape
        return x.view(batch, tokens, -1, self.head_dim).transpose(1, 2)  # (B, H, T, D)


def causal_attention(
    q: Tensor, k: Tensor, v: Tensor, dropout: float = 0.0, mask: Tensor | None = None
) -> Tensor:
    """Returns softmax(q kᵀ / √D) v: (B, H, T, D), (B, G, S, D), (B, G, S, D) → (B, H, T, D).

    Query t sees keys 0 … S − T + t, or what a mask (B, 1, T, S) lets it see.
    """
    new, keys = q.size(2), k.size(2)
    k, v = repeat_heads(k, q.size(1)), repeat_heads(v, q.size(1))  # (B, H, S, D)
    # PyTorch's `is_causal` counts from the first key, and a single new token sees every key: only
    # several tokens after a filled cache need the mask written out.
    if mask is None and not (new == keys or new == 1):
        mask = torch.ones(new, keys, dtype=torch.bool, device=q.device).tril(keys - new)  # (T, S)
    is_causal = mask is None and new > 1
    return F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal)


def repeat_heads(x: Tensor, heads: int) -> Tensor:
    """Repeats each KV head for the query heads that share it: (B, G, S, D) → (B, H, S, D)."""
    return x if x.size(1) == heads else x.repeat_interleave(heads // x.size(1), 1)
