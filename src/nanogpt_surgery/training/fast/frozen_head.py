"""The loss over a frozen head, and its gradients, without autograd: no product that nobody needs.

The logits of n tokens are made for some ids of the vocabulary at a time, a piece that a CPU's cache
holds until its exponentials are taken:

    l = W h + s · B (A h)                          the logits of a piece, (p, n)
    m = max l,  e = exp(l − m)                     for each token its maximum in the piece
    ln Z = ln Σ exp(m) Σ e                         over all pieces
    loss = ln Z − l[y]                             y the id that came
    ∂l = exp(m − ln Z) · e − onehot(y)             one factor for each token and piece

    ∂B = s · ∂l (A h)ᵀ,  ∂A = s · (Bᵀ ∂l) hᵀ       thin products
    ∂h = Wᵀ ∂l + s · Aᵀ (Bᵀ ∂l)                    the second large one, only where h needs it

The one tensor as wide as the vocabulary holds e. The factors scale what its products yield, where
the onehot is taken away as well. Tokens that are not trained on are left out before the first
product. W is cast, where its dtype is another than the products', a piece at a time.

Legend: N tokens, n of them at a time, C width, V vocabulary, P pieces of it, R rank.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from nanogpt_surgery.lora.linear import LoRALinear
from nanogpt_surgery.training.fast.fused_lora import (
    can_fuse,
    frozen_linear,
    watched,
)
from nanogpt_surgery.training.hardware import to_device

IN_CACHE = 2**20  # logits of a piece on a CPU; a GPU takes the vocabulary whole


@dataclass(frozen=True)
class FrozenHead:
    """W (V, C), the dtype of its products, and A (R, C), B (V, R) and the scale of an update.

    R is 0 where there is none.
    """

    weight: Tensor
    precision: torch.dtype
    a: Tensor
    b: Tensor
    scale: float

    def piece(self, ids: slice) -> Tensor:
        """W of some ids as its products take it, (p, C)."""
        return self.weight[ids].to(self.precision)


def frozen_head(head: nn.Module, precision: torch.dtype) -> FrozenHead | None:
    """A model's head as a `FrozenHead`, or None if it is more than that."""
    if watched(head):
        return None
    if isinstance(head, LoRALinear) and can_fuse(head) and head.original_layer.bias is None:
        update = head.plain_update
        assert update is not None, "can_fuse has seen to it"
        weight: Tensor = head.original_layer.weight.detach()
        return FrozenHead(weight, precision, *update.factors(), update.scaling)
    if frozen_linear(head) and head.bias is None:
        weight = head.weight.detach()
        vocabulary, width = weight.shape
        none = torch.empty(0, device=weight.device)
        return FrozenHead(weight, precision, none.view(0, width), none.view(vocabulary, 0), 0.0)
    return None


