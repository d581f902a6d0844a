"""Watching that what a layer is called on has the rows of the batch.

A row's adapter is known by its place in the batch, and some layers are called on what has no such
places: the positions 0 … T − 1, the same for every row. Sizes alone do not show it where there are
as many rows as tokens, so dimensions count as well, and what cannot be told is refused.

Legend: B rows of a batch, T tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn

from nanogpt_surgery.errors import SurgeryError
from nanogpt_surgery.lora.layer import MatrixLayer, lora_layers
from nanogpt_surgery.lora.mixture import Rows


@contextmanager
def watched(model: nn.Module, rows: Rows) -> Iterator[None]:
    """For the block, refuse what has not the rows: the model's batch, and each layer's input.

    Raises:
        SurgeryError: from the model's forward; the layer is named.
    """
    watch = _Watch(len(rows.names))
    with ExitStack() as hooks:
        hooks.enter_context(model.register_forward_pre_hook(watch.begin, with_kwargs=True))
        hooks.enter_context(model.register_forward_hook(watch.end, always_call=True))
        for name, layer in lora_layers(model).items():
            if isinstance(layer, MatrixLayer) and any(n in layer.updates for n in rows.adapters()):
                check = partial(watch.check, name)
                hooks.enter_context(layer.register_forward_pre_hook(check, with_kwargs=True))
        yield


class _Watch:
    """The batch that the model is in the midst of, None where only parts of it are called."""

    def __init__(self, rows: int):
        self.rows = rows
        self.batch: Tensor | None = None

    def begin(self, model: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
        """Take the first tensor for the batch."""
        self.batch = _first_tensor(inputs, named)
        if self.batch is not None and self.batch.shape[:1] != (self.rows,):
            raise SurgeryError(
                f"the model is called on {self.batch.size(0) if self.batch.dim() else 'no'} rows, "
                f"but adapters were given for {self.rows}",
                "lora_rows(model, names) takes a name, or None, for each row of the batch",
            )

    def end(self, model: nn.Module, inputs: tuple[Any, ...], out: Any) -> None:
        """Forget the batch."""
        self.batch = None

    def check(
        self, name: str, layer: MatrixLayer, inputs: tuple[Any, ...], named: dict[str, Any]
    ) -> None:
        """Raise `SurgeryError` unless a layer's input has the rows of the batch."""
        x = _first_tensor(inputs, named)
        assert x is not None, "a layer is called on a tensor"
        if not self._has_rows(x, isinstance(layer.original_layer, nn.Embedding)):
            raise SurgeryError(
                f"{name} is called on a tensor of shape {tuple(x.shape)}, which does not show that "
                f"it belongs to the batch of {self.rows} rows, each with its own adapter",
                "make the adapters without it, or swap_lora(model, NAME): one for all rows",
            )

    def _has_rows(self, x: Tensor, looked_up: bool) -> bool:
        """Whether x is (B, …), with as many dimensions before its features as the batch has."""
        places = x.shape if looked_up else x.shape[:-1]
        if places[:1] != (self.rows,) or len(places) < _places_of(self.batch, looked_up):
            return False
        square = looked_up and places[:2] == (self.rows, self.rows) and self.rows > 1
        return not square or self.batch is None or _same_memory(x, self.batch)


def _places_of(batch: Tensor | None, looked_up: bool) -> int:
    """How many dimensions a layer's input has before its features: (B, T), or (B).

    Ids have no features yet; vectors (B, T, C) and (B, C) have, and of pictures nothing is said.
    """
    if batch is None:
        return 2 if looked_up else 1
    ids = not batch.is_floating_point()
    return batch.dim() if ids else 2 if batch.dim() == 3 else 1


def _same_memory(one: Tensor, other: Tensor) -> bool:
    return one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()


def _first_tensor(inputs: tuple[Any, ...], named: dict[str, Any]) -> Tensor | None:
    return next((x for x in (*inputs, *named.values()) if isinstance(x, Tensor)), None)
