"""Causal attention in blocks of queries, each with the keys up to it, and its own backward pass.

              keys →
    queries   ▩ · · ·      ▩  products, in the dtype of v; the softmax in float32
       ↓      ▩ ▩ · ·      ·  never computed
              ▩ ▩ ▩ ·
              ▩ ▩ ▩ ▩

    P = softmax(s · Q Kᵀ),  Y = P V
    ∂V = Pᵀ ∂Y,  ∂P = ∂Y Vᵀ,  ∂S = P ∘ (∂P − Σ P ∘ ∂P),  ∂Q = s · ∂S K,  ∂K = s · ∂Sᵀ Q

Query heads that share a KV head are further rows of its products, so no key is repeated. Some heads
are taken at a time, so that their scores stay in a CPU's cache. The weights P are kept for the
backward pass; where a context is long they are made again, block by block, and memory grows with T
alone. To PyTorch's compiler, which would unroll the loops, each pass is one operation.

Dropout takes some weights away after the softmax. What is drawn follows from a seed, so that it is
the same when the weights are made again; one that is taken away is marked by a minus.

Legend: B batch, T queries, S keys, H heads, G KV heads, D head width, R = H / G query heads that
share a KV head, N = B · G; in a block h KV heads, n queries, s keys.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nanogpt_surgery.training.fast.cpu_dropout import gain, level_of, random_bits

QUERIES = 64  # in a block
IN_CACHE = 2**19  # scores at a time, about
KEPT_KEYS = 512  # of a longer context weights are made again


def block_attention(
    q: Tensor, k: Tensor, v: Tensor, dropout: float = 0.0, mask: Tensor | None = None
) -> Tensor:
    """Computes `causal_attention`: (B, H, T, D), (B, G, S, D), (B, G, S, D) → (B, H, T, D)."""
    bias = None if mask is None else mask[:, 0].to(v.dtype).log()  # (B, T, S): 0 or −∞
    seed = torch.randint(2**62, ()) if dropout else None
    return BlockAttention.apply(q, k, v, bias, seed, dropout)


class BlockAttention(torch.autograd.Function):
    """`block_attention`, with a bias (B, T, S) on the scores where not just what is later hides."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        bias: Tensor | None,
        seed: Tensor | None,
        dropout: float,
    ) -> Tensor:
        """Keeps, in v's dtype, what the backward pass reads."""
        by_group = q.unflatten(1, (k.size(1), -1)).transpose(2, 3)  # (B, G, T, R, D)
        # Scaled before it is rounded: rotary positions may leave it in float32.
        scaled = (by_group * q.size(3) ** -0.5).to(v.dtype)
        queries = scaled.flatten(0, 1).contiguous()  # (N, T, R, D)
        keys = k.to(v.dtype).reshape(-1, *k.shape[2:])  # (N, S, D)
        values = (v * gain(dropout) if dropout else v).reshape(keys.shape)  # (N, S, D)
        keep = any(ctx.needs_input_grad) and k.size(2) <= KEPT_KEYS
        attend = torch.ops.nanogpt_surgery.attend
        y, weights = attend(queries, keys, values, bias, seed, dropout, keep)
        ctx.save_for_backward(queries, keys, values, bias, seed, weights)
        ctx.dropout, ctx.dtypes = dropout, (q.dtype, k.dtype)
        return by_head(y, len(q))

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        """The gradients of q, k and v."""
        queries, keys, *others, weights = ctx.saved_tensors
        batch, groups = len(dy), len(keys) // len(dy)
        dy = dy.unflatten(1, (groups, -1)).transpose(2, 3).reshape(queries.shape)
        backward = torch.ops.nanogpt_surgery.attend_backward
        dq, dk, dv = backward(dy, queries, keys, *others, ctx.dropout, weights)
        dq = by_head(dq, batch).to(ctx.dtypes[0]) * dy.size(3) ** -0.5
        dk, dv = (d.unflatten(0, (batch, groups)) for d in (dk, dv))  # (B, G, S, D)
        if ctx.dropout:
            dv = dv * gain(ctx.dropout)
        return dq, dk.to(ctx.dtypes[1]), dv, None, None, None


def by_head(x: Tensor, batch: int) -> Tensor:
    """(N, T, R, D) → (B, H, T, D), in memory as (B, T, H, D), like what a projection makes."""
    return x.unflatten(0, (batch, -1)).transpose(1, 2).flatten(2, 3).transpose(1, 2)


class Block(NamedTuple):
    """Some queries of some heads."""

    heads: slice
    queries: slice
    keys: slice
    kept: slice
    """where its weights lie, all of them one after the other"""


