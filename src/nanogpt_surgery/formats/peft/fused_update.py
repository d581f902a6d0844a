"""Updates of parts as one update of the matrix they are fused in, and back.

- An update of GPT-2's `c_attn` is exactly three updates that share A and split B by rows, each
  without the components that are zero in its rows;
- updates of q, k and v are exactly one of `c_attn`: the A's stacked, the B's on a block diagonal,
  alpha such that the scale stays (where q, k and v differ in it, the others' B takes the
  difference, rounded);
- DoRA's lengths belong to rows of W + ΔW, so they are split and joined like B.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from nanogpt_surgery.errors import SurgeryError
from nanogpt_surgery.lora.stored_adapter import LowRankUpdate, Updates, alpha_for


def fuse(parts: list[LowRankUpdate | None], matrices: list[Tensor]) -> LowRankUpdate:
    """One update of a fused matrix from those of its parts.

    Args:
        parts: the parts' updates in their order, None for a part without one; at least one is not.
        matrices: the parts' weights (out, in), float32.
    """
    present = [part for part in parts if part is not None]
    scale, rslora = present[0].scaling, present[0].rslora
    assert all(part.rslora == rslora for part in present), "an adapter writes its scales one way"
    rank = sum(part.rank for part in present)
    blocks, start = [], 0
    for matrix, part in zip(matrices, parts, strict=True):
        block = torch.zeros(matrix.size(0), rank)
        if part is not None:
            ratio = part.scaling / scale
            block[:, start : start + part.rank] = part.B if ratio == 1 else part.B * ratio
            start += part.rank
        blocks.append(block)
    lengths = [_lengths(m, p) for m, p in zip(matrices, parts, strict=True)]
    return LowRankUpdate(
        torch.cat([part.A for part in present]),
        torch.cat(blocks),
        alpha_for(scale, rank, rslora),
        rslora=rslora,
        magnitude=torch.cat(lengths) if any(p.magnitude is not None for p in present) else None,
        dropout=max(part.dropout for part in present),
        pieces=tuple((p.rank, p.alpha, p.birth) if p else None for p in parts),
    )


def _lengths(matrix: Tensor, part: LowRankUpdate | None) -> Tensor:
    """The lengths of the rows of W + ΔW: those that were learned, or else those they have."""
    if part is not None and part.magnitude is not None:
        return part.magnitude
    changed = matrix if part is None else matrix + part.delta_weight
    lengths: Tensor = torch.linalg.vector_norm(changed, dim=1)
    return lengths


def split(update: LowRankUpdate, names: tuple[str, ...]) -> Updates:
    """The inverse of `fuse`, for parts of these names; any other fused update splits as well."""
    count = len(names)
    rows_of_b = update.B.chunk(count)
    lengths = [None] * count if update.magnitude is None else update.magnitude.chunk(count)
    if update.pieces is None:
        shares = {
            name: _share(update, b, m) for name, b, m in zip(names, rows_of_b, lengths, strict=True)
        }
        return {name: share for name, share in shares.items() if share is not None}
    if len(update.pieces) != count:
        raise SurgeryError(
            f"the adapter's surgery.json says that a matrix of {count} parts ({', '.join(names)}) "
            f"was put together from {len(update.pieces)}",
            "delete that surgery.json",
        )
    parts: Updates = {}
    start = 0
    for name, b, m, piece in zip(names, rows_of_b, lengths, update.pieces, strict=True):
        if piece is not None:
            rank, alpha, birth = piece
            taken = slice(start, start := start + rank)
            part = replace(
                update, A=update.A[taken].clone(), B=b[:, taken].clone(), alpha=alpha,
                magnitude=m, birth=birth, pieces=None,
            )  # fmt: skip
            ratio = part.scaling / update.scaling
            parts[name] = part if abs(ratio - 1) < 1e-9 else replace(part, B=part.B / ratio)
    return parts


def _share(update: LowRankUpdate, b: Tensor, magnitude: Tensor | None) -> LowRankUpdate | None:
    """What a part has of a fused update that another program wrote: its rows of B.

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
        update, A=update.A[own], B=b[:, own].clone(), alpha=alpha, magnitude=magnitude, birth=None
    )
