"""A model written anew into a folder that holds one: what is true of what was there stays."""

from __future__ import annotations

import shutil
from pathlib import Path

from nanogpt_surgery.files.json_files import read_json
from nanogpt_surgery.formats.huggingface.carried_files import CONFIG
from nanogpt_surgery.formats.model_file import TENSORS


def leave_away(new: Path, place: Path) -> None:
    """Drop the new files that `place` has already; of configs only one that says the same.

    A run may lack any of them: a kill came before its checkpoint was shown at the top.
    """
    for path in [path for path in new.iterdir() if path.name != TENSORS]:
        there = place / path.name
        if path.is_dir() and there.is_dir():
            shutil.rmtree(path)
        elif there.is_file() and (path.name != CONFIG or read_json(there) == read_json(path)):
            path.unlink()
