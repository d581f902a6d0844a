"""Which layers get an update, and which: rank, alpha, kind, and what follows from shared weights.

All is checked here, before anything is touched. `plan_lora` says the same in figures; what a
training takes is counted by `training/estimates/`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import nn

from nanogpt_surgery.errors import SurgeryError
from nanogpt_surgery.lora.settings import LoRASettings
from nanogpt_surgery.lora.several import check_new_name
from nanogpt_surgery.lora.stored_adapter import LowRankUpdate, StoredAdapter, Updates, tensors_of
from nanogpt_surgery.lora.targets import adaptable_layers, by_pattern, find_targets
from nanogpt_surgery.lora.ties import UpdateFactory, find_tied, with_tied_layers
from nanogpt_surgery.lora.variants import check_settings, new_update
from nanogpt_surgery.report import Report
from nanogpt_surgery.values import chosen

FLOAT32 = 4


@dataclass(frozen=True)
class UpdatePlan:
    """The layers that get an update, and its settings.

    Attributes:
        matches: the layers that each target means.
        settings: by the layer's name, in the model's order.
        tied_layers: layers that share a layer's weight and get the same A and B, by its name.
    """

    matches: dict[str, list[str]]
    settings: dict[str, LoRASettings]
    tied_layers: dict[str, list[str]]

    def factories(self) -> dict[str, UpdateFactory]:
        """For each layer what makes its update from the bare layer."""
        factories: dict[str, UpdateFactory] = {
            path: partial(new_update, settings=s) for path, s in self.settings.items()
        }
        return with_tied_layers(factories, self.tied_layers)


def plan_updates(
    model: nn.Module, targets: str | Iterable[str], settings: LoRASettings
) -> UpdatePlan:
    """Finds the layers that the targets mean, and checks what each of them is to get.

    Raises:
        SurgeryError: a target means no layer, a pattern of the settings matches no target, a target
            is tied, or a layer cannot have such an update.
    """
    matches, layers = find_targets(model, targets), adaptable_layers(model)
    matched = {layer for found in matches.values() for layer in found}
    names = [layer for layer in layers if layer in matched]
    _check_patterns({**(settings.rank_pattern or {}), **(settings.alpha_pattern or {})}, names)
    by_layer = {layer: _settings_of(layer, settings) for layer in names}
    plan = _with_one_update_a_weight(
        UpdatePlan(matches, by_layer, find_tied(model, names, settings.tied)), layers
    )
    for path, its_settings in plan.settings.items():
        tied = [layers[other] for other in plan.tied_layers.get(path, [])]
        check_settings(path, layers[path], tied, its_settings)
    return plan


def _settings_of(layer: str, settings: LoRASettings) -> LoRASettings:
    return replace(
        settings,
        rank=by_pattern(settings.rank_pattern, layer, settings.rank),
        alpha=by_pattern(settings.alpha_pattern, layer, settings.alpha),
    )


def _with_one_update_a_weight(plan: UpdatePlan, layers: Mapping[str, nn.Module]) -> UpdatePlan:
    """The plan with one layer of each tied group in it, a Linear where there is one."""
    settings, tied_layers = dict(plan.settings), dict(plan.tied_layers)
    for name in plan.settings:
        if name not in settings or name not in tied_layers:
            continue
        group = [name, *tied_layers.pop(name)]
        unfit = [other for other in group if other not in layers]
        if unfit:
            raise SurgeryError(
                f"{name} shares its weight with {', '.join(unfit)}, which cannot be wrapped",
                "tied='untie'",
            )
        first = min(group, key=lambda other: isinstance(layers[other], nn.Embedding))
        its_settings = settings[name]
        for other in group:
            settings.pop(other, None)
            tied_layers.pop(other, None)
        settings[first] = its_settings
        tied_layers[first] = [other for other in group if other != first]
    return UpdatePlan(plan.matches, settings, tied_layers)


def _check_patterns(patterns: dict[str, Any], names: list[str]) -> None:
    unused = [p for p in patterns if not any(by_pattern({p: True}, n, False) for n in names)]
    if unused:
        raise SurgeryError(
            f"no target matches {', '.join(map(repr, unused))} of rank_pattern or alpha_pattern",
            f"the targets are {', '.join(names[:12])}{', …' if names[12:] else ''}",
        )


def plan_lora(
    model: nn.Module,
    targets: str | Iterable[str] = ("q_proj", "v_proj"),
    settings: LoRASettings | None = None,
    *,
    as_saved: Callable[[Updates], Updates] = dict,
    **changes: Any,
) -> Report:
    """Says what `inject_lora` with the same arguments would do; nothing is touched.

    Args:
        model: any module.
        targets: as in `inject_lora`.
        settings: as there.
        as_saved: what becomes of the updates in the file; by default each stays as it is.
        **changes: as there.

    Returns:
        A row for each layer and the patterns that mean it, with shapes and parameters; trainable
        parameters, and the bytes of adapter_model.safetensors.

    Raises:
        SurgeryError: as `inject_lora`.
    """
    settings = chosen(LoRASettings, settings, changes)
    check_new_name(model, settings.name)
    plan = plan_updates(model, targets, settings)
    layers: dict[str, Any] = adaptable_layers(model)
    rows = [_row(plan, path, layers[path]) for path in plan.settings]
    trainable = sum(row["parameters"] for row in rows)
    summary: dict[str, Any] = {
        "layers": len(rows),
        "trainable_parameters": trainable,
        "total_parameters": sum(p.numel() for p in model.parameters()) + trainable,
        "adapter_bytes": _file_bytes(as_saved(_sizes_of(plan, layers))),
    }
    return Report("LoRA planned", rows, summary)


def _row(plan: UpdatePlan, path: str, layer: Any) -> dict[str, Any]:
    settings = plan.settings[path]
    shape = layer.weight.shape
    out_features, in_features = shape[::-1] if isinstance(layer, nn.Embedding) else shape
    lengths = out_features if settings.dora else 0
    parameters = settings.rank * (in_features + out_features) + lengths
    stored = (2 if settings.pissa else 1) * (parameters - lengths) + lengths
    copies = 1 + len(plan.tied_layers.get(path, []))
    return {
        "layer": path,
        "pattern": ", ".join(p for p, found in plan.matches.items() if path in found),
        "shape": f"{shape[0]}×{shape[1]}",
        "rank": settings.rank,
        "parameters": parameters,
        "bytes": copies * FLOAT32 * stored,
        "tied to": ", ".join(plan.tied_layers.get(path, [])) or None,
    }


def _sizes_of(plan: UpdatePlan, layers: Mapping[str, Any]) -> Updates:
    """Updates of the sizes that will be saved, without memory of their own."""
    return {
        path: _sized(plan.settings[first], layers[path])
        for first in plan.settings
        for path in [first, *plan.tied_layers.get(first, [])]
    }


def _sized(settings: LoRASettings, layer: Any) -> LowRankUpdate:
    nothing, embedding = torch.zeros(()), isinstance(layer, nn.Embedding)
    out_features, in_features = layer.weight.shape[::-1] if embedding else layer.weight.shape
    rank = settings.rank * (2 if settings.pissa else 1)  # PiSSA keeps its initial factors
    return LowRankUpdate(
        nothing.expand(rank, in_features),
        nothing.expand(out_features, rank),
        settings.alpha,
        magnitude=nothing.expand(out_features) if settings.dora else None,
        embedding=embedding,
    )


def _file_bytes(updates: Updates) -> int:
    """The size of a safetensors file: 8 bytes, a header in JSON up to a multiple of 8, numbers."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in sorted(tensors_of(StoredAdapter(updates)).items()):
        start, end = end, end + FLOAT32 * tensor.numel()
        header[name] = {
            "dtype": "F32",
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    written = len(json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode())
    return 8 + -(-written // 8) * 8 + end
