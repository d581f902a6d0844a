"""Ctrl-C and SIGTERM end a command in one line and with its status, in whatever phase it is.

Nothing but the interpreter is loaded when this begins, so that it holds while torch is imported.
Within a training (`signals`), and within an answer of `chat`, other handlers stand before these.
"""

from __future__ import annotations

import atexit
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any

SAID = {int(signal.SIGINT): "interrupted", int(signal.SIGTERM): "terminated"}


class Terminated(SystemExit):
    """SIGTERM came: only what cleans up still runs."""


class AnsweredSignals:
    """A context in which the signals end the process cleanly, and at its end at once."""

    def __enter__(self) -> None:
        sys.unraisablehook = _unraisable
        # At the very end Python gives signals back to the system, which would end what is done.
        atexit.register(_answer_by, signal.SIG_IGN)
        _answer_by(_raise)

    def __exit__(
        self, _kind: object, error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        _answer_by(_leave)  # the interpreter closes down, where nothing can be raised
        if isinstance(error, KeyboardInterrupt | Terminated):
            number = _number_of(error)
            _say(number)
            sys.exit(128 + number)


def _answer_by(handler: Any) -> None:
    for number in SAID:
        if signal.getsignal(number) != signal.SIG_IGN:  # as under nohup
            signal.signal(number, handler)


def _raise(number: int, frame: FrameType | None) -> None:
    """Unwinds, so that what is half-written goes.

    An import is left at once: code in C may make another error of what is raised in it. So is the
    entrance of the context, before which nothing was done and which nothing surrounds yet.
    """
    while frame is not None:
        code = frame.f_code
        enters = code.co_name == "__enter__" and isinstance(
            frame.f_locals.get("self"), AnsweredSignals
        )
        if enters or code.co_filename.startswith("<frozen importlib"):
            _leave(number)
        frame = frame.f_back
    raise KeyboardInterrupt if number == signal.SIGINT else Terminated(128 + number)


def _unraisable(args: sys.UnraisableHookArgs) -> None:
    """An interrupt that came in a destructor would be printed and forgotten."""
    if isinstance(args.exc_value, KeyboardInterrupt | Terminated):
        _leave(_number_of(args.exc_value))
    sys.__unraisablehook__(args)


def _number_of(error: BaseException) -> int:
    return int(signal.SIGINT if isinstance(error, KeyboardInterrupt) else signal.SIGTERM)


def _leave(number: int, _frame: FrameType | None = None) -> None:
    _say(number)
    os._exit(128 + number)


def _say(number: int) -> None:
    """A line on stderr, past Python's buffers, which the signal may have found half-written."""
    os.write(2, f"surgery: {SAID[number]}\n".encode())


@contextmanager
def first_signal(answer: Callable[[int], object], *numbers: int) -> Iterator[None]:
    """Calls `answer` with the number of the first of these signals; a second one acts as before.

    But not where torchrun sends one more of its own when a terminal has sent one to all.
    """
    from nanogpt_surgery.cli.framework.console import is_distributed

    handlers: dict[int, Any] = {}

    def note(number: int, _frame: object) -> None:
        answer(number)
        if not is_distributed():
            restore()

    def restore() -> None:
        for number, handler in handlers.items():
            signal.signal(number, handler)

    for number in numbers:
        handlers[number] = signal.signal(number, note)
    try:
        yield
    finally:
        restore()


@contextmanager
def signals(stop: Callable[[int], object]) -> Iterator[None]:
    """Calls `stop` with the number of the first Ctrl-C or SIGTERM; a second one stops at once."""
    from nanogpt_surgery.cli.framework.console import is_distributed, say

    def answer(number: int) -> None:
        stop(number)
        more = "" if is_distributed() else "; once more to stop at once"
        say(f"stopping after this step{more}")

    with first_signal(answer, signal.SIGINT, signal.SIGTERM):
        yield
