"""Operations that make one adapter of others, or of two models.

All work on ΔW, never on A and B apart: the A and B of two adapters do not belong together, and
their sums multiplied would have cross terms, B₁A₂, that neither adapter has.

    linear   ΔW = Σ wᵢ ΔWᵢ, exact: A stacked, wᵢ Bᵢ side by side
    slerp    two adapters, on the arc between their directions (Shoemake, 1985), layer by layer
    ties     the largest entries of each, the majority's sign, their mean (arXiv:2306.01708)
    dare     entries dropped at random, the rest made larger (arXiv:2311.03099), then summed

Each is in the journal, and leaves the model as it was if it fails.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from nanogpt_surgery.arguments import check_arguments
from nanogpt_surgery.errors import SurgeryError
from nanogpt_surgery.interpret.examination import intruders_of
from nanogpt_surgery.lora.active import WeightedAdapters
from nanogpt_surgery.lora.merging import Probe
from nanogpt_surgery.lora.several import (
    active_adapters,
    check_name,
    check_new_name,
    lora_layers,
    set_active,
)
from nanogpt_surgery.lora.stored_adapter import (
    LowRankUpdate,
    StoredAdapter,
    extract_adapter,
)
from nanogpt_surgery.lora.targets import adaptable_layers, tied_to
from nanogpt_surgery.model.quantized import check_not_quantized
from nanogpt_surgery.report import Report
from nanogpt_surgery.surgery.combining import Method, arc_shares, checked_weights, dare, ties
from nanogpt_surgery.surgery.low_rank import (
    Factors,
    check_rank_or_energy,
    factorised,
    truncated,
)
from nanogpt_surgery.surgery.operating import Prepared, carry_out, measured, with_adapter

ROUNDING = 1e-4  # of ‖ΔW‖: more than this is no rounding of float32


@check_arguments
def combine(
    model: nn.Module,
    weights: Mapping[str, float],
    name: str,
    *,
    method: Method = "linear",
    rank: int | None = None,
    density: float = 0.5,
    seed: int = 0,
    probe: Probe | None = None,
    plan: bool = False,
) -> Report:
    """Makes one adapter of several that a model carries; it takes part alone, the others wait.

    Args:
        model: carries the adapters; changed in place.
        weights: of each adapter by name; a negative one takes away what it learned.
        name: of the new adapter.
        method: see the module's docstring.
        rank: of each layer's update, by the nearest product of that rank; None keeps linear and
            slerp exact, and ties and dare at the sum of the ranks.
        density: the share of entries that ties and dare keep.
        seed: of dare's draws.
        probe: ids (B, T), or a function that gives logits; by it the new adapter is compared with
            the weighted sum.
        plan: put nothing on the model, and say what it would be.

    Returns:
        A row for each layer: rank, ‖ΔW‖, and the error of the truncation, ‖ΔW − ΔW'‖ / ‖ΔW‖.

    Raises:
        SurgeryError: an adapter is not there, is a DoRA or replaces modules whole, a value is
            outside its range, or the exact form is not the sum. The model is untouched then.
    """
    check_new_name(model, name)
    chosen = checked_weights(weights, method, rank, density)
    draw = torch.Generator().manual_seed(seed)
    one = partial(_combined, method=method, rank=rank, density=density, draw=draw)
    prepare = partial(_combination, model, chosen, name, one)
    return carry_out(model, prepare, probe, plan, lambda: _blend_logits(model, weights, probe))


def _combination(
    model: nn.Module,
    weights: Mapping[str, float],
    name: str,
    one: Callable[[list[tuple[float, LowRankUpdate]]], tuple[Factors, dict[str, Any]]],
) -> Prepared:
    """Returns the adapter of several; `one` gives a layer's factors, and its row."""
    stored = {adapter: _products(model, check_name(model, adapter)) for adapter in weights}
    made: dict[str, LowRankUpdate] = {}
    rows: list[dict[str, Any]] = []
    for layer in dict.fromkeys(path for updates in stored.values() for path in updates):
        parts = [(w, stored[n][layer]) for n, w in weights.items() if layer in stored[n]]
        factors, row = one(parts)
        made[layer] = _update(factors, parts[0][1].embedding, _bias(parts))
        rows.append({"layer": layer, **row})
    title = f"combine {' + '.join(f'{w:g} {n}' for n, w in weights.items())} as {name}"
    return with_adapter(model, name, title, _stored(model, made, weights), rows)


