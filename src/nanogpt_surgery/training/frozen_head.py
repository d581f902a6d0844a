"""The loss over a frozen head, and its gradients, without autograd: no product that nobody needs.

    l = W h + s · B (A h)          the logits of a token, (V)
    loss = ln Σ eˡ − l[y]          y the id that came
    ∂l = eˡ / Σ eˡ − onehot(y)
    ∂B = s · ∂l (A h)ᵀ,  ∂A = s · (Bᵀ ∂l) hᵀ        thin products
    ∂h = Wᵀ ∂l + s · Aᵀ (Bᵀ ∂l)                     the second large one, only where h needs it

There is one tensor as wide as the vocabulary, for some tokens at a time: it holds the logits, then
their exponentials, then ∂l but for a factor for each token, which the results are scaled by.
Tokens that are not trained on are left out before the first product.

Legend: N tokens, n of them at a time, C width, V vocabulary, R rank.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from nanogpt_surgery.lora.lora_linear import LoRALinear
from nanogpt_surgery.training.frozen_products import folds, frozen_linear, plain_update


@dataclass(frozen=True)
class FrozenHead:
    """W (V, C) in the precision of its products, and a plain update's A, B and scale, if any."""

    weight: Tensor
    a: Tensor | None = None
    b: Tensor | None = None
    scale: float = 0.0

    @property
    def update(self) -> tuple[Tensor, Tensor] | None:
        """A (R, C) and B (V, R) without gradient."""
        return None if self.a is None or self.b is None else (self.a.detach(), self.b.detach())

    def logits(self, h: Tensor) -> Tensor:
        """(n, C) → (n, V), float32."""
        logits = (h.to(self.weight.dtype) @ self.weight.t()).float()
        if self.update is None:
            return logits
        a, b = self.update
        return logits.addmm_(h @ a.t(), b.t(), alpha=self.scale)

    def backward(self, h: Tensor, dl: Tensor, by_row: Tensor) -> Tensor:
        """From `by_row` (n, 1) times ∂l (n, V): adds to the gradients of A and B."""
        if self.update is None:
            return torch.zeros((), device=h.device)
        a, b = self.update
        up = self.scale * by_row * (dl @ b.t().contiguous().t())  # (n, R)
        down = self.scale * by_row * (h @ a.t())  # (n, R)
        _add_gradient(self.a, up.t() @ h)
        _add_gradient(self.b, (down.t() @ dl).t())
        return up @ a  # (n, C)

    def backward_of_input(self, dl: Tensor, by_row: Tensor) -> Tensor:
        """∂h of W alone, (n, C), from `by_row` times ∂l."""
        return by_row * (dl.to(self.weight.dtype) @ self.weight).float()


def frozen_head(head: nn.Module, precision: torch.dtype) -> FrozenHead | None:
    """A model's head as a `FrozenHead`, or None if it is more than that."""
    if head._forward_hooks or head._forward_pre_hooks:
        return None
    if isinstance(head, LoRALinear) and folds(head) and head.original_layer.bias is None:
        weight = head.original_layer.weight.detach().to(precision)
        return FrozenHead(weight, *plain_update(head))
    if frozen_linear(head) and head.bias is None:
        return FrozenHead(head.weight.detach().to(precision))
    return None


def backward_of_frozen_head(
    head: FrozenHead, hidden: Tensor, targets: Tensor, share: float, most_logits: int
) -> float:
    """Add the gradients of `share` times the mean loss to those that are there.

    Args:
        head: what makes logits of hidden states.
        hidden: (B, T, C); if it needs a gradient, it is gone on from there.
        targets: the ids that came, (B, T); −100 is not trained on.
        share: what the loss is multiplied with.
        most_logits: numbers in the logits that are held at once, about.

    Returns:
        The loss times `share`.
    """
    places = (targets.flatten() != -100).nonzero().squeeze(1)  # (N)
    h, y = hidden.detach().flatten(0, 1)[places].float(), targets.flatten()[places]
    size = max(1, most_logits // head.weight.size(0))
    total = torch.zeros((), device=hidden.device)
    gradients = []
    for part, wanted in zip(h.split(size), y.split(size), strict=True):
        surprise, dl, by_row = _surprise(head.logits(part), wanted)
        by_row = by_row * (share / len(places))
        total += surprise * (share / len(places))
        gradient = head.backward(part, dl, by_row)
        if hidden.requires_grad:
            gradients.append(gradient + head.backward_of_input(dl, by_row))
    if hidden.requires_grad:
        whole = torch.zeros_like(hidden).flatten(0, 1)
        whole[places] = torch.cat(gradients).to(hidden.dtype)
        hidden.backward(whole.view_as(hidden))
    return total.item()


def _surprise(logits: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Σ −ln p(y), and ∂ of it by the logits (n, V) as a tensor and a factor (n, 1) for each row.

    The tensor stands where the logits stood.
    """
    top, came = logits.amax(1, keepdim=True), logits.gather(1, y[:, None])  # (n, 1)
    exponentials = logits.sub_(top).exp_()
    whole = exponentials.sum(1, keepdim=True)  # (n, 1)
    dl = exponentials.scatter_add_(1, y[:, None], -whole)
    return (top + whole.log() - came).sum(), dl, 1 / whole


def _add_gradient(parameter: Tensor | None, gradient: Tensor) -> None:
    """In the parameter's own layout: a fused optimizer reads a transposed one wrongly."""
    if parameter is None or not parameter.requires_grad:
        return
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    parameter.grad += gradient
