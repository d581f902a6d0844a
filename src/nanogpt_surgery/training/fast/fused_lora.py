"""Products with frozen matrices, in a training step that computes in float32.

    y = (W + s · B A) x + b         forwards: one product, the update folded into the matrix
    ∂x = (W + s · B A)ᵀ ∂y          backwards: one more, and only where x needs a gradient
    ∂A = s · (Bᵀ ∂y) xᵀ,  ∂B = s · ∂y (A x)ᵀ        thin products; W itself gets no gradient

Written the plain way, W x + s · B (A x), the thin products with the tokens are three more, and a
thin product moves as much memory as it takes time (docs/log.md). In float32 the sum is exact to
rounding; in bfloat16 W would swallow the update, so there the plain way stays.

A frozen W may be stored in bfloat16: it is cast for its product, and its gradients with it,
and forgotten. What is computed is float32 throughout, on processors without bfloat16.

Legend: N tokens, R rank.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanogpt_surgery.lora.linear import LoRALinear
from nanogpt_surgery.training.forward import attributes_set, is_trainable


class FrozenProduct(torch.autograd.Function):
    """x (…, in) → (…, out) with W (out, in), b (out) or None, and A (R, in), B (out, R) or None."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        a: Tensor | None,
        b: Tensor | None,
        scale: float,
    ) -> Tensor:
        """One product."""
        ctx.save_for_backward(x if a is not None else None, weight, a, b)
        ctx.scale = scale
        return F.linear(x, folded(weight, a, b, scale), None if bias is None else bias.float())

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        """The matrix is folded, or cast, again: that is cheaper than keeping it."""
        x, weight, a, b = ctx.saved_tensors
        dx = da = db = None
        if ctx.needs_input_grad[0]:
            dx = dy @ folded(weight, a, b, ctx.scale)
        if a is not None:
            da, db = thin_gradients(x.flatten(0, -2), dy.flatten(0, -2), a, b, ctx.scale)
        return dx, None, None, da, db, None


def folded(weight: Tensor, a: Tensor | None, b: Tensor | None, scale: float) -> Tensor:
    """W + s · B A in float32, (out, in)."""
    weight = weight.float()
    return weight if a is None or b is None else torch.addmm(weight, b, a, alpha=scale)


def thin_gradients(
    x: Tensor, dy: Tensor, a: Tensor, b: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """The gradients of A and B from x (N, in) and ∂y (N, out).

    Each is written so that the long side of x or ∂y is read along its rows.
    """
    down = x @ a.t()  # (N, R)
    up = dy @ b.t().contiguous().t()  # (N, R)
    return scale * (up.t() @ x), scale * (down.t() @ dy).t()  # (R, in), (out, R)


class CastLinear(nn.Linear):
    """A frozen Linear, its weight perhaps in bfloat16, on float32 inputs."""

    def forward(self, x: Tensor) -> Tensor:
        """(…, in) → (…, out)."""
        return FrozenProduct.apply(x, self.weight, self.bias, None, None, 1.0)


class CastEmbedding(nn.Embedding):
    """A frozen Embedding in bfloat16, read in float32."""

    def forward(self, x: Tensor) -> Tensor:
        """(…) → (…, C)."""
        return super().forward(x).float()


class CastLayerNorm(nn.LayerNorm):
    """A frozen LayerNorm, its weight and bias in bfloat16, on float32 inputs."""

    def forward(self, x: Tensor) -> Tensor:
        """(…, C) → (…, C)."""
        bias = None if self.bias is None else self.bias.float()
        return F.layer_norm(x, self.normalized_shape, self.weight.float(), bias, self.eps)


class FusedLoRALinear(LoRALinear):
    """A `LoRALinear` with one plain update taking part, on float32 inputs."""

    def forward(self, x: Tensor) -> Tensor:
        """(…, in) → (…, out)."""
        layer, update = self.original_layer, self.plain_update
        assert update is not None, "can_fuse has seen to it"
        a, b = update.factors()
        return FrozenProduct.apply(x, layer.weight, layer.bias, a, b, update.scaling)


def can_fuse(layer: nn.Module) -> bool:
    """Whether a layer is a `LoRALinear` that `FusedLoRALinear` computes.

    One update takes part, of the plain kind (LoRA, rsLoRA), without dropout, in float32, and what
    it is added to is no wider.
    """
    if not isinstance(layer, LoRALinear) or type(layer) not in (LoRALinear, FusedLoRALinear):
        return False
    if (update := layer.plain_update) is None:
        return False
    return (
        update.dropout.p == 0
        and update.lora_A.dtype == update.lora_B.dtype == torch.float32
        and layer.original_layer.weight.dtype != torch.float64
        and frozen_linear(layer.original_layer)
    )


def frozen_linear(layer: nn.Module) -> bool:
    """Whether a layer is a plain Linear that learns nothing and that nobody watches."""
    return type(layer) in (nn.Linear, CastLinear) and not watched(layer) and not is_trainable(layer)


def watched(layer: nn.Module) -> bool:
    """Whether a layer or a parameter in it has a hook, which products by hand would not call."""
    of_layer = (
        layer._forward_hooks,
        layer._forward_pre_hooks,
        layer._backward_hooks,
        layer._backward_pre_hooks,
    )
    return any(of_layer) or any(
        p._backward_hooks or p._post_accumulate_grad_hooks for p in layer.parameters()
    )


CASTS: dict[type[nn.Module], type[nn.Module]] = {
    nn.Linear: CastLinear,
    nn.Embedding: CastEmbedding,
    nn.LayerNorm: CastLayerNorm,
}


def fused_classes(model: nn.Module, precision: torch.dtype) -> dict[nn.Module, type[nn.Module]]:
    """For each module that a float32 training step can do with less, the class that does so."""
    if precision != torch.float32:
        return {}
    modules = list(model.modules())
    classes: dict[nn.Module, type[nn.Module]] = {m: FusedLoRALinear for m in modules if can_fuse(m)}
    if stored_in_bfloat16(model):
        classes |= {m: CASTS[type(m)] for m in modules if type(m) in CASTS}
    return classes


def stored_in_bfloat16(model: nn.Module) -> bool:
    """Whether frozen parameters are in bfloat16, and all that learn in float32.

    Where gradients are off, nothing learns.
    """
    learns = torch.is_grad_enabled()
    frozen = {p.dtype for p in model.parameters() if not (learns and p.requires_grad)}
    learning = {p.dtype for p in model.parameters() if learns and p.requires_grad}
    return torch.bfloat16 in frozen and learning <= {torch.float32}


def fused_products(model: nn.Module, precision: torch.dtype) -> AbstractContextManager[None]:
    """Within, and nowhere else, a model's frozen products are done the quick way.

    A module of another class with the same parameters stands for itself: its class is changed and
    changed back, which compiled blocks can look through.
    """
    return attributes_set("__class__", fused_classes(model, precision))
