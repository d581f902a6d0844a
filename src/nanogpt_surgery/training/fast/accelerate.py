"""The door to everything in this folder: a training's steps, equal but sooner."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
from torch import Tensor, nn

from nanogpt_surgery.data.gpt_dataset import Batch, Batches, documents_of
from nanogpt_surgery.training.distributed import World
from nanogpt_surgery.training.fast.chunked_logits import (
    backward_from_hidden,
    backward_of_loss,
    summed_loss,
)
from nanogpt_surgery.training.fast.compilation import CompiledBlocks
from nanogpt_surgery.training.fast.cpu_kernels import cpu_kernels
from nanogpt_surgery.training.fast.frozen_prefix import prefix_for
from nanogpt_surgery.training.fast.fused_lora import FusedLoRA, stored_in_bfloat16
from nanogpt_surgery.training.fast.prefetch import batches
from nanogpt_surgery.training.hardware import Hardware, cpu_has_bfloat16, to_device
from nanogpt_surgery.training.settings import FitSettings


def accelerate(
    model: nn.Module,
    settings: FitSettings,
    dataset: Batches,
    hardware: Hardware,
    processes: World,
    cache_dir: Path | None = None,
) -> Accelerated:
    """Prepares the quicker ways through the steps of a training.

    Args:
        model: what is trained, on its device. It is changed within `active()` alone.
        settings: of the training.
        dataset: what it learns from.
        hardware: where and in what precision it computes.
        processes: which of them this is; each computes its share of a batch.
        cache_dir: a folder for the hidden states that are kept, instead of memory.
    """
    return Accelerated(model, settings, dataset, hardware, processes, cache_dir)


class Accelerated:
    """The quicker way to batches and gradients, with the methods of `fit`'s own."""

    def __init__(
        self,
        model: nn.Module,
        settings: FitSettings,
        dataset: Batches,
        hardware: Hardware,
        processes: World,
        cache_dir: Path | None,
    ):
        self.model, self.settings, self.dataset = model, settings, dataset
        self.hardware, self.share = hardware, processes.share
        self.prefix = prefix_for(model, dataset, settings, cache_dir)
        self.blocks = CompiledBlocks(model, hardware.compile)
        self.fused = FusedLoRA(model, hardware.precision)

    @contextmanager
    def active(self) -> Iterator[None]:
        """Sets fused products, compiled blocks and the CPU's kernels, and takes them back."""
        with self.fused.active(), self.blocks.active(), cpu_kernels(self.model):
            yield

    def batches(self, first_step: int) -> Iterator[Batch]:
        """Yields the batch of each step; for a GPU the next one is made meanwhile."""
        return batches(self.dataset, self.settings, first_step, self.hardware.device, self.share)

    def forward_backward(self, rows: Batch, share: float) -> Tensor:
        """Adds the gradients of `share` times the mean loss over some rows; returns that loss.

        The rows stay in the host's memory but for what the model reads, and the loss on the device:
        what a GPU is not asked for it is not waited for.
        """
        x, y, documents = rows[0], rows[1], documents_of(rows)
        autocast = self.hardware.autocast
        if self.prefix is None:
            x = to_device(x, self.hardware.device)
            return backward_of_loss(self.model, x, y, share, autocast, documents=documents)
        with autocast():
            hidden = self.prefix.hidden(x, documents)
        return backward_from_hidden(self.prefix.model, hidden, y, share, autocast)


@contextmanager
def accelerate_evaluation(
    model: nn.Module,
) -> Iterator[Callable[[nn.Module, Batch], Tensor]]:
    """Gives the function that sums a batch's loss without ever holding all logits.

    Within, weights in bfloat16 are cast for their products on a CPU that has no bfloat16.
    """
    on_cpu = next(model.parameters()).device.type == "cpu"
    cast = on_cpu and not cpu_has_bfloat16() and stored_in_bfloat16(model)
    with FusedLoRA(model, torch.float32).active() if cast else nullcontext():
        yield summed_loss
