"""The adapters that a model carries: which take part, and what they have learned."""

from __future__ import annotations

import re
from typing import Any

from torch import nn

from nanogpt_surgery.arguments import check_arguments
from nanogpt_surgery.errors import SurgeryError
from nanogpt_surgery.history.model_history import plain_name, tensor_hashes
from nanogpt_surgery.lora.active import ActiveAdapters, WeightedAdapters
from nanogpt_surgery.lora.embedding import LoRAEmbedding
from nanogpt_surgery.lora.layer import LoRALayer
from nanogpt_surgery.lora.linear import LoRAUpdate
from nanogpt_surgery.report import Report

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_-]{0,63}")


def lora_layers(model: nn.Module) -> dict[str, LoRALayer]:
    """The wrapped layers by name.

    Raises:
        SurgeryError: there are none.
    """
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, LoRALayer)}
    if not layers:
        raise SurgeryError("the model carries no LoRA", "inject_lora(model, targets=…) first")
    return layers


def has_lora(model: nn.Module) -> bool:
    """Whether any layer is wrapped."""
    return any(isinstance(module, LoRALayer) for module in model.modules())


def active_adapters(model: nn.Module) -> ActiveAdapters:
    """Which adapters take part, the same on every layer; none without a LoRA."""
    active = (layer.active for layer in model.modules() if isinstance(layer, LoRALayer))
    return next(active, WeightedAdapters({}))


def adapter_names(model: nn.Module) -> list[str]:
    """The names of the adapters on a model, the oldest first."""
    layers = [layer for layer in model.modules() if isinstance(layer, LoRALayer)]
    return list(dict.fromkeys(name for layer in layers for name in layer.updates))


def adapter_weights(model: nn.Module) -> dict[str, float | None]:
    """The weight of each adapter on a model; None where it takes no part, or differs by row."""
    active = active_adapters(model)
    enabled = all(m.enabled for m in model.modules() if isinstance(m, LoRALayer))
    taking = active.weights if enabled and isinstance(active, WeightedAdapters) else {}
    return {name: taking.get(name) for name in adapter_names(model)}


def set_active(model: nn.Module, active: ActiveAdapters) -> None:
    """Chooses which adapters take part, on every layer."""
    for layer in lora_layers(model).values():
        layer.active = active


def train_active(model: nn.Module) -> None:
    """Makes the parameters of the adapters that take part trainable, and those of no other."""
    layers, active = lora_layers(model).values(), active_adapters(model).names()
    updates: list[tuple[str, Any]] = [pair for layer in layers for pair in layer.updates.items()]
    for trains in (False, True):  # an update that several layers share trains if any of them does
        for name, update in updates:
            if trains is (name in active):
                for parameter in update.trainable():
                    parameter.requires_grad_(trains)


def check_name(model: nn.Module, name: str) -> str:
    """The name, if an adapter carries it.

    Raises:
        SurgeryError: none does; the names that are there.
    """
    there = adapter_names(model)
    if name not in there:
        raise SurgeryError(
            f"the model carries no adapter {name!r}",
            f"it carries {', '.join(there)}" if there else "inject_lora(model, targets=…) first",
        )
    return name


def check_new_name(model: nn.Module, name: str) -> None:
    """Raises `SurgeryError` unless a new adapter can have this name."""
    text = isinstance(name, str)
    if not text or not _NAME.fullmatch(name) or hasattr(nn.ModuleDict(), name):
        raise SurgeryError(
            f"an adapter cannot be named {name!r}",
            "letters, digits, - and _, at most 64, and no attribute of an nn.ModuleDict",
        )
    if name in adapter_names(model):
        layers = lora_layers(model)
        raise SurgeryError(
            f"the model carries a LoRA already, named {name!r}, on {len(layers)} layers "
            f"({next(iter(layers))}, …)",
            "give the new one another name, or merge_lora(model) or remove_lora(model) first",
        )


def report_on(model: nn.Module, title: str) -> Report:
    """A row for each update on each layer, and the model's parameters."""
    rows = update_rows(model, adapter_names(model))
    return Report(title, rows, {"layers": len(lora_layers(model)), **state_of(model)})


def update_rows(model: nn.Module, adapters: list[str]) -> list[dict[str, Any]]:
    """A row for each update of some adapters on each layer."""
    active, rows = active_adapters(model).names(), []
    for name, layer in lora_layers(model).items():
        for adapter in [adapter for adapter in layer.updates if adapter in adapters]:
            update: Any = layer.updates[adapter]
            a, b = (None, None) if layer.replaces_whole else update.factors()
            rows.append(
                {
                    "layer": name,
                    "adapter": adapter,
                    "in": None if a is None else a.size(1),
                    "out": None if b is None else b.size(0),
                    "rank": getattr(update, "rank", None),
                    "alpha": getattr(update, "alpha", None),
                    "parameters": sum(parameter.numel() for parameter in update.trainable()),
                    "active": adapter in active,
                }
            )
    return rows


def state_of(model: nn.Module) -> dict[str, Any]:
    """The adapters that take part, the parameters, and what to do where adapters only wait."""
    active, names = active_adapters(model), adapter_names(model)
    parameters = list(model.parameters())
    state: dict[str, Any] = {
        "active": str(active),
        "trainable_parameters": sum(p.numel() for p in parameters if p.requires_grad),
        "total_parameters": sum(p.numel() for p in parameters),
    }
    if names and not active.names():
        state["next"] = f"no adapter takes part: swap_lora(model, {names[0]!r})"
    return state


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


def frozen_hashes(model: nn.Module) -> dict[str, str]:
    """The hashes of the parameters that no training may move: those without a gradient."""
    frozen = {plain_name(n) for n, p in model.named_parameters() if not p.requires_grad}
    return {name: digest for name, digest in tensor_hashes(model).items() if name in frozen}


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
