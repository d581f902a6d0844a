"""Causal self-attention: each token looks at itself and at those before it.

Grouped queries (arXiv:2305.13245) let several query heads share one key-value head:

    query heads  H = 6     q0 q1 q2   q3 q4 q5
                             ╲ │ ╱      ╲ │ ╱
    key-value    G = 2        kv0        kv1

Legend: B batch, T new tokens, S keys (past and new), C width, H heads, G KV heads, D head width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanogpt_surgery.model.config import GPTConfig
from nanogpt_surgery.model.kv_cache import LayerCache
from nanogpt_surgery.model.norm import RMSNorm
from nanogpt_surgery.model.positions import leave, rotate


class CausalSelfAttention(nn.Module):
    """Four projections with Hugging Face's names around `causal_attention`."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        q_width, kv_width = config.n_head * config.head_dim, config.n_kv_head * config.head_dim
        qkv_bias = config.bias != "none"
        self.head_dim = config.head_dim
        self.dropout = config.dropout
        self.q_proj = nn.Linear(config.n_embd, q_width, bias=qkv_bias)
        self.k_proj = nn.Linear(config.n_embd, kv_width, bias=qkv_bias)
        self.v_proj = nn.Linear(config.n_embd, kv_width, bias=qkv_bias)
        self.o_proj = nn.Linear(q_width, config.n_embd, bias=config.bias in ("all", "attention"))
        self.q_norm = _head_norm(config)
        self.k_norm = _head_norm(config)
        self.attend: Callable[..., Tensor] = causal_attention
        self.rotate: Any = rotate if config.positions == "rotary" else leave

    def forward(
        self,
        x: Tensor,
        rotation: Any = None,
        cache: LayerCache | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """(B, T, C) → (B, T, C); with a cache, the T tokens follow the S − T it holds.

        `mask` (B, 1, T, S), true where a token may look, stands for the causal one.
        """
        q = self.rotate(self.q_norm(self._heads(self.q_proj(x))), rotation)  # (B, H, T, D)
        k = self.rotate(self.k_norm(self._heads(self.k_proj(x))), rotation)  # (B, G, T, D)
        v = self._heads(self.v_proj(x))  # (B, G, T, D)
        if cache is not None:
            k, v = cache.append(k, v)  # (B, G, S, D)
        dropout = self.dropout if self.training else 0.0
        y = self.attend(q, k, v, dropout, mask)  # (B, H, T, D)
        out: Tensor = self.o_proj(y.transpose(1, 2).flatten(2))  # (B, T, C)
        return out

    def _heads(self, x: Tensor) -> Tensor:
        batch, tokens, _ = x.shape
        return x.view(batch, tokens, -1, self.head_dim).transpose(1, 2)  # (B, H, T, D)


def _head_norm(config: GPTConfig) -> nn.Module:
    return RMSNorm(config.head_dim, config.norm_eps) if config.qk_norm else nn.Identity()


def causal_attention(
    q: Tensor, k: Tensor, v: Tensor, dropout: float = 0.0, mask: Tensor | None = None
) -> Tensor:
    """Softmax-weighted values: (B, H, T, D), (B, G, S, D), (B, G, S, D) → (B, H, T, D).

    Query t sees keys 0 … S − T + t, or what a mask (B, 1, T, S) lets it see. `is_causal` and no
    mask at all keep the fast kernels; only several tokens after a filled cache need it written out.
    """
    new, keys = q.size(2), k.size(2)
    k, v = repeat_heads(k, q.size(1)), repeat_heads(v, q.size(1))  # (B, H, S, D)
    if mask is None and not (new == keys or new == 1):
        mask = torch.ones(new, keys, dtype=torch.bool, device=q.device).tril(keys - new)
    is_causal = mask is None and new > 1
    return F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal)


def repeat_heads(x: Tensor, heads: int) -> Tensor:
    """Repeats each KV head for the query heads that share it: (B, G, S, D) → (B, H, S, D)."""
    return x if x.size(1) == heads else x.repeat_interleave(heads // x.size(1), 1)
