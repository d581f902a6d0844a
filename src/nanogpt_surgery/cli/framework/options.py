"""Flags made from dataclasses and functions: names, types, defaults and help stand there alone."""

from __future__ import annotations

import ast
import dataclasses
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

from cyclopts import Parameter
from docstring_parser import Docstring, DocstringStyle, parse, parse_from_object

from nanogpt_surgery.errors import SurgeryError
from nanogpt_surgery.lora.settings import Tied


def options_of(
    source: type,
    group: str,
    leave_out: tuple[str, ...] = (),
    defaults: Mapping[str, Any] = MappingProxyType({}),
) -> Any:
    """A dataclass with the fields of `source`, each None unless given on the command line.

    The help of a flag is the string under its field; the default shown is the field's own, if
    `defaults` has no other.
    """
    hints, texts = get_type_hints(source), _texts(parse_from_object(source))
    fields = [
        (
            field.name,
            _annotated(hints[field.name], texts[field.name], field, defaults),
            _none(),
        )
        for field in dataclasses.fields(source)
        if field.name not in leave_out
    ]
    return _options(source.__name__, fields, group)


def _options(name: str, fields: list[tuple[str, Any, Any]], group: str) -> Any:
    made = dataclasses.make_dataclass(f"{name}Options", fields, frozen=True)
    made.__module__ = __name__  # else cyclopts takes it for a builtin type
    return Parameter(name="*", group=group)(made)


def given(options: Any) -> dict[str, Any]:
    """The options that were set, by field name."""
    if options is None:
        return {}
    return {name: value for name, value in vars(options).items() if value is not None}


def _annotated(
    hint: Any, text: str, field: dataclasses.Field[Any], defaults: Mapping[str, Any]
) -> Any:
    own = "the model's" if field.default is dataclasses.MISSING else field.default
    default = defaults.get(field.name, own)
    parameter = Parameter(help=text, show_default=lambda _: default)
    if opposite := field.metadata.get("opposite"):
        parameter = Parameter.combine(parameter, Parameter(negative=f"--{opposite}"))
    if any(get_origin(kind) is dict for kind in get_args(hint)):
        parameter = Parameter.combine(parameter, PAIRS)
    return Annotated[hint | None, parameter]


def _none() -> Any:
    return dataclasses.field(default=None)


def options_of_function(where: str, group: str, leave_out: tuple[str, ...] = ()) -> Any:
    """A dataclass with the parameters of a function ("module:name"), each None unless given.

    The function's source is read, not imported, so that torch stays unloaded; help comes from the
    Args of its docstring.
    """
    function = _function(where)
    texts = _texts(parse(ast.get_docstring(function) or "", DocstringStyle.GOOGLE))
    arguments = [*function.args.args, *function.args.kwonlyargs]
    nothing = [None] * (len(function.args.args) - len(function.args.defaults))
    defaults = [*nothing, *function.args.defaults, *function.args.kw_defaults]
    fields = [
        (argument.arg, _flag(argument, texts.get(argument.arg, ""), default), _none())
        for argument, default in zip(arguments, defaults, strict=True)
        if argument.arg not in leave_out
    ]
    return _options(function.name, fields, group)


def first_line(where: str) -> str:
    """The first line of a function's docstring ("module:name"), read and not imported."""
    return (ast.get_docstring(_function(where)) or "").partition("\n")[0]


def _function(where: str) -> ast.FunctionDef:
    module, name = where.split(":")
    spec = find_spec(module)
    assert spec and spec.origin, f"there is no module {module}"
    tree = ast.parse(Path(spec.origin).read_text(encoding="utf-8"))
    return next(n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == name)


def _flag(argument: ast.arg, text: str, default: ast.expr | None) -> Any:
    assert argument.annotation is not None
    written = ast.unparse(argument.annotation)
    # On the command line several patterns are several words.
    several = written == "str | Iterable[str]"
    hint = list[str] if several else eval(written, {"Literal": Literal, "Tied": Tied})
    value = ast.literal_eval(default) if default is not None else "required"
    shown = " ".join(value) if isinstance(value, tuple) else value
    parameter = Parameter(
        help=text, show_default=lambda _: shown, negative="", consume_multiple=several
    )
    return Annotated[hint | None, parameter]


def _pairs(hint: Any, tokens: Any) -> dict[str, Any]:
    """`v_proj=4 q_proj=2` on the command line, or a table in a config file, as a dict."""
    number = hint.__args__[1]
    pairs = {}
    for token in _tokens(tokens):
        name, _, value = (
            (".".join(token.keys), "", token.value) if token.keys else token.value.rpartition("=")
        )
        try:
            pairs[name] = number(value)
        except ValueError:
            name = ""
        if not name:
            raise SurgeryError(
                f"{token.value!r} is no layer with its number", "for example v_proj=4 q_proj=2"
            )
    return pairs


PAIRS = Parameter(converter=_pairs, n_tokens=-1, consume_multiple=True, negative="")


def _tokens(tokens: Any) -> Iterator[Any]:
    """The tokens in nested dicts and lists."""
    if hasattr(tokens, "value"):
        yield tokens
        return
    for inner in tokens.values() if isinstance(tokens, dict) else tokens:
        yield from _tokens(inner)


def _texts(docstring: Docstring) -> dict[str, str]:
    """Returns what a docstring says of each field or argument, each on one line."""
    return {one.arg_name: " ".join((one.description or "").split()) for one in docstring.params}


INJECT = "nanogpt_surgery.lora.inject:inject_lora"
TargetOptions: Any = options_of_function(INJECT, "LoRA", leave_out=("model", "settings"))
