"""The server's side of the page in the browser: JSON below `/api/`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from starlette.routing import BaseRoute

from nanogpt_surgery.serving.room import look, operate, state, talk, train

if TYPE_CHECKING:
    from nanogpt_surgery.serving.server import Server


def routes(server: Server) -> list[BaseRoute]:
    """Returns the routes of all places of the page, which share one state."""
    room = state.Room(server)
    return [
        *state.routes(room),
        *talk.routes(server, room.hashes_of),
        *look.routes(server),
        *operate.routes(server),
        *train.routes(room.trainer, lambda: room.after_operations),
    ]
