"""An adapter as vLLM and SGLang take it: plain LoRA of one rank, the scale folded into B.

Both read PEFT's folder, but one rank and one alpha for all layers, no DoRA and no module that is
replaced whole; vLLM keeps room for ranks from a fixed list. So every layer's update is written as
B A of one rank of that list, filled up with zeros, and alpha is that rank. What is no such product
is refused, or brought to its nearest one of a rank that the caller names, with its error.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanogpt_surgery.arguments import check_arguments
from nanogpt_surgery.errors import SurgeryError, listed
from nanogpt_surgery.files.atomic import write_folder
from nanogpt_surgery.files.writing import write_json
from nanogpt_surgery.formats.huggingface.config import existing_family_of
from nanogpt_surgery.formats.huggingface.safetensors_file import write_tensors
from nanogpt_surgery.formats.peft.config import CONFIG, config_for
from nanogpt_surgery.formats.peft.layout import Factors, adapter_to_theirs
from nanogpt_surgery.formats.peft.reading import TENSORS, read_adapter
from nanogpt_surgery.formats.peft.writing import tensors_of
from nanogpt_surgery.lora.linear import LoRAUpdate
from nanogpt_surgery.lora.several import lora_layers
from nanogpt_surgery.lora.stored_adapter import (
    LowRankUpdate,
    StoredAdapter,
    chosen_adapter,
    extract_adapter,
)
from nanogpt_surgery.model.simple_gpt import SimpleGPT
from nanogpt_surgery.report import Report
from nanogpt_surgery.surgery.low_rank import factorised, truncated

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # that vLLM's max_lora_rank can be
MERGE = "merge_lora(model) and hand on the whole model"


@check_arguments
def save_vllm_adapter(
    model: SimpleGPT, folder: str | Path, base: str = "", *, rank: int | None = None
) -> Report:
    """Writes the LoRA that a model carries as vLLM and SGLang take it, whole or not at all.

    Args:
        model: carries the adapter.
        folder: made, or replaced if it is one of ours.
        base: name or path of the base model, for information.
        rank: bring each layer's change to its nearest product of this rank, by singular values;
            DoRA, and Linears that were trained whole, go in no other way.

    Returns:
        A row for each layer: its own rank, that of the file, ‖ΔW‖, and the error,
        ‖ΔW − ΔW'‖ / ‖ΔW‖.

    Raises:
        SurgeryError: there is no LoRA, or it adapts what these engines do not: GPT-2, embeddings, a
            tied head, norms; without `rank`, DoRA and modules that were trained whole.
    """
    if rank is not None and not 1 <= rank <= RANKS[-1]:
        raise SurgeryError(f"rank is {rank}; it must be from 1 to {RANKS[-1]}")
    _check_family(model)
    exact = _changes(model, rank is not None)
    factors = {path: _at_rank(change, rank) for path, change in exact.items()}
    longest = max(len(a) for a, _ in factors.values())
    if longest > RANKS[-1]:
        raise SurgeryError(f"a layer has the rank {longest}; vLLM takes {RANKS[-1]}", "rank=64")
    common = next(one for one in RANKS if one >= longest)
    updates = {path: _filled(pair, common) for path, pair in factors.items()}
    adapter = adapter_to_theirs(StoredAdapter(updates), model)

    def write(new: Path) -> None:
        config = config_for(adapter, base)
        write_json(new / CONFIG, config | {"target_modules": _targets(model, adapter)})
        write_tensors(tensors_of(adapter), new / TENSORS)
        _check(adapter, read_adapter(new))

    write_folder(folder, write)
    rows = [_row(path, exact[path], factors[path], common) for path in factors]
    error = max(row["error"] for row in rows)
    return Report("adapter for vLLM", rows, {"rank": common, "largest_layer_error": error})


def _check_family(model: SimpleGPT) -> None:
    family = existing_family_of(model.config)
    if family == "gpt2":
        raise SurgeryError("vLLM and SGLang take no adapters for GPT-2", MERGE)


def _changes(model: SimpleGPT, as_matrices: bool) -> dict[str, Factors | Tensor]:
    """Returns each layer's change: A and s · B, or ΔW (out, in) where it is no such product.

    Raises:
        SurgeryError: a change has no place in these engines, or is none of rank R and
            `as_matrices` is false.
    """
    adapter, name = extract_adapter(model), chosen_adapter(model)
    layers: dict[str, Any] = {p: w for p, w in lora_layers(model).items() if name in w.updates}
    wrong = [path for path, wrapper in layers.items() if not _is_linear(wrapper, name)]
    if model.config.tie_head:
        wrong += [path for path in layers if path == "lm_head"]
    wrong += [path for path, update in adapter.updates.items() if update.bias is not None]
    if wrong:
        raise SurgeryError(
            "vLLM and SGLang adapt the weights of Linears that are tied to nothing, and not "
            f"{listed(wrong)}",
            MERGE,
        )
    plain = {p: u for p, u in adapter.updates.items() if u.magnitude is None}
    others = [path for path in layers if path not in plain]
    if others and not as_matrices:
        raise SurgeryError(
            f"{listed(others)}: DoRA, or trained whole, which is no product of two matrices",
            "rank=64 writes the nearest product and its error; or " + MERGE,
        )
    return {
        path: _factors(plain[path]) if path in plain else _delta(wrapper, name)
        for path, wrapper in layers.items()
    }


def _is_linear(wrapper: Any, name: str) -> bool:
    """Whether a layer is a Linear of which the weight alone changes."""
    layer, copy = wrapper.original_layer, getattr(wrapper.updates[name], "module", None)
    same_bias = copy is None or layer.bias is None or torch.equal(copy.bias, layer.bias)
    return isinstance(layer, nn.Linear) and same_bias


def _factors(update: LowRankUpdate) -> Factors:
    return update.A, update.scaling * update.B


def _delta(wrapper: Any, name: str) -> Tensor:
    update, layer = wrapper.updates[name], wrapper.original_layer
    if isinstance(update, LoRAUpdate):
        return update.delta_weight(layer).detach().float()
    return (update.module.weight - layer.weight).detach().float()


def _at_rank(change: Factors | Tensor, rank: int | None) -> Factors:
    if isinstance(change, Tensor):
        return factorised(change, rank, None)
    return change if rank is None or rank >= len(change[0]) else truncated(change, rank, None)


def _filled(factors: Factors, rank: int) -> LowRankUpdate:
    a, b = factors
    more = rank - len(a)
    return LowRankUpdate(F.pad(a, (0, 0, 0, more)), F.pad(b, (0, more)), alpha=float(rank))


def _targets(model: SimpleGPT, adapter: StoredAdapter) -> list[str]:
    """Returns the last words of the layers' names, where they mean these layers and no others."""
    words = {name.rpartition(".")[2] for name in adapter.updates}
    meant = sum(
        name.rpartition(".")[2] in words
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and not {"original_layer", "updates"} & {*name.split(".")}
    )
    wrapped = sum(path.rpartition(".")[2] in words for path in lora_layers(model))
    return sorted(words if meant + wrapped == len(adapter.updates) else adapter.updates)


def _check(adapter: StoredAdapter, found: StoredAdapter) -> None:
    """Raises `SurgeryError` if what was written reads back as anything else."""
    wrong = [
        name
        for name, update in adapter.updates.items()
        if not torch.equal(found.updates[name].delta_weight, update.delta_weight)
    ]
    if wrong or found.updates.keys() != adapter.updates.keys():
        raise SurgeryError(f"what was written does not read back: {listed(wrong)}")


def _row(path: str, change: Factors | Tensor, factors: Factors, common: int) -> dict[str, Any]:
    exact = change if isinstance(change, Tensor) else change[1] @ change[0]
    size, error = float(exact.norm()), float((factors[1] @ factors[0] - exact).norm())
    own = None if isinstance(change, Tensor) else len(change[0])
    relative = 0.0 if factors is change else error / max(size, 1e-30)
    return {"layer": path, "rank": own, "written": common, "‖ΔW‖": size, "error": relative}
