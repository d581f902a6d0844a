"""Output: data to stdout, everything about the work to stderr."""

from __future__ import annotations

import logging
import os
import shutil
import sys
import warnings
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, TextIO

from nanogpt_surgery.cli.framework.suggestions import settings_as_flags
from nanogpt_surgery.errors import SurgeryError, SurgeryWarning, printable
from nanogpt_surgery.report import Report, wrapped

QUIET = {"TOKENIZERS_PARALLELISM": "false", "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1"}
DISTRIBUTED_COMMANDS = ("train", "finetune")


def is_distributed() -> bool:
    """Whether torchrun started more than one process; others set `WORLD_SIZE` too."""
    return "TORCHELASTIC_RUN_ID" in os.environ and int(os.environ.get("WORLD_SIZE", "1")) > 1


def is_main_process() -> bool:
    """Whether this process is the one that speaks for all."""
    return not is_distributed() or os.environ.get("RANK", "0") == "0"


def joined(command: str) -> AbstractContextManager[object]:
    """The processes of a command, joined where there are several.

    Raises:
        SurgeryError: the command is none that several share, or there are fewer GPUs.
    """
    if not is_distributed():
        return nullcontext()
    if command not in DISTRIBUTED_COMMANDS:
        raise SurgeryError(
            f"{os.environ['WORLD_SIZE']} processes were started for surgery {command}, "
            f"and only {' and '.join(DISTRIBUTED_COMMANDS)} share their work",
            "run it without torchrun",
        )
    from nanogpt_surgery.training import distributed

    return distributed.joined()


def ready_streams() -> None:
    """Makes stdout and stderr take whatever is written.

    One that was closed before the start (`>&-`) becomes the void. A character that an encoding has
    not is escaped: a report with a × in it also comes out in ASCII.
    """
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, Path(os.devnull).open("w", encoding="utf-8"))  # noqa: SIM115
        getattr(sys, name).reconfigure(errors="backslashreplace")


def say(text: str) -> None:
    """A line about the work; of several processes the first one speaks."""
    if is_main_process():
        complain(text)


def say_from_library(text: str) -> None:
    """The same, of a line in which the library names settings: `stride=1` is --stride 1."""
    say(settings_as_flags(text))


def complain(text: str) -> None:
    """A line that every process may say; those after the first one with their number."""
    who = "" if is_main_process() else f"process {os.environ['RANK']}: "
    width, lines = width_of(sys.stderr), printable(who + text).split("\n")
    text = "\n".join(part for line in lines for part in wrapped(line, width))
    print(text, file=sys.stderr, flush=True)


def show(report: Report, as_json: bool, all_layers: bool = False) -> None:
    """The result of a command: as a table, or as JSON."""
    if is_main_process():
        print(report.to_json() if as_json else _text(report, all_layers, sys.stdout))


def say_report(report: Report, all_layers: bool = False) -> None:
    """A report about the work that goes on."""
    say(_text(report, all_layers, sys.stderr))


def _text(report: Report, all_layers: bool, stream: TextIO) -> str:
    return printable(report.to_text(width_of(stream), all_layers, "--all shows each"))


def width_of(stream: TextIO) -> int | None:
    """The columns of a terminal; None where lines may be of any length."""
    return shutil.get_terminal_size().columns if stream.isatty() else None


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """No remark of a library comes between our lines, unless the user's environment asks for it.

    A download shows its progress on a terminal alone.
    """
    bars = {} if sys.stderr.isatty() else {"HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    for name, value in (QUIET | bars).items():
        os.environ.setdefault(name, value)
    before = logging.root.manager.disable
    if "TORCH_LOGS" not in os.environ:
        logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


@contextmanager
def spoken_warnings() -> Iterator[None]:
    """Our own warnings become lines on stderr, a repeated one once; no others are shown."""
    with warnings.catch_warnings():
        warnings.simplefilter("default", SurgeryWarning)

        def shown(message: Any, category: Any, *place: Any, **more: Any) -> None:
            if issubclass(category, SurgeryWarning):
                say_from_library(f"note: {message}")

        setattr(warnings, "showwarning", shown)  # noqa: B010 - typeshed wants its exact signature
        yield


def write(pieces: Iterable[str]) -> None:
    """Writes the pieces of a text to stdout as they come."""
    for piece in pieces:
        sys.stdout.write(printable(piece) if sys.stdout.isatty() else piece)
        sys.stdout.flush()


@contextmanager
def notes_afterwards() -> Iterator[None]:
    """Warnings of a block wait for its end: none comes between the pieces of a text."""
    noted: list[warnings.WarningMessage] = []
    try:
        with warnings.catch_warnings(record=True) as noted:
            yield
    finally:
        for note in noted:
            warnings.showwarning(note.message, note.category, note.filename, note.lineno)
