"""A model, its adapters, and the application that serves them."""

from __future__ import annotations

import asyncio
import logging
import socket
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import uvicorn
from starlette.applications import Starlette
from starlette.responses import FileResponse
from starlette.routing import BaseRoute, Mount, Route
from starlette.staticfiles import StaticFiles

from nanogpt_surgery.data.conversations.chat import ChatTemplate
from nanogpt_surgery.data.tokenizers.tokenizer import Tokenizer
from nanogpt_surgery.errors import SurgeryError
from nanogpt_surgery.formats.opening import template_to_talk
from nanogpt_surgery.history.model_history import history_of
from nanogpt_surgery.lora.several import adapter_names
from nanogpt_surgery.model.simple_gpt import SimpleGPT
from nanogpt_surgery.serving import (
    adapters_api,
    completions_api,
    models_api,
    room,
    tokenizer_api,
)
from nanogpt_surgery.serving.connections import Connection, bind, listen
from nanogpt_surgery.serving.http import ApiError, answer_error
from nanogpt_surgery.serving.security import Guard

if TYPE_CHECKING:
    from nanogpt_surgery.serving.engine import Engine

T = TypeVar("T")
MOST_WAITING = 64  # operations and measurements
MOST_OPERATIONS = 100  # in the journal: each holds the adapters that it took away, for an undo
GRACE = 10.0  # seconds that running answers have when the server stops


@dataclass
class Server:
    """A model and its adapters as they are served, shared by all routes.

    Attributes:
        engine: computes, in a thread of its own; it alone touches the model.
        model: for what never changes: its config.
        tokenizer: the model's.
        name: the model's, as clients write it.
        source: what the model was opened from.
        folders: where the adapters were loaded from, by their names; those that have left as well,
            since an undo may bring them back.
        adapters_folder: below which adapters may be loaded and saved; None: neither.
        runs_folder: below which trainings are; None: none may be begun or saved.
        key: that clients must show.
        log: called with a line about each request.
    """

    engine: Engine
    model: SimpleGPT
    tokenizer: Tokenizer
    name: str
    source: str = ""
    folders: dict[str, Path] = field(default_factory=dict)
    adapters_folder: Path | None = None
    runs_folder: Path | None = None
    key: str | None = field(default=None, repr=False)
    log: Callable[[str], None] | None = None

    def __post_init__(self) -> None:
        self.stopping, self._waiting = threading.Event(), 0
        self.rendering = asyncio.Semaphore(4)  # chat templates of strangers, a process each
        self.listeners: list[Callable[[], None]] = []  # called after each change of the model
        self.adapters = tuple(adapter_names(self.model))
        self._check_names()

    def _check_names(self) -> None:
        if self.name in self.adapters:
            raise SurgeryError(
                f"the model and an adapter are both named {self.name!r}",
                "name=base names the model otherwise",
            )

    async def operate(self, change: Callable[[SimpleGPT], T]) -> T:
        """Changes the model, alone, when running answers have ended."""
        return await self._waited_for(lambda: self.engine.operate(change, self.take_changes))

    async def look(self, read: Callable[[SimpleGPT], T]) -> T:
        """Returns what a function reads of the model, between two tokens of running answers."""
        return await self._waited_for(lambda: self.engine.look(read))

    async def _waited_for(self, begin: Callable[[], Future[T]]) -> T:
        """Returns what the engine's thread is asked for, where not too much waits for it already.

        Raises:
            ApiError: it does.
        """
        if self._waiting >= MOST_WAITING:
            what = f"{self._waiting} operations and measurements are waiting, the most that may"
            raise ApiError(429, what, code="queue_full", headers={"retry-after": "1"})
        self._waiting += 1
        try:
            return await asyncio.wrap_future(begin())
        finally:
            self._waiting -= 1

    def take_changes(self) -> None:
        """Takes the adapters' names anew, and tells the listeners; the engine calls it.

        It does so when it answers by the changed model: what is told is true then.
        """
        history_of(self.model).keep(MOST_OPERATIONS)
        self.adapters = tuple(adapter_names(self.model))
        for listener in self.listeners:
            listener()

    def weights_of(self, model: str | None) -> Mapping[str, float]:
        """Returns the adapters that take part where a client asks for a model by name.

        Raises:
            ApiError: there is no such model.
        """
        if model is None or model == self.name:
            return {}
        if model in self.adapters:
            return {model: 1.0}
        known = ", ".join((self.name, *self.adapters))
        raise ApiError(
            404,
            f"there is no model {model[:200]!r}; there are {known}",
            param="model",
            code="model_not_found",
        )

    def template_of(self, model: str | None) -> ChatTemplate:
        """Returns the chat template of a model: as the adapter was trained, or the model's own."""
        return template_to_talk(self.tokenizer, "auto", self.folders.get(model or ""))

    def check_running(self) -> None:
        """Raises `ApiError` if the server takes no more requests."""
        if self.stopping.is_set():
            raise ApiError(503, "the server is stopping", headers={"retry-after": "10"})
        if self.engine.closed:
            raise ApiError(
                503, "the engine has ended by an error; the server has to be started anew"
            )


