"""Computing in float32, whatever the weights are stored in."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn


@contextmanager
def computing_in_float32(model: nn.Module) -> Iterator[None]:
    """Lets a model of any dtypes compute in float32, each part widened only while it runs."""
    narrow: dict[nn.Parameter, Tensor] = {}

    def widen(part: nn.Module, _: object) -> None:
        for parameter in part.parameters(recurse=False):
            narrow[parameter] = parameter.data
            parameter.data = parameter.data.float()

    def give_back(part: nn.Module, _: object, __: object) -> None:
        for parameter in part.parameters(recurse=False):
            parameter.data = narrow.pop(parameter)

    handles = []
    for part in model.modules():
        handles.append(part.register_forward_pre_hook(widen))
        handles.append(part.register_forward_hook(give_back, always_call=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
