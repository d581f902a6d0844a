"""Adapters of our models under the names of the family's checkpoints, and back.

Most names are simply translated. GPT-2 keeps q, k and v in one fused matrix, `c_attn`:

- an update of `c_attn` is exactly three updates that share A and split B by rows, each without the
  components that are zero in its rows;
- updates of q, k and v are exactly one of `c_attn`: the A's stacked, the B's on a block diagonal,
  alpha such that the scale stays (where q, k and v differ in it, the others' B takes the
  difference, rounded);
- DoRA's lengths belong to rows of W + ΔW, so they are split and joined like B.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TypeAlias

import torch
from torch import Tensor, nn

from nanogpt_surgery.errors import SurgeryError, listed
from nanogpt_surgery.formats.huggingface.config import OWN, family_of
from nanogpt_surgery.formats.huggingface.name_map import (
    NAME_MAPS,
    Row,
    each_layer,
    to_ours,
    to_theirs,
)
from nanogpt_surgery.formats.peft.config import CONFIG, MERGE_IN_PEFT
from nanogpt_surgery.history.model_history import tensor_hash
from nanogpt_surgery.lora.inject import bare_layer
from nanogpt_surgery.lora.merging import in_turn
from nanogpt_surgery.lora.stored_adapter import LowRankUpdate, StoredAdapter, Updates, alpha_for
from nanogpt_surgery.lora.variants import as_matrix
from nanogpt_surgery.model.simple_gpt import SimpleGPT

OPEN_ITS_BASE = f"open the base that its {CONFIG} names (base_model_name_or_path)"
Factors: TypeAlias = tuple[Tensor, Tensor]  # A (R, in) and B (out, R)


def rows_of(model: nn.Module) -> list[Row]:
    """Which layers of a model are which of its family's; none where they keep their own names."""
    family = family_of(model.config) if isinstance(model, SimpleGPT) else OWN
    if family == OWN:
        return []
    assert isinstance(model, SimpleGPT)
    return list(each_layer(NAME_MAPS[family], model.config.n_layer))


def base_fingerprint(
    model: nn.Module, names: Iterable[str], known: Mapping[Tensor, str] | None = None
) -> dict[str, str]:
    """The sha256 of the weights at these names, in float32 as (out, in), so in any dtype alike.

    The names are those of the family's checkpoints; a fused matrix is hashed as one. Of the tensors
    in `known` the hash in float32 is known already.
    """
    ours = {row.theirs: row.ours for row in rows_of(model)}
    names = list(names)

    def digest(name: str) -> str:
        parts_of = ours.get(name, [name])
        layer = bare_layer(model, parts_of[0])
        if known and len(parts_of) == 1 and isinstance(layer, nn.Linear) and layer.weight in known:
            return known[layer.weight]
        parts = _matrices(model, parts_of)
        return tensor_hash(torch.cat(parts) if len(parts) > 1 else parts[0])

    return dict(zip(names, in_turn(digest, names), strict=True))


def _matrices(model: nn.Module, names: Iterable[str]) -> list[Tensor]:
    """Weights (out, in), float32."""
    return [as_matrix(bare_layer(model, name)).cpu() for name in names]


def adapter_to_theirs(adapter: StoredAdapter, model: nn.Module) -> StoredAdapter:
    """An adapter of a model under the names of its family."""
    rows = rows_of(model)
    if not rows:
        return adapter
    updates = {}
    for row in rows:
        parts = [adapter.updates.get(name) for name in row.ours]
        if present := [part for part in parts if part is not None]:
            one = len(parts) == 1
            updates[row.theirs] = present[0] if one else _fuse(parts, _matrices(model, row.ours))
    return replace(adapter, updates=updates, whole=to_theirs(adapter.whole, rows))


def adapter_to_ours(adapter: StoredAdapter, model: nn.Module) -> StoredAdapter:
    """The inverse; of a mapped adapter only the numbers of fused matrices are read.

    Raises:
        SurgeryError: it has names that the family has not, or a fused matrix of another size.
    """
    rows = rows_of(model)
    if not rows:
        return adapter
    left, updates = dict(adapter.updates), Updates()
    for row in rows:
        update = left.pop(row.theirs, None)
        if update is not None and len(row.ours) > 1:
            _check_size(update, row, model)
            updates |= split(update, row.ours)
        elif update is not None:
            updates[row.ours[0]] = update
    whole, strange = to_ours(adapter.whole, rows)
    copies, stranger = to_ours({f"{n}.weight": t for n, t in adapter.base_copies.items()}, rows)
    if unknown := [*sorted(left), *strange, *stranger]:
        raise SurgeryError(
            f"this adapter is for another model: this one has no {listed(unknown)}",
            OPEN_ITS_BASE if left else MERGE_IN_PEFT,
        )
    copies = {name.removesuffix(".weight"): tensor for name, tensor in copies.items()}
    return replace(adapter, updates=updates, whole=whole, base_copies=copies)


