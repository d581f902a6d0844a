"""Compiled blocks. One block is compiled and reused: whole deep models take minutes on a CPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

from torch import nn


class CompiledBlocks:
    """The blocks of a model (its `layers`), compiled within `active()`.

    The blocks have one code and equal shapes, so that what is compiled for the first serves all.
    Outside the model runs as it is: evaluation has other shapes and precision. (PyTorch has no
    public way to take `Module.compile` back, so its attribute is set here.)

    Args:
        model: a model with `layers`; one without is left as it is.
        wanted: if false, nothing changes.
    """

    def __init__(self, model: nn.Module, wanted: bool):
        layers = getattr(model, "layers", None)
        layers = layers if wanted and isinstance(layers, nn.ModuleList) else []
        self.blocks: list[Any] = list(layers)
        self.calls = [_compiled(block) for block in self.blocks]

    @contextmanager
    def active(self) -> Iterator[None]:
        """Calls the compiled blocks within."""
        for block, call in zip(self.blocks, self.calls, strict=True):
            block._compiled_call_impl = call
        try:
            yield
        finally:
            for block in self.blocks:
                block._compiled_call_impl = None


def _compiled(block: Any) -> Any:
    import_module("torch._dynamo")  # takes long to load: before a step's clock runs
    block.compile()
    call, block._compiled_call_impl = block._compiled_call_impl, None
    return call
