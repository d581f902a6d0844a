"""A mistyped command line, and a library's hint, in the words of the command line.

`words.toml` lists what other programs call a thing: near in meaning, where spelling does not help.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Collection, Sequence
from functools import cache
from pathlib import Path

from cyclopts import CycloptsError, MissingArgumentError, UnknownCommandError, UnknownOptionError

from nanogpt_surgery.errors import SurgeryError, nearest

_SETTING = re.compile(r"\b([a-z_]+)=(True|False|[A-Z]+|'[^'\]]*'|-?[\d.]*\d)(?![\w'\]])")

# The functions of the library that its hints call, as commands.
_COMMAND_OF = {
    "folder_log": "surgery log",
    "merge_adapter": "surgery merge",
    "prepare_tokens": "surgery data prepare",
    "undo_folder": "surgery undo",
}
_CALL = re.compile(rf"\b({'|'.join(_COMMAND_OF)})\(([^()]*)\)")
_OUT = re.compile(r"\bout=")
# In a hint, and no key of a config file.
_SIZE = re.compile(r"\b(?:block_size|batch_size|grad_accum_steps)\b(?! ?[=?])")


@cache
def meanings(kind: str) -> dict[str, list[str]]:
    """For each word of another program, the flags, or the commands, that mean what it means."""
    table = tomllib.loads(Path(__file__).with_name("words.toml").read_text("utf-8"))[kind]
    found: dict[str, list[str]] = {}
    for ours, theirs in table.items():
        for word in theirs.split():
            found.setdefault(word, []).extend(ours.split())
    return found


def suggested(kind: str, written: str, known: Collection[str]) -> str:
    """Of the flags or commands that are `known`, the one that means what was written.

    Where there is none, those that are spelled most like it.
    """
    name = written.partition("=")[0].replace("_", "-").lower()
    word, means = name.lstrip("-"), meanings(kind)
    meant = means.get(word) or means.get(word.removeprefix("no-"), [])
    return next((one for one in meant if one in known), "") or nearest(name, known)


def refusal(
    error: CycloptsError, command: Sequence[str], commands: Collection[str]
) -> SurgeryError:
    """A command line that cyclopts refuses as our error, with what was meant.

    The `commands` are all that could stand behind `surgery`, or behind the word of a group.
    """
    name = " ".join(("surgery", *command))
    if isinstance(error, UnknownCommandError):
        written = (error.unused_tokens or [""])[0]
        found = suggested("commands", written, commands)
        return SurgeryError(f"there is no {name} {written}", f"{found}? {name} --help lists all")
    hint = f"{name} --help lists the flags"
    if isinstance(error, UnknownOptionError):
        written = error.token.keyword or error.token.value
        names = [name for argument in error.argument_collection or () for name in argument.names]
        flags = [name for name in names if name.startswith("--")]
        if Path(error.token.source).is_file():
            return _unknown_key(Path(error.token.source), written.strip("[]"), flags)
        found = suggested("flags", written, flags)
        near = f"{found}? " if found.count(",") < 3 else ""  # else it is all there are
        return SurgeryError(f"{name} has no flag {written}", near + hint)
    argument = error.argument
    if isinstance(error, MissingArgumentError) and argument is not None and not argument.tokens:
        word = argument.name.lstrip("-").upper().replace("-", "_")
        missing = f"{argument.name} {'PATH' if argument.hint is Path else '…'}"
        if argument.field_info.is_positional:
            missing = f"{'an' if word[0] in 'AEIO' else 'a'} {word}"
        return SurgeryError(f"{' '.join(command)} needs {missing}", hint)
    return SurgeryError(str(error), hint)


def _unknown_key(file: Path, key: str, flags: Collection[str]) -> SurgeryError:
    """An unknown key of a config file, with its line and the nearest key."""
    lines = file.read_text(encoding="utf-8").splitlines()
    number = next((i for i, line in enumerate(lines, 1) if line.strip().startswith(key)), 0)
    found = suggested("flags", f"--{key}", flags)
    known = ", ".join(flag[2:].replace("-", "_") for flag in found.split(", "))
    return SurgeryError(f"{file}, line {number}: unknown key {key}", f"{known}?")


def with_flags(hint: str) -> str:
    """A hint of the library as it is typed: sizes that it names as flags too."""
    return _SIZE.sub(lambda name: f"--{name[0].replace('_', '-')}", settings_as_flags(hint))


def settings_as_flags(text: str) -> str:
    """Writes `force=True` as --force, and `undo_folder(a)` as surgery undo.

    The calls that no command stands for stay as they are.
    """

    def command(found: re.Match[str]) -> str:
        arguments = found[2].replace(", ", " ")
        return f"{_COMMAND_OF[found[1]]} {_OUT.sub('--out ', arguments)}"

    def flag(found: re.Match[str]) -> str:
        before = text[: found.start()]
        if before.count("(") > before.count(")"):  # an argument of a call
            return found[0]
        name, value = found[1].replace("_", "-"), found[2].strip("'")
        if value in ("True", "False"):
            return f"--{name}" if value == "True" else f"--no-{name}"
        return f"--{name} {value}"

    return _SETTING.sub(flag, _CALL.sub(command, text))