@check_arguments
def compress(
    model: nn.Module,
    adapter: str,
    name: str,
    *,
    rank: int | None = None,
    energy: float | None = None,
    probe: Probe | None = None,
    plan: bool = False,
) -> Report:
    """Makes an adapter of a smaller rank of one that a model carries; it takes part alone.

    Args:
        model: carries the adapter; changed in place.
        adapter: to be compressed; it stays, unused.
        name: of the new one.
        rank: of each layer's update, or
        energy: the least share of each ‖ΔW‖² that is kept, by as small a rank as that allows.
        probe: ids (B, T), or a function that gives logits; by it both adapters are compared.
        plan: put nothing on the model, and say what it would be.

    Returns:
        A row for each layer: rank, ‖ΔW‖, and the error, ‖ΔW − ΔW'‖ / ‖ΔW‖.

    Raises:
        SurgeryError: as `combine`.
    """
    check_rank_or_energy(rank, energy, needed=True)

    def one(_: str, update: LowRankUpdate) -> tuple[Factors, dict[str, Any]]:
        exact = _factors(update)
        factors = truncated(exact, rank, energy)
        return factors, _row(exact, factors)

    prepare = partial(_changed, model, adapter, name, one, f"compress {adapter} as {name}")
    return carry_out(model, prepare, probe, plan, partial(_logits_by, model, adapter, probe))


def _changed(
    model: nn.Module,
    adapter: str,
    name: str,
    one: Callable[[str, LowRankUpdate], tuple[Factors, dict[str, Any]]],
    title: str,
) -> Prepared:
    """Returns an adapter made of another, layer by layer; `one` gives factors, and a row."""
    check_new_name(model, name)
    rows, made = [], {}
    for layer, update in _products(model, check_name(model, adapter)).items():
        factors, row = one(layer, update)
        made[layer] = _update(factors, update.embedding, _bias([(1.0, update)]))
        rows.append({"layer": layer, **row})
    return with_adapter(model, name, title, _stored(model, made, [adapter]), rows)


@check_arguments
def remove_intruders(
    model: nn.Module,
    adapter: str,
    name: str,
    *,
    keep: float = 0.0,
    probe: Probe | None = None,
    plan: bool = False,
) -> Report:
    """Makes an adapter without the intruder dimensions of one that a model carries.

    Of the leading singular triples of W + ΔW those whose left vector resembles none of W's are
    scaled: ΔW' = ΔW − (1 − keep) Σ σᵢ uᵢ vᵢᵀ (arXiv:2410.21228, where less of them forgot less).
    The new adapter takes part alone.

    Args:
        model: carries the adapter; changed in place.
        adapter: it stays, unused.
        name: of the new one.
        keep: the share of each intruder that stays.
        probe: ids (B, T), or a function that gives logits; by it both adapters are compared.
        plan: put nothing on the model, and say what it would be.

    Returns:
        A row for each layer: its intruders before and after, rank, ‖ΔW‖, and how much was taken
        out, ‖ΔW − ΔW'‖ / ‖ΔW‖.

    Raises:
        SurgeryError: as `combine`, or there are no intruders.
    """
    if not 0 <= keep < 1:
        raise SurgeryError(f"keep is {keep}; it must be at least 0 and below 1")

    def prepare() -> Prepared:
        title = f"take intruders out of {adapter} as {name}"
        ready = _changed(model, adapter, name, partial(_without_intruders, model, keep), title)
        if not any(row["intruders"] for row in ready.rows):
            raise SurgeryError(f"{adapter!r} has no intruder dimensions", "examine counts them")
        return ready

    return carry_out(model, prepare, probe, plan, partial(_logits_by, model, adapter, probe))


def _without_intruders(
    model: nn.Module, keep: float, layer: str, update: LowRankUpdate
) -> tuple[Factors, dict[str, Any]]:
    """Returns the factors of an update without its intruders, and their row of the report."""
    weight = lora_layers(model)[layer].original_layer.weight.detach().float().cpu()
    weight = weight.T if update.embedding else weight
    exact = _factors(update)
    u, s, vh = intruders_of(weight, exact[1] @ exact[0])
    factors = exact
    if len(s):
        cut = torch.cat((exact[0], vh)), torch.cat((exact[1], -(1 - keep) * (u * s)), 1)
        factors = truncated(cut, None, None)
    left = intruders_of(weight, factors[1] @ factors[0])
    row = _row(exact, factors)
    counts = {"intruders": len(s), "left": len(left[1])}
    return factors, {**counts, "taken out": row.pop("error"), **row}


