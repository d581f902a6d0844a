"""A corpus cut into chunks that can be worked on alone: the same cuts, whoever does the work.

Long files are cut about every so many bytes, between two lines that a single newline parts: there
byte-pair encodings join no token. Without such a place near by it is the start of a line, or of a
character. Short files share a chunk. Where the cuts lie follows from the files alone.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from nanogpt_surgery.data.text.corpus import files_of
from nanogpt_surgery.errors import SurgeryError, quoted

PIECE = 8 << 20  # bytes, about: a chunk has at most twice as many
_LOOK = 1 << 16  # bytes that are searched for a place
# Where white space is longer than one newline, byte-pair encodings look at what follows it.
_BETWEEN_LINES, _LINE_START = re.compile(rb"\S\n(?=\S)"), re.compile(rb"\n(?=\S)")
_BOM = "\ufeff"


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
        named = quoted(", ".join(map(str, paths)))
        raise SurgeryError(f"there is no text in {named}", "name files that are not empty")
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
        SurgeryError: it is not UTF-8 (with the position in the file), or the file became shorter.
    """
    with Path(span.file).open("rb") as file:
        file.seek(span.start)
        data = file.read(span.end - span.start)
    if len(data) != span.end - span.start:
        raise SurgeryError(f"{span.file} has become shorter while it was read")
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        raise SurgeryError(
            f"{span.file} is not UTF-8: byte 0x{data[error.start]:02x} at position "
            f"{span.start + error.start}",
            "name text files saved as UTF-8, or folders of them",
        ) from None
    return text.removeprefix(_BOM) if span.first else text


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
