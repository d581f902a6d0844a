"""What is kept of a training while it goes on: metrics, sample answers, checkpoints."""

from __future__ import annotations

from typing import TYPE_CHECKING

from nanogpt_surgery.cli.framework.console import say
from nanogpt_surgery.cli.samples import Samples
from nanogpt_surgery.cli.save_interval import SaveInterval

if TYPE_CHECKING:
    import torch

    from nanogpt_surgery.cli.job import Job
    from nanogpt_surgery.runs.checkpoint import Run
    from nanogpt_surgery.training.step import Step


class Recorder:
    """Writes what is kept; of several processes the first one has it.

    Args:
        job: the training.
        run: its folder.
        optimizer: whose state a checkpoint holds.
    """

    def __init__(self, job: Job, run: Run, optimizer: torch.optim.Optimizer):
        self.job, self.run, self.optimizer = job, run, optimizer
        self.interval = SaveInterval.read(job.options.save_every)
        self.samples = Samples(job, run.folder, run.first_step)
        self.unsaved: Step | None = None

    def begin(self, validation_loss: float) -> None:
        """Before the first step: the loss, and an answer, to compare all later ones with."""
        self.run.record_start(validation_loss)
        most = self.job.settings.max_steps
        say(f"step 0 of {most:,}  validation loss {validation_loss:.4f}")
        if self.samples.due(0, evaluated=True, last=False):
            self.samples.take(0)

    def after(self, step: Step, last: bool, asked: bool) -> None:
        """After each step; where it is the last one, or a signal asked for it, it is saved."""
        self.run.record(step)
        self.unsaved = step
        evaluated = step.validation_loss is not None
        if self.samples.due(step.step, evaluated, last):
            self.samples.take(step.step)
        if evaluated or last or asked or self.interval.due(step.step):
            self.save()

    def save(self) -> None:
        """A checkpoint of the last step, unless it has one."""
        if self.unsaved is not None:
            self.run.save(self.unsaved, self.job.write_weights, self.job.model, self.optimizer)
            self.interval.saved()
            self.unsaved = None
