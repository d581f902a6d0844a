"""Errors of the disk in plain words, and a second try where it fails for a moment."""

from __future__ import annotations

import errno
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from nanogpt_surgery.errors import SurgeryError

T = TypeVar("T")
ATTEMPTS = 3
_PASSING = (errno.EIO, errno.ESTALE, errno.ETIMEDOUT)
_is_dir = os.path.isdir  # unlike the method of a path, False where looking is not allowed
_PAUSE = 0.1  # seconds before the second attempt, twice as many before each later one


class UnwrittenError(OSError):
    """A file that the system refused to write, and how many bytes it was to have."""

    def __init__(self, error: OSError, path: Path, needed: int):
        super().__init__(error.errno, error.strerror or str(error), str(path))
        self.needed = needed


class SetAsideError(OSError):
    """A folder could not be put back where it was; `aside` is where it lies, untouched."""

    def __init__(self, error: OSError, aside: Path):
        super().__init__(error.errno, error.strerror or str(error))
        self.aside = aside


class NotFlushedError(SurgeryError):
    """A new state is in its place, but the disk may not keep it there."""


def disk_refuses(goal: Path, error: OSError, needed: int | None = None) -> SurgeryError:
    """An error that says why the system refused to write `goal`, in its words and with the facts.

    Args:
        goal: what was to be written.
        error: what the system said.
        needed: bytes, where known.
    """
    said = error.strerror or str(error)
    if isinstance(error, SetAsideError):
        return SurgeryError(
            f"could not write {goal}: {said}; what was there before could not be put "
            f"back and lies, untouched, at {error.aside}",
            f"{'move the new state away, then ' if goal.exists() else ''}mv {error.aside} {goal}",
        )
    fact, hint = _facts(goal, error, needed or getattr(error, "needed", None))
    fact = f" ({fact})" if fact else ""
    return SurgeryError(
        f"could not write {goal}: {said}{fact}; what was there before is untouched", hint
    )


@contextmanager
def writing(goal: Path) -> Iterator[None]:
    """A block in which whatever the system refuses is an error about `goal`.

    Raises:
        SurgeryError: it refuses.
    """
    try:
        yield
    except OSError as error:
        raise disk_refuses(goal, error) from error


def _facts(goal: Path, error: OSError, needed: int | None) -> tuple[str, str]:
    """The facts behind a refusal, and the next thing to do; "" where there is none to add."""
    elsewhere = "write to another place"
    there, blocking = _nearest_folder(goal), _file_in_the_way(goal)
    match error.errno:
        case errno.ENOSPC | errno.EDQUOT | errno.EFBIG:
            return _space(goal, error, needed), _SPACE_HINTS[error.errno]
        case errno.EACCES | errno.EPERM:
            own = goal if os.path.lexists(goal) and not os.access(goal, os.W_OK) else there
            return f"no permission for {own}", f"ls -ld {own} shows whose it is; or {elsewhere}"
        case errno.EROFS:
            return f"{there} is on a read-only file system", elsewhere
        case errno.ENOTDIR | errno.EEXIST | errno.EISDIR if blocking:
            return f"{blocking} is a file, not a folder", elsewhere
        case errno.EISDIR | errno.EEXIST | errno.ENOTEMPTY if goal.is_dir():
            return f"{goal} is a folder, not a file", elsewhere
        case errno.ENOENT:
            missing = there / goal.absolute().relative_to(there).parts[0]
            return (f"there is no folder {missing}", f"mkdir -p {goal.parent}, or {elsewhere}")
        case errno.ENAMETOOLONG:
            longest = max(len(os.fsencode(part)) for part in goal.parts)
            return (
                f"a name in it has {longest} bytes",
                "choose a shorter name; most allow 255 bytes",
            )
        case errno.EIO | errno.ESTALE | errno.ETIMEDOUT:
            return (
                f"tried {ATTEMPTS} times",
                f"look after the disk (dmesg says more), or {elsewhere}",
            )
        case errno.EMFILE | errno.ENFILE:
            return "", "ulimit -n shows how many files may be open; close some, or raise it"
    return "", elsewhere


_SPACE_HINTS = {
    errno.ENOSPC: "free some space, or write to another place",
    errno.EDQUOT: "free some of your quota (quota -s shows it), or write to another place",
    errno.EFBIG: "ulimit -f shows how large a file may be here; or write to another place",
}


def _space(goal: Path, error: OSError, needed: int | None) -> str:
    there = _nearest_folder(goal)
    wanted = f"{needed:,} bytes needed, " if needed else ""
    known = os.statvfs(there) if hasattr(os, "statvfs") else None
    if error.errno == errno.ENOSPC and known and known.f_files and not known.f_favail:
        return f"{wanted}no more files fit there: 0 inodes free"
    return f"{wanted}{shutil.disk_usage(there).free:,} bytes free there"


def _nearest_folder(path: Path) -> Path:
    """The innermost folder above a path that is there."""
    return next(folder for folder in path.absolute().parents if _is_dir(folder))


def free_bytes(path: Path) -> int:
    """Bytes free on the disk that a path is on, or will be."""
    return shutil.disk_usage(path if _is_dir(path) else _nearest_folder(path)).free


def _file_in_the_way(path: Path) -> Path | None:
    """Returns the file that stands where a path needs a folder."""
    above = [*reversed(path.parents)]
    return next((part for part in above if os.path.lexists(part) and not _is_dir(part)), None)


def tried_again(action: Callable[[], T], never: tuple[type[Exception], ...] = ()) -> T:
    """The result of an action, done again up to twice where the device fails for a moment.

    The action must begin anew each time: to flush a file again that failed to be flushed tells
    nothing, since the system forgets what it could not write. Errors of the kinds `never` are not
    answered by another attempt.

    Raises:
        OSError, SurgeryError: of the last attempt, or of the first one that no attempt will mend.
    """
    for attempt in range(1, ATTEMPTS):
        try:
            return action()
        except (OSError, SurgeryError) as error:
            cause = error if isinstance(error, OSError) else error.__cause__
            if isinstance(error, never) or isinstance(cause, SetAsideError):
                raise
            if not isinstance(cause, OSError) or cause.errno not in _PASSING:
                raise
            time.sleep(_PAUSE * 2 ** (attempt - 1))
    return action()


def make_folder(folder: Path) -> None:
    """Makes a folder, and those above it, if it is not there.

    Raises:
        SurgeryError: the system refuses.
    """
    with writing(folder):
        tried_again(lambda: folder.mkdir(parents=True, exist_ok=True))
