"""The commands, and what happens to an error."""

from __future__ import annotations

import os
import sys
from importlib.metadata import version

from cyclopts import App
from cyclopts.config import Toml

from nanogpt_surgery.cli.console import printable, say, spoken_warnings
from nanogpt_surgery.cli.options import first_line
from nanogpt_surgery.errors import SurgeryError

COMMANDS = ("train", "finetune", "generate", "inspect", "merge", "doctor")
EPILOGUE = (
    "Every command takes --config FILE, a TOML file with the command's flags as keys, and "
    "--debug, which shows the traceback of an error."
)


def make_app() -> App:
    """The application; a command's module is loaded when it is needed."""
    app = App(
        name="surgery",
        help="A GPT you can open up: train it, operate on it with LoRA, look inside.",
        help_epilogue=EPILOGUE,
        help_format="plaintext",
        version=version("nanogpt-surgery"),
        default_parameter=None,
        result_action="return_value",
    )
    for name in COMMANDS:
        where = f"nanogpt_surgery.cli.{name}:{name}"
        app.command(where, name=name, help=first_line(where))
    return app


def run(arguments: list[str] | None = None) -> None:
    """Run one command; an error that the user can mend ends with a message and status 1."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in arguments
    arguments = [argument for argument in arguments if argument != "--debug"]
    try:
        app = make_app()
        app.config = _config(arguments)
        with spoken_warnings():
            app(arguments)
    except SurgeryError as error:
        if debug:
            raise
        say(printable(f"surgery: {error}"))
        sys.exit(1)
    except BrokenPipeError:  # the reader of our stdout has gone (`surgery inspect … | head`)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)


def _config(arguments: list[str]) -> tuple[Toml, ...]:
    """Take `--config FILE` out of the arguments."""
    if "--config" not in arguments:
        return ()
    place = arguments.index("--config")
    if place + 1 == len(arguments):
        raise SurgeryError("--config needs a file", "surgery train --config shakespeare.toml")
    path = arguments[place + 1]
    del arguments[place : place + 2]
    return (Toml(path, must_exist=True, use_commands_as_keys=False),)