def blocks_of(q: Tensor, k: Tensor) -> Iterator[Block]:
    """Yields the blocks of q (N, T, R, D) and k (N, S, D); of each head the last one first."""
    groups, queries, sharing, _ = q.shape
    past, at = k.size(1) - queries, 0
    scores = groups * min(QUERIES, queries) * sharing * k.size(1)
    step = -(-groups // -(-scores // IN_CACHE))
    for head in range(0, groups, step):
        heads = min(step, groups - head)
        for start in reversed(range(0, queries, QUERIES)):
            end = min(start + QUERIES, queries)
            size = heads * (end - start) * sharing * (past + end)
            rows, keys = slice(start, end), slice(past + end)
            yield Block(slice(head, head + heads), rows, keys, slice(at, at + size))
            at += size


class Weights:
    """Computes the weights of one block after the other."""

    def __init__(
        self, q: Tensor, k: Tensor, bias: Tensor | None, seed: Tensor | None, dropout: float
    ):
        self.q, self.k, self.bias, self.dropout = q, k, bias, dropout
        visible = torch.ones(QUERIES, QUERIES, dtype=q.dtype).tril()
        self.later = visible.log()[:, None]  # (n, 1, n): 0 or −∞
        if seed is not None:
            self.generator = torch.Generator().manual_seed(int(seed))

    def of(self, block: Block, out: Tensor) -> Tensor:
        """Computes those of the next block, into a flat tensor: (h, n · R, s)."""
        q = self.q[block.heads, block.queries]  # (h, n, R, D)
        scores = torch.bmm(q.flatten(1, 2), self.k[block.heads, block.keys].mT)  # (h, n · R, s)
        by_query = scores.view(*q.shape[:3], -1)  # (h, n, R, s)
        if self.bias is None:
            n = q.size(1)
            by_query[..., -n:] += self.later[:n, :, :n]
        else:
            groups = self.q.size(0) // self.bias.size(0)  # G
            rows = torch.arange(block.heads.start, block.heads.stop) // groups  # (h)
            by_query += self.bias[rows, block.queries, block.keys][:, :, None]
        weights = torch.softmax(scores, -1, out=out.view(scores.shape))
        if self.dropout:
            bits = random_bits(weights.shape, self.generator)
            # Compared into numbers, whose arithmetic is faster than that of truth values.
            away = torch.lt(bits, level_of(self.dropout), out=torch.empty_like(weights))
            weights.mul_(away.mul_(-2).add_(1))
        return weights


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    seed: Tensor | None,
    dropout: float,
    keep: bool,
) -> tuple[Tensor, Tensor]:
    """Computes the forward pass, and the weights that are kept, as one flat tensor."""
    weights, out, kept = Weights(q, k, bias, seed, dropout), torch.empty_like(q), _room(q, k, keep)
    for block in blocks_of(q, k):
        room = kept[block.kept] if keep else q.new_empty(block.kept.stop - block.kept.start)
        some = weights.of(block, room)
        y = torch.bmm(some.relu() if dropout else some, v[block.heads, block.keys])
        rows = out[block.heads, block.queries]  # (h, n, R, D)
        rows.copy_(y.view(rows.shape))
    return out, kept


def _room(q: Tensor, k: Tensor, keep: bool) -> Tensor:
    """Room for all weights, or for none."""
    return q.new_empty(list(blocks_of(q, k))[-1].kept.stop if keep else 0)


def attend_backward(
    dy: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    seed: Tensor | None,
    dropout: float,
    kept: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Computes the gradients of q, k and v."""
    weights, dq = Weights(q, k, bias, seed, dropout), torch.empty_like(q)
    wide = torch.promote_types(q.dtype, torch.float32)
    dk, dv = torch.empty_like(k, dtype=wide), torch.empty_like(v, dtype=wide)
    for block in blocks_of(q, k):
        heads, rows, keys = block.heads, block.queries, block.keys
        if kept.numel():
            some = kept[block.kept].view(heads.stop - heads.start, -1, keys.stop)
        else:
            some = weights.of(block, q.new_empty(block.kept.stop - block.kept.start))
        up = dy[heads, rows].flatten(1, 2)  # (h, n · R, D)
        add_product(dv, block, (some.relu() if dropout else some).mT, up)
        dp = torch.bmm(up, v[heads, keys].mT)  # (h, n · R, s)
        if dropout:
            dp *= torch.gt(some, 0, out=torch.empty_like(some))
            some = some.abs()
        ds = torch.ops.aten._softmax_backward_data(dp, some, -1, some.dtype)
        into = dq[heads, rows]  # (h, n, R, D)
        into.copy_(torch.bmm(ds, k[heads, keys]).view(into.shape))
        add_product(dk, block, ds.mT, q[heads, rows].flatten(1, 2))
    return dq, dk.to(k.dtype), dv.to(v.dtype)


def add_product(total: Tensor, block: Block, a: Tensor, b: Tensor) -> None:
    """Adds a b (h, s, D) to a total (N, S, D), which may be of a wider dtype.

    The first block of some heads sees all keys, and finds nothing there.
    """
    into = total[block.heads, block.keys]
    if block.keys.stop == total.size(1):
        into.copy_(torch.bmm(a, b))
    elif total.dtype == a.dtype:
        into.baddbmm_(a, b)
    else:
        into += torch.bmm(a, b)


def attend_shapes(
    q: Tensor, k: Tensor, v: Tensor, bias: Any, seed: Any, dropout: float, keep: bool
) -> tuple[Tensor, Tensor]:
    """Returns results of `attend` without their numbers, for the compiler."""
    return torch.empty_like(q), _room(q, k, keep)


def backward_shapes(
    dy: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns results of `attend_backward` without their numbers."""
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


_LIBRARY = torch.library.Library("nanogpt_surgery", "DEF")
_LIBRARY.define(
    "attend(Tensor q, Tensor k, Tensor v, Tensor? bias, Tensor? seed, float dropout, bool keep)"
    " -> (Tensor, Tensor)"
)
_LIBRARY.define(
    "attend_backward(Tensor dy, Tensor q, Tensor k, Tensor v, Tensor? bias, Tensor? seed,"
    " float dropout, Tensor kept) -> (Tensor, Tensor, Tensor)"
)
_LIBRARY.impl("attend", attend, "CPU")
_LIBRARY.impl("attend_backward", attend_backward, "CPU")
torch.library.register_fake("nanogpt_surgery::attend", attend_shapes)
torch.library.register_fake("nanogpt_surgery::attend_backward", backward_shapes)
