"""Which engine computes the tokens of a model, and why: for `auto`, and for reports."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from nanogpt_surgery.generation.generate import new_cache
from nanogpt_surgery.generation.settings import Engine
from nanogpt_surgery.model.simple_gpt import SimpleGPT


@dataclass(frozen=True)
class EngineChoice:
    """The engine that is used."""

    name: Literal["native", "plain"]
    reason: str = ""
    """why it is not the compiled decoder"""

    def __str__(self) -> str:
        return f"{self.name} ({self.reason})" if self.reason else self.name


def chosen_engine(model: SimpleGPT, engine: Engine, rows: int = 1) -> EngineChoice:
    """Returns the engine that is used for a model as it stands, where this one is asked for.

    With `native` it is native: what cannot be is refused where the decoder is made.
    """
    if engine == "plain":
        return EngineChoice("plain", "it was asked for")
    if engine == "native":
        return EngineChoice("native")
    device = next(model.parameters()).device
    if device.type != "cpu":
        return EngineChoice("plain", f"the weights are on {device}")
    from nanogpt_surgery.generation.native.decoder import unsupported_reason

    reason = unsupported_reason(model, new_cache(model, rows, 1))
    return EngineChoice("plain", reason) if reason else EngineChoice("native")
