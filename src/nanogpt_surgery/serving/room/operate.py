"""Operations on the model that is served, each alone in the engine's thread, journaled and undone.

Nothing is written to a disk but by `/api/save`, into the folders that the server was given.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Route
from torch import nn

from nanogpt_surgery.errors import SurgeryError
from nanogpt_surgery.formats.model_file import save_model
from nanogpt_surgery.formats.peft.writing import FLOAT32, plan_lora, save_adapter
from nanogpt_surgery.history.model_history import operation, redo_lora, tensor_hash, undo_lora
from nanogpt_surgery.lora.inject import inject_lora
from nanogpt_surgery.lora.layer import LoRALayer
from nanogpt_surgery.lora.merging import merge_lora
from nanogpt_surgery.lora.operations import blend_lora, remove_lora, swap_lora
from nanogpt_surgery.lora.several import (
    adapter_names,
    adapter_weights,
    check_name,
    has_lora,
    update_rows,
)
from nanogpt_surgery.lora.stored_adapter import chosen_adapter
from nanogpt_surgery.lora.targets import adaptable_layers, unsupported_reason
from nanogpt_surgery.model.simple_gpt import SimpleGPT
from nanogpt_surgery.model.transformer_encoder_layer import CausalSelfAttention
from nanogpt_surgery.report import Report
from nanogpt_surgery.serving.fields import NAME, Field, read_fields, required
from nanogpt_surgery.serving.http import ApiError, contained, read_json
from nanogpt_surgery.surgery.ablation import ablate
from nanogpt_surgery.values import WEIGHT, Kind, integer, number

if TYPE_CHECKING:
    from nanogpt_surgery.serving.server import Server

TRAINED_BYTES = 4 * FLOAT32  # of a parameter: itself, its gradient, AdamW's two means
HASHED_TO_SEE = 1 << 20  # numbers
_ABLATION = re.compile(r"ablate-(\d+)-(\d+)")
_MOST_TARGETS = 4_096
# No regular expressions: one can be made to take for ever. And none begins as a flag does.
_TARGET = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,255}")


def _are_targets(value: Any) -> bool:
    return (
        isinstance(value, list)
        and 0 < len(value) <= _MOST_TARGETS
        and all(isinstance(text, str) and _TARGET.fullmatch(text) for text in value)
    )


TARGETS = Kind(f"a list of 1 to {_MOST_TARGETS:,} names of layers, or of their ends", _are_targets)
WEIGHTS = Kind(
    "an object of at most 64 numbers, by names of adapters",
    lambda x: isinstance(x, dict) and 0 < len(x) <= 64 and all(map(WEIGHT.holds, x.values())),
)
VARIANTS: dict[str, dict[str, bool]] = {"lora": {}, "dora": {"dora": True}}
VARIANTS["rslora"] = {"rslora": True}
RANK = integer(1, 4_096)
ALPHA = number("above 0 and at most 1e6", lambda x: 0 < x <= 1e6)
_INJECTION = {
    "name": Field(NAME, "default"),
    "targets": Field(TARGETS, ["q_proj", "v_proj"]),
    "rank": Field(RANK, 8),
    "alpha": Field(ALPHA, 16.0),
    "variant": Field(Kind(f"one of {', '.join(VARIANTS)}", lambda x: x in [*VARIANTS]), "lora"),
}
_NAMED = {"name": Field(NAME)}
FIELDS: dict[str, dict[str, Field]] = {
    "inject": _INJECTION,
    "enable": _NAMED,
    "disable": _NAMED,
    "merge": _NAMED,
    "remove": _NAMED,
    "blend": {"weights": Field(WEIGHTS)},
    "ablate": {"layer": Field(integer(0, 10_000)), "head": Field(integer(0, 10_000))},
}
OPERATION = {"operation": Field(Kind(f"one of {', '.join(FIELDS)}", lambda x: x in [*FIELDS]))}


def layer_rows(model: SimpleGPT) -> list[dict[str, Any]]:
    """Returns a row for each module that has weights or heads: its shape, and what changes it."""
    rows = []
    wrapped = {path for path, module in model.named_modules() if isinstance(module, LoRALayer)}
    adaptable = adaptable_layers(model)
    for path, module in model.named_modules():
        if path.rpartition(".original_layer")[0] in wrapped or ".updates" in path:
            continue
        weight = getattr(module, "weight", None)
        row = {"path": path, "kind": _kind(module)}
        if isinstance(module, CausalSelfAttention):
            gone = _ablated(model, path)
            rows.append(row | {"heads": model.config.n_head, "ablated": gone})
        elif isinstance(module, LoRALayer) or weight is not None:
            targetable = path in adaptable and unsupported_reason(model, path) is None
            targetable |= isinstance(module, LoRALayer) and not module.replaces_whole
            own = module.original_layer if isinstance(module, LoRALayer) else module
            row |= {
                "shape": list(weight.shape) if weight is not None else [],
                "parameters": sum(p.numel() for p in own.parameters(recurse=False)),
                "targetable": targetable,
                "adapter": _adapter(module) if isinstance(module, LoRALayer) else None,
            }
            rows.append(row)
    return rows


def _kind(module: nn.Module) -> str:
    return type(module.original_layer if isinstance(module, LoRALayer) else module).__name__


def _adapter(layer: LoRALayer) -> dict[str, Any]:
    """Returns the adapters of a layer, and the size of what takes part beside the weight's."""
    names = list(layer.updates)
    ranks = [getattr(update, "rank", 0) for update in layer.updates.values()]
    relative = None
    takes_part = layer.enabled and any(name in layer.updates for name in layer.active.names())
    if takes_part and not layer.replaces_whole:
        delta, weight = layer.delta_weight().norm(), layer.weight.detach().float().norm()
        found = float(delta) / max(float(weight), 1e-30)
        relative = round(found, 8) if found < float("inf") else None  # NaN is no JSON either
    return {"names": names, "rank": max(ranks, default=0), "relative": relative}


