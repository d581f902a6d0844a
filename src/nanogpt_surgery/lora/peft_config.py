"""`adapter_config.json`: what PEFT writes into it and what may stand there."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from nanogpt_surgery.errors import SurgeryError
from nanogpt_surgery.lora.settings import LoRASettings
from nanogpt_surgery.lora.stored import Updates

CONFIG = "adapter_config.json"

# Options that change the result and that we do not have; unset, they say nothing. Which layers were
# chosen (layers_to_transform, exclude_modules, …) shows in the tensors.
_CHANGE_THE_RESULT = """
    lora_bias layer_replication target_parameters trainable_token_indices alora_invocation_tokens
    arrow_config use_qalora velora_config use_bdlora kasa_config monteclora_config
""".split()
_NO_TARGETS = "dummy-target-modules"  # PEFT's word for an adapter without any update
# How A and B were born is past, unless the birth changed the base, as PEFT's "pissa" does.
_HARMLESS_BIRTHS = (True, False, None, "gaussian", "eva", "orthogonal")


def config_for(
    updates: Updates, whole: Iterable[str], base: str, fan_in_fan_out: bool
) -> dict[str, Any]:
    """The contents of the file for these updates, and modules replaced whole."""
    ranks = {name: update.rank for name, update in updates.items()}
    alphas = {name: update.alpha for name, update in updates.items()}
    rank, rank_pattern = _usual(ranks, LoRASettings.rank)
    alpha, alpha_pattern = _usual(alphas, LoRASettings.alpha)
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base or None,
        "revision": None,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": max((update.dropout for update in updates.values()), default=0.0),
        "target_modules": sorted(updates) or _NO_TARGETS,
        "rank_pattern": rank_pattern,
        "alpha_pattern": alpha_pattern,
        "bias": "none",
        "fan_in_fan_out": fan_in_fan_out,
        "use_rslora": any(update.rslora for update in updates.values()),
        "use_dora": any(update.magnitude is not None for update in updates.values()),
        "modules_to_save": sorted(whole) or None,
        "init_lora_weights": True,
        "inference_mode": True,
    }


def _usual(values: dict[str, Any], default: Any) -> tuple[Any, dict[str, Any]]:
    """The commonest value, or the default of none, and a pattern for each name with another."""
    usual = Counter(values.values()).most_common(1)[0][0] if values else default
    return usual, {_pattern(name, values): v for name, v in values.items() if v != usual}


def _pattern(name: str, names: Iterable[str]) -> str:
    """The expression that is for this name alone: PEFT's match endings, the first one counts."""
    ends_another = any(other.endswith(f".{name}") for other in names)
    return f"^{re.escape(name)}" if ends_another else re.escape(name)


def refuse_unknown(config: dict[str, Any], folder: Path) -> None:
    """Raise `SurgeryError`, with all their names, if options are set that we do not have."""
    if config.get("peft_type") != "LORA":
        raise SurgeryError(
            f"{folder} is a {config.get('peft_type', 'folder without peft_type')}, not a LORA"
        )
    found = [key for key in _CHANGE_THE_RESULT if config.get(key)]
    if config.get("bias", "none") != "none":
        found.append("bias")
    if config.get("init_lora_weights", True) not in _HARMLESS_BIRTHS:
        found.append(f"init_lora_weights {config['init_lora_weights']!r}")
    if found:
        raise SurgeryError(
            f"{folder / CONFIG} sets {', '.join(found)}, which would change the result and "
            "is not supported"
        )
