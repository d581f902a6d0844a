"""Answers of the engine as text, gathered or streamed; they end when the client leaves.

A character whose bytes are spread over several tokens, and what may be the beginning of a stop
string, are held back until they are whole or clear; so are the tokens that make them. The stop
string itself, and its tokens, are not shown.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from starlette.requests import Request
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from nanogpt_surgery.data.tokenizers.tokenizer import Tokenizer
from nanogpt_surgery.generation.batch import Token
from nanogpt_surgery.generation.text import TextUntil
from nanogpt_surgery.serving.http import ApiError, api_error

if TYPE_CHECKING:
    from nanogpt_surgery.serving.request import Answer

T = TypeVar("T")


class Part(NamedTuple):
    """A part of an answer, or of its prompt: a text, and the tokens that it is made of."""

    text: str
    tokens: Sequence[Token | int]
    """an id alone is the first of a prompt, which has no probability"""


class Row:
    """One text that is being made, the place among those of its request, and its engine's answer.

    Args:
        place: among the texts of a request.
        tokenizer: decodes.
        prompt: the ids that it begins after.
        stop: strings that end it.
        echo: the prompt's text, where it is to be shown.
    """

    answer: Answer

    def __init__(
        self,
        place: int,
        tokenizer: Tokenizer,
        prompt: Sequence[int],
        stop: Sequence[str],
        echo: str | None = None,
    ) -> None:
        self.place, self.prompt, self.echo = place, tuple(prompt), echo
        self._text, self._pieces = TextUntil(tokenizer, stop, prompt), list[str]()

    def until(self, token: Token) -> bool:
        """Returns whether a token completes a stop string; the engine calls it with each."""
        self._pieces.append(self._text.push(token.id))
        return self._text.found

    async def parts(self) -> AsyncIterator[Part]:
        """Yields the text as it grows, that of the prompt first where it is to be shown.

        Raises:
            SurgeryError: it failed.
            ApiError: the server stopped before its end.
        """
        held: list[Token] = []
        count = 0
        async for token in self.answer:
            if count == 0 and self.echo is not None:
                yield self._echoed()
            held.append(token)
            piece = self._pieces[count]
            count += 1
            if piece:
                yield Part(piece, held)
                held = []
        if count == 0 and self.echo is not None:
            yield self._echoed()
        if self.answer.reason == "cancelled":
            raise ApiError(503, "the server stopped before the answer was whole", code="stopped")
        rest = self._text.finish()
        if rest or (held and not self._text.found):
            yield Part(rest, held)

    def _echoed(self) -> Part:
        assert self.echo is not None
        return Part(self.echo, [self.prompt[0], *self.answer.prompt_tokens])

    @property
    def finish_reason(self) -> str:
        """Why it ended, in OpenAI's words; the limit of time is one of length."""
        return "stop" if self._text.found or self.answer.reason == "stop" else "length"

    @property
    def mean_log_probability(self) -> float:
        """By which the best of several is chosen."""
        tokens = self.answer.tokens
        return sum(token.log_probability for token in tokens) / max(1, len(tokens))


@contextmanager
def ended(rows: Sequence[Row]) -> Iterator[None]:
    """Ends the rows with the block, whatever ended it."""
    try:
        yield
    finally:
        for row in rows:
            if hasattr(row, "answer"):
                row.answer.cancel()


async def while_connected(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """Returns what `work` does; where the client leaves before, `work` is given up.

    Raises:
        ApiError: the client has left.
    """
    working, leaving = asyncio.create_task(work), asyncio.create_task(_left(request))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ApiError(499, "the client has left")
        return working.result()
    finally:
        working.cancel()
        leaving.cancel()


async def _left(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        continue


async def merged(rows: Sequence[Row]) -> AsyncIterator[tuple[Row, Part | None]]:
    """Yields the parts of several rows as they come, and None at the end of each.

    Raises:
        Exception: as a row's `parts`, of the first that fails.
    """
    queue: asyncio.Queue[tuple[Row, Part | Exception | None]] = asyncio.Queue()

    async def feed(row: Row) -> None:
        try:
            async for part in row.parts():
                queue.put_nowait((row, part))
            queue.put_nowait((row, None))
        except Exception as error:
            queue.put_nowait((row, error))

    feeding = [asyncio.create_task(feed(row)) for row in rows]
    running = len(rows)
    try:
        while running:
            row, part = await queue.get()
            if isinstance(part, Exception):
                raise part
            running -= part is None
            yield row, part
    finally:
        for task in feeding:
            task.cancel()


class EventStream(StreamingResponse):
    """Server-sent events, each a JSON object; a stream that fails ends with an error.

    Args:
        events: the objects.
        rows: are ended when the stream ends, also where the client has left it.
    """

    media_type = "text/event-stream"

    def __init__(self, events: Callable[[], AsyncIterator[dict[str, Any]]], rows: Sequence[Row]):
        super().__init__(_lines(events), headers={"x-accel-buffering": "no"})
        self.rows = rows

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Sends the events."""
        with ended(self.rows):
            await super().__call__(scope, receive, send)


async def _lines(events: Callable[[], AsyncIterator[dict[str, Any]]]) -> AsyncIterator[str]:
    try:
        async for event in events():
            # In ASCII: some clients end a line at U+2028, which would stand in the text as it is.
            yield f"data: {json.dumps(event)}\n\n"
        yield "data: [DONE]\n\n"
    except Exception as error:
        yield f"data: {json.dumps(api_error(error).body())}\n\n"
