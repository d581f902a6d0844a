"""Compiling one block and reusing it: whole deep models take minutes to compile on a CPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


class CompiledBlocks:
    """The blocks of a model (its `layers`), compiled for training alone.

    The blocks have one code and equal shapes, so that what is compiled for the first serves all.
    Outside `active()` the model runs uncompiled: evaluation has other shapes and precision.
    (PyTorch has no public way to take `Module.compile` back, so its attribute is set here.)

    Args:
        model: a model with `layers`; one without is left as it is.
        wanted: False compiles nothing.
    """

    def __init__(self, model: nn.Module, wanted: bool):
        layers = getattr(model, "layers", None)
        self.blocks = list(layers) if wanted and isinstance(layers, nn.ModuleList) else []
        self.calls: list[Any] = []
        for block in self.blocks:
            block.compile()
            self.calls.append(block._compiled_call_impl)
        self._set([None] * len(self.blocks))

    @contextmanager
    def active(self) -> Iterator[None]:
        """Calls of the blocks go through their compiled form."""
        self._set(self.calls)
        try:
            yield
        finally:
            self._set([None] * len(self.blocks))

    def _set(self, calls: list[Any]) -> None:
        for block, call in zip(self.blocks, calls, strict=True):
            block._compiled_call_impl = call