@check_arguments
def extract(
    model: nn.Module,
    tuned: nn.Module,
    name: str,
    *,
    rank: int | None = None,
    energy: float | None = None,
    probe: Probe | None = None,
    plan: bool = False,
) -> Report:
    """Makes an adapter of what sets a fine-tuned model apart from its base.

    Args:
        model: the base; the adapter is put on it.
        tuned: of the same shapes, without adapters; left as it is.
        name: of the adapter.
        rank: of each layer's update, or
        energy: the least share of each difference's ‖·‖² that is kept.
        probe: ids (B, T): by it base and adapter are compared with `tuned`.
        plan: put nothing on the model, and say what it would be.

    Returns:
        A row for each layer that differs: rank, ‖ΔW‖, and the error. A layer's bias goes along
        (PEFT's lora_bias), with a row and no rank if it alone differs, as a norm has, which is
        replaced whole (modules_to_save).
        What the format has no place for is named as left out, with its size: biases, beside an
        embedding's update.

    Raises:
        SurgeryError: the models have other tensors or shapes, a difference is not finite, or they
            do not differ.
    """
    check_rank_or_energy(rank, energy, needed=True)
    check_new_name(model, name)
    for one in (model, tuned):
        check_not_quantized(one, "extract")
    check_same_shapes(model.state_dict(), tuned.state_dict())
    prepare = partial(_extracted, model, tuned, name, rank, energy)
    return carry_out(model, prepare, probe, plan, lambda: measured(tuned, probe))


def _extracted(
    model: nn.Module, tuned: nn.Module, name: str, rank: int | None, energy: float | None
) -> Prepared:
    adapter, rows = _differences(model, tuned, rank, energy)
    base, goal = model.state_dict(), tuned.state_dict()
    made = {f"{layer}.weight" for layer in adapter.updates}
    rest = {
        key: goal[key].float() - base[key].float()
        for key in base
        if key not in made and not is_same(base[key], goal[key])
    }
    updates = _with_biases(model, adapter.updates, rest)
    added = {f"{layer}.bias" for layer, update in updates.items() if update.bias is not None}
    layers = adaptable_layers(model)
    whole = {
        key: goal[key].detach().float().cpu()
        for key in rest
        if (owner := key.rpartition(".")[0]) not in layers
        and not any(model.get_submodule(owner).children())
    }
    for key, change in rest.items():
        _check_finite(key, change)
    if not updates and not whole:
        raise SurgeryError("the models do not differ in any tensor that an adapter can hold")
    sizes = {"rank": None, "error": 0.0}
    alone = sorted(key for key in added if key.removesuffix(".bias") not in adapter.updates)
    rows += [{"layer": key, **sizes, "‖ΔW‖": float(rest[key].norm())} for key in [*alone, *whole]]
    left = [f"{key} ({rest[key].numel():,})" for key in rest.keys() - added - whole.keys()]
    biases = {"biases": len(added), "left out": ", ".join(sorted(left))}
    made_of = replace(adapter, updates=updates, whole=whole)
    return with_adapter(model, name, f"extract {name}", made_of, rows, biases)


def _with_biases(
    model: nn.Module, updates: dict[str, LowRankUpdate], rest: Mapping[str, Tensor]
) -> dict[str, LowRankUpdate]:
    """Returns updates with the changes of their layers' biases, where the format has room for them.

    A layer whose bias alone differs has an update of rank 1 that is zero.
    """
    if any(update.embedding for update in updates.values()):
        return updates
    made = dict(updates)
    for layer, module in adaptable_layers(model).items():
        change = rest.get(f"{layer}.bias")
        if change is not None:
            out, width = module.weight.shape  # type: ignore[misc]
            zero = _update((torch.zeros(1, width), torch.zeros(out, 1)), False)
            made[layer] = replace(made.get(layer, zero), bias=change.detach().cpu())
    return made


def is_same(one: Tensor, other: Tensor) -> bool:
    """Returns whether two tensors are the same to the bit, the wider rounded as the narrower is."""
    if one.dtype == other.dtype:
        return torch.equal(one, other)
    narrower = min(one.dtype, other.dtype, key=lambda dtype: torch.finfo(dtype).bits)
    return torch.equal(one.to(narrower), other.to(narrower))


