"""Texts of any size to a folder of ids: chunk by chunk, in several processes, resumable.

While the work goes on:

FOLDER/
  asked.json             what was asked for: sources, tokenizer, sizes
  parts/00007.*.bin      the ids of a finished chunk, for each split
  parts/00007.json       their numbers and hashes, written after them
  train.bin …            at the end: the parts joined in order, each deleted once it is in

A process that is killed leaves finished parts, which are kept, and half a part under a temporary
name, which is dropped. The bytes of the result follow from the texts and the tokenizer, not from
the number of processes or of attempts.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from nanogpt_surgery.data.text.chunks import Chunk, read_span
from nanogpt_surgery.data.text.corpus import HELD_OUT
from nanogpt_surgery.data.text.parts import PARTS, Work, encode_chunk, is_done, join_parts
from nanogpt_surgery.data.text.processes import cores, in_processes
from nanogpt_surgery.data.text.token_files import (
    SPLITS,
    VERSION,
    TokenHeader,
    dtype_for,
    is_token_folder,
    write_header,
)
from nanogpt_surgery.data.tokenizers.tokenizer import (
    Tokenizer,
    tokenizer_fingerprint,
    vocab_size_of,
)
from nanogpt_surgery.errors import SurgeryError
from nanogpt_surgery.files.json_files import read_json, write_json
from nanogpt_surgery.files.temporary import remove_temporaries

ASKED = "asked.json"
MOST_HELD_OUT = 16 << 20  # bytes of text


def prepare_tokens(
    chunks: Sequence[Chunk],
    folder: Path,
    tokenizer_of: Callable[[], Tokenizer | None],
    held_out: float | None = None,
    workers: int = 0,
) -> Iterator[int]:
    """Encode chunks into a token folder, or go on where an earlier attempt was stopped.

    The tokenizer's end of text, or else a newline, separates documents, and parts that do not
    follow each other in the text, as the last part of each chunk is held out for validation.

    Args:
        chunks: from `chunks_of`.
        folder: the token folder; one process at a time may write it.
        tokenizer_of: opens the tokenizer, in each process.
        held_out: the share for validation; a tenth if None, but at most 16 MiB of text in all.
        workers: processes (0: one for each core).

    Yields:
        The number of chunks that are done; the last item comes when the folder is finished.

    Raises:
        SurgeryError: the folder was begun for another purpose (all differences), a text is not
            UTF-8, a character is not in the vocabulary, the disk refuses, or a process died.
    """
    held_out = _held_out(chunks, held_out)
    if workers < 0:
        raise SurgeryError(f"workers is {workers}; it must be at least 0 (one for each core)")
    tokenizer = tokenizer_of()
    assert tokenizer is not None
    vocab_size, fingerprint = vocab_size_of(tokenizer), tokenizer_fingerprint(tokenizer)
    work = Work(folder, tuple(chunks), tokenizer_of, held_out, dtype_for(vocab_size))
    _check_asked(folder, _asked(work, fingerprint))
    if is_token_folder(folder):
        shutil.rmtree(folder / PARTS, ignore_errors=True)  # a kill may have left it
        yield len(chunks)
        return
    (folder / PARTS).mkdir(exist_ok=True)
    remove_temporaries(folder)
    remove_temporaries(folder / PARTS)
    waiting = [number for number in range(len(chunks)) if not is_done(work, number)]
    yield len(chunks) - len(waiting)
    for done, _ in enumerate(_encoded(work, waiting, workers or cores()), 1):
        yield len(chunks) - len(waiting) + done
    shards = {split: join_parts(work, split) for split in SPLITS}
    write_header(folder, TokenHeader(VERSION, work.dtype, vocab_size, fingerprint, **shards))
    shutil.rmtree(folder / PARTS)
    yield len(chunks)


def characters_of(chunks: Sequence[Chunk], workers: int = 0) -> list[str]:
    """The distinct characters of chunks, and the newline that parts documents, in order."""
    found = {"\n"}
    for characters in in_processes(_characters, chunks, workers or cores()):
        found |= characters
    return sorted(found)


def _characters(chunk: Chunk) -> set[str]:
    return set().union(*(read_span(span) for span in chunk))


def _held_out(chunks: Sequence[Chunk], share: float | None) -> float:
    if share is None:
        size = sum(span.end - span.start for chunk in chunks for span in chunk)
        return min(HELD_OUT, MOST_HELD_OUT / size)
    if not 0 <= share < 1:
        raise SurgeryError(f"held_out is {share}; it must be at least 0 and below 1")
    return share


def _asked(work: Work, tokenizer: str) -> dict[str, Any]:
    files = dict.fromkeys(span.file for chunk in work.chunks for span in chunk)
    spans = [[span.file, span.start, span.end] for chunk in work.chunks for span in chunk]
    return {
        "version": VERSION,
        "tokenizer": tokenizer,
        "held_out": work.held_out,
        "chunks": len(work.chunks),
        "cuts": hashlib.sha256(repr(spans).encode()).hexdigest(),
        "sources": {file: _size_and_time(Path(file)) for file in files},
    }


def _size_and_time(file: Path) -> list[int]:
    found = file.stat()
    return [found.st_size, found.st_mtime_ns]


def _what_happened(was_there: bool, is_there: bool) -> str:
    if was_there and is_there:
        return "has changed"
    return "is new" if is_there else "is gone"


def _check_asked(folder: Path, now: dict[str, Any]) -> None:
    """Write down what is asked for, or refuse what differs from the first time."""
    path = folder / ASKED
    if not path.is_file():
        write_json(path, now)
        return
    before = read_json(path)
    sources, others = before.pop("sources", {}), now["sources"]
    changed = [f"{key} differs" for key in before if key in now and before[key] != now[key]]
    changed += [
        f"{file} {_what_happened(file in sources, file in others)}"
        for file in sorted(sources.keys() | others.keys())
        if sources.get(file) != others.get(file)
    ]
    if changed:
        shown = "; ".join(changed[:5]) + (f"; {len(changed) - 5} more" if changed[5:] else "")
        raise SurgeryError(
            f"{folder} was begun with something else: {shown}",
            "give what it was begun with, or choose a new folder",
        )


def _encoded(work: Work, numbers: Sequence[int], workers: int) -> Iterator[int]:
    """Make the parts of chunks; yields a number for each, in any order."""
    if min(workers, len(numbers)) > 1:
        yield from in_processes(_encode, numbers, workers, partial(_begin_with, work))
        return
    tokenizer = work.tokenizer()
    for number in numbers:
        yield encode_chunk(work, tokenizer, number)


_OF_THIS_PROCESS: dict[str, Any] = {}


def _begin_with(work: Work) -> None:
    _OF_THIS_PROCESS["work"] = work
    _OF_THIS_PROCESS["tokenizer"] = work.tokenizer()


def _encode(number: int) -> int:
    return encode_chunk(_OF_THIS_PROCESS["work"], _OF_THIS_PROCESS["tokenizer"], number)
