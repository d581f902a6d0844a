"""Updates of parts as one update of the matrix they are fused in, and back.

- An update of GPT-2's `c_attn` is exactly three updates that share A and split B by rows, each
  without the components that are zero in its rows;
- updates of q, k and v are exactly one of `c_attn`: the A's stacked, the B's on a block diagonal,
  alpha such that the scale stays (where q, k and v differ in it, the others' B takes the
  difference, rounded);
- DoRA's lengths belong to rows of W + ΔW, so they are split and joined like B.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TypeAlias

import torch
from torch import Tensor

from nanogpt_surgery.errors import SurgeryError
from nanogpt_surgery.lora.stored_adapter import LowRankUpdate, Updates, alpha_for

Factors: TypeAlias = tuple[Tensor, Tensor]  # A (R, in) and B (out, R)


def fuse(parts: list[LowRankUpdate | None], matrices: list[Tensor]) -> LowRankUpdate:
    """One update of a fused matrix from those of its parts.

    Args:
        parts: the parts' updates in their order, None for a part without one; at least one is not.
        matrices: the parts' weights (out, in), float32.
    """
    present = [part for part in parts if part is not None]
    scale, rslora = present[0].scaling, present[0].rslora
    assert all(part.rslora == rslora for part in present), "an adapter writes its scales one way"
    a, b = block_diagonal(
        [_factors(part, scale) if part is not None else None for part in parts],
        [matrix.size(0) for matrix in matrices],
    )
    norms = [_row_norms(m, p) for m, p in zip(matrices, parts, strict=True)]
    return LowRankUpdate(
        a,
        b,
        alpha_for(scale, a.size(0), rslora),
        rslora=rslora,
        magnitude=torch.cat(norms) if any(p.magnitude is not None for p in present) else None,
        dropout=max(part.dropout for part in present),
        fused_parts=tuple((p.rank, p.alpha, p.initial) if p else None for p in parts),
    )


def block_diagonal(parts: Sequence[Factors | None], rows: Sequence[int]) -> Factors:
    """The A's of some updates below each other, their B's on a block diagonal.

    Args:
        parts: A (R, in) and B (out, R) of each update, None where there is none.
        rows: out, of each.
    """
    present = [part for part in parts if part is not None]
    pairs = zip(parts, rows, strict=True)
    blocks = [torch.zeros(out, 0) if part is None else part[1] for part, out in pairs]
    joined: Tensor = torch.block_diag(*blocks)
    return torch.cat([a for a, _ in present]), joined


def _factors(part: LowRankUpdate, scale: float) -> Factors:
    """A and B of a part, as they are with another scale."""
    ratio = part.scaling / scale
    return part.A, part.B if ratio == 1 else part.B * ratio


def _row_norms(matrix: Tensor, part: LowRankUpdate | None) -> Tensor:
    """The lengths of the rows of W + ΔW: those that were learned, or else those they have."""
    if part is not None and part.magnitude is not None:
        return part.magnitude
    changed = matrix if part is None else matrix + part.delta_weight
    return torch.linalg.vector_norm(changed, dim=1)


def split(update: LowRankUpdate, names: tuple[str, ...]) -> Updates:
    """The inverse of `fuse`, for parts of these names; any other fused update splits as well."""
    count = len(names)
    rows_of_b = update.B.chunk(count)
    norms = [None] * count if update.magnitude is None else update.magnitude.chunk(count)
    if update.fused_parts is None:
        shares = {
            name: _share(update, b, m) for name, b, m in zip(names, rows_of_b, norms, strict=True)
        }
        return {name: share for name, share in shares.items() if share is not None}
    if len(update.fused_parts) != count:
        raise SurgeryError(
            f"the adapter's surgery.json says that a matrix of {count} parts ({', '.join(names)}) "
            f"was put together from {len(update.fused_parts)}",
            "delete that surgery.json",
        )
    parts: Updates = {}
    start = 0
    for name, b, m, piece in zip(names, rows_of_b, norms, update.fused_parts, strict=True):
        if piece is not None:
            rank, alpha, initial = piece
            taken = slice(start, start := start + rank)
            part = replace(
                update, A=update.A[taken].clone(), B=b[:, taken].clone(), alpha=alpha,
                magnitude=m, initial=initial, fused_parts=None,
            )  # fmt: skip
            ratio = part.scaling / update.scaling
            parts[name] = part if abs(ratio - 1) < 1e-9 else replace(part, B=part.B / ratio)
    return parts


def _share(update: LowRankUpdate, b: Tensor, magnitude: Tensor | None) -> LowRankUpdate | None:
    """A part's share of a fused update that another program wrote: its rows of B.

    A component that is zero in these rows and not in the others belongs to another part; a part
    that none belongs to has no update.
    """
    own = (b != 0).any(0) | ~(update.B != 0).any(0)  # (R)
    if magnitude is not None:
        own = torch.ones_like(own)
    if not own.any():
        return None
    alpha = alpha_for(update.scaling, int(own.sum()), update.rslora)
    return replace(
        update, A=update.A[own], B=b[:, own].clone(), alpha=alpha, magnitude=magnitude, initial=None
    )
