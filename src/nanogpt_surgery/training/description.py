"""What determines a run, as `run.json` holds it, beside what a resumed one is told."""

from __future__ import annotations

from dataclasses import MISSING, fields
from typing import Any

from nanogpt_surgery.lora.settings import LoRASettings
from nanogpt_surgery.model.config import GPTConfig
from nanogpt_surgery.training.settings import FitSettings

# What was done before a setting existed, where that is not its default.
_BEFORE = {"settings": {"evaluate_tokens": 0}}
_KINDS = {"model": GPTConfig, "settings": FitSettings, "adapter": LoRASettings}


def differences(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """A sentence for each value that was another one in an earlier description.

    A setting that did not exist yet had its default, or what was done before it; of an adapter's
    nothing was written down once, and then they count as what they are now.
    """
    old, new = _flat({"adapter": now.get("adapter")} | _with_defaults(before)), _flat(now)
    return [
        f"{key} was {old.get(key)!r} and is now {new.get(key)!r}"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key)
    ]


def _with_defaults(description: dict[str, Any]) -> dict[str, Any]:
    filled = {
        key: {f.name: f.default for f in fields(kind) if f.default is not MISSING}
        | _BEFORE.get(key, {})
        | description[key]
        for key, kind in _KINDS.items()
        if key in description
    }
    return description | filled


def flags_to_resume(before: dict[str, Any], now: dict[str, Any]) -> str:
    """The flags of training that bring back what an earlier description had, "" if none does."""
    old = _with_defaults(before).get("settings", {})
    new = now.get("settings", {})
    usual = FitSettings().to_dict() if new.get("muon") and not old.get("muon") else new
    names = [name for name in new if name in old and old[name] != usual[name] and name != "muon"]
    flags = [f"--{name.replace('_', '-')} {old[name]}" for name in names]
    if old.get("muon") != new.get("muon"):
        flags.insert(0, "--muon" if old.get("muon") else "--no-muon")
    return " ".join(flags)


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested values under dotted names."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        flat |= _flat(value, f"{name}.") if isinstance(value, dict) else {name: value}
    return flat
