"""What determines a run, as `run.json` holds it, beside what a resumed one is told.

Under `named` stands what was typed for it, where the rest holds but a hash: that is not compared,
and says which words of a command make the difference. `typed` has the whole command, `environment`
on what it was begun, `changes` what became different later: they are not compared either.
"""

from __future__ import annotations

import os
import shlex
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any

from nanogpt_surgery.errors import SurgeryError
from nanogpt_surgery.lora.settings import LoRASettings
from nanogpt_surgery.model.config import FAMILIES, GPTConfig
from nanogpt_surgery.training.recipes import RECIPES, further_values, training_values
from nanogpt_surgery.training.settings import FitSettings

# What was done before a setting existed, where that is not its default.
_BEFORE = {"settings": {"evaluate_tokens": 0}}
_KINDS = {"model": GPTConfig, "settings": FitSettings, "adapter": LoRASettings}
_DERIVED = ("n_kv_head", "head_dim", "n_inner")  # 0, where nothing is asked for
_NOT_COMPARED = {"named", "typed", "environment", "changes"}
_OF_DATA = ("weights", "data", "template", "answers_only", "pack")
_TEXT_SET = ("block_size", "stride", "base")  # what other ids of the same text may come from


@dataclass(frozen=True)
class Difference:
    """One thing in which a command is not the one that a run was begun with."""

    clause: str
    mend: str = ""
    """the flag, or the words, that bring back what was; "" where none can"""


def refusal(folder: Path, before: dict[str, Any], now: dict[str, Any]) -> SurgeryError | None:
    """Why the run in a folder is not gone on with, and what to type instead; None if it is."""
    found = differences(before, now)
    if not found:
        return None
    longer = [difference.mend.split()[:1] for difference in found] == [["--max-steps"]]
    why = ": the learning rate follows from it in every step" if longer else ""
    what = "; ".join(difference.clause for difference in found)
    hint = f"{_way_back(found)}{_way_on(folder, now) if longer else ''}"
    return SurgeryError(f"this is not the run that {folder} holds: {what}{why}", hint)


def _way_back(found: list[Difference]) -> str:
    if not all(difference.mend for difference in found):
        return "choose a new --out"
    flags = [difference.mend for difference in found if difference.mend.startswith("--")]
    words = [difference.mend for difference in found if not difference.mend.startswith("--")]
    ways = ([f"with {' '.join(flags)}"] if flags else []) + words
    return f"resume {', '.join(ways)}; or choose a new --out"


def _way_on(folder: Path, now: dict[str, Any]) -> str:
    if now.get("kind") != "finetune":
        return f"; surgery train TEXT --from {folder} --out NEW trains the model further"
    return f"; surgery merge MODEL {folder} --out MERGED, and finetune MERGED, trains further"


def differences(before: dict[str, Any], now: dict[str, Any]) -> list[Difference]:
    """In what a run's description is another than an earlier one, in the words of the flags.

    A setting that did not exist yet had its default, or what was done before it; of an adapter's
    nothing was written down once, and then they count as what they are now.
    """
    once = {"stride": 1} if "stride" in now else {}  # before there was a choice
    old = {"adapter": now.get("adapter")} | once | _with_defaults(before)
    changed = _changed(old, now)
    if not changed:
        return []
    if "kind" in changed:
        kinds = f"surgery {old.get('kind')} made it, and this is surgery {now.get('kind')}"
        return [Difference(kinds)]
    found = _of_settings(old, now, changed)
    for differ in (_of_targets, _of_base, _of_tokenizer, _of_text):
        found += differ(old, now, changed)
    return found or [Difference(f"{', '.join(sorted(changed))} differs")]


def _changed(old: dict[str, Any], new: dict[str, Any]) -> set[str]:
    """The keys under which something differs."""
    keys = old.keys() | new.keys()
    return {key for key in keys if _given(old.get(key)) != _given(new.get(key))} - _NOT_COMPARED


def _given(value: Any) -> Any:
    """A value without the keys in it that hold nothing: to say None is to say nothing."""
    if not isinstance(value, dict):
        return value
    given = {key: _given(inner) for key, inner in value.items()}
    return {key: inner for key, inner in given.items() if inner is not None} or None


def _of_settings(old: dict[str, Any], new: dict[str, Any], changed: set[str]) -> list[Difference]:
    """What has flags, without those that need none where the others bring back what was."""
    found = _typed(("family",), old, new) if "model" in changed else []
    alone = ("recipe", "stride") + (("block_size",) if "model" not in changed else ())
    found += [_difference(n, old.get(n), new.get(n)) for n in alone if n in changed]
    own_model = "base" not in old.keys() | new.keys()
    for section in (name for name in _KINDS if own_model or name != "model"):
        was, now = (_as_asked(section, d.get(section) or {}) for d in (old, new))
        usual, usual_now = _usual(section, old), _usual(section, new)
        for name in (name for name in usual if name in was and name in now):
            comes = usual[name] if now[name] == usual_now[name] else now[name]
            if was[name] != comes:
                found.append(_difference(name, was[name], now[name]))
    return found


def _as_asked(section: str, values: dict[str, Any]) -> dict[str, Any]:
    """Values in which sizes that follow from other ones are 0, as they are unless asked for."""
    if section != "model" or "vocab_size" not in values:
        return values
    return values | {name: 0 for name in _DERIVED if _follows(name, values)}


def _follows(name: str, values: dict[str, Any]) -> bool:
    try:
        config = GPTConfig(**(values | {name: 0}))
    except SurgeryError:  # the width is no multiple of the heads, so that it was asked for
        return False
    return bool(getattr(config, name) == values.get(name))


