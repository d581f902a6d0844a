"""One question, and the answers of up to four sides: the base, adapters, blends of them.

All sides draw with one seed and are streamed together, token by token, each with its probability
and what else might have stood there. A side goes on from another choice where it is given ids that
its answer is to begin with.
"""

from __future__ import annotations

import asyncio
import math
import secrets
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request as HttpRequest
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from nanogpt_surgery.data.conversations.chat import chat_ids
from nanogpt_surgery.data.tokenizers.tokenizer import prompt_ids, stop_ids
from nanogpt_surgery.errors import quoted
from nanogpt_surgery.generation.batch import Token
from nanogpt_surgery.lora.active import WeightedAdapters
from nanogpt_surgery.serving.answering import EventStream, Part, Row, ended
from nanogpt_surgery.serving.fields import (
    COMMON,
    IDS,
    MESSAGES,
    SAMPLING,
    TEXT,
    Field,
    messages_of,
    read_fields,
    required,
    sampling_of,
    seed_of,
)
from nanogpt_surgery.serving.http import ApiError, api_error, read_json
from nanogpt_surgery.serving.request import Request
from nanogpt_surgery.serving.room.look import ADAPTERS
from nanogpt_surgery.serving.tokens import text_of
from nanogpt_surgery.values import Kind, integer

if TYPE_CHECKING:
    from nanogpt_surgery.serving.server import Server

MOST_SIDES, USUAL_TOKENS = 4, 128
HashesOf = Callable[[Mapping[str, float]], list[str]]


def _are_sides(value: Any) -> bool:
    return (
        isinstance(value, list)
        and 0 < len(value) <= MOST_SIDES
        and all(isinstance(one, dict) and ADAPTERS.holds(one.get("adapters", {})) for one in value)
    )


SIDES = Kind(f'a list of 1 to {MOST_SIDES} objects with "adapters", {ADAPTERS.words}', _are_sides)
GIVEN = Kind(
    "a list of ids for each side",
    lambda x: isinstance(x, list) and len(x) <= MOST_SIDES and all(map(IDS.holds, x)),
)
TALK = SAMPLING | {
    "prompt": Field(TEXT),
    "messages": Field(MESSAGES),
    "sides": Field(SIDES),
    "seed": COMMON["seed"],
    "max_new_tokens": Field(integer(1, 1 << 20), USUAL_TOKENS),
    "likeliest": Field(integer(0, 20), 5),
    "continue_with": Field(GIVEN),
}


class Side(Row):
    """One side's answer, as events.

    Args:
        place: among the sides.
        server: whose model answers.
        weights: of the adapters that take part.
        prompt: ids of the question.
        given: ids that the answer begins with.
        stop: strings that end it.
    """

    def __init__(
        self,
        place: int,
        server: Server,
        weights: Mapping[str, float],
        prompt: Sequence[int],
        given: Sequence[int],
        stop: Sequence[str],
    ) -> None:
        super().__init__(place, server.tokenizer, [*prompt, *given], stop)
        self.tokenizer, self.weights = server.tokenizer, weights
        self.n_prompt, self.n_given = len(prompt), len(given)
        self.hashes: list[str] = []  # of the weights that compute it, when it has begun

    async def events(self, seed: int) -> AsyncIterator[dict[str, Any]]:
        """Yields what it is, when it has begun; the tokens as they come; and how it ended."""
        end: dict[str, Any] = {"side": self.place, "done": True}
        told = False
        try:
            async for part in self.parts():
                if not told:
                    yield self._begun(seed)
                told = True
                for event in self._tokens(part):
                    yield {"side": self.place, **event}
            if not told:
                yield self._begun(seed)
            yield end | {"reason": self._reason()}
        except Exception as error:
            reason = self.answer.reason or "failed"
            yield end | {"reason": reason, **api_error(error).body()}

    def _begun(self, seed: int) -> dict[str, Any]:
        return {
            "side": self.place,
            "name": str(WeightedAdapters(self.weights)) if self.weights else "base",
            "hashes": self.hashes,
            "seed": seed,
            "prompt_ids": list(self.prompt[: self.n_prompt]),
        }

    def _reason(self) -> str:
        """Why it ended; a stop string has ended it even where the engine calls that otherwise."""
        return "time" if self.answer.reason == "time" else self.finish_reason

    def _tokens(self, part: Part) -> list[dict[str, Any]]:
        """Returns the tokens of a part; where they share a character, the last one has it."""
        tokens = [token for token in part.tokens if isinstance(token, Token)]
        texts = [text_of(self.tokenizer, token.id) for token in tokens]
        if "".join(texts) != part.text:
            texts = [*[""] * (len(tokens) - 1), part.text]
        return [
            {
                "id": token.id,
                "text": text,
                "probability": _probability(token.log_probability),
                "likeliest": [
                    {"id": i, "text": text_of(self.tokenizer, i), "probability": _probability(p)}
                    for i, p in token.likeliest.items()
                ],
            }
            for token, text in zip(tokens, texts, strict=False)
        ]


