"""Adapters of our models under the names of the family's checkpoints, and back.

Most names are simply translated. GPT-2 keeps q, k and v in one fused matrix, `c_attn`:

- an update of `c_attn` is exactly three updates that share A and split B by rows, each without
  the components that are zero in its rows;
- updates of q, k and v are exactly one of `c_attn`: the A's stacked, the B's on a block diagonal,
  alpha such that the scale stays (where q, k and v differ in it, the others' B takes the
  difference, rounded);
- DoRA's lengths belong to rows of W + ΔW, so they are split and joined like B.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from nanogpt_surgery.errors import SurgeryError
from nanogpt_surgery.files import whole_folder
from nanogpt_surgery.formats.huggingface import OWN, family_of
from nanogpt_surgery.formats.name_map import Row, rows, to_ours, to_theirs
from nanogpt_surgery.lora.adapter import read_stored, write_stored
from nanogpt_surgery.lora.hashing import tensor_hash
from nanogpt_surgery.lora.planning import check_new_name
from nanogpt_surgery.lora.report import Report
from nanogpt_surgery.lora.stored import LowRankUpdate, StoredAdapter, Updates, alpha_for
from nanogpt_surgery.lora.ties import Tied
from nanogpt_surgery.lora.transplant import check_fit, compare_fingerprint, put_on, take_off
from nanogpt_surgery.lora.update import as_matrix
from nanogpt_surgery.lora.wrapping import bare, report_on
from nanogpt_surgery.model.simple_gpt import SimpleGPT


def save_adapter(
    model: nn.Module, folder: str | Path, base: str = "", *, name: str | None = None
) -> Report:
    """Write an adapter of a model as a PEFT adapter folder, whole or not at all.

    For a `SimpleGPT` on a family's axes the names are those of transformers' model, on which `peft`
    loads the folder; any other module keeps its own names. What is written is read again and
    compared before it counts.

    Args:
        model: carries a LoRA.
        folder: made, or replaced if it is one of ours.
        base: name or path of the base model, for information.
        name: of the adapter; by default the only one, or the one that takes part.

    Raises:
        SurgeryError: there is no LoRA, it is not clear which, or the folder holds something else.
    """
    with whole_folder(folder) as temporary:
        write_adapter_files(model, temporary, base, name=name)
    return report_on(model, f"LoRA saved to {folder}")


def write_adapter_files(
    model: nn.Module, folder: Path, base: str = "", *, name: str | None = None
) -> None:
    """Write the files of an adapter folder into a folder that is being made."""
    adapter, family = take_off(model, name), _family(model)
    if family is not None:
        assert isinstance(model, SimpleGPT)
        adapter = replace(
            adapter,
            updates=_to_theirs(adapter.updates, family, model),
            whole=to_theirs(adapter.whole, family, model.config.n_layer),
        )
    adapter = replace(adapter, fingerprint=base_fingerprint(model, adapter.updates))
    write_stored(adapter, folder, base, fan_in_fan_out=family == "gpt2")


def load_adapter(
    model: nn.Module,
    folder: str | Path,
    *,
    name: str = "default",
    tied: Tied | None = None,
    force: bool = False,
) -> Report:
    """Put the LoRA of a PEFT adapter folder on a model, strictly; it then takes part alone.

    Args:
        model: changed in place.
        folder: as `save_adapter` or PEFT writes it.
        name: for the adapter on this model.
        tied: what to do with layers that share a weight: "refuse", "untie" or "both"; by default
            what the adapter was made with.
        force: warn, instead of refusing, when the adapter was made for another base.

    Raises:
        SurgeryError: the folder is no LoRA adapter or is damaged, does not fit the model, or was
            made for another one. The model is untouched then.
    """
    adapter, family = read_stored(Path(folder)), _family(model)
    theirs = adapter.updates
    if family is not None:
        assert isinstance(model, SimpleGPT)
        adapter = _adapter_to_ours(adapter, family, model)
    check_new_name(model, name)
    check_fit(model, adapter)
    known = [path for path in theirs if path in adapter.fingerprint and _there(model, path)]
    actual = base_fingerprint(model, known)
    compare_fingerprint({path: adapter.fingerprint[path] for path in known}, actual, force)
    return put_on(model, adapter, name, tied)


def base_fingerprint(model: nn.Module, names: Iterable[str]) -> dict[str, str]:
    """The sha256 of the weights at these names, in float32 as (out, in), so in any dtype alike.

    The names are those of the family's checkpoints; a fused matrix is hashed as one.
    """
    return {name: tensor_hash(_matrix(model, name)) for name in names}


def _matrix(model: nn.Module, name: str) -> Tensor:
    return torch.cat([as_matrix(bare(model, ours)).cpu() for ours in _ours(model, name)])


def _ours(model: nn.Module, name: str) -> tuple[str, ...]:
    """Our layers that are one of theirs."""
    family = _family(model)
    if family is None:
        return (name,)
    assert isinstance(model, SimpleGPT)
    return next((r.ours for r in rows(family, model.config.n_layer) if r.theirs == name), ())


def _there(model: nn.Module, name: str) -> bool:
    modules = dict(model.named_modules())
    ours = _ours(model, name)
    return bool(ours) and all(path in modules for path in ours)


def _family(model: nn.Module) -> str | None:
    """The family whose names a model's adapters are written in; None for its own names."""
    family = family_of(model.config) if isinstance(model, SimpleGPT) else OWN
    return None if family == OWN else family


