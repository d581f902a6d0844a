"""Settings, each with its range in its type; changes to them by name; arguments by their types.

    rank: Annotated[int, SIZE] = 8

This module does not load torch.
"""

from __future__ import annotations

import collections.abc
import inspect
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, fields, replace
from functools import wraps
from pathlib import Path
from types import NoneType, UnionType
from typing import (
    Annotated,
    Any,
    Literal,
    NamedTuple,
    TypeVar,
    Union,
    get_args,
    get_origin,
    get_type_hints,
)

from nanogpt_surgery.errors import SurgeryError, nearest, quoted

Chosen = TypeVar("Chosen", bound="Settings")
Function = TypeVar("Function", bound=Callable[..., Any])


class Kind(NamedTuple):
    """What a value must be: in words, and as a test."""

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


def check_arguments(function: Function) -> Function:
    """Makes a function, or a class, of the library refuse what its annotations do not allow.

    A call raises `SurgeryError`, before anything is done, for the first argument that is not what
    its annotation says: a module, a path, several things where a text stands, one of a few words,
    an object that has the attributes of a protocol. Ranges are for the function to check.
    """
    if inspect.isclass(function):
        function.__init__ = check_arguments(function.__init__)  # type: ignore[method-assign]
        return function
    signature, hints = inspect.signature(function), dict[str, Any]()

    @wraps(function)
    def checked(*arguments: Any, **named: Any) -> Any:
        hints.update(hints or get_type_hints(inspect.unwrap(function), localns=_PublicNames()))
        for name, value in signature.bind(*arguments, **named).arguments.items():
            if name in hints and not _fits(value, hints[name]):
                raise _refusal(name, value, signature.parameters[name].annotation, hints[name])
        return function(*arguments, **named)

    return checked  # type: ignore[return-value]


class _PublicNames(dict[str, Any]):
    """The package's names, for an annotation that its module imports for type checkers alone."""

    def __missing__(self, name: str) -> Any:
        package = sys.modules["nanogpt_surgery"]
        if name not in package.__all__:
            raise KeyError(name)
        return getattr(package, name)


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value is what an annotation says."""
    kind, parts = get_origin(hint) or hint, get_args(hint)
    if kind in (Union, UnionType):
        is_path = Path in parts and isinstance(value, str)
        return not (is_path and "\0" in value) and any(_fits(value, part) for part in parts)
    if kind is Any or kind is Literal:
        return kind is Any or any(type(value) is type(part) and value == part for part in parts)
    if kind is collections.abc.Callable:
        return callable(value)
    if isinstance(value, type):
        return False
    if kind in _ATTRIBUTE_OF:  # numbers and paths of other libraries too
        return hasattr(value, _ATTRIBUTE_OF[kind]) and not isinstance(value, bool)
    if parts and kind not in (dict, Mapping):
        return _are(value, kind, parts[0])
    if getattr(kind, "_is_protocol", False):
        return all(hasattr(value, name) for name in vars(kind) if not name.startswith("_"))
    return isinstance(getattr(value, "_orig_mod", value), kind)  # torch.compile wraps a model


_ATTRIBUTE_OF: dict[Any, str] = {int: "__index__", float: "__float__", Path: "__fspath__"}


def _are(value: Any, kind: Any, hint: Any) -> bool:
    """Whether a value holds several things of a kind, as an array does, too.

    Only those in a list are looked at: what comes one by one may come only once.
    """
    if isinstance(value, str | bytes | Mapping) or not isinstance(value, Iterable):
        return False
    if kind is not Iterable and not hasattr(value, "__len__"):
        return False
    return not isinstance(value, list | tuple) or all(_fits(one, hint) for one in value)


_PLAIN = (str, bytes, int, float, list, tuple, dict, NoneType)
_INSTEAD = {
    "SimpleGPT": "open_model(folder) makes one of a folder that transformers saved; a model of "
    "transformers has its own model.generate(…)",
    "LoRASettings | None": "a single setting is given by its name, as in rank={}",
    "FitSettings | None": "a single setting is given by its name, as in max_steps={}",
}


def _refusal(name: str, value: Any, annotation: str, hint: Any) -> SurgeryError:
    words = [part for kind in get_args(hint) for part in get_args(kind) or [kind]]
    words = [repr(word) for word in words if isinstance(word, str)]
    wanted = f"one of {', '.join(words)}" if words else annotation
    kind = f"{type(value).__module__}.{type(value).__qualname__}".removeprefix("builtins.")
    found = f"{quoted(value)} ({kind})" if isinstance(value, _PLAIN) else f"a {kind}"
    instead = _INSTEAD.get(annotation, "").format(quoted(value))
    return SurgeryError(f"{name} is {found}; it must be {wanted}", instead)
