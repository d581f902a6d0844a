"""`surgery undo`: the last operation on a folder, taken back."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from nanogpt_surgery.cli.framework.console import say, show


def undo(folder: Path, *, json: Annotated[bool, Parameter(negative="")] = False) -> None:
    """Take the last operation on a folder back: every file has the bytes it had.

    Parameters
    ----------
    folder
        a run or a model folder
    json
        print the hashes as JSON
    """
    from nanogpt_surgery.history.folder_history import undo_folder

    show(undo_folder(folder), json)
    say(f"surgery redo {folder} does it again")
