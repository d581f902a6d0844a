"""`surgery log`: what was done to a folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from nanogpt_surgery.cli.console import show


def log(folder: Path, *, json: Annotated[bool, Parameter(negative="")] = False) -> None:
    """List the operations on a folder: when, what, on which base, with which result, their state.

    Parameters
    ----------
    folder
        a run, a model or an adapter folder
    json
        print it as JSON; operations/journal.jsonl in the folder holds every hash
    """
    from nanogpt_surgery.formats.folder_journal import folder_log

    show(folder_log(folder), json)
