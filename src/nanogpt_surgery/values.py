"""Settings, each with its range in its type; changes to them by name.

    rank: Annotated[int, SIZE] = 8

This module does not load torch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, fields, replace
from types import NoneType
from typing import (
    TYPE_CHECKING,
    Annotated,
    Any,
    Literal,
    NamedTuple,
    TypeVar,
    get_args,
    get_origin,
)

from nanogpt_surgery.errors import SurgeryError, nearest, quoted

if TYPE_CHECKING:
    from torch import Tensor

Chosen = TypeVar("Chosen", bound="Settings")


class Kind(NamedTuple):
    """The kind that a value must be of: in words, and as a test."""

    words: str
    holds: Callable[[Any], bool]


def integer(least: int, most: int) -> Kind:
    """Returns the kind of the integers between two, both included."""
    return Kind(
        f"an integer from {least} to {most}", lambda x: type(x) is int and least <= x <= most
    )


def number(words: str, holds: Callable[[Any], bool]) -> Kind:
    """Returns the kind of the integers and floats, NumPy's float64 among them, that pass a test."""
    is_number = (int, float)
    return Kind(
        f"a number {words}",
        lambda x: isinstance(x, is_number) and not isinstance(x, bool) and holds(x),
    )


_MOST = 2**53  # up to which every program that reads JSON has the same integers
SIZE = Kind("a positive integer up to 2^53", lambda x: type(x) is int and 0 < x <= _MOST)
SIZE_OR_0 = Kind("an integer from 0 to 2^53", lambda x: type(x) is int and 0 <= x <= _MOST)
POSITIVE = number("above 0 and below 1e30", lambda x: 0 < x < 1e30)
NOT_0 = number("other than 0, below 1e30 either way", lambda x: 0 < abs(x) < 1e30)
WEIGHT = number("below 1e30 either way", lambda x: abs(x) < 1e30)
SHARE = number("of at least 0 and below 1", lambda x: 0 <= x < 1)
TABLE = Kind("a table, by layer name", lambda x: x is None or isinstance(x, dict))
TEXT = Kind("text", lambda x: isinstance(x, str))
SWITCH = Kind("true or false", lambda x: type(x) is bool)


class Settings:
    """Base of the frozen dataclasses of settings: a new one is checked whole, by its types.

    Raises:
        SurgeryError: values that are not of their kind, or else that contradict each other (all of
            them at once).
    """

    def __post_init__(self) -> None:
        raise_all(wrong_fields(self) or self.contradictions())

    def contradictions(self) -> list[str]:
        """Returns a sentence for each contradiction between values that are right by themselves."""
        return []

    def to_dict(self) -> dict[str, Any]:
        """Returns the fields as plain values, for JSON."""
        return asdict(self)  # type: ignore[call-overload]


def wrong_fields(settings: Settings) -> list[str]:
    """Returns a sentence for each field whose value is not of the kind that its type says."""
    kinds = field_types(type(settings))
    return [p for name in kinds for p in wrong_value(name, getattr(settings, name), kinds[name])]


def field_types(kind: type[Settings]) -> dict[str, Any]:
    """Returns the types of a dataclass's fields; its module must not postpone annotations."""
    return {field.name: field.type for field in fields(kind)}  # type: ignore[arg-type]


def wrong_value(name: str, value: Any, hint: Any) -> list[str]:
    """Returns a sentence, unless a value is what a type asks for; for a table, one for each value.

    Understood are an `Annotated` type with a `Kind`, a `Literal` of texts, bool, str, classes,
    a dict of these, and None beside any of them.
    """
    choices = get_args(hint)
    if NoneType in choices:
        hint = next(choice for choice in choices if choice is not NoneType)
        return [] if value is None else wrong_value(name, value, hint)
    if get_origin(hint) is dict and isinstance(value, dict):
        inner = choices[1]
        return [p for k, v in value.items() for p in wrong_value(f"{name} of {k!r}", v, inner)]
    return wrong_values(_kind(hint), {name: value})


def _kind(hint: Any) -> Kind:
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return arguments[1]
    if origin is Literal:
        return Kind(f"one of {', '.join(arguments)}", lambda x: type(x) is str and x in arguments)
    simple = {bool: SWITCH, str: TEXT, dict: TABLE}
    return simple.get(origin or hint) or Kind(f"a {hint.__name__}", lambda x: isinstance(x, hint))


def wrong_values(kind: Kind, values: Mapping[str, Any]) -> list[str]:
    """Returns a sentence for each value that is not of a kind, under the name it is given."""
    return [
        f"{name} is {quoted(value)}; it must be {kind.words}"
        for name, value in values.items()
        if not kind.holds(value)
    ]


def raise_all(problems: list[str]) -> None:
    """Raises all problems, if there are any, as one `SurgeryError`."""
    if problems:
        raise SurgeryError("; ".join(problems))


def chosen(kind: type[Chosen], settings: Chosen | None, changes: Mapping[str, Any]) -> Chosen:
    """Returns settings (the defaults of their `kind` if None), some of them changed by name.

    Raises:
        SurgeryError: there is no setting of a name (with the nearest).
    """
    known = list(field_types(kind))
    settings = kind() if settings is None else settings
    unknown = [name for name in changes if name not in known]
    if unknown:
        raise SurgeryError(
            f"{kind.__name__} have no {', '.join(unknown)}",
            f"the nearest: {'; '.join(nearest(name, known) for name in unknown)}",
        )
    return replace(settings, **changes)  # type: ignore[type-var]


def check_ids(ids: Tensor, vocab_size: int) -> Tensor:
    """Returns ids (B, T) as int64.

    Raises:
        SurgeryError: they are of another shape, there are none, or one is not in the vocabulary.
    """
    if ids.dim() != 2 or not ids.numel():
        raise SurgeryError(
            f"ids have the shape {tuple(ids.shape)}; at least one token is needed, (batch, tokens)",
            "a single row becomes a batch of one with ids[None]",
        )
    if ids.is_floating_point() or ids.is_complex() or str(ids.dtype) == "torch.bool":
        raise SurgeryError(f"ids are {ids.dtype}; they must be whole numbers", "ids.long()")
    least, most, last = int(ids.min()), int(ids.max()), vocab_size - 1
    if not 0 <= least <= most <= last:
        raise SurgeryError(f"ids are from {least} to {most}; the vocabulary is 0 to {last}")
    return ids.long()