def _differences(
    model: nn.Module, tuned: nn.Module, rank: int | None, energy: float | None
) -> tuple[StoredAdapter, list[dict[str, Any]]]:
    """Returns the update of each layer whose weight differs, and a row for each that is its own.

    Layers that share a weight in both models share their update; where only the base ties them,
    each has its own, and a merge unties them.
    """
    goal = {layer: _weight(tuned, layer) for layer in adaptable_layers(model)}
    made: dict[str, LowRankUpdate] = {}
    rows: list[dict[str, Any]] = []
    tied: str | None = None
    for layer, module in adaptable_layers(model).items():
        base = _weight(model, layer)
        delta = goal[layer].float() - base.float()
        if is_same(goal[layer], base):  # where their dtypes differ, rounding is no difference
            delta.zero_()
        embedding, others = isinstance(module, nn.Embedding), tied_to(model, layer)
        alike = all(other in goal and torch.equal(goal[other], goal[layer]) for other in others)
        if others and delta.any():
            tied = "both" if alike and tied != "untie" else "untie"
        if alike and (first := next((other for other in others if other in made), None)):
            made[layer] = _as_of(made[first], embedding)
        elif delta.any():
            _check_finite(layer, delta)
            factors, row = _nearest(delta.T if embedding else delta, rank, energy)
            made[layer] = _update(factors, embedding)
            rows.append({"layer": layer, **row})
    return StoredAdapter(made, tied=tied), rows


def _weight(model: nn.Module, layer: str) -> Tensor:
    weight: Tensor = model.get_submodule(layer).get_parameter("weight").detach()
    return weight


def _check_finite(layer: str, *tensors: Tensor) -> None:
    for tensor in tensors:
        if not bool(tensor.isfinite().all()):
            raise SurgeryError(f"the change of {layer} is not finite, so it has no directions")


def _nearest(
    matrix: Tensor, rank: int | None, energy: float | None
) -> tuple[Factors, dict[str, Any]]:
    """Returns the factors of the nearest matrix of a smaller rank, and their row of a report."""
    factors = factorised(matrix, rank, energy)
    error, size = (factors[1] @ factors[0] - matrix).norm(), matrix.norm()
    relative = float(error / size.clamp_min(1e-30))
    return factors, {"rank": len(factors[0]), "‖ΔW‖": float(size), "error": relative}


def _as_of(first: LowRankUpdate, embedding: bool) -> LowRankUpdate:
    """Returns the same change for another layer with the same weight: a head, or an embedding."""
    a, b = first.A, first.B
    if embedding != first.embedding:
        a, b = b.T.contiguous(), a.T.contiguous()
    return _update((a, b), embedding)


def _products(model: nn.Module, name: str) -> dict[str, LowRankUpdate]:
    """Returns the updates of an adapter, all of them products.

    Raises:
        SurgeryError: one is not, or is not finite.
    """
    adapter = extract_adapter(model, name)
    dora = [layer for layer, update in adapter.updates.items() if update.magnitude is not None]
    if dora or adapter.whole:
        which = f"is a DoRA ({dora[0]}, …)" if dora else "replaces modules whole"
        raise SurgeryError(f"{name!r} {which}: its change is no product B A",
                           "merge it into the model instead")  # fmt: skip
    for layer, update in adapter.updates.items():
        _check_finite(f"{layer} by {name!r}", update.A, update.B)
    return adapter.updates


def _factors(update: LowRankUpdate, weight: float = 1.0) -> Factors:
    return update.A, weight * update.scaling * update.B


def _update(factors: Factors, embedding: bool, bias: Tensor | None = None) -> LowRankUpdate:
    a, b = factors
    return LowRankUpdate(a, b, alpha=float(len(a)), embedding=embedding, bias=bias)


def _bias(parts: list[tuple[float, LowRankUpdate]]) -> Tensor | None:
    """Returns Σ wᵢ bᵢ of what some updates add to a layer's bias, however ΔW is combined."""
    added = [weight * u.scaling * u.bias for weight, u in parts if u.bias is not None]
    return torch.stack(added).sum(0) if added else None


def _stacked(parts: list[tuple[float, LowRankUpdate]]) -> Factors:
    """Returns the factors of Σ wᵢ ΔWᵢ, exactly."""
    factors = [_factors(update, weight) for weight, update in parts]
    return torch.cat([a for a, _ in factors]), torch.cat([b for _, b in factors], 1)


