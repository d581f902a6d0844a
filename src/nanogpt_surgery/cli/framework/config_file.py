"""`--config FILE`: a TOML file whose keys are the command's flags."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import TYPE_CHECKING

from cyclopts import CycloptsError, UnknownOptionError

from nanogpt_surgery.cli.framework.suggestions import nearest_flag
from nanogpt_surgery.errors import SurgeryError

if TYPE_CHECKING:
    from cyclopts.config import Toml

FLAG = "--config"


def take_config(arguments: list[str]) -> tuple[Toml, ...]:
    """Take `--config FILE` out of the arguments.

    Raises:
        SurgeryError: the file is missing, or is not TOML (with its line).
    """
    from cyclopts.config import Toml  # slow to load

    place = arguments.index(FLAG)
    if place + 1 == len(arguments):
        raise SurgeryError(f"{FLAG} needs a file", f"surgery train {FLAG} shakespeare.toml")
    path = arguments[place + 1]
    del arguments[place : place + 2]
    try:
        tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise SurgeryError(f"there is no file {path}") from None
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise SurgeryError(f"{path} cannot be read as TOML: {error}") from None
    return (Toml(path, must_exist=True, use_commands_as_keys=False),)


def unknown_key(error: CycloptsError) -> SurgeryError | None:
    """An unknown key of a config file as an error with its line and the nearest key."""
    if not isinstance(error, UnknownOptionError) or not Path(error.token.source).is_file():
        return None
    path, key = error.token.source, (error.token.keyword or "").strip("[]")
    lines = Path(path).read_text(encoding="utf-8").splitlines()
    number = next((i for i, line in enumerate(lines, 1) if line.strip().startswith(key)), 0)
    flags = [name for argument in error.argument_collection or () for name in argument.names]
    found = nearest_flag(f"--{key.replace('_', '-')}", flags)
    known = ", ".join(flag[2:].replace("-", "_") for flag in found.split(", "))
    return SurgeryError(f"{path}, line {number}: unknown key {key}", f"{known}?")
