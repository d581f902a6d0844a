"""The gradients of a step, part by part."""

from __future__ import annotations

from torch import Tensor, nn

from nanogpt_surgery.data.batches import Batch, documents_of
from nanogpt_surgery.training.fast.frozen_prefix import FrozenPrefix
from nanogpt_surgery.training.hardware import Hardware, to_device
from nanogpt_surgery.training.loss import backward_from_hidden, backward_of_loss, n_trained
from nanogpt_surgery.training.settings import FitSettings


def accumulate(
    model: nn.Module,
    batch: Batch,
    settings: FitSettings,
    step: int,
    prefix: FrozenPrefix | None,
    hardware: Hardware,
    whole: int,
    rank: int = 0,
) -> list[Tensor]:
    """Gradients of the mean loss over the step's windows; returns what adds up to that loss.

    The batch stays in the host's memory but for what the model reads, and the losses on the device:
    what a GPU is not asked for it is not waited for.

    Args:
        model: its gradients are added to.
        batch: the rows of this process, in the host's memory.
        settings: of them the seed, and in how many parts the rows are computed.
        step: steps done before.
        prefix: hidden states that are kept, if any are.
        hardware: where and in what precision.
        whole: tokens that are trained on in the step's whole batch, of all processes.
        rank: which process this is. Its parts follow those of the one before, so that dropout
            draws what it draws where one process computes them all.
    """
    parts = settings.grad_accum_steps
    losses = []
    for part, piece in enumerate(
        zip(*(tensor.chunk(parts) for tensor in batch), strict=True), rank * parts
    ):
        if counted := n_trained(piece[1]):
            with hardware.seeded(hash((settings.seed, step, part))):
                losses.append(_backward(model, piece, counted / whole, prefix, hardware))
    return losses


def _backward(
    model: nn.Module,
    batch: Batch,
    share: float,
    prefix: FrozenPrefix | None,
    hardware: Hardware,
) -> Tensor:
    x, y, documents = batch[0], batch[1], documents_of(batch)
    if prefix is None:
        x = to_device(x, hardware.device)
        return backward_of_loss(model, x, y, share, hardware.autocast, documents=documents)
    with hardware.autocast():
        hidden = prefix.hidden(x, documents)
    return backward_from_hidden(prefix.model, hidden, y, share, hardware.autocast)
