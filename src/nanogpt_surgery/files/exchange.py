"""Two folders change places: in one step, so that nobody ever sees neither or half of one."""

from __future__ import annotations

import ctypes
import errno
import glob
import os
import sys
import uuid
from pathlib import Path
from typing import Any

_HERE = -100  # AT_FDCWD: paths are as the process sees them
_EXCHANGE = 2  # RENAME_EXCHANGE on Linux, RENAME_SWAP on macOS
_ASIDE = ".old-"
_UNKNOWN = (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP)


class SetAsideError(OSError):
    """A folder could not be put back where it was; `aside` is where it lies, untouched."""

    def __init__(self, error: OSError, aside: Path):
        super().__init__(error.errno, error.strerror or str(error))
        self.aside = aside


def exchange(one: Path, other: Path) -> None:
    """Let two folders of one file system change places.

    Linux and macOS do it in one step. Elsewhere, and on file systems that cannot, it takes three
    renames: a kill between them leaves `other` where `set_aside` finds it.

    Raises:
        OSError: the system refuses; both are where they were.
        SetAsideError: it refuses, and then refuses to put `other` back as well.
    """
    if not _in_one_step(one, other):
        _by_renames(one, other)


def _by_renames(one: Path, other: Path) -> None:
    aside = other.with_name(f"{_ASIDE}{other.name}-{uuid.uuid4().hex[:8]}")
    other.rename(aside)
    try:
        one.rename(other)
        try:
            aside.rename(one)
        except OSError:
            other.rename(one)
            raise
    except OSError as error:
        try:
            aside.rename(other)
        except OSError:
            raise SetAsideError(error, aside) from error
        raise


def set_aside(path: Path) -> list[Path]:
    """Returns the folders that a kill in the middle of an exchange left set aside."""
    pattern = f"{_ASIDE}{glob.escape(path.name)}-{'[0-9a-f]' * 8}"
    return sorted(path.parent.glob(pattern))


def _in_one_step(one: Path, other: Path) -> bool:
    """Exchange by the system's own call; False where there is none."""
    paths = os.fsencode(one), os.fsencode(other)
    library: Any = ctypes.CDLL(None, use_errno=True) if os.name == "posix" else None
    if sys.platform == "linux" and hasattr(library, "renameat2"):
        failed = library.renameat2(_HERE, paths[0], _HERE, paths[1], _EXCHANGE)
    elif sys.platform == "darwin" and hasattr(library, "renamex_np"):
        failed = library.renamex_np(*paths, _EXCHANGE)
    else:
        return False
    if not failed:
        return True
    number = ctypes.get_errno()
    if number in _UNKNOWN:
        return False
    raise OSError(number, os.strerror(number), str(one), None, str(other))
