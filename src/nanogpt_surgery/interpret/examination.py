"""The spectra of an adapter: how large each ΔW is, of how many directions, and which of W's.

effective rank   exp(entropy of σ² / Σ σ²): of how many directions ΔW is, by their energy. Far
                 below the rank, a smaller rank would do; near it, a larger one may help.
                 (after Roy & Vetterli, 2007)
overlap          the share of ‖ΔW‖² between W's leading singular vectors, as many as ΔW's rank,
                 divided by that of a random ΔW: above 1, ΔW turns what W does most.
intruders        of the 10 leading left singular vectors of W + ΔW, those that resemble none of
                 W's: every cosine is below 0.6 (arXiv:2410.21228, its count and our threshold).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from nanogpt_surgery.arguments import check_arguments
from nanogpt_surgery.lora.active import WeightedAdapters
from nanogpt_surgery.lora.layer import LoRALayer
from nanogpt_surgery.lora.merging import ROUNDINGS, survival, with_delta
from nanogpt_surgery.lora.several import active_adapters, check_name, lora_layers, set_active
from nanogpt_surgery.report import Report

LEADING = 10
ALIKE = 0.6  # the least cosine of two singular vectors that resemble each other
SPECTRAL = ("σ₁ / W's", "rank", "effective rank", "overlap", "intruders")
SIGNIFICANT = 1e-5  # of the largest singular value; smaller ones are rounding


@check_arguments
def examine(adapter: str, base: nn.Module) -> Report:
    """Measures an adapter's ΔW against the weight of each layer that it changes.

    Args:
        adapter: its name on the base, by `load_adapter` or `inject_lora`.
        base: carries it, and perhaps others, which wait meanwhile.

    Returns:
        A report with a row for each of these: ‖ΔW‖ / ‖W‖ and the largest singular value's share of
        W's; rank, effective rank, overlap and intruders, as the module's docstring says; whether
        ΔW is finite; and the part of it that survives a merge in bfloat16, float16, int8, int4. A
        layer whose ΔW is zero is dead: it has learned nothing. Of a module that is replaced whole,
        each tensor has a row, its change ΔW, without a spectrum.

    Raises:
        SurgeryError: the base carries no adapter of this name.
    """
    check_name(base, adapter)
    active = active_adapters(base)
    set_active(base, WeightedAdapters({adapter: 1.0}))
    try:
        found = lora_layers(base).items()
        layers = {name: layer for name, layer in found if adapter in layer.updates}
        with torch.no_grad():
            plain = with_delta(layers).items()
            rows = [{"layer": name, **_measured(layer)} for name, layer in plain]
            whole = [row for name in layers.keys() - dict(plain).keys()
                     for row in _replaced(name, layers[name], adapter)]  # fmt: skip
    finally:
        set_active(base, active)
    rows += sorted(whole, key=lambda row: str(row["layer"]))
    summary = {
        "layers": len(layers),
        "dead": sum(row["rank"] == 0 for row in rows),
        "not finite": sum(row["ΔW / W"] is None for row in rows),
    }
    if whole:
        summary["tensors replaced whole"] = len(whole)
    return Report("adapter", rows, summary)


def _measured(layer: LoRALayer) -> dict[str, Any]:
    kept = survival(layer)
    weight, delta = layer.original_layer.weight.float().cpu(), layer.delta_weight().cpu()
    if not bool(delta.isfinite().all()):
        return dict.fromkeys(kept) | dict.fromkeys(SPECTRAL)
    of_delta = torch.linalg.svd(delta, full_matrices=False)
    of_weight = torch.linalg.svd(weight, full_matrices=False)
    least = SIGNIFICANT * of_delta.S.amax().clamp_min(1e-30)
    values = of_delta.S.masked_select(of_delta.S.gt(least))
    return kept | {
        "σ₁ / W's": float(of_delta.S[0] / of_weight.S[0].clamp_min(1e-30)),
        "rank": len(values),
        "effective rank": effective_rank(values),
        "overlap": overlap(delta, of_weight.U, of_weight.Vh, len(values)),
        "intruders": intruders(of_weight.U, weight + delta) if len(values) else 0,
    }


def _replaced(name: str, layer: Any, adapter: str) -> list[dict[str, Any]]:
    """Returns a row for each tensor of a module that an adapter replaces whole."""
    originals = layer.original_layer.state_dict()
    copies = layer.updates[adapter].module.state_dict()
    return [
        {"layer": f"{name}.{key}", **_change(tensor.float().cpu(), copies[key].float().cpu())}
        for key, tensor in originals.items()
    ]


def _change(weight: Tensor, copied: Tensor) -> dict[str, Any]:
    """Returns the size of a change and what of it survives each rounding, without a spectrum."""
    weight, copied = (t.flatten(1) if t.dim() > 1 else t.reshape(1, -1) for t in (weight, copied))
    delta = copied - weight
    energy = delta.double().square().sum()
    if not bool(delta.isfinite().all()):
        return dict.fromkeys(("ΔW / W", *ROUNDINGS, *SPECTRAL))
    kept = {}
    for kind, rounded in ROUNDINGS.items():
        lost = (rounded(copied) - rounded(weight) - delta).double().square().sum()
        kept[kind] = float((1 - lost / energy).clamp(0, 1)) if energy else 1.0
    size = float(delta.norm() / weight.norm().clamp_min(1e-30))
    return {"ΔW / W": size} | kept | dict.fromkeys(SPECTRAL)


def effective_rank(values: Tensor) -> float:
    """Returns exp(entropy of σ² / Σ σ²) of singular values; 0 of none."""
    if not len(values):
        return 0.0
    shares = values.double().square() / values.double().square().sum()
    return float(torch.special.entr(shares).sum().exp())


def overlap(delta: Tensor, u: Tensor, vh: Tensor, rank: int) -> float:
    """Returns the share of ‖ΔW‖² between W's `rank` leading singular vectors, over chance's."""
    if not rank:
        return 0.0
    between = u[:, :rank].T @ delta @ vh[:rank].T  # (rank, rank)
    chance = rank * rank / delta.numel()
    return float(between.square().sum() / delta.square().sum() / chance)


def intruders_of(weight: Tensor, delta: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Returns u (out, n), σ (n,) and vᵀ (n, in) of the intruder dimensions of W + ΔW.

    Args:
        weight: W (out, in), float32.
        delta: ΔW (out, in).
    """
    u = torch.linalg.svd(weight, full_matrices=False).U
    found = torch.linalg.svd(weight + delta, full_matrices=False)
    new = _resembles_none(u, found.U[:, :LEADING]).nonzero().flatten()
    return found.U[:, new], found.S[new], found.Vh[new]


def _resembles_none(u: Tensor, leading: Tensor) -> Tensor:
    """Returns which of some singular vectors, as columns, resemble none of the u."""
    return (u.T @ leading).abs().amax(0) < ALIKE


def intruders(u: Tensor, tuned: Tensor) -> int:
    """Returns how many leading left singular vectors of W + ΔW resemble none of W's, the u."""
    leading = torch.linalg.svd(tuned, full_matrices=False).U[:, :LEADING]
    return int(_resembles_none(u, leading).sum())