def _combined(
    parts: list[tuple[float, LowRankUpdate]],
    method: Method,
    rank: int | None,
    density: float,
    draw: torch.Generator,
) -> tuple[Factors, dict[str, Any]]:
    if method == "slerp" and len(parts) == 2:
        (_, one), (share, other) = parts
        shares = arc_shares(one.delta_weight, other.delta_weight, share)
        parts = list(zip(shares, (one, other), strict=True))
    exact = _stacked(parts)
    if method in ("linear", "slerp"):
        _check_is_sum(exact, parts)
        factors = exact if rank is None else truncated(exact, rank, None)
        return factors, _row(exact, factors)
    products = torch.stack([update.delta_weight for _, update in parts])  # (N, out, in)
    weights = torch.tensor([weight for weight, _ in parts])
    if method == "ties":
        return _nearest(ties(products, weights, density), rank or len(exact[0]), None)
    dense = dare(products, weights, density, draw)
    return _nearest(dense, rank or len(exact[0]), None)


def _check_is_sum(factors: Factors, parts: list[tuple[float, LowRankUpdate]]) -> None:
    a, b = factors
    total = torch.zeros(b.size(0), a.size(1))
    for weight, update in parts:
        total += weight * update.delta_weight
    error, size = (
        float((b @ a - total).norm()),
        sum(abs(weight) * float(update.delta_weight.norm()) for weight, update in parts),
    )
    if not error <= ROUNDING * size:
        raise SurgeryError(f"the combination differs from the sum by {error:.3g}, of {size:.3g}")


def _row(exact: Factors, factors: Factors) -> dict[str, Any]:
    """Returns rank and size, and the error, all without a matrix (out, in)."""
    gap = torch.cat((exact[0], factors[0])), torch.cat((exact[1], -factors[1]), 1)
    size, parts = _norm(exact), float(exact[0].norm() * exact[1].norm())
    is_zero = size <= 1e-6 * parts  # parts that cancel: what is left of them is rounding
    return {
        "rank": len(factors[0]),
        "‖ΔW‖": size,
        "error": 0.0 if exact is factors or is_zero else _norm(gap) / size,
    }


def _norm(factors: Factors) -> float:
    """Returns ‖B A‖ by the factors' Gram matrices: tr(BᵀB · AAᵀ)."""
    a, b = (factor.double() for factor in factors)
    return float(((b.T @ b) * (a @ a.T)).sum().clamp_min(0).sqrt())


def _stored(
    model: nn.Module, made: dict[str, LowRankUpdate], names: Iterable[str]
) -> StoredAdapter:
    """Returns the adapter of some updates; where all that it is made of keep a tie, it does."""
    choices = {extract_adapter(model, name).tied for name in names} - {None}
    if choices != {"both"}:
        return StoredAdapter(made, tied="untie" if choices else None)
    shared: dict[str, LowRankUpdate] = {}
    for layer, update in made.items():
        first = next((other for other in tied_to(model, layer) if other in shared), None)
        shared[layer] = update if first is None else _as_of(shared[first], update.embedding)
    return StoredAdapter(shared, tied="both")


def _blend_logits(
    model: nn.Module, weights: Mapping[str, float], probe: Probe | None
) -> Tensor | None:
    """Returns the logits while the weighted sum takes part."""
    before = active_adapters(model)
    set_active(model, WeightedAdapters(weights))
    try:
        return measured(model, probe)
    finally:
        set_active(model, before)


def _logits_by(model: nn.Module, adapter: str, probe: Probe | None) -> Tensor | None:
    """Returns the logits while an adapter takes part alone."""
    return _blend_logits(model, {adapter: 1.0}, probe)


def check_same_shapes(base: Mapping[str, Tensor], goal: Mapping[str, Tensor]) -> None:
    """Raises `SurgeryError` unless two models have the same tensors, by names and shapes."""
    wrong = [key for key in {**base, **goal} if key not in base or key not in goal]
    if wrong:
        raise SurgeryError(f"one of the models has no {wrong[0]}", "adapters are merged first")
    for key, tensor in base.items():
        if tensor.shape != goal[key].shape:
            shapes = f"{tuple(tensor.shape)} and {tuple(goal[key].shape)}"
            raise SurgeryError(f"{key} is {shapes} in the two models")
