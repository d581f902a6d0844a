"""`/v1/completions` and `/v1/chat/completions`, and the tokenizer that they use."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Route

from nanogpt_surgery.data.conversations.chat import chat_ids
from nanogpt_surgery.data.tokenizers.tokenizer import prompt_ids, stop_ids
from nanogpt_surgery.errors import SurgeryError
from nanogpt_surgery.serving.answering import EventStream, Part, Row, ended, merged, while_connected
from nanogpt_surgery.serving.fields import (
    CHAT,
    COMPLETION,
    MOST_ROWS,
    messages_of,
    read_fields,
    required,
    sampling_of,
    seed_of,
    stop_strings,
)
from nanogpt_surgery.serving.http import ApiError, read_json
from nanogpt_surgery.serving.request import Request
from nanogpt_surgery.serving.tokens import chat_logprobs, completion_logprobs

if TYPE_CHECKING:
    from nanogpt_surgery.serving.server import Server

FEW_TOKENS = 16  # of a completion whose client does not say


@dataclass
class Asked:
    """The texts that a request asks for.

    Attributes:
        values: its fields.
        prompts: the ids of each.
        texts: of the prompts, where they are shown.
        samples: of each prompt that are made; the best `n` are shown.
        max_new_tokens: of each text.
        likeliest: log-probabilities beside the chosen one's; None: none at all.
        stop: strings that end a text.
    """

    values: Mapping[str, Any]
    prompts: list[list[int]]
    max_new_tokens: int
    likeliest: int | None
    stop: tuple[str, ...]
    samples: int = 1
    texts: Sequence[str | None] = ()
    begun: int = field(default_factory=lambda: int(time.time()))

    @property
    def n(self) -> int:
        """How many texts of each prompt are shown."""
        return int(self.values["n"])

    @property
    def with_usage(self) -> bool:
        """Whether a stream is to end with numbers of tokens."""
        return bool((self.values["stream_options"] or {}).get("include_usage"))


def routes(server: Server) -> list[BaseRoute]:
    """Returns the routes."""

    async def completions(request: HttpRequest) -> Response:
        body = await read_json(request)
        server.check_running()
        asked = await run_in_threadpool(completion_of, server, body)
        return await answered(server, request, asked, Completion(server, asked))

    async def chat(request: HttpRequest) -> Response:
        body = await read_json(request)
        server.check_running()
        async with server.rendering:
            asked = await run_in_threadpool(chat_of, server, body)
        return await answered(server, request, asked, Chat(server, asked))

    return [
        Route("/v1/completions", completions, methods=["POST"]),
        Route("/v1/chat/completions", chat, methods=["POST"]),
    ]


def completion_of(server: Server, body: Mapping[str, Any]) -> Asked:
    """Returns what a completion asks for.

    Raises:
        ApiError: a field is wrong, there is no such model, or the prompt is too long.
    """
    values = read_fields(body, COMPLETION)
    server.weights_of(values["model"])
    samples = values["n"] if values["best_of"] is None else values["best_of"]
    if samples < values["n"] or (samples > values["n"] and values["stream"]):
        what = f"best_of is {samples}, with n {values['n']}"
        raise ApiError(400, f"{what}: it is at least n, and n in a stream", param="best_of")
    prompt = required(values, "prompt")
    several = prompt if isinstance(prompt, list) and not isinstance(prompt[0], int) else [prompt]
    ids = [_ids_of(server, one) for one in several]
    most = FEW_TOKENS if values["max_tokens"] is None else values["max_tokens"]
    texts = [one if isinstance(one, str) else server.tokenizer.decode(one) for one in several]
    return _checked(
        server,
        Asked(
            values,
            ids,
            min(most, _room(server, ids)) if values["max_tokens"] is None else most,
            values["logprobs"],
            stop_strings(values),
            samples,
            texts if values["echo"] else [None] * len(ids),
        ),
    )


def chat_of(server: Server, body: Mapping[str, Any]) -> Asked:
    """Returns what a chat asks for.

    Raises:
        ApiError: a field is wrong, there is no such model, or the conversation is too long.
    """
    values = read_fields(body, CHAT)
    server.weights_of(values["model"])
    if values["top_logprobs"] is not None and not values["logprobs"]:
        raise ApiError(400, "top_logprobs needs logprobs: true", param="top_logprobs")
    template = server.template_of(values["model"])
    try:
        ids = chat_ids(server.tokenizer, messages_of(values), template)
    except SurgeryError as error:
        raise ApiError(400, str(error), param="messages", code="invalid_value") from None
    most = values["max_completion_tokens"] or values["max_tokens"]
    return _checked(
        server,
        Asked(
            values,
            [ids],
            most or max(1, _room(server, [ids])),
            (values["top_logprobs"] or 0) if values["logprobs"] else None,
            (*stop_strings(values), *template.stop),
            values["n"],
            [None],
        ),
    )


def _ids_of(server: Server, prompt: str | list[int]) -> list[int]:
    vocab_size = server.model.config.vocab_size
    if isinstance(prompt, str):
        try:
            ids = prompt_ids(server.tokenizer, prompt)
        except SurgeryError as error:
            raise ApiError(400, str(error), param="prompt", code="invalid_value") from None
        if not ids:
            what = "prompt is empty; a text is continued from at least one token"
            raise ApiError(400, what, param="prompt", code="invalid_value")
        return ids
    if max(prompt) >= vocab_size:
        what = f"prompt has the id {max(prompt)}; the vocabulary is 0 to {vocab_size - 1}"
        raise ApiError(400, what, param="prompt", code="invalid_value")
    return prompt


def _room(server: Server, prompts: Sequence[Sequence[int]]) -> int:
    """Returns how many tokens may follow the longest prompt; the last of them is never read."""
    return server.model.config.block_size + 1 - max(map(len, prompts))


def _checked(server: Server, asked: Asked) -> Asked:
    """Returns what is asked for.

    Raises:
        ApiError: it is more than fits, or too much at once.
    """
    block, longest = server.model.config.block_size, max(map(len, asked.prompts))
    if longest > block or asked.max_new_tokens > _room(server, asked.prompts):
        where = "messages" if "messages" in asked.values else "prompt"
        raise ApiError(
            400,
            f"{where}: {longest:,} tokens, and {asked.max_new_tokens:,} are to follow; the model's "
            f"context is {block:,}",
            param=where,
            code="context_length_exceeded",
        )
    rows = len(asked.prompts) * asked.samples
    if rows > MOST_ROWS:
        what = f"{len(asked.prompts)} prompts {asked.samples} times are {rows} texts"
        raise ApiError(400, f"{what}; the limit is {MOST_ROWS}", param="n", code="invalid_value")
    if asked.values["stream_options"] is not None and not asked.values["stream"]:
        raise ApiError(400, "stream_options needs stream: true", param="stream_options")
    return asked


def begin(server: Server, asked: Asked) -> list[Row]:
    """Returns the texts, begun: those of the first prompt first.

    Raises:
        QueueFull: they are more than may wait.
        SurgeryError: one of them is refused.
    """
    sampling = sampling_of(asked.values, server.model.config.vocab_size)
    rows: list[Row] = []
    for prompt, text in zip(asked.prompts, asked.texts, strict=True):
        for sample in range(asked.samples):
            row = Row(len(rows), server.tokenizer, prompt, asked.stop, text)
            request = Request(
                row.prompt,
                asked.max_new_tokens,
                sampling,
                stop_ids=stop_ids(server.tokenizer),
                seed=seed_of(asked.values, sample),
                adapters=server.weights_of(asked.values["model"]),
                likeliest=asked.likeliest or 0,
                prompt_log_probabilities=text is not None and asked.likeliest is not None,
                until=row.until,
            )
            try:
                row.answer = server.engine.submit(request)
            except BaseException:
                with ended(rows):
                    raise
            rows.append(row)
    return rows


async def answered(
    server: Server, request: HttpRequest, asked: Asked, form: Completion | Chat
) -> Response:
    """Returns the answer to a request, whole or as a stream."""
    rows = begin(server, asked)
    if asked.values["stream"]:
        return EventStream(lambda: _events(asked, rows, form), rows)
    with ended(rows):
        parts = await while_connected(request, _gathered(rows))
    shown = _best(rows, asked)
    choices = await run_in_threadpool(  # with log-probabilities of long prompts it takes a while
        lambda: [form.choice(place, row, parts[row.place]) for place, row in enumerate(shown)]
    )
    return JSONResponse(form.head() | {"choices": choices, "usage": _usage(asked, rows)})


async def _gathered(rows: Sequence[Row]) -> list[list[Part]]:
    found: list[list[Part]] = [[] for _ in rows]
    async for row, part in merged(rows):
        if part is not None:
            found[row.place].append(part)
    return found


def _best(rows: Sequence[Row], asked: Asked) -> list[Row]:
    """Returns the rows that are shown: of each prompt's samples the n likeliest."""
    if asked.samples == asked.n:
        return list(rows)
    found = []
    for first in range(0, len(rows), asked.samples):
        samples = rows[first : first + asked.samples]
        found += sorted(samples, key=lambda row: -row.mean_log_probability)[: asked.n]
    return found


