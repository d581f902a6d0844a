"""The description of a run in `run.json`, and how another one differs from it, in plain words.

Compared is everything that the numbers of a training follow from: sizes, settings, hashes of the
data and of the model it began with. Under `named` stands what was named where the rest has but a
hash; `typed` is the command, `environment` the machine, `changes` what became different later.
"""

from __future__ import annotations

from collections.abc import Iterator
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
# Values that only a hash tells apart, and the name under which they were given.
_HASHED = {"base": "model", "train_ids": "text", "validation_ids": "text", "tokenizer": "tokenizer"}
_SHAPES_DATA = {
    "tokenizer",
    "base",
    "block_size",
    "stride",
    "pack",
    "template",
    "answers_only",
    "weights",
    "data",
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
    old, new = dict(_values(_completed(before, now))), dict(_values(now))
    changed = [key for key in {**old, **new} if old.get(key) != new.get(key)]
    named = [description.get("named", {}) for description in (before, now)]
    behind = {_HASHED[key] for key in changed if key in _HASHED}  # names that hashes stand for
    behind |= _SHAPES_DATA if "text" in behind else set()
    behind |= {"targets"} if "layers" in changed else set()
    renamed = [
        key for key in named[0] if key in behind and key in named[1] and _renamed(named, key)
    ]
    follows = {"layers"} if "targets" in renamed else set()
    if not _SHAPES_DATA.isdisjoint([*changed, *renamed]):
        follows |= {"train_ids", "validation_ids"}
    found = [
        _changed(key, old, new) for key in changed if key not in _HASHED and key not in follows
    ]
    found += [_changed(key, *named) for key in renamed if key in _HASHED or key not in changed]
    for key, name in _HASHED.items():
        if key in changed and key not in follows and name not in renamed:
            was, now_is = (one.get(name) for one in named)
            if (was is None) != (now_is is None):
                found.append(_changed(name, *named))
            else:
                found.append(f"the {name}{f' {_shown(was)}' if was else ''} has changed since")
    return list(dict.fromkeys(found))


def _completed(before: dict[str, Any], now: dict[str, Any]) -> dict[str, Any]:
    """A description with the values that its version did not know yet."""
    before = with_current_modules(before)
    known = {"stride": 1} if "stride" in now else {}
    if "adapter" in now:
        known["adapter"] = now["adapter"]
    completed = known | before
    for name, kind in _SETTINGS.items():
        if name in before:
            defaults = {f.name: f.default for f in fields(kind) if f.default is not MISSING}
            completed[name] = defaults | _BEFORE.get(name, {}) | with_current_names(before[name])
    return completed


def _values(description: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Every value by its own name, those of its tables included; none that is empty."""
    for key, value in description.items():
        if key in _NOT_COMPARED:
            continue
        if key == "lora":
            yield "layers", [row["layer"] for row in value["rows"]]
        elif key in _SETTINGS:
            yield from ((name, inner) for name, inner in value.items() if inner is not None)
        elif value is not None:
            yield key, value


def _renamed(named: list[dict[str, Any]], key: str) -> bool:
    """Whether something was given under another name before."""
    return bool(_normal(named[0][key]) != _normal(named[1][key]))


def _normal(value: Any) -> Any:
    values = value if isinstance(value, list | tuple) else [value]
    return [normpath(one) if isinstance(one, str) and one else one for one in values]


def _changed(key: str, old: dict[str, Any], new: dict[str, Any]) -> str:
    if key == "layers":
        return "other layers learn"
    follows = ", and the learning rate of every step follows from it" if key == "max_steps" else ""
    return f"{key} was {_shown(old.get(key))} and is {_shown(new.get(key))}{follows}"


def _shown(value: Any) -> str:
    if value is None:
        return "not given"
    return " ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
