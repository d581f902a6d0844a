"""A public function refuses arguments that its annotations do not allow, by name, at one place.

This module does not load torch.
"""

from __future__ import annotations

import collections.abc
import inspect
import sys
from collections.abc import Callable, Iterable, Mapping
from functools import wraps
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from nanogpt_surgery.errors import SurgeryError, quoted

Function = TypeVar("Function", bound=Callable[..., Any])


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
