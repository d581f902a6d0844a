"""A run on the command line, watched and interruptible, for `train` and `finetune`."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from nanogpt_surgery.cli.framework.console import Announced, say, show, watched
from nanogpt_surgery.cli.framework.output import room
from nanogpt_surgery.cli.framework.processes import is_distributed
from nanogpt_surgery.cli.framework.signals import signals
from nanogpt_surgery.cli.framework.typed_command import typed_command
from nanogpt_surgery.errors import SurgeryError, quoted
from nanogpt_surgery.memory import is_out_of_memory

if TYPE_CHECKING:
    from nanogpt_surgery.cli.run_options import RunOptions
    from nanogpt_surgery.report import Report
    from nanogpt_surgery.runs.description import RunDiffersError
    from nanogpt_surgery.runs.run import Run
    from nanogpt_surgery.runs.training import Training
    from nanogpt_surgery.training.settings import FitSettings


def check_first(options: RunOptions, settings: FitSettings, asked: dict[str, Any]) -> None:
    """Raise what can be refused before anything is read: the folder, the device, the length.

    Raises:
        SurgeryError: the device is not there, no run can begin or go on in the folder, or the run's
            options contradict each other or the settings that were `asked` for.
    """
    from nanogpt_surgery.formats.folders.run_folder import checkpoints
    from nanogpt_surgery.runs.length import check_epochs
    from nanogpt_surgery.runs.run import check_run
    from nanogpt_surgery.runs.save_interval import SaveInterval
    from nanogpt_surgery.training.hardware import choose_hardware

    check_epochs(options.epochs, asked.get("max_steps"))
    for name, value in (("patience", options.patience), ("sample_every", options.sample_every)):
        if value is not None and value < 0:
            raise SurgeryError(f"{name} is {value}; it must be at least 0")
    SaveInterval.read(options.save_every)
    choose_hardware(settings)
    if options.plan and is_distributed():
        raise SurgeryError("a plan is made by one process", "run it without torchrun")
    if not options.plan:
        check_run(options.out, settings, options.resume)
        if options.resume and not checkpoints(options.out):
            say(f"note: there is no checkpoint in {options.out}: --resume begins at step 0")


def prepared(training: Training, asked: dict[str, Any], options: RunOptions) -> Training:
    """The training as the run's options want it, as long as its data says; that is said."""
    from nanogpt_surgery.runs.length import EPOCHS, amount_of, with_length

    usual, dataset, epochs = training.settings, training.dataset, options.epochs
    settings = with_length(usual, dataset, epochs, options.patience, frozenset(asked))
    if settings.max_steps != usual.max_steps or epochs is not None:
        epochs = EPOCHS if epochs is None else epochs
        one, size = "" if epochs == 1 else "s", settings.batch_size * settings.grad_accum_steps
        steps = f"{settings.max_steps:,} steps of {size:,}"
        say(f"{epochs:g} epoch{one} of {amount_of(dataset)}: {steps}")
    return replace(
        training,
        settings=settings,
        patience=options.patience,
        save_every=options.save_every,
        sample_every=options.sample_every,
    )


def carry_out(training: Training, options: RunOptions, done: str) -> None:
    """Train to the end, or to a signal, and report what was `done`; with --plan, what it takes."""
    from nanogpt_surgery.report import Report

    if options.plan:
        with _explained(training, options):
            show(_planned(training, options), options.json)
        say("the same command without --plan trains it")
        return
    validation = Announced(training.validation)
    with _explained(training, options), _opened(training, options) as run, signals(run.stop):
        steps, most = run.train(validation), training.settings.max_steps
        for step in watched(steps, run.folder.first_step, most, run.full_rate, validation):
            last = step.step
        if run.stopped:
            place = options.out
            say(f"saved after step {last:,} in {place}; the same command with --resume goes on")
            sys.exit(128 + run.stopped)
        show(Report(done, [], run.finish()), options.json)


@contextmanager
def _explained(training: Training, options: RunOptions) -> Iterator[None]:
    """Errors of the block say which command began the run, and what to lower for memory."""
    from nanogpt_surgery.runs.description import RunDiffersError

    try:
        yield
    except RunDiffersError as error:
        raise _with_typed(error) from None
    except Exception as error:
        if is_out_of_memory(error):
            raise _out_of_memory(training, options, error) from error
        raise


def _opened(training: Training, options: RunOptions) -> AbstractContextManager[Run]:
    from nanogpt_surgery.runs.run import Run

    ways: dict[str, Any] = {"typed": typed_command(), "say": say}
    if not options.resume:
        return Run.begin(options.out, training, **ways)
    ways |= {"strict": options.strict, "allow_changes": options.allow_changes}
    return Run.resume(options.out, training, **ways)


def _with_typed(error: RunDiffersError) -> SurgeryError:
    """The error, with the command that began the run."""
    arguments = (error.before.get("typed") or {}).get("arguments")
    if not arguments:
        return error
    command = f"surgery {shlex.join(arguments)}"
    return SurgeryError(error.what, f"it was begun with: {command}; or take a new --out")


def _out_of_memory(training: Training, options: RunOptions, error: Exception) -> SurgeryError:
    """Says what to lower, and where the run can go on."""
    from nanogpt_surgery.formats.folders.run_folder import checkpoints

    kept = "" if options.plan else "; there is no checkpoint yet"
    if not options.plan and (found := checkpoints(options.out)):
        kept = f"; the last checkpoint is {found[-1]}, from which --resume goes on"
    return SurgeryError(
        f"memory ran out: {quoted(str(error).partition(chr(10))[0])}{kept}",
        f"lower --batch-size from {training.settings.batch_size} (--grad-accum-steps makes up for "
        "it) or --block-size, or add --gradient-checkpointing; --plan says what each takes",
    )


def _planned(training: Training, options: RunOptions) -> Report:
    """Reports the memory and time that the training will take; no folder is touched."""
    from nanogpt_surgery.report import Report
    from nanogpt_surgery.runs.checkpoints import KEPT
    from nanogpt_surgery.training.checks import check_training, memory_for_training
    from nanogpt_surgery.training.estimates.plan import plan_training

    model, settings = training.model, training.settings
    check_training(model, training.dataset, settings)
    say("timing a few steps and an evaluation")
    free = room(memory_for_training(model, settings), options.out)
    checkpoints = KEPT + 2  # the best, and a new one before an old one goes
    data = training.dataset, training.validation
    summary = plan_training(model, data[0], settings, data[1], checkpoints)
    return Report("training planned", [], summary | free)
