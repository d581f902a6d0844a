"""Cross-entropy, and the KL divergence between two distributions, from logits; both in nats.

`eval_mode` is the mode in which a loss is measured: without dropout.

Legend: B batch, T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch.nn.functional as F
from torch import Tensor, nn

IGNORED = -100  # a target that does not count in the loss; the default of `F.cross_entropy`


def cross_entropy(logits: Tensor, targets: Tensor, reduction: str = "mean") -> Tensor:
    """Returns the mean or the "sum" of −ln p(target), float32: (B, T, V), (B, T) → a scalar.

    Over all targets that are not `IGNORED`.
    """
    return F.cross_entropy(
        logits.flatten(0, -2).float(), targets.flatten(), ignore_index=IGNORED, reduction=reduction
    )


def count_trained(targets: Tensor) -> int:
    """Returns how many targets count in the loss, those that are not `IGNORED`."""
    return int((targets != IGNORED).sum())


def kl_divergence(logits: Tensor, others: Tensor) -> Tensor:
    """Returns the mean of Σ p ln(p / q), p from `logits` and q from `others`, both (…, V)."""
    p, q = F.log_softmax(logits.double(), -1), F.log_softmax(others.double(), -1)  # (…, V)
    return (p.exp() * (p - q)).sum(-1).mean().clamp_min(0)  # rounding can take it below


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Sets every module to eval mode within the block, and back to its own mode after it."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True
