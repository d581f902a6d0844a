"""A lock that one process holds on a folder while it writes there."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from nanogpt_surgery.errors import SurgeryError
from nanogpt_surgery.files.disk_errors import disk_refuses, tried_again, writing

LOCK = "LOCK"  # the file, in folders that have one


@contextmanager
def file_lock(path: Path) -> Iterator[None]:
    """Holds a lock file, or a folder, against other processes; a process that dies lets go.

    A model folder is handed on, so there is no file for its lock in it: the folder itself is
    locked, or on Windows, which cannot, a file beside it that goes with the lock.

    Raises:
        SurgeryError: another process holds it.
    """
    if os.name == "posix" and path.is_dir():
        with _folder_lock(path):
            yield
        return
    place = path.with_name(f".lock-{path.name}") if path.is_dir() else path
    lock = FileLock(place, mode=0o644, thread_local=False)
    try:
        tried_again(lambda: lock.acquire(blocking=False))
    except Timeout:
        raise _is_held(path) from None
    except OSError as error:
        raise disk_refuses(place, error) from error
    try:
        with suppress(OSError):  # Windows keeps what is locked from being written
            place.write_text(str(os.getpid()))
        yield
    finally:
        lock.release()


@contextmanager
def _folder_lock(folder: Path) -> Iterator[None]:
    import fcntl

    with writing(folder):
        descriptor = tried_again(lambda: os.open(folder, os.O_RDONLY))
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise _is_held(folder) from None
        yield
    finally:
        os.close(descriptor)


def _is_held(path: Path) -> SurgeryError:
    owner = ""
    with suppress(OSError):
        owner = f" (PID {path.read_text('utf-8').strip()})"
    folder = path if path.is_dir() else path.parent
    return SurgeryError(
        f"{folder} is being written by another process{owner}",
        "wait for it, or choose a new folder",
    )
