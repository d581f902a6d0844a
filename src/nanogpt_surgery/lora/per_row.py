"""Another adapter for each row of a batch.

The matrices of each row's adapter are gathered and multiplied in one batched product. A row's
adapter is known by its place in the batch, and some layers are called on what has no such places:
the positions 0 … T − 1, the same for every row. Sizes alone do not show it where there are as many
rows as tokens, so dimensions count as well, and what is ambiguous is refused.

Legend: B rows of a batch, T tokens, N adapters, R rank.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanogpt_surgery.arguments import check_arguments
from nanogpt_surgery.errors import SurgeryError
from nanogpt_surgery.history.model_history import history_of
from nanogpt_surgery.lora.active import WeightedAdapters
from nanogpt_surgery.lora.layer import LoRALayer
from nanogpt_surgery.lora.several import active_adapters, check_name, lora_layers, set_active
from nanogpt_surgery.lora.variants import BiasUpdate, DoRAUpdate, dora_change


@check_arguments
@contextmanager
def lora_rows(model: nn.Module, names: Sequence[str | None]) -> Iterator[None]:
    """Within the block, gives row b of every batch the adapter `names[b]`, or none for None.

    Not an operation, and none is done inside the block: what took part before takes part again
    after it. A layer that is not called on the batch, as `wpe(torch.arange(T))` is not, cannot be
    adapted by row.

    Args:
        model: carries the adapters.
        names: one for each row of the batches to come.

    Raises:
        SurgeryError: the model carries no adapter of one of the names, or the LoRA is disabled;
            from the model's forward, a batch or a layer's input that has not these rows.
    """
    history = history_of(model)
    history.check_open()
    active = PerRowAdapters(tuple(n if n is None else check_name(model, n) for n in names))
    if not all(layer.enabled for layer in lora_layers(model).values()):
        raise SurgeryError("the LoRA is disabled, so no row would be adapted", "enable_lora(model)")
    rows = _RowCheck(len(names))
    with ExitStack() as stack:
        stack.callback(set_active, model, active_adapters(model))
        set_active(model, active)
        stack.callback(setattr, history, "closed", None)
        history.closed = SurgeryError(
            "the model is in a block of lora_rows, which gives each row its own adapter",
            "leave the block first",
        )
        stack.enter_context(model.register_forward_pre_hook(rows.begin, with_kwargs=True))
        stack.enter_context(model.register_forward_hook(rows.end, always_call=True))
        for name, layer in lora_layers(model).items():
            if any(n in layer.updates for n in active.names()) and not layer.replaces_whole:
                check = partial(rows.check, name)
                stack.enter_context(layer.register_forward_pre_hook(check, with_kwargs=True))
        yield


@dataclass(frozen=True)
class PerRowAdapters:
    """Row b of a batch is adapted by `by_row[b]`, or by nothing where that is None."""

    by_row: tuple[str | None, ...]

    def __call__(self, layer: LoRALayer, x: Tensor, y: Tensor) -> Tensor:
        """Returns y plus each row's change."""
        present = [name for name in self.names() if name in layer.updates]
        if not present:
            return y
        updates: list[Any] = [layer.updates[name] for name in present]
        if layer.training and any(update.dropout.p for update in updates):
            raise SurgeryError(
                "rows with adapters of their own cannot be trained with dropout", "model.eval()"
            )
        places = [present.index(n) if n in present else len(present) for n in self.by_row]
        index = torch.tensor(places, device=y.device)  # (B)
        a, b = _stacked_factors(updates)  # (N + 1, R, in), (N + 1, out, R)
        down = _down_by_row(layer.original_layer, x, a, index)  # (B, …, R)
        up = b.to(y.dtype)[index].transpose(1, 2)  # (B, R, out)
        change = torch.bmm(down.to(y.dtype).reshape(len(index), -1, up.size(1)), up).view_as(y)
        if (bias := _stacked_biases(updates)) is not None:
            change = change + _by_row(bias, y, index)
        scale = _stacked_dora_scales(layer, updates)
        if scale is None:
            return y + change
        return y + dora_change(layer.original_layer, y, change, _by_row(scale, y, index))

    def names(self) -> list[str]:
        """The names in use, each once."""
        return list(dict.fromkeys(name for name in self.by_row if name is not None))

    def delta_weight(self, layer: LoRALayer) -> Tensor:
        """Raises `SurgeryError`: there is no single ΔW."""
        raise SurgeryError(
            "each row of the batch has its own adapter, so there is no one ΔW",
            "leave the block of lora_rows(model, …) first",
        )

    def __str__(self) -> str:
        return "by row: " + ", ".join(name or "none" for name in self.by_row)


def _stacked_factors(updates: list[Any]) -> tuple[Tensor, Tensor]:
    """A and s · B of some updates, padded to one rank, and a last pair of zeros."""
    pairs = [update.factors() for update in updates]
    rank = max(a.size(0) for a, _ in pairs)
    a = [F.pad(a, (0, 0, 0, rank - a.size(0))) for a, _ in pairs]
    b = [
        F.pad(update.scaling * b, (0, rank - b.size(1)))
        for update, (_, b) in zip(updates, pairs, strict=True)
    ]
    return torch.stack([*a, torch.zeros_like(a[0])]), torch.stack([*b, torch.zeros_like(b[0])])


