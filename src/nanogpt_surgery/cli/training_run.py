"""What `train` and `finetune` share: one run, watched, saved, interruptible."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import takewhile
from time import monotonic
from typing import TYPE_CHECKING, Any

from nanogpt_surgery.cli.framework.console import Announced, say, show, watched
from nanogpt_surgery.cli.framework.output import room
from nanogpt_surgery.cli.framework.processes import is_distributed, run_on_main
from nanogpt_surgery.cli.framework.signals import Stop, signals
from nanogpt_surgery.cli.recorder import Recorder
from nanogpt_surgery.cli.run_description import description_of
from nanogpt_surgery.cli.run_length import check_length
from nanogpt_surgery.cli.run_summary import operations_per_token, summary_of
from nanogpt_surgery.cli.save_interval import SaveInterval
from nanogpt_surgery.errors import NotFiniteError, SurgeryError, quoted
from nanogpt_surgery.memory import is_out_of_memory
from nanogpt_surgery.training.early_stopping import EarlyStopping

if TYPE_CHECKING:
    import torch

    from nanogpt_surgery.cli.job import Job
    from nanogpt_surgery.cli.run_options import RunOptions
    from nanogpt_surgery.report import Report
    from nanogpt_surgery.runs.checkpoint import Run
    from nanogpt_surgery.training.distributed import World
    from nanogpt_surgery.training.settings import FitSettings
    from nanogpt_surgery.training.step import Step


def check_first(options: RunOptions, settings: FitSettings, asked: dict[str, Any]) -> None:
    """What can be refused, or said, before anything is read: the folder, the device, the length.

    Raises:
        SurgeryError: the device is not there, no run can begin or go on in the folder, or the run's
            options contradict each other or the settings that were `asked` for.
    """
    from nanogpt_surgery.formats.folders.run_folder import checkpoints
    from nanogpt_surgery.training.distributed import world
    from nanogpt_surgery.training.hardware import choose_hardware

    check_length(options, asked)
    SaveInterval.read(options.save_every)
    choose_hardware(settings)
    if options.plan:
        if is_distributed():
            raise SurgeryError("a plan is made by one process", "run it without torchrun")
        return
    run_on_main(world(), partial(_checked, options, settings))
    if options.resume and not checkpoints(options.out):
        say(f"note: there is no checkpoint in {options.out}: --resume begins at step 0")


def _checked(options: RunOptions, settings: FitSettings) -> int:
    from nanogpt_surgery.data.gpt_dataset import rows_of
    from nanogpt_surgery.runs.checkpoint import check_folder
    from nanogpt_surgery.training.distributed import world

    rows_of(0, settings.batch_size * settings.grad_accum_steps, world_size=world().size)
    check_folder(options.out, options.resume)
    return 0


def carry_out(job: Job, done: str) -> None:
    """Train and show the report under what was `done`, or, with --plan, show what it will take."""
    from nanogpt_surgery.report import Report
    from nanogpt_surgery.training.memory_estimate import check_training

    check_training(job.model, job.dataset, job.settings)
    try:
        report = _planned(job) if job.options.plan else Report(done, [], _trained(job))
    except Exception as error:
        raise (_out_of_memory(job, error) if is_out_of_memory(error) else error) from error
    show(report, job.options.json)
    if job.options.plan:
        say("the same command without --plan trains it")


def _out_of_memory(job: Job, error: Exception) -> SurgeryError:
    """What to lower, and where the run can go on."""
    from nanogpt_surgery.formats.folders.run_folder import checkpoints

    kept = "" if job.options.plan else "; there is no checkpoint yet"
    if not job.options.plan and (found := checkpoints(job.options.out)):
        kept = f"; the last checkpoint is {found[-1]}, from which --resume goes on"
    return SurgeryError(
        f"memory ran out: {quoted(str(error).partition(chr(10))[0])}{kept}",
        f"lower --batch-size from {job.settings.batch_size} (--grad-accum-steps makes up for it) "
        "or --block-size, or add --gradient-checkpointing; --plan says what each takes",
    )


def _trained(job: Job) -> dict[str, Any]:
    """Train to the end, or to a signal; returns the summary for the report."""
    from nanogpt_surgery.training.distributed import world
    from nanogpt_surgery.training.hardware import (
        choose_hardware,
        environment_of,
        matmul_rate,
        operations_of,
    )
    from nanogpt_surgery.training.optimizer import make_optimizer

    start = monotonic()
    operations = operations_of(job.model, job.settings, job.dataset.block_size)
    hardware = choose_hardware(job.settings, operations)
    together = world()
    environment = environment_of(hardware, together.size)
    description = description_of(job, environment) if together.is_main_process else {}
    with _opened(job, description, together) as run, signals() as stop:
        job.model.to(hardware.device)
        optimizer = make_optimizer(job.model, job.settings)
        if run.checkpoint:
            run.restore(job.model, optimizer)
            say(f"going on from step {run.first_step:,} of {job.settings.max_steps:,}")
            _say_environment(run.environment_before, environment)
        many = f"; {together.size} processes" if together.size > 1 else ""
        say(f"computing on {hardware.describe()}{many}")
        if hardware.compile:
            say("compiling the first step, which takes longer than the others")
        _say_what_is_measured(job)
        rate = matmul_rate(hardware.device, hardware.precision) * together.size
        stepped = _carried_out(job, run, optimizer, stop, rate)
        if not together.is_main_process:
            return {}
        summary = summary_of(job, run, rate, monotonic() - start - stepped)
        _record(run, description, summary)
        return summary


def _carried_out(
    job: Job, run: Run, optimizer: torch.optim.Optimizer, stop: Stop, rate: float
) -> float:
    """Every step that is left, from the first validation on; returns the seconds of the steps."""
    from nanogpt_surgery.files.disk_errors import make_folder
    from nanogpt_surgery.history.hashing import frozen_hashes
    from nanogpt_surgery.lora.checks import check_frozen
    from nanogpt_surgery.training.distributed import world
    from nanogpt_surgery.training.fit import fit

    if job.cache_dir:
        make_folder(job.cache_dir)
    together, validation = world(), Announced(job.validation)
    recorder = Recorder(job, run, optimizer) if together.is_main_process else None
    stopping = EarlyStopping(job.options.patience, _losses(run) if together.is_main_process else ())
    if together.all_reduce_max(stopping.enough):
        return 0.0
    skipped = _skipped_in_a_row(run) if together.is_main_process else 0
    steps = fit(
        job.model,
        job.dataset,
        job.settings,
        validation=validation,
        optimizer=optimizer,
        first_step=run.first_step,
        skipped_before=together.all_reduce_max(skipped),
        cache_dir=job.cache_dir,
    )
    frozen = frozen_hashes(job.model) if job.options.patience else {}
    _begin(job, run, recorder)
    full_rate = rate / operations_per_token(job)
    steps = watched(steps, run.first_step, job.settings.max_steps, full_rate, validation)
    seconds, early = _stepped(job, steps, recorder, stopping, stop)
    if early:
        check_frozen(job.model, frozen)  # what `fit` does after the last step
    return seconds


def _stepped(
    job: Job,
    steps: Iterator[Step],
    recorder: Recorder | None,
    stopping: EarlyStopping,
    stop: Stop,
) -> tuple[float, bool]:
    """Every step, recorded, or a leave at a signal; the seconds, and whether it stopped early."""
    from nanogpt_surgery.training.distributed import world

    together, seconds = world(), 0.0
    with _saved_where_it_breaks(recorder, together):
        for step in steps:
            seconds += step.seconds
            asked = together.all_reduce_max(stop.signal)  # once: it may come at any moment
            if step.validation_loss is not None:
                stopping.add(step.validation_loss)
            early = bool(together.all_reduce_max(stopping.enough))
            over = early or step.step == job.settings.max_steps
            if recorder:
                recorder.after(step, last=over, asked=bool(asked))
            if over:
                return seconds, early
            if asked:
                together.all_reduce_max(0)  # what the first one writes is written
                _leave(job, step, asked)
    return seconds, False


@contextmanager
def _saved_where_it_breaks(recorder: Recorder | None, together: World) -> Iterator[None]:
    """Save the steps since the last checkpoint where numbers are no longer finite."""
    try:
        yield
    except NotFiniteError:
        if recorder:
            recorder.save()
        together.all_reduce_max(0)  # it is written before another process ends
        raise


def _begin(job: Job, run: Run, recorder: Recorder | None) -> None:
    """Before the first step of all, what the model is worth without it."""
    from nanogpt_surgery.data.batches import held_out
    from nanogpt_surgery.training.distributed import world
    from nanogpt_surgery.training.evaluation import validation_loss
    from nanogpt_surgery.training.hardware import choose_hardware

    if run.first_step:
        return
    held = held_out(job.validation, job.settings.evaluate_tokens)
    say("evaluating before the first step")
    loss = validation_loss(job.model, held, job.settings, choose_hardware(job.settings), world())
    if recorder:
        recorder.begin(loss)


def _skipped_in_a_row(run: Run) -> int:
    """How many of the steps so far, up to the last, were skipped."""
    return len(list(takewhile(lambda row: row.get("skipped"), reversed(_metrics(run)))))


def _losses(run: Run) -> list[float]:
    """Of the evaluations after the steps so far."""
    losses = [row.get("validation_loss") for row in _metrics(run) if row["step"]]
    return [loss for loss in losses if loss is not None]


def _metrics(run: Run) -> list[dict[str, Any]]:
    from nanogpt_surgery.formats.folders.run_folder import METRICS
    from nanogpt_surgery.runs.loss_plot import read_metrics

    path = run.folder / METRICS
    return read_metrics(path) if path.is_file() else []


@contextmanager
def _opened(job: Job, description: dict[str, Any], together: World) -> Iterator[Run]:
    """The run, begun or gone on with; others than the first process only read its checkpoint."""
    from nanogpt_surgery.formats.folders.run_folder import checkpoint_at
    from nanogpt_surgery.runs.checkpoint import Run, start_run
    from nanogpt_surgery.runs.description import RunDiffersError

    folder = job.options.out
    own: list[Run] = []
    begun = start_run(
        folder,
        description,
        job.options.resume,
        strict=job.options.strict,
        allow_changes=job.options.allow_changes,
    )

    def begin() -> int:
        own.append(stack.enter_context(begun))
        return own[0].first_step

    with ExitStack() as stack:
        try:
            step = run_on_main(together, begin)
        except RunDiffersError as error:
            arguments = (error.before.get("typed") or {}).get("arguments")
            if not arguments:
                raise
            typed = f"surgery {shlex.join(arguments)}"
            raise SurgeryError(
                error.what, f"it was begun with: {typed}; or take a new --out"
            ) from None
        read = checkpoint_at(folder, step)
        yield own[0] if own else Run(folder, read)


def _say_environment(before: dict[str, Any], now: dict[str, Any]) -> None:
    """A word where the bits will be others than those of an uninterrupted run."""
    found = []
    if before.get("processes", now["processes"]) != now["processes"]:
        found = [f"so far {before['processes']} at a time trained, now {now['processes']}"]
    for name in now.keys() & before.keys() - {"processes"}:
        if before[name] != now[name]:
            found.append(f"{name} was {before[name]} and is {now[name]}")
    if found:
        say(
            f"note: {'; '.join(sorted(found))}: the same batches, sums in another order, so losses "
            "alike but not to the bit"
        )


def _say_what_is_measured(job: Job) -> None:
    from nanogpt_surgery.data.batches import Spread, held_out

    held = held_out(job.validation, job.settings.evaluate_tokens)
    if isinstance(held, Spread):
        say(
            f"an evaluation reads one in {held.every} of the held-out windows, the same each time; "
            "--evaluate-tokens 0 reads all"
        )


def _leave(job: Job, step: Step, number: int) -> None:
    place = job.options.out
    say(f"saved after step {step.step:,} in {place}; the same command with --resume goes on")
    sys.exit(128 + number)


def _record(run: Run, description: dict[str, Any], summary: dict[str, Any]) -> None:
    """A line in the folder's journal, which `surgery log` shows; training is not undone.

    A run that is resumed when it is over has its line, unless it was killed before that.
    """
    from nanogpt_surgery.history.folder_journal import Entry, hashes_of, read_journal, record

    files, base = hashes_of(run.folder), description.get("base", "")
    if read_journal(run.folder).files != files:
        origin = f" from {description['named']['model']}" if "model" in description["named"] else ""
        operation = f"{description['kind']}{origin}, {summary['steps']:,} steps"
        record(run.folder, Entry(operation, base, {}, files, "none", measured=summary))


def _planned(job: Job) -> Report:
    """What the training will take; no folder is touched."""
    from nanogpt_surgery.model.simple_gpt import SimpleGPT
    from nanogpt_surgery.report import Report
    from nanogpt_surgery.training.memory_estimate import memory_for_training
    from nanogpt_surgery.training.planning import plan_training

    assert isinstance(job.model, SimpleGPT)
    say("timing a few steps and an evaluation")
    free = room(memory_for_training(job.model, job.settings), job.options.out)
    summary = plan_training(job.model, job.dataset, job.settings, job.validation)
    return Report("training planned", [], summary | free)
