"""Names under which folders of earlier versions store things, and the names of now.

Readers ask here, and nothing is written under an old name. One more is known where a journal is
shown: history/ lies below this folder.
"""

from __future__ import annotations

import re
from typing import Any

# Fields of `GPTConfig`.
_CONFIG = {"n_lags": "n_prev_tokens"}
# Settings in the description of a run, and the flags made from them.
_SETTINGS = {
    **_CONFIG,
    "accumulation": "grad_accum_steps",
    "clip": "max_grad_norm",
    "keep_hidden": "cache_gib",
    "keep_in": "cache_dir",
}
# Flags of a command, and keys of a config file, that are no settings.
_FLAGS = {"from": "init_from", "weights": "mix", "form": "format"}
# Modules of a model, in the names of tensors and of layers.
_MODULES = {"embed_lags": "embed_prev_tokens"}


def with_current_fields(config: dict[str, Any]) -> dict[str, Any]:
    """Returns the fields of a stored `GPTConfig` under the names that they have now."""
    return {_CONFIG.get(name, name): value for name, value in config.items()}


def with_current_names(settings: dict[str, Any]) -> dict[str, Any]:
    """Returns stored settings under the names that they have now."""
    return {_SETTINGS.get(name, name): value for name, value in settings.items()}


def with_current_flags(words: list[str]) -> list[str]:
    """Returns the words of a stored command with the flags of now."""
    flags = {_flag(former): _flag(name) for former, name in (_SETTINGS | _FLAGS).items()}
    split = [word.partition("=") for word in words]
    return [flags.get(flag, flag) + equals + value for flag, equals, value in split]


def with_current_config(text: str) -> str:
    """Returns the text of a stored config file, which is TOML, with the keys of now."""
    keys = _SETTINGS | _FLAGS

    def current(found: re.Match[str]) -> str:
        return keys.get(found[1].replace("-", "_"), found[1])

    return re.sub(r"^[ \t]*([\w-]+)(?=[ \t]*=)", current, text, flags=re.MULTILINE)


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def with_current_modules(value: Any) -> Any:
    """Returns a stored value, tables and lists included, with the names that modules have now."""
    if isinstance(value, str):
        for former, name in _MODULES.items():
            value = value.replace(former, name)
        return value
    if isinstance(value, dict):
        return {with_current_modules(key): with_current_modules(v) for key, v in value.items()}
    return [with_current_modules(item) for item in value] if isinstance(value, list) else value