def _down_by_row(layer: Any, x: Tensor, a: Tensor, index: Tensor) -> Tensor:
    """Row b of x times the A of its own adapter, `index[b]` of (N, R, in) → (B, …, R)."""
    if not isinstance(layer, nn.Embedding):
        rows = x.flatten(1, -2) if x.dim() > 2 else x.unsqueeze(1)  # (B, T, in)
        down = torch.bmm(rows, a.to(x.dtype)[index].transpose(1, 2))  # (B, T, R)
        return down.view(*x.shape[:-1], -1)
    which = index.view(-1, *[1] * (x.dim() - 1)).expand_as(x)
    down = a.transpose(1, 2)[which, x]
    if layer.padding_idx is None:
        return down
    return torch.where((x == layer.padding_idx)[..., None], down.detach(), down)


def _stacked_dora_scales(layer: LoRALayer, updates: list[Any]) -> Tensor | None:
    """The factor of each output, (N + 1, out), or None if no update is DoRA's."""
    scales = [
        update.dora_scale(layer.original_layer) if isinstance(update, DoRAUpdate) else None
        for update in updates
    ]
    if all(scale is None for scale in scales):
        return None
    ones = torch.ones_like(updates[0].factors()[1][:, 0])
    return torch.stack([*(ones if scale is None else scale for scale in scales), ones])


def _stacked_biases(updates: list[Any]) -> Tensor | None:
    """The vector that each update adds whatever its input, (N + 1, out), or None if none does."""
    added = [update.delta_bias() if isinstance(update, BiasUpdate) else None for update in updates]
    if all(bias is None for bias in added):
        return None
    zeros = torch.zeros_like(updates[0].factors()[1][:, 0])
    return torch.stack([*(zeros if bias is None else bias for bias in added), zeros])


def _by_row(vectors: Tensor, y: Tensor, index: Tensor) -> Tensor:
    """The vector of each row's adapter, `index[b]` of (N, out), (B, 1, …, out) as y has it."""
    return vectors.to(y.dtype)[index].view(len(index), *[1] * (y.dim() - 2), -1)


@contextmanager
def one_of_rows(model: nn.Module, row: int) -> Iterator[None]:
    """Within the block, the model computes this row alone, with its adapter, in any shape.

    Without `lora_rows` around it, the block changes nothing.
    """
    active = next((a for a in map(_active, model.modules()) if a is not None), None)
    if active is None:
        yield
        return
    name = active.by_row[row]
    hooks = (*model._forward_pre_hooks.values(), *model._forward_hooks.values())
    [check] = {h.__self__ for h in hooks if is_row_check(h)}  # type: ignore[attr-defined]
    check.paused = True
    set_active(model, WeightedAdapters({} if name is None else {name: 1.0}))
    try:
        yield
    finally:
        check.paused = False
        set_active(model, active)


def _active(module: nn.Module) -> PerRowAdapters | None:
    active = getattr(module, "active", None)
    return active if isinstance(active, PerRowAdapters) else None


def is_row_check(hook: Any) -> bool:
    """Returns whether a hook is one of those that `lora_rows` sets: it computes nothing."""
    return isinstance(getattr(getattr(hook, "func", hook), "__self__", None), _RowCheck)


class _RowCheck:
    """The batch that the model is in the midst of, None where only parts of it are called."""

    def __init__(self, rows: int):
        self.rows = rows
        self.batch: Tensor | None = None
        self.paused = False

    def begin(self, model: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
        """Takes the first tensor for the batch."""
        self.batch = _first_tensor(inputs, named)
        if not (self.paused or self.batch is None or self.batch.shape[:1] == (self.rows,)):
            raise SurgeryError(
                f"the model is called on {self.batch.size(0) if self.batch.dim() else 'no'} rows, "
                f"but adapters were given for {self.rows}",
                "lora_rows(model, names) takes a name, or None, for each row of the batch",
            )

    def end(self, model: nn.Module, inputs: tuple[Any, ...], out: Any) -> None:
        """Forgets the batch."""
        self.batch = None

    def check(
        self, name: str, layer: LoRALayer, inputs: tuple[Any, ...], named: dict[str, Any]
    ) -> None:
        """Raises `SurgeryError` unless a layer's input has the rows of the batch."""
        x = _first_tensor(inputs, named)
        assert x is not None, "a layer is called on a tensor"
        looked_up = isinstance(layer.original_layer, nn.Embedding)
        if not self.paused and not self._has_rows(x, looked_up):
            raise SurgeryError(
                f"{name} is called on a tensor of shape {tuple(x.shape)}, which does not show that "
                f"it belongs to the batch of {self.rows} rows, each with its own adapter",
                "make the adapters without it, or swap_lora(model, NAME): one for all rows",
            )

    def _has_rows(self, x: Tensor, looked_up: bool) -> bool:
        """Whether x is (B, …), with as many dimensions before its features as the batch has."""
        places = x.shape if looked_up else x.shape[:-1]
        if places[:1] != (self.rows,) or len(places) < _n_places(self.batch, looked_up):
            return False
        square = looked_up and places[:2] == (self.rows, self.rows) and self.rows > 1
        return not square or self.batch is None or _memory(x) == _memory(self.batch)


def _n_places(batch: Tensor | None, looked_up: bool) -> int:
    """How many dimensions a layer's input has before its features: (B, T), or (B).

    Ids have no features yet; vectors (B, T, C) and (B, C) have, and of pictures nothing is said.
    """
    if batch is None:
        return 2 if looked_up else 1
    ids = not batch.is_floating_point()
    return batch.dim() if ids else 2 if batch.dim() == 3 else 1


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _first_tensor(inputs: tuple[Any, ...], named: dict[str, Any]) -> Tensor | None:
    return next((x for x in (*inputs, *named.values()) if isinstance(x, Tensor)), None)
