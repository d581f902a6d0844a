"""`surgery log`: what was done to a folder."""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from nanogpt_surgery.cli.framework.console import show
from nanogpt_surgery.errors import printable

if TYPE_CHECKING:
    from nanogpt_surgery.report import Report

HEADING = ("", "when", "operation", "state", "files")


def log(folder: Path, *, json: Annotated[bool, Parameter(negative="")] = False) -> None:
    """List the operations on a folder: when, what, on which base, with which result, their state.

    Parameters
    ----------
    folder
        a run, a model or an adapter folder
    json
        print it as JSON; operations/journal.jsonl in the folder holds every hash
    """
    from nanogpt_surgery.history.folder_history import folder_log

    found = folder_log(folder)
    if json:
        show(found, json)
    else:
        print(printable("\n".join(_lines(found, shutil.get_terminal_size().columns))))


def _lines(found: Report, width: int) -> Iterator[str]:
    """A paragraph an operation, in which only a word can be wider than the terminal."""
    from nanogpt_surgery.report import Report

    yield found.title
    for row in found.rows:
        heading = f"{row['']}  {row['when']}  {row['operation']}: {row['state']}"
        known = {k: v for k, v in row.items() if k not in HEADING and v not in (None, "")}
        first, *more = str(Report(heading, [], known)).splitlines()
        yield from _wrapped(first, width, "  ")
        for line in (*row["files"].split(", "), *more):
            yield from _wrapped(line, width, "     ")
    yield from str(Report("", [], found.summary)).splitlines()[1:]


def _wrapped(line: str, width: int, indent: str) -> list[str]:
    behind = indent + "   "
    return textwrap.wrap(
        line,
        width,
        initial_indent=indent,
        subsequent_indent=behind,
        break_long_words=False,
        break_on_hyphens=False,
    )
