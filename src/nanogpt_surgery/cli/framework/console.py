"""Output: data to stdout, everything about the work to stderr."""

from __future__ import annotations

import logging
import os
import shutil
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Annotated, Any, TextIO, TypeAlias

from cyclopts import Parameter

from nanogpt_surgery.errors import SurgeryError, SurgeryWarning, printable
from nanogpt_surgery.report import Report, duration, wrapped

if TYPE_CHECKING:
    from rich.progress import Progress

    from nanogpt_surgery.data.gpt_dataset import Batch
    from nanogpt_surgery.training.evaluation import EvalData
    from nanogpt_surgery.training.step import Step

LEAST_BAR = 10  # columns
QUIET = {"TOKENIZERS_PARALLELISM": "false", "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1"}
DISTRIBUTED_COMMANDS = ("train", "finetune")
PLAIN_LINE_EVERY = 10.0  # seconds, where stderr is not a terminal


def is_distributed() -> bool:
    """Whether torchrun started more than one process; others set `WORLD_SIZE` too."""
    return "TORCHELASTIC_RUN_ID" in os.environ and int(os.environ.get("WORLD_SIZE", "1")) > 1


def is_main_process() -> bool:
    """Whether this process is the one that speaks for all."""
    return not is_distributed() or os.environ.get("RANK", "0") == "0"


def joined(command: str) -> AbstractContextManager[object]:
    """The processes of a command, joined where there are several.

    Raises:
        SurgeryError: the command is none that several share, or there are fewer GPUs.
    """
    if not is_distributed():
        return nullcontext()
    if command not in DISTRIBUTED_COMMANDS:
        raise SurgeryError(
            f"{os.environ['WORLD_SIZE']} processes were started for surgery {command}, "
            f"and only {' and '.join(DISTRIBUTED_COMMANDS)} share their work",
            "run it without torchrun",
        )
    from nanogpt_surgery.training import distributed

    return distributed.joined()


def ready_streams() -> None:
    """Makes stdout and stderr take whatever is written.

    One that was closed before the start (`>&-`) becomes the void. A character that an encoding has
    not is escaped: a report with a × in it also comes out in ASCII.
    """
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, Path(os.devnull).open("w", encoding="utf-8"))  # noqa: SIM115
        getattr(sys, name).reconfigure(errors="backslashreplace")


def say(text: str) -> None:
    """A line about the work; of several processes the first one speaks."""
    if is_main_process():
        complain(text)


def complain(text: str) -> None:
    """A line that every process may say; those after the first one with their number."""
    who = "" if is_main_process() else f"process {os.environ['RANK']}: "
    width, lines = width_of(sys.stderr), printable(who + text).split("\n")
    text = "\n".join(part for line in lines for part in wrapped(line, width))
    print(text, file=sys.stderr, flush=True)


ALL = Parameter(name="--all", help="show each layer, not one line for all of a kind")
AllLayers: TypeAlias = Annotated[bool, ALL]
Json: TypeAlias = Annotated[bool, Parameter(help="print the report as JSON")]


def show(report: Report, as_json: bool, all_layers: bool = False) -> None:
    """The result of a command: as a table, or as JSON."""
    if is_main_process():
        print(report.to_json() if as_json else _text(report, all_layers, sys.stdout))


def say_report(report: Report, all_layers: bool = False) -> None:
    """A report about the work that goes on."""
    say(_text(report, all_layers, sys.stderr))


def _text(report: Report, all_layers: bool, stream: TextIO) -> str:
    return printable(report.to_text(width_of(stream), all_layers, "--all shows each"))


