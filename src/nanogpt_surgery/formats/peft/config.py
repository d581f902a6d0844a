"""`adapter_config.json`: what PEFT writes into it and what may stand there."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from nanogpt_surgery.errors import SurgeryError, foreign_file, quoted
from nanogpt_surgery.files.json_files import read_json
from nanogpt_surgery.formats.folders.old_keys import with_current_modules
from nanogpt_surgery.formats.peft.patterns import Patterns
from nanogpt_surgery.lora.settings import LoRASettings
from nanogpt_surgery.lora.stored_adapter import Updates
from nanogpt_surgery.values import NOT_0, SHARE, SWITCH, TABLE, Kind, wrong_values

CONFIG = "adapter_config.json"
LARGEST_CONFIG = 8 << 20  # bytes; an adapter of 25,000 layers, each with an alpha, has half of it
_SHOWN = 12  # problems
_MOST_WHOLE = 100  # modules_to_save
_QUOTES = "'\""
MERGE_IN_PEFT = (
    "merge it in peft, PeftModel.from_pretrained(base, adapter).merge_and_unload()"
    ".save_pretrained(folder), after base.resize_token_embeddings(n) if the vocabulary was "
    "resized, and open that folder"
)
_SAVE_AGAIN = "restore it from a copy, or save the adapter again where it was made"

# Options that change the result and that we do not have; unset, they say nothing. Which layers were
# chosen (layers_to_transform, exclude_modules, …) shows in the tensors.
_CHANGE_THE_RESULT = """
    lora_bias layer_replication target_parameters trainable_token_indices alora_invocation_tokens
    arrow_config use_qalora velora_config use_bdlora kasa_config monteclora_config
""".split()
_NO_TARGETS = "dummy-target-modules"  # PEFT's word for an adapter without any update
# How A and B began is past, unless it changed the base, as PEFT's "pissa" does.
_HARMLESS_INITS = (True, False, None, "gaussian", "eva", "orthogonal")


def config_for(
    updates: Updates,
    whole: Iterable[str],
    base: str = "",
    fan_in_fan_out: bool = False,
    task: str | None = "CAUSAL_LM",
) -> dict[str, Any]:
    """The contents of the file for these updates, and modules replaced whole."""
    ranks = {name: update.rank for name, update in updates.items()}
    alphas = {name: update.alpha for name, update in updates.items()}
    rank, rank_pattern = _usual(ranks, LoRASettings.rank)
    alpha, alpha_pattern = _usual(alphas, LoRASettings.alpha)
    return {
        "peft_type": "LORA",
        "task_type": task,
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


def read_config(folder: Path) -> dict[str, Any]:
    """The contents of an adapter folder's config.

    Raises:
        SurgeryError: it is missing or not a LORA's, sets what we do not have, or a value that we
            read is not of its kind (all of them at once).
    """
    path = folder / CONFIG
    if not path.is_file():
        below = sorted(str(config.parent) for config in folder.glob(f"*/{CONFIG}"))
        inside = f"; there is one in {', '.join(below)}" if below else ""
        raise SurgeryError(
            f"{path} is missing", f"an adapter is a folder as PEFT writes it{inside}"
        )
    config = read_json(path, LARGEST_CONFIG)
    if not isinstance(config, dict):
        raise SurgeryError(f"{path} is damaged: it holds no table", _SAVE_AGAIN)
    with foreign_file(path):
        _check_unknown(config, folder)
        if problems := _wrong(config):
            shown = "; ".join(problems[:_SHOWN]) + ("; …" if problems[_SHOWN:] else "")
            raise SurgeryError(f"{path} is damaged: {shown}", _SAVE_AGAIN)
    return with_current_modules(config)


def alphas_of(config: dict[str, Any], path: Path) -> Callable[[str], float]:
    """The alpha of a layer by its name, as an adapter's config says.

    Raises:
        SurgeryError: a pattern is none that we read; from the function: they take too long.
    """
    usual = config.get("lora_alpha", 8)
    try:
        patterns = Patterns(config.get("alpha_pattern") or {})
    except SurgeryError as error:
        raise SurgeryError(f"{path} is damaged: alpha_pattern: {error.what}", _SAVE_AGAIN) from None
    return lambda name: float(patterns.value(name, usual))


def _wrong(config: dict[str, Any]) -> list[str]:
    """For each value that we read and that is not of its kind, a sentence."""
    patterns = config.get("alpha_pattern")
    problems = wrong_values(TABLE, {"alpha_pattern": patterns})
    patterns = {} if problems or not patterns else patterns
    alphas = {f"alpha_pattern of {quoted(key)}": value for key, value in patterns.items()}
    problems += wrong_values(NOT_0, {"lora_alpha": config.get("lora_alpha", 8), **alphas})
    problems += wrong_values(SHARE, {"lora_dropout": config.get("lora_dropout") or 0})
    switches = ("use_rslora", "use_dora", "ensure_weight_tying")
    problems += wrong_values(SWITCH, {key: config.get(key) or False for key in switches})
    return problems + wrong_values(_NAMES, {"modules_to_save": config.get("modules_to_save")})


def _are_names(value: Any) -> bool:
    return isinstance(value, list) and all(name and isinstance(name, str) for name in value)


_NAMES = Kind(
    f"null or a list of at most {_MOST_WHOLE} names",
    lambda x: x is None or (_are_names(x) and len(x) <= _MOST_WHOLE),
)


def _check_unknown(config: dict[str, Any], folder: Path) -> None:
    """Raises `SurgeryError`, with all their names, if options are set that we do not have."""
    kind = config.get("peft_type", "folder without peft_type")
    if kind != "LORA":
        raise SurgeryError(
            f"{folder} is a {quoted(kind).strip(_QUOTES)}, not a LORA",
            f"if its kind can be merged, {MERGE_IN_PEFT}",
        )
    found = [key for key in _CHANGE_THE_RESULT if config.get(key)]
    if config.get("bias", "none") != "none":
        found.append("bias")
    if config.get("init_lora_weights", True) not in _HARMLESS_INITS:
        found.append(f"init_lora_weights {quoted(config['init_lora_weights'])}")
    if found:
        raise SurgeryError(
            f"{folder / CONFIG} sets {', '.join(found)}, which would change the result and "
            "is not supported",
            MERGE_IN_PEFT,
        )
