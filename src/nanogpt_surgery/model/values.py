"""What a value of a config must be, in words and as a test; this module does not load torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

from nanogpt_surgery.errors import SurgeryError

Kind: TypeAlias = tuple[str, Callable[[Any], bool]]

SIZE: Kind = ("a positive integer", lambda x: type(x) is int and x > 0)
SIZE_OR_0: Kind = ("a positive integer, or 0", lambda x: type(x) is int and x >= 0)
POSITIVE: Kind = ("a number above 0", lambda x: type(x) in (int, float) and x > 0)
FACTOR: Kind = ("a number of at least 1", lambda x: type(x) in (int, float) and x >= 1)
SHARE: Kind = (
    "a number of at least 0 and below 1",
    lambda x: type(x) in (int, float) and 0 <= x < 1,
)
SWITCH: Kind = ("true or false", lambda x: type(x) is bool)


def wrong(config: Any, kind: Kind, *names: str) -> list[str]:
    """For each named value that is not of a kind, a sentence that says so."""
    wanted, holds = kind
    return [
        f"{name} is {value!r}; it must be {wanted}"
        for name in names
        if not holds(value := getattr(config, name))
    ]


def raise_all(what: str, problems: list[str]) -> None:
    """Raise all problems, if there are any, as one `SurgeryError`."""
    if problems:
        raise SurgeryError(f"{what}: " + "; ".join(problems))