def _ablated(model: SimpleGPT, attention: str) -> list[int]:
    """Returns the heads of an attention that an adapter of this page takes away now."""
    layer = int(attention.split(".")[1])
    found = [_ABLATION.fullmatch(n) for n, w in adapter_weights(model).items() if w]
    return sorted(int(one[2]) for one in found if one and int(one[1]) == layer)


def plan(model: SimpleGPT, values: Mapping[str, Any]) -> Report:
    """Returns what an operation would do: layers, parameters, memory and time; nothing is touched.

    Raises:
        SurgeryError: as the operation, in what can be seen beforehand.
    """
    operation = values["operation"]
    if operation == "inject":
        report = plan_lora(model, values["targets"], **_settings(values))
        added = report.summary["trainable_parameters"]
        more = {"memory_bytes": FLOAT32 * added, "training_bytes": TRAINED_BYTES * added}
        return _timed(model, Report(report.title, report.rows, report.summary | more))
    if operation == "ablate":
        report = plan_ablation(model, values["layer"], values["head"])
        return _timed(model, report)
    weights = values.get("weights", {values.get("name"): 1.0})
    rows = update_rows(model, [check_name(model, name) for name in weights])
    summary: dict[str, Any] = {"layers": len({row["layer"] for row in rows}), "memory_bytes": 0}
    if operation == "merge":  # the originals are kept for an undo
        own: list[Any] = [model.get_submodule(row["layer"]).weight for row in rows]
        summary["memory_bytes"] = sum(weight.nbytes for weight in {id(w): w for w in own}.values())
    report = Report(f"{operation} planned", rows, summary)
    return _timed(model, report) if operation in ("merge", "remove") else report