def _usage(asked: Asked, rows: Sequence[Row]) -> dict[str, int]:
    before, new = sum(map(len, asked.prompts)), sum(len(row.answer.tokens) for row in rows)
    return {"prompt_tokens": before, "completion_tokens": new, "total_tokens": before + new}


async def _events(
    asked: Asked, rows: Sequence[Row], form: Completion | Chat
) -> AsyncIterator[dict[str, Any]]:
    """Yields the objects of a stream; where usage is asked for, it is in the last of them."""
    nothing = {"usage": None} if asked.with_usage else {}
    for row in rows:
        if first := form.first(row):
            yield form.head() | {"choices": [first]} | nothing
    async for row, part in merged(rows):
        yield form.head() | {"choices": [form.delta(row, part)]} | nothing
    if asked.with_usage:
        yield form.head() | {"choices": [], "usage": _usage(asked, rows)}


class Completion:
    """The form of `/v1/completions`."""

    kind, prefix = "text_completion", "cmpl"

    def __init__(self, server: Server, asked: Asked) -> None:
        self.server, self.asked = server, asked
        self.id = f"{self.prefix}-{uuid.uuid4().hex}"
        self.sent: dict[int, int] = {}  # characters, by row

    def head(self) -> dict[str, Any]:
        """Returns the fields of every object."""
        return {
            "id": self.id,
            "object": self.kind,
            "created": self.asked.begun,
            "model": self.asked.values["model"] or self.server.name,
            "system_fingerprint": None,
        }

    def choice(self, place: int, row: Row, parts: Sequence[Part]) -> dict[str, Any]:
        """Returns a whole text."""
        text = "".join(part.text for part in parts)
        tokens = [token for part in parts for token in part.tokens]
        logprobs = self._logprobs(tokens, 0)
        return {
            "index": place,
            "text": text,
            "logprobs": logprobs,
            "finish_reason": row.finish_reason,
        }

    def first(self, row: Row) -> dict[str, Any] | None:
        """Returns nothing: a completion begins with its text."""
        return None

    def delta(self, row: Row, part: Part | None) -> dict[str, Any]:
        """Returns what is new of a text, or its end."""
        part, reason = (Part("", []), row.finish_reason) if part is None else (part, None)
        before = self.sent.get(row.place, 0)
        self.sent[row.place] = before + len(part.text)
        logprobs = self._logprobs(part.tokens, before) if part.tokens else None
        return {
            "index": row.place,
            "text": part.text,
            "logprobs": logprobs,
            "finish_reason": reason,
        }

    def _logprobs(self, tokens: Sequence[Any], offset: int) -> dict[str, Any] | None:
        if self.asked.likeliest is None:
            return None
        return completion_logprobs(self.server.tokenizer, tokens, offset)


