"""Where text comes from: files, folders, standard input, or what every Python already carries.

A corpus too large to be held is cut into chunks that can be worked on alone, the same whoever does
the work. Long files are cut about every so many bytes, between two lines that a single newline
parts: there byte-pair encodings join no token. Without such a place near by it is the start of a
line, or of a character. Short files share a chunk. Where the cuts lie follows from the files alone.
"""

from __future__ import annotations

import importlib.util
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

from nanogpt_surgery.arguments import check_arguments
from nanogpt_surgery.errors import SurgeryError, first_problems, foreign_file, quoted

if TYPE_CHECKING:
    from nanogpt_surgery.data.tokenizers.tokenizer import Tokenizer

NOT_UTF8 = "name text files saved as UTF-8, or folders of them"
HELD_OUT = 0.1
TRAIN_SHARE = 1 - HELD_OUT

PIECE = 8 << 20  # bytes, about: a chunk has at most twice as many
_LOOK = 1 << 16  # bytes that are searched for a place
# Where white space is longer than one newline, byte-pair encodings look at what follows it.
_BETWEEN_LINES, _LINE_START = re.compile(rb"\S\n(?=\S)"), re.compile(rb"\n(?=\S)")


@check_arguments
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
    for file in _files(paths, problems):
        name = file or "standard input"
        try:
            with foreign_file(name):
                data = file.read_bytes() if file else sys.stdin.buffer.read()
            texts.append(_decoded(data, name))
        except SurgeryError as error:
            problems.append(error.what)
    if problems:
        raise SurgeryError(first_problems(problems), NOT_UTF8)
    if not any(texts):
        raise _no_text(paths)
    return "\n".join(filter(None, texts))


def files_of(paths: Iterable[str | Path]) -> list[Path]:
    """The files, as `read_texts` would read them, for those who read only parts of them.

    Raises:
        SurgeryError: a path is missing, or is standard input, which cannot be read in parts.
    """
    problems: list[str] = []
    files = list(_files(paths, problems))
    if None in files:
        problems.insert(0, "standard input cannot be read in parts")
    if problems:
        raise SurgeryError("; ".join(problems), "name files, or folders of them")
    return [file for file in files if file]


def _files(paths: Iterable[str | Path], problems: list[str]) -> Iterator[Path | None]:
    """The files named, and those in folders, None for standard input; notes what is not there."""
    for name in paths:
        path = Path(name)
        if str(name) == "-":
            yield None
        elif path.is_dir():
            yield from _files_below(path)
        elif path.exists():
            yield path
        else:
            problems.append(f"{path} does not exist")


def _files_below(folder: Path) -> list[Path]:
    return sorted(
        file
        for file in folder.rglob("*")
        if file.is_file()
        and not any(
            part.startswith(".") or part == "__pycache__" for part in file.relative_to(folder).parts
        )
    )


def _decoded(data: bytes, file: str | Path, start: int = 0) -> str:
    """The text of bytes that stand in a file from `start` on, without a byte order mark."""
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        raise SurgeryError(
            f"{file} is not UTF-8: byte 0x{data[error.start]:02x} at position "
            f"{start + error.start}",
            NOT_UTF8,
        ) from None
    return text if start else text.removeprefix("\ufeff")


def _no_text(paths: Iterable[str | Path]) -> SurgeryError:
    named = quoted(", ".join(map(str, paths)))
    return SurgeryError(f"there is no text in {named}", "name files that are not empty")


def check_characters(tokenizer: Tokenizer, paths: Sequence[str | Path], text: str) -> None:
    """Looks for characters that a vocabulary lacks, before a text is cut into parts.

    Args:
        tokenizer: one without a vocabulary of characters knows all of them.
        paths: where the text was read from.
        text: what `read_texts` made of them.

    Raises:
        SurgeryError: there is one (the first, with its file and its place there).
    """
    check: Callable[[str, str], None] | None = getattr(tokenizer, "check", None)
    if check is None:
        return
    if "-" in map(str, paths):  # what was read is gone
        check(text, "the text")
        return
    for file in files_of(paths):
        check(_decoded(file.read_bytes(), file), str(file))


@dataclass(frozen=True)
class Span:
    """Bytes `start` … `end` − 1 of a file; `first` where a document begins."""

    file: str
    start: int
    end: int

    @property
    def first(self) -> bool:
        """Whether a document begins here."""
        return self.start == 0


Chunk = tuple[Span, ...]


def chunks_of(paths: Iterable[str | Path], size: int = PIECE) -> list[Chunk]:
    """The chunks of files and folders, in order; each of at most 2 · `size` bytes.

    Raises:
        SurgeryError: a path is missing or cannot be read (all of them at once), is standard input,
            or there is no text at all.
    """
    paths = list(paths)
    chunks: list[list[Span]] = []
    room = 0
    for span in _spans(paths, size):
        length = span.end - span.start
        if length > room:
            chunks.append([])
            room = size
        chunks[-1].append(span)
        room -= length
    if not chunks:
        raise _no_text(paths)
    return [tuple(chunk) for chunk in chunks]


def _spans(paths: Iterable[str | Path], size: int) -> Iterator[Span]:
    for file in files_of(paths):
        length = file.stat().st_size
        cuts = [0, *(_cut(file, start, size) for start in range(size, length, size)), length]
        for start, end in pairwise(cuts):
            if start < end:
                yield Span(str(file), start, end)


def _cut(file: Path, start: int, size: int) -> int:
    """The first good place from `start` on, at most `size` bytes further."""
    with file.open("rb") as data:
        data.seek(start - 2)
        near = data.read(min(size, _LOOK) + 2)
    if found := _BETWEEN_LINES.search(near) or _LINE_START.search(near, 1):
        return start - 2 + found.end()
    inside = near[2:5]  # a character's first byte is followed by at most three more
    return start + next((i for i, byte in enumerate(inside) if byte & 0xC0 != 0x80), len(inside))


def read_span(span: Span) -> str:
    """The text of a span.

    Raises:
        SurgeryError: it is not UTF-8 (with the position in the file), the file became shorter, or
            it cannot be read.
    """
    with foreign_file(span.file), Path(span.file).open("rb") as file:
        file.seek(span.start)
        data = file.read(span.end - span.start)
    if len(data) != span.end - span.start:
        raise SurgeryError(f"{span.file} has become shorter while it was read")
    return _decoded(data, span.file, span.start)


def split_at_line(text: str, share: float) -> tuple[str, str]:
    """A text in two: the second part is about `share` of it and begins with a line, where it can.

    Shares of 0 leave nothing for the second part.
    """
    if share == 0:
        return text, ""
    cut = int(len(text) * (1 - share))
    place = cut
    while (found := text.find("\n", place)) != -1:
        place = found + 1
        if place < len(text) and not text[place].isspace():
            return text[:place], text[place:]
    return text[:cut], text[cut:]


_SOURCE_MODULES = """
    argparse ast calendar collections configparser contextlib copy csv dataclasses datetime
    difflib enum fractions functools heapq inspect ipaddress json.decoder json.encoder locale
    logging mailbox optparse pathlib pdb pprint random shutil socket statistics string
    subprocess tarfile tempfile textwrap threading tokenize traceback types typing urllib.parse
    urllib.request uuid warnings weakref zipfile
""".split()


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


@check_arguments
def split_by_position(text: str) -> tuple[str, str]:
    """The first 90 % for training and the last 10 % for validation."""
    cut = int(len(text) * TRAIN_SHARE)
    return text[:cut], text[cut:]