def plan_ablation(model: SimpleGPT, layer: int, head: int) -> Report:
    """Returns what taking a head away would add.

    Raises:
        SurgeryError: there is no such head.
    """
    config = model.config
    for part, place, count in (("layer", layer, config.n_layer), ("head", head, config.n_head)):
        if place >= count:
            raise SurgeryError(f"there is no {part} {place}; they are 0 to {count - 1}")
    path = f"layers.{layer}.self_attn.o_proj"
    shape = list(model.get_submodule(path).weight.shape)  # type: ignore[arg-type]
    added = config.head_dim * sum(shape)
    row = {"layer": path, "shape": f"{shape[0]}×{shape[1]}", "rank": config.head_dim}
    summary = {"layers": 1, "parameters": added, "memory_bytes": FLOAT32 * added}
    return Report("ablate planned", [row | {"parameters": added}], summary)


def _timed(model: SimpleGPT, report: Report) -> Report:
    """Adds about how many seconds it takes: nearly all of it hashes the tensors for an undo."""
    some = max(model.parameters(), key=lambda p: p.numel()).detach().flatten()[:HASHED_TO_SEE]
    before = time.perf_counter()
    tensor_hash(some)
    rate = some.nbytes / max(time.perf_counter() - before, 1e-9)
    size = sum(parameter.nbytes for parameter in model.parameters())
    return Report(report.title, report.rows, report.summary | {"seconds": round(size / rate, 3)})


def operate(model: SimpleGPT, values: Mapping[str, Any]) -> Report:
    """Carries an operation out.

    Raises:
        SurgeryError: what the operation refuses. The model is as it was then.
    """
    return _OPERATIONS[values["operation"]](model, values)


def operated_on(server: Server, model: SimpleGPT, values: Mapping[str, Any]) -> Report:
    """Carries an operation out; what it makes comes from no folder.

    Raises:
        SurgeryError: as `operate`.
    """
    before = {*adapter_names(model)}
    report = operate(model, values)
    for name in {*adapter_names(model)} - before:
        server.folders.pop(name, None)
    return report


def _settings(values: Mapping[str, Any]) -> dict[str, Any]:
    chosen = {name: values[name] for name in ("name", "rank", "alpha")}
    return chosen | VARIANTS[values["variant"]]


def _inject(model: SimpleGPT, values: Mapping[str, Any]) -> Report:
    return inject_lora(model, values["targets"], **_settings(values))


def _enable(model: SimpleGPT, values: Mapping[str, Any]) -> Report:
    return blend_lora(model, _weights(model) | {check_name(model, values["name"]): 1.0})


def _disable(model: SimpleGPT, values: Mapping[str, Any]) -> Report:
    name = check_name(model, values["name"])
    return blend_lora(model, {n: w for n, w in _weights(model).items() if n != name})


def _weights(model: SimpleGPT) -> dict[str, float]:
    return {name: w for name, w in adapter_weights(model).items() if w is not None}


def _merge(model: SimpleGPT, values: Mapping[str, Any]) -> Report:
    """Merges one adapter; the others leave with the wrappers, and an undo brings all back."""
    name = check_name(model, values["name"])
    with operation(model, f"merge {name}"):
        swap_lora(model, name)
        return merge_lora(model)


def _remove(model: SimpleGPT, values: Mapping[str, Any]) -> Report:
    return remove_lora(model, values["name"])


def _blend(model: SimpleGPT, values: Mapping[str, Any]) -> Report:
    return blend_lora(model, values["weights"])


def _ablate(model: SimpleGPT, values: Mapping[str, Any]) -> Report:
    """Takes a head away, by an adapter beside those that take part."""
    layer, head = values["layer"], values["head"]
    before, name = _weights(model), f"ablate-{layer}-{head}"
    with operation(model, f"ablate head {head} of layer {layer}"):
        report = ablate(model, name, heads={layer: [head]})
        blend_lora(model, before | {name: 1.0})
    return report


