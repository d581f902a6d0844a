"""The norms of a model in fewer passes over memory.

    RMSNorm    n = x / √(mean x² + ε),  y = w ∘ n
               ∂x = (g − n · mean(g ∘ n)) / √(mean x² + ε),  g = w ∘ ∂y

Written as it is read, PyTorch keeps and combines a tensor for each sign in that. And what comes out
of a norm is read by up to three projections, each of which autocast would give a copy of its own in
bfloat16: here it is rounded once.

Legend: C width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from nanogpt_surgery.model.simple_gpt import SimpleGPT
from nanogpt_surgery.model.transformer_encoder_layer import RMSNorm


class RootMeanSquare(torch.autograd.Function):
    """x (…, C), w (C) → (…, C)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """Works in float32 and casts back before the weight, as `RMSNorm` does."""
        wide = x.float()
        norm = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
        inverse = norm.square().div_(x.size(-1)).add_(eps).rsqrt_()  # (…, 1)
        normed = (wide * inverse).to(x.dtype)
        ctx.save_for_backward(normed, inverse, weight)
        return normed * weight

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        """The gradients of x and of w."""
        normed, inverse, weight = ctx.saved_tensors
        dx = dw = None
        if ctx.needs_input_grad[1]:
            dw = (dy * normed).flatten(0, -2).sum(0).to(weight.dtype)
        if ctx.needs_input_grad[0]:
            g, wide = (dy * weight).float(), normed.float()
            mean = torch.linalg.vecdot(g, wide).unsqueeze(-1) / wide.size(-1)  # (…, 1)
            # Where x² has overflowed there is no gradient, and the step is to be skipped.
            scale = inverse.masked_fill(inverse == 0, torch.nan)
            dx = torch.addcmul(g, wide, mean, value=-1).mul_(scale).to(normed.dtype)
        return dx, dw, None


class QuickRMSNorm(RMSNorm):
    """`RMSNorm` by `RootMeanSquare`."""

    def forward(self, x: Tensor) -> Tensor:
        """(…, C) → (…, C)."""
        return RootMeanSquare.apply(x, self.weight, self.eps)


class RoundedRMSNorm(QuickRMSNorm):
    """The same before projections, in what they compute in."""

    def forward(self, x: Tensor) -> Tensor:
        """(…, C) → (…, C)."""
        return rounded(super().forward(x))


class RoundedLayerNorm(nn.LayerNorm):
    """`nn.LayerNorm` before projections, in what they compute in."""

    def forward(self, x: Tensor) -> Tensor:
        """(…, C) → (…, C)."""
        return rounded(super().forward(x))


def rounded(x: Tensor) -> Tensor:
    """Casts to what products are computed in under a CPU's autocast."""
    return x.to(torch.get_autocast_dtype("cpu")) if torch.is_autocast_enabled("cpu") else x


ROUNDED: dict[type[nn.Module], type[nn.Module]] = {
    RMSNorm: RoundedRMSNorm,
    nn.LayerNorm: RoundedLayerNorm,
}


def quick_norms(model: SimpleGPT) -> dict[nn.Module, type[nn.Module]]:
    """For each norm of a model the class that does the same in fewer passes."""
    heads = {m: QuickRMSNorm for m in model.layers.modules() if type(m) is RMSNorm}
    before: list[Any] = [model.norm]
    for layer in model.layers:
        before += [layer.input_layernorm, layer.post_attention_layernorm]
    return heads | {norm: ROUNDED[type(norm)] for norm in before if type(norm) in ROUNDED}
