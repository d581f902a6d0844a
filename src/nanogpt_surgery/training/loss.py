"""Cross-entropy: the mean of −ln p(the token that came), in nats.

With a large vocabulary the logits are the largest tensor of a training step by far, so a
`SimpleGPT`'s are made for some positions at a time, turned into a loss and a gradient, and
forgotten.

Legend: B windows in a batch, T tokens, C width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanogpt_surgery.data.gpt_dataset import GPTDataset
from nanogpt_surgery.model.simple_gpt import SimpleGPT
from nanogpt_surgery.training.frozen_head import backward_of_frozen_head, frozen_head

MOST_LOGITS = 2**23  # 32 MiB in float32


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean over all positions, float32: logits (B, T, V), targets (B, T) → a scalar."""
    return F.cross_entropy(logits.flatten(0, -2).float(), targets.flatten())


def backward_of_loss(
    model: nn.Module,
    inputs: Tensor,
    targets: Tensor,
    share: float = 1.0,
    autocast: Callable[[], AbstractContextManager[object]] = nullcontext,
    most_logits: int = MOST_LOGITS,
) -> float:
    """Add the gradients of `share` times the mean loss to those that are there.

    Args:
        model: called on ids it gives logits; a `SimpleGPT`'s are never all held at once.
        inputs: ids, (B, T).
        targets: the ids that came, (B, T).
        share: what the loss is multiplied with.
        autocast: a context for the forward pass.
        most_logits: numbers in the logits that are held at once, about.

    Returns:
        The loss times `share`.
    """
    if not isinstance(model, SimpleGPT) or _positions(model, inputs, most_logits) >= inputs.size(1):
        with autocast():
            logits = model(inputs)
        loss = cross_entropy(logits, targets) * share
        loss.backward()
        return loss.item()
    with autocast():
        hidden = model.hidden(inputs)  # (B, T, C)
    return backward_from_hidden(model, hidden, targets, share, autocast, most_logits)


def backward_from_hidden(
    model: SimpleGPT,
    hidden: Tensor,
    targets: Tensor,
    share: float = 1.0,
    autocast: Callable[[], AbstractContextManager[object]] = nullcontext,
    most_logits: int = MOST_LOGITS,
) -> float:
    """As `backward_of_loss`, from what the head reads: (B, T, C)."""
    frozen = frozen_head(model.lm_head, _precision(hidden, autocast))
    if frozen is not None:
        return backward_of_frozen_head(frozen, hidden, targets, share, most_logits)
    size = _positions(model, targets, most_logits)
    total = torch.zeros((), device=hidden.device)
    gradients, whole = [], n_trained(targets)
    for part, wanted in zip(hidden.split(size, 1), targets.split(size, 1), strict=True):
        leaf = part.detach().requires_grad_(hidden.requires_grad)  # (B, t, C)
        if counted := n_trained(wanted):
            with autocast():
                logits = model.lm_head(leaf)  # (B, t, V)
            loss = cross_entropy(logits, wanted) * (share * counted / whole)
            loss.backward()
            total += loss.detach()
        gradients.append(torch.zeros_like(leaf) if leaf.grad is None else leaf.grad)
    if hidden.requires_grad:
        hidden.backward(torch.cat(gradients, 1))
    return total.item()


def _precision(
    hidden: Tensor, autocast: Callable[[], AbstractContextManager[object]]
) -> torch.dtype:
    """What products with hidden states are computed in."""
    kind = hidden.device.type
    with autocast():
        return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype


def n_trained(targets: Tensor) -> int:
    """How many targets count in the loss: all that are not −100, as `F.cross_entropy` has it."""
    return int((targets != -100).sum())


def _positions(model: SimpleGPT, ids: Tensor, most_logits: int) -> int:
    """How many positions' logits are made at a time, for ids (B, T)."""
    return max(1, most_logits // (ids.size(0) * model.config.vocab_size))


def _mean_loss(model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
    """The mean loss, float32, a scalar, of a `SimpleGPT` without holding all logits at once."""
    if not isinstance(model, SimpleGPT):
        return cross_entropy(model(inputs), targets)
    hidden, size = model.hidden(inputs), _positions(model, inputs, MOST_LOGITS)
    parts = zip(hidden.split(size, 1), targets.split(size, 1), strict=True)
    losses = [cross_entropy(model.lm_head(h), y) * y.numel() for h, y in parts]
    return torch.stack(losses).sum() / targets.numel()


def evaluate(model: nn.Module, dataset: GPTDataset, batch_size: int = 64) -> float:
    """The mean loss over every target of a dataset's text, in nats a token.

    The text is cut into windows that do not overlap, the last one shorter, so each token but the
    first is predicted once. Computed in the model's own precision, in eval mode, on its device.
    """
    device = next(model.parameters()).device
    total = 0.0
    with eval_mode(model), torch.inference_mode():
        for inputs, targets in _whole_text(dataset, batch_size):
            loss = _mean_loss(model, inputs.to(device), targets.to(device))
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
