"""A tiny model that is served in this process, on a free port, and requests as raw as need be."""

import http.client
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

from helpers.commands import LETTERS
from helpers.models import tiny_model, train_a_little
from nanogpt_surgery import CharacterTokenizer, GPTConfig, SimpleGPT, inject_lora
from nanogpt_surgery.generation.batch import Token
from nanogpt_surgery.serving.engine import Answer, Engine, Request
from nanogpt_surgery.serving.server import HttpServer, Server

LETTER_MODEL = GPTConfig.for_family(
    "llama", vocab_size=len(LETTERS), n_embd=24, n_head=6, n_kv_head=2, n_layer=2, block_size=60
)
KEY = "a-key-of-more-than-16-characters"


def adapted_model(*names: str) -> SimpleGPT:
    """A tiny model of letters that carries adapters, each with other updates."""
    model = tiny_model(LETTER_MODEL)
    for seed, name in enumerate(names, 5):
        inject_lora(model, ["q_proj", "v_proj"], rank=3, alpha=9, name=name)
        train_a_little(model, seed, size=0.5)
    return model


def listening_server(
    model: SimpleGPT | None = None,
    tokenizer: Any = None,
    name: str = "tiny",
    rows: int = 16,
    waiting: int = 64,
    grace: float = 1,
    **options: Any,
) -> HttpServer:
    """A server that listens, and is still to be run."""
    model = model or adapted_model("one", "two")
    engine = Engine(model, rows=rows, waiting=waiting)
    tokenizer = tokenizer or CharacterTokenizer(LETTERS)
    return HttpServer(Server(engine, model, tokenizer, name, **options), grace=grace)


@contextmanager
def served(*arguments: Any, **options: Any) -> Iterator[HttpServer]:
    """A server that runs until the end of the block."""
    running = listening_server(*arguments, **options)
    thread = threading.Thread(target=running.serve_until_stopped)
    thread.start()
    try:
        yield running
    finally:
        running.stop()
        thread.join(60)
        assert not thread.is_alive()


def until(condition: Callable[[], Any]) -> None:
    """Waits for a condition."""
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


@contextmanager
def held(engine: Engine, tokens: int = 0) -> Iterator[threading.Event]:
    """Within the block, the engine stands still once a text has so many tokens, until the event."""
    go, submit = threading.Event(), engine.submit

    def submitted(request: Request) -> Answer:
        number = count()

        def until(token: Token) -> bool:
            assert next(number) < tokens or go.wait(60)
            return request.until is not None and request.until(token)

        return submit(replace(request, until=until))

    engine.submit = submitted
    try:
        yield go
    finally:
        engine.submit = submit
        go.set()


def asked(
    running: HttpServer,
    path: str,
    body: Any = None,
    method: str | None = None,
    headers: dict[str, str] | None = None,
) -> tuple[int, dict[str, str], Any]:
    """The status, headers and JSON (or text) of an answer; a body that is bytes goes as it is."""
    connection = http.client.HTTPConnection("127.0.0.1", running.port, timeout=60)
    data = body if isinstance(body, bytes | None) else json.dumps(body).encode()
    sent = {} if data is None else {"Content-Type": "application/json"}
    try:
        connection.request(
            method or ("GET" if data is None else "POST"), path, data, sent | (headers or {})
        )
        answer = connection.getresponse()
        text = answer.read().decode()
    finally:
        connection.close()
    found = {name.lower(): value for name, value in answer.getheaders()}
    is_json = found.get("content-type", "").startswith("application/json")
    return answer.status, found, json.loads(text) if is_json and text else text


def events(text: str) -> list[Any]:
    """The objects of a stream; its end, [DONE], as None."""
    lines = [line.removeprefix("data: ") for line in text.split("\n") if line]
    return [None if line == "[DONE]" else json.loads(line) for line in lines]


def refused(running: HttpServer, status: int, path: str, *arguments: Any, **named: Any) -> Any:
    """The error of a request that is refused with this status, in OpenAI's form."""
    found, _, body = asked(running, path, *arguments, **named)
    assert found == status, body
    error = body["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    assert error["type"]
    return error


def adapter_folder(folder: Path) -> Path:
    """A folder with an adapter for the tiny model."""
    from nanogpt_surgery import save_adapter

    model = adapted_model("one")
    save_adapter(model, folder)
    return folder
