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
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nanogpt_surgery.data.text.corpus import HELD_OUT, Chunk, read_span, split_at_line
from nanogpt_surgery.data.text.processes import cores, in_processes
from nanogpt_surgery.data.text.token_files import (
    DTYPES,
    SPLITS,
    VERSION,
    Shard,
    TokenHeader,
    dtype_for,
    is_token_folder,
    write_header,
)
from nanogpt_surgery.data.tokenizers.tokenizer import (
    Tokenizer,
    encode_to_array,
    tokenizer_fingerprint,
    vocab_size_of,
)
from nanogpt_surgery.errors import SurgeryError, first_problems
from nanogpt_surgery.files.disk_errors import make_folder, tried_again, writing
from nanogpt_surgery.files.writing import read_json, remove_temporaries, replace_bytes, write_json

ASKED, PARTS = "asked.json", "parts"
MOST_HELD_OUT = 16 << 20  # bytes of text
Ids = NDArray[Any]


@dataclass(frozen=True)
class Work:
    """Everything that a process needs to encode any chunk of the corpus."""

    folder: Path
    chunks: tuple[Chunk, ...]
    tokenizer_of: Callable[[], Tokenizer | None]
    held_out: float
    dtype: str

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer, opened once in each process."""
        tokenizer = self.tokenizer_of()
        assert tokenizer is not None, "the folder has lost its tokenizer"
        return tokenizer

    def part(self, number: int, ending: str) -> Path:
        """Where a file of a part lies."""
        return self.folder / PARTS / f"{number:05d}.{ending}"


def prepare_tokens(
    chunks: Sequence[Chunk],
    folder: Path,
    tokenizer_of: Callable[[], Tokenizer | None],
    held_out: float | None = None,
    workers: int = 0,
) -> Iterator[int]:
    """Encodes chunks into a token folder, or goes on where an earlier attempt was stopped.

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
    asked = _asked(work, fingerprint)
    header = partial(TokenHeader, VERSION, work.dtype, vocab_size, fingerprint)
    with writing(folder):
        yield from _prepared(work, asked, header, workers or cores())


def _prepared(
    work: Work, asked: dict[str, Any], header: Callable[..., TokenHeader], workers: int
) -> Iterator[int]:
    """Writes what is not there yet; yields the number of chunks that are done."""
    folder, chunks = work.folder, work.chunks
    _check_asked(folder, asked)
    if is_token_folder(folder):
        shutil.rmtree(folder / PARTS, ignore_errors=True)  # a kill may have left it
        yield len(chunks)
        return
    make_folder(folder / PARTS)
    remove_temporaries(folder)
    remove_temporaries(folder / PARTS)
    waiting = [number for number in range(len(chunks)) if not is_done(work, number)]
    yield len(chunks) - len(waiting)
    begin = partial(_begin_with, work)
    for done, _ in enumerate(in_processes(_encode, waiting, workers, begin), 1):
        yield len(chunks) - len(waiting) + done
    write_header(folder, header(**{split: join_parts(work, split) for split in SPLITS}))
    shutil.rmtree(folder / PARTS, ignore_errors=True)  # it is in nobody's way
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
        "sources": {
            file: [found.st_size, found.st_mtime_ns]
            for file, found in ((file, Path(file).stat()) for file in files)
        },
    }


def _check_asked(folder: Path, now: dict[str, Any]) -> None:
    """Writes down what is asked for, or refuses what differs from the first time."""
    path = folder / ASKED
    if not path.is_file():
        write_json(path, now)
        return
    before = read_json(path)
    sources, others = before.pop("sources", {}), now["sources"]
    changed = [f"{key} differs" for key in before if key in now and before[key] != now[key]]
    changed += [f"{file} is gone" for file in sorted(sources.keys() - others.keys())]
    changed += [f"{file} is new" for file in sorted(others.keys() - sources.keys())]
    both = sorted(sources.keys() & others.keys())
    changed += [f"{file} has changed" for file in both if sources[file] != others[file]]
    if changed:
        raise SurgeryError(
            f"{folder} was begun with something else: {first_problems(changed)}",
            "give what it was begun with, or choose a new folder",
        )


_OF_THIS_PROCESS: dict[str, Work] = {}


def _begin_with(work: Work) -> None:
    _OF_THIS_PROCESS["work"] = work


