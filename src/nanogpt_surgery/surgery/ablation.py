"""Ablation: heads, neurons or a direction that a model can no longer use, as an adapter.

What o_proj or down_proj gives is changed by a ΔW of low rank beside it, so an ablation is an
adapter like any other: it is scaled, blended, saved, merged and undone.

    heads, neurons   ΔW = −W P     P selects the columns of o_proj, or of down_proj, that are cut
    a direction u    ΔW = −u uᵀ W  nothing that the layer writes points along u any more;
                     Δb = −u uᵀ b  nor does its bias (PEFT's lora_bias), where it has one

Legend: C width, D head width, R rank.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from operator import index
from typing import Any

import torch
from torch import Tensor

from nanogpt_surgery.arguments import check_arguments
from nanogpt_surgery.errors import SurgeryError, quoted
from nanogpt_surgery.interpret.comparison import without
from nanogpt_surgery.lora.layer import LoRALayer
from nanogpt_surgery.lora.merging import Probe
from nanogpt_surgery.lora.several import check_new_name
from nanogpt_surgery.lora.stored_adapter import LowRankUpdate, StoredAdapter
from nanogpt_surgery.model.simple_gpt import SimpleGPT
from nanogpt_surgery.report import Report
from nanogpt_surgery.surgery.low_rank import Factors
from nanogpt_surgery.surgery.operating import Prepared, carry_out, measured, with_adapter

LEFT = 1e-6  # of ‖W‖: as much as may be left of what was cut


@check_arguments
def ablate(
    model: SimpleGPT,
    name: str = "ablation",
    *,
    heads: Mapping[int, Sequence[int]] | None = None,
    neurons: Mapping[int, Sequence[int]] | None = None,
    direction: Tensor | None = None,
    layers: Sequence[int] | None = None,
    probe: Probe | None = None,
    merge: bool = False,
    plan: bool = False,
) -> Report:
    """Puts an adapter on a model that takes parts of the model's own weights away, and acts alone.

    A direction is cut from the layers' biases too. With heads and neurons biases stay: those of
    o_proj and down_proj are no head's. What the embedding writes along the direction is reported.

    Args:
        model: changed in place; adapters that it carries wait.
        name: of the adapter.
        heads: for each layer the heads that add nothing any more.
        neurons: for each layer the inner activations of the feed-forward.
        direction: (C,), of any length; no block writes along it any more.
        layers: in which the direction is cut; all by default.
        probe: ids (B, T), or a function that gives logits: by it the ablation is compared with the
            model without any adapter.
        merge: put it into the weights, in the same step; adapters leave then.
        plan: put nothing on the model, and say what it would be.

    Returns:
        A row for each cut layer: its rank, ‖ΔW‖ / ‖W‖, what is left of the cut beside ‖W‖, and what
        its bias wrote along the direction, which is cut too.

    Raises:
        SurgeryError: a head, neuron, layer or direction is not there, nothing is cut, layers are
            named without a direction, or more than rounding is left of what was cut. The model is
            untouched then.
    """
    check_new_name(model, name)
    unit = None if direction is None else _unit(direction, model.config.n_embd)
    if unit is None and layers is not None:
        raise SurgeryError("layers are named without a direction", "heads={layer: [head, …]}")

    def prepare() -> Prepared:
        updates, rows = _cuts(model, heads or {}, neurons or {}, unit, layers, merge)
        title, adapter = f"ablate as {name}", StoredAdapter(updates)
        left = {} if unit is None else {"embedding along it": _written_by_embedding(model, unit)}
        return with_adapter(model, name, title, adapter, rows, left, merge)

    return carry_out(model, prepare, probe, plan, lambda: _logits_without_adapters(model, probe))


def _written_by_embedding(model: SimpleGPT, unit: Tensor) -> float:
    written = _bare(model, "embed_tokens").weight.detach().float().cpu() @ unit  # (V,)
    return float(written.square().mean().sqrt())


def _logits_without_adapters(model: SimpleGPT, probe: Probe | None) -> Tensor | None:
    with without(layer for layer in model.modules() if isinstance(layer, LoRALayer)):
        return measured(model, probe)


def _cuts(
    model: SimpleGPT,
    heads: Mapping[int, Sequence[int]],
    neurons: Mapping[int, Sequence[int]],
    unit: Tensor | None,
    layers: Sequence[int] | None,
    merge: bool,
) -> tuple[dict[str, LowRankUpdate], list[dict[str, Any]]]:
    """Returns the update of each layer that is cut, and its row of the report."""
    c = model.config
    cut_layers = range(c.n_layer) if layers is None else layers
    _sorted([*heads, *neurons, *cut_layers], c.n_layer, "layer")
    of_heads = {n: _of_heads(some, c.n_head, c.head_dim) for n, some in heads.items()}
    of_neurons = {n: _sorted(some, c.n_inner, "neuron") for n, some in neurons.items()}
    updates: dict[str, LowRankUpdate] = {}
    rows: list[dict[str, Any]] = []
    for number in range(c.n_layer):
        along = unit if number in cut_layers else None
        for path, columns in (("self_attn.o_proj", of_heads), ("mlp.down_proj", of_neurons)):
            if columns.get(number) or along is not None:
                where = f"layers.{number}.{path}"
                updates[where], row = _cut(model, where, columns.get(number, []), along, merge)
                rows.append({"layer": where, **row})
    if not updates:
        raise SurgeryError("nothing is to be cut", "name heads, neurons or a direction")
    if not any(row["ΔW / W"] or updates[row["layer"]].bias is not None for row in rows):
        raise SurgeryError(f"what is to be cut is zero already, in {len(rows)} layers")
    return updates, rows


def _bare(model: SimpleGPT, path: str) -> Any:
    """Returns a layer without its adapters."""
    layer = model.get_submodule(path)
    return layer.original_layer if isinstance(layer, LoRALayer) else layer


def _cut(
    model: SimpleGPT, path: str, columns: Sequence[int], along: Tensor | None, merge: bool
) -> tuple[LowRankUpdate, dict[str, Any]]:
    """Returns the update of a layer, and what it does there."""
    layer = _bare(model, path)
    weight = layer.weight.detach().float().cpu()
    a, b = _without(weight, columns, along)
    kept_in = layer.weight.dtype if merge else torch.float32
    row = _checked(path, weight, (a, b), columns, along, kept_in)
    change = None
    if along is not None:
        bias = torch.zeros_like(along) if layer.bias is None else layer.bias.detach().float().cpu()
        row["bias along it"] = float(bias @ along)
        change = _bias_without(path, bias, along) if bool(bias.any()) else None
    return LowRankUpdate(a, b, alpha=float(len(a)), bias=change), row


def _bias_without(path: str, bias: Tensor, along: Tensor) -> Tensor:
    """Returns the Δb that takes a direction away, (out).

    Raises:
        SurgeryError: more than rounding is left of it.
    """
    change = -(along @ bias) * along
    left, size = float((along @ (bias + change)).abs()), float(bias.norm())
    if not left <= LEFT * size:
        raise SurgeryError(
            f"{left:.3g} is left of what was cut from the bias of {path}, whose size is {size:.3g}"
        )
    return change


def _unit(direction: Tensor, width: int) -> Tensor:
    flat = direction.detach().float().cpu()
    if flat.shape != (width,):
        raise SurgeryError(f"the direction has the shape {tuple(flat.shape)}, not ({width},)")
    length = float(flat.norm())
    if not 0 < length < float("inf"):
        raise SurgeryError(f"the direction has the length {length}; it points nowhere")
    return flat / length


def _sorted(numbers: Sequence[int], count: int, what: str) -> list[int]:
    """Returns the numbers of parts, each once.

    Raises:
        SurgeryError: one is no whole number, or is not from 0 to `count` − 1.
    """
    try:
        there = sorted({index(number) for number in numbers})
    except TypeError:
        raise SurgeryError(
            f"{quoted(numbers)} are no numbers of {what}s",
            f"a list of numbers from 0 to {count - 1}",
        ) from None
    for number in there:
        if not 0 <= number < count:
            raise SurgeryError(f"there is no {what} {number}; they are 0 to {count - 1}")
    return there


def _of_heads(heads: Sequence[int], count: int, width: int) -> list[int]:
    """Returns the columns of o_proj that belong to heads."""
    return [h * width + i for h in _sorted(heads, count, "head") for i in range(width)]


def _without(weight: Tensor, cut: Sequence[int], along: Tensor | None) -> Factors:
    """Returns A (R, in) and B (out, R) of the ΔW that takes columns, and then a direction, away."""
    columns = torch.tensor(cut, dtype=torch.long)
    a = torch.zeros(len(columns), weight.size(1))
    a[torch.arange(len(columns)), columns] = 1
    b = -weight[:, columns]  # (out, R)
    if along is None:
        return a, b
    kept = weight.clone()
    kept[:, columns] = 0
    return torch.cat((a, (along @ kept)[None])), torch.cat((b, -along[:, None]), 1)


def _checked(
    path: str,
    weight: Tensor,
    factors: Factors,
    cut: Sequence[int],
    along: Tensor | None,
    kept_in: torch.dtype,
) -> dict[str, Any]:
    """Returns the row of a layer; what is left is that of W + ΔW in the dtype it is kept in.

    Raises:
        SurgeryError: more than rounding is left of what was cut.
    """
    a, b = factors
    delta = b @ a
    after, size = (weight + delta).to(kept_in).float(), float(weight.norm().clamp_min(1e-30))
    left = float(after[:, list(cut)].norm()) if cut else 0.0
    if along is not None:
        left = max(left, float((along @ after).norm()))
    if not left <= max(LEFT, torch.finfo(kept_in).eps) * size:
        raise SurgeryError(
            f"{left:.3g} is left of what was cut from {path}, whose size is {size:.3g}"
        )
    return {"rank": len(a), "ΔW / W": float(delta.norm()) / size, "left": left / size}
