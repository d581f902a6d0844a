"""The command that is being carried out, as it was typed: a run folder records it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from nanogpt_surgery.cli.framework.config_file import FLAG

_TYPED: ContextVar[tuple[str, ...]] = ContextVar("typed", default=())


@contextmanager
def typing(arguments: list[str]) -> Iterator[None]:
    """Keep what was typed, for the block."""
    token = _TYPED.set(tuple(arguments))
    try:
        yield
    finally:
        _TYPED.reset(token)


def typed_command() -> dict[str, Any]:
    """The words behind `surgery`, the folder they were typed in, and the text of --config."""
    words = _TYPED.get()
    place = words.index(FLAG) + 1 if FLAG in words else len(words)
    config = Path(words[place]) if place < len(words) else None
    return {
        "arguments": list(words),
        "folder": str(Path.cwd()),
        "config": config.read_text(encoding="utf-8") if config and config.is_file() else None,
    }
