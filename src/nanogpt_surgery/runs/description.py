"""The description of a run in `run.json`, and how another one differs from it, in plain words.

Compared is everything that the numbers of a training follow from: sizes, settings, hashes of the
data and of the model it began with. Under `named` stands what was named where the rest has but a
hash; `typed` is the command, `environment` the machine, `changes` what became different later.
"""

from __future__ import annotations

from dataclasses import MISSING, fields
from os.path import normpath
from pathlib import Path
from typing import Any

from nanogpt_surgery.errors import SurgeryError
from nanogpt_surgery.formats.folders.old_keys import with_current_modules, with_current_names
from nanogpt_surgery.lora.settings import LoRASettings
from nanogpt_surgery.model.config import GPTConfig
from nanogpt_surgery.training.settings import FitSettings

_NOT_COMPARED = ("named", "typed", "environment", "changes")
_SETTINGS = {"model": GPTConfig, "settings": FitSettings, "adapter": LoRASettings}
# How it was before a setting existed, where that is not its default.
_BEFORE = {"settings": {"evaluate_tokens": 0}}
# What else, of the description or of what was named, a value follows from: the cause is said.
_DATA = (
    *("text", "weights", "data", "template", "answers_only", "pack"),
    *("block_size", "stride", "base", "tokenizer"),
)
_FOLLOWS: dict[str, tuple[str, ...]] = {
    "base": ("model",),
    "tokenizer": ("tokenizer",),
    "layers": ("targets",),
    "train_ids": _DATA,
    "validation_ids": _DATA,
}


class RunDiffersError(SurgeryError):
    """The run in a folder is another one; `before` is its description."""

    def __init__(self, folder: Path, found: list[str], before: dict[str, Any]):
        super().__init__(
            f"this is not the run that {folder} holds: {'; '.join(found)}",
            "go on with what it was begun with, or take a new folder",
        )
        self.before = before


def differences(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Says for each value that differs what it was and what it is; empty if the runs are the same.

    A setting that did not exist when the run began counts as its default.
    """
    if before.get("kind") != now.get("kind"):
        return [f"it is a {before.get('kind')} and not a {now.get('kind')}"]
    old, new = _values(_completed(before, now)), _values(now)
    changed = [key for key in old | new if old.get(key) != new.get(key)]
    names, new_names = before.get("named", {}), now.get("named", {})
    # An earlier version named less; what is behind a hash was always named, where it was given.
    known = {*names.keys() & new_names.keys(), "model", "text", "tokenizer"}
    renamed = [name for name in known if _path(names.get(name)) != _path(new_names.get(name))]
    found = [_changed(key, old, new) for key in changed if key not in _FOLLOWS]
    for key, causes in _FOLLOWS.items():
        if key in changed:
            said = [_changed(cause, names, new_names) for cause in causes if cause in renamed]
            if not said and {*changed}.difference([key]).isdisjoint(causes):
                was = f" {_shown(names[causes[0]])}" if names.get(causes[0]) else ""
                said = [f"the {causes[0]}{was} has changed since"]
                said = ["other layers learn"] if key == "layers" else said
            found += said
    return list(dict.fromkeys(found))


def _completed(before: dict[str, Any], now: dict[str, Any]) -> dict[str, Any]:
    """A description with the values that its version did not know yet."""
    known = {"stride": 1} if "stride" in now else {}
    completed = known | {k: now[k] for k in ("adapter",) if k in now} | with_current_modules(before)
    for name in _SETTINGS.keys() & before.keys():
        defaults = {f.name: f.default for f in fields(_SETTINGS[name]) if f.default is not MISSING}
        completed[name] = defaults | _BEFORE.get(name, {}) | with_current_names(completed[name])
    return completed


def _values(description: dict[str, Any]) -> dict[str, Any]:
    """Every value that is compared by its own name, those of its tables included."""
    found = {key: value for key, value in description.items() if key not in _NOT_COMPARED}
    if "lora" in found:
        found["layers"] = [row["layer"] for row in found.pop("lora")["rows"]]
    for table in _SETTINGS:
        found |= found.pop(table, {})
    return found


def _path(value: Any) -> list[Any]:
    """A name, or several, in the form by which two ways of writing a path are the same."""
    values = value if isinstance(value, list | tuple) else [value]
    return [normpath(one) if isinstance(one, str) and one else one for one in values]


def _changed(key: str, old: dict[str, Any], new: dict[str, Any]) -> str:
    follows = ", and the learning rate of every step follows from it" if key == "max_steps" else ""
    return f"{key} was {_shown(old.get(key))} and is {_shown(new.get(key))}{follows}"


def _shown(value: Any) -> str:
    if value is None:
        return "not given"
    return " ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
