"""The verbs: inject, enable, disable, merge, remove. Each changes the model in place.

Nothing here happens because of `.train()` or `.eval()`; removing gives back the original bits.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, nn

from nanogpt_surgery.errors import SurgeryError
from nanogpt_surgery.lora.lora_linear import LoRALinear
from nanogpt_surgery.lora.report import Report
from nanogpt_surgery.lora.targets import find_targets

_FROZEN = "_frozen_by_lora"


def inject_lora(
    model: nn.Module,
    targets: str | Iterable[str] = ("q_proj", "v_proj"),
    rank: int = 8,
    alpha: float = 16,
    dropout: float = 0.0,
) -> Report:
    """Freeze the whole model and wrap every Linear that matches in a `LoRALinear`.

    Args:
        model: any module; changed in place.
        targets: patterns as PEFT's, see `find_targets`.
        rank: rank of each update.
        alpha: each update is scaled by alpha / rank.
        dropout: on the input of each update, in training.

    Returns:
        A report with a row for each wrapped layer, and trainable and total parameters.

    Raises:
        SurgeryError: a pattern matches nothing, or the model carries a LoRA already. The model is
            untouched then.
    """
    matches = find_targets(model, targets)
    names = list(dict.fromkeys(name for found in matches.values() for name in found))
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    wrapped = {
        name: LoRALinear(_linear(model, name), rank, alpha, dropout).train(model.training)
        for name in names
    }
    _freeze(model, trainable)
    for name, layer in wrapped.items():
        _replace(model, name, layer)
    return _report("LoRA injected", model)


def merge_lora(model: nn.Module) -> Report:
    """Put W + ΔW, added in float32, in the place of every wrapped layer.

    The original tensors are not written to: a head tied to an embedding becomes a matrix of its
    own, and the embedding stays.
    """
    report = _report("LoRA merged", model)
    for name, layer in lora_layers(model).items():
        merged = layer.merged_layer()
        merged.weight.requires_grad_(_was_trainable(model, layer.original_layer.weight))
        _replace(model, name, merged)
    _thaw(model)
    return report


def remove_lora(model: nn.Module) -> Report:
    """Put the original layers back: the same objects with the same bits."""
    report = _report("LoRA removed", model)
    for name, layer in lora_layers(model).items():
        _replace(model, name, layer.original_layer)
    _thaw(model)
    return report


def enable_lora(model: nn.Module) -> Report:
    """Let every update take part again."""
    return _switch(model, True)


def disable_lora(model: nn.Module) -> Report:
    """Compute as if no update were there; the updates stay."""
    return _switch(model, False)


def lora_layers(model: nn.Module) -> dict[str, LoRALinear]:
    """The wrapped layers by name.

    Raises:
        SurgeryError: there are none.
    """
    layers = {
        name: module for name, module in model.named_modules() if isinstance(module, LoRALinear)
    }
    if not layers:
        raise SurgeryError("the model carries no LoRA", "inject_lora(model, targets=…) first")
    return layers


def has_lora(model: nn.Module) -> bool:
    """Whether any layer is wrapped."""
    return any(isinstance(module, LoRALinear) for module in model.modules())


def _switch(model: nn.Module, enabled: bool) -> Report:
    for layer in lora_layers(model).values():
        layer.enabled = enabled
    return _report("LoRA enabled" if enabled else "LoRA disabled", model)


def _linear(model: nn.Module, name: str) -> nn.Linear:
    layer = model.get_submodule(name)
    assert isinstance(layer, nn.Linear)
    return layer


def _replace(model: nn.Module, name: str, layer: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, layer)


def _freeze(model: nn.Module, trainable: list[nn.Parameter]) -> None:
    setattr(model, _FROZEN, trainable)
    model.requires_grad_(False)


def _was_trainable(model: nn.Module, parameter: Tensor) -> bool:
    return any(parameter is other for other in getattr(model, _FROZEN, []))


def _thaw(model: nn.Module) -> None:
    for parameter in getattr(model, _FROZEN, []):
        parameter.requires_grad_(True)
    if hasattr(model, _FROZEN):
        delattr(model, _FROZEN)


def _report(title: str, model: nn.Module) -> Report:
    layers = lora_layers(model)
    rows = [
        {
            "layer": name,
            "in": layer.lora_A.size(1),
            "out": layer.lora_B.size(0),
            "rank": layer.rank,
            "alpha": layer.alpha,
            "parameters": layer.lora_A.numel() + layer.lora_B.numel(),
        }
        for name, layer in layers.items()
    ]
    parameters = list(model.parameters())
    summary = {
        "layers": len(rows),
        "trainable_parameters": sum(p.numel() for p in parameters if p.requires_grad),
        "total_parameters": sum(p.numel() for p in parameters),
    }
    return Report(title, rows, summary)
