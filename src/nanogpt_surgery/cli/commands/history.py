"""`surgery undo`, `redo`, `log`: what was done to a folder, taken back, done again, listed."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeAlias

from cyclopts import Parameter

from nanogpt_surgery.cli.framework.console import Json, say, show
from nanogpt_surgery.errors import printable

if TYPE_CHECKING:
    from nanogpt_surgery.report import Report

Folder: TypeAlias = Annotated[Path, Parameter(help="a run or a model folder")]
HEADING = ("", "when", "operation", "state", "files")


def undo(folder: Folder, *, json: Json = False) -> None:
    """Take the last operation on a folder back: every file has the bytes it had."""
    from nanogpt_surgery.history.folder_history import undo_folder

    show(undo_folder(folder), json)
    say(f"surgery redo {folder} does it again")


def redo(folder: Folder, *, json: Json = False) -> None:
    """Do the operation on a folder again that was undone last."""
    from nanogpt_surgery.history.folder_history import redo_folder

    show(redo_folder(folder), json)
    say(f"surgery undo {folder} takes it back")


def log(folder: Path, *, json: Json = False) -> None:
    """List the operations on a folder: when, what, on which base, with which result, their state.

    Parameters
    ----------
    folder
        a run, a model or an adapter folder; operations/journal.jsonl in it holds every hash
    """
    from nanogpt_surgery.history.folder_history import folder_log
    from nanogpt_surgery.report import wrapped

    found = folder_log(folder)
    if json:
        show(found, json)
        return
    width = shutil.get_terminal_size().columns
    lines = [part for line in _paragraphs(found) for part in wrapped(line, width)]
    print(printable("\n".join(lines)))


def _paragraphs(found: Report) -> Iterator[str]:
    """The lines of each operation, below its heading, with a line for each of its files."""
    from nanogpt_surgery.report import Report

    yield found.title
    for row in found.rows:
        yield f"  {row['']}  {row['when']}  {row['operation']}: {row['state']}"
        known = {k: v for k, v in row.items() if k not in HEADING and v not in (None, "")}
        more = str(Report("", [], known)).splitlines()[1:]
        yield from (f"     {line}" for line in (*row["files"].split(", "), *more))
    yield from str(Report("", [], found.summary)).splitlines()[1:]
