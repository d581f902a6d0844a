"""The batches of a training, in order; for a GPU each is made ready while the one before computes.

A batch is a pure function of (seed, step, rank), so that nothing depends on when it is made.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from types import MappingProxyType

import torch

from nanogpt_surgery.data.gpt_dataset import Batch, Batches
from nanogpt_surgery.training.hardware import pinned
from nanogpt_surgery.training.settings import FitSettings


def batches(
    dataset: Batches,
    settings: FitSettings,
    first_step: int,
    device: torch.device,
    share: Mapping[str, int] = MappingProxyType({}),
) -> Iterator[Batch]:
    """The batch of each step from `first_step` on, or a process's share, in the host's memory.

    For CUDA the memory is pinned, from where a copy to the device need not be waited for. On a CPU
    a thread would only take time from the arithmetic: there each batch is made when it is asked
    for.
    """
    size = settings.batch_size * settings.grad_accum_steps

    def make(step: int) -> Batch:
        batch = dataset.batch(step, size, settings.seed, **share)
        return tuple(map(pinned, batch)) if device.type == "cuda" else batch

    steps = range(first_step, settings.max_steps)
    if device.type == "cuda":
        yield from made_ahead(make, steps)
    else:
        yield from map(make, steps)


def made_ahead(make: Callable[[int], Batch], steps: range) -> Iterator[Batch]:
    """The same as calling `make` for each step, with the next one made in a thread meanwhile."""
    with ThreadPoolExecutor(1) as thread:
        waiting = thread.submit(make, steps.start) if steps else None
        for step in steps:
            assert waiting is not None
            batch = waiting.result()
            if step + 1 in steps:
                waiting = thread.submit(make, step + 1)
            yield batch
