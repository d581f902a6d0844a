"""Where text comes from: files, folders, standard input, or what every Python already carries."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterable
from pathlib import Path

from nanogpt_surgery.errors import SurgeryError, quoted

HELD_OUT = 0.1
TRAIN_SHARE = 1 - HELD_OUT

_SOURCE_MODULES = """
    argparse ast calendar collections configparser contextlib copy csv dataclasses datetime
    difflib enum fractions functools heapq inspect ipaddress json.decoder json.encoder locale
    logging mailbox optparse pathlib pdb pprint random shutil socket statistics string
    subprocess tarfile tempfile textwrap threading tokenize traceback types typing urllib.parse
    urllib.request uuid warnings weakref zipfile
""".split()


def read_texts(paths: Iterable[str | Path]) -> str:
    """The text of files, folders (every file below, in order of name) and "-" (standard input).

    Files are UTF-8 and joined by a newline; hidden files and folders are passed over.

    Raises:
        SurgeryError: a path is missing, cannot be read or is not UTF-8 (the first five, with
            the position of the first bad byte), or there is no text at all.
    """
    texts: list[str] = []
    problems: list[str] = []
    paths = list(paths)
    for path in paths:
        for name, data in _sources(path, problems):
            try:
                texts.append(data.decode().removeprefix("\ufeff"))
            except UnicodeDecodeError as error:
                bad = data[error.start]
                problems.append(f"{name} is not UTF-8: byte 0x{bad:02x} at position {error.start}")
    if problems:
        more = f"; {len(problems) - 5} more" if problems[5:] else ""
        raise SurgeryError(
            "; ".join(problems[:5]) + more, "name text files saved as UTF-8, or folders of them"
        )
    text = "\n".join(filter(None, texts))
    if not text:
        named = quoted(", ".join(map(str, paths)))
        raise SurgeryError(f"there is no text in {named}", "name files that are not empty")
    return text


def _sources(path: str | Path, problems: list[str]) -> Iterable[tuple[str, bytes]]:
    if str(path) == "-":
        yield "standard input", sys.stdin.buffer.read()
        return
    path = Path(path)
    if not path.exists():
        problems.append(f"{path} does not exist")
        return
    for file in _files_below(path) if path.is_dir() else [path]:
        try:
            data = file.read_bytes()
        except OSError as error:
            problems.append(f"{file} cannot be read: {error.strerror}")
        else:
            yield str(file), data


def _files_below(folder: Path) -> list[Path]:
    return sorted(
        file
        for file in folder.rglob("*")
        if file.is_file()
        and not any(
            part.startswith(".") or part == "__pycache__" for part in file.relative_to(folder).parts
        )
    )


def files_of(paths: Iterable[str | Path]) -> list[Path]:
    """The files, as `read_texts` would read them, for those who read only parts of them.

    Raises:
        SurgeryError: a path is missing, or is standard input, which cannot be read in parts.
    """
    files: list[Path] = []
    problems: list[str] = []
    for path in map(Path, paths):
        if str(path) == "-":
            problems.append("standard input cannot be read in parts")
        elif not path.exists():
            problems.append(f"{path} does not exist")
        else:
            files += _files_below(path) if path.is_dir() else [path]
    if problems:
        raise SurgeryError("; ".join(problems), "name files, or folders of them")
    return files


def python_reference() -> str:
    """The Python language reference that `help()` shows: English prose with code, 0.5 MB."""
    from pydoc_data.topics import topics

    return "\n".join(topics[name] for name in sorted(topics))


def python_source() -> str:
    """Source files of the standard library, as installed: Python, about 2.4 MB."""
    texts = []
    for name in _SOURCE_MODULES:
        spec = importlib.util.find_spec(name)
        if spec and spec.origin and spec.origin.endswith(".py"):
            texts.append(Path(spec.origin).read_text(encoding="utf-8"))
    return "\n".join(texts)


def split_by_position(text: str) -> tuple[str, str]:
    """The first 90 % for training and the last 10 % for validation."""
    cut = int(len(text) * TRAIN_SHARE)
    return text[:cut], text[cut:]
