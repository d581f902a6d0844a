"""The steps of a run as they go: a bar on a terminal, lines elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from time import monotonic

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
from rich.progress import Progress as Bar
from rich.table import Column

from nanogpt_surgery.data.gpt_dataset import Batch
from nanogpt_surgery.report import duration
from nanogpt_surgery.runs.run import Run, Say
from nanogpt_surgery.training.evaluation import EvalData
from nanogpt_surgery.training.step import Step

LEAST_BAR = 10  # columns
LINE_EVERY = 10.0  # seconds


Show = Callable[[Step], None]


@contextmanager
def progress(run: Run, say: Say, on_terminal: bool) -> Iterator[Show]:
    """Gives a function to call with each step of a run, which shows how far it is.

    It says a line at each evaluation, and every 10 s; on a terminal it draws a bar on stderr
    instead, which also says when held-out data is read.
    """
    shown = Progress(run.folder.first_step, run.training.settings.max_steps, run.full_rate)
    if not on_terminal:
        yield shown.lines(say)
        return
    data = run.loop.eval_data = Announced(run.loop.eval_data or run.training.validation)
    with shown.bar(data) as show:
        yield show


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


class Progress:
    """Tokens a second of the steps so far, evaluations apart; and the time left, with them.

    `full_rate` is how many tokens a second there would be, were every operation as fast as the
    machine's matrix products.
    """

    def __init__(self, first_step: int, max_steps: int, full_rate: float):
        self.first_step, self.max_steps, self.full_rate = first_step, max_steps, full_rate
        self.start, self.tokens, self.seconds = monotonic(), 0, 0.0

    def lines(self, say: Say) -> Show:
        """Returns what says a line at each evaluation, and every 10 s."""
        last = monotonic()

        def show(step: Step) -> None:
            nonlocal last
            self._add(step)
            if step.validation_loss is not None or monotonic() - last >= LINE_EVERY:
                say(self._line(step))
                last = monotonic()

        return show

    @contextmanager
    def bar(self, validation: Announced) -> Iterator[Show]:
        """Draws a bar, and gives what moves it."""
        text = TextColumn("{task.fields[text]}", markup=False, table_column=Column(no_wrap=True))
        column = Column(min_width=LEAST_BAR, max_width=40, ratio=1)
        columns = BarColumn(bar_width=None, table_column=column), MofNCompleteColumn(), text
        with Bar(*columns, console=Console(stderr=True)) as bar:
            shown = "first step"
            task = bar.add_task("", total=self.max_steps, completed=self.first_step, text=shown)
            validation.begin = lambda: bar.update(task, text="evaluating", refresh=True)
            validation.end = lambda: bar.update(task, text=shown, refresh=True)

            def show(step: Step) -> None:
                nonlocal shown
                self._add(step)
                width = bar.console.width
                counted = 2 * len(str(self.max_steps)) + 1
                shown = _fitting(self._parts(step), width - LEAST_BAR - counted - 2)
                bar.update(task, completed=step.step, text=shown)
                if step.validation_loss is not None:
                    bar.console.print(self._line(step, width), highlight=False, markup=False)

            yield show

    def _add(self, step: Step) -> None:
        self.tokens += step.tokens
        self.seconds += step.seconds

    def _parts(self, step: Step) -> list[str]:
        """The parts of the line about a step, the most important first."""
        done = step.step - self.first_step
        left = (monotonic() - self.start) / done * (self.max_steps - step.step)
        rate = self.tokens / self.seconds
        return [
            "skipped: its gradient is not finite" if step.skipped else f"loss {step.loss:.4f}",
            f"{duration(round(left))} left",
            f"{rate:,.0f} tokens/s",
            f"{rate / self.full_rate:.0%} of the matmul rate",
        ]

    def _line(self, step: Step, width: int | None = None) -> str:
        loss, *more = self._parts(step)
        head = f"step {step.step:,} of {self.max_steps:,}  {loss}"
        if step.validation_loss is not None:
            head += f"  validation loss {step.validation_loss:.4f}"
        return _fitting([head, *more], width)


def _fitting(parts: Iterable[str], width: int | None) -> str:
    """The first of the parts, and as many after it as there is room for."""
    first, *more = parts
    for part in more:
        longer = f"{first}  {part}"
        if width is not None and len(longer) > width:
            break
        first = longer
    return first