class Chat(Completion):
    """The form of `/v1/chat/completions`."""

    kind, prefix = "chat.completion", "chatcmpl"

    def head(self) -> dict[str, Any]:
        """Returns the fields of every object."""
        streamed = ".chunk" if self.asked.values["stream"] else ""
        return super().head() | {"object": f"{self.kind}{streamed}"}

    def choice(self, place: int, row: Row, parts: Sequence[Part]) -> dict[str, Any]:
        """Returns a whole answer."""
        found = super().choice(place, row, parts)
        message = {"role": "assistant", "content": found.pop("text"), "refusal": None}
        return found | {"message": message}

    def first(self, row: Row) -> dict[str, Any] | None:
        """Returns who speaks."""
        delta = {"role": "assistant", "content": ""}
        return {"index": row.place, "delta": delta, "logprobs": None, "finish_reason": None}

    def delta(self, row: Row, part: Part | None) -> dict[str, Any]:
        """Returns what is new of an answer, or its end."""
        found = super().delta(row, part)
        text = found.pop("text")
        return found | {"delta": {} if part is None else {"content": text}}

    def _logprobs(self, tokens: Sequence[Any], offset: int) -> dict[str, Any] | None:
        return (
            None if self.asked.likeliest is None else chat_logprobs(self.server.tokenizer, tokens)
        )
