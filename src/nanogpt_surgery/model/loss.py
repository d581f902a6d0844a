"""Cross-entropy, and the divergence between two distributions, from logits; both in nats.

And the mode in which either is measured, in which nothing is dropped.

Legend: B batch, T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch.nn.functional as F
from torch import Tensor, nn

IGNORED = -100  # as a target: nothing is trained on there, as `F.cross_entropy` has it


def cross_entropy(logits: Tensor, targets: Tensor, reduction: str = "mean") -> Tensor:
    """Returns −ln p(target), in float32, over all positions: (B, T, V), (B, T) → a scalar."""
    return F.cross_entropy(
        logits.flatten(0, -2).float(), targets.flatten(), ignore_index=IGNORED, reduction=reduction
    )


def count_trained(targets: Tensor) -> int:
    """Returns how many targets count in the loss."""
    return int((targets != IGNORED).sum())


def kl_divergence(logits: Tensor, others: Tensor) -> Tensor:
    """Returns the mean of Σ p ln(p / q), p from `logits` and q from `others`, both (…, V)."""
    p, q = F.log_softmax(logits.double(), -1), F.log_softmax(others.double(), -1)  # (…, V)
    return (p.exp() * (p - q)).sum(-1).mean().clamp_min(0)  # rounding can take it below


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Computes in eval mode within the block; each module has its own mode back after it."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True
