"""The loss and its gradients without ever holding all logits.

With a large vocabulary the logits are the largest tensor of a training step by far, so a
`SimpleGPT`'s are made for some positions at a time, turned into a loss and a gradient, and
forgotten; where nothing is trained on, none are made.

Legend: B windows in a batch, T tokens, N of them trained on, C width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from nanogpt_surgery.data.gpt_dataset import Batch, documents_of
from nanogpt_surgery.lora.per_row import PerRowAdapters
from nanogpt_surgery.model.loss import count_trained, cross_entropy
from nanogpt_surgery.model.simple_gpt import SimpleGPT
from nanogpt_surgery.training.fast.frozen_head import (
    backward_of_frozen_head,
    frozen_head,
    trained_places,
)
from nanogpt_surgery.training.forward import layout_of, logits_of
from nanogpt_surgery.training.hardware import to_device

# Logits held at once: 32 MiB in float32, which a CPU's caches like; a GPU wants large products.
MOST_LOGITS, MOST_ON_GPU = 2**23, 2**27


def most_logits_on(device: torch.device) -> int:
    """How many numbers of logits are held at once on a device, about."""
    return MOST_ON_GPU if device.type == "cuda" else MOST_LOGITS


def backward_of_loss(
    model: nn.Module,
    inputs: Tensor,
    targets: Tensor,
    share: float = 1.0,
    autocast: Callable[[], AbstractContextManager[object]] = nullcontext,
    most_logits: int | None = None,
    documents: Tensor | None = None,
) -> Tensor:
    """Add the gradients of `share` times the mean loss to those that are there.

    Args:
        model: called on ids it gives logits, or, of transformers, an output that has them; a
            `SimpleGPT`'s are never all held at once.
        inputs: ids, (B, T).
        targets: the ids that came, (B, T). In the host's memory nobody waits for a GPU.
        share: what the loss is multiplied with.
        autocast: a context for the forward pass.
        most_logits: numbers in the logits that are held at once, about; by default what suits the
            device.
        documents: which tokens of a `SimpleGPT`'s rows belong together, (B, T).

    Returns:
        The loss times `share`, a scalar on the inputs' device.
    """
    if not count_trained(targets):
        return torch.zeros((), device=inputs.device)
    most_logits = most_logits or most_logits_on(inputs.device)
    if not isinstance(model, SimpleGPT) or _positions(model, inputs, most_logits) >= inputs.size(1):
        with autocast():
            logits = logits_of(model, inputs, documents)
        loss = cross_entropy(logits, to_device(targets, logits.device)) * share
        loss.backward()
        return loss.detach()
    with autocast():
        hidden = model.hidden(inputs, **layout_of(documents, inputs.device))  # (B, T, C)
    return backward_from_hidden(model, hidden, targets, share, autocast, most_logits)


def backward_from_hidden(
    model: SimpleGPT,
    hidden: Tensor,
    targets: Tensor,
    share: float = 1.0,
    autocast: Callable[[], AbstractContextManager[object]] = nullcontext,
    most_logits: int | None = None,
) -> Tensor:
    """As `backward_of_loss`, from what the head reads: (B, T, C)."""
    if not count_trained(targets):
        return torch.zeros((), device=hidden.device)
    most_logits = most_logits or most_logits_on(hidden.device)
    frozen = frozen_head(model.lm_head, _precision(hidden, autocast))
    if frozen is not None:
        twice = 2 * most_logits  # there is one tensor of the size, below there are four
        return backward_of_frozen_head(frozen, hidden, targets, share, twice)
    read, wanted_of, places = _counted(model, hidden.detach(), targets)
    size = _positions(model, wanted_of, most_logits)
    total = torch.zeros((), device=hidden.device)
    gradients, a_token = [], share / max(1, count_trained(targets))
    for part, wanted in zip(read.split(size, 1), wanted_of.split(size, 1), strict=True):
        leaf = part.detach().requires_grad_(hidden.requires_grad)  # (1, n, C)
        with autocast():
            logits = model.lm_head(leaf)  # (1, n, V)
        loss = cross_entropy(logits, wanted, "sum") * a_token
        loss.backward()
        total += loss.detach()
        gradients.append(torch.zeros_like(leaf) if leaf.grad is None else leaf.grad)
    if hidden.requires_grad:
        gradient = torch.zeros_like(hidden).flatten(0, 1)
        gradient[places] = torch.cat(gradients, 1).flatten(0, 1)
        hidden.backward(gradient.view_as(hidden))
    return total


def _counted(model: SimpleGPT, hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the parts of the loss: hidden states (1, N, C), targets (1, N), and their places (N).

    Rows with adapters of their own stay rows: (B, T, C), (B, T) and (B · T).
    """
    if isinstance(getattr(model.lm_head, "active", None), PerRowAdapters):
        places = torch.arange(targets.numel(), device=hidden.device)
        return hidden, to_device(targets, hidden.device), places
    places, wanted = trained_places(targets, hidden.device)
    return hidden.flatten(0, 1)[None, places], wanted[None], places


def _precision(
    hidden: Tensor, autocast: Callable[[], AbstractContextManager[object]]
) -> torch.dtype:
    """Returns the dtype of products with hidden states."""
    kind = hidden.device.type
    with autocast():
        casts = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
        return torch.get_autocast_dtype(kind) if casts else hidden.dtype


def _positions(model: SimpleGPT, ids: Tensor, most_logits: int) -> int:
    """How many positions' logits are made at a time, for ids (B, T)."""
    return max(1, most_logits // (ids.size(0) * model.config.vocab_size))


def summed_loss(model: nn.Module, batch: Batch) -> Tensor:
    """The loss summed over what counts, float32, a scalar; never all logits of a `SimpleGPT`."""
    device, documents = next(model.parameters()).device, documents_of(batch)
    inputs, targets = to_device(batch[0], device), batch[1]
    if not isinstance(model, SimpleGPT):
        logits = logits_of(model, inputs, documents)
        return cross_entropy(logits, to_device(targets, device), "sum")
    hidden = model.hidden(inputs, **layout_of(documents, device))  # (B, T, C)
    hidden, targets, _ = _counted(model, hidden, targets)
    size = _positions(model, targets, most_logits_on(targets.device))
    parts = zip(hidden.split(size, 1), targets.split(size, 1), strict=True)
    return torch.stack([cross_entropy(model.lm_head(h), y, "sum") for h, y in parts]).sum()
