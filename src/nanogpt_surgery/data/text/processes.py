"""The same work on many things, in several processes."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from functools import partial
from multiprocessing import connection, get_context, parent_process, resource_tracker
from typing import Any

from nanogpt_surgery.errors import SurgeryError


def cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def in_processes(
    function: Callable[[Any], Any],
    tasks: Sequence[Any],
    workers: int,
    begin: Callable[[], None] | None = None,
) -> Iterator[Any]:
    """Results of a function on tasks, in any order; in this process where there is one worker.

    Raises:
        SurgeryError: a process was ended from outside.
    """
    if min(workers, len(tasks)) <= 1:
        if begin is not None:
            begin()
        yield from map(function, tasks)
        return
    pool = ProcessPoolExecutor(
        min(workers, len(tasks)), get_context("spawn"), partial(_begin, begin)
    )
    try:
        with _deaf_beginnings():
            futures = [pool.submit(function, task) for task in tasks]
        for future in as_completed(futures):
            yield future.result()
    except BrokenProcessPool:
        raise SurgeryError(
            f"one of {min(workers, len(tasks))} processes was ended from outside, as the system "
            "does where memory runs out",
            "ask for fewer workers; what is finished is kept",
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


@contextmanager
def _deaf_beginnings() -> Iterator[None]:
    """Processes that begin in this context never hear a Ctrl-C, which this one answers after it.

    They would answer with a traceback each until `_begin` runs in them.
    """
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    resource_tracker.ensure_running()  # its own beginning would take the mask away
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _begin(begin: Callable[[], None] | None) -> None:
    """In a new process: leave Ctrl-C to the first one, and end with it, whatever ends it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    first = parent_process()
    assert first is not None

    def end_together() -> None:
        connection.wait([first.sentinel])
        os._exit(1)

    threading.Thread(target=end_together, daemon=True).start()
    if begin is not None:
        begin()