def width_of(stream: TextIO) -> int | None:
    """The columns of a terminal; None where lines may be of any length."""
    return shutil.get_terminal_size().columns if stream.isatty() else None


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """No remark of a library comes between our lines, unless the user's environment asks for it.

    A download shows its progress on a terminal alone.
    """
    bars = {} if sys.stderr.isatty() else {"HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    for name, value in (QUIET | bars).items():
        os.environ.setdefault(name, value)
    before = logging.root.manager.disable
    if "TORCH_LOGS" not in os.environ:
        logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


@contextmanager
def spoken_warnings() -> Iterator[None]:
    """Our own warnings become lines on stderr, a repeated one once; no others are shown."""
    with warnings.catch_warnings():
        warnings.simplefilter("default", SurgeryWarning)

        def shown(message: Any, category: Any, *place: Any, **more: Any) -> None:
            if issubclass(category, SurgeryWarning):
                say(f"note: {message}")

        setattr(warnings, "showwarning", shown)  # noqa: B010 - typeshed wants its exact signature
        yield


def write(pieces: Iterable[str]) -> None:
    """Writes the pieces of a text to stdout as they come."""
    for piece in pieces:
        sys.stdout.write(printable(piece) if sys.stdout.isatty() else piece)
        sys.stdout.flush()


@contextmanager
def notes_afterwards() -> Iterator[None]:
    """Warnings of a block wait for its end: none comes between the pieces of a text."""
    noted: list[warnings.WarningMessage] = []
    try:
        with warnings.catch_warnings(record=True) as noted:
            yield
    finally:
        for note in noted:
            warnings.showwarning(note.message, note.category, note.filename, note.lineno)


def watched(
    steps: Iterable[Step],
    first_step: int,
    max_steps: int,
    full_rate: float,
    validation: Announced,
) -> Iterator[Step]:
    """The same steps, with progress on stderr: a bar on a terminal, lines elsewhere.

    `full_rate` is how many tokens a second there would be, were every operation as fast as the
    machine's matrix products. When `validation` is read, the bar says so.
    """
    rate = _Rate(first_step, max_steps, full_rate)
    if sys.stderr.isatty() and is_main_process():
        return _with_bar(steps, rate, validation)
    return _with_lines(steps, rate)


class Announced:
    """Held-out data that calls `begin` before each evaluation and `end` after it."""

    def __init__(self, data: EvalData):
        self.data = data
        self.begin: Callable[[], object] = lambda: None
        self.end: Callable[[], object] = lambda: None

    def iter_all(self, batch_size: int) -> Iterator[Batch]:
        """Yields the batches of `data`."""
        self.begin()
        yield from self.data.iter_all(batch_size)
        self.end()


def _with_bar(steps: Iterable[Step], rate: _Rate, validation: Announced) -> Iterator[Step]:
    with _bar() as bar:
        shown = "first step"
        task = bar.add_task("", total=rate.max_steps, completed=rate.first_step, text=shown)
        validation.begin = lambda: bar.update(task, text="evaluating", refresh=True)
        validation.end = lambda: bar.update(task, text=shown, refresh=True)
        for step in steps:
            rate.add(step)
            width = bar.console.width
            counted = len(f"{step.step}/{rate.max_steps}".rjust(2 * len(str(rate.max_steps)) + 1))
            shown = _fitting(rate.parts(step), width - LEAST_BAR - counted - 2)
            bar.update(task, completed=step.step, text=shown)
            if step.validation_loss is not None:
                bar.console.print(rate.line(step, width), highlight=False, markup=False)
            yield step


def _fitting(parts: Iterable[str], width: int | None) -> str:
    """The first of the parts, and as many after it as there is room for."""
    first, *more = parts
    for part in more:
        longer = f"{first}  {part}"
        if width is not None and len(longer) > width:
            break
        first = longer
    return first


def _bar() -> Progress:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
    from rich.table import Column

    text = TextColumn("{task.fields[text]}", markup=False, table_column=Column(no_wrap=True))
    bar = BarColumn(bar_width=None, table_column=Column(min_width=LEAST_BAR, max_width=40, ratio=1))
    return Progress(bar, MofNCompleteColumn(), text, console=Console(stderr=True))


def _with_lines(steps: Iterable[Step], rate: _Rate) -> Iterator[Step]:
    last = monotonic()
    for step in steps:
        rate.add(step)
        if step.validation_loss is not None or monotonic() - last >= PLAIN_LINE_EVERY:
            say(rate.line(step))
            last = monotonic()
        yield step


class _Rate:
    """Tokens a second of the steps seen so far, evaluations apart; and time left, with them."""

    def __init__(self, first_step: int, max_steps: int, full_rate: float):
        self.first_step, self.max_steps, self.full_rate = first_step, max_steps, full_rate
        self.start, self.tokens, self.seconds = monotonic(), 0, 0.0

    def add(self, step: Step) -> None:
        self.tokens += step.tokens
        self.seconds += step.seconds

    def parts(self, step: Step) -> list[str]:
        """The parts of the line about a step, the most important first."""
        elapsed = monotonic() - self.start
        done = step.step - self.first_step
        left = elapsed / done * (self.max_steps - step.step)
        rate = self.tokens / self.seconds
        return [
            "skipped: its gradient is not finite" if step.skipped else f"loss {step.loss:.4f}",
            f"{duration(round(left))} left",
            f"{rate:,.0f} tokens/s",
            f"{rate / self.full_rate:.0%} of the matmul rate",
        ]

    def line(self, step: Step, width: int | None = None) -> str:
        loss, *more = self.parts(step)
        head = f"step {step.step:,} of {self.max_steps:,}  {loss}"
        if step.validation_loss is not None:
            head += f"  validation loss {step.validation_loss:.4f}"
        return _fitting([head, *more], width)
