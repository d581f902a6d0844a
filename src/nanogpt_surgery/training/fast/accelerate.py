"""The door to everything in this folder: a training's steps, with the same numbers but faster."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nanogpt_surgery.data.gpt_dataset import Batch, Batches, documents_of
from nanogpt_surgery.training.distributed import World
from nanogpt_surgery.training.fast.chunked_logits import (
    backward_from_hidden,
    backward_of_loss,
    summed_loss,
)
from nanogpt_surgery.training.fast.cpu_kernels import cpu_kernels
from nanogpt_surgery.training.fast.frozen_prefix import FrozenPrefix, prefix_for
from nanogpt_surgery.training.fast.fused_lora import fused_products, stored_in_bfloat16
from nanogpt_surgery.training.fast.rounded_weights import RoundedWeights
from nanogpt_surgery.training.forward import attributes_set, blocks_of
from nanogpt_surgery.training.hardware import Hardware, cpu_has_bfloat16, pinned, to_device
from nanogpt_surgery.training.settings import FitSettings


def accelerate(
    model: nn.Module,
    settings: FitSettings,
    dataset: Batches,
    hardware: Hardware,
    processes: World,
    cache_dir: Path | None = None,
) -> Accelerated:
    """Prepares the faster ways through the steps of a training.

    Args:
        model: what is trained, on its device. It is changed within `computing()` alone.
        settings: of the training.
        dataset: what it learns from.
        hardware: where and in what precision it computes.
        processes: which of them this is; each computes its share of a batch.
        cache_dir: a folder for the hidden states that are kept, instead of memory.
    """
    prefix = prefix_for(model, dataset, settings, cache_dir)
    compiled = compiled_calls(model) if hardware.compile else {}
    return Accelerated(model, settings, dataset, hardware, processes.share, prefix, compiled)


@dataclass
class Accelerated:
    """The faster way to batches and gradients, with the methods of `fit`'s own."""

    model: nn.Module
    settings: FitSettings
    dataset: Batches
    hardware: Hardware
    share: dict[str, int]
    """the arguments of `dataset.batch` by which processes share a batch"""
    prefix: FrozenPrefix | None
    compiled: dict[Any, Any]
    """the compiled call of each block"""
    rounded: RoundedWeights = field(default_factory=RoundedWeights)

    @contextmanager
    def computing(self) -> Iterator[None]:
        """Sets fused products, compiled blocks and the CPU's kernels, and takes them back."""
        fused = fused_products(self.model, self.hardware.precision)
        compiled = attributes_set("_compiled_call_impl", self.compiled)
        with fused, compiled, cpu_kernels(self.model), self._cast_once(), self._frozen_cast():
            yield

    def _frozen_cast(self) -> AbstractContextManager[None]:
        """Puts bfloat16 in the place of frozen float32 weights, unless memory is to be saved."""
        settings, precision = self.settings, self.hardware.precision
        if precision != torch.bfloat16 or settings.gradient_checkpointing:
            return nullcontext()
        return self.rounded.active(self.model)

    def _cast_once(self) -> AbstractContextManager[object]:
        """Keeps the weights that autocast casts until all parts of a step have used them.

        They are forgotten when the outermost autocast ends: this one, which itself casts nothing.
        """
        kind, precision = self.hardware.device.type, self.hardware.precision
        if precision == torch.float32:
            return nullcontext()
        return torch.autocast(kind, precision, enabled=False)

    def batches(self, first_step: int) -> Iterator[Batch]:
        """Yields the batch of each step, in the host's memory.

        For CUDA the memory is pinned, from where a copy to the device need not be waited for, and
        the next batch is made meanwhile. On a CPU a thread would only take time from the
        arithmetic: there each batch is made when it is asked for.
        """
        steps = range(first_step, self.settings.max_steps)
        if self.hardware.device.type == "cuda":
            yield from made_ahead(lambda step: tuple(map(pinned, self._batch(step))), steps)
        else:
            yield from map(self._batch, steps)

    def _batch(self, step: int) -> Batch:
        rows = self.settings.batch_size * self.settings.grad_accum_steps
        return self.dataset.batch(step, rows, self.settings.seed, **self.share)

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


def compiled_calls(model: nn.Module) -> dict[Any, Any]:
    """For each block of a model (its `layers`) how it is called compiled; none is so yet.

    The blocks have one code and equal shapes, so that what is compiled for the first serves all:
    whole deep models take minutes on a CPU. Evaluation, in other shapes and precision, is not
    compiled.
    """
    import_module("torch._dynamo")  # takes long to load: before a step's clock runs
    calls = {}
    for block in blocks_of(model):
        block.compile()
        calls[block], block._compiled_call_impl = block._compiled_call_impl, None
    return calls


def made_ahead(make: Callable[[int], Batch], steps: range) -> Iterator[Batch]:
    """The same as calling `make` for each step, with the next one made in a thread meanwhile.

    A batch is a pure function of (seed, step, rank): nothing depends on when it is made.
    """
    with ThreadPoolExecutor(1) as thread:
        waiting = [thread.submit(make, step) for step in steps[:1]]
        for step in steps:
            batch = waiting.pop().result()
            if step + 1 in steps:
                waiting.append(thread.submit(make, step + 1))
            yield batch


@contextmanager
def accelerate_evaluation(
    model: nn.Module,
) -> Iterator[Callable[[nn.Module, Batch], Tensor]]:
    """Gives the function that sums a batch's loss without ever holding all logits.

    Within, weights in bfloat16 are cast for their products on a CPU that has no bfloat16.
    """
    on_cpu = next(model.parameters()).device.type == "cpu"
    cast = on_cpu and not cpu_has_bfloat16() and stored_in_bfloat16(model)
    with fused_products(model, torch.float32) if cast else nullcontext():
        yield summed_loss
