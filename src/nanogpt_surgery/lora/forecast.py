"""`plan_lora`: what an injection would do, in figures, while the model is not touched.

Memory for training, in bytes: the weights as they are; A, B and what goes with them in float32, and
as much again for their gradients and twice for AdamW; and, if there is a probe, the activations
that the backward pass needs, counted on a copy of the model without any memory of its own.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from nanogpt_surgery.history.journal import HISTORY
from nanogpt_surgery.lora.inject import attach_updates, check_new_name
from nanogpt_surgery.lora.planning import UpdatePlan, plan_updates
from nanogpt_surgery.lora.settings import LoRASettings
from nanogpt_surgery.lora.stored_adapter import LowRankUpdate, StoredAdapter, Updates, tensors_of
from nanogpt_surgery.lora.targets import adaptable_layers, find_targets
from nanogpt_surgery.report import Report
from nanogpt_surgery.values import chosen

FLOAT32 = 4
ADAMW = 2  # tensors of state for each trained one


def plan_lora(
    model: nn.Module,
    targets: str | Iterable[str] = ("q_proj", "v_proj"),
    settings: LoRASettings | None = None,
    *,
    probe: Tensor | None = None,
    as_saved: Callable[[Updates], Updates] = dict,
    **changes: Any,
) -> Report:
    """Say what `inject_lora` with the same arguments would do; nothing is touched.

    Args:
        model: any module.
        targets: as in `inject_lora`.
        settings: as there.
        probe: ids (B, T) of a training batch; with them the activations are counted too.
        as_saved: what becomes of the updates in the file; by default each stays as it is.
        **changes: as there.

    Returns:
        A row for each layer and the patterns that mean it, with shapes and parameters; trainable
        parameters, the bytes of adapter_model.safetensors and the memory for training.

    Raises:
        SurgeryError: as `inject_lora`.
    """
    settings = chosen(LoRASettings, settings, changes)
    check_new_name(model, settings.name)
    matches = find_targets(model, targets)
    plan = plan_updates(model, matches, settings)
    layers: dict[str, Any] = adaptable_layers(model)
    rows = [_row(plan, matches, path, layers[path]) for path in plan.settings]
    trainable = sum(row["parameters"] for row in rows)
    summary: dict[str, Any] = {
        "layers": len(rows),
        "trainable_parameters": trainable,
        "total_parameters": sum(p.numel() for p in model.parameters()) + trainable,
        "adapter_bytes": _file_bytes(as_saved(_sizes_of(plan, layers))),
        "weights_bytes": sum(p.numel() * p.element_size() for p in model.parameters()),
        "adapter_training_bytes": (2 + ADAMW) * FLOAT32 * trainable,
    }
    if probe is not None:
        summary["activation_bytes"] = activation_bytes(model, plan, probe)
    parts = ("weights_bytes", "adapter_training_bytes", "activation_bytes")
    summary["training_bytes"] = sum(summary.get(part, 0) for part in parts)
    if probe is None:
        summary["not_counted"] = "activations; those of a training batch are, with probe=its ids"
    return Report("LoRA planned", rows, summary)


def _row(
    plan: UpdatePlan, matches: Mapping[str, list[str]], path: str, layer: Any
) -> dict[str, Any]:
    settings = plan.settings[path]
    shape = layer.weight.shape
    out_features, in_features = shape[::-1] if isinstance(layer, nn.Embedding) else shape
    lengths = out_features if settings.dora else 0
    parameters = settings.rank * (in_features + out_features) + lengths
    stored = (2 if settings.pissa else 1) * (parameters - lengths) + lengths
    copies = 1 + len(plan.tied_layers.get(path, []))
    return {
        "layer": path,
        "pattern": ", ".join(p for p, found in matches.items() if path in found),
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


def activation_bytes(model: nn.Module, plan: UpdatePlan, probe: Tensor) -> int:
    """The bytes that autograd keeps between the forward and the backward pass of a probe.

    Kernels, such as attention's, are those that the model's device would choose. The logits'
    gradient is counted too, as a loss over all of them needs it; what the loss itself keeps is not.
    """
    plain = {path: replace(s, pissa=False) for path, s in plan.settings.items()}
    plain_plan = replace(plan, settings=plain)  # no contents to decompose; A and B are as large
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    twin = without_memory(model, mode)
    ids = mode.from_tensor(probe.to(next(model.parameters()).device))
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage._cdata] = storage.nbytes()
        alive.append(tensor)
        return tensor

    alive: list[Tensor] = []
    with mode, torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        attach_updates(twin, "planned", plain_plan.factories(), unties=False)
        own = {t.untyped_storage()._cdata for t in [*twin.parameters(), *twin.buffers()]}
        out: Any = twin.train()(ids)
    logits: Tensor = out if isinstance(out, Tensor) else out.logits
    saved = sum(size for storage, size in kept.items() if storage not in own)
    return saved + logits.numel() * logits.element_size()


def without_memory(model: nn.Module, mode: FakeTensorMode) -> nn.Module:
    """A copy of a model whose tensors have shapes and a device but no contents."""
    memo: dict[int, Any] = {}
    for tensor in [*model.parameters(), *model.buffers()]:
        bare = mode.from_tensor(tensor.detach())
        is_parameter = isinstance(tensor, nn.Parameter)
        memo[id(tensor)] = nn.Parameter(bare, tensor.requires_grad) if is_parameter else bare
    history = model.__dict__.pop(HISTORY, None)
    try:
        return copy.deepcopy(model, memo)
    finally:
        if history is not None:
            model.__dict__[HISTORY] = history
