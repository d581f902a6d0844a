"""`plan_lora`: which layers an injection would adapt, with shapes and sizes; nothing is touched.

What a training takes is counted by `training/estimates/`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn

from nanogpt_surgery.lora.planning import UpdatePlan, plan_updates
from nanogpt_surgery.lora.settings import LoRASettings
from nanogpt_surgery.lora.several import check_new_name
from nanogpt_surgery.lora.stored_adapter import LowRankUpdate, StoredAdapter, Updates, tensors_of
from nanogpt_surgery.lora.targets import adaptable_layers
from nanogpt_surgery.report import Report
from nanogpt_surgery.values import chosen

FLOAT32 = 4


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
