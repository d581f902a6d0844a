"""Measuring what an operation does: a merge's effect on the logits, and what rounding leaves.

The room knows no model. A probe is ids that the model is called on, or a function of no arguments
that gives logits (…, V).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanogpt_surgery.errors import SurgeryError
from nanogpt_surgery.lora.merging import merged_layer, widened
from nanogpt_surgery.lora.several import LoRALayer, lora_layers
from nanogpt_surgery.model.loss import kl_divergence
from nanogpt_surgery.report import Report

Probe: TypeAlias = Tensor | Callable[[], Tensor]
Rounding: TypeAlias = Callable[[Tensor], Tensor]  # a matrix, to fewer bits and back
RoundingOf: TypeAlias = Callable[[str, Tensor], tuple[str, Rounding]]
"""By a layer's name and weight: what its numbers become, under a name."""
FLOAT16 = ("float16", "F16")  # as torch and GGUF call it
BLOCK = 32  # weights that share a scale at 4 bits


def logits_of(model: nn.Module, probe: Probe) -> Tensor:
    """The probe's logits, float32, without gradient and in eval mode."""
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            out: Any = probe() if callable(probe) else model(probe)
    finally:
        for module, mode in training.items():
            module.training = mode
    logits: Tensor = out if isinstance(out, Tensor) else out.logits
    return logits.float()


def compare_logits(before: Tensor, after: Tensor) -> dict[str, float]:
    """How far two sets of logits (…, V) are apart.

    The largest and the mean difference, the mean KL divergence from the first distribution to the
    second in nats, and the share of positions with the same most likely token.
    """
    gap = (after - before).abs()
    return {
        "largest_error": float(gap.max()),
        "mean_error": float(gap.mean()),
        "kl": float(kl_divergence(before, after)),
        "top_token_unchanged": float((before.argmax(-1) == after.argmax(-1)).double().mean()),
    }


def effect_of(
    model: nn.Module,
    probe: Probe | None,
    change: Callable[[nn.Module], None],
    tolerance: float,
    force: bool,
) -> dict[str, float]:
    """Makes a change and measures what it does to the probe's logits.

    Raises:
        SurgeryError: the KL divergence exceeds the tolerance, or is not a number, and `force` is
            off. Taking the change back is the caller's.
    """
    if probe is None:
        change(model)
        return {}
    before = logits_of(model, probe)
    change(model)
    effect = compare_logits(before, logits_of(model, probe))
    if not force:
        check_effect(effect, tolerance)
    return effect


def check_effect(effect: Mapping[str, float], tolerance: float) -> None:
    """Raises `SurgeryError` if a KL divergence exceeds the tolerance, or is not a number."""
    if not effect["kl"] <= tolerance:
        raise SurgeryError(
            f"the merged model is not the adapted one: its distribution is {effect['kl']:.3g} nats "
            f"a token away (tolerance {tolerance:g}), the largest logit error "
            f"{effect['largest_error']:.3g}, the top token unchanged at "
            f"{effect['top_token_unchanged']:.1%} of positions",
            "merge into float32 weights, raise the tolerance, or force=True",
        )


def check_weights(
    rows: list[dict[str, Any]],
    layers: Mapping[str, LoRALayer],
    what: str = "the merge",
    wider: str = "merge into float32 weights, or force=True",
    trained: str = "train the adapter first, or force=True",
) -> None:
    """Raises `SurgeryError` if a merge with these rows makes NaN or infinities, or changes nothing.

    Args:
        rows: from `merge_rows`.
        layers: what is merged.
        what: the merge's name.
        wider: what to do where ΔW does not fit into the dtype: too small or too large for it.
        trained: what to do where ΔW is 0, or no number.
    """
    _check_not_finite(rows, layers, what, wider, trained)
    replaces_whole = len(_matrix_layers(layers)) < len(layers)  # a change, without a ΔW
    if replaces_whole or any(row["weights changed"] for row in rows):
        return
    lost = any(row["ΔW / W"] for row in rows)
    raise SurgeryError(
        f"{what} would change no weight: ΔW is "
        + (f"lost in the rounding to {_dtypes(rows)}" if lost else "0")
        + f" in all {len(rows)} layers",
        wider if lost else trained,
    )


def _check_not_finite(
    rows: list[dict[str, Any]],
    layers: Mapping[str, LoRALayer],
    what: str,
    wider: str,
    trained: str,
) -> None:
    wrong = [row for row in rows if not math.isfinite(row["largest error"])]
    narrow = [row for row in wrong if row["dtype"] in FLOAT16]
    names = [row["layer"] for row in wrong] + [
        name
        for name, layer in layers.items()
        if layer.replaces_whole
        and not all(p.isfinite().all() for p in merged_layer(layer).parameters())
    ]
    if names:
        raise SurgeryError(
            f"{what} would make weights that are NaN or infinite in {len(names)} layers "
            f"({', '.join(names[:8])})"
            + ("; float16 ends at 65,504, bfloat16 and float32 go on" if narrow else ""),
            wider if narrow else trained,
        )


