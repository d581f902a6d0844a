"""How often a checkpoint comes, by steps or by the clock."""

from __future__ import annotations

import re
from dataclasses import dataclass
from time import monotonic

from nanogpt_surgery.errors import SurgeryError

_SECONDS = {"s": 1, "m": 60, "h": 3600}


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
        """Begin to wait for the next one."""
        self._last = monotonic()
