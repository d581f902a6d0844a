"""How a block is called in training: compiled, computed again in the backward pass, or both.

One block is compiled and reused: whole deep models take minutes to compile on a CPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from importlib import import_module
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint


class CompiledBlocks:
    """The blocks of a model (its `layers`), called in another way for training alone.

    The blocks have one code and equal shapes, so that what is compiled for the first serves all.
    Outside `active()` the model runs as it is: evaluation has other shapes and precision.
    (PyTorch has no public way to take `Module.compile` back, so its attribute is set here.)

    Args:
        model: a model with `layers`; one without is left as it is.
        wanted: compile them.
        checkpointed: keep only what goes into a block, and compute the rest again for its gradient
            (arXiv:1604.06174); dropout draws the same again.
    """

    def __init__(self, model: nn.Module, wanted: bool, checkpointed: bool = False):
        layers = getattr(model, "layers", None)
        changed = (wanted or checkpointed) and isinstance(layers, nn.ModuleList)
        self.blocks = list(layers) if changed and layers is not None else []
        self.calls = [_call(block, wanted, checkpointed) for block in self.blocks]
        self._set([None] * len(self.blocks))

    @contextmanager
    def active(self) -> Iterator[None]:
        """Calls of the blocks go the other way."""
        self._set(self.calls)
        try:
            yield
        finally:
            self._set([None] * len(self.blocks))

    def _set(self, calls: list[Any]) -> None:
        for block, call in zip(self.blocks, calls, strict=True):
            block._compiled_call_impl = call


def _call(block: nn.Module, compiled: bool, checkpointed: bool) -> Any:
    call: Any = block._call_impl
    if compiled or checkpointed:
        import_module("torch._dynamo")  # before a step's clock runs: both load it, and that is long
    if compiled:
        block.compile()
        call = block._compiled_call_impl
    return partial(checkpoint, call, use_reentrant=False) if checkpointed else call
