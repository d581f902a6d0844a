"""`surgery serve`: a model and its adapters over HTTP, and a page that opens them up."""

from __future__ import annotations

import signal
from dataclasses import dataclass
from pathlib import Path

from cyclopts import Parameter

from nanogpt_surgery.cli.framework.console import say
from nanogpt_surgery.cli.framework.options import Model, OpeningOptions, named_adapters, say_engine
from nanogpt_surgery.cli.framework.signals import first_signal
from nanogpt_surgery.errors import SurgeryError


@Parameter(name="*")
@dataclass(frozen=True)
class ServingOptions:
    """Where a server listens, and what clients may reach."""

    host: str = "127.0.0.1"
    """the address to listen on; other machines reach any but 127.0.0.1, and then a key is needed"""
    port: int = 8000
    """0 takes a free one"""
    adapters: Path | None = None
    """a folder: adapters below it can be loaded while it runs, and are saved there"""
    runs: Path | None = None
    """a folder of runs to watch, and to train in; without it nothing is trained or saved"""
    api_key_file: Path | None = None
    """a file with the key that clients must show; or the environment has it in SURGERY_API_KEY"""
    name: str | None = None
    """the model's, for clients; by default its folder's or file's"""

    def check(self) -> None:
        """Raises `SurgeryError` if a folder is not there."""
        for folder in (self.adapters, self.runs):
            if folder is not None and not folder.is_dir():
                raise SurgeryError(f"there is no folder {folder}", f"mkdir -p {folder}")


def serve(
    model: Model,
    *,
    adapter: list[str] | None = None,
    serving: ServingOptions = ServingOptions(),
    opening: OpeningOptions = OpeningOptions(),
) -> None:
    """Serve a model and adapters: an OpenAI-shaped API, and a page in the browser.

    Clients ask for the model, or for an adapter on it, by name. Ctrl-C, or SIGTERM, ends it when
    running answers have ended, after ten seconds at the latest.

    Args:
        adapter: NAME=FOLDER, or a folder that gives its name; may be given several times
    """
    from nanogpt_surgery.serving.connections import bind
    from nanogpt_surgery.serving.engine import Engine
    from nanogpt_surgery.serving.security import read_key
    from nanogpt_surgery.serving.server import HttpServer, Server

    key, given = read_key(serving.api_key_file), named_adapters(adapter or ())
    serving.check()
    bound = bind(serving.host, serving.port, key)  # what is refused is so before the model is read
    network, tokenizer = opening.open(model, given)
    say_engine(network, "auto")
    served = Server(
        Engine(network),
        network,
        tokenizer,
        serving.name or Path(model).resolve().name,
        source=model,
        folders=dict(given),
        adapters_folder=serving.adapters,
        runs_folder=serving.runs,
        key=key,
        log=say,
    )
    http = HttpServer(served, serving.host, bound=bound)
    with first_signal(lambda _: http.stop(), signal.SIGINT, signal.SIGTERM):
        say(f"serving {', '.join((served.name, *served.adapters))}")
        print(f"{http.address}: the page; {http.address}/v1: the API", flush=True)
        http.serve_until_stopped()
    say("stopped")
