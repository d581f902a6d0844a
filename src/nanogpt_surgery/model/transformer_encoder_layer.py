"""One block of the stack, by hand, because PyTorch's own cannot be operated on.

`torch.nn.TransformerEncoderLayer` has a fused path that skips its submodules, so a LoRA inside does
nothing, and it has no KV cache. With equal weights this one computes what PyTorch's computes with
`norm_first=True, activation="gelu"` and a causal mask.

    x ──┬── norm ── attention ──┬── norm ── feed-forward ──┬── x
        └────────── + ──────────┴─────────── + ────────────┘
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from nanogpt_surgery.model.attention import CausalSelfAttention
from nanogpt_surgery.model.config import GPTConfig
from nanogpt_surgery.model.feed_forward import make_feed_forward
from nanogpt_surgery.model.kv_cache import LayerCache
from nanogpt_surgery.model.norm import make_norm


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
        rotation: Any = None,
        cache: LayerCache | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """(B, T, C) → (B, T, C); `rotation` and `mask` see `CausalSelfAttention`."""
        x = x + self.dropout(self.self_attn(self.input_layernorm(x), rotation, cache, mask))
        x = x + self.dropout(self.mlp(self.post_attention_layernorm(x)))
        return x
