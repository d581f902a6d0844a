"""How fast a training goes: a few real steps, of each of its phases, undone to the bit.

A step of a probe takes about two seconds at most, whatever the training: where a real one would
take longer, two smaller sizes of batch are measured, and the line through both goes on to the real
size; an update that would take longer is not made, and its time follows from its operations.
Nothing is compiled.

Where the hidden states before the first part that learns are kept (`frozen_prefix.py`), the first
pass over the windows computes them and the steps after it only look them up. A probe of new batches
alone would see the first pass; so the batches it began with come again.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from statistics import median

import torch

from nanogpt_surgery.data.conversations.instruction_dataset import UNTRAINED
from nanogpt_surgery.data.gpt_dataset import Batch, Batches
from nanogpt_surgery.model.simple_gpt import SimpleGPT
from nanogpt_surgery.training.fast.frozen_prefix import prefix_for
from nanogpt_surgery.training.fast.uncompiled import Uncompiled
from nanogpt_surgery.training.fit import fit
from nanogpt_surgery.training.hardware import choose_hardware, matmul_rate
from nanogpt_surgery.training.muon import POLYNOMIALS
from nanogpt_surgery.training.optimizer import make_optimizer
from nanogpt_surgery.training.settings import FitSettings

NEW, AGAIN = 2, 2  # steps of a probe; the first, which warms up, is timed apart
SECONDS = 2.0  # that a step of a probe takes at most, about
ADAMW_WAITS = 100  # operations of a matrix product in the time that AdamW takes for a number
FEWEST = 16  # tokens of a step of a probe, at least


@dataclass(frozen=True)
class Pace:
    """Seconds of steps."""

    first: float
    """the very first step, in which libraries warm up"""
    first_pass: float
    """another one that computes hidden states to be kept"""
    later: float
    """one after that"""
    first_pass_steps: int = 0
    """steps until each window was there once, about; 0 where no states are kept"""

    def seconds(self, steps: int) -> float:
        """Returns the seconds of so many steps."""
        filling = max(1, min(self.first_pass_steps, steps))
        return self.first + (filling - 1) * self.first_pass + (steps - filling) * self.later

    def to_dict(self) -> dict[str, float]:
        """For a report: the first pass only where there is one."""
        passing = {
            "first_pass_steps": self.first_pass_steps,
            "seconds_a_step_of_the_first_pass": self.first_pass,
        }
        return (passing if self.first_pass_steps else {}) | {"seconds_a_step": self.later}


@dataclass
class Part:
    """The first rows of the first batches of some data, cut short, which come again and again."""

    data: Batches
    rows: int
    block_size: int
    batches: int = 1

    def __len__(self) -> int:
        return self.rows * self.batches

    @property
    def tokens(self) -> int:
        """Of a batch."""
        return self.rows * self.block_size

    def batch(
        self, step: int, batch_size: int, seed: int = 0, *, rank: int = 0, world_size: int = 1
    ) -> Batch:
        """As the data's own, cut short."""
        assert world_size == 1, "a plan is made by one process"
        return cut(self.data.batch(step % self.batches, batch_size, seed), self.block_size)

    def iter_all(self, batch_size: int) -> Iterator[Batch]:
        """As the data's own, cut short."""
        return (cut(batch, self.block_size) for batch in self.data.iter_all(batch_size))

    def half(self) -> Part:
        """Half of its rows, or where there is one, half of its length."""
        if self.rows > 1:
            return replace(self, rows=self.rows // 2)
        return replace(self, block_size=max(1, self.block_size // 2))


def cut(batch: Batch, length: int) -> Batch:
    """So many of a batch's columns, those that most is learned from."""
    trained = (batch[1] != UNTRAINED).sum(0).cumsum(0)
    before = torch.cat((trained.new_zeros(1), trained[:-length]))
    start = int((trained[length - 1 :] - before).argmax()) if trained.numel() > length else 0
    return tuple(tensor[:, start : start + length] for tensor in batch)


def affordable_part(model: SimpleGPT, dataset: Batches, settings: FitSettings) -> Part:
    """As much of a batch as takes about two seconds to learn from; all of it if it is less."""
    length = dataset.block_size
    tokens = int(SECONDS * _rate(settings) / (3 * model.config.flops_per_token(length)))
    rows = min(settings.batch_size, max(1, tokens // length))
    return Part(dataset, rows, min(length, max(FEWEST, tokens)))


def _rate(settings: FitSettings) -> float:
    hardware = choose_hardware(settings)
    with hardware.seeded(0):  # the random numbers of others stay theirs
        return matmul_rate(hardware.device, hardware.precision)


def probed(
    model: SimpleGPT, dataset: Batches, settings: FitSettings, part: Part | None = None
) -> tuple[Pace, int]:
    """The pace of a training, and bytes of the optimizer's state.

    The model has its bits again then. `part` is what a step of the probe learns from; by default
    what is affordable.
    """
    optimizer = make_optimizer(model, settings)
    part = part or affordable_part(model, dataset, settings)
    seconds, state = update_operations(optimizer) / _rate(settings), _state_bytes(optimizer)
    if seconds > SECONDS:
        optimizer = _Idle(optimizer.param_groups, {})
        pace = _pace(model, dataset, settings, optimizer, part)
        later = pace.first_pass + seconds, pace.later + seconds
        return replace(pace, first=pace.first + seconds, first_pass=later[0], later=later[1]), state
    trained = [p for p in model.parameters() if p.requires_grad]
    before, mode = [p.detach().clone() for p in trained], model.training
    try:
        return _pace(model, dataset, settings, optimizer, part), state
    finally:
        with torch.no_grad():
            for parameter, value in zip(trained, before, strict=True):
                parameter.copy_(value)
        model.train(mode)


class _Idle(Uncompiled):
    """An optimizer that leaves everything as it is, for gradients alone."""

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """No update."""


def update_operations(optimizer: torch.optim.Optimizer) -> float:
    """About how many operations of a matrix product take as long as an update.

    Muon's rounds are products, on the short side of a matrix but for two; AdamW waits for memory.
    """
    return sum(
        _muon_operations(*sorted(p.shape)) if group.get("muon") else ADAMW_WAITS * p.numel()
        for group in optimizer.param_groups
        for p in group["params"]
    )


def _muon_operations(short: int, long: int) -> float:
    rounds = len(POLYNOMIALS)
    return 4.0 * short * short * long + (8.0 * rounds - 6) * short**3


def _pace(
    model: SimpleGPT,
    dataset: Batches,
    settings: FitSettings,
    optimizer: torch.optim.Optimizer,
    part: Part,
) -> Pace:
    rows = settings.batch_size * settings.grad_accum_steps
    prefix = prefix_for(model, dataset, settings)
    new = min(NEW, max(1, prefix.windows // rows)) if prefix else NEW + AGAIN
    tokens = rows * dataset.block_size
    first, filling, again = _step_seconds(model, settings, optimizer, replace(part, batches=new))
    if part.tokens < tokens:
        half = replace(part.half(), batches=new)
        _, *less = _step_seconds(model, settings, optimizer, half)
        sizes = half.tokens, part.tokens, tokens
        first = filling = _on_a_line(less[0], filling, *sizes)
        again = _on_a_line(less[1], again, *sizes)
    if prefix is None:
        return Pace(first, filling, filling)
    kept = min(1.0, prefix.windows / len(dataset))
    later = kept * again + (1 - kept) * filling
    return Pace(first, filling, later, min(settings.max_steps, math.ceil(len(dataset) / rows)))


def _step_seconds(
    model: SimpleGPT, settings: FitSettings, optimizer: torch.optim.Optimizer, part: Part
) -> tuple[float, float, float]:
    """The first step's seconds, those of another with new rows, and of one whose rows come again.

    Where rows come again in the probe, hidden states are kept if the settings allow it.
    """
    once = part.batches == NEW + AGAIN
    short = replace(
        settings,
        batch_size=part.rows,
        grad_accum_steps=1,
        max_steps=NEW + AGAIN,
        compile="off",
        cache_gib=0.0 if once else settings.cache_gib,
    )
    steps = fit(model, part, short, optimizer=optimizer, examine=False)
    seconds = [step.seconds for step in steps]
    filling = median(seconds[1 : part.batches] or seconds[:1])
    return seconds[0], filling, filling if once else median(seconds[part.batches :])


def _on_a_line(less: float, more: float, few: int, some: int, many: int) -> float:
    """Seconds for many tokens, on the line through those for few and for some."""
    slope = (more - less) / (some - few) if more > less and some > few else more / some
    return more + slope * (many - some)


def _state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Muon keeps one number for each of a matrix, AdamW two."""
    return sum(
        (1 if group.get("muon") else 2) * p.numel() * p.element_size()
        for group in optimizer.param_groups
        for p in group["params"]
    )
