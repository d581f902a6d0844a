"""One model in one thread, many texts at once: they join and leave between two tokens.

A text is what it would be alone, greedy or with a seed, whatever runs beside it (rows.py says how).
Texts that begin alike, by the same weights, share what is computed of their beginning.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from typing import Any, TypeVar

import torch
from torch import Tensor

from nanogpt_surgery.arguments import check_arguments
from nanogpt_surgery.errors import SurgeryError, nearest, quoted
from nanogpt_surgery.generation.batch import Line
from nanogpt_surgery.generation.checks import check_bias, check_prompt
from nanogpt_surgery.generation.generate import new_cache
from nanogpt_surgery.generation.settings import Engine as EngineName
from nanogpt_surgery.generation.settings import check_count, check_seed
from nanogpt_surgery.lora.layer import LoRALayer
from nanogpt_surgery.memory import available_memory, in_gib
from nanogpt_surgery.model.simple_gpt import SimpleGPT
from nanogpt_surgery.serving.figures import Figures
from nanogpt_surgery.serving.prefix_cache import PrefixCache, copied, n_alike
from nanogpt_surgery.serving.request import (
    Answer,
    EngineClosed,
    QueueFull,
    Reason,
    Request,
    TextFailed,
)
from nanogpt_surgery.serving.rows import PlainRows, Row, Rows, Weights, make_rows
from nanogpt_surgery.serving.weights import WeightHashes
from nanogpt_surgery.values import POSITIVE, WEIGHT, raise_all, wrong_values

__all__ = ["Answer", "Engine", "EngineClosed", "QueueFull", "Request"]
T = TypeVar("T")
Job = tuple[Future[Any], Callable[[SimpleGPT], Any], Callable[[], None]]
LOG = logging.getLogger(__name__)
WORTH_WAITING = 16  # tokens that another text is about to compute


class Engine:
    """Answers requests with one model, which nobody else may touch meanwhile.

    Args:
        model: in any mode; computed in eval mode.
        rows: texts that run at once, at most.
        waiting: requests that wait, at most.
        cache_bytes: of the keys and values of all texts, those that have ended included; by
            default a quarter of the free memory.
        engine: computes the tokens, as in `generate`.

    Attributes:
        error: by which its thread has ended; None while it runs, or where it was closed.

    Raises:
        SurgeryError: a number is below 1, or the native engine does not compute the model.
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
        if cache_bytes is None:
            cache_bytes = (available_memory() or 1 << 32) // 4
        for name, value in (("rows", rows), ("waiting", waiting), ("cache_bytes", cache_bytes)):
            if value < 1:
                raise SurgeryError(f"{name} is {value}; it must be at least 1")
        self.model, self.most_rows, self.most_waiting = model, rows, waiting
        self.cache_bytes, self._asked = cache_bytes, engine
        self._ended_texts = PrefixCache(lambda length: new_cache(model, 1, length))
        self._figures = Figures()
        self._take_model(engine)
        self._lock = threading.Condition()
        self._waiting = deque[Answer]()
        self._running: list[Row] = []
        self._operations, self._looks = deque[Job](), deque[Job]()
        self._closed, self._at_once = False, False
        self.error: BaseException | None = None
        self._thread = threading.Thread(target=self._work, name="engine", daemon=True)
        self._thread.start()

    def submit(self, request: Request) -> Answer:
        """Takes a request, and returns its answer at once, before there is anything in it.

        Raises:
            SurgeryError: something of the request is wrong, or it needs more than there is.
            QueueFull: too many requests wait.
            EngineClosed: the engine has been closed.
        """
        try:
            self._check(request)
        except SurgeryError:
            with self._lock:
                self._figures.ended("refused")
            raise
        answer = Answer(request)
        with self._lock:
            if self._closed:
                raise EngineClosed("the engine is closed")
            waiting = sum(not other.cancelled for other in self._waiting)
            if waiting >= self.most_waiting:
                self._figures.ended("full")
                raise QueueFull(waiting, self._figures.retry_after(self.most_rows))
            self._waiting.append(answer)
            self._lock.notify_all()
        return answer

    def operate(
        self, change: Callable[[SimpleGPT], T], then: Callable[[], None] = lambda: None
    ) -> Future[T]:
        """Has a function change the model, alone, when the texts that run have ended.

        Requests that have not begun by then begin after it.

        Args:
            change: is called with the model.
            then: is called when requests are answered by the model as it is now, also where
                `change` fails.

        Raises:
            EngineClosed: the engine has been closed.
        """
        return self._queued(self._operations, change, then)

    def look(self, read: Callable[[SimpleGPT], T]) -> Future[T]:
        """Has a function read the model between two tokens; it leaves the model as it is.

        Raises:
            EngineClosed: the engine has been closed.
        """
        return self._queued(self._looks, read)

    def _queued(
        self,
        queue: deque[Job],
        call: Callable[[SimpleGPT], T],
        then: Callable[[], None] = lambda: None,
    ) -> Future[T]:
        done = Future[T]()
        with self._lock:
            if self._closed:
                raise EngineClosed("the engine is closed")
            queue.append((done, call, then))
            self._lock.notify_all()
        return done

    @property
    def closed(self) -> bool:
        """Whether it takes no more requests: it was closed, or its thread has ended by an error."""
        return self._closed

    def figures(self) -> dict[str, float]:
        """Returns all that is counted, under names as Prometheus has them."""
        with self._lock:
            return self._figures.lines() | {
                "requests_waiting": len(self._waiting),
                "requests_running": len(self._running),
                "cache_bytes": self._bytes_of_rows() + self._ended_texts.n_bytes,
                "cache_bytes_limit": self.cache_bytes,
                "native_engine": float(self._rows.name == "native"),
            }

    def close(self, grace: float = 10.0) -> None:
        """Takes no more requests, and ends those that there are: after `grace` seconds, at once."""
        with self._lock:
            self._closed = True
            self._lock.notify_all()
        self._thread.join(grace)
        with self._lock:
            self._at_once = True
            self._lock.notify_all()
        self._thread.join()

    # Requests are checked in the threads of their clients, by what is known of the model: it may
    # be under the knife just then.

    def _check(self, request: Request) -> None:
        prompt, tokens = request.prompt, request.max_new_tokens
        check_count(tokens)
        check_seed(request.seed)
        check_bias(self.model, request.sampling)
        check_prompt(self.model, prompt)
        if request.likeliest < 0:
            raise SurgeryError(f"likeliest is {request.likeliest}; it must be at least 0")
        raise_all(wrong_values(POSITIVE, {"seconds": request.seconds}))
        self._check_adapters(request.adapters)
        places = places_of(request)
        if places > self._block_size:
            raise SurgeryError(
                f"the prompt has {len(prompt)} tokens and max_new_tokens is {tokens}; the model's "
                f"block_size is {self._block_size}",
                "shorten the prompt, or ask for fewer tokens",
            )
        if places * self._bytes_per_token > self.cache_bytes:
            raise SurgeryError(
                f"a cache of {places} tokens needs {in_gib(places * self._bytes_per_token)}, and "
                f"there are {in_gib(self.cache_bytes)} for all texts",
                "shorten the prompt, or ask for fewer tokens",
            )

    def _check_adapters(self, adapters: Mapping[str, float]) -> None:
        raise_all(wrong_values(WEIGHT, {f"the weight of {n!r}": w for n, w in adapters.items()}))
        names = self._hashes.adapters.keys()
        for name in adapters.keys() - names:
            hint = f"it carries {nearest(name, names)}" if names else "inject_lora(model) first"
            raise SurgeryError(f"the model carries no adapter {quoted(name)}", hint)
        if adapters and self._disabled:
            raise SurgeryError("the LoRA is disabled, so no text would be adapted", "enable it")

    # All below runs in the engine's own thread, but for the first time of `_take_model`.

    def _take_model(self, engine: EngineName) -> None:
        """Makes all that depends on the model as it stands."""
        model, config = self.model, self.model.config
        self._hashes = WeightHashes(model)
        self._disabled = not all(m.enabled for m in model.modules() if isinstance(m, LoRALayer))
        self._block_size = config.block_size
        numbers = 2 * config.n_layer * config.n_kv_head * config.head_dim
        self._bytes_per_token = numbers * next(model.parameters()).dtype.itemsize
        try:
            self._rows: Rows = make_rows(model, engine)
        except MemoryError as error:
            if engine == "native":
                raise
            LOG.warning("there is no memory for the decoder: the model computes", exc_info=error)
            self._rows = PlainRows(model)

    def _work(self) -> None:
        try:
            while True:
                with self._lock:
                    self._lock.wait_for(lambda: self._in_hand() or self._closed)
                    if self._at_once or not self._in_hand():
                        break
                self._end_those_over()
                if self._looks:
                    self._do(self._looks)
                if self._operations and not self._running:
                    self._do(self._operations)
                self._admit()
                if self._running:
                    self._step()
        except BaseException as error:
            self.error = error
            LOG.critical("the engine has ended by an error", exc_info=error)
        finally:
            self._end_all()

    def _in_hand(self) -> bool:
        return bool(self._running or self._waiting or self._operations or self._looks)

    def _end_those_over(self) -> None:
        """Ends rows, and requests that wait, whose client has left or whose time is over."""
        now = time.monotonic()
        with self._lock:
            gone = [(a, reason) for a in self._waiting if (reason := _over(a, now))]
            for answer, _ in gone:
                self._waiting.remove(answer)
        for answer, reason in gone:
            self._end(answer, reason)
        for row in list(self._running):
            if reason := _over(row.answer, now):
                self._end(row, reason)

    def _do(self, queue: deque[Job]) -> None:
        """Calls the oldest function of a queue; what depends on the model is new after a change."""
        with self._lock:
            done, call, then = queue.popleft()
        if not done.set_running_or_notify_cancel():
            return
        result, error = None, None
        try:
            result = call(self.model)
        except BaseException as raised:
            error = raised
        try:
            if queue is self._operations:
                self._take_model("plain" if self._asked == "plain" else "auto")
        except BaseException as raised:  # what was made of the old weights would go on
            done.set_exception(raised)
            raise
        try:
            then()
        except Exception as raised:
            error = error or raised
        if error is None:
            done.set_result(result)
        else:
            done.set_exception(error)

    def _admit(self) -> None:
        """Lets requests begin, the oldest first, as long as there are rows and memory."""
        while True:
            with self._lock:
                if self._operations or not self._waiting or len(self._running) >= self.most_rows:
                    return
                needed = places_of(self._waiting[0].request) * self._bytes_per_token
                left = self.cache_bytes - self._bytes_of_rows() - needed
                if left < 0 and self._running:
                    return
                answer = self._waiting.popleft()
            try:
                row = self._begun(answer)
            except Exception as error:
                self._fail(answer, error)
                continue
            with self._lock:
                self._ended_texts.make_room(left)
                self._running.append(row)
                self._figures.prompt_tokens += len(row.line.prompt)

    def _begun(self, answer: Answer) -> Row:
        of = answer.request
        self._check(of)  # once more: the model may have changed
        weights: Weights = tuple(sorted((n, float(w)) for n, w in of.adapters.items() if w))
        key = f"{self._rows.name} {self._hashes.of(dict(weights))}"
        prompt = check_prompt(self.model, of.prompt)
        line = Line(0, prompt, of.sampling, of.stop_ids, of.seed, of.likeliest, of.until)
        if of.began is not None:
            of.began()
        return Row(answer, weights, key, line, new_cache(self.model, 1, places_of(of)))

    def _bytes_of_rows(self) -> int:
        places = sum(row.cache.max_length for row in self._running)
        return places * self._bytes_per_token

    def _step(self) -> None:
        """Gives each row that is ready its next token."""
        try:
            ready = [row for row in self._running if row.looked_up or self._look_up(row)]
            for row, logits in self._rows.compute(ready):
                try:
                    self._take(row, logits)
                except Exception as error:
                    self._fail(row, error)
        except Exception as error:
            for row in list(self._running):
                self._fail(row, error)

    def _look_up(self, row: Row) -> bool:
        """Begins a row with the longest beginning of another; False where that comes soon."""
        wanted = torch.tensor(row.line.prompt[:-1])  # the last is computed for its logits
        if row.answer.request.prompt_log_probabilities or not len(wanted):
            row.looked_up = True
            return True
        best, most = self._ended_texts.longest(row.key, wanted)
        cache = None if best is None else best.cache
        most, soon = self._rows.shareable(row, most), 0
        for other in self._running:
            if other.looked_up and other.key == row.key:
                n = n_alike(torch.tensor(other.line.prompt + other.line.answer), wanted)
                there = self._rows.shareable(row, min(n, self._there(other)))
                soon = max(soon, self._rows.shareable(row, n) if other.left > 1 else 0)
                if there > most:
                    cache, most = other.cache, there
        if soon - most >= WORTH_WAITING:
            return False
        if cache is not None:
            copied(cache, most, row.cache)
            self._figures.reused_tokens += most
        row.looked_up = True
        return True

    def _there(self, row: Row) -> int:
        """Returns how many tokens another text may take of a row, as far as it is computed."""
        return self._rows.shareable(row, row.cache.length)

    def _take(self, row: Row, logits: Tensor | Exception) -> None:
        if isinstance(logits, Exception):
            raise logits
        answer = row.answer
        if row.prompt_tokens and not answer.prompt_tokens:
            answer.prompt_tokens = tuple(row.prompt_tokens)
        if len(row.line.answer) < answer.request.max_new_tokens:
            new = row.line.take(logits)
            with self._lock:
                self._figures.tokens += len(new)
                if not answer.tokens:
                    self._figures.first_token(time.monotonic() - answer.submitted)
            answer.add(new)
        if not row.line.running:
            self._end(row, "stop")
        elif len(row.line.answer) >= answer.request.max_new_tokens:
            self._end(row, "length")

    def _fail(self, what: Row | Answer, error: Exception) -> None:
        if not isinstance(error, SurgeryError):
            LOG.error("a text failed", exc_info=error)
            error = TextFailed(f"the text failed: {type(error).__name__}: {error}")
        self._end(what, "failed", error)

    def _end(self, what: Row | Answer, reason: Reason, error: SurgeryError | None = None) -> None:
        """Ends a row, or a request that has not begun."""
        row = what if isinstance(what, Row) else None
        answer = what.answer if isinstance(what, Row) else what
        with self._lock:
            if row is not None:
                self._running.remove(row)
            self._figures.ended(reason, None if row is None else time.monotonic() - row.begun)
        if row is not None and error is None:
            self._keep(row)
        answer.end(reason, error)

    def _keep(self, row: Row) -> None:
        """Keeps what is computed of a row that has ended, for those that begin alike."""
        room = self.cache_bytes - self._bytes_of_rows()
        try:
            self._ended_texts.add(row.key, row.cache, self._there(row), room)
        except Exception as error:  # of memory, it may be: no answer is lost for it
            LOG.warning("a text is not kept for those that begin alike", exc_info=error)
            self._ended_texts.clear()

    def _end_all(self) -> None:
        """Ends what is left, so that nobody waits for ever."""
        with self._lock:
            self._closed = True
            waiting, jobs = [*self._waiting], [*self._operations, *self._looks]
            for queue in (self._waiting, self._operations, self._looks):
                queue.clear()
        left: list[Row | Answer] = [*self._running, *waiting]
        for one in left:
            self._end(one, "cancelled")
        for done, _, _ in jobs:
            if done.set_running_or_notify_cancel():
                done.set_exception(EngineClosed("the engine is closed"))


def places_of(request: Request) -> int:
    """Returns how many tokens a request's cache has room for: the last new one needs none."""
    return len(request.prompt) + max(0, request.max_new_tokens - 1)


def _over(answer: Answer, now: float) -> Reason | None:
    """Returns why an answer is to end now, if it is."""
    if answer.cancelled:
        return "cancelled"
    return "time" if now - answer.submitted > answer.request.seconds else None
