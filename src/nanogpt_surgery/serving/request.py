"""A request to an engine, and the answer as it grows."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

from nanogpt_surgery.errors import SurgeryError
from nanogpt_surgery.generation.batch import Token
from nanogpt_surgery.generation.settings import SamplingSettings

Reason = Literal["stop", "length", "time", "cancelled", "failed"]


class QueueFull(SurgeryError):  # noqa: N818
    """As many requests wait as may; `retry_after` seconds from now one of them should have gone."""

    def __init__(self, waiting: int, retry_after: float):
        self.retry_after = retry_after
        super().__init__(f"{waiting} requests are waiting, the most that may", "try again later")


class TextFailed(SurgeryError):  # noqa: N818
    """An error in the program or the machine, and no fault of the request."""


class EngineClosed(SurgeryError):  # noqa: N818
    """The engine takes no more requests."""


@dataclass(frozen=True)
class Request:
    """A text to be continued; what an engine refuses of it, `Engine.submit` says."""

    prompt: tuple[int, ...]
    max_new_tokens: int
    sampling: SamplingSettings = field(default_factory=SamplingSettings)
    stop_ids: frozenset[int] = frozenset()
    """ids after which it ends; the one met is not given"""
    seed: int | None = None
    """None draws differently each time"""
    adapters: Mapping[str, float] = field(default_factory=dict)
    """the weight of each adapter by its name; without any, the base alone"""
    likeliest: int = 0
    """how many log-probabilities to give beside the chosen id's"""
    prompt_log_probabilities: bool = False
    """give those of the prompt's ids as well"""
    until: Callable[[Token], bool] | None = None
    """called with each token in the engine's thread; true ends the text after it"""
    began: Callable[[], object] | None = None
    """called in the engine's thread when it begins to run, by the weights that will compute it"""
    seconds: float = 600.0
    """from now until it ends, whether it has begun or not"""


class Answer:
    """The tokens of a request, in any thread or event loop, as they are made.

    An iteration begins with the first token whenever it begins, waits for those to come, and ends
    when `reason` is there; where the text failed, it raises `error`. Of several at once each gets
    every token.

    Attributes:
        tokens: so far.
        prompt_tokens: a token for each id of the prompt but the first, where they were asked for.
        reason: why it has ended; None while it goes on.
        error: why it failed.
    """

    def __init__(self, request: Request):
        self.request = request
        self.tokens: list[Token] = []
        self.prompt_tokens: tuple[Token, ...] = ()
        self.reason: Reason | None = None
        self.error: SurgeryError | None = None
        self.cancelled = False
        self.submitted = time.monotonic()
        self._changed = threading.Condition()
        self._wake: list[Callable[[], object]] = []  # event loops that wait

    def cancel(self) -> None:
        """Ends it within a token; without effect where it has ended."""
        self.cancelled = True

    def result(self, timeout: float | None = None) -> list[Token]:
        """Waits for the end and returns all tokens.

        Raises:
            TimeoutError: it has not ended after so many seconds.
            SurgeryError: the text failed.
        """
        with self._changed:
            if not self._changed.wait_for(lambda: self.reason is not None, timeout):
                raise TimeoutError(f"no end after {timeout} seconds")
        return list(self)

    def __iter__(self) -> Iterator[Token]:
        taken = 0
        while True:
            with self._changed:
                self._changed.wait_for(lambda n=taken: len(self.tokens) > n or self.reason)  # type: ignore[misc]
                new, ended = self.tokens[taken:], self.reason is not None
            yield from new
            taken += len(new)
            if ended:
                break
        self._raise_error()

    async def __aiter__(self) -> AsyncIterator[Token]:
        taken, loop = 0, asyncio.get_running_loop()
        while True:
            there = asyncio.Event()
            with self._changed:
                new, ended = self.tokens[taken:], self.reason is not None
                if not new and not ended:
                    self._wake.append(partial(loop.call_soon_threadsafe, there.set))
            for token in new:
                yield token
            taken += len(new)
            if ended:
                break
            if not new:
                await there.wait()
        self._raise_error()

    def _raise_error(self) -> None:
        if self.error is not None:
            raise self.error

    def add(self, new: list[Token]) -> None:
        """Adds tokens; the engine calls it."""
        if new:
            with self._changed:
                self.tokens += new
                self._tell()

    def end(self, reason: Reason, error: SurgeryError | None = None) -> None:
        """Ends the answer; the engine calls it, once."""
        with self._changed:
            self.reason, self.error = reason, error
            self._tell()

    def _tell(self) -> None:
        self._changed.notify_all()
        for wake in self._wake:
            with suppress(RuntimeError):  # its loop is closed
                wake()
        self._wake = []
