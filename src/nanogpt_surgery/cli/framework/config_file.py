"""A command as it was typed, for its run folder; and `--config FILE`, TOML with flags as keys."""

from __future__ import annotations

import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nanogpt_surgery.errors import SurgeryError

if TYPE_CHECKING:
    from cyclopts import App

FLAG = "--config"
_TYPED: ContextVar[tuple[str, ...]] = ContextVar("typed", default=())


def take_config(app: App, arguments: list[str]) -> None:
    """Takes `--config FILE` out of the arguments, and its values into the app.

    Raises:
        SurgeryError: the file is missing, or is not TOML (with its line).
    """
    from cyclopts.config import Dict  # slow to load

    place = arguments.index(FLAG)
    if place + 1 == len(arguments):
        raise SurgeryError(f"{FLAG} needs a file", f"surgery train {FLAG} shakespeare.toml")
    path = arguments[place + 1]
    del arguments[place : place + 2]
    try:
        values = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise SurgeryError(f"there is no file {path}") from None
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise SurgeryError(f"{path} cannot be read as TOML: {error}") from None
    # Cyclopts passes over keys of a flat file that are also commands, as data and tokenizer are.
    for word in reversed(app.parse_commands(arguments)[0]):
        values = {word: values}
    app.config = (Dict(values, source=path),)


@contextmanager
def typing(arguments: list[str]) -> Iterator[None]:
    """Keeps what was typed, for the block."""
    token = _TYPED.set(tuple(arguments))
    try:
        yield
    finally:
        _TYPED.reset(token)


def typed_command() -> dict[str, Any]:
    """The words behind `surgery`, the folder they were typed in, and the text of --config."""
    words = _TYPED.get()
    place = words.index(FLAG) + 1 if FLAG in words else len(words)
    config = Path(words[place]) if place < len(words) else None
    return {
        "arguments": list(words),
        "folder": str(Path.cwd()),
        "config": config.read_text(encoding="utf-8") if config and config.is_file() else None,
    }
