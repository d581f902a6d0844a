"""A training on the command line, watched and interruptible, for `train` and `finetune`."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from nanogpt_surgery.cli.framework.config_file import typed_command
from nanogpt_surgery.cli.framework.console import Announced, is_distributed, say, show, watched
from nanogpt_surgery.cli.framework.signals import signals
from nanogpt_surgery.errors import SurgeryError, quoted
from nanogpt_surgery.memory import is_out_of_memory

if TYPE_CHECKING:
    from nanogpt_surgery.report import Report
    from nanogpt_surgery.runs.training import Training
    from nanogpt_surgery.training.settings import FitSettings


@Parameter(name="*")
@dataclass(frozen=True)
class RunOptions:
    """Where a training goes, and whether it begins: the flags that `train` and `finetune` share."""

    out: Path
    """the folder to make: what was trained, checkpoints, metrics.jsonl, loss.png"""
    resume: Annotated[bool, Parameter(negative="--no-resume")] = False
    """go on with the run that is there"""
    strict: bool = False
    """with --resume: stop where the newest checkpoint is damaged, instead of passing over it"""
    allow_changes: bool = False
    """with --resume: go on although settings, data or tokenizer differ, and say in what"""
    epochs: float | None = None
    """passes over the data, in the place of --max-steps; 3 for instruction data by default"""
    patience: int = 0
    """evaluations in a row without improvement after which the training stops (0: never)"""
    save_every: str = "10m"
    """steps (500) or time (90s, 10m, 2h) from one checkpoint to the next, beside evaluations'"""
    sample_every: int | None = None
    """steps from one sample answer to the next; by default at evaluations (0: none)"""
    plan: bool = False
    """say what it will take, by a few real steps, and touch nothing"""
    json: bool = False
    """print the result as JSON"""


def check_first(options: RunOptions, settings: FitSettings, asked: dict[str, Any]) -> None:
    """Raises what can be refused before anything is read: the folder, the device, the length.

    Raises:
        SurgeryError: the device is not there, no run can begin or go on in the folder, or the run's
            options contradict each other or the settings that were `asked` for.
    """
    from nanogpt_surgery.formats.folders.run_folder import checkpoints
    from nanogpt_surgery.runs.run import check_run
    from nanogpt_surgery.runs.training import SaveInterval, check_epochs
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


def check_no_records(paths: tuple[str, ...], model: str = "MODEL") -> None:
    """Raises `SurgeryError` if a file that is to be learned as text holds records.

    As text their braces, quotes and names of fields would be learned.
    """
    from nanogpt_surgery.data.conversations.instructions import check_first_record
    from nanogpt_surgery.data.conversations.record_files import holds_records

    for path in paths:
        if path != "-" and holds_records(path):
            check_first_record(path)
            raise SurgeryError(
                f"{path} holds questions with answers, not text",
                f"surgery finetune {model} {path} --out ADAPTER trains on the answers",
            )


def carry_out(
    training: Training, options: RunOptions, asked: dict[str, Any], following: str
) -> None:
    """Trains to the end, or to a signal, and reports it; with --plan, says what that takes.

    Args:
        training: what is trained, on what.
        options: of the run.
        asked: settings that were given on the command line.
        following: the command to type next.
    """
    from nanogpt_surgery.report import Report
    from nanogpt_surgery.runs.run import Run

    training = _prepared(training, options, asked)
    with _explained(training, options):
        if options.plan:
            show(_planned(training, options), options.json)
            say("the same command without --plan trains it")
            return
        begun = Run.begin(
            options.out,
            training,
            resume=options.resume,
            strict=options.strict,
            allow_changes=options.allow_changes,
            typed=typed_command(),
            say=say,
        )
        with begun as run, signals(run.stop):
            data = run.loop.eval_data = Announced(run.loop.eval_data or training.validation)
            first, most = run.folder.first_step, training.settings.max_steps
            for step in watched(run.train(), first, most, run.full_rate, data):
                last = step.step
            if run.stopped:
                place = options.out
                say(f"saved after step {last:,} in {place}; the same command with --resume goes on")
                sys.exit(128 + run.stopped)
            done = {"train": "trained", "finetune": "fine-tuned"}[training.description["kind"]]
            show(Report(done, [], run.finish()), options.json)
    say(following)


