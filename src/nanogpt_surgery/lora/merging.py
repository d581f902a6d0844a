"""Merging: W + ΔW in the place of a layer and its updates, and what that does.

A merge rounds W + ΔW once, to W's own dtype. How much of ΔW arrives is computed for each layer
before anything is touched, and the effect on the logits is measured on a probe: ids that the model
is called on, or a function of no arguments that gives logits (…, V).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanogpt_surgery.arguments import check_arguments
from nanogpt_surgery.errors import SurgeryError
from nanogpt_surgery.history.model_history import get_tie_word_embeddings, history_of, operation
from nanogpt_surgery.lora.inject import replace_module
from nanogpt_surgery.lora.linear import LoRALayer
from nanogpt_surgery.lora.several import active_adapters, adapter_names, lora_layers
from nanogpt_surgery.lora.targets import tied_to
from nanogpt_surgery.model.loss import eval_mode, kl_divergence
from nanogpt_surgery.report import Report

Probe: TypeAlias = Tensor | Callable[[], Tensor]
Rounding: TypeAlias = Callable[[Tensor], Tensor]  # a matrix, to fewer bits and back
RoundingOf: TypeAlias = Callable[[str, Tensor], tuple[str, Rounding]]
"""By a layer's name and weight: what its numbers become, under a name."""
FLOAT16 = ("float16", "F16")  # as torch and GGUF call it
BLOCK = 32  # weights that share a scale at 4 bits


@check_arguments
def merge_lora(
    model: nn.Module,
    *,
    probe: Probe | None = None,
    tolerance: float = 1e-3,
    force: bool = False,
    keep_originals: bool = True,
) -> Report:
    """Puts W + ΔW, added in float32 (float64 if W is), in the place of every wrapped layer.

    The original tensors are not written to. What takes part is merged; the other adapters leave
    with the wrappers, and come back with `undo_lora`.

    Args:
        model: carries a LoRA, enabled.
        probe: ids (B, T) to call the model on, or a function that gives logits; the effect on
            the logits is measured with it.
        tolerance: largest mean KL divergence from the adapted model's distribution to the merged
            one's, in nats a token, that is let pass.
        force: merge whatever the probe says and the weights become.
        keep_originals: keep the original layers and the updates in memory, for `undo_lora`.

    Raises:
        SurgeryError: the probe shows more than the tolerance, the LoRA is disabled, no adapter
            takes part, no weight would change, one would be NaN or infinite, or a tie would be
            broken that nobody decided to break. The model is untouched then.
    """
    layers = lora_layers(model)
    _check_takes_part(model, layers)
    check_undecided(model, layers)
    kept = "kept" if keep_originals else "dropped"
    rows = [{**row, "original": kept} for row in merge_rows(layers)]
    if not force:
        check_weights(rows, layers)
    effect: dict[str, float] = {}
    with operation(model, "merge"):
        before = None if probe is None else logits_of(model, probe)
        merge_layers(model)
        if probe is not None and before is not None:
            effect = compare_logits(before, logits_of(model, probe))
            if not force:
                check_effect(effect, tolerance)
    if not keep_originals:
        history_of(model).settle()
    return Report("LoRA merged", rows, {"layers": len(rows), "originals": kept} | effect)


def _check_takes_part(model: nn.Module, layers: Mapping[str, LoRALayer]) -> None:
    if not all(layer.enabled for layer in layers.values()):
        raise SurgeryError(
            "the LoRA is disabled, so a merge would change what the model computes",
            "enable_lora(model) first",
        )
    names = adapter_names(model)
    if not active_adapters(model).names():
        raise SurgeryError(
            f"no adapter takes part, so a merge would only take {', '.join(names)} off",
            f"swap_lora(model, {names[0]!r}) first, or remove_lora(model)",
        )


