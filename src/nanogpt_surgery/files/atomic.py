"""Folders and files written whole or not at all.

The order is: a temporary folder beside the goal, every file flushed to the disk, `MANIFEST.json`
with the size and sha256 of each, then one rename; where a folder is replaced, the two change
places. A reader sees the old folder or the new one, never half. What a kill leaves behind lies
beside it, under a name that begins with `.tmp-`.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeVar

from nanogpt_surgery.errors import SurgeryError
from nanogpt_surgery.files.disk_errors import UnwrittenError, disk_refuses, make_folder, tried_again
from nanogpt_surgery.files.exchange import exchange
from nanogpt_surgery.files.manifest import check_own_file, check_own_folder, seal
from nanogpt_surgery.files.temporary import temporary_beside
from nanogpt_surgery.files.writing import flush, flush_place

T = TypeVar("T")


def write_folder(goal: str | Path, fill: Callable[[Path], T]) -> T:
    """Write a folder whole or not at all; again, at most twice, where the device fails.

    Args:
        goal: made, or replaced as `whole_folder` says.
        fill: writes into an empty folder, which becomes `goal`; called anew in each attempt.

    Returns:
        What `fill` returns.

    Raises:
        SurgeryError: as `whole_folder`, of the last attempt.
    """

    def write() -> T:
        with whole_folder(goal) as temporary:
            return fill(temporary)

    return tried_again(write)


def write_file(goal: str | Path, fill: Callable[[Path], T], magic: bytes = b"GGUF") -> T:
    """Write a file whole or not at all; again, at most twice, where the device fails.

    Args:
        goal: made, or replaced as `whole_file` says.
        fill: writes the file that becomes `goal`; called anew in each attempt.
        magic: what a file that may be replaced begins with.

    Returns:
        What `fill` returns.

    Raises:
        SurgeryError: as `whole_file`, of the last attempt.
    """

    def write() -> T:
        with whole_file(goal, magic) as temporary:
            return fill(temporary)

    return tried_again(write)


@contextmanager
def whole_folder(goal: str | Path) -> Iterator[Path]:
    """A temporary folder to write into, which becomes `goal` if the block ends without an error.

    A folder at `goal` is replaced if it carries our manifest and every file in it is written anew;
    nothing is lost that way.

    Raises:
        SurgeryError: `goal` holds something else, or the disk refuses (its name and free space).
    """
    goal = Path(goal)
    check_own_folder(goal)
    temporary = temporary_beside(goal)
    try:
        temporary.mkdir(parents=True)
        yield temporary
        seal(temporary)
        _put_in_place(temporary, goal)
    except OSError as error:
        needed = _needed(temporary, error)
        shutil.rmtree(temporary, ignore_errors=True)  # first: what it took is free again
        raise disk_refuses(goal, error, needed) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _needed(temporary: Path, error: OSError) -> int | None:
    """The bytes of the files in a folder and of the one that was refused, where it is known."""
    if not isinstance(error, UnwrittenError):
        return None
    written = (p for p in temporary.rglob("*") if p.is_file() and str(p) != error.filename)
    return error.needed + sum(path.stat().st_size for path in written)


@contextmanager
def whole_file(goal: str | Path, magic: bytes = b"GGUF") -> Iterator[Path]:
    """A temporary file to write into, which becomes `goal` if the block ends without an error.

    A file at `goal` is replaced if it begins with `magic`; anything else is refused.

    Raises:
        SurgeryError: `goal` is something else, or the disk refuses (its name and free space).
    """
    goal = Path(goal)
    check_own_file(goal, magic)
    make_folder(goal.parent)
    temporary = temporary_beside(goal)
    try:
        yield temporary
        flush(temporary)
        temporary.replace(goal)
        flush_place(goal)
    except OSError as error:
        _remove(temporary)  # first: what it took is free again
        raise disk_refuses(goal, error) from error
    finally:
        _remove(temporary)


def _remove(file: Path) -> None:
    with suppress(OSError):
        file.unlink()


def _put_in_place(temporary: Path, goal: Path) -> None:
    if not goal.exists():
        temporary.rename(goal)
        flush_place(goal)
        return
    lost = _contents(goal) - _contents(temporary)
    if lost:
        raise SurgeryError(
            f"{goal} holds {', '.join(sorted(lost))}, which replacing it would lose",
            "choose a new folder",
        )
    exchange(temporary, goal)
    flush_place(goal)


def _contents(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}
