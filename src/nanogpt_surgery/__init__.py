"""A GPT you can open up: the public names.

Their list is `__init__.pyi`, which type checkers read too. They are loaded when first used, so that
importing the package, as the command line does, does not load torch.
"""

from __future__ import annotations

import re
from importlib import import_module
from pathlib import Path
from typing import Any

_LIST = Path(__file__).with_suffix(".pyi").read_text(encoding="utf-8")
_HOME = {name: home for home, name in re.findall(r"from \w+\.(\S+) import \(?\s*(\w+) as", _LIST)}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
