"""A rank for each layer, from the gradients of a few batches, under a budget of parameters.

A new LoRA has B = 0, so its first steps move W against the gradient G of the loss, as far as the
rank lets them. By a rank r a layer can follow σ₁² + … + σᵣ² of ‖G‖², σ being the singular values
of G; each rank costs inputs + outputs parameters. The budget buys ranks one by one, each where it
gives most for its parameters; since σ only falls, no other choice of as many gives more.

G is measured twice, on different batches, and σᵢ² is what the second finds along the directions of
the first: that of noise is 0 on average.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from nanogpt_surgery.arguments import check_arguments
from nanogpt_surgery.data.gpt_dataset import GPTDataset
from nanogpt_surgery.errors import SurgeryError
from nanogpt_surgery.lora.settings import LoRASettings
from nanogpt_surgery.lora.several import has_lora
from nanogpt_surgery.lora.targets import adaptable_layers, plan_updates
from nanogpt_surgery.model.loss import cross_entropy, eval_mode
from nanogpt_surgery.model.quantized import check_not_quantized
from nanogpt_surgery.report import Report
from nanogpt_surgery.values import chosen

ROUNDING = 1e-10  # of the largest energy of a layer


@dataclass(frozen=True)
class RankPlan:
    """Ranks under a budget; `inject_lora(model, **plan.options)` takes them."""

    targets: list[str]
    """the layers that get a rank"""
    rank_pattern: dict[str, int]
    """their ranks"""
    alpha_pattern: dict[str, float]
    """their alphas, so that alpha / rank is the same everywhere"""
    report: Report
    """a row for each layer"""

    @property
    def options(self) -> dict[str, Any]:
        """The arguments of `inject_lora`, beside the model."""
        names = ("targets", "rank_pattern", "alpha_pattern")
        return {name: getattr(self, name) for name in names}


@check_arguments
def plan_ranks(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    budget: int,
    targets: str | Iterable[str] = "all-linear",
    *,
    most: int = 64,
    settings: LoRASettings | None = None,
    **changes: Any,
) -> RankPlan:
    """Chooses a rank for each layer from the gradients of some batches; the model stays as it is.

    Args:
        model: without an adapter; called on ids it gives logits.
        batches: ids and targets, (B, T) each, at least two; every second one belongs to the
            second measurement.
        budget: parameters that the adapter has at most.
        targets: the layers among which ranks are given out, as in `inject_lora`; those for which
            none is left are no targets of the plan.
        most: the largest rank of a layer.
        settings: of the adapter that is planned: `alpha` / `rank` is kept for each layer.
        **changes: fields of `LoRASettings` by name, over those of `settings`.

    Raises:
        SurgeryError: the model carries a LoRA or is quantised, there is one batch or none, a
            gradient is not finite, or the budget buys not one rank.
    """
    if has_lora(model):
        raise SurgeryError("the model carries a LoRA", "plan ranks before inject_lora")
    if budget < 1 or most < 1:
        raise SurgeryError(f"budget is {budget} and most {most}; both must be at least 1")
    check_not_quantized(model, "a plan of ranks")
    settings = chosen(LoRASettings, settings, changes)
    least = replace(settings, rank=1, rank_pattern=None)
    layers = plan_updates(model, targets, least).settings
    modules = adaptable_layers(model)
    energies = _energies({name: modules[name] for name in layers}, model, batches, most)
    costs = {name: sum(modules[name].weight.shape) for name in layers}  # type: ignore[arg-type]
    ranks = _bought(energies, costs, budget)
    if not ranks:
        raise SurgeryError(
            f"a budget of {budget:,} parameters buys no rank; the least costs {min(costs.values())}"
        )
    scale = settings.alpha / settings.rank
    alphas = {name: scale * rank for name, rank in ranks.items()}
    return RankPlan(list(ranks), ranks, alphas, _report(ranks, energies, costs, budget))


def _report(
    ranks: Mapping[str, int],
    energies: Mapping[str, Tensor],
    costs: Mapping[str, int],
    budget: int,
) -> Report:
    rows: list[dict[str, Any]] = [
        {
            "layer": name,
            "rank": ranks.get(name, 0),
            "energy followed": _share(energy, ranks.get(name, 0)),
            "parameters": ranks.get(name, 0) * costs[name],
        }
        for name, energy in energies.items()
    ]
    trainable = sum(row["parameters"] for row in rows)
    summary = {"layers": len(ranks), "budget": budget, "trainable_parameters": trainable}
    return Report("ranks planned", rows, summary)


def batches_of(
    dataset: GPTDataset, count: int = 8, rows: int = 4
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields batches of windows that are spread evenly over a dataset's text, taking turns."""
    total = min(count * rows, len(dataset))
    places = [i * len(dataset) // total for i in range(total)]
    for batch in range(min(count, total)):
        ids, targets = zip(*(dataset[i] for i in places[batch::count]), strict=True)
        yield torch.stack(ids), torch.stack(targets)


def _energies(
    layers: Mapping[str, Any],
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    most: int,
) -> dict[str, Tensor]:
    """Returns what each further rank of a layer follows of its gradient, falling: (most,) each."""
    with _gradients_of(layers, model):
        first, second = _summed(layers, model, batches)
    energies = {}
    for name in layers:
        u, s, vh = torch.linalg.svd(first[name], full_matrices=False)
        again = torch.einsum("or,oi,ri->r", u[:, :most], second[name], vh[:most])
        energy = (s[:most] * again).clamp_min(0).sort(descending=True).values
        energies[name] = energy * (energy > ROUNDING * energy[0])  # what is left is rounding
    return energies


def _summed(
    layers: Mapping[str, Any], model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Returns the gradient of each weight twice: over the batches with even and with odd numbers.

    Raises:
        SurgeryError: there are less than two batches, or a gradient is not finite.
    """
    sums: list[dict[str, Tensor]] = [{}, {}]
    count = 0
    for count, (ids, targets) in enumerate(batches, 1):
        weights = [layer.weight for layer in layers.values()]
        loss = cross_entropy(model(ids), targets)
        found = torch.autograd.grad(loss, weights)
        for name, gradient in zip(layers, found, strict=True):
            there = sums[count % 2].get(name)
            sums[count % 2][name] = gradient.float() if there is None else there + gradient
    if count < 2:
        raise SurgeryError(f"there are {count} batches; two measurements need at least 2")
    wrong = [
        n for one in sums for n, gradient in one.items() if not bool(gradient.isfinite().all())
    ]
    if wrong:
        raise SurgeryError(f"the gradient of {wrong[0]} is not finite")
    return sums[0], sums[1]


@contextmanager
def _gradients_of(layers: Mapping[str, Any], model: nn.Module) -> Iterator[None]:
    """Within the block, some layers' weights alone have a gradient, in eval mode."""
    before = {parameter: parameter.requires_grad for parameter in model.parameters()}
    try:
        model.requires_grad_(False)
        for layer in layers.values():
            layer.weight.requires_grad_(True)
        with eval_mode(model), torch.enable_grad():
            yield
    finally:
        for parameter, trained in before.items():
            parameter.requires_grad_(trained)


def _bought(
    energies: Mapping[str, Tensor], costs: Mapping[str, int], budget: int
) -> dict[str, int]:
    """Returns the ranks that a budget buys, of those layers that get one, in their order."""
    ranks = dict.fromkeys(energies, 0)
    heap = [(-float(energy[0]) / costs[name], name) for name, energy in energies.items()]
    heapq.heapify(heap)
    while heap:
        gain, name = heapq.heappop(heap)
        if gain == 0 or costs[name] > budget:
            continue  # noise alone is left there, or too little budget
        budget -= costs[name]
        ranks[name] += 1
        if ranks[name] < len(energies[name]):
            heapq.heappush(heap, (-float(energies[name][ranks[name]]) / costs[name], name))
    return {name: rank for name, rank in ranks.items() if rank}


def _share(energy: Tensor, rank: int) -> float:
    """Returns which share of a gradient's energy a rank follows."""
    return float(energy[:rank].sum() / energy.sum().clamp_min(1e-30))
