"""The parts of a folder of ids in the making: a part for each chunk of the corpus.

A part's ids lie in a file for each split, `parts/00007.train.bin`; `parts/00007.json` has their
numbers and hashes, and is written after them. At the end the parts are joined in order, and
each is deleted once it is safely in.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nanogpt_surgery.data.text.chunks import Chunk, read_span, split_at_line
from nanogpt_surgery.data.text.token_files import DTYPES, SPLITS, Shard
from nanogpt_surgery.data.tokenizers.tokenizer import Tokenizer, encode_to_array
from nanogpt_surgery.errors import SurgeryError
from nanogpt_surgery.files.disk_errors import disk_refuses
from nanogpt_surgery.files.json_files import read_json, write_json
from nanogpt_surgery.files.writing import flush

PARTS = "parts"
Ids = NDArray[Any]


@dataclass(frozen=True)
class Work:
    """Everything that a process needs to encode any chunk of the corpus."""

    folder: Path
    chunks: tuple[Chunk, ...]
    tokenizer_of: Callable[[], Tokenizer | None]
    held_out: float
    dtype: str

    def tokenizer(self) -> Tokenizer:
        """The tokenizer, opened anew."""
        tokenizer = self.tokenizer_of()
        assert tokenizer is not None, "the folder has lost its tokenizer"
        return tokenizer

    def part(self, number: int, ending: str) -> Path:
        """Where a file of a part lies."""
        return self.folder / PARTS / f"{number:05d}.{ending}"


def is_done(work: Work, number: int) -> bool:
    """Whether a chunk's part is there, whole."""
    if not work.part(number, "json").is_file():
        return False
    return all(_is_there(work, number, split) for split in SPLITS)


def _is_there(work: Work, number: int, split: str) -> bool:
    """Whether a part's ids lie beside its sizes, or have gone into the joined file."""
    path = work.part(number, f"{split}.bin")
    if not path.is_file():
        return (work.folder / f"{split}.bin").is_file()
    return path.stat().st_size == _shard(work, number, split).tokens * DTYPES[work.dtype]


def _shard(work: Work, number: int, split: str) -> Shard:
    return Shard(**read_json(work.part(number, "json"))[split])


def encode_chunk(work: Work, tokenizer: Tokenizer, number: int) -> int:
    """Write the part of a chunk: ids first, then their sizes and hashes, each in one rename.

    Raises:
        SurgeryError: the disk refuses, or the text is not UTF-8 or not in the vocabulary.
    """
    sizes = {}
    for split, ids in zip(SPLITS, _ids_of(work, tokenizer, number), strict=True):
        data = ids.astype(np.dtype(work.dtype).newbyteorder("<")).tobytes()
        goal = work.part(number, f"{split}.bin")
        temporary = goal.with_name(f".tmp-{os.getpid()}-{goal.name}")
        try:
            temporary.write_bytes(data)
            flush(temporary)
            temporary.replace(goal)
        except OSError as error:
            raise disk_refuses(goal, error) from error
        finally:
            temporary.unlink(missing_ok=True)
        sizes[split] = {"tokens": len(ids), "sha256": hashlib.sha256(data).hexdigest()}
    write_json(work.part(number, "json"), sizes)
    return number


def _ids_of(work: Work, tokenizer: Tokenizer, number: int) -> tuple[Ids, Ids]:
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
    return _joined_ids(tokenizer, train), _joined_ids(tokenizer, documents)


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
    """Join the parts of a split into its file; each part is deleted when it is safely in.

    Raises:
        SurgeryError: the file has lost parts that went into it, or the disk refuses.
    """
    numbers = range(len(work.chunks))
    shards = [_shard(work, number, split) for number in numbers]
    paths = [work.part(number, f"{split}.bin") for number in numbers]
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
    try:
        _append(goal, place, paths[first:])
    except OSError as error:
        raise disk_refuses(goal, error) from error
    return tuple(shards)


def _append(goal: Path, place: int, paths: list[Path]) -> None:
    with goal.open("r+b") as file:
        file.truncate(place)
        file.seek(place)
        for path in paths:
            with path.open("rb") as part:
                shutil.copyfileobj(part, file)
            file.flush()
            os.fsync(file.fileno())
            path.unlink()
