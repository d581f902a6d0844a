"""Whose doing a logit is: the share of each head and of each feed-forward.

The residual stream before the final norm is a sum: the embedding, what each head adds, what each
feed-forward adds. With the norm's scale held at what it is, norm and head are linear, so the logit
is a sum of shares as well (direct logit attribution; Elhage et al., 2021, "A Mathematical Framework
for Transformer Circuits").

Legend: B batch, T tokens, C width, H heads, L layers, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from nanogpt_surgery.arguments import check_arguments
from nanogpt_surgery.errors import SurgeryError
from nanogpt_surgery.interpret.recording import checked_ids, record
from nanogpt_surgery.model.loss import eval_mode
from nanogpt_surgery.model.simple_gpt import SimpleGPT


@dataclass(frozen=True)
class Attribution:
    """The shares in the logit of one token a row, which add up to it; float32."""

    token: Tensor
    """the id whose logit it is, (B,)"""
    logit: Tensor
    """(B,)"""
    heads: Tensor
    """(B, L, H)"""
    attention_bias: Tensor
    """of `o_proj`'s bias, which is no head's: (B, L)"""
    feed_forward: Tensor
    """its bias included: (B, L)"""
    embedding: Tensor
    """of the token, of previous ones and of its learned position: (B,)"""
    final_bias: Tensor
    """of the biases of the final norm and of the head: (B,)"""
    rounding: Tensor
    """what is nobody's: in float32 next to nothing, in bfloat16 what its sums round, (B,)"""

    def total(self) -> Tensor:
        """Returns the sum of all shares, what was rounded included, (B,): the logit."""
        inside = self.heads.sum((1, 2)) + self.attention_bias.sum(1) + self.feed_forward.sum(1)
        return inside + self.embedding + self.final_bias + self.rounding

    def largest(self, count: int = 10, row: int = 0) -> list[tuple[str, float]]:
        """Returns the shares largest in size, with their names, the largest first."""
        shares = sorted(self._named(row), key=lambda share: -abs(share[1]))
        return shares[:count]

    def _named(self, row: int) -> Iterator[tuple[str, float]]:
        yield "embedding", float(self.embedding[row])
        yield "final bias", float(self.final_bias[row])
        yield "rounding", float(self.rounding[row])
        for layer, heads in enumerate(self.heads[row].tolist()):
            yield from ((f"layer {layer}, head {h}", share) for h, share in enumerate(heads))
            yield f"layer {layer}, attention bias", float(self.attention_bias[row, layer])
            yield f"layer {layer}, feed-forward", float(self.feed_forward[row, layer])


@check_arguments
def attribution(
    model: SimpleGPT, ids: Tensor, token: int | None = None, position: int = -1
) -> Attribution:
    """Returns the shares in the logit of the token after a position.

    Args:
        model: with its adapters, if it carries any; left in the mode it is in.
        ids: (B, T) int64.
        token: whose logit; None is the likeliest one of each row.
        position: the token after this one; −1 is the last.

    Raises:
        SurgeryError: the position, the token or an id is not there.
    """
    ids = checked_ids(model, ids)
    tokens, vocab_size = ids.size(1), model.config.vocab_size
    if not -tokens <= position < tokens:
        raise SurgeryError(f"position is {position}; there are {tokens} tokens")
    if token is not None and not 0 <= token < vocab_size:
        raise SurgeryError(f"token is {token}; the vocabulary is 0 to {vocab_size - 1}")
    points = ["layers.0.residual_before", "layers.*.heads", "layers.*.mlp"]
    with eval_mode(model), torch.no_grad():
        with record(model, points) as found:
            hidden = model.hidden(ids)[:, position]  # (B, C)
        logits = model.lm_head(hidden).float()  # (B, V)
        chosen = logits.argmax(-1) if token is None else torch.full_like(logits[:, 0].long(), token)
        attentions: list[Any] = [layer.self_attn for layer in model.layers]
        at = {name: value[:, position].float() for name, value in found.items()}
        numbers = range(len(attentions))
        heads = torch.stack([at[f"layers.{i}.heads"] for i in numbers], 1)  # (B, L, H, C)
        mlp = torch.stack([at[f"layers.{i}.mlp"] for i in numbers], 1)  # (B, L, C)
        biases = torch.stack([_bias_of(a.o_proj, hidden) for a in attentions], 1)  # (B, L, C)
        embedding = at["layers.0.residual_before"]  # (B, C)
        residual = embedding + heads.sum((1, 2)) + biases.sum(1) + mlp.sum(1)
        shares = _Shares(model, hidden, residual, chosen)
        found_shares = Attribution(
            token=chosen,
            logit=logits.gather(1, chosen[:, None])[:, 0],
            heads=shares.of(heads),
            attention_bias=shares.of(biases),
            feed_forward=shares.of(mlp),
            embedding=shares.of(embedding),
            final_bias=shares.of_biases(),
            rounding=torch.zeros_like(logits[:, 0]),
        )
    return replace(found_shares, rounding=found_shares.logit - found_shares.total())


def _bias_of(layer: Any, like: Tensor) -> Tensor:
    """Returns what a layer gives for zeros, (B, out): its bias, each row's adapters included."""
    zeros = like.new_zeros(len(like), 1, layer.in_features)
    bias: Tensor = layer.forward(zeros)[:, 0].float()
    return bias


class _Shares:
    """The final norm, its scale held, and the head's row of one token a row: both linear."""

    def __init__(self, model: SimpleGPT, hidden: Tensor, residual: Tensor, chosen: Tensor):
        self.norm: Any = model.norm
        self.centres = model.config.norm == "layernorm"
        square = self._centred(residual).square().mean(-1, keepdim=True)
        self.scale = torch.rsqrt(square + model.config.norm_eps)  # (B, 1)
        with torch.enable_grad():  # the row is a gradient, so that adapters of the head take part
            x = torch.zeros_like(hidden, requires_grad=True)
            bias = model.lm_head(x).gather(1, chosen[:, None])  # (B, 1): the head's, if it has one
            (row,) = torch.autograd.grad(bias.sum(), x)
        self.row, self.head_bias = row.float(), bias.detach()[:, 0].float()  # (B, C), (B,)

    def _centred(self, x: Tensor) -> Tensor:
        return x - x.mean(-1, keepdim=True) if self.centres else x

    def of(self, parts: Tensor) -> Tensor:
        """Returns the shares (B, …) of parts (B, …, C) of the residual stream."""
        rows = parts.flatten(1, -2) if parts.dim() > 2 else parts[:, None]  # (B, N, C)
        scaled = self._centred(rows.float()) * self.scale[:, None] * self.norm.weight.float()
        return (scaled @ self.row[..., None]).view(parts.shape[:-1])

    def of_biases(self) -> Tensor:
        """Returns the share of the biases of norm and head, (B,)."""
        bias = getattr(self.norm, "bias", None)
        return self.head_bias if bias is None else self.row @ bias.float() + self.head_bias
