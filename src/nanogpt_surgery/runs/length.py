"""The number of steps of a training, and the interval between its checkpoints."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace
from time import monotonic

from nanogpt_surgery.data.conversations.instruction_dataset import InstructionDataset
from nanogpt_surgery.data.gpt_dataset import Batches
from nanogpt_surgery.data.text.mixture import rows_in_epoch
from nanogpt_surgery.errors import SurgeryError
from nanogpt_surgery.training.settings import FitSettings

EPOCHS = 3.0  # of instruction data, where nothing is asked for
_SECONDS = {"s": 1, "m": 60, "h": 3600}
EVALUATIONS = 8  # in a run whose length follows from its data


def check_epochs(epochs: float | None, max_steps: int | None) -> None:
    """Raises `SurgeryError` for epochs out of range, or given together with a number of steps."""
    if epochs is None:
        return
    if not (math.isfinite(epochs) and epochs > 0):
        raise SurgeryError(f"epochs is {epochs}; it must be above 0 and finite")
    if max_steps is not None:
        raise SurgeryError(
            f"epochs {epochs:g} and max_steps {max_steps} both say how long to train",
            "leave one of them out",
        )


def with_length(
    settings: FitSettings,
    dataset: Batches,
    epochs: float | None = None,
    patience: int = 0,
    asked: frozenset[str] = frozenset(),
) -> FitSettings:
    """Returns the settings with the steps of so many epochs, and evaluations to match.

    Of instruction data, of epochs that were asked for, and where the training may stop early,
    there are several evaluations in a run however short it is.

    Args:
        settings: for a training on `dataset`.
        dataset: what is learned from.
        epochs: passes over it; None: 3 of instruction data, else `max_steps` stays.
        patience: evaluations without improvement after which it stops; 0 for no number.
        asked: names of settings that stay as they are.
    """
    instructions = isinstance(dataset, InstructionDataset)
    if epochs is None and instructions and "max_steps" not in asked:
        epochs = EPOCHS
    if epochs is not None:
        size = settings.batch_size * settings.grad_accum_steps
        steps = max(1, math.ceil(round(epochs * rows_in_epoch(dataset) / size, 6)))
        settings = replace(settings, max_steps=steps)
    if (instructions or epochs is not None or patience > 0) and "evaluate_every" not in asked:
        often = math.ceil(settings.max_steps / EVALUATIONS)
        settings = replace(settings, evaluate_every=min(settings.evaluate_every, often))
    return settings


def amount_of(dataset: Batches) -> str:
    """How much there is to learn from, in words: tokens of a text, examples of instruction data."""
    if not isinstance(dataset, InstructionDataset):
        return f"{round(rows_in_epoch(dataset) * dataset.block_size):,} tokens"
    examples = dataset.counts.examples - dataset.counts.dropped
    rows = f" in {len(dataset):,} rows" if len(dataset) != examples else ""
    return f"{examples:,} examples{rows}"


@dataclass
class SaveInterval:
    """So many steps, or so many seconds, from one checkpoint to the next."""

    steps: int = 0
    seconds: float = 0.0

    @classmethod
    def read(cls, text: str) -> SaveInterval:
        """The interval that a word such as 500 (steps), 90s, 10m or 2h means.

        Raises:
            SurgeryError: it means none.
        """
        found = re.fullmatch(r"(\d{1,12})([smh]?)", text.strip(), re.ASCII)
        if not found or int(found[1]) == 0:
            raise SurgeryError(
                f"save_every is {text!r}, which is no number of steps and no time",
                "for example 500 (steps), 90s, 10m or 2h",
            )
        number, unit = int(found[1]), found[2]
        return cls(seconds=number * _SECONDS[unit]) if unit else cls(steps=number)

    def __post_init__(self) -> None:
        self._last = monotonic()

    def due(self, step: int) -> bool:
        """Whether it is time after a step."""
        if self.steps:
            return step % self.steps == 0
        return monotonic() - self._last >= self.seconds

    def saved(self) -> None:
        """Notes that a checkpoint was written: the interval begins anew."""
        self._last = monotonic()