def _probability(log_probability: float) -> float:
    return round(math.exp(log_probability), 5)


def begin(server: Server, body: Mapping[str, Any], hashes_of: HashesOf) -> tuple[list[Side], int]:
    """Returns the sides, begun, and the seed of their draws.

    Raises:
        ApiError: a field is wrong, or the question is too long.
        QueueFull: too many texts wait.
        SurgeryError: the template or the engine refuses it.
    """
    values = read_fields(body, TALK)
    sampling = sampling_of(values, server.model.config.vocab_size)
    seed = secrets.randbits(32) if (known := seed_of(values, 0)) is None else known
    sides: list[Side] = []
    try:
        for side in [_side(server, values, place) for place in range(len(values["sides"] or []))]:
            request = Request(
                side.prompt,
                _room(server, values, side),
                sampling,
                stop_ids=stop_ids(server.tokenizer),
                seed=seed,
                adapters=side.weights,
                likeliest=values["likeliest"],
                until=side.until,
                began=partial(_note_hashes, side, hashes_of),
            )
            side.answer = server.engine.submit(request)
            sides.append(side)
    except BaseException:
        with ended(sides):
            raise
    required({"sides": sides or None}, "sides")
    return sides, seed


def _note_hashes(side: Side, hashes_of: HashesOf) -> None:
    """Notes by which weights a side is computed; those of its request may have changed since."""
    side.hashes = hashes_of(side.weights)


def _side(server: Server, values: Mapping[str, Any], place: int) -> Side:
    """Returns a side that is not begun yet.

    Raises:
        ApiError: there is no such adapter, or no list of given ids for this side.
        SurgeryError: the template refuses the messages, or the vocabulary lacks a character.
    """
    weights = values["sides"][place].get("adapters", {})
    for name in weights:
        if name not in server.adapters:
            there = ", ".join(server.adapters) or "none"
            what = f"there is no adapter {quoted(name)}; there are: {there}"
            raise ApiError(400, what, param="sides", code="model_not_found")
    given = values["continue_with"] or [[]] * len(values["sides"])
    if len(given) != len(values["sides"]):
        what = f"continue_with has {len(given)} lists for {len(values['sides'])} sides"
        raise ApiError(400, what, param="continue_with", code="invalid_value")
    prompt, stop = _question(server, values, weights)
    if not prompt or max([*prompt, *given[place]]) >= server.model.config.vocab_size:
        what = "the prompt is empty, or an id of continue_with is not in the vocabulary"
        raise ApiError(400, what, param="prompt", code="invalid_value")
    return Side(place, server, weights, prompt, given[place], stop)


def _question(
    server: Server, values: Mapping[str, Any], weights: Mapping[str, float]
) -> tuple[list[int], tuple[str, ...]]:
    """Returns the ids of the question, and the strings that end an answer.

    A single adapter is asked in the template that it was trained with.
    """
    if values["messages"] is None:
        return prompt_ids(server.tokenizer, required(values, "prompt")), ()
    template = server.template_of(next(iter(weights)) if len(weights) == 1 else None)
    return chat_ids(server.tokenizer, messages_of(values), template), template.stop


def _room(server: Server, values: Mapping[str, Any], side: Side) -> int:
    """Returns how many tokens are still to come; the last of them is never read.

    Raises:
        ApiError: there is no room for any.
    """
    block = server.model.config.block_size
    if len(side.prompt) > block:
        raise ApiError(
            400,
            f"question and answer have {len(side.prompt):,} tokens so far; the model's context is "
            f"{block:,}",
            param="prompt",
            code="context_length_exceeded",
        )
    asked: int = values["max_new_tokens"] - side.n_given
    return max(0, min(asked, block + 1 - len(side.prompt)))


async def events(sides: Sequence[Side], seed: int) -> AsyncIterator[dict[str, Any]]:
    """Yields what each side is, its tokens as they come, and its end."""
    queue: asyncio.Queue[dict[str, Any]] = asyncio.Queue()

    async def feed(side: Side) -> None:
        async for event in side.events(seed):
            queue.put_nowait(event)

    feeding, running = [asyncio.create_task(feed(side)) for side in sides], len(sides)
    try:
        while running:
            event = await queue.get()
            running -= event.get("done", False)
            yield event
    finally:
        for task in feeding:
            task.cancel()


def routes(server: Server, hashes_of: HashesOf) -> list[BaseRoute]:
    """Returns the route.

    Args:
        server: whose model answers.
        hashes_of: those of the base and of the adapters that take part.
    """

    async def talk(request: HttpRequest) -> Response:
        body = await read_json(request)
        server.check_running()
        sides, seed = await run_in_threadpool(begin, server, body, hashes_of)
        return EventStream(lambda: events(sides, seed), sides)

    return [Route("/api/talk", talk, methods=["POST"])]
