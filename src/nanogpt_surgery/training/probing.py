"""How fast a training goes: a few real steps, of each of its phases, undone to the bit.

Where the hidden states before the first part that learns are kept (`frozen_prefix.py`), the first
pass over the windows computes them and the steps after it only look them up. A probe of new batches
alone would see the first pass; so the batches it began with come again.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from statistics import median

import torch
from torch import Tensor

from nanogpt_surgery.data.batches import Batch, Batches
from nanogpt_surgery.model.simple_gpt import SimpleGPT
from nanogpt_surgery.training.fit import fit
from nanogpt_surgery.training.frozen_prefix import prefix_for
from nanogpt_surgery.training.optimizer import make_optimizer
from nanogpt_surgery.training.settings import FitSettings

NEW, AGAIN = 3, 3  # steps of a probe; the first, which may compile, is timed apart


@dataclass(frozen=True)
class Pace:
    """Seconds of steps."""

    first: float
    """the very first step, which may compile"""
    first_pass: float
    """another one that computes hidden states to be kept"""
    later: float
    """one after that"""
    first_pass_steps: int = 0
    """steps until each window was there once, about; 0 where no states are kept"""

    def seconds(self, steps: int) -> float:
        """What so many steps take."""
        filling = max(1, min(self.first_pass_steps, steps))
        return self.first + (filling - 1) * self.first_pass + (steps - filling) * self.later

    def to_dict(self) -> dict[str, float]:
        """For a report: the first pass only where there is one."""
        passing = {
            "first_pass_steps": self.first_pass_steps,
            "seconds_a_step_of_the_first_pass": self.first_pass,
        }
        return (passing if self.first_pass_steps else {}) | {"seconds_a_step": self.later}


def probed(model: SimpleGPT, dataset: Batches, settings: FitSettings) -> tuple[Pace, int]:
    """The pace of a training, and bytes of the optimizer's state.

    The model has its bits again then.
    """
    optimizer = make_optimizer(model, settings)
    trained = [p for p in model.parameters() if p.requires_grad]
    before, mode = [p.detach().clone() for p in trained], model.training
    try:
        return _pace(model, dataset, settings, optimizer), _state_bytes(optimizer)
    finally:
        with torch.no_grad():
            for parameter, value in zip(trained, before, strict=True):
                parameter.copy_(value)
        model.train(mode)


def _pace(
    model: SimpleGPT, dataset: Batches, settings: FitSettings, optimizer: torch.optim.Optimizer
) -> Pace:
    rows = settings.batch_size * settings.accumulation
    prefix = prefix_for(model, dataset, settings)
    new = min(NEW, max(1, prefix.windows // rows)) if prefix else NEW + AGAIN
    steps = fit(model, _Again(dataset, new), settings, optimizer=optimizer, examine=False)
    seconds = [step.seconds for step in islice(steps, NEW + AGAIN)]
    filling = median(seconds[1:new] or seconds[:1])
    if prefix is None:
        return Pace(seconds[0], filling, filling)
    kept = min(1.0, prefix.windows / len(dataset))
    later = kept * median(seconds[new:] or [filling]) + (1 - kept) * filling
    return Pace(seconds[0], filling, later, min(settings.max_steps, math.ceil(len(dataset) / rows)))


class _Again:
    """The first so many batches of some data, again and again."""

    def __init__(self, data: Batches, new: int):
        self.data, self.new, self.block_size = data, new, data.block_size

    def __len__(self) -> int:
        return len(self.data)

    def batch(
        self, step: int, batch_size: int, seed: int = 0, *, rank: int = 0, world_size: int = 1
    ) -> Batch:
        assert world_size == 1, "a plan is made by one process"
        return self.data.batch(step % self.new, batch_size, seed)

    def whole(self, batch_size: int) -> Iterator[Batch]:
        return self.data.whole(batch_size)


def _state_bytes(optimizer: torch.optim.Optimizer) -> int:
    state = [value for values in optimizer.state.values() for value in values.values()]
    return sum(t.numel() * t.element_size() for t in state if isinstance(t, Tensor) and t.dim())
