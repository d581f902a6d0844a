"""Checks that a training learns: one that moves nothing seems to work, until it is used."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from nanogpt_surgery.arguments import check_arguments
from nanogpt_surgery.errors import SurgeryError
from nanogpt_surgery.history.hashing import frozen_hashes
from nanogpt_surgery.lora.embedding import LoRAEmbedding
from nanogpt_surgery.lora.linear import LoRALayer, LoRAUpdate
from nanogpt_surgery.lora.several import has_lora
from nanogpt_surgery.report import Report


class TrainingChecks:
    """Checks a training after its first and its last step.

    Args:
        model: what is trained.
        optimizer: checked at once for holding every trainable parameter.
        first: number of the first step.
        last: number of the last one.

    Raises:
        SurgeryError: from any of its methods, with the names of what does not learn or stay.
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, first: int, last: int):
        check_optimizer(model, optimizer)
        self.model = model
        self.steps = {first, last}
        self.last = last
        self.frozen = frozen_hashes(model) if has_lora(model) else {}

    def after_backward(self, step: int) -> None:
        """Checks that a gradient has reached every update."""
        if step in self.steps:
            check_gradients(self.model)

    def after_update(self, step: int) -> None:
        """Checks that every update has moved, and, at the end, that no frozen parameter has."""
        if step in self.steps:
            check_moved(self.model)
        if step == self.last:
            check_frozen(self.model, self.frozen)

    def after_skip(self, step: int) -> None:
        """A step that changed no weight shows nothing: the next one is looked at in its place."""
        if step == self.last:
            check_frozen(self.model, self.frozen)
        elif step in self.steps:
            self.steps.add(step + 1)


def check_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Raises `SurgeryError` unless every trainable parameter is in the optimizer.

    All that are missing are named.
    """
    optimised = {id(p) for group in optimizer.param_groups for p in group["params"]}
    missing = [n for n, p in model.named_parameters() if p.requires_grad and id(p) not in optimised]
    if missing:
        raise SurgeryError(
            f"{len(missing)} trainable parameters are not in the optimizer: {_some(missing)}",
            "make the optimizer after inject_lora, from the parameters that can be trained",
        )


def check_gradients(model: nn.Module) -> None:
    """Raises `SurgeryError` unless each update that is trained got a gradient.

    To be called after a backward pass, before the gradients are cleared. A gradient that is zero in
    all its parameters is none; all updates without are named.
    """
    silent = [
        name
        for name, update in trained_updates(model).items()
        if not any(p.grad is not None and p.grad.any() for p in update.trainable())
    ]
    if silent:
        raise SurgeryError(
            f"no gradient reaches {len(silent)} of the adapter's updates: {_some(silent)}",
            "is the layer used in the forward pass, enabled, and the loss made from its output?",
        )


def check_moved(model: nn.Module) -> None:
    """Raises `SurgeryError` unless each update that is trained has left its start, where ΔW is 0.

    For most that means ‖B‖ > 0; all that have not are named.
    """
    still = [name for name, update in trained_updates(model).items() if not update.moved()]
    if still:
        raise SurgeryError(
            f"{len(still)} of the adapter's updates have not moved, ΔW is zero: {_some(still)}",
            "is the learning rate above 0?",
        )


def check_frozen(model: nn.Module, before: Mapping[str, str]) -> None:
    """Raises `SurgeryError` unless every frozen parameter has the hash it had; all are named.

    `before` is from `frozen_hashes`.
    """
    now = frozen_hashes(model)
    moved = [name for name, digest in before.items() if now.get(name) != digest]
    if moved:
        raise SurgeryError(
            f"{len(moved)} frozen parameters have changed in training: {_some(moved)}",
            "make the optimizer after inject_lora, from the parameters that can be trained",
        )


def trained_updates(model: nn.Module) -> dict[str, LoRAUpdate]:
    """The updates that can be trained, by layer and adapter; shared ones once."""
    found: dict[str, LoRAUpdate] = {}
    seen: set[nn.Parameter] = set()
    for path, layer in model.named_modules():
        for name, update in layer.updates.items() if isinstance(layer, LoRALayer) else ():
            if isinstance(update, LoRAUpdate) and update.lora_A.requires_grad:
                if update.lora_A not in seen:
                    found[f"{path} ({name})"] = update
                seen.add(update.lora_A)
    return found


def linear_b_matrices(model: nn.Module) -> list[nn.Parameter]:
    """The B of each Linear's update that can be trained.

    LoRA+ argues from the width of the input that B is summed over less than A, and so may learn
    faster; an embedding's update sums over nothing.
    """
    updates = trained_updates(model).values()
    return [update.lora_B for update in updates if update.wrapper() is not LoRAEmbedding]


@check_arguments
def learned(model: nn.Module) -> Report:
    """For each update that can be trained the sizes of A, B and ΔW, and whether it has moved."""
    rows: list[dict[str, Any]] = [
        {
            "update": name,
            "‖A‖": float(update.lora_A.detach().norm()),
            "‖B‖": float(update.lora_B.detach().norm()),
            "‖ΔW‖": float(update.product().norm()),
            "moved": update.moved(),
        }
        for name, update in trained_updates(model).items()
    ]
    return Report("what was learned", rows, {"updates": len(rows)})


def _some(names: list[str]) -> str:
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if names[8:] else "")