def _to_theirs(updates: Updates, family: str, model: SimpleGPT) -> Updates:
    converted = {}
    for row in rows(family, model.config.n_layer):
        if any(name in updates for name in row.ours):
            parts = [updates.get(name) for name in row.ours]
            one = parts[0]
            converted[row.theirs] = (
                one if len(parts) == 1 and one is not None else _fuse(parts, model, row)
            )
    return converted


def _fuse(parts: list[LowRankUpdate | None], model: SimpleGPT, row: Row) -> LowRankUpdate:
    present = [part for part in parts if part is not None]
    scale, rslora = present[0].scaling, present[0].rslora
    rank = sum(part.rank for part in present)
    matrices = [as_matrix(bare(model, name)).cpu() for name in row.ours]
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


def _adapter_to_ours(adapter: StoredAdapter, family: str, model: SimpleGPT) -> StoredAdapter:
    layers = model.config.n_layer
    copies = {f"{name}.weight": tensor for name, tensor in adapter.base_copies.items()}
    copies, strange = to_ours(copies, family, layers)
    whole, stranger = to_ours(adapter.whole, family, layers)
    if strange or stranger:
        raise SurgeryError(
            f"this adapter is for another model: a {family} has no {', '.join(strange + stranger)}"
        )
    return replace(
        adapter,
        updates=_to_ours(adapter.updates, family, model),
        whole=whole,
        base_copies={name.removesuffix(".weight"): tensor for name, tensor in copies.items()},
    )


def _to_ours(updates: Updates, family: str, model: SimpleGPT) -> Updates:
    left = dict(updates)
    converted: Updates = {}
    for row in rows(family, model.config.n_layer):
        update = left.pop(row.theirs, None)
        if update is not None:
            converted |= {row.ours[0]: update} if len(row.ours) == 1 else _split(update, row)
    if left:
        raise SurgeryError(
            f"this adapter is for another model: a {family} of {model.config.n_layer} layers has "
            f"no {', '.join(sorted(left))}"
        )
    return converted


def _split(update: LowRankUpdate, row: Row) -> Updates:
    """An update of a fused matrix as updates of its parts."""
    count = len(row.ours)
    rows_of_b = update.B.chunk(count)
    lengths = [None] * count if update.magnitude is None else update.magnitude.chunk(count)
    if update.pieces is None:
        shares = {
            name: _share(update, b, m)
            for name, b, m in zip(row.ours, rows_of_b, lengths, strict=True)
        }
        return {name: share for name, share in shares.items() if share is not None}
    parts: Updates = {}
    start = 0
    for name, b, m, piece in zip(row.ours, rows_of_b, lengths, update.pieces, strict=True):
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
    return replace(update, A=update.A[own], B=b[:, own].clone(), alpha=alpha, magnitude=magnitude)
