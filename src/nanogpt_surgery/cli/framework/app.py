"""The commands, and what happens to an error."""

from __future__ import annotations

import errno
import os
import re
import sys
from collections.abc import Callable
from contextlib import nullcontext, suppress
from importlib import import_module
from importlib.metadata import version
from inspect import BoundArguments
from typing import Any

from cyclopts import App, CycloptsError, Parameter

from nanogpt_surgery.cli.framework.config_file import FLAG, take_config, typing
from nanogpt_surgery.cli.framework.console import complain, joined, quiet_libraries, spoken_warnings
from nanogpt_surgery.cli.framework.suggestions import refusal
from nanogpt_surgery.errors import SurgeryError, quoted
from nanogpt_surgery.memory import is_out_of_memory

COMMANDS = (
    *("train", "plan", "finetune", "generate", "ask", "chat", "eval", "look", "inspect", "merge"),
    *("undo", "redo", "log", "export", "verify-resume", "adapter", "tokenizer", "data", "doctor"),
)
PLACES = {  # of the functions that lie in a module of another name than the command's
    "eval": "evaluate:evaluate",
    "verify-resume": "verify_resume:verify_resume",
    **{name: f"history:{name}" for name in ("undo", "redo", "log")},
}
GROUPS = {
    "adapter": ("Look at an adapter.", ("examine",)),
    "tokenizer": ("Train a tokenizer.", ("train",)),
    "data": ("Prepare data to train on, and preview it.", ("prepare", "preview")),
}
MEMORY_HINT = (
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

_SIZE = re.compile(
    r"\b(?:block_size|batch_size|grad_accum_steps)\b(?! ?[=?])"
)  # in a hint, no key of a config file


def make_app(lazily: bool = True) -> App:
    """The application; a command's module is loaded when it is needed, or now, to list its help."""
    app = App(
        name="surgery",
        help="A GPT you can open up: train it, operate on it with LoRA, look inside.",
        help_epilogue=EPILOGUE,
        help_format="markdown",
        version=lambda: version("nanogpt-surgery"),
        default_parameter=Parameter(negative=""),
        result_action="return_value",
    )
    for name in COMMANDS:
        if name in GROUPS:
            text, commands = GROUPS[name]
            app.command(App(name=name, help=text))
            for command in commands:
                _add(app[name], command, f"{name}_{command}:{command}", lazily)
        else:
            _add(app, name, PLACES.get(name, f"{name}:{name}"), lazily)
    return app


def _add(app: App, name: str, place: str, lazily: bool) -> None:
    """Adds a command, a function in a module of commands."""
    module, _, function = f"nanogpt_surgery.cli.commands.{place}".partition(":")
    command = f"{module}:{function}" if lazily else getattr(import_module(module), function)
    app.command(command, name=name)


def run(arguments: list[str] | None = None) -> None:
    """Runs one command; an error that the user can mend ends with a message and status 1."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in arguments
    arguments = [argument for argument in arguments if argument != "--debug"]
    try:
        named = any(word not in GROUPS and not word.startswith("-") for word in arguments)
        app = make_app(lazily=named)
        with typing(arguments), nullcontext() if debug else quiet_libraries(), spoken_warnings():
            if FLAG in arguments:
                take_config(app, arguments)
            command, function, values = _parsed(app, arguments)
            with joined(" ".join(command)):
                function(*values.args, **values.kwargs)
        sys.stdout.flush()
    except Exception as error:
        message = _message(error)
        if isinstance(error, BrokenPipeError):  # the reader of our stdout has gone (`… | head`)
            _forget_stdout()
            sys.exit(141)
        if debug or message is None:
            raise
        complain(f"surgery: {message}")
        if isinstance(error, OSError) and error.filename is None:
            _forget_stdout()
        sys.exit(1)


def _message(error: Exception) -> str | None:
    """Returns the message for an error; None for a bug, whose traceback is shown."""
    if isinstance(error, SurgeryError):
        return str(SurgeryError(error.what, with_flags(error.hint)))
    if isinstance(error, OSError):  # the words of the system, and the files that it was about
        names = [str(name) for name in (error.filename, error.filename2) if name is not None]
        where = " → ".join(names) or ("standard output" if error.errno == errno.ENOSPC else "")
        reason = error.strerror or str(error) or type(error).__name__
        return ": ".join(filter(None, (where, reason)))
    if is_out_of_memory(error):
        return f"memory ran out: {quoted(str(error).partition(chr(10))[0])}\n  → {MEMORY_HINT}"
    return None


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
    """Sends what is still to be written there to nowhere: it would fail once more at the end."""
    with suppress(OSError, ValueError):  # it may be no file at all
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _parsed(
    app: App, arguments: list[str]
) -> tuple[tuple[str, ...], Callable[..., object], BoundArguments]:
    """The words of a command, its function, and the values that it is to be called with."""
    words = [STANDARD_INPUT if word == "-" else word for word in arguments]
    command = app.parse_commands(words)[0]
    try:
        function, bound, _ = app.parse_args(words, exit_on_error=False, print_error=False)
    except CycloptsError as error:
        known = GROUPS[command[0]][1] if command and command[0] in GROUPS else COMMANDS
        raise refusal(error, command, known) from error
    bound.arguments.update({name: _typed(value) for name, value in bound.arguments.items()})
    return command, function, bound


def _typed(value: Any) -> Any:
    """A value as it was typed: cyclopts takes a - of its own for a flag."""
    if isinstance(value, tuple):  # several words
        return tuple(map(_typed, value))
    return "-" if value == STANDARD_INPUT else value
