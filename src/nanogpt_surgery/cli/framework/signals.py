"""Ctrl-C and SIGTERM as requests that a training answers after its step."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from nanogpt_surgery.cli.framework.console import say
from nanogpt_surgery.cli.framework.processes import is_distributed


@dataclass
class Stop:
    """The signal that asked to stop, 0 if none did; and what signals did before."""

    signal: int = 0
    handlers: dict[int, Any] = field(default_factory=dict)


@contextmanager
def signals() -> Iterator[Stop]:
    """The first Ctrl-C or SIGTERM asks for a checkpoint after the step; a second stops at once.

    But not where torchrun sends one more of its own when a terminal has sent one to all.
    """
    stop = Stop()

    def ask(number: int, _frame: object) -> None:
        stop.signal = number
        if is_distributed():
            say("stopping after this step")
            return
        say("stopping after this step; once more to stop at once")
        restore()

    def restore() -> None:
        for number, handler in stop.handlers.items():
            signal.signal(number, handler)

    for number in (signal.SIGINT, signal.SIGTERM):
        stop.handlers[number] = signal.signal(number, ask)
    try:
        yield stop
    finally:
        restore()
