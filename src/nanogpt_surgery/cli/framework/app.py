"""The commands, and what happens to an error."""

from __future__ import annotations

import errno
import os
import re
import sys
from collections.abc import Callable
from contextlib import nullcontext, suppress
from inspect import BoundArguments
from pathlib import Path
from typing import Any

from cyclopts import (
    App,
    CycloptsError,
    MissingArgumentError,
    UnknownCommandError,
    UnknownOptionError,
)

from nanogpt_surgery.cli.framework.config_file import FLAG, take_config, unknown_key
from nanogpt_surgery.cli.framework.console import complain, quiet_libraries, spoken_warnings
from nanogpt_surgery.cli.framework.options import first_line
from nanogpt_surgery.cli.framework.processes import joined
from nanogpt_surgery.cli.framework.suggestions import nearest_command, nearest_flag
from nanogpt_surgery.cli.framework.typed_command import typing
from nanogpt_surgery.errors import SurgeryError, quoted
from nanogpt_surgery.memory import is_out_of_memory

COMMANDS = (
    *("train", "plan", "finetune", "generate", "ask", "chat", "eval", "inspect", "merge", "undo"),
    *("redo", "log", "export", "verify-resume", "tokenizer", "data", "doctor"),
)
FUNCTIONS = {  # by module, where a command's is not the module and the function of its name
    "eval": "evaluate:evaluate",
    "verify-resume": "verify_resume:verify_resume",
    **{name: f"history:{name}" for name in ("undo", "redo", "log")},
}
GROUPS = {
    "tokenizer": ("Train a tokenizer.", ("train",)),
    "data": ("What a model is to learn from: made ready, looked at.", ("prepare", "preview")),
}
NEWLINE = "\n"
LESS = (
    "give it less at once: a smaller --batch-size, a shorter --block-size or --context, fewer "
    "--samples or --workers, or --dtype bfloat16"
)
STANDARD_INPUT = "standard input"  # in the place of a -
EPILOGUE = (
    "Every command takes --config FILE, a TOML file with the command's flags as keys, and "
    "--debug, which shows the traceback of an error."
)

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

_SIZE = re.compile(r"\b(?:block_size|batch_size|grad_accum_steps)\b(?! ?=)")


def make_app() -> App:
    """The application; a command's module is loaded when it is needed."""
    app = App(
        name="surgery",
        help="A GPT you can open up: train it, operate on it with LoRA, look inside.",
        help_epilogue=EPILOGUE,
        help_format="plaintext",
        version=_version,
        default_parameter=None,
        result_action="return_value",
    )
    for name in COMMANDS:
        if name in GROUPS:
            app.command(_group(name))
        else:
            function = FUNCTIONS.get(name, f"{name}:{name}")
            _add(app, name, f"nanogpt_surgery.cli.commands.{function}")
    return app


def _group(name: str) -> App:
    """A command with commands of its own, each a function in a module of both names."""
    text, commands = GROUPS[name]
    group = App(name=name, help=text)
    for command in commands:
        _add(group, command, f"nanogpt_surgery.cli.commands.{name}_{command}:{command}")
    return group


def _add(app: App, name: str, where: str) -> None:
    app.command(where, name=name, help=first_line(where))


def _version() -> str:
    from importlib.metadata import version

    return version("nanogpt-surgery")


