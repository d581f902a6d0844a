"""Adapters of our models under the names of the family's checkpoints, and back.

Most names are simply translated. GPT-2 keeps q, k and v in one fused matrix, `c_attn`:

- an update of `c_attn` is exactly three updates that share A and split B by rows, each without
  the components that are zero in its rows;
- updates of q, k and v are exactly one of `c_attn`: the A's stacked, the B's on a block diagonal,
  alpha added up, so that alpha / rank stays when they agree in it.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from nanogpt_surgery.errors import SurgeryError
from nanogpt_surgery.files import whole_folder
from nanogpt_surgery.formats.huggingface import OWN, family_of
from nanogpt_surgery.formats.name_map import Row, rows
from nanogpt_surgery.formats.run_folder import chosen_checkpoint, is_run
from nanogpt_surgery.lora.adapter import (
    LowRankUpdate,
    Updates,
    apply_updates,
    read_adapter,
    updates_of,
    write_updates,
)
from nanogpt_surgery.lora.lora_linear import LoRALinear
from nanogpt_surgery.model.simple_gpt import SimpleGPT


def save_adapter(model: nn.Module, folder: str | Path, base: str = "") -> None:
    """Write the LoRA that a model carries as a PEFT adapter folder, whole or not at all.

    For a `SimpleGPT` on a family's axes the names are those of transformers' model, on which `peft`
    loads the folder; any other module keeps its own names.

    Args:
        model: carries a LoRA.
        folder: made, or replaced if it is one of ours.
        base: name or path of the base model, for information.

    Raises:
        SurgeryError: there is no LoRA, or the folder holds something else.
    """
    with whole_folder(folder) as temporary:
        write_adapter_files(model, temporary, base)


def write_adapter_files(model: nn.Module, folder: Path, base: str = "") -> None:
    """Write the files of an adapter folder into a folder that is being made."""
    updates, fan_in_fan_out = updates_of(model), False
    if isinstance(model, SimpleGPT) and (family := family_of(model.config)) != OWN:
        updates = _to_theirs(updates, family, model)
        fan_in_fan_out = family == "gpt2"
    write_updates(updates, folder, base, fan_in_fan_out)


def load_adapter(model: nn.Module, folder: str | Path) -> None:
    """Inject the LoRA of a PEFT adapter folder into a model, strictly.

    Raises:
        SurgeryError: the folder is no LoRA adapter or is damaged, or does not fit the model. The
            model is untouched then.
    """
    updates = read_adapter(adapter_folder(folder))
    if isinstance(model, SimpleGPT) and (family := family_of(model.config)) != OWN:
        updates = _to_ours(updates, family, model)
    apply_updates(model, updates)


def adapter_folder(path: str | Path) -> Path:
    """The adapter folder that a path means: itself, or the checkpoint chosen in a run folder."""
    return chosen_checkpoint(Path(path)) if is_run(path) else Path(path)


def _to_theirs(updates: Updates, family: str, model: SimpleGPT) -> Updates:
    converted = {}
    for row in rows(family, model.config.n_layer):
        if any(name in updates for name in row.ours):
            parts = [updates.get(name) for name in row.ours]
            converted[row.theirs] = _fuse(parts, model, row)
    return converted


def _fuse(parts: list[LowRankUpdate | None], model: SimpleGPT, row: Row) -> LowRankUpdate:
    present = [part for part in parts if part is not None]
    if len(parts) == 1:
        return present[0]
    scale = present[0].alpha / present[0].rank
    rank = sum(part.rank for part in present)
    blocks, start = [], 0
    for name, part in zip(row.ours, parts, strict=True):
        block = torch.zeros(_out_features(model, name), rank)
        if part is not None:
            block[:, start : start + part.rank] = part.B * (part.alpha / part.rank / scale)
            start += part.rank
        blocks.append(block)
    a = torch.cat([part.A for part in present])
    return LowRankUpdate(a, torch.cat(blocks), scale * rank)


def _out_features(model: SimpleGPT, name: str) -> int:
    layer = model.get_submodule(name)
    linear = layer.original_layer if isinstance(layer, LoRALinear) else layer
    assert isinstance(linear, nn.Linear)
    return linear.out_features


def _to_ours(updates: Updates, family: str, model: SimpleGPT) -> Updates:
    left = dict(updates)
    converted: Updates = {}
    for row in rows(family, model.config.n_layer):
        update = left.pop(row.theirs, None)
        if update is not None:
            parts = zip(row.ours, update.B.chunk(len(row.ours)), strict=True)
            split = {name: _part(update, b) for name, b in parts}
            converted |= {name: part for name, part in split.items() if part is not None}
    if left:
        raise SurgeryError(
            f"this adapter is for another model: a {family} of {model.config.n_layer} layers has "
            f"no {', '.join(sorted(left))}"
        )
    return converted


def _part(update: LowRankUpdate, b: Tensor) -> LowRankUpdate | None:
    """The share of a fused update that a part has: its rows of B, without what is not its own.

    A component that is zero in these rows and not in the others belongs to another part (this is
    how `_fuse` lays them out); a part that no component belongs to has no update.
    """
    own = (b != 0).any(0) | ~(update.B != 0).any(0)  # (R)
    scale = update.alpha / update.rank
    rank = int(own.sum())
    return LowRankUpdate(update.A[own], b[:, own], scale * rank) if rank else None
