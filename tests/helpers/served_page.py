"""A tiny model that is served with the page; its port stays over a stop and a start."""

import itertools
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from helpers.commands import write_model
from helpers.models import train_a_little
from nanogpt_surgery import SurgeryError, inject_lora, open_model
from nanogpt_surgery.serving.engine import Engine
from nanogpt_surgery.serving.server import HttpServer, Server

ADAPTER, OTHER = "python", "rhyme"
SCRIPT = "<script>alert(1)</script>"


# Below those that a system gives to whoever asks for any: while nothing listens on the port, no
# other connection of this machine takes it.
PORTS = range(20_000, 32_768)


class Listening:
    """What answers on a port; stopped, it leaves the engine running."""

    def __init__(self, server: Server) -> None:
        self.server = server
        first = os.getpid() % len(PORTS)
        for self.port in itertools.chain(PORTS[first:], PORTS[:first]):
            try:
                self.start()
            except SurgeryError:  # it is taken
                continue
            break

    def start(self) -> None:
        self.http = HttpServer(self.server, port=self.port, grace=0)
        self.http.config.timeout_graceful_shutdown = 1
        self.thread = threading.Thread(target=self.http.run, args=([self.http.socket],))
        self.thread.start()

    def stop(self) -> None:
        self.http.should_exit = True
        self.thread.join(60)
        assert not self.thread.is_alive()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/"


class ServedPage(Listening):
    """The page of a model, and the folder in which it may train and save."""

    def __init__(self, folder: Path) -> None:
        write_model(folder / "tiny", block_size=96)
        self.folder = folder
        self.model, self.tokenizer = open_model(folder / "tiny")
        for seed, name in enumerate((OTHER, ADAPTER)):
            inject_lora(self.model, ["q_proj", "lm_head"], rank=3, alpha=9, name=name)
            train_a_little(self.model, seed, size=0.2)
        self.engine = Engine(self.model)
        super().__init__(self._server())

    def _server(self, key: str | None = None) -> Server:
        for name in ("adapters", "runs"):
            (self.folder / name).mkdir(exist_ok=True)
        return Server(
            self.engine,
            self.model,
            self.tokenizer,
            "tiny",
            source=str(self.folder / "tiny"),
            adapters_folder=self.folder / "adapters",
            runs_folder=self.folder / "runs",
            key=key,
        )

    @contextmanager
    def with_key(self, key: str) -> Iterator[str]:
        """Serves the same model with a key, on another port."""
        other = Listening(self._server(key))
        try:
            yield other.url
        finally:
            other.server.stopping.set()
            other.stop()


@contextmanager
def served_page(folder: Path) -> Iterator[ServedPage]:
    """Serves until the end of the block."""
    page = ServedPage(folder)
    try:
        yield page
    finally:
        page.server.stopping.set()
        page.stop()
        page.engine.close(1)
