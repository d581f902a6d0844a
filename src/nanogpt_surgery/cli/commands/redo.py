"""`surgery redo`: an operation on a folder that was undone, done again."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from nanogpt_surgery.cli.framework.console import say, show


def redo(folder: Path, *, json: Annotated[bool, Parameter(negative="")] = False) -> None:
    """Do the operation on a folder again that was undone last.

    Parameters
    ----------
    folder
        a run or a model folder
    json
        print the hashes as JSON
    """
    from nanogpt_surgery.history.folder_history import redo_folder

    show(redo_folder(folder), json)
    say(f"surgery undo {folder} takes it back")
