"""Ctrl-C and SIGTERM as requests that a training answers after its step."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from nanogpt_surgery.cli.framework.console import say
from nanogpt_surgery.cli.framework.processes import is_distributed


@contextmanager
def signals(stop: Callable[[int], object]) -> Iterator[None]:
    """Call `stop` with the number of the first Ctrl-C or SIGTERM; a second one stops at once.

    But not where torchrun sends one more of its own when a terminal has sent one to all.
    """
    handlers: dict[int, Any] = {}

    def ask(number: int, _frame: object) -> None:
        stop(number)
        if is_distributed():
            say("stopping after this step")
            return
        say("stopping after this step; once more to stop at once")
        restore()

    def restore() -> None:
        for number, handler in handlers.items():
            signal.signal(number, handler)

    for number in (signal.SIGINT, signal.SIGTERM):
        handlers[number] = signal.signal(number, ask)
    try:
        yield
    finally:
        restore()
