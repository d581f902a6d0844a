"""A run: one training in a folder, begun or gone on with, saved, summarised and signed off.

    with Run.begin("runs/book", Training.of_model(model, tokenizer, data, settings)) as run:
        for step in run.train():
            print(step.step, step.loss)
        print(run.finish())

Where `torch.distributed` has joined several processes, all of them call it alike; the first one
writes the folder.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from itertools import takewhile
from pathlib import Path
from time import monotonic
from typing import Any

from nanogpt_surgery.data.shuffling import rows_of_step
from nanogpt_surgery.errors import NotFiniteError
from nanogpt_surgery.files.disk_errors import make_folder, writing
from nanogpt_surgery.formats.folders.run_folder import METRICS, checkpoint_at
from nanogpt_surgery.history.folder_history import FolderOperation, hashes_of, read_journal, record
from nanogpt_surgery.runs.checkpoints import RunFolder, check_folder, open_run_folder, read_metrics
from nanogpt_surgery.runs.summary import Samples, summary_of
from nanogpt_surgery.runs.training import SaveInterval, Training
from nanogpt_surgery.training.checks import TrainingChecks, check_fit, check_frozen
from nanogpt_surgery.training.distributed import world
from nanogpt_surgery.training.evaluation import Subsampled, validation_loss
from nanogpt_surgery.training.fit import TrainingLoop
from nanogpt_surgery.training.forward import training_flops_per_token
from nanogpt_surgery.training.hardware import environment_of, matmul_rate
from nanogpt_surgery.training.settings import FitSettings
from nanogpt_surgery.training.step import Step

Say = Callable[[str], object]


def check_run(folder: Path, settings: FitSettings, resume: bool = False) -> None:
    """Raises if no run can begin, or go on, in a folder, before any model or data is read.

    Raises:
        SurgeryError: as `check_folder`, or the processes cannot share the batch of a step.
    """

    def check() -> int:
        rows_of_step(0, settings.batch_size * settings.grad_accum_steps, world_size=world().size)
        check_folder(folder, resume)
        return 0

    world().run_on_main(check)


class Run:
    """A training in its folder; `begin` and `resume` give one, as context managers.

    Attributes:
        folder: what lies on disk.
        training: what is trained, and on what.
        loop: `fit`'s own, with optimizer, hardware and what an evaluation reads (`eval_data`).
        stopped: the number given to `stop` if that ended it, else 0.
        stopped_early: whether it ended for lack of improvement (`Training.patience`).
    """

    def __init__(self, folder: RunFolder, training: Training, loop: TrainingLoop, say: Say):
        self.folder, self.training, self.loop = folder, training, loop
        self.say, self.world = say, loop.world
        self.stopped, self.stopped_early = 0, False
        self._began, self._in_steps = monotonic(), 0.0
        self._asked = 0
        self._losses: list[float] = []  # of the evaluations
        self._unsaved: Step | None = None
        if folder.checkpoint:
            folder.restore(training.model, loop.optimizer)
        self._say_how()
        device, precision = loop.hardware.device, loop.hardware.precision
        self.matmul_rate = matmul_rate(device, precision) * self.world.size
        self._interval = SaveInterval.read(training.save_every)
        if self.world.is_main_process:
            self._samples = Samples(training, folder.folder, folder.first_step, say)

    @classmethod
    @contextmanager
    def begin(
        cls,
        folder: str | Path,
        training: Training,
        *,
        resume: bool = False,
        strict: bool = False,
        allow_changes: bool = False,
        typed: Any = None,
        say: Say = lambda _: None,
    ) -> Iterator[Run]:
        """Begins a run in a new folder, which is locked until the block ends.

        Args:
            folder: made; it holds metrics, checkpoints, and the best model or adapter at its top.
            training: what is trained, and on what.
            resume: go on with the run that is there (`Run.resume`).
            strict: on resuming, go on from the newest checkpoint or not at all.
            allow_changes: on resuming, go on although the training is another one, with a warning.
            typed: the command to record.
            say: called with a line on what goes on.

        Raises:
            SurgeryError: the folder holds a run already, or something else, or the disk refuses.
        """
        folder, model, data = Path(folder), training.model, training.dataset
        settings = training.settings
        check_fit(model, data, settings)  # before a folder is made
        loop = TrainingLoop(model, data, settings, training.validation, None, training.cache_dir)
        environment = environment_of(loop.hardware, loop.world.size)
        main = loop.world.is_main_process
        description = training.describe(environment, typed) if main else {}
        with ExitStack() as stack:
            own: list[RunFolder] = []

            def opened() -> int:
                way = open_run_folder(
                    folder, description, resume, strict=strict, allow_changes=allow_changes
                )
                own.append(stack.enter_context(way))
                return own[0].first_step

            step = loop.world.run_on_main(opened)
            there = own[0] if own else RunFolder(folder, checkpoint_at(folder, step))
            there.environment = environment
            yield cls(there, training, loop, say)

    @classmethod
    def resume(
        cls, folder: str | Path, training: Training, **options: Any
    ) -> AbstractContextManager[Run]:
        """Goes on from a run's newest whole checkpoint; its steps have the bits of an unbroken run.

        Args:
            folder: of the run; one that has no checkpoint yet is begun.
            training: the same that it was begun with, or it is refused.
            **options: as `begin`.

        Raises:
            RunDiffersError: the training is another one (all differences).
            SurgeryError: another process is writing it, it is damaged, or the disk refuses.
        """
        return cls.begin(folder, training, resume=True, **options)

    def train(self) -> Iterator[Step]:
        """The steps that are left, after an evaluation before the first one.

        Each is recorded, and saved where it is time, before the next one begins.

        Raises:
            NotFiniteError: loss or gradient was not finite too many steps in a row; the steps
                before are saved.
            SurgeryError: as `fit`, or the disk refuses.
        """
        training, loop, first = self.training, self.loop, self.folder.first_step
        main = self.world.is_main_process
        rows = read_metrics(self.folder.folder / METRICS) if main else []
        losses = [row["validation_loss"] for row in rows if row["step"]]
        self._losses = [loss for loss in losses if loss is not None]
        if self._nothing_is_gained():
            return iter(())
        if training.cache_dir:
            make_folder(training.cache_dir)
        skipped = len(list(takewhile(lambda row: row.get("skipped"), reversed(rows))))
        loop.skipped_in_a_row = self.world.all_reduce_max(skipped)
        checks = TrainingChecks(loop.model, loop.optimizer, first, loop.settings.max_steps - 1)
        if not first:
            self.say("evaluating before the first step")
            assert loop.eval_data is not None
            loss = validation_loss(loop.model, loop.eval_data, loop.settings, loop.hardware)
            if main:
                self.folder.record_start(loss)
                self.say(f"step 0 of {loop.settings.max_steps:,}  validation loss {loss:.4f}")
                if self._samples.due(0, evaluated=True, last=False):
                    self._samples.take(0)
        return self._steps(loop.steps(first, checks), checks)

    def _steps(self, steps: Iterator[Step], checks: TrainingChecks) -> Iterator[Step]:
        try:
            for step in steps:
                try:
                    yield step
                finally:  # also where nobody asks for another one
                    self._keep(step)
                if self.stopped or self.stopped_early:
                    break
        except NotFiniteError:
            if self.world.is_main_process:
                self._save()
            self.world.all_reduce_max(0)  # it is written before another process ends
            raise
        if self.stopped_early:  # what follows the last step else
            check_frozen(self.training.model, checks.frozen)

    def stop(self, number: int = 1) -> None:
        """Asks for a checkpoint after the current step, and for no further step.

        Args:
            number: why, above 0: a signal's; `stopped` says it in all processes.
        """
        self._asked = number

    @property
    def full_rate(self) -> float:
        """Tokens a second, were every operation as fast as the machine's matrix products."""
        kept = getattr(self.loop.way, "prefix", None) is not None
        length = self.training.dataset.block_size
        return self.matmul_rate / training_flops_per_token(self.training.model, length, kept)

    def finish(self) -> dict[str, Any]:
        """Sums the run up, draws its losses, and signs it off in the folder's journal.

        Returns the summary, as plain values; {} in other processes than the first.
        """
        if not self.world.is_main_process:
            return {}
        beside = monotonic() - self._began - self._in_steps
        summary = summary_of(self, beside)
        files = hashes_of(self.folder.folder)
        if read_journal(self.folder.folder).files != files:  # else it has been signed off
            named, known = self.training.named, self.training.description
            origin = f" from {named['model']}" if "model" in named else ""
            operation = f"{known['kind']}{origin}, {summary['steps']:,} steps"
            base = known.get("base", "")
            entry = FolderOperation(operation, base, {}, files, "none", measured=summary)
            with writing(self.folder.folder):
                record(self.folder.folder, entry)
        return summary

    def _nothing_is_gained(self) -> bool:
        since = evaluations_since_best(self._losses)
        return bool(self.world.all_reduce_max(0 < self.training.patience <= since))

    def _keep(self, step: Step) -> None:
        """Records a step, and saves it where it is time; all processes agree on it."""
        self._in_steps += step.seconds
        asked = self.world.all_reduce_max(self._asked)  # once: it may come at any moment
        if step.validation_loss is not None:
            self._losses.append(step.validation_loss)
        enough = self._nothing_is_gained()
        last = enough or step.step == self.training.settings.max_steps
        if self.world.is_main_process:
            self._record(step, last, bool(asked))
        self.stopped_early = enough and step.step < self.training.settings.max_steps
        self.stopped = 0 if last else asked
        if self.stopped:
            self.world.all_reduce_max(0)  # what the first one writes is written

    def _record(self, step: Step, last: bool, asked: bool) -> None:
        self.folder.record(step)
        self._unsaved = step
        evaluated = step.validation_loss is not None
        if self._samples.due(step.step, evaluated, last):
            self._samples.take(step.step)
        if evaluated or last or asked or self._interval.due(step.step):
            self._save()

    def _save(self) -> None:
        """Writes a checkpoint of the last step, unless it has one."""
        if self._unsaved is not None:
            training = self.training
            optimizer = self.loop.optimizer
            self.folder.save(self._unsaved, training.write_weights, training.model, optimizer)
            self._interval.saved()
            self._unsaved = None

    def _say_how(self) -> None:
        """Says from where it goes on, on what it computes, and what an evaluation reads."""
        folder, settings, hardware = self.folder, self.training.settings, self.loop.hardware
        if folder.checkpoint:
            self.say(f"going on from step {folder.first_step:,} of {settings.max_steps:,}")
            if found := _other_environment(folder.environment_before, folder.environment):
                self.say(
                    f"note: {'; '.join(found)}: the same batches, sums in another order, so losses "
                    "alike but not to the bit"
                )
        many = f"; {self.world.size} processes" if self.world.size > 1 else ""
        self.say(f"computing on {hardware.describe()}{many}")
        if hardware.compile:
            self.say("compiling the first step, which takes longer than the others")
        if isinstance(data := self.loop.eval_data, Subsampled):
            self.say(
                f"an evaluation reads one in {data.every} of the held-out windows, the same each "
                "time; evaluate-tokens 0 reads all"
            )


def _other_environment(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """In what the machine differs, so that the bits will be others than an unbroken run's."""
    found = []
    if before.get("processes", now["processes"]) != now["processes"]:
        found = [f"so far {before['processes']} at a time trained, now {now['processes']}"]
    for name in now.keys() & before.keys() - {"processes"}:
        if before[name] != now[name]:
            found.append(f"{name} was {before[name]} and is {now[name]}")
    return sorted(found)


def evaluations_since_best(losses: Iterable[float]) -> int:
    """How many evaluations in a row, up to the last, brought no improvement; nan brings none."""
    best, since = math.inf, 0
    for loss in losses:
        best, since = (loss, 0) if loss < best else (best, since + 1)
    return since