def _usual(section: str, description: dict[str, Any]) -> dict[str, Any]:
    """What the values of a section are where no flag of theirs is given."""
    defaults = _defaults(section)
    if description.get("kind") != "train" or section == "adapter":
        return defaults
    recipe = description.get("recipe")
    recipe = recipe if recipe in RECIPES else None
    if section == "model":
        family = FAMILIES.get(description.get("named", {}).get("family"), {})
        axes = {name: values[0] for name, values in family.items()}
        return defaults | (axes or RECIPES[recipe].model)
    muon = description.get("settings", {}).get("muon", True)
    if "base" in description:
        return defaults | further_values({"muon": muon}) | {"muon": False}
    return defaults | training_values(recipe, {"muon": muon}) | {"muon": True}


def _of_targets(old: dict[str, Any], new: dict[str, Any], changed: set[str]) -> list[Difference]:
    was, now = ([row["layer"] for row in d.get("lora", {}).get("rows", [])] for d in (old, new))
    if was == now or "base" in changed:
        return []
    endings = dict.fromkeys(name.rpartition(".")[2] for name in was)
    by_layers = [Difference("other layers learn", f"--targets {' '.join(endings)}")]
    return _typed(("targets",), old, new) or by_layers


def _of_base(old: dict[str, Any], new: dict[str, Any], changed: set[str]) -> list[Difference]:
    if "base" not in changed:
        return []
    was, now = (d.get("named", {}).get("model") for d in (old, new))
    if was is not None and now is not None and _places([was]) == _places([now]):
        return [Difference(f"the weights of {was} have changed since")]
    if old.get("kind") == "train":
        return [_difference("from", was, now)]
    if was is None:
        return [Difference("the model differs", "on the model it was begun with")]
    return [Difference(f"the model was {was} and is {now}", f"on the model {shlex.quote(was)}")]


def _of_tokenizer(old: dict[str, Any], new: dict[str, Any], changed: set[str]) -> list[Difference]:
    if not _is_other_tokenizer(old, new, changed):
        return []
    kinds = [str(d.get("tokenizer")).partition(" ")[0] for d in (old, new)]
    clause = "the tokenizer differs"
    if kinds[0] != kinds[1]:
        clause = f"the tokenizer was a {kinds[0]} and is a {kinds[1]}"
    by_kind = [Difference(clause, "with the tokenizer it was begun with")]
    return _typed(("tokenizer",), old, new) or by_kind


def _is_other_tokenizer(old: dict[str, Any], new: dict[str, Any], changed: set[str]) -> bool:
    """Whether more than the characters of another text differ."""
    characters = [str(d.get("tokenizer")).startswith("CharacterTokenizer") for d in (old, new)]
    typed = _typed(("tokenizer",), old, new)
    own = "tokenizer" in changed and "base" not in changed  # a model brings its own
    return own and (bool(typed) or not all(characters))


def _of_text(old: dict[str, Any], new: dict[str, Any], changed: set[str]) -> list[Difference]:
    """Another text, unless other ids of the same one follow from what differs beside it."""
    if not changed & {"train_ids", "validation_ids"}:
        return []
    found = _typed(_OF_DATA, old, new)
    was, now = (d.get("named", {}).get("text") for d in (old, new))
    if was is not None and now is not None and _places(was) != _places(now):
        mend = f"on the text {shlex.join(was)}" if was else "without a text"
        return [*found, Difference(f"the text was {_text(was)} and is {_text(now)}", mend)]
    if found or changed & {*_TEXT_SET} or _is_other_tokenizer(old, new, changed):
        return found
    if was is None:
        return [Difference("the text differs", "on the text it was begun with")]
    return [Difference(f"{_text(was)} has changed since")]


def _typed(names: tuple[str, ...], old: dict[str, Any], new: dict[str, Any]) -> list[Difference]:
    """Flags that were typed otherwise, of those whose value stands nowhere else."""
    was, now = (d.get("named", {}) for d in (old, new))
    known = was.keys() & now.keys()
    return [_difference(n, was[n], now[n]) for n in names if n in known and was[n] != now[n]]


def _places(paths: list[str]) -> list[str]:
    return [os.path.normpath(path) for path in paths]


def _text(paths: list[str]) -> str:
    return " ".join(paths) or "Python's own"


def _difference(name: str, was: Any, now: Any) -> Difference:
    words = name.replace("_", "-")
    clause = f"{words} was {_shown(was)} and is {_shown(now)}"
    if was is None:
        return Difference(clause, f"without --{words}")
    if isinstance(was, bool):
        return Difference(clause, f"--{words}" if was else f"--no-{words}")
    return Difference(clause, f"--{words} {_shown(was, quoted=True)}")


def _shown(value: Any, quoted: bool = False) -> str:
    """A value as it is typed behind its flag."""
    if value is None or isinstance(value, bool):
        return {None: "not given", True: "on", False: "off"}[value]
    if isinstance(value, dict):
        value = [f"{key}={number}" for key, number in value.items()]
    words = [str(word) for word in value] if isinstance(value, list | tuple) else [str(value)]
    return shlex.join(words) if quoted else " ".join(words)


def _with_defaults(description: dict[str, Any]) -> dict[str, Any]:
    filled = {
        section: _defaults(section) | _BEFORE.get(section, {}) | description[section]
        for section in _KINDS
        if section in description
    }
    return description | filled


def _defaults(section: str) -> dict[str, Any]:
    return {f.name: f.default for f in fields(_KINDS[section]) if f.default is not MISSING}