def check_undecided(model: nn.Module, layers: dict[str, LoRALayer]) -> None:
    """Raises `SurgeryError` if merging would break a tie that nobody decided to break."""
    undecided = {}
    for name, layer in layers.items():
        others = [] if layer.unties else tied_to(model, name)
        alone = [other for other in others if not _is_decided(model.get_submodule(other), layer)]
        if alone:
            undecided[name] = alone
    if undecided:
        shown = "; ".join(f"{name} with {', '.join(rest)}" for name, rest in undecided.items())
        raise SurgeryError(
            f"a merge would break the tie of {shown}",
            "remove_lora, and inject_lora again with tied='untie' or tied='both'",
        )


def _is_decided(partner: nn.Module, layer: LoRALayer) -> bool:
    """Whether a layer may part from its partner, or both have one A and B wherever either has."""
    if not isinstance(partner, LoRALayer):
        return False
    names = [n for n in layer.active.names() if n in layer.updates or n in partner.updates]
    return partner.unties or all(
        n in layer.updates
        and n in partner.updates
        and layer.updates[n].lora_A is partner.updates[n].lora_A
        for n in names
    )


def merge_layers(model: nn.Module) -> None:
    """Puts W + ΔW in the place of every wrapped layer.

    Layers that shared a weight and have the same W + ΔW share one again; where a tie is broken, a
    config that says `tie_word_embeddings` says no.
    """
    before = history_of(model).trainable_before
    trainable = None if before is None else {id(parameter) for parameter in before}
    made: dict[int, list[Any]] = {}
    for name, layer in lora_layers(model).items():
        original: Any = layer.original_layer
        merged: Any = merged_layer(layer)
        if not layer.replaces_whole:
            merged.weight.requires_grad_(trainable is None or id(original.weight) in trainable)
            twins = made.setdefault(id(original.weight), [])
            for twin in twins:
                if torch.equal(twin.weight, merged.weight):
                    merged.weight = twin.weight
            twins.append(merged)
        replace_module(model, name, merged)
    restore_requires_grad(model)
    if get_tie_word_embeddings(model) and _is_untied(model):
        config: Any = model.config
        config.tie_word_embeddings = False


def _is_untied(model: nn.Module) -> bool:
    """Whether the embedding and the head that transformers' accessors name have two weights."""
    ends = [getattr(model, f"get_{side}_embeddings", None) for side in ("input", "output")]
    weights = [getattr(end(), "weight", None) for end in ends if end is not None]
    return len(weights) == 2 and weights[0] is not weights[1]


def restore_requires_grad(model: nn.Module) -> None:
    """Lets those parameters train again that could before the first injection."""
    for parameter in history_of(model).trainable_before or ():
        parameter.requires_grad_(True)
    history_of(model).trainable_before = None


def merged_layer(layer: LoRALayer) -> nn.Module:
    """A new plain layer with W + ΔW, rounded once, to W's own dtype.

    It is added in float32, to a float64 W in float64. A module that is replaced whole is the copy
    that takes part, not rounded.
    """
    if layer.replaces_whole:
        return layer.shown
    original, weight = layer.original_layer, layer.original_layer.weight
    merged = (_widened(weight) + layer.delta_weight()).to(weight.dtype).contiguous()
    plain: nn.Linear | nn.Embedding
    if isinstance(original, nn.Embedding):
        plain = nn.Embedding.from_pretrained(
            merged,
            padding_idx=original.padding_idx,
            scale_grad_by_freq=original.scale_grad_by_freq,
            sparse=original.sparse,
        )
    else:
        plain = nn.Linear(original.in_features, original.out_features, bias=False, device="meta")
        plain.bias = original.bias
    plain.weight = nn.Parameter(merged)
    return plain.train(original.training)


def _widened(weight: Tensor) -> Tensor:
    """A weight in the dtype that it is merged in, float32 or its own wider one; no gradient."""
    return weight.detach().to(torch.promote_types(weight.dtype, torch.float32))


