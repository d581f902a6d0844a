"""Single files: JSON and text in one rename, temporary names, flushes, exchanges, links."""

from __future__ import annotations

import ctypes
import errno
import glob
import json
import os
import shutil
import sys
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from nanogpt_surgery.errors import SurgeryError
from nanogpt_surgery.files.disk_errors import (
    NotFlushedError,
    SetAsideError,
    tried_again,
)

_TEMPORARY = ".tmp-"
_ASIDE = ".old-"
_HERE = -100  # AT_FDCWD: paths are as the process sees them
_EXCHANGE = 2  # RENAME_EXCHANGE on Linux, RENAME_SWAP on macOS
_UNKNOWN = (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP)
LARGEST_JSON = 48 << 20  # bytes; the largest tokenizer.json in use, Gemma 2's, has 34,363,188
LARGEST_WIDE = 36 << 20  # bytes, with a character beyond U+FFFF: four bytes each in memory
MOST_VALUES = 2_500_000  # commas and brackets; Gemma 2's tokenizer.json has 2.0 million


def temporary_beside(path: Path) -> Path:
    """A new name beside a path, of the pattern that only this module gives."""
    return path.with_name(f"{_TEMPORARY}{_shortened(path.name)}-{uuid.uuid4().hex[:8]}")


def _shortened(name: str) -> str:
    """A name that leaves room for more in the 255 bytes of most file systems."""
    return (
        name if len(os.fsencode(name)) <= 240 else os.fsencode(name)[:220].decode("utf-8", "ignore")
    )


@contextmanager
def replacing(goal: Path) -> Iterator[Path]:
    """A temporary file to write, which takes the place of `goal` in one rename; else it is removed.

    Raises:
        OSError: the system refuses.
    """
    temporary = temporary_beside(goal)
    try:
        yield temporary
        temporary.replace(goal)
    finally:
        with suppress(OSError):
            temporary.unlink()


def is_temporary(path: Path) -> bool:
    """Whether a name is of the pattern that only this module gives."""
    return path.name.startswith(_TEMPORARY)


def remove_temporaries(folder: Path, of: str | None = None) -> None:
    """Removes what a killed process left unfinished; for the one process that writes there.

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


def exchange(one: Path, other: Path) -> None:
    """Lets two folders of one file system change places.

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
    """Exchanges by the system's own call; False where there is none."""
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


def flush(path: Path) -> None:
    """Asks the system to put a file, or a folder's list of names, on the disk now."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def flush_place(goal: Path) -> None:
    """Asks the system to keep the place that a file or folder has just taken.

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


def link_or_copy(source: Path, goal: Path) -> None:
    """Puts a file that never changes at a second place, in one rename.

    No bytes are copied where the file system can link.
    """
    if goal.exists() and goal.samefile(source):
        return  # and a rename between two names of one file would leave both

    def put() -> None:
        with replacing(goal) as temporary:
            try:
                temporary.hardlink_to(source)
            except OSError:
                shutil.copyfile(source, temporary)
                flush(temporary)

    tried_again(put)


def write_json(path: Path, contents: Any) -> None:
    """Writes JSON in one rename, so that a reader sees the old file or the new one."""
    replace_text(path, json.dumps(contents, indent=2) + "\n")


def replace_text(path: Path, text: str) -> None:
    """Writes a text file in one rename, flushed to the disk."""
    replace_bytes(path, text.encode())


def replace_bytes(path: Path, data: bytes) -> None:
    """Writes a file in one rename, flushed to the disk; what the disk refuses is an `OSError`."""

    def replace() -> None:
        with replacing(path) as temporary:
            temporary.write_bytes(data)
            flush(temporary)

    tried_again(replace)


def read_json(path: Path, most_bytes: int = LARGEST_JSON) -> Any:
    """The contents of a JSON file.

    Raises:
        SurgeryError: it is missing, too large, of too many values, not UTF-8, or not JSON (with
            line and column).
    """
    try:
        _check_at_most(most_bytes, path.stat().st_size, path, "bytes")
        data = tried_again(path.read_bytes)
        count = sum(map(data.count, (b",", b"[", b"{")))
        _check_at_most(MOST_VALUES, count, path, "commas and brackets")
        if len(data) > LARGEST_WIDE and max(data) >= 0xF0:
            _check_at_most(LARGEST_WIDE, len(data), path, "bytes, some beyond U+FFFF")
        text = data.decode("utf-8")
        del data
        return json.loads(text)
    except FileNotFoundError:
        raise SurgeryError(f"{path} is missing") from None
    except OSError as error:
        raise SurgeryError(f"{path} cannot be read: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise SurgeryError(f"{path} is not JSON in UTF-8: {error}") from None


def _check_at_most(limit: int, found: int, path: Path, of_what: str) -> None:
    if found > limit:
        raise SurgeryError(f"{path} has {found:,} {of_what}; the limit for JSON is {limit:,}")
