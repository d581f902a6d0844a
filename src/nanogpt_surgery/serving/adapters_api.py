"""Adapters loaded and dropped while the server runs, by vLLM's routes and fields."""

from __future__ import annotations

from typing import TYPE_CHECKING

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Route

from nanogpt_surgery.formats.peft.reading import load_adapter
from nanogpt_surgery.lora.operations import remove_lora
from nanogpt_surgery.model.simple_gpt import SimpleGPT
from nanogpt_surgery.serving.fields import NAME, TEXT, Field, read_fields, required
from nanogpt_surgery.serving.http import ApiError, contained, read_json

if TYPE_CHECKING:
    from nanogpt_surgery.serving.server import Server

MOST_ADAPTERS = 64

LOAD = {"lora_name": Field(NAME), "lora_path": Field(TEXT)}
UNLOAD = {"lora_name": Field(NAME)}


def routes(server: Server) -> list[BaseRoute]:
    """Returns the routes."""

    async def load(request: Request) -> Response:
        server.check_running()
        values = read_fields(await read_json(request), LOAD)
        name, path = (required(values, key) for key in ("lora_name", "lora_path"))
        if server.adapters_folder is None:
            raise ApiError(403, "no folder of adapters was named when the server began")
        if name in (server.name, *server.adapters):
            raise ApiError(400, f"there is a model {name!r} already", param="lora_name")
        if len(server.adapters) >= MOST_ADAPTERS:
            raise ApiError(400, f"{MOST_ADAPTERS} adapters are loaded, the most that may be")
        folder = contained(server.adapters_folder, path)
        if not folder.is_dir():
            raise ApiError(404, f"there is no adapter {path!r} in that folder", param="lora_path")

        def loaded(model: SimpleGPT) -> None:
            load_adapter(model, folder, name=name)
            server.folders[name] = folder

        await server.operate(loaded)
        return JSONResponse({"status": "loaded", "lora_name": name})

    async def unload(request: Request) -> Response:
        server.check_running()
        values = read_fields(await read_json(request), UNLOAD)
        name = required(values, "lora_name")
        if name not in server.adapters:
            raise ApiError(404, f"there is no adapter {name!r}", param="lora_name")
        await server.operate(lambda model: remove_lora(model, name))
        return JSONResponse({"status": "unloaded", "lora_name": name})

    return [
        Route("/v1/load_lora_adapter", load, methods=["POST"]),
        Route("/v1/unload_lora_adapter", unload, methods=["POST"]),
    ]
