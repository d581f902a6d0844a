"""The adapter folder, in PEFT's own format: `adapter_config.json` and `adapter_model.safetensors`.

What is stored is a set of named low-rank updates. The names in the file are those of the model that
PEFT will load it on; `formats/` supplies the map for our own models, and for any other module the
names are its own.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from nanogpt_surgery.errors import SurgeryError, nearest
from nanogpt_surgery.files import read_json, refuse_damage, write_json, write_tensors
from nanogpt_surgery.lora.operations import inject_lora, lora_layers
from nanogpt_surgery.lora.targets import linear_names

CONFIG = "adapter_config.json"
TENSORS = "adapter_model.safetensors"
_PREFIX = "base_model.model."

# What a config may say without changing the result, beside what we read; all else is refused.
_INERT_UNLESS_SET = """
    use_dora use_rslora lora_bias modules_to_save layer_replication target_parameters
    trainable_token_indices exclude_modules layers_to_transform layers_pattern
    alora_invocation_tokens arrow_config use_qalora velora_config use_bdlora kasa_config
    monteclora_config
""".split()
_INERT_INITIALISATIONS = (
    True,
    False,
    None,
    "gaussian",
    "eva",
    "orthogonal",
)  # leave the base alone


@dataclass(frozen=True)
class LowRankUpdate:
    """ΔW = (alpha / R) · B A, for one layer.

    `A` is (R, in) and `B` is (out, R), both float32.
    """

    A: Tensor
    B: Tensor
    alpha: float

    @property
    def rank(self) -> int:
        """R."""
        return self.A.size(0)

    @property
    def delta_weight(self) -> Tensor:
        """ΔW, (out, in), float32."""
        return self.alpha / self.rank * (self.B @ self.A)

    @property
    def singular_values(self) -> Tensor:
        """Those of ΔW that can be other than zero, (R), largest first; ΔW is never built."""
        _, b = torch.linalg.qr(self.B)  # (R, R)
        _, a = torch.linalg.qr(self.A.t())  # (R, R)
        values: Tensor = torch.linalg.svdvals(b @ a.t())
        return self.alpha / self.rank * values


Updates = dict[str, LowRankUpdate]


def updates_of(model: nn.Module) -> Updates:
    """Copies of the updates that a model carries, by the name of the layer."""
    return {
        name: LowRankUpdate(
            layer.lora_A.detach().float().cpu().clone(),
            layer.lora_B.detach().float().cpu().clone(),
            layer.alpha,
        )
        for name, layer in lora_layers(model).items()
    }


def apply_updates(model: nn.Module, updates: Updates) -> None:
    """Wrap the layers of a model and give them these updates.

    Raises:
        SurgeryError: a layer is missing in the model, or its shape differs (all of them at once),
            or the model carries a LoRA already. The model is untouched then.
    """
    _check_fit(model, updates)
    inject_lora(model, [f"(?:{re.escape(name)})" for name in updates], rank=1)
    for name, layer in lora_layers(model).items():
        update = updates[name]
        weight = layer.original_layer.weight
        layer.lora_A = nn.Parameter(update.A.to(weight.device))
        layer.lora_B = nn.Parameter(update.B.to(weight.device))
        layer.rank, layer.alpha, layer.scaling = (
            update.rank,
            update.alpha,
            update.alpha / update.rank,
        )


def _check_fit(model: nn.Module, updates: Updates) -> None:
    linears = {name: model.get_submodule(name) for name in linear_names(model)}
    problems = []
    for name, update in updates.items():
        if name not in linears:
            problems.append(f"there is no Linear {name!r} (nearest: {nearest(name, linears)})")
            continue
        wanted = (update.B.size(0), update.A.size(1))
        actual = tuple(linears[name].get_parameter("weight").shape)
        if actual != wanted:
            problems.append(f"{name} is {actual} in the model and {wanted} in the adapter")
    if problems:
        raise SurgeryError("this adapter is for another model: " + "; ".join(problems))


def write_updates(
    updates: Updates, folder: Path, base: str = "", fan_in_fan_out: bool = False
) -> None:
    """Write updates as the files of a PEFT adapter folder.

    Args:
        updates: by the layer's name in the model that PEFT will load it on.
        folder: one that is being made.
        base: name or path of the base model, for information.
        fan_in_fan_out: the base stores its matrices transposed (GPT-2's Conv1D).
    """
    tensors = {}
    for name, update in updates.items():
        tensors[f"{_PREFIX}{name}.lora_A.weight"] = update.A.contiguous()
        tensors[f"{_PREFIX}{name}.lora_B.weight"] = update.B.contiguous()
    write_json(folder / CONFIG, _config(updates, base, fan_in_fan_out))
    write_tensors(tensors, folder / TENSORS)


def _config(updates: Updates, base: str, fan_in_fan_out: bool) -> dict[str, Any]:
    rank = Counter(update.rank for update in updates.values()).most_common(1)[0][0]
    alpha = Counter(update.alpha for update in updates.values()).most_common(1)[0][0]
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base or None,
        "revision": None,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "target_modules": sorted(updates),
        "rank_pattern": {re.escape(n): u.rank for n, u in updates.items() if u.rank != rank},
        "alpha_pattern": {re.escape(n): u.alpha for n, u in updates.items() if u.alpha != alpha},
        "bias": "none",
        "fan_in_fan_out": fan_in_fan_out,
        "use_rslora": False,
        "use_dora": False,
        "modules_to_save": None,
        "init_lora_weights": True,
        "inference_mode": True,
    }


def read_adapter(folder: str | Path) -> Updates:
    """The updates in a PEFT adapter folder, by the names in the file.

    Raises:
        SurgeryError: the folder is not a LoRA adapter's or is damaged, says something that would
            change the result and that is not understood, or holds a tensor without its partner.
    """
    folder = Path(folder)
    refuse_damage(folder)
    config = read_json(folder / CONFIG)
    _refuse_unknown(config, folder)
    tensors = _read_tensors(folder / TENSORS)
    updates = {}
    for key in [key for key in tensors if key.endswith(".lora_A.weight")]:
        name = key.removesuffix(".lora_A.weight")
        a, b = tensors.pop(key), tensors.pop(f"{name}.lora_B.weight", None)
        name = name.removeprefix(_PREFIX)
        if b is None or a.dim() != 2 or b.dim() != 2 or a.size(0) != b.size(1):
            raise SurgeryError(f"{folder / TENSORS}: lora_A of {name} has no lora_B of its rank")
        alpha = _by_pattern(config.get("alpha_pattern"), name, config.get("lora_alpha", 8))
        updates[name] = LowRankUpdate(a.float(), b.float(), alpha)
    if tensors or not updates:
        extra = ", ".join(sorted(tensors)) or "no LoRA at all"
        raise SurgeryError(f"{folder / TENSORS} holds what is not understood: {extra}")
    return updates


def _refuse_unknown(config: dict[str, Any], folder: Path) -> None:
    if config.get("peft_type") != "LORA":
        raise SurgeryError(
            f"{folder} is a {config.get('peft_type', 'folder without peft_type')}, not a LORA"
        )
    set_options = [key for key in _INERT_UNLESS_SET if config.get(key)]
    if config.get("bias", "none") != "none":
        set_options.append("bias")
    if config.get("init_lora_weights", True) not in _INERT_INITIALISATIONS:
        set_options.append(f"init_lora_weights {config['init_lora_weights']!r}")
    if set_options:
        raise SurgeryError(
            f"{folder / CONFIG} sets {', '.join(set_options)}, which would change the result and "
            "is not supported"
        )


def _by_pattern(patterns: dict[str, float] | None, name: str, default: float) -> float:
    for pattern, value in (patterns or {}).items():
        if re.match(rf"^(.*\.)?({pattern})$", name):
            return value
    return default


def _read_tensors(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise SurgeryError(f"{path} is missing", "an adapter is a folder as PEFT writes it")
    try:
        with safe_open(path, "pt") as file:
            return {key: file.get_tensor(key).to(torch.float32) for key in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise SurgeryError(f"{path} is not a safetensors file: {error}") from None
