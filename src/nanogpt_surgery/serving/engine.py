"""One model in one thread, many texts at once: they join and leave between two tokens.

A text is what it would be alone, greedy or with a seed, whatever runs beside it.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

from torch import Tensor

from nanogpt_surgery.arguments import check_arguments
from nanogpt_surgery.errors import SurgeryError
from nanogpt_surgery.generation.checks import check_request
from nanogpt_surgery.generation.settings import Engine as EngineName
from nanogpt_surgery.lora.several import adapter_names, check_name
from nanogpt_surgery.memory import available_memory, in_gib
from nanogpt_surgery.model.simple_gpt import SimpleGPT
from nanogpt_surgery.serving.request import Answer, EngineClosed, QueueFull, Reason, Request
from nanogpt_surgery.serving.rows import Row, Rows, bytes_per_token, places_of

__all__ = ["Answer", "Engine", "EngineClosed", "QueueFull", "Request"]
T = TypeVar("T")
LOG = logging.getLogger(__name__)


class Engine:
    """Answers requests with one model, which nobody else may touch meanwhile.

    Args:
        model: in any mode; computed in eval mode.
        rows: texts that run at once, at most.
        waiting: requests that wait, at most.
        cache_bytes: of the keys and values of all texts; by default a quarter of the free memory.
        engine: what computes, as in `generate`.
    """

    @check_arguments
    def __init__(
        self,
        model: SimpleGPT,
        *,
        rows: int = 16,
        waiting: int = 64,
        cache_bytes: int | None = None,
        engine: EngineName = "auto",
    ):
        for name, value in {"rows": rows, "waiting": waiting}.items():
            if value < 1:
                raise SurgeryError(f"{name} is {value}; it must be at least 1")
        if cache_bytes is None:
            cache_bytes = (available_memory() or 1 << 32) // 4
        self.model, self.most_rows, self.most_waiting = model, rows, waiting
        self.cache_bytes, self.bytes_per_token = cache_bytes, bytes_per_token(model)
        self.names = adapter_names(model)
        self.rows = Rows(model)
        self._lock = threading.Condition()
        self._waiting = deque[Answer]()
        self._running: list[Row] = []
        self._operations = deque[tuple[Future[Any], Callable[[SimpleGPT], Any]]]()
        self._counts = Counter[str]()
        self._closed, self._ended = False, False
        self._thread = threading.Thread(target=self._work, name="engine", daemon=True)
        self._thread.start()

    def submit(self, request: Request) -> Answer:
        """Takes a request, and returns its answer at once, before there is anything in it.

        Raises:
            SurgeryError: something of the request is wrong, or it needs more than there is.
            QueueFull: too many requests wait.
            EngineClosed: the engine has been closed.
        """
        self._check(request)
        answer = Answer(request)
        with self._lock:
            if self._closed:
                raise EngineClosed("the engine is closed")
            waiting = sum(not other.cancelled for other in self._waiting)
            if waiting >= self.most_waiting:
                self._counts["full"] += 1
                raise QueueFull(waiting, 1.0)
            self._waiting.append(answer)
            self._lock.notify_all()
        return answer

    def operate(self, change: Callable[[SimpleGPT], T]) -> Future[T]:
        """Has a function change the model, alone, when the texts that run have ended.

        Requests that have not begun by then begin after it.

        Raises:
            EngineClosed: the engine has been closed.
        """
        done = Future[T]()
        with self._lock:
            if self._closed:
                raise EngineClosed("the engine is closed")
            self._operations.append((done, change))
            self._lock.notify_all()
        return done

    def figures(self) -> dict[str, float]:
        """Returns what there is to count, under the names that Prometheus gives such things."""
        with self._lock:
            held = sum(places_of(row.answer.request) for row in self._running)
            return {
                **{f'requests_total{{outcome="{k}"}}': float(n) for k, n in self._counts.items()},
                "requests_waiting": len(self._waiting),
                "requests_running": len(self._running),
                "cache_bytes": held * self.bytes_per_token,
            }

    def close(self, grace: float = 10.0) -> None:
        """Takes no more requests, and ends those that there are: after `grace` seconds, at once."""
        with self._lock:
            self._closed = True
            self._lock.notify_all()
        self._thread.join(grace)
        with self._lock:
            self._ended = True
            self._lock.notify_all()
        self._thread.join()

    def _check(self, request: Request) -> None:
        model, tokens = self.model, request.max_new_tokens
        check_request(model, [request.prompt], tokens, request.sampling, request.seed)
        places, block_size = places_of(request), model.config.block_size
        if places > block_size:
            raise SurgeryError(
                f"the prompt has {len(request.prompt)} tokens and max_new_tokens is {tokens}; the "
                f"model's block_size is {block_size}",
                "shorten the prompt, or ask for fewer tokens",
            )
        needed = places * self.bytes_per_token
        if needed > self.cache_bytes:
            raise SurgeryError(
                f"a cache of {places} tokens needs {in_gib(needed)}, and the engine has "
                f"{in_gib(self.cache_bytes)} for all",
                "shorten the prompt, or ask for fewer tokens",
            )

    def _work(self) -> None:
        while True:
            with self._lock:
                self._lock.wait_for(self._something_to_do)
                if self._ended or (self._closed and not self._in_hand()):
                    break
            self._sweep()
            if self._operations and not self._running:
                self._operate()
            self._admit()
            self._step()
        self._end_all()

    def _something_to_do(self) -> bool:
        return self._in_hand() or self._closed

    def _in_hand(self) -> bool:
        return bool(self._running or self._waiting or self._operations)

    def _sweep(self) -> None:
        """Ends rows, and requests that wait, whose client has left or whose time is over."""
        now = time.monotonic()
        with self._lock:
            gone = [(a, reason) for a in self._waiting if (reason := _over(a, now))]
            for answer, _ in gone:
                self._waiting.remove(answer)
        for answer, reason in gone:
            self._end(answer, reason)
        for row in self._running:
            if reason := _over(row.answer, now):
                self._end(row.answer, reason)
        self._leave()

    def _leave(self) -> None:
        with self._lock:
            self._running = [row for row in self._running if row.answer.reason is None]

    def _end(self, answer: Answer, reason: Reason, error: SurgeryError | None = None) -> None:
        with self._lock:
            self._counts[reason] += 1
        answer.end(reason, error)

    def _operate(self) -> None:
        with self._lock:
            done, change = self._operations.popleft()
        if not done.set_running_or_notify_cancel():
            return
        try:
            result = change(self.model)
        except BaseException as error:
            done.set_exception(error)
        else:
            done.set_result(result)

    def _admit(self) -> None:
        """Lets requests begin, the oldest first, as long as there are rows and memory."""
        while True:
            with self._lock:
                if self._operations or not self._waiting or len(self._running) >= self.most_rows:
                    return
                held = sum(places_of(row.answer.request) for row in self._running)
                places = held + places_of(self._waiting[0].request)
                if places * self.bytes_per_token > self.cache_bytes:
                    return
                answer = self._waiting.popleft()
            try:
                for name in answer.request.adapters:
                    check_name(self.model, name)
                row = self.rows.begin(answer)
            except Exception as error:
                self._fail(answer, error)
                continue
            with self._lock:
                self._running.append(row)

    def _step(self) -> None:
        """Gives each row its next token."""
        try:
            for row, logits in self.rows.logits(self._running):
                try:
                    self._take(row, logits)
                except Exception as error:
                    self._fail(row.answer, error)
        except Exception as error:
            for row in self._running:
                self._fail(row.answer, error)
        self._leave()

    def _take(self, row: Row, logits: Tensor | SurgeryError) -> None:
        if isinstance(logits, SurgeryError):
            raise logits
        answer = row.answer
        if len(answer.tokens) < answer.request.max_new_tokens:
            answer.add(row.line.take(logits))
        if not row.line.running:
            self._end(answer, "stop")
        elif len(answer.tokens) >= answer.request.max_new_tokens:
            self._end(answer, "length")

    def _fail(self, answer: Answer, error: Exception) -> None:
        if answer.reason is not None:
            return
        if not isinstance(error, SurgeryError):
            LOG.error("a text failed", exc_info=error)
            error = SurgeryError(f"the text failed: {type(error).__name__}: {error}")
        self._end(answer, "failed", error)

    def _end_all(self) -> None:
        """Ends what is left, so that nobody waits for ever."""
        with self._lock:
            self._closed = True
            left = [*(row.answer for row in self._running), *self._waiting]
            operations = [done for done, _ in self._operations]
            self._running, self._waiting = [], deque()
            self._operations.clear()
        for answer in left:
            self._end(answer, "cancelled")
        for done in operations:
            if done.set_running_or_notify_cancel():
                done.set_exception(EngineClosed("the engine is closed"))


def _over(answer: Answer, now: float) -> Reason | None:
    """Returns why an answer is to end now, if it is."""
    if answer.cancelled:
        return "cancelled"
    return "time" if now - answer.submitted > answer.request.seconds else None
