"""What every room does with files: temporary names, flushing, hashes, JSON within limits.

A sealed folder carries `MANIFEST.json` with the size and sha256 of each of its files, by which a
flipped bit is noticed.
"""

from __future__ import annotations

import errno
import glob
import hashlib
import json
import os
import re
import shutil
import stat
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from nanogpt_surgery.errors import SurgeryError
from nanogpt_surgery.files.exchange import SetAsideError

if TYPE_CHECKING:
    from torch import Tensor

MANIFEST = "MANIFEST.json"
LARGEST_JSON = 128 << 20  # bytes; the largest tokenizer.json in use have a third of it
_TEMPORARY = ".tmp-"


class UnwrittenError(OSError):
    """A file that the system refused to write, and how many bytes it was to have."""

    def __init__(self, error: OSError, path: Path, needed: int):
        super().__init__(error.errno, error.strerror or str(error), str(path))
        self.needed = needed


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
            own = goal if _is_there(goal) and not os.access(goal, os.W_OK) else there
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


def _file_in_the_way(path: Path) -> Path | None:
    """What stands, as a file, where a path needs a folder."""
    above = [*reversed(path.parents)]
    return next((part for part in above if _is_there(part) and not _is_dir(part)), None)


def _is_dir(path: Path) -> bool:
    try:
        return stat.S_ISDIR(path.stat().st_mode)
    except (OSError, ValueError):
        return False


def _is_there(path: Path) -> bool:
    return os.path.lexists(path)


ATTEMPTS = 3
_PASSING = (errno.EIO, errno.ESTALE, errno.ETIMEDOUT)
_PAUSE = 0.1  # seconds before the second attempt, twice as many before each later one
T = TypeVar("T")


def tried_again(action: Callable[[], T]) -> T:
    """The result of an action, done again up to twice where the device fails for a moment.

    The action must begin anew each time: to flush a file again that failed to be flushed tells
    nothing, since the system forgets what it could not write.

    Raises:
        OSError, SurgeryError: of the last attempt, or of the first one that no attempt will mend.
    """
    for attempt in range(1, ATTEMPTS):
        try:
            return action()
        except (OSError, SurgeryError) as error:
            cause = error if isinstance(error, OSError) else error.__cause__
            if not isinstance(cause, OSError) or cause.errno not in _PASSING:
                raise
            time.sleep(_PAUSE * 2 ** (attempt - 1))
    return action()


def make_folder(folder: Path) -> None:
    """Make a folder, and those above it, if it is not there.

    Raises:
        SurgeryError: the system refuses.
    """
    with writing(folder):
        tried_again(lambda: folder.mkdir(parents=True, exist_ok=True))


def temporary_beside(path: Path) -> Path:
    """A new name beside a path, of the pattern that only this module gives."""
    return path.with_name(f"{_TEMPORARY}{_shortened(path.name)}-{uuid.uuid4().hex[:8]}")


def _shortened(name: str) -> str:
    """A name that leaves room for more in the 255 bytes of most file systems."""
    return (
        name if len(os.fsencode(name)) <= 240 else os.fsencode(name)[:220].decode("utf-8", "ignore")
    )


def is_temporary(path: Path) -> bool:
    """Whether a name is of the pattern that only this module gives."""
    return path.name.startswith(_TEMPORARY)


def remove_temporaries(folder: Path, of: str | None = None) -> None:
    """Remove what a killed process left unfinished; for the one process that writes there.

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


def refuse_foreign_file(goal: Path, magic: bytes = b"GGUF") -> None:
    """Raise `SurgeryError` if anything but a file that begins with `magic` lies at `goal`."""
    with writing(goal):
        if goal.exists() and not _begins_with(goal, magic):
            raise SurgeryError(f"{goal} exists and is of another kind", "choose a new name")


def _begins_with(path: Path, magic: bytes) -> bool:
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(len(magic)) == magic


def refuse_foreign_folder(goal: Path) -> None:
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
        try:
            changed = file_hash(path) != sha256
        except OSError as error:
            return f"{name} cannot be read: {error.strerror or error}"
        if changed:
            return f"{name} has changed since it was written (its sha256 differs)"
    return None


def refuse_damage(folder: Path) -> None:
    """Raise `SurgeryError` if a folder carries a manifest and differs from it."""
    if (folder / MANIFEST).is_file() and (problem := damage(folder)):
        raise SurgeryError(f"{folder} is damaged: {problem}", "restore it from a copy")


def file_hash(path: Path) -> str:
    """The sha256 of a file, in hexadecimal."""

    def digest() -> str:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    return tried_again(digest)


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
        raise UnwrittenError(_as_os_error(error), path, _bytes_of(tensors)) from error
    path.chmod(mode)


def _as_os_error(error: Exception) -> OSError:
    """The system's error that a library in Rust has put into words."""
    found = re.search(r"\(os error (\d+)\)", str(error))
    return OSError(int(found[1]), os.strerror(int(found[1]))) if found else OSError(str(error))


def _bytes_of(tensors: dict[str, Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def write_json(path: Path, contents: Any) -> None:
    """Write JSON in one rename, so that a reader sees the old file or the new one."""
    replace_text(path, json.dumps(contents, indent=2) + "\n")


def replace_text(path: Path, text: str) -> None:
    """Write a text file in one rename, flushed to the disk."""
    tried_again(lambda: _replace_text(path, text))


def _replace_text(path: Path, text: str) -> None:
    temporary = temporary_beside(path)
    try:
        temporary.write_text(text, encoding="utf-8")
        flush(temporary)
        temporary.replace(path)
    finally:
        with suppress(OSError):
            temporary.unlink()


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


def read_json(path: Path, most_bytes: int = LARGEST_JSON) -> Any:
    """The contents of a JSON file.

    Raises:
        SurgeryError: it is missing, too large, not UTF-8, or not JSON (with line and column).
    """
    if path.is_file() and path.stat().st_size > most_bytes:
        raise SurgeryError(
            f"{path} has {path.stat().st_size:,} bytes; the limit for JSON is {most_bytes:,}"
        )
    try:
        return json.loads(tried_again(lambda: path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise SurgeryError(f"{path} is missing") from None
    except OSError as error:
        raise SurgeryError(f"{path} cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise SurgeryError(f"{path} is not UTF-8 at byte {error.start}") from None
    except json.JSONDecodeError as error:
        raise SurgeryError(
            f"{path} is not JSON: {error.msg} at line {error.lineno}, column {error.colno}"
        ) from None
    except (ValueError, RecursionError) as error:  # a number, or a nesting, beyond all measure
        raise SurgeryError(f"{path} is not JSON that can be read: {error}") from None
