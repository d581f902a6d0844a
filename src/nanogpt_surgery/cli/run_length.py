"""How long a training is, by what was asked for and by its data."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from nanogpt_surgery.cli.framework.console import say
from nanogpt_surgery.errors import SurgeryError

if TYPE_CHECKING:
    from nanogpt_surgery.cli.job import Job
    from nanogpt_surgery.cli.run_options import RunOptions
    from nanogpt_surgery.data.batches import Batches
    from nanogpt_surgery.training.settings import FitSettings

EPOCHS = 3.0  # of instruction data, where nothing is asked for
EVALUATIONS = 8  # in a run whose length follows from its data


def check_length(options: RunOptions, asked: dict[str, Any]) -> None:
    """Refuse epochs that are none, or that stand beside a number of steps.

    Args:
        options: the run's.
        asked: the settings that were given.

    Raises:
        SurgeryError: see above; or patience or sample_every is negative.
    """
    if options.epochs is not None:
        if not (math.isfinite(options.epochs) and options.epochs > 0):
            raise SurgeryError(f"--epochs is {options.epochs}; it must be above 0 and finite")
        if "max_steps" in asked:
            raise SurgeryError(
                f"--epochs {options.epochs:g} and --max-steps {asked['max_steps']} both say how "
                "long to train",
                "leave one of them out",
            )
    for name, value in (("patience", options.patience), ("sample-every", options.sample_every)):
        if value is not None and value < 0:
            raise SurgeryError(f"--{name} is {value}; it must be at least 0")


def with_length(job: Job, asked: dict[str, Any]) -> Job:
    """The training with the length that follows from its data; see `settings_for`."""
    return replace(job, settings=settings_for(job.dataset, job.settings, asked, job.options))


def settings_for(
    dataset: Batches, settings: FitSettings, asked: dict[str, Any], options: RunOptions
) -> FitSettings:
    """The settings with the steps of so many epochs, where they decide, and evaluations to match.

    Of instruction data, of epochs that were asked for, and where the training may stop early,
    there are several evaluations in a run however short it is.
    """
    from nanogpt_surgery.data.conversations.instruction_dataset import InstructionDataset
    from nanogpt_surgery.data.text.mixture import rows_in_epoch

    instructions = isinstance(dataset, InstructionDataset)
    epochs = options.epochs
    if epochs is None and instructions and "max_steps" not in asked:
        epochs = EPOCHS
    if epochs is not None:
        size = settings.batch_size * settings.grad_accum_steps
        steps = max(1, math.ceil(round(epochs * rows_in_epoch(dataset) / size, 6)))
        settings = replace(settings, max_steps=steps)
        one = "" if epochs == 1 else "s"
        say(f"{epochs:g} epoch{one} of {_amount(dataset)}: {steps:,} steps of {size:,}")
    several = instructions or options.epochs is not None or options.patience > 0
    if several and "evaluate_every" not in asked:
        often = math.ceil(settings.max_steps / EVALUATIONS)
        settings = replace(settings, evaluate_every=min(settings.evaluate_every, often))
    return settings


def _amount(dataset: Batches) -> str:
    from nanogpt_surgery.data.conversations.instruction_dataset import InstructionDataset
    from nanogpt_surgery.data.text.mixture import rows_in_epoch

    if not isinstance(dataset, InstructionDataset):
        return f"{round(rows_in_epoch(dataset) * dataset.block_size):,} tokens"
    examples = dataset.counts.examples - dataset.counts.dropped
    rows = f" in {len(dataset):,} rows" if len(dataset) != examples else ""
    return f"{examples:,} examples{rows}"
