"""Flags made from dataclasses of settings, and flags that several commands share."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, TypeAlias, get_args, get_origin, get_type_hints

from cyclopts import Parameter
from docstring_parser import parse_from_object

from nanogpt_surgery.errors import SurgeryError

REPLACE = "replace, in one step, the folder of ours or the GGUF file that lies at --out"
Overwrite: TypeAlias = Annotated[bool, Parameter(help=REPLACE)]


@Parameter(name="*", group="LoRA")
@dataclass(frozen=True)
class TargetOptions:
    """Options of `inject_lora`; None: its default."""

    targets: Annotated[
        list[str] | None,
        Parameter(consume_multiple=True, show_default=lambda _: "q_proj v_proj"),
    ] = None
    """names of layers or their endings, regular expressions, or all-linear"""


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
    hints = get_type_hints(source)
    texts = {one.arg_name: one.description for one in parse_from_object(source).params}
    fields = [
        (
            field.name,
            Annotated[
                hints[field.name] | None,
                Parameter(help=" ".join((texts[field.name] or "").split())),
                _parameter(field, hints[field.name], defaults),
            ],
            dataclasses.field(default=None),
        )
        for field in dataclasses.fields(source)
        if field.name not in leave_out
    ]
    made = dataclasses.make_dataclass(f"{source.__name__}Options", fields, frozen=True)
    made.__module__ = __name__  # else cyclopts takes it for a builtin type
    return Parameter(name="*", group=group)(made)


def _parameter(field: dataclasses.Field[Any], hint: Any, defaults: Mapping[str, Any]) -> Parameter:
    own = "the model's" if field.default is dataclasses.MISSING else field.default
    shown = defaults.get(field.name, own)
    if any(get_origin(kind) is dict for kind in get_args(hint)):
        return Parameter(converter=_pairs, n_tokens=-1, consume_multiple=True)
    opposite = field.metadata.get("opposite", f"no-{field.name.replace('_', '-')}")
    return Parameter(
        show_default=lambda _: shown, negative=f"--{opposite}" if hint is bool else None
    )


def given(options: Any) -> dict[str, Any]:
    """The options that were set, by field name."""
    if options is None:
        return {}
    return {name: value for name, value in vars(options).items() if value is not None}


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


def _tokens(tokens: Any) -> Iterator[Any]:
    """The tokens in nested dicts and lists."""
    if hasattr(tokens, "value"):
        yield tokens
        return
    for inner in tokens.values() if isinstance(tokens, dict) else tokens:
        yield from _tokens(inner)


def check_out(out: Path, overwrite: bool, *, is_file: bool = False) -> None:
    """Raises, before any work, if `out` may not be written over; an empty folder may.

    What lies at `--out` is replaced with `--overwrite`, and else refused. A training has another
    rule: it goes on with its run (`--resume`), and nothing replaces one.

    Raises:
        SurgeryError: something lies at `out` that is a run, or another program's, or is not to be
            replaced.
    """
    from nanogpt_surgery.files.atomic import check_own_file, check_own_folder
    from nanogpt_surgery.formats.folders.run_folder import is_run

    if is_run(out):
        raise SurgeryError(f"{out} holds a run, which is not written over", "choose a new --out")
    (check_own_file if is_file else check_own_folder)(out)
    empty = out.is_dir() and not any(out.iterdir())
    if out.exists() and not empty and not overwrite:
        raise SurgeryError(
            f"{out} is there already", "add --overwrite to replace it, or choose a new --out"
        )
