"""Matrices of low rank as two thin factors: ΔW = B A.

Legend: R rank, r rank after truncation.
"""

from __future__ import annotations

from typing import TypeAlias

import torch
from torch import Tensor

from nanogpt_surgery.errors import SurgeryError

Factors: TypeAlias = tuple[Tensor, Tensor]
"""A (R, in) and B (out, R), float32."""


def truncated(factors: Factors, rank: int | None, energy: float | None) -> Factors:
    """Returns the nearest product of a smaller rank (Eckart & Young, 1936), never built itself.

    Args:
        factors: A (R, in) and B (out, R).
        rank: r at most; None: as many as `energy` asks for.
        energy: the least share of ‖B A‖² that is kept, if no rank is given.
    """
    a, b = factors
    (q_a, r_a), (q_b, r_b) = torch.linalg.qr(a.T), torch.linalg.qr(b)
    u, s, vh = torch.linalg.svd(r_b @ r_a.T)
    kept = _count(s, rank, energy)
    root = s[:kept].sqrt()
    u, vh = u[:, :kept], vh[:kept]  # (·, r), (r, ·)
    return (root[:, None] * (vh @ q_a.T)).contiguous(), (q_b @ (u * root)).contiguous()


def factorised(matrix: Tensor, rank: int | None, energy: float | None) -> Factors:
    """Returns the factors of the nearest matrix of a smaller rank to one (out, in)."""
    u, s, vh = torch.linalg.svd(matrix.float(), full_matrices=False)
    kept = _count(s, rank, energy)
    root = s[:kept].sqrt()
    return (root[:, None] * vh[:kept]).contiguous(), (u[:, :kept] * root).contiguous()


def _count(values: Tensor, rank: int | None, energy: float | None) -> int:
    """Returns how many singular values are kept; those that are rounding never are."""
    there = max(1, int((values > 1e-7 * values.amax()).sum()))
    if rank is not None:
        return min(rank, there)
    squares = values.double().square()
    total = squares.sum()
    if energy is None or energy >= 1 or total == 0:
        return there
    return min(there, int((squares.cumsum(0) < energy * total).sum()) + 1)


def check_rank_or_energy(rank: int | None, energy: float | None, needed: bool) -> None:
    """Raises `SurgeryError` unless both are in their ranges, and one at most is given."""
    if rank is not None and rank < 1:
        raise SurgeryError(f"rank is {rank}; it must be at least 1")
    if energy is not None and not 0 < energy <= 1:
        raise SurgeryError(f"energy is {energy}; it must be above 0 and at most 1")
    if rank is not None and energy is not None:
        raise SurgeryError(f"both a rank ({rank}) and an energy ({energy}) are given", "give one")
    if needed and rank is None and energy is None:
        raise SurgeryError("neither a rank nor an energy is given", "rank=8, or energy=0.9")
