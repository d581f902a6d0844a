"""Which models there are, and whether the server is well."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import BaseRoute, Route

if TYPE_CHECKING:
    from nanogpt_surgery.serving.server import Server

OWNER = "nanogpt-surgery"


def routes(server: Server) -> list[BaseRoute]:
    """Returns the routes."""
    begun = int(time.time())

    async def health(_: Request) -> Response:
        server.check_running()
        return JSONResponse({"status": "ok"})

    async def models(_: Request) -> Response:
        names = (server.name, *server.adapters)
        return JSONResponse(
            {"object": "list", "data": [model_card(server, name, begun) for name in names]}
        )

    async def model(request: Request) -> Response:
        name = request.path_params["name"]
        server.weights_of(name)
        return JSONResponse(model_card(server, name, begun))

    async def metrics(_: Request) -> Response:
        return PlainTextResponse(prometheus(server.engine.figures()), media_type=PROMETHEUS)

    return [
        Route("/health", health),
        Route("/v1/models", models),
        Route("/v1/models/{name:path}", model),
        Route("/metrics", metrics),
    ]


def model_card(server: Server, name: str, created: int) -> dict[str, Any]:
    """Returns a model as OpenAI's clients read one, with vLLM's `parent` of an adapter."""
    is_base = name == server.name
    return {
        "id": name,
        "object": "model",
        "created": created,
        "owned_by": OWNER,
        "parent": None if is_base else server.name,
        "max_model_len": server.model.config.block_size,
    }


PROMETHEUS = "text/plain; version=0.0.4"


def prometheus(figures: dict[str, float]) -> str:
    """Returns figures in the text form that Prometheus reads: counters, gauges, histograms."""
    names = [f"surgery_{name}" for name in figures]
    histograms = {name.partition("_bucket{")[0] for name in names if "_bucket{" in name}
    seen, lines = set[str](), list[str]()
    for name, value in zip(names, figures.values(), strict=True):
        family = name.partition("{")[0]
        histogram = next((one for one in histograms if family.startswith(f"{one}_")), None)
        kind = "counter" if family.endswith("_total") else "gauge"
        family, kind = (histogram, "histogram") if histogram else (family, kind)
        if family not in seen:
            seen.add(family)
            lines.append(f"# TYPE {family} {kind}")
        lines.append(f"{name} {value!r}")
    return "\n".join([*lines, ""])