def _dtypes(rows: list[dict[str, Any]]) -> str:
    return " and ".join(sorted({str(row["dtype"]) for row in rows}))


def as_stored(_layer: str, weight: Tensor) -> tuple[str, Rounding]:
    """Rounding to a weight's own dtype."""
    return str(weight.dtype).removeprefix("torch."), partial(round_to, dtype=weight.dtype)


def merge_rows(
    layers: Mapping[str, LoRALayer], rounding: RoundingOf = as_stored
) -> list[dict[str, Any]]:
    """For each layer with a ΔW what a merge does that rounds so.

    The size of ΔW, the largest error of a weight, the part of the change that is kept and the share
    of the weights that are other numbers than without ΔW.
    """
    rows = []
    for name, layer in _matrix_layers(layers).items():
        kind, rounded = rounding(name, layer.original_layer.weight)
        rows.append({"layer": name, "dtype": kind, **_what_arrives(layer, rounded)})
    return rows


def _what_arrives(layer: LoRALayer, rounded: Rounding) -> dict[str, float]:
    """Numbers on what a merge does to a layer's weight that is rounded after it."""
    weight, delta = widened(layer.original_layer.weight), layer.delta_weight()
    exact = weight + delta
    before, after = rounded(weight), rounded(exact)
    return {
        "ΔW / W": _ratio(delta, weight),
        "largest error": float((after - exact).abs().max()),
        "change kept": change_kept(after - before, delta),
        "weights changed": float((after != before).double().mean()),
    }


def _matrix_layers(layers: Mapping[str, LoRALayer]) -> dict[str, LoRALayer]:
    """The layers that have a ΔW: all but modules replaced whole."""
    return {n: layer for n, layer in layers.items() if not layer.replaces_whole}


def _ratio(delta: Tensor, weight: Tensor) -> float:
    return float(delta.norm() / weight.norm().clamp_min(1e-30))


def change_kept(arrived: Tensor, delta: Tensor) -> float:
    """1 − ‖arrived − ΔW‖² / ‖ΔW‖², at least 0: 1 if the change arrives whole, 0 if it drowns."""
    energy = delta.double().square().sum()
    if energy == 0:
        return 1.0
    lost = (arrived.double() - delta.double()).square().sum()
    return float((1 - lost / energy).clamp(0, 1))


def merge_survival(model: nn.Module) -> Report:
    """The part of the change that each layer keeps after rounding to lower precisions.

    What arrives is round(W + ΔW) − round(W): an adapter whose changes are smaller than the steps of
    the numbers is gone after a merge, whatever it had learned.

    Raises:
        SurgeryError: the model carries no LoRA.
    """
    rows: list[dict[str, Any]] = []
    for name, layer in _matrix_layers(lora_layers(model)).items():
        weight, delta = widened(layer.original_layer.weight), layer.delta_weight()
        left = {
            precision: change_kept(rounded(weight + delta) - rounded(weight), delta)
            for precision, rounded in ROUNDINGS.items()
        }
        rows.append({"layer": name, "ΔW / W": _ratio(delta, weight), **left})
    lowest = {f"lowest_{name}": min(row[name] for row in rows) for name in ROUNDINGS if rows}
    return Report("part of the change kept after rounding", rows, {"layers": len(rows), **lowest})


def round_to(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """To a dtype and back."""
    return weight.to(dtype).to(weight.dtype)


def round_int8(weight: Tensor) -> Tensor:
    """(out, in) to 255 levels a row, symmetric around 0, and back."""
    step = weight.abs().amax(1, keepdim=True).clamp_min(1e-30) / 127
    return (weight / step).round() * step


def round_int4(weight: Tensor) -> Tensor:
    """(out, in) to 15 levels a block of 32 weights in a row, symmetric around 0, and back."""
    padding = -weight.size(1) % BLOCK
    blocks = F.pad(weight, (0, padding)).unflatten(1, (-1, BLOCK))  # (out, blocks, 32)
    step = blocks.abs().amax(2, keepdim=True).clamp_min(1e-30) / 7
    rounded: Tensor = (blocks / step).round() * step
    return rounded.flatten(1)[:, : weight.size(1)]


ROUNDINGS: dict[str, Rounding] = {
    "bfloat16": partial(round_to, dtype=torch.bfloat16),
    "float16": partial(round_to, dtype=torch.float16),
    "int8": round_int8,
    "int4": round_int4,
}
