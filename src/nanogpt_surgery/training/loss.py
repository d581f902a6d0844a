"""Cross-entropy: the mean of −ln p(the token that came), in nats."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanogpt_surgery.data.gpt_dataset import GPTDataset


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean over all positions, float32: logits (B, T, V), targets (B, T) → a scalar."""
    return F.cross_entropy(logits.flatten(0, -2).float(), targets.flatten())


def evaluate(model: nn.Module, dataset: GPTDataset, batch_size: int = 64) -> float:
    """The mean loss over every target of a dataset's text, in nats a token.

    The text is cut into windows that do not overlap, the last one shorter, so each token but the
    first is predicted once. Computed in the model's own precision, in eval mode, on its device.
    """
    device = next(model.parameters()).device
    total = 0.0
    with eval_mode(model), torch.inference_mode():
        for inputs, targets in _whole_text(dataset, batch_size):
            loss = cross_entropy(model(inputs.to(device)), targets.to(device))
            total += loss.item() * targets.numel()
    return total / (len(dataset.ids) - 1)


def _whole_text(dataset: GPTDataset, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
    ids, length = dataset.ids, dataset.block_size
    full = (len(ids) - 1) // length * length
    inputs, targets = ids[:full].view(-1, length), ids[1 : full + 1].view(-1, length)
    for x, y in zip(inputs.split(batch_size), targets.split(batch_size), strict=True):
        yield x.long(), y.long()
    if full < len(ids) - 1:
        yield ids[None, full:-1].long(), ids[None, full + 1 :].long()


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Eval mode for the block; the model's own mode after it."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
