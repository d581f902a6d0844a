"""Dropout (arXiv:1207.0580) and attention as a CPU does them fast.

PyTorch draws a float for each number on a CPU, one after another; here an int64 decides over four
numbers, by 16 bits each. With dropout its attention leaves the fast kernel, and computes all that
is masked; here a block of queries sees no key that comes after its last one. The backward pass of
its bfloat16 kernel takes up to three times as long as that of float32 (docs/log.md).

Legend: B batch, T tokens, S keys, H heads, G KV heads, D head width.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from nanogpt_surgery.model.simple_gpt import SimpleGPT
from nanogpt_surgery.model.transformer_encoder_layer import (
    CausalSelfAttention,
    causal_attention,
    repeat_heads,
)
from nanogpt_surgery.training.forward import attributes_set

LEVELS = 2**16
QUERIES = 64  # in a block


@contextmanager
def cpu_kernels(model: nn.Module) -> Iterator[None]:
    """Replaces the dropout and the attention of a `SimpleGPT` on a CPU within the block."""
    if not isinstance(model, SimpleGPT) or model.embed_tokens.weight.device.type != "cpu":
        yield
        return
    owners: list[Any] = [model, *model.layers]
    dropouts = {o.dropout: Dropout for o in owners if type(o.dropout) is nn.Dropout}
    attentions = [m for m in model.layers.modules() if isinstance(m, CausalSelfAttention)]
    attend = attributes_set("attend", dict.fromkeys(attentions, cpu_attention))
    with attributes_set("__class__", dropouts), attend:
        yield


def cpu_attention(
    q: Tensor, k: Tensor, v: Tensor, dropout: float = 0.0, mask: Tensor | None = None
) -> Tensor:
    """Computes `causal_attention` in training, what is bfloat16 in float32."""
    training = q.requires_grad or k.requires_grad or v.requires_grad
    # Under autocast a rotation or a norm leaves q and k in float32: v tells what is computed in.
    if not training or v.dtype != torch.bfloat16:
        return _attend(q, k, v, dropout, mask)
    with torch.autocast("cpu", enabled=False):
        y = _attend(q.float(), k.float(), v.float(), dropout, mask)
    return y.to(v.dtype)


def _attend(q: Tensor, k: Tensor, v: Tensor, dropout: float, mask: Tensor | None) -> Tensor:
    if not dropout:
        return causal_attention(q, k, v, 0.0, mask)
    k, v = repeat_heads(k, q.size(1)), repeat_heads(v, q.size(1))
    return attention_with_dropout(q, k, v, dropout, mask)


class Dropout(nn.Dropout):
    """`nn.Dropout` with the probability rounded to a multiple of 1/65536."""

    def forward(self, x: Tensor) -> Tensor:
        """(…) → (…), in training with some numbers zero and the others larger."""
        if not self.training or not self.p:
            return super().forward(x)
        return x.masked_fill(dropped(x, self.p), 0) * gain(self.p)


def dropped(x: Tensor, probability: float) -> Tensor:
    """Which numbers of a tensor to drop, bool, drawn from PyTorch's global generator."""
    size = x.numel()
    drawn = torch.randint(-(2**63), 2**63 - 1, (-(-size // 4),), device=x.device)
    bits = drawn.view(torch.int16)[:size].view(x.shape)  # from −32768 to 32767
    return bits < _level(probability) - LEVELS // 2


def gain(probability: float) -> float:
    """Returns the factor of the numbers that stay, which keeps the expected sum."""
    return LEVELS / (LEVELS - _level(probability))


def _level(probability: float) -> int:
    return min(round(probability * LEVELS), LEVELS - 1)


def attention_with_dropout(
    q: Tensor, k: Tensor, v: Tensor, probability: float, mask: Tensor | None = None
) -> Tensor:
    """Softmax-weighted values, some weights dropped: (B, H, T, D), twice (B, H, S, D) → as q.

    Query t sees keys 0 … S − T + t, or what a mask (B, 1, T, S) lets it see.
    """
    past = k.size(2) - q.size(2)
    q, v = q * q.size(3) ** -0.5, v * gain(probability)
    out = []
    for start in range(0, q.size(2), QUERIES):
        block = q[:, :, start : start + QUERIES]  # (B, H, n, D)
        end = past + start + block.size(2)
        scores = block @ k[:, :, :end].mT  # (B, H, n, end)
        if mask is None:
            later = torch.ones(scores.shape[2:], dtype=torch.bool, device=q.device)
            hidden = later.triu(end - block.size(2) + 1)
        else:
            hidden = ~mask[:, :, start : start + QUERIES, :end]
        weights = scores.masked_fill(hidden, float("-inf")).softmax(-1)
        out.append(weights.masked_fill(dropped(weights, probability), 0) @ v[:, :, :end])
    return torch.cat(out, 2)