def _prepared(training: Training, options: RunOptions, asked: dict[str, Any]) -> Training:
    """The training with the run's options and its number of steps; says what will be trained."""
    from nanogpt_surgery.data.conversations.instruction_dataset import InstructionDataset
    from nanogpt_surgery.data.text.mixture import Mixture
    from nanogpt_surgery.runs.training import EPOCHS, amount_of, with_length

    usual, data = training.settings, training.dataset
    if not isinstance(data, InstructionDataset):  # else a table has said it
        held_out: Any = training.validation
        counts = f"{len(data):,} windows to train on, {len(held_out):,} held out"
        say(f"{counts} (of {getattr(data, 'tokens', 0):,} and {held_out.tokens:,} tokens)")
    settings = with_length(usual, data, options.epochs, options.patience, frozenset(asked))
    if settings.max_steps != usual.max_steps or options.epochs is not None:
        epochs = options.epochs or EPOCHS
        steps, size = settings.max_steps, settings.batch_size * settings.grad_accum_steps
        many = f"{epochs:g} epoch{'' if epochs == 1 else 's'}"
        say(f"{many} of {amount_of(data)}: {steps:,} steps of {size:,}")
    way, other = ("Muon", "no-muon: AdamW") if settings.muon else ("AdamW", "muon: Muon")
    say(f"trained by {way}, at a learning rate of {settings.learning_rate:g} (--{other})")
    if isinstance(data, Mixture):
        for path, share in zip(training.named["text"], data.passes(settings.windows), strict=True):
            say(f"{path}: read {share:.3g} times")
    return replace(
        training,
        settings=settings,
        patience=options.patience,
        save_every=options.save_every,
        sample_every=options.sample_every,
    )


@contextmanager
def _explained(training: Training, options: RunOptions) -> Iterator[None]:
    """Adds to errors of the block which command began the run, or what to lower for memory."""
    from nanogpt_surgery.formats.folders.run_folder import checkpoints
    from nanogpt_surgery.runs.description import RunDiffersError

    try:
        yield
    except RunDiffersError as error:
        if not (typed := (error.before.get("typed") or {}).get("arguments")):
            raise
        hint = f"it was begun with: surgery {shlex.join(typed)}; or take a new --out"
        raise SurgeryError(error.what, hint) from None
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        kept = "" if options.plan else "; there is no checkpoint yet"
        if not options.plan and (found := checkpoints(options.out)):
            kept = f"; the last checkpoint is {found[-1]}, from which --resume goes on"
        raise SurgeryError(
            f"memory ran out: {quoted(str(error).partition(chr(10))[0])}{kept}",
            f"lower --batch-size from {training.settings.batch_size} (--grad-accum-steps makes up "
            "for it) or --block-size, or add --gradient-checkpointing; --plan says what each takes",
        ) from error


def _planned(training: Training, options: RunOptions) -> Report:
    """Reports the memory and time that the training will take; no folder is touched."""
    from nanogpt_surgery.files.disk_errors import free_bytes
    from nanogpt_surgery.report import Report
    from nanogpt_surgery.runs.checkpoints import KEPT
    from nanogpt_surgery.training.checks import check_training, memory_for_training
    from nanogpt_surgery.training.estimates import plan_training

    model, settings = training.model, training.settings
    check_training(model, training.dataset, settings)
    say("timing a few steps and an evaluation")
    memory, disk = memory_for_training(model, settings), free_bytes(options.out)
    checkpoints = KEPT + 2  # the best, and a new one before an old one goes
    data = training.dataset, training.validation
    summary = plan_training(model, data[0], settings, data[1], checkpoints)
    return Report("training planned", [], summary | {"available_bytes": memory, "free_bytes": disk})
