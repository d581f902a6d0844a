"""The routes of the page over a tiny model, asked within this process."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from starlette.testclient import TestClient

from helpers.commands import LETTERS, write_model
from helpers.models import tiny_model, train_a_little
from nanogpt_surgery import CharacterTokenizer, GPTConfig, SimpleGPT, inject_lora, open_model
from nanogpt_surgery.serving.engine import Engine
from nanogpt_surgery.serving.server import Server, make_app

SMALL = GPTConfig.for_family(
    "llama", vocab_size=len(LETTERS), n_embd=24, n_head=6, n_kv_head=2, n_layer=2, block_size=60
)


def model_with(*names: str) -> SimpleGPT:
    """A tiny model of letters that carries adapters, each with other updates."""
    model = tiny_model(SMALL)
    for seed, name in enumerate(names, 5):
        inject_lora(model, ["q_proj", "o_proj"], rank=3, alpha=9, name=name)
        train_a_little(model, seed, size=0.5)
    return model


@contextmanager
def page_of(model: SimpleGPT, **options: Any) -> Iterator[tuple[TestClient, Server]]:
    """A client of the page's routes, and the server behind them."""
    tokenizer = CharacterTokenizer(LETTERS)
    server = Server(Engine(model), model, tokenizer, "tiny", **options)
    address = "http://127.0.0.1"
    client = TestClient(make_app(server), base_url=address, raise_server_exceptions=False)
    try:
        yield client, server
    finally:
        server.stopping.set()
        server.engine.close()


@contextmanager
def folders_page(folder: Path, **options: Any) -> Iterator[tuple[TestClient, Server]]:
    """The same for a model that lies in `folder`, with folders for adapters and runs beside it."""
    write_model(folder / "tiny", block_size=64)
    model, _ = open_model(folder / "tiny")
    for name in ("adapters", "runs"):
        (folder / name).mkdir()
    usual = {"adapters_folder": folder / "adapters", "runs_folder": folder / "runs"}
    with page_of(model, **usual | {"source": str(folder / "tiny")} | options) as found:
        yield found


def posted(client: TestClient, path: str, status: int = 200, /, **body: Any) -> Any:
    """The JSON that a route answers with."""
    answer = client.post(path, json=body)
    assert answer.status_code == status, answer.text
    return answer.json()


def operated(client: TestClient, operation: str, status: int = 200, **values: Any) -> Any:
    """The report of an operation, or its refusal."""
    return posted(client, "/api/operate", status, operation=operation, **values)


def streamed(client: TestClient, path: str, **body: Any) -> list[dict[str, Any]]:
    """The events that a route answers with."""
    answer = client.post(path, json=body)
    assert answer.status_code == 200, answer.text
    lines = [line.removeprefix("data: ") for line in answer.text.split("\n") if line]
    assert lines.pop() == "[DONE]"
    return [json.loads(line) for line in lines]