_OPERATIONS: dict[str, Callable[[SimpleGPT, Mapping[str, Any]], Report]] = {
    "inject": _inject,
    "enable": _enable,
    "disable": _disable,
    "merge": _merge,
    "remove": _remove,
    "blend": _blend,
    "ablate": _ablate,
}


def values_of(body: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the operation that a body asks for, with its arguments.

    Raises:
        ApiError: there is none, or a value is missing or outside its range.
    """
    operation = required(read_fields(body, OPERATION), "operation")
    values = read_fields(body, FIELDS[operation])
    for name in values:
        required(values, name)
    return {"operation": operation, **values}


def save(server: Server, model: SimpleGPT, values: Mapping[str, Any]) -> Path:
    """Writes an adapter, or the model, into a new folder, and returns where.

    Raises:
        ApiError: the server writes nothing, or there is something of that name.
        SurgeryError: as `save_adapter` and `save_model`.
    """
    home = server.runs_folder
    if home is None:
        raise ApiError(403, "saving is off: the server was started without a folder of runs")
    if values["what"] == "adapter" and server.adapters_folder is not None:
        home = server.adapters_folder
    goal = contained(home, required(values, "name"))
    if goal.exists():
        raise ApiError(409, f"there is a {goal.name} in that folder already", param="name")
    if values["what"] == "model":
        if has_lora(model):
            carried = ", ".join(adapter_names(model))
            raise SurgeryError(f"the model carries {carried}", "merge or remove them first")
        save_model(model, goal, server.tokenizer, server.source or None)
    else:
        name = chosen_adapter(model, values["adapter"])
        save_adapter(model, goal, server.source, name=name)
        server.folders.setdefault(name, goal)
    return goal


_SAVED = {
    "what": Field(Kind("adapter or model", lambda x: x in ["adapter", "model"])),
    "name": Field(NAME),
    "adapter": Field(NAME),
}


def routes(server: Server) -> list[BaseRoute]:
    """Returns the routes."""

    async def layers(_: Request) -> Response:
        return JSONResponse({"layers": await server.look(layer_rows)})

    async def planned(request: Request) -> Response:
        values = values_of(await read_json(request))
        return _answer(await server.look(lambda model: plan(model, values)))

    async def operated(request: Request) -> Response:
        server.check_running()
        values = values_of(await read_json(request))
        if values["operation"] == "inject" and values["name"] == server.name:
            raise ApiError(400, f"the model itself is named {server.name!r}", param="name")
        return _answer(await server.operate(lambda model: operated_on(server, model, values)))

    async def undone(_: Request) -> Response:
        server.check_running()
        return _answer(await server.operate(undo_lora))

    async def redone(_: Request) -> Response:
        server.check_running()
        return _answer(await server.operate(redo_lora))

    async def saved(request: Request) -> Response:
        server.check_running()
        values = read_fields(await read_json(request), _SAVED)
        required(values, "what")

        def kept(model: SimpleGPT) -> Path:
            goal = save(server, model, values)
            server.take_changes()
            return goal

        goal = await server.look(kept)  # nothing of it changes: texts that run need not end first
        return JSONResponse({"path": str(goal)})

    return [
        Route("/api/layers", layers),
        Route("/api/operate/plan", planned, methods=["POST"]),
        Route("/api/operate", operated, methods=["POST"]),
        Route("/api/undo", undone, methods=["POST"]),
        Route("/api/redo", redone, methods=["POST"]),
        Route("/api/save", saved, methods=["POST"]),
    ]


def _answer(report: Report) -> Response:
    """Returns a report as the page shows it; numbers that JSON has not are left out."""
    rows = [{key: _plain(value) for key, value in row.items()} for row in report.rows]
    summary = {key: _plain(value) for key, value in report.summary.items()}
    return JSONResponse({"title": report.title, "rows": rows, "summary": summary})


def _plain(value: Any) -> Any:
    return None if isinstance(value, float) and value - value != 0 else value