def _check_size(update: LowRankUpdate, row: Row, model: nn.Module) -> None:
    """Raises `SurgeryError` if what is to be split has not the size that the model's has."""
    matrices = _matrices(model, row.ours)
    wanted = sum(matrix.size(0) for matrix in matrices), matrices[0].size(1)
    found = update.B.size(0), update.A.size(1)
    if found != wanted:
        raise SurgeryError(
            f"this adapter is for another model: {row.theirs} is {wanted} in the model and {found} "
            "in the adapter",
            OPEN_ITS_BASE,
        )


def _fuse(parts: list[LowRankUpdate | None], matrices: list[Tensor]) -> LowRankUpdate:
    """One update of a fused matrix from those of its parts, of which one at least is not None.

    The `matrices` are the parts' weights (out, in), float32.
    """
    present = [part for part in parts if part is not None]
    scale, rslora = present[0].scaling, present[0].rslora
    assert all(part.rslora == rslora for part in present), "an adapter writes its scales one way"
    a, b = block_diagonal(
        [_factors(part, scale) if part is not None else None for part in parts],
        [matrix.size(0) for matrix in matrices],
    )
    norms = None
    if any(part.magnitude is not None for part in present):
        norms = torch.cat([_row_norms(m, p) for m, p in zip(matrices, parts, strict=True)])
    bias = None
    if any(part.bias is not None for part in present):
        pairs = zip(matrices, parts, strict=True)
        bias = torch.cat([_bias(part, matrix.size(0), scale) for matrix, part in pairs])
    return LowRankUpdate(
        a,
        b,
        alpha_for(scale, a.size(0), rslora),
        rslora=rslora,
        magnitude=norms,
        dropout=max(part.dropout for part in present),
        fused_parts=tuple((p.rank, p.alpha, p.initial) if p else None for p in parts),
        bias=bias,
    )


def block_diagonal(parts: Sequence[Factors | None], rows: Sequence[int]) -> Factors:
    """The A's of some updates below each other, their B's on a block diagonal.

    Of each update there are A (R, in) and B (out, R), or None where there is none, and out.
    """
    present = [part for part in parts if part is not None]
    pairs = zip(parts, rows, strict=True)
    blocks = [torch.zeros(out, 0) if part is None else part[1] for part, out in pairs]
    return torch.cat([a for a, _ in present]), torch.block_diag(*blocks)


def _factors(part: LowRankUpdate, scale: float) -> Factors:
    """A and B of a part, as they are with another scale."""
    ratio = part.scaling / scale
    return part.A, part.B if ratio == 1 else part.B * ratio


def _bias(part: LowRankUpdate | None, rows: int, scale: float) -> Tensor:
    """Returns a part's change of the bias at another scale; zeros where there is none."""
    if part is None or part.bias is None:
        return torch.zeros(rows)
    return part.bias if part.scaling == scale else part.bias * (part.scaling / scale)


def _row_norms(matrix: Tensor, part: LowRankUpdate | None) -> Tensor:
    """The lengths of the rows of W + ΔW: those that were learned, or else those they have."""
    if part is not None and part.magnitude is not None:
        return part.magnitude
    changed = matrix if part is None else matrix + part.delta_weight
    return torch.linalg.vector_norm(changed, dim=1)


def split(update: LowRankUpdate, names: tuple[str, ...]) -> Updates:
    """The inverse of `_fuse`, for parts of these names; any other fused update splits as well."""
    count = len(names)
    rows_of_b = update.B.chunk(count)
    norms = [None] * count if update.magnitude is None else update.magnitude.chunk(count)
    biases = _bias_parts(update, count)
    if update.fused_parts is None:
        shares = {
            name: _share(replace(update, bias=bias), b, m)
            for name, b, m, bias in zip(names, rows_of_b, norms, biases, strict=True)
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
    rows = zip(names, rows_of_b, norms, biases, update.fused_parts, strict=True)
    for name, b, m, bias, piece in rows:
        if piece is not None:
            rank, alpha, initial = piece
            taken = slice(start, start := start + rank)
            part = replace(
                update, A=update.A[taken].clone(), B=b[:, taken].clone(), alpha=alpha,
                magnitude=m, initial=initial, fused_parts=None, bias=bias,
            )  # fmt: skip
            ratio = part.scaling / update.scaling
            if abs(ratio - 1) >= 1e-9:
                bias = None if bias is None else bias / ratio
                part = replace(part, B=part.B / ratio, bias=bias)
            parts[name] = part
    return parts


def _bias_parts(update: LowRankUpdate, count: int) -> list[Tensor | None]:
    """The shares of a fused bias's change; None where one is zero."""
    if update.bias is None:
        return [None] * count
    return [part.clone() if bool(part.any()) else None for part in update.bias.chunk(count)]


def _share(update: LowRankUpdate, b: Tensor, magnitude: Tensor | None) -> LowRankUpdate | None:
    """A part's share of a fused update that another program wrote: its rows of B.

    A component that is zero in these rows and not in the others belongs to another part; a part
    that none belongs to has no update.
    """
    own = (b != 0).any(0) | ~(update.B != 0).any(0)  # (R)
    if magnitude is not None or update.bias is not None:
        own = torch.ones_like(own)
    if not own.any():
        return None
    alpha = alpha_for(update.scaling, int(own.sum()), update.rslora)
    return replace(
        update, A=update.A[own], B=b[:, own].clone(), alpha=alpha, magnitude=magnitude, initial=None
    )
