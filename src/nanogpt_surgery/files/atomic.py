"""Folders and files written whole or not at all, and the manifest by which damage is noticed.

The order is: a temporary folder beside the goal, every file flushed to the disk, `MANIFEST.json`
with the size and sha256 of each, then one rename; where a folder is replaced, the two change
places. A reader sees the old folder or the new one, never half. What a kill leaves behind lies
beside it, under a name that begins with `.tmp-`.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import TypeVar

from nanogpt_surgery.errors import SurgeryError
from nanogpt_surgery.files.disk_errors import (
    UnwrittenError,
    disk_refuses,
    make_folder,
    tried_again,
    writing,
)
from nanogpt_surgery.files.writing import (
    exchange,
    flush,
    flush_place,
    read_json,
    replacing,
    temporary_beside,
    write_json,
)

MANIFEST = "MANIFEST.json"
T = TypeVar("T")


def write_folder(goal: str | Path, fill: Callable[[Path], T]) -> T:
    """Writes a folder whole or not at all; again, at most twice, where the device fails.

    A folder at `goal` is replaced if it carries our manifest and every file in it is written anew;
    nothing is lost that way.

    Args:
        goal: made, or replaced.
        fill: writes into an empty folder, which becomes `goal`; called anew in each attempt.

    Returns:
        What `fill` returns.

    Raises:
        SurgeryError: `goal` holds something else, or the disk refuses (its name and free space).
    """
    goal = Path(goal)

    def write() -> T:
        check_own_folder(goal)
        temporary = temporary_beside(goal)
        try:
            temporary.mkdir(parents=True)
            filled = fill(temporary)
            seal(temporary)
            _put_in_place(temporary, goal)
            return filled
        except OSError as error:
            needed = _needed(temporary, error)
            shutil.rmtree(temporary, ignore_errors=True)  # first: what it took is free again
            raise disk_refuses(goal, error, needed) from error
        finally:
            shutil.rmtree(temporary, ignore_errors=True)

    return tried_again(write)


def _needed(temporary: Path, error: OSError) -> int | None:
    """The bytes of the files in a folder and of the one that was refused, where it is known."""
    if not isinstance(error, UnwrittenError):
        return None
    written = (p for p in temporary.rglob("*") if p.is_file() and str(p) != error.filename)
    return error.needed + sum(path.stat().st_size for path in written)


def write_file(goal: str | Path, fill: Callable[[Path], T], magic: bytes = b"GGUF") -> T:
    """Writes a file whole or not at all; again, at most twice, where the device fails.

    Args:
        goal: made, or replaced if it begins with `magic`.
        fill: writes the file that becomes `goal`; called anew in each attempt.
        magic: the first bytes of a file that may be replaced.

    Returns:
        What `fill` returns.

    Raises:
        SurgeryError: `goal` is something else, or the disk refuses (its name and free space).
    """
    goal = Path(goal)

    def write() -> T:
        check_own_file(goal, magic)
        make_folder(goal.parent)
        with writing(goal):
            with replacing(goal) as temporary:
                filled = fill(temporary)
                flush(temporary)
            flush_place(goal)
        return filled

    return tried_again(write)


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


def check_own_file(goal: Path, magic: bytes = b"GGUF") -> None:
    """Raises `SurgeryError` if anything but a file that begins with `magic` lies at `goal`."""
    with writing(goal):
        if not goal.exists():
            return
        if goal.is_file():
            with goal.open("rb") as file:
                if file.read(len(magic)) == magic:
                    return
        raise SurgeryError(f"{goal} exists and is of another kind", "choose a new name")


def check_own_folder(goal: Path) -> None:
    """Raises `SurgeryError` if anything but a sealed or an empty folder lies at `goal`."""
    with writing(goal):
        if not goal.exists() or (goal / MANIFEST).is_file():
            return
        if not goal.is_dir() or any(goal.iterdir()):
            raise SurgeryError(
                f"{goal} exists and was not written by this program", "choose a new folder"
            )


def seal(folder: Path) -> None:
    """Flushes a folder's files to the disk and lists them in a manifest, without its folders."""
    files = {}
    for path in sorted(path for path in folder.iterdir() if path.is_file()):
        flush(path)
        files[path.name] = {"size": path.stat().st_size, "sha256": file_hash(path)}
    versions = {name: version(name) for name in ("nanogpt-surgery", "torch")}
    write_json(folder / MANIFEST, {"files": files, "versions": versions})
    flush(folder / MANIFEST)
    flush(folder)


def damage(folder: Path) -> str | None:
    """Says in words what is wrong with a sealed folder; None if nothing is."""
    manifest = folder / MANIFEST
    if not manifest.is_file():
        return f"{MANIFEST} is missing"
    try:
        files = read_json(manifest)["files"]
        expected = {name: (entry["size"], entry["sha256"]) for name, entry in files.items()}
    except (SurgeryError, KeyError, TypeError, AttributeError):
        return f"{MANIFEST} cannot be read"
    for name, (size, sha256) in expected.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size:,} bytes instead of {size:,}"
        try:
            changed = file_hash(path) != sha256
        except OSError as error:
            return f"{name} cannot be read: {error.strerror or error}"
        if changed:
            return f"{name} has changed since it was written (its sha256 differs)"
    return None


def check_undamaged(folder: Path) -> None:
    """Raises `SurgeryError` if a folder carries a manifest and differs from it."""
    if (folder / MANIFEST).is_file() and (problem := damage(folder)):
        raise SurgeryError(f"{folder} is damaged: {problem}", "restore it from a copy")


def file_hash(path: Path) -> str:
    """The sha256 of a file, in hexadecimal."""

    def digest() -> str:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    return tried_again(digest)
