"""The command that shows what a model, with or without an adapter, has learned."""

from __future__ import annotations

import shlex
from pathlib import Path


def next_command(
    model: str | Path,
    adapter: str | Path | None = None,
    *,
    talks: bool = False,
    template: str = "model",
) -> str:
    """How to talk with a model that `talks`, or to continue a text with any other."""
    words = shlex.quote(str(model))
    if adapter is not None:
        words += f" --adapter {shlex.quote(str(adapter))}"
    if talks:
        written = "" if template == "model" else f" --template {template}"
        return f"surgery chat {words}{written} talks with it"
    return f"surgery generate {words} --prompt … continues a text with it"
