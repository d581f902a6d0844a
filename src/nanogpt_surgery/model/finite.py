"""Logits that are not finite: an error that says where the first such number arose.

The ordinary path pays one `isfinite` on its logits. Only where that fails is the forward run once
more, with a hook on every module.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nanogpt_surgery.errors import NotFiniteError
from nanogpt_surgery.model.loss import eval_mode

_HALVES = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Origin:
    """Where the first number that is not finite arose in a forward pass."""

    module: str
    """by its path in the model; empty for the model itself"""
    place: str
    """"its output", or the child to which it gave the number"""
    dtype: torch.dtype | None
    """of the number; None where no module was found"""
    parameter: str = ""
    """a parameter of that module which itself is not finite, and how much of it"""

    def __str__(self) -> str:
        if self.parameter:
            return f"the parameter {self.parameter} that are not"
        if self.dtype is None:
            return "every module alone gives finite numbers"
        module, largest = self.module or "the model", torch.finfo(self.dtype).max
        return (
            f"the first arose in {module}, {self.place}, computed in "
            f"{str(self.dtype).removeprefix('torch.')} (largest number {largest:,.6g})"
        )


def is_finite(tensor: Tensor) -> bool:
    """Whether no number is NaN or infinite.

    Such a number makes the sum one too, and a sum takes a fiftieth of the time of `isfinite`, which
    is asked only where the sum is beyond the dtype.
    """
    return bool(tensor.sum().isfinite()) or bool(tensor.isfinite().all())


def check_finite_weights(model: nn.Module, whose: str) -> None:
    """Raise `NotFiniteError` for weights that are NaN or infinite; the first is named."""
    wrong = [name for name, tensor in model.state_dict().items() if not is_finite(tensor)]
    if wrong:
        raise NotFiniteError(
            f"{whose} holds weights that are NaN or infinite: {wrong[0]}"
            + (f" and {len(wrong) - 1} more tensors" if wrong[1:] else ""),
            "take a checkpoint from before it was damaged",
        )


def check_finite(
    logits: Tensor, model: nn.Module, run: Callable[[], object], whose: str = "the model"
) -> None:
    """Raise unless all logits are finite.

    Args:
        logits: of any shape.
        model: that computed them.
        run: computes them once more; called only where one is not finite.
        whose: the model, in words.

    Raises:
        NotFiniteError: one is not; it says where the first one arose and what to try.
    """
    if not logits.numel():
        return
    least, largest = logits.detach().aminmax()  # a NaN becomes both: five times as fast as isfinite
    if not math.isfinite(float(least)) or not math.isfinite(float(largest)):
        raise not_finite(model, run, whose)


def not_finite(
    model: nn.Module, run: Callable[[], object], whose: str = "the model"
) -> NotFiniteError:
    """The error for a model whose logits are not finite; see `check_finite`."""
    origin = first_not_finite(model, run)
    if origin.parameter:
        hint = "restore the model from a copy, or go back to a checkpoint before it broke"
    elif origin.dtype in _HALVES:
        hint = (
            "compute in float32, which has room for larger numbers: dtype='float32', or "
            "open_model(path, torch.float32)"
        )
    else:
        hint = "its weights are too large to compute with: go back to an earlier checkpoint"
    return NotFiniteError(f"the logits of {whose} are not finite: {origin}", hint)


def first_not_finite(model: nn.Module, run: Callable[[], object]) -> Origin:
    """Where the first number that is not finite arises while `run` computes with a model."""
    watch = _Watch()
    handles = []
    for name, module in model.named_modules():
        handles.append(module.register_forward_pre_hook(watch.entering(name)))
        handles.append(module.register_forward_hook(watch.leaving(name)))
    try:
        with eval_mode(model), torch.no_grad():
            run()
    finally:
        for handle in handles:
            handle.remove()
    module, place, dtype = watch.found or ("", "", None)
    return Origin(module, place, dtype, _wrong_parameter(model, module))


class _Watch:
    """Hooks that remember the first tensor that is not finite."""

    def __init__(self) -> None:
        self.open: list[str] = []  # the modules that are computing, outermost first
        self.found: tuple[str, str, torch.dtype] | None = None

    def entering(self, name: str) -> Callable[[nn.Module, Any], None]:
        def hook(_module: nn.Module, args: Any) -> None:
            parent = self.open[-1] if self.open else name.rpartition(".")[0]
            self._look(args, parent, f"before its {name.removeprefix(f'{parent}.')}")
            self.open.append(name)

        return hook

    def leaving(self, name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(_module: nn.Module, _args: Any, output: Any) -> None:
            self.open.pop()
            self._look(output, name, "its output")

        return hook

    def _look(self, value: Any, module: str, place: str) -> None:
        """Look at a tensor, or at the first of several."""
        if isinstance(value, (tuple, list)) and value:
            value = value[0]
        if self.found is None and isinstance(value, Tensor) and not value.isfinite().all():
            self.found = (module, place, value.dtype)


def _wrong_parameter(model: nn.Module, module: str) -> str:
    """The first parameter in a module that is not finite, in words; empty if all are."""
    holder = model.get_submodule(module)
    for name, tensor in holder.named_parameters():
        wrong = int((~tensor.isfinite()).sum())
        if wrong:
            path = f"{module}.{name}" if module else name
            return f"{path} has {wrong:,} of {tensor.numel():,} numbers"
    return ""
