"""How several changes of one weight become one: with weights, on an arc, by their largest entries.

Legend: N changes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from nanogpt_surgery.errors import SurgeryError
from nanogpt_surgery.surgery.low_rank import check_rank_or_energy
from nanogpt_surgery.values import WEIGHT, raise_all, wrong_values

Method: TypeAlias = Literal["linear", "slerp", "ties", "dare"]


def checked_weights(
    weights: Mapping[str, float], method: Method, rank: int | None, density: float
) -> dict[str, float]:
    """Returns the weights; those of slerp as 1 − t and t.

    Raises:
        SurgeryError: a value is outside its range.
    """
    named = {f"the weight of {one!r}": weight for one, weight in weights.items()}
    raise_all(wrong_values(WEIGHT, named))
    check_rank_or_energy(rank, None, needed=False)
    if not 0 < density <= 1:
        raise SurgeryError(f"density is {density}; it must be above 0 and at most 1")
    if not weights or (method == "slerp" and len(weights) != 2):
        wanted = "2" if method == "slerp" else "at least 1"
        raise SurgeryError(f"{len(weights)} are named to combine; {method} takes {wanted}")
    total = sum(weights.values()) if method == "slerp" else 1.0
    if total == 0:
        raise SurgeryError(f"the weights {', '.join(map(str, weights.values()))} add up to 0")
    return {name: weight / total for name, weight in weights.items()}


def arc_shares(one: Tensor, other: Tensor, t: float) -> tuple[float, float]:
    """Returns SLERP's weights of two changes: sin((1 − t) Ω) / sin Ω and sin(t Ω) / sin Ω.

    Where both point the same way, or oppositely, or one is zero, there is no arc, and they are
    1 − t and t.
    """
    first, second = one.flatten().double(), other.flatten().double()
    if not (first.any() and second.any()):
        return 1 - t, t
    cosine = float(torch.cosine_similarity(first, second, dim=0))
    angle = math.acos(max(-1.0, min(1.0, cosine)))
    if math.sin(angle) < 1e-6:
        return 1 - t, t
    return math.sin((1 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle)


def ties(changes: Tensor, weights: Tensor, density: float) -> Tensor:
    """Trims, elects a sign, and averages those that have it: (N, …) → (…).

    The sign is that of the sum before the weights, as in PEFT.
    """
    flat = changes.flatten(1)
    count = max(1, int(density * flat.size(1)))
    kept = torch.zeros_like(flat).scatter(1, flat.abs().topk(count).indices, 1) * flat
    sign = kept.sum(0).sign()
    agreed = (kept.sign() == sign) & (sign != 0)
    mean = (weights[:, None] * kept * agreed).sum(0) / agreed.sum(0).clamp_min(1)
    return mean.view_as(changes[0])


def dare(changes: Tensor, weights: Tensor, density: float, draw: torch.Generator) -> Tensor:
    """Drops entries at random, divides by the share that stays, and sums: (N, …) → (…)."""
    stays = torch.rand(changes.shape, generator=draw) < density
    return torch.einsum("n,n...->...", weights, changes * stays / density)
