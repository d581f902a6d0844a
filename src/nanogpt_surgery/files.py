"""What every room does with files: temporary names, flushing, hashes, JSON within limits.

A sealed folder carries `MANIFEST.json` with the size and sha256 of each of its files, by which a
flipped bit is noticed.
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
import shutil
import stat
import uuid
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nanogpt_surgery.errors import SurgeryError
from nanogpt_surgery.exchange import SetAsideError

if TYPE_CHECKING:
    from torch import Tensor

MANIFEST = "MANIFEST.json"
LARGEST_JSON = 128 << 20  # bytes; the largest tokenizer.json in use have a third of it
_TEMPORARY = ".tmp-"


def disk_refuses(goal: Path, error: OSError) -> SurgeryError:
    """What the system said while `goal` was to be written, and how much space there is."""
    if isinstance(error, SetAsideError):
        return SurgeryError(
            f"could not write {goal}: {error.strerror}; what was there before could not be put "
            f"back and lies, untouched, at {error.aside}",
            f"{'move the new state away, then ' if goal.exists() else ''}mv {error.aside} {goal}",
        )
    return SurgeryError(
        f"could not write {goal}: {error.strerror or error}{_free_space(goal)}; what was there "
        "before is untouched",
        "free some space, or write to another place",
    )


def make_folder(folder: Path) -> None:
    """Make a folder, and those above it, if it is not there.

    Raises:
        SurgeryError: the system refuses.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise disk_refuses(folder, error) from error


def temporary_beside(path: Path) -> Path:
    """A new name beside a path, of the pattern that only this module gives."""
    return path.with_name(f"{_TEMPORARY}{path.name}-{uuid.uuid4().hex[:8]}")


def is_temporary(path: Path) -> bool:
    """Whether a name is of the pattern that only this module gives."""
    return path.name.startswith(_TEMPORARY)


def remove_temporaries(folder: Path, of: str | None = None) -> None:
    """Remove what a killed process left unfinished; for the one process that writes there.

    Args:
        folder: where to look.
        of: only what was to become the file or folder of this name.
    """
    pattern = f"{_TEMPORARY}*" if of is None else f"{_TEMPORARY}{glob.escape(of)}-{'[0-9a-f]' * 8}"
    for path in folder.glob(pattern):
        shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)


def _free_space(path: Path) -> str:
    there = next(folder for folder in path.absolute().parents if folder.is_dir())
    return f" ({shutil.disk_usage(there).free:,} bytes free there)"


def refuse_foreign_file(goal: Path, magic: bytes = b"GGUF") -> None:
    """Raise `SurgeryError` if anything but a file that begins with `magic` lies at `goal`."""
    if goal.exists() and not _begins_with(goal, magic):
        raise SurgeryError(f"{goal} exists and is of another kind", "choose a new name")


def _begins_with(path: Path, magic: bytes) -> bool:
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(len(magic)) == magic


def refuse_foreign_folder(goal: Path) -> None:
    """Raise `SurgeryError` if anything but a sealed or an empty folder lies at `goal`."""
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
    """What is wrong with a sealed folder, in words, or None."""
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
        if file_hash(path) != sha256:
            return f"{name} has changed since it was written (its sha256 differs)"
    return None


def refuse_damage(folder: Path) -> None:
    """Raise `SurgeryError` if a folder carries a manifest and differs from it."""
    if (folder / MANIFEST).is_file() and (problem := damage(folder)):
        raise SurgeryError(f"{folder} is damaged: {problem}", "restore it from a copy")


def file_hash(path: Path) -> str:
    """The sha256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


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
        SurgeryError: it refuses; the new state is in its place all the same.
    """
    try:
        flush(goal.parent)
    except OSError as error:
        raise SurgeryError(
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
        raise OSError(str(error)) from error
    path.chmod(mode)


def write_json(path: Path, contents: Any) -> None:
    """Write JSON in one rename, so that a reader sees the old file or the new one."""
    replace_text(path, json.dumps(contents, indent=2) + "\n")


def replace_text(path: Path, text: str) -> None:
    """Write a text file in one rename, flushed to the disk."""
    temporary = temporary_beside(path)
    temporary.write_text(text, encoding="utf-8")
    flush(temporary)
    temporary.replace(path)


def link_or_copy(source: Path, goal: Path) -> None:
    """Put a file that never changes at a second place, in one rename.

    No bytes are copied where the file system can link.
    """
    if goal.exists() and goal.samefile(source):
        return  # and a rename between two names of one file would leave both
    temporary = temporary_beside(goal)
    try:
        try:
            temporary.hardlink_to(source)
        except OSError:
            shutil.copyfile(source, temporary)
            flush(temporary)
        temporary.replace(goal)
    finally:
        temporary.unlink(missing_ok=True)


def read_json(path: Path) -> Any:
    """The contents of a JSON file.

    Raises:
        SurgeryError: it is missing, too large, not UTF-8, or not JSON (with line and column).
    """
    if path.is_file() and path.stat().st_size > LARGEST_JSON:
        raise SurgeryError(
            f"{path} has {path.stat().st_size:,} bytes; the limit for JSON is {LARGEST_JSON:,}"
        )
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise SurgeryError(f"{path} is missing") from None
    except UnicodeDecodeError as error:
        raise SurgeryError(f"{path} is not UTF-8 at byte {error.start}") from None
    except json.JSONDecodeError as error:
        raise SurgeryError(
            f"{path} is not JSON: {error.msg} at line {error.lineno}, column {error.colno}"
        ) from None
    except (ValueError, RecursionError) as error:  # a number, or a nesting, beyond all measure
        raise SurgeryError(f"{path} is not JSON that can be read: {error}") from None