def routes(server: Server) -> list[BaseRoute]:
    """Returns every route, of the API and of the page."""
    page = Path(__file__).with_name("page")
    rooms = (models_api, completions_api, tokenizer_api, adapters_api, room)
    return [
        *(route for part in rooms for route in part.routes(server)),
        Route("/", lambda _: FileResponse(page / "index.html")),
        Mount("/static", StaticFiles(directory=page)),
    ]


def is_open(path: str) -> bool:
    """Whether a path's answer tells nothing of the model: it needs no key."""
    return path in ("/", "/health") or path.startswith("/static/")


def make_app(server: Server, host: str = "127.0.0.1") -> Guard:
    """Returns the application, behind the checks of security.py.

    Raises:
        SurgeryError: other machines reach `host`, and the server has no key.
    """
    app = Starlette(
        routes=routes(server), exception_handlers=dict.fromkeys(_ANSWERED, answer_error)
    )
    app.router.redirect_slashes = False
    return Guard(app, host, server.key, is_open, server.log)


_ANSWERED = (ApiError, SurgeryError, 404, 405, Exception)


class HttpServer(uvicorn.Server):
    """Serves an application on an address until it is stopped.

    Args:
        server: is closed at the end.
        host: an address of this machine.
        port: 0 takes a free one.
        grace: seconds that running answers have when it is stopped.
        bound: a socket that has the address already.

    Raises:
        SurgeryError: the address cannot be listened on, or others reach it and there is no key.
    """

    def __init__(
        self,
        server: Server,
        host: str = "127.0.0.1",
        port: int = 0,
        grace: float = GRACE,
        bound: socket.socket | None = None,
    ) -> None:
        self.server, self.grace = server, grace
        self.socket = bound or bind(host, port, server.key)
        listen(self.socket)
        self.port: int = self.socket.getsockname()[1]
        shown = f"[{host}]" if ":" in host else host
        self.address = f"http://{shown}:{self.port}"
        logging.getLogger("uvicorn.access").propagate = False  # it writes queries, too
        super().__init__(
            uvicorn.Config(
                make_app(server, host),
                http=Connection,
                ws="none",
                lifespan="off",
                access_log=False,
                log_config=None,
                server_header=False,
                proxy_headers=False,
                h11_max_incomplete_event_size=64 << 10,
                timeout_graceful_shutdown=int(grace) + 5,
            )
        )

    def serve_until_stopped(self) -> None:
        """Answers requests; running answers have ended when it returns.

        Raises:
            SurgeryError: it has ended because the engine has, by an error of the program.
        """
        self.run(sockets=[self.socket])
        self.stop()
        self._closing.join()
        if error := self.server.engine.error:
            raise SurgeryError(f"the engine has ended by an error: {type(error).__name__}: {error}")

    def stop(self) -> None:
        """Lets no more requests begin, and ends running ones within the grace; returns at once."""
        if not self.server.stopping.is_set():
            self.server.stopping.set()
            self._closing = threading.Thread(target=self.server.engine.close, args=(self.grace,))
            self._closing.start()
        self.should_exit = True

    async def on_tick(self, counter: int) -> bool:
        """Returns whether it is to stop: also where the engine has ended."""
        if self.server.engine.closed:
            self.stop()
        return await super().on_tick(counter)

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leaves signals to the program that serves."""
        yield
