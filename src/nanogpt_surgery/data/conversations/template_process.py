"""Processes that render chat templates, and replies in the order of what was asked."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from time import monotonic
from typing import Any

from nanogpt_surgery.data.text.processes import cores

_WORKER = Path(__file__).with_name("template_worker.py")
_FOR_ONE = 200  # conversations for which a second process is not worth its start
_GRACE = 10  # seconds beyond the limit of one rendering, which the process keeps itself


def replies(job: dict[str, Any], asked: Sequence[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Yields the reply of `template_worker.py` to each conversation, in several processes.

    The last reply is an error where a process had to be ended; no more come then.

    Args:
        job: the template, and what holds for all of its renderings.
        asked: the conversations.
    """
    count = max(1, min(cores(), len(asked) // _FOR_ONE))
    with ExitStack() as stack:
        workers = [
            stack.enter_context(TemplateProcess(job, asked[first::count])) for first in range(count)
        ]
        for number in range(len(asked)):
            reply = workers[number % count].reply()
            if reply is None:
                yield {"error": f"it was stopped after {job['seconds']} seconds or for its memory"}
                return
            yield reply


class TemplateProcess:
    """One process; as a context it is ended, whatever it is doing."""

    def __init__(self, job: dict[str, Any], asked: Sequence[dict[str, Any]]):
        self.patience = job["seconds"] + _GRACE
        self._process = subprocess.Popen(
            [sys.executable, "-I", str(_WORKER)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            encoding="utf-8",
        )
        self._asked = [job, *asked]
        self._waiting_since: float | None = None
        self._ended = threading.Event()
        for work in (self._feed, self._watch):
            threading.Thread(target=work, daemon=True).start()

    def reply(self) -> dict[str, Any] | None:
        """The next one; none if the process ended, or took longer than it may."""
        assert self._process.stdout is not None
        self._waiting_since = monotonic()
        line = self._process.stdout.readline()
        self._waiting_since = None
        if not line.endswith("\n"):
            return None
        found: dict[str, Any] = json.loads(line)
        return found

    def __enter__(self) -> TemplateProcess:
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._process.kill()
        self._process.wait()
        assert self._process.stdout is not None
        self._process.stdout.close()

    def _feed(self) -> None:
        assert self._process.stdin is not None
        try:
            with self._process.stdin as pipe:
                for one in self._asked:
                    pipe.write(json.dumps(one) + "\n")
        except (BrokenPipeError, ValueError, OSError):  # it was ended
            return

    def _watch(self) -> None:
        while not self._ended.wait(0.5):
            since = self._waiting_since
            if since is not None and monotonic() - since > self.patience:
                self._process.kill()
                return
