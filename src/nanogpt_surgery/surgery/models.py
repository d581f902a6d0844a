"""Fine-tuned models of one base, combined: W₀ + Σ wᵢ (Wᵢ − W₀), tensor by tensor.

What sets a model apart from its base is its task vector (arXiv:2212.04089). They are combined as
adapters are (surgery/combining.py), norms and biases too, and what no model has changed keeps its
bits. With a rank, the change of each matrix is the nearest one of that rank, for which `extract`
finds an adapter without an error.

Legend: N models.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from nanogpt_surgery.arguments import check_arguments
from nanogpt_surgery.errors import SurgeryError, listed
from nanogpt_surgery.lora.inject import replace_module
from nanogpt_surgery.lora.merging import Probe
from nanogpt_surgery.lora.several import has_lora
from nanogpt_surgery.model.quantized import check_not_quantized
from nanogpt_surgery.model.simple_gpt import SimpleGPT
from nanogpt_surgery.report import Report
from nanogpt_surgery.surgery.adapters import check_same_shapes, is_same
from nanogpt_surgery.surgery.combining import Method, arc_shares, checked_weights, dare, ties
from nanogpt_surgery.surgery.low_rank import factorised
from nanogpt_surgery.surgery.operating import FLOAT32, Prepared, carry_out
from nanogpt_surgery.surgery.structure import check_free, trains_like


@check_arguments
def combine_models(
    model: SimpleGPT,
    tuned: Mapping[str, SimpleGPT],
    weights: Mapping[str, float],
    *,
    method: Method = "linear",
    rank: int | None = None,
    density: float = 0.5,
    seed: int = 0,
    probe: Probe | None = None,
    plan: bool = False,
) -> Report:
    """Makes a base into the combination of models that were fine-tuned from it.

    Args:
        model: the base; changed in place, undone by `undo_lora`.
        tuned: the models, by any names; left as they are.
        weights: of each by its name; a negative one takes away what it learned.
        method: linear, slerp (two models), ties or dare.
        rank: of each matrix's change, by its nearest product of that rank; None: the change itself.
        density: the share of entries that ties and dare keep.
        seed: of dare's draws.
        probe: ids (B, T), or a function that gives logits: by it the result is compared with the
            base.
        plan: change nothing, and say what it would be.

    Returns:
        A row for each tensor that changes: ‖ΔW‖, ‖ΔW‖ / ‖W‖, and the error of the rank,
        ‖ΔW − ΔW'‖ / ‖ΔW‖.

    Raises:
        SurgeryError: the models have other tensors or shapes, one carries an adapter or is
            quantised, a value is outside its range, a change is not finite, or nothing changes. The
            base is untouched then.
    """
    chosen = _checked(model, tuned, weights, method, rank, density)
    draw = torch.Generator().manual_seed(seed)
    shares = torch.tensor(list(chosen.values()))

    def prepare() -> Prepared:
        made: dict[str, nn.Parameter] = {}
        rows: list[dict[str, Any]] = []
        for tensor, changes in _changes(model, tuned, chosen):
            dense = _combined(changes, shares, method, density, draw)
            made[tensor], row = _added(tensor, model.get_parameter(tensor), dense, rank)
            rows.append(row | {"changed by": int(changes.flatten(1).any(1).sum())})
        _check_made(model, made)
        return _prepared(model, chosen, method, rows, made)

    return carry_out(model, prepare, probe, plan)


def _prepared(
    model: SimpleGPT,
    weights: Mapping[str, float],
    method: Method,
    rows: list[dict[str, Any]],
    made: dict[str, nn.Parameter],
) -> Prepared:
    title = f"combine models {' + '.join(f'{w:g} {n}' for n, w in weights.items())} ({method})"
    errors = [row["error"] for row in rows if row["error"] is not None]
    summary = {
        "tensors_changed": len(rows),
        "parameters": model.n_parameters,
        **({"largest_layer_error": max(errors)} if errors else {}),
    }
    largest = max(tensor.numel() for tensor in made.values())
    at_work = FLOAT32 * (2 * len(weights) + 2) * largest
    size = sum(tensor.nbytes for tensor in made.values())
    return Prepared(title, rows, lambda: _put_in_place(model, made), summary, size, at_work)


def _checked(
    model: SimpleGPT,
    tuned: Mapping[str, SimpleGPT],
    weights: Mapping[str, float],
    method: Method,
    rank: int | None,
    density: float,
) -> dict[str, float]:
    chosen = checked_weights(weights, method, rank, density)
    unknown = [name for name in chosen if name not in tuned]
    if unknown:
        raise SurgeryError(f"there is no model {unknown[0]!r}; they are {listed(tuned)}")
    for one in (model, *(tuned[name] for name in chosen)):
        check_not_quantized(one, "a combination of models")
        if has_lora(one):
            raise SurgeryError("one of the models carries an adapter", "merge_lora(model) first")
    check_free(model)
    for name in chosen:
        check_same_shapes(model.state_dict(), tuned[name].state_dict())
    return chosen


def _changes(
    model: SimpleGPT, tuned: Mapping[str, SimpleGPT], weights: Mapping[str, float]
) -> Iterator[tuple[str, Tensor]]:
    """Yields each tensor of the base that a model has changed, and the changes (N, …), float32.

    Raises:
        SurgeryError: a change is not finite, or a model has untied what the base ties.
    """
    seen: dict[int, str] = {}
    states = {name: tuned[name].state_dict() for name in weights}
    for name, base in model.named_parameters(remove_duplicate=False):
        first = seen.setdefault(id(base), name)
        untied = [n for n, s in states.items() if not torch.equal(s[first], s[name])]
        if untied:
            raise SurgeryError(
                f"{name} and {first} are one tensor in the base and two in {untied[0]!r}"
            )
        if first != name or all(is_same(state[name], base) for state in states.values()):
            continue
        parts = [
            torch.zeros(base.shape) if is_same(s[name], base) else s[name].float() - base.float()
            for s in states.values()
        ]
        changes = torch.stack([part.detach().cpu() for part in parts])
        if not bool(changes.isfinite().all()):
            raise SurgeryError(f"the change of {name} is not finite")
        yield name, changes


def _combined(
    changes: Tensor, weights: Tensor, method: Method, density: float, draw: torch.Generator
) -> Tensor:
    """Returns the change that several become, (N, …) → (…)."""
    if method == "ties":
        return ties(changes, weights, density)
    if method == "dare":
        return dare(changes, weights, density, draw)
    if method == "slerp":
        weights = torch.tensor(arc_shares(changes[0], changes[1], float(weights[1])))
    return torch.einsum("n,n...->...", weights, changes)


def _added(
    name: str, weight: nn.Parameter, change: Tensor, rank: int | None
) -> tuple[nn.Parameter, dict[str, Any]]:
    """Returns W + ΔW, added in float32 and rounded once, and its row of the report."""
    error = None
    if rank is not None and change.dim() == 2:
        a, b = factorised(change, rank, None)
        error = float((b @ a - change).norm() / change.norm().clamp_min(1e-30))
        change = b @ a
    base = weight.detach().float().cpu()
    row = {
        "tensor": name,
        "‖ΔW‖": float(change.norm()),
        "ΔW / W": float(change.norm() / base.norm().clamp_min(1e-30)),
        "error": error,
    }
    return nn.Parameter((base + change).to(weight.device, weight.dtype)), row


def _check_made(model: SimpleGPT, made: Mapping[str, nn.Parameter]) -> None:
    """Raises `SurgeryError` if a new tensor is not finite, or none differs from the old one."""
    wrong = [name for name, new in made.items() if not bool(new.isfinite().all())]
    if wrong:
        raise SurgeryError(f"{listed(wrong, 4)} would not be finite in {made[wrong[0]].dtype}")
    if all(torch.equal(new, model.get_parameter(name)) for name, new in made.items()):
        raise SurgeryError("the combination would change no tensor of the base")


def _put_in_place(model: SimpleGPT, made: Mapping[str, nn.Parameter]) -> None:
    """Puts copies of modules, with new parameters, in the places of those that have the old ones.

    No tensor is written to; layers that share one share the new one.
    """
    new = {id(model.get_parameter(name)): parameter for name, parameter in made.items()}
    trains_like(model, [(model.get_parameter(name), p) for name, p in made.items()])
    for path, module in list(model.named_modules()):
        if any(id(one) in new for one in module._parameters.values()):
            copied = copy.copy(module)
            copied._modules = dict(module._modules)
            copied._parameters = {n: new.get(id(p), p) for n, p in module._parameters.items()}
            replace_module(model, path, copied)