def _encode(number: int) -> None:
    encode_chunk(_OF_THIS_PROCESS["work"], number)


def is_done(work: Work, number: int) -> bool:
    """Whether a chunk's part is there, whole: beside its sizes, or gone into the joined files."""
    if not work.part(number, "json").is_file():
        return False
    for split in SPLITS:
        path, joined = work.part(number, f"{split}.bin"), work.folder / f"{split}.bin"
        size = _shard(work, number, split).tokens * DTYPES[work.dtype]
        if not (path.stat().st_size == size if path.is_file() else joined.is_file()):
            return False
    return True


def _shard(work: Work, number: int, split: str) -> Shard:
    return Shard(**read_json(work.part(number, "json"))[split])


def encode_chunk(work: Work, number: int) -> None:
    """Writes the part of a chunk: ids first, then their sizes and hashes, each in one rename.

    Raises:
        SurgeryError: the disk refuses, or the text is not UTF-8 or not in the vocabulary.
    """
    sizes = {}
    for split, ids in zip(SPLITS, _ids_of(work, number), strict=True):
        data = ids.astype(np.dtype(work.dtype).newbyteorder("<")).tobytes()
        goal = work.part(number, f"{split}.bin")
        with writing(goal):
            replace_bytes(goal, data)
        sizes[split] = {"tokens": len(ids), "sha256": hashlib.sha256(data).hexdigest()}
    write_json(work.part(number, "json"), sizes)


def _ids_of(work: Work, number: int) -> tuple[Ids, Ids]:
    """The ids of a chunk: those to train on, and those held out."""
    documents = [(read_span(span), span.first) for span in work.chunks[number]]
    # Before the first document lies nothing; before another chunk, what was held out of the last.
    apart = number > 0
    documents[0] = (documents[0][0], apart and (documents[0][1] or work.held_out > 0))
    left = int(sum(len(text) for text, _ in documents) * (1 - work.held_out))
    train: list[tuple[str, bool]] = []
    while documents and len(documents[0][0]) <= left:
        train.append(documents.pop(0))
        left -= len(train[-1][0])
    if documents and work.held_out:
        text, first = documents[0]
        before, after = split_at_line(text, 1 - left / len(text))
        if before:
            train.append((before, first))
        documents[0] = (after, apart)
    elif documents:
        train, documents = train + documents, []
    return _joined_ids(work.tokenizer, train), _joined_ids(work.tokenizer, documents)


def _joined_ids(tokenizer: Tokenizer, documents: list[tuple[str, bool]]) -> Ids:
    eos = getattr(tokenizer, "eos_id", None)
    between = tokenizer.encode("\n") if eos is None else [eos]
    parts = [np.empty(0, np.int32)]
    for text, first in documents:
        if first:
            parts.append(np.asarray(between, np.int32))
        parts.append(encode_to_array(tokenizer, text))
    return np.concatenate(parts)


def join_parts(work: Work, split: str) -> tuple[Shard, ...]:
    """Joins the parts of a split into its file; each part is deleted when it is safely in.

    Raises:
        SurgeryError: the file has lost parts that went into it, or the disk refuses.
    """
    shards = [_shard(work, number, split) for number in range(len(work.chunks))]
    with writing(work.folder / f"{split}.bin"):
        tried_again(lambda: _join(work, split, shards))
    return tuple(shards)


def _join(work: Work, split: str, shards: list[Shard]) -> None:
    """Goes on after the parts that are in already, as another attempt does."""
    paths = [work.part(number, f"{split}.bin") for number in range(len(shards))]
    first = next((i for i, path in enumerate(paths) if path.is_file()), len(paths))
    place = sum(shard.tokens for shard in shards[:first]) * DTYPES[work.dtype]
    goal = work.folder / f"{split}.bin"
    goal.touch()
    if goal.stat().st_size < place:
        raise SurgeryError(
            f"{goal} has {goal.stat().st_size:,} bytes; {first} parts that went into it had "
            f"{place:,}",
            f"delete {work.folder} and prepare it anew",
        )
    with goal.open("r+b") as file:
        file.truncate(place)
        file.seek(place)
        for path in paths[first:]:
            with path.open("rb") as part:
                shutil.copyfileobj(part, file)
            file.flush()
            os.fsync(file.fileno())
            path.unlink()
