"""Values of configs and settings: what each must be, in words and as a test, and changes by name.

This module does not load torch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from typing import Any, TypeAlias, TypeVar

from nanogpt_surgery.errors import SurgeryError, nearest, quoted

Settings = TypeVar("Settings")

Kind: TypeAlias = tuple[str, Callable[[Any], bool]]

_MOST = 2**53  # up to which every program that reads JSON has the same integers
SIZE: Kind = ("a positive integer up to 2^53", lambda x: type(x) is int and 0 < x <= _MOST)
SIZE_OR_0: Kind = ("an integer from 0 to 2^53", lambda x: type(x) is int and 0 <= x <= _MOST)
POSITIVE: Kind = (
    "a number above 0 and below 1e30",
    lambda x: type(x) in (int, float) and 0 < x < 1e30,
)
FACTOR: Kind = (
    "a number of at least 1, below 1e30",
    lambda x: type(x) in (int, float) and 1 <= x < 1e30,
)
NOT_0: Kind = (
    "a number other than 0, below 1e30 either way",
    lambda x: type(x) in (int, float) and 0 < abs(x) < 1e30,
)
WEIGHT: Kind = (
    "a number below 1e30 either way",
    lambda x: type(x) in (int, float) and abs(x) < 1e30,
)
SHARE: Kind = (
    "a number of at least 0 and below 1",
    lambda x: type(x) in (int, float) and 0 <= x < 1,
)
TABLE: Kind = ("a table, by layer name", lambda x: x is None or isinstance(x, dict))
TEXT: Kind = ("text", lambda x: isinstance(x, str))
SWITCH: Kind = ("true or false", lambda x: type(x) is bool)


def wrong(config: Any, kind: Kind, *names: str) -> list[str]:
    """For each named value that is not of a kind, a sentence that says so."""
    return wrong_values(kind, {name: getattr(config, name) for name in names})


def wrong_values(kind: Kind, values: Mapping[str, Any]) -> list[str]:
    """The same for values under the names that say where they stand."""
    wanted, holds = kind
    return [
        f"{name} is {quoted(value)}; it must be {wanted}"
        for name, value in values.items()
        if not holds(value)
    ]


def raise_all(what: str, problems: list[str]) -> None:
    """Raise all problems, if there are any, as one `SurgeryError`."""
    if problems:
        raise SurgeryError(f"{what}: " + "; ".join(problems))


def chosen(kind: type[Settings], settings: Settings | None, changes: Mapping[str, Any]) -> Settings:
    """Settings (of a dataclass `kind`; its defaults if None), some of them changed by name.

    Raises:
        SurgeryError: there is no setting of a name (with the nearest), or `settings` are none.
    """
    known = [field.name for field in fields(kind)]  # type: ignore[arg-type]
    settings = kind() if settings is None else settings
    if not isinstance(settings, kind):
        raise SurgeryError(
            f"{settings!r} stands where {kind.__name__} belong",
            f"a single setting is given by its name, as in {known[0]}={settings!r}",
        )
    unknown = [name for name in changes if name not in known]
    if unknown:
        raise SurgeryError(
            f"{kind.__name__} have no {', '.join(unknown)}",
            f"the nearest: {'; '.join(nearest(name, known) for name in unknown)}",
        )
    return replace(settings, **changes)  # type: ignore[type-var]
