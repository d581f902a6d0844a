"""A lock that one process holds on a folder while it writes there."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from nanogpt_surgery.errors import SurgeryError
from nanogpt_surgery.files.disk_errors import disk_refuses, tried_again

LOCK = "LOCK"  # the file, in folders that have one


@contextmanager
def file_lock(path: Path) -> Iterator[None]:
    """Holds a lock file, or a folder, against other processes; a process that dies lets go.

    Raises:
        SurgeryError: another process holds it.
    """
    if os.name != "posix":
        yield
        return
    import fcntl

    flags = os.O_RDONLY if path.is_dir() else os.O_RDWR | os.O_CREAT
    try:
        descriptor = tried_again(lambda: os.open(path, flags, 0o644))
    except OSError as error:
        raise disk_refuses(path, error) from error
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise _is_held(path) from None
        if path.is_file():
            os.ftruncate(descriptor, 0)
            os.write(descriptor, str(os.getpid()).encode())
        yield
    finally:
        os.close(descriptor)


def _is_held(path: Path) -> SurgeryError:
    owner = f" (PID {path.read_text('utf-8').strip()})" if path.is_file() else ""
    folder = path.parent if path.is_file() else path
    return SurgeryError(
        f"{folder} is being written by another process{owner}",
        "wait for it, or choose a new folder",
    )
