"""Temporary names beside what they will become."""

from __future__ import annotations

import glob
import os
import shutil
import uuid
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    pass


_TEMPORARY = ".tmp-"


def temporary_beside(path: Path) -> Path:
    """A new name beside a path, of the pattern that only this module gives."""
    return path.with_name(f"{_TEMPORARY}{_shortened(path.name)}-{uuid.uuid4().hex[:8]}")


def _shortened(name: str) -> str:
    """A name that leaves room for more in the 255 bytes of most file systems."""
    return (
        name if len(os.fsencode(name)) <= 240 else os.fsencode(name)[:220].decode("utf-8", "ignore")
    )


def is_temporary(path: Path) -> bool:
    """Whether a name is of the pattern that only this module gives."""
    return path.name.startswith(_TEMPORARY)


def remove_temporaries(folder: Path, of: str | None = None) -> None:
    """Remove what a killed process left unfinished; for the one process that writes there.

    Args:
        folder: where to look.
        of: only what was to become the file or folder of this name.
    """
    name = "" if of is None else glob.escape(_shortened(of))
    pattern = f"{_TEMPORARY}*" if of is None else f"{_TEMPORARY}{name}-{'[0-9a-f]' * 8}"
    for path in folder.glob(pattern):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            with suppress(OSError):  # it is in nobody's way
                path.unlink()
