"""Files flushed to the disk, tensors written, files put at a second place."""

from __future__ import annotations

import os
import re
import shutil
import stat
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from nanogpt_surgery.files.disk_errors import NotFlushedError, UnwrittenError, tried_again
from nanogpt_surgery.files.temporary import temporary_beside

if TYPE_CHECKING:
    from torch import Tensor


def flush(path: Path) -> None:
    """Ask the system to put a file, or a folder's list of names, on the disk now."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def flush_place(goal: Path) -> None:
    """Ask the system to keep the place that a file or folder has just taken.

    Raises:
        NotFlushedError: it refuses; the new state is in its place all the same.
    """
    try:
        flush(goal.parent)
    except OSError as error:
        raise NotFlushedError(
            f"{goal} is written whole and in its place, but {goal.parent} could not be flushed to "
            f"the disk: {error.strerror or error}; a power cut may bring back what was there "
            "before",
            "look after the disk, and whether the new state is still there",
        ) from error


def write_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    """Write a safetensors file; what the disk refuses is an `OSError`.

    The library makes files that nobody but their owner can read: the mode is that of any new file.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    path.touch()
    mode = stat.S_IMODE(path.stat().st_mode)
    try:
        save_file(tensors, path, metadata={"format": "pt"})
    except SafetensorError as error:
        raise UnwrittenError(_as_os_error(error), path, _bytes_of(tensors)) from error
    path.chmod(mode)


def _as_os_error(error: Exception) -> OSError:
    """The system's error that a library in Rust has put into words."""
    found = re.search(r"\(os error (\d+)\)", str(error))
    return OSError(int(found[1]), os.strerror(int(found[1]))) if found else OSError(str(error))


def _bytes_of(tensors: dict[str, Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def link_or_copy(source: Path, goal: Path) -> None:
    """Put a file that never changes at a second place, in one rename.

    No bytes are copied where the file system can link.
    """
    if goal.exists() and goal.samefile(source):
        return  # and a rename between two names of one file would leave both
    tried_again(lambda: _link_or_copy(source, goal))


def _link_or_copy(source: Path, goal: Path) -> None:
    temporary = temporary_beside(goal)
    try:
        try:
            temporary.hardlink_to(source)
        except OSError:
            shutil.copyfile(source, temporary)
            flush(temporary)
        temporary.replace(goal)
    finally:
        with suppress(OSError):
            temporary.unlink()