def run(arguments: list[str] | None = None) -> None:
    """Run one command; an error that the user can mend ends with a message and status 1."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in arguments
    arguments = [argument for argument in arguments if argument != "--debug"]
    try:
        app = make_app()
        with typing(arguments), nullcontext() if debug else quiet_libraries(), spoken_warnings():
            if FLAG in arguments:
                app.config = take_config(arguments)
            with joined(" ".join(_command(arguments))):
                command, values = _parsed(app, arguments)
                command(*values.args, **values.kwargs)
        sys.stdout.flush()
    except SurgeryError as error:
        if debug:
            raise
        complain(f"surgery: {SurgeryError(error.what, with_flags(error.hint))}")
        sys.exit(1)
    except BrokenPipeError:  # the reader of our stdout has gone (`surgery inspect … | head`)
        _forget_stdout()
        sys.exit(141)
    except OSError as error:
        if debug:
            raise
        complain(f"surgery: {_refusal(error)}")
        if error.filename is None:
            _forget_stdout()
        sys.exit(1)
    except Exception as error:
        if debug or not is_out_of_memory(error):
            raise
        complain(f"surgery: memory ran out: {quoted(str(error).partition(NEWLINE)[0])}\n  → {LESS}")
        sys.exit(1)


def with_flags(hint: str) -> str:
    """A hint of the library as it is typed: `force=True` is --force, `undo_folder(a)` surgery undo.

    The calls that no command stands for stay as they are.
    """

    def command(found: re.Match[str]) -> str:
        arguments = found[2].replace(", ", " ")
        return f"{_COMMAND_OF[found[1]]} {_OUT.sub('--out ', arguments)}"

    def flag(found: re.Match[str]) -> str:
        before = hint[: found.start()]
        if before.count("(") > before.count(")"):  # an argument of a call
            return found[0]
        name, value = found[1].replace("_", "-"), found[2].strip("'")
        if value in ("True", "False"):
            return f"--{name}" if value == "True" else f"--no-{name}"
        return f"--{name} {value}"

    typed = _SETTING.sub(flag, _CALL.sub(command, hint))
    return _SIZE.sub(lambda name: f"--{name[0].replace('_', '-')}", typed)


def _forget_stdout() -> None:
    """Let what is still to be written there go nowhere: it would fail once more at the end."""
    with suppress(OSError, ValueError):  # it may be no file at all
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _refusal(error: OSError) -> str:
    """The words of the system for what it refused, and the files that it was about."""
    names = [str(name) for name in (error.filename, error.filename2) if name is not None]
    where = " → ".join(names) or ("standard output" if error.errno == errno.ENOSPC else "")
    return ": ".join(filter(None, (where, error.strerror or str(error) or type(error).__name__)))


def _parsed(app: App, arguments: list[str]) -> tuple[Callable[..., object], BoundArguments]:
    """The function of a command, and the values that it is to be called with."""
    words = [STANDARD_INPUT if word == "-" else word for word in arguments]
    try:
        command, bound, _ = app.parse_args(words, exit_on_error=False, print_error=False)
    except CycloptsError as error:
        hint = " ".join(("surgery", *_command(arguments), "--help"))
        raise (
            unknown_key(error)
            or _unknown(error, hint)
            or SurgeryError(_missing(error) or str(error), f"{hint} lists the flags")
        ) from error
    bound.arguments.update({name: _typed(value) for name, value in bound.arguments.items()})
    return command, bound


def _unknown(error: CycloptsError, hint: str) -> SurgeryError | None:
    """A flag or a command that there is not, with the one that was meant."""
    command = " ".join(("surgery", *(error.command_chain or ())))
    if isinstance(error, UnknownCommandError):
        written = (error.unused_tokens or [""])[0]
        known = GROUPS[command.split()[1]][1] if command != "surgery" else COMMANDS
        found = nearest_command(written, known)
        return SurgeryError(f"there is no {command} {written}", f"{found}? {hint} lists all")
    if isinstance(error, UnknownOptionError):
        written = error.token.keyword or error.token.value
        names = [name for argument in error.argument_collection or () for name in argument.names]
        found = nearest_flag(written, names)
        near = f"{found}? " if found.count(",") < 3 else ""  # else it is all there are
        return SurgeryError(f"{command} has no flag {written}", f"{near}{hint} lists the flags")
    return None


def _typed(value: Any) -> Any:
    """A value as it was typed: cyclopts takes a - of its own for a flag."""
    if isinstance(value, tuple):  # several words
        return tuple(map(_typed, value))
    return "-" if value == STANDARD_INPUT else value


def _missing(error: CycloptsError) -> str:
    """Names the argument that is missing, "" where that is not what is wrong."""
    argument = error.argument
    if not isinstance(error, MissingArgumentError) or argument is None or argument.tokens:
        return ""
    command = " ".join(error.command_chain or ())
    word = argument.name.lstrip("-").upper().replace("-", "_")
    if argument.field_info.is_positional:
        return f"{command} needs {'an' if word[0] in 'AEIO' else 'a'} {word}"
    place = "FILE-OR-FOLDER" if command == "export" else "FOLDER"
    return f"{command} needs {argument.name} {place if argument.hint is Path else '…'}"


def _command(arguments: list[str]) -> list[str]:
    """The words of the arguments that name a command."""
    words = [word for word in arguments if not word.startswith("-")]
    if words[:1] and words[0] in GROUPS:
        return [word for word in words[:2] if word in (words[0], *GROUPS[words[0]][1])]
    return [word for word in words if word in COMMANDS][:1]
