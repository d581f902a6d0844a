"""Blocks that keep only their input, and are computed again for their gradient (arXiv:1604.06174).

Less memory, more time; dropout draws the same again.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from importlib import import_module
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint


class CheckpointedBlocks:
    """The blocks of a model (its `layers`), called through `checkpoint` within `active()`.

    PyTorch has no public way to change how a module is called, compiled or not, and to take it
    back; so the attribute that `Module.compile` sets is set here.

    Args:
        model: a model with `layers`; one without is left as it is.
        wanted: if false, nothing changes.
    """

    def __init__(self, model: nn.Module, wanted: bool):
        layers = getattr(model, "layers", None)
        self.blocks: list[Any] = []
        if wanted and isinstance(layers, nn.ModuleList):
            self.blocks = list(layers)
            import_module("torch._dynamo")  # `checkpoint` loads it: before a step's clock runs

    @contextmanager
    def active(self) -> Iterator[None]:
        """Computes the blocks again in the backward pass of what is computed within."""
        before = [block._compiled_call_impl for block in self.blocks]
        for block in self.blocks:
            call = block._compiled_call_impl or block._call_impl
            block._compiled_call_impl = partial(checkpoint, call, use_reentrant=False)
        try:
            yield
        finally:
            for block, call in zip(self.blocks, before, strict=True):
                block._compiled_call_impl = call