def backward_of_frozen_head(
    head: FrozenHead,
    hidden: Tensor,
    targets: Tensor,
    share: float,
    most_logits: int,
    in_piece: int | None = None,
) -> Tensor:
    """Add the gradients of `share` times the mean loss to those that are there.

    Args:
        head: what makes logits of hidden states.
        hidden: (B, T, C); if it needs a gradient, it is gone on from there.
        targets: the ids that came, (B, T); −100 is not trained on, but some are. In the host's
            memory nobody waits for a GPU.
        share: what the loss is multiplied with.
        most_logits: numbers in the tensor as wide as the vocabulary, about.
        in_piece: logits that are made in one go, about; by default what suits the device.

    Returns:
        The loss times `share`, a scalar.
    """
    places, y = trained_places(targets, hidden.device)  # (N), (N)
    h = hidden.detach().flatten(0, 1)[places].float()  # (N, C)
    vocabulary = len(head.weight)
    size = min(max(1, most_logits // vocabulary), len(h))
    room = torch.empty(vocabulary * size, device=h.device)
    in_piece = in_piece or (IN_CACHE if h.device.type == "cpu" else room.numel())
    total, gradients = torch.zeros((), device=h.device), []
    for some, came in zip(h.split(size), y.split(size), strict=True):
        part = forward(head, some, came, room, share / len(places), in_piece)
        total += part.loss
        gradients.append(backward(head, part, hidden.requires_grad))
    if hidden.requires_grad:
        whole = torch.zeros_like(hidden).flatten(0, 1)
        whole[places] = torch.cat(gradients).to(hidden.dtype)
        hidden.backward(whole.view_as(hidden))
    return total


def trained_places(targets: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """Where in targets (B, T) something is trained on, and what: (N) each, on a device."""
    places = (targets.flatten() != -100).nonzero().squeeze(1)
    return to_device(places, device), to_device(targets.flatten()[places], device)


@dataclass(frozen=True)
class Part:
    """Saved by the forward pass of tokens h (n, C), with next ids y (n), for the backward."""

    h: Tensor
    y: Tensor
    share: float
    """of each token in the loss"""
    loss: Tensor
    """times the share, summed"""
    down: Tensor
    """s · A h, (n, R)"""
    pieces: list[slice]
    e: Tensor
    """(V, n)"""
    factors: Tensor
    """share · exp(m − ln Z), (P, n)"""


@torch.no_grad()
def forward(
    head: FrozenHead, h: Tensor, y: Tensor, room: Tensor, share: float, in_piece: int
) -> Part:
    """The loss of tokens h (n, C), with the exponentials in the given room."""
    n, vocabulary = len(h), len(head.weight)
    e = room[: vocabulary * n].view(vocabulary, n)
    rows = max(1, in_piece // n)
    pieces = [slice(at, at + rows) for at in range(0, vocabulary, rows)]
    down = head.scale * (h @ head.a.t())
    across = h.to(head.precision).t()  # (C, n)
    tops, sums = h.new_empty(2, len(pieces), n)
    that_came = h.new_empty(n)  # l[y]
    for ids, top, whole in zip(pieces, tops, sums, strict=True):
        logits = _logits(head, ids, across, down, e[ids])  # (p, n)
        inside = (y >= ids.start) & (y < ids.stop)  # (n)
        row = (y - ids.start).clamp(0, len(logits) - 1)
        torch.where(inside, logits.gather(0, row[None])[0], that_came, out=that_came)
        torch.amax(logits, 0, out=top)
        torch.sum(logits.sub_(top).exp_(), 0, out=whole)
    log_z = (tops + sums.log()).logsumexp(0)
    loss = share * (log_z - that_came).sum()
    return Part(h, y, share, loss, down, pieces, e, share * (tops - log_z).exp())


def _logits(head: FrozenHead, ids: slice, across: Tensor, down: Tensor, out: Tensor) -> Tensor:
    """Of some ids, from h (C, n) and s · A h (n, R): written to `out` (p, n)."""
    weight = head.piece(ids)
    if weight.dtype == out.dtype:
        torch.mm(weight, across, out=out)
    else:
        out.copy_(weight @ across)
    return out.addmm_(head.b[ids], down.t())


@torch.no_grad()
def backward(head: FrozenHead, part: Part, needs_input: bool) -> Tensor:
    """Add to the gradients of A and B; returns ∂h (n, C), or (0, C) where it is not needed."""
    h, y, e = part.h, part.y, part.e
    up = -part.share * head.b[y].t()  # (R, n)
    db = torch.empty_like(head.b)
    dh = -part.share * head.weight[y].float() if needs_input else h[:0]
    for ids, factor in zip(part.pieces, part.factors, strict=True):
        up.addcmul_(head.b[ids].t() @ e[ids], factor)
        torch.mm(e[ids], factor[:, None] * part.down, out=db[ids])
        if needs_input:
            back = e[ids].to(head.precision).t() @ head.piece(ids)
            dh.addcmul_(back.float(), factor[:, None])
    _add_gradient(head.b, db.index_add_(0, y, part.down, alpha=-part.share))
    _add_gradient(head.a, head.scale * (up @ h))
    return dh.addmm_(up.t(), head.a, alpha=head.scale) if needs_input else dh


def _add_gradient(parameter: Tensor, gradient: Tensor) -> None:
    """In the parameter's own layout: a fused optimizer reads a transposed one wrongly."""
    if not parameter.requires_grad:
        return
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    parameter.grad += gradient
