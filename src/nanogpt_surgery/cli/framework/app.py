"""The commands, their config file, and what happens to an error."""

from __future__ import annotations

import errno
import os
import sys
import tomllib
from collections.abc import Callable
from contextlib import nullcontext, suppress
from contextvars import ContextVar
from importlib import import_module
from importlib.metadata import version
from inspect import BoundArguments
from pathlib import Path
from typing import Any

from cyclopts import App, CycloptsError, Parameter

from nanogpt_surgery.cli.framework.console import complain, joined, quiet_libraries, spoken_warnings
from nanogpt_surgery.cli.framework.suggestions import refusal, with_flags
from nanogpt_surgery.errors import SurgeryError, quoted
from nanogpt_surgery.memory import is_out_of_memory

COMMANDS = {  # the module of `commands` that holds each, and its function
    "train": "train:train",
    "plan": "inspect:plan",
    "finetune": "train:finetune",
    "generate": "talk:generate",
    "ask": "talk:ask",
    "chat": "talk:chat",
    "eval": "evaluate:evaluate",
    "look": "look:look",
    "serve": "serve:serve",
    "inspect": "inspect:inspect",
    "merge": "folders:merge",
    "undo": "folders:undo",
    "redo": "folders:redo",
    "log": "folders:log",
    "export": "folders:export",
    "verify-resume": "verify_resume:verify_resume",
    "model": "",
    "adapter": "",
    "tokenizer": "",
    "data": "",
    "doctor": "inspect:doctor",
}
_ADAPTER = ("examine", "combine", "compress", "extract", "ablate")
GROUPS = {
    "model": (
        "Change a model's structure or weights, in place or elsewhere.",
        {
            "prune": "model:prune",
            "duplicate": "model:duplicate",
            "combine": "model:combine",
            "vocabulary": "model:vocabulary",
            "direction": "directions:direction",
            "edit": "edits:edit",
        },
    ),
    "adapter": (
        "Look at an adapter, or make one of others, of two models, or by cutting.",
        {name: f"adapter:{name}" for name in _ADAPTER},
    ),
    "tokenizer": ("Train a tokenizer.", {"train": "data:train_tokenizer"}),
    "data": (
        "Prepare data to train on, and preview it.",
        {"prepare": "data:prepare", "preview": "data:preview"},
    ),
}
CONFIG = "--config"
_TYPED: ContextVar[tuple[str, ...]] = ContextVar("typed", default=())
MEMORY_HINT = (
    "give it less at once: a smaller --batch-size, a shorter --block-size or --context, fewer "
    "--samples or --workers, or --dtype bfloat16"
)
STANDARD_INPUT = "standard input"  # in the place of a -
EPILOGUE = (
    "Every command takes --config FILE, a TOML file with the command's flags as keys, and "
    "--debug, which shows the traceback of an error."
)


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
    for name, place in COMMANDS.items():
        if name in GROUPS:
            text, commands = GROUPS[name]
            app.command(App(name=name, help=text))
            for command, inner in commands.items():
                app[name].command(_command(inner, lazily), name=command)
        else:
            app.command(_command(place, lazily), name=name)
    return app


def _command(place: str, lazily: bool) -> Any:
    """A function of a module of commands, or the place where cyclopts finds it."""
    module, _, function = f"nanogpt_surgery.cli.commands.{place}".partition(":")
    return f"{module}:{function}" if lazily else getattr(import_module(module), function)


def run(arguments: list[str] | None = None) -> None:
    """Runs one command; an error that the user can mend ends with a message and status 1."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in arguments
    arguments = [argument for argument in arguments if argument != "--debug"]
    try:
        named = any(word not in GROUPS and not word.startswith("-") for word in arguments)
        app = make_app(lazily=named)
        _TYPED.set(tuple(arguments))
        with nullcontext() if debug else quiet_libraries(), spoken_warnings():
            if CONFIG in arguments:
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


def take_config(app: App, arguments: list[str]) -> None:
    """Takes `--config FILE` out of the arguments, and its values into the app.

    Raises:
        SurgeryError: the file is missing, or is not TOML (with its line).
    """
    from cyclopts.config import Dict  # slow to load

    place = arguments.index(CONFIG)
    if place + 1 == len(arguments):
        raise SurgeryError(f"{CONFIG} needs a file", f"surgery train {CONFIG} shakespeare.toml")
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


def typed_command() -> dict[str, Any]:
    """The words behind `surgery`, the folder they were typed in, and the text of --config."""
    words = _TYPED.get()
    place = words.index(CONFIG) + 1 if CONFIG in words else len(words)
    config = Path(words[place]) if place < len(words) else None
    return {
        "arguments": list(words),
        "folder": str(Path.cwd()),
        "config": config.read_text(encoding="utf-8") if config and config.is_file() else None,
    }
