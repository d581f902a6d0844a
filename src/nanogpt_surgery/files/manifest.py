"""`MANIFEST.json`: size and sha256 of each file of a folder, by which a flipped bit is noticed."""

from __future__ import annotations

import hashlib
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from nanogpt_surgery.errors import SurgeryError

if TYPE_CHECKING:
    pass
from nanogpt_surgery.files.disk_errors import tried_again, writing
from nanogpt_surgery.files.json_files import read_json, write_json
from nanogpt_surgery.files.writing import flush

MANIFEST = "MANIFEST.json"


def check_own_file(goal: Path, magic: bytes = b"GGUF") -> None:
    """Raise `SurgeryError` if anything but a file that begins with `magic` lies at `goal`."""
    with writing(goal):
        if goal.exists() and not _begins_with(goal, magic):
            raise SurgeryError(f"{goal} exists and is of another kind", "choose a new name")


def _begins_with(path: Path, magic: bytes) -> bool:
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(len(magic)) == magic


def check_own_folder(goal: Path) -> None:
    """Raise `SurgeryError` if anything but a sealed or an empty folder lies at `goal`."""
    with writing(goal):
        if not goal.exists() or (goal / MANIFEST).is_file():
            return
        if not goal.is_dir() or any(goal.iterdir()):
            raise SurgeryError(
                f"{goal} exists and was not written by this program", "choose a new folder"
            )


def seal(folder: Path) -> None:
    """Flush every file of a folder to the disk and write its manifest; folders in it stay out."""
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
    """Raise `SurgeryError` if a folder carries a manifest and differs from it."""
    if (folder / MANIFEST).is_file() and (problem := damage(folder)):
        raise SurgeryError(f"{folder} is damaged: {problem}", "restore it from a copy")


def file_hash(path: Path) -> str:
    """The sha256 of a file, in hexadecimal."""

    def digest() -> str:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    return tried_again(digest)
