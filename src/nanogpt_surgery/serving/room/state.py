"""The state that every page shows alike: the model, its adapters, its journal, the training.

What follows from the model is taken anew after each operation, in the engine's thread, where nobody
else touches it; the revision counts how often.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Mapping
from typing import TYPE_CHECKING, Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import BaseRoute, Route
from torch import Tensor

from nanogpt_surgery.data.conversations.chat import OWN
from nanogpt_surgery.formats.huggingface.config import family_of
from nanogpt_surgery.history.journal import LAPSED, UNDONE
from nanogpt_surgery.history.model_history import (
    UPDATES,
    ModelOperation,
    combined,
    history_of,
    tensor_hashes,
)
from nanogpt_surgery.lora.several import adapter_weights, lora_layers
from nanogpt_surgery.model.simple_gpt import SimpleGPT
from nanogpt_surgery.serving.room.look import MOST_TOKENS
from nanogpt_surgery.serving.room.train import Trainer

if TYPE_CHECKING:
    from nanogpt_surgery.serving.server import Server

LOOK_EVERY = 0.1  # seconds between looks at what is new
SIGN_OF_LIFE = 10.0  # seconds after which a stream that has nothing to say says so


class Room:
    """The state that the routes of the page share.

    Args:
        server: whose model it shows.
    """

    def __init__(self, server: Server):
        self.server, self.trainer, self.revision = server, Trainer(server), 0
        self._hashed: dict[Tensor, str] = {}
        self._of_model: dict[str, Any] = {}
        self._first_hash: str | None = None
        server.listeners.append(self.refresh)
        server.engine.look(lambda _: self.refresh()).result()

    def refresh(self) -> None:
        """Takes anew what follows from the model; called where nothing else touches it."""
        model = self.server.model
        hashes = tensor_hashes(model, self._hashed)
        # Adapters learn in place (train.py), so theirs are hashed anew each time.
        base_tensors = {t for n, t in model.named_parameters() if UPDATES not in n}
        self._hashed = {t: h for t, h in self._hashed.items() if t in base_tensors}
        base = combined(digest for name, digest in hashes.items() if UPDATES not in name)
        self._first_hash = self._first_hash or base
        self._of_model = {
            "model": self._model_row(model, base),
            "adapters": self._adapter_rows(model, hashes),
            "after_operations": base != self._first_hash,
            **_journal(model, combined(hashes.values())),
        }
        self.revision += 1

    def _model_row(self, model: SimpleGPT, digest: str) -> dict[str, Any]:
        config = model.config
        return {
            "name": self.server.name,
            "hash": digest,
            "parameters": sum(
                p.numel() for name, p in model.named_parameters() if UPDATES not in name
            ),
            "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
            "layers": config.n_layer,
            "heads": config.n_head,
            "family": family_of(config),
            "chat": self.server.template_of(None).source not in OWN,
            "block_size": config.block_size,
            "look_tokens": min(MOST_TOKENS, config.block_size),
            "vocab_size": config.vocab_size,
        }

    def _adapter_rows(self, model: SimpleGPT, hashes: dict[str, str]) -> list[dict[str, Any]]:
        rows = []
        for name, weight in adapter_weights(model).items():
            own = [digest for key, digest in hashes.items() if f"{UPDATES}{name}." in key]
            layers = {
                path: layer for path, layer in lora_layers(model).items() if name in layer.updates
            }
            ranks = [getattr(layer.updates[name], "rank", 0) for layer in layers.values()]
            folder = self.server.folders.get(name)
            rows.append(
                {
                    "name": name,
                    "hash": combined(own),
                    "folder": None if folder is None else str(folder),
                    "active": weight is not None,
                    "weight": weight,
                    "rank": max(ranks, default=0),
                    "targets": sorted({path.rpartition(".")[2] for path in layers}),
                }
            )
        return rows

    @property
    def after_operations(self) -> bool:
        """Whether the base's weights are others than those that were opened."""
        return bool(self._of_model["after_operations"])

    def hashes_of(self, weights: Mapping[str, float]) -> list[str]:
        """Returns the hashes of the base and of the adapters that take part."""
        known = {row["name"]: row["hash"] for row in self._of_model["adapters"]}
        return [self._of_model["model"]["hash"], *(known[n] for n, w in weights.items() if w)]

    def state(self) -> dict[str, Any]:
        """Returns all of it as plain values."""
        writes = self.server.runs_folder is not None
        return {
            "revision": self.revision + self.trainer.revision,
            **self._of_model,
            "can_save": writes,
            "can_train": writes,
            "training": self.trainer.now(),
        }

    async def events(self) -> AsyncIterator[str]:
        """Yields server-sent events: the state whenever it changes, and each step of a training."""
        seen, step, silent = None, self.trainer.cursor(), 0.0
        while not self.server.stopping.is_set():
            lines = []
            if seen != (now := self.revision + self.trainer.revision):
                seen = now
                lines.append(_event("state", self.state()))
            rows, step = self.trainer.since(step)
            lines += [_event("training", row) for row in rows]
            silent = 0.0 if lines else silent + LOOK_EVERY
            if silent >= SIGN_OF_LIFE:
                lines, silent = [": \n\n"], 0.0
            for line in lines:
                yield line
            await asyncio.sleep(LOOK_EVERY)


def _event(kind: str, data: dict[str, Any]) -> str:
    return f"event: {kind}\ndata: {json.dumps(data)}\n\n"


def _journal(model: SimpleGPT, now: str) -> dict[str, Any]:
    """The operations, each with the hash of all weights before and after it."""
    history = history_of(model)
    rows: list[dict[str, Any]] = []
    after = now
    for number, done in reversed(list(enumerate(history.operations, history.dropped + 1))):
        undone = done.state in (UNDONE, LAPSED)
        before = _hash_before(done)
        if undone and done.around_undo is not None:
            own = combined(done.around_undo[0].values())
        else:
            own = after
        rows.append(
            {
                "number": number,
                "title": done.operation,
                "hash_before": before or own,
                "hash_after": own,
                "undone": undone,
            }
        )
        after = before or own
    return {
        "journal": rows[::-1],
        "can_undo": bool(history.done),
        "can_redo": bool(history.undone),
    }


def _hash_before(done: ModelOperation) -> str | None:
    return None if done.hashes is None else combined(done.hashes.values())


def routes(room: Room) -> list[BaseRoute]:
    """Returns the routes."""

    async def state(_: Request) -> Response:
        return JSONResponse(room.state())

    async def events(_: Request) -> Response:
        headers = {"cache-control": "no-store", "x-accel-buffering": "no"}
        return StreamingResponse(room.events(), media_type="text/event-stream", headers=headers)

    return [Route("/api/state", state), Route("/api/events", events)]