def logits_of(model: nn.Module, probe: Probe) -> Tensor:
    """The probe's logits, float32, without gradient and in eval mode."""
    with eval_mode(model), torch.no_grad():
        out: Any = probe() if callable(probe) else model(probe)
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
) -> None:
    """Raises `SurgeryError` if a merge with these rows makes NaN or infinities, or changes nothing.

    Args:
        rows: from `merge_rows`.
        layers: what is merged.
        what: the merge's name.
        wider: what to do where ΔW does not fit into the dtype: too small or too large for it.
    """
    trained = "train the adapter first, or force=True"
    whole = {name: merged_layer(layer) for name, layer in layers.items() if layer.replaces_whole}
    wrong = [row for row in rows if not math.isfinite(row["largest error"])]
    narrow = any(row["dtype"] in FLOAT16 for row in wrong)
    names = [row["layer"] for row in wrong] + [
        name
        for name, copy in whole.items()
        if not all(p.isfinite().all() for p in copy.parameters())
    ]
    if names:
        raise SurgeryError(
            f"{what} would make weights that are NaN or infinite in {len(names)} layers "
            f"({', '.join(names[:8])})"
            + ("; float16 ends at 65,504, bfloat16 and float32 go on" if narrow else ""),
            wider if narrow else trained,
        )
    if whole or any(row["weights changed"] for row in rows):  # a copy is a change, without a ΔW
        return
    lost = any(row["ΔW / W"] for row in rows)
    dtypes = " and ".join(sorted({str(row["dtype"]) for row in rows}))
    raise SurgeryError(
        f"{what} would change no weight: ΔW is "
        + (f"lost in the rounding to {dtypes}" if lost else "0")
        + f" in all {len(rows)} layers",
        wider if lost else trained,
    )


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
    for name, layer in layers.items():
        if layer.replaces_whole:
            continue
        kind, rounded = rounding(name, layer.original_layer.weight)
        weight, delta = _widened(layer.original_layer.weight), layer.delta_weight()
        exact = weight + delta
        before, after = rounded(weight), rounded(exact)
        rows.append(
            {
                "layer": name,
                "dtype": kind,
                "ΔW / W": _ratio(delta, weight),
                "largest error": float((after - exact).abs().max()),
                "change kept": change_kept(after - before, delta),
                "weights changed": float((after != before).double().mean()),
            }
        )
    return rows


@check_arguments
def merge_survival(model: nn.Module) -> Report:
    """The part of the change that each layer keeps after rounding to lower precisions.

    What arrives is round(W + ΔW) − round(W): an adapter whose changes are smaller than the steps of
    the numbers is gone after a merge, whatever it had learned.

    Raises:
        SurgeryError: the model carries no LoRA.
    """
    rows: list[dict[str, Any]] = []
    for name, layer in lora_layers(model).items():
        if layer.replaces_whole:
            continue
        weight, delta = _widened(layer.original_layer.weight), layer.delta_weight()
        exact = weight + delta
        left = {
            precision: change_kept(rounded(exact) - rounded(weight), delta)
            for precision, rounded in ROUNDINGS.items()
        }
        rows.append({"layer": name, "ΔW / W": _ratio(delta, weight), **left})
    lowest = {f"lowest_{name}": min(row[name] for row in rows) for name in ROUNDINGS if rows}
    return Report("part of the change kept after rounding", rows, {"layers": len(rows), **lowest})


def _ratio(delta: Tensor, weight: Tensor) -> float:
    return float(delta.norm() / weight.norm().clamp_min(1e-30))


def change_kept(arrived: Tensor, delta: Tensor) -> float:
    """1 − ‖arrived − ΔW‖² / ‖ΔW‖², at least 0: 1 if the change arrives whole, 0 if it drowns."""
    energy = delta.double().square().sum()
    if energy == 0:
        return 1.0
    lost = (arrived.double() - delta.double()).square().sum()
    return float((1 - lost / energy).clamp(0, 1))


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
