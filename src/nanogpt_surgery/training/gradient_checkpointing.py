"""Blocks that keep only their input, and are computed again for their gradient (arXiv:1604.06174).

Less memory, more time; dropout draws the same again.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
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
        self.blocks = blocks_of(model) if wanted else []
        if self.blocks:
            import_module("torch._dynamo")  # `checkpoint` loads it: before a step's clock runs

    def active(self) -> AbstractContextManager[None]:
        """Computes the blocks again in the backward pass of what is computed within."""
        calls = {block: block._compiled_call_impl or block._call_impl for block in self.blocks}
        again = {b: partial(checkpoint, call, use_reentrant=False) for b, call in calls.items()}
        return attributes_set("_compiled_call_impl", again)


def blocks_of(model: nn.Module) -> list[Any]:
    """The modules of a model's `layers`; none where it has no such list."""
    layers = getattr(model, "layers", None)
    return list(layers) if isinstance(layers, nn.ModuleList) else []


@contextmanager
def attributes_set(name: str, values: Mapping[Any, Any]) -> Iterator[None]:
    """Within, an attribute of each of these modules has the value that stands beside it."""
    before = {module: getattr(module, name) for module in values}
    try:
        for module, value in values.items():
            setattr(module, name, value)
        yield
    finally:
        for module, value in before.items():
            setattr(module, name, value)
