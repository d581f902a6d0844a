"""A folder of ids on disk, mapped into memory and never read whole.

FOLDER/
  tokens.json        dtype, vocabulary, tokenizer's fingerprint; for each split its shards
  train.bin          the ids, one after the other, little-endian, in the dtype that was named
  validation.bin     the held-out ones
  tokenizer/         the tokenizer that made them

The dtype follows the vocabulary: 2 bytes an id up to 65,536 ids, else 4. A shard is a range of a
file that was made in one go, with its number of ids and its sha256. `tokens.json` is written last:
a folder without it is not finished.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from nanogpt_surgery.errors import SurgeryError, first_problems
from nanogpt_surgery.files.writing import flush_place, read_json, write_json
from nanogpt_surgery.values import SIZE_OR_0, TEXT, Kind, wrong_values

if TYPE_CHECKING:
    from torch import Tensor

HEADER, TOKENIZER, VERSION = "tokens.json", "tokenizer", 1
SPLITS = ("train", "validation")
DTYPES = {"uint16": 2, "uint32": 4}  # bytes an id
DTYPE = Kind(f"one of {', '.join(DTYPES)}", lambda x: isinstance(x, str) and x in DTYPES)
_MOST_IDS = {"uint16": 2**16, "uint32": 2**31}  # int32 holds every id elsewhere
_AT_ONCE = 1 << 24  # bytes hashed at a time


@dataclass(frozen=True)
class Shard:
    """A range of a split's file: its ids and the sha256 of their bytes."""

    tokens: int
    sha256: str


@dataclass(frozen=True)
class TokenHeader:
    """The contents of `tokens.json`."""

    version: int
    dtype: str
    vocab_size: int
    tokenizer: str
    """the tokenizer's fingerprint"""
    train: tuple[Shard, ...]
    validation: tuple[Shard, ...]

    def tokens(self, split: str) -> int:
        """How many ids a split has."""
        return sum(shard.tokens for shard in getattr(self, split))

    def fingerprint(self) -> str:
        """A sha256 over the hashes of all shards and what else determines the ids."""
        written = json.dumps(asdict(self), sort_keys=True)
        return hashlib.sha256(written.encode()).hexdigest()


@dataclass(frozen=True)
class TokenFiles:
    """An open folder: the header, and the ids of each split (N,), mapped from their files."""

    folder: Path
    header: TokenHeader
    train: Tensor
    validation: Tensor


def dtype_for(vocab_size: int) -> str:
    """The narrowest dtype that holds every id of a vocabulary.

    Raises:
        SurgeryError: no dtype does.
    """
    for name, ids in _MOST_IDS.items():
        if vocab_size <= ids:
            return name
    raise SurgeryError(f"a vocabulary of {vocab_size:,} ids is larger than {2**31:,}")


def is_token_folder(path: str | Path) -> bool:
    """Whether a finished folder of ids lies there."""
    return (Path(path) / HEADER).is_file()


def open_tokens(folder: str | Path) -> TokenFiles:
    """Maps a folder's ids. Nothing is read but the header; `verify_tokens` looks at every byte.

    Raises:
        SurgeryError: the folder is not finished, or a file is missing, has another length than
            the header says, or the header makes no sense.
    """
    folder = Path(folder)
    header = read_header(folder)
    return TokenFiles(folder, header, *(_mapped(folder, header, split) for split in SPLITS))


def _mapped(folder: Path, header: TokenHeader, split: str) -> Tensor:
    import torch

    path, tokens = folder / f"{split}.bin", header.tokens(split)
    size, wanted = path.stat().st_size if path.is_file() else 0, tokens * DTYPES[header.dtype]
    if size != wanted:
        raise SurgeryError(
            f"{path} has {size:,} bytes; {tokens:,} ids of {header.dtype} have {wanted:,}",
            "prepare the folder anew, or restore it from a copy",
        )
    dtype = np.dtype(header.dtype).newbyteorder("<")
    if not size:  # an empty file cannot be mapped
        return torch.from_numpy(np.empty(0, header.dtype))
    # Copy-on-write, because torch warns of an array that cannot be written; nobody writes.
    return torch.from_numpy(np.memmap(path, dtype, mode="c"))


def read_header(folder: Path) -> TokenHeader:
    """Reads a folder's `tokens.json`.

    Raises:
        SurgeryError: it is missing or makes no sense.
    """
    if not is_token_folder(folder):
        raise SurgeryError(
            f"{folder} has no {HEADER}: it is no folder of tokens, or not finished",
            f"prepare_tokens(TEXT, out={folder}) makes one, or goes on with it",
        )
    path = folder / HEADER
    contents = read_json(path)
    if not isinstance(contents, dict) or contents.get("version") != VERSION:
        raise SurgeryError(f"{path} is not of version {VERSION}, the one that is read here")
    try:
        shards = {name: tuple(Shard(**shard) for shard in contents[name]) for name in SPLITS}
        header = TokenHeader(**(contents | shards))
    except (TypeError, KeyError) as error:
        raise SurgeryError(f"{path} is damaged: {error}") from None
    problems = wrong_values(SIZE_OR_0, {"vocab_size": header.vocab_size})
    problems += wrong_values(TEXT, {"tokenizer": header.tokenizer})
    problems += wrong_values(DTYPE, {"dtype": header.dtype})
    for shard in (*header.train, *header.validation):
        problems += wrong_values(SIZE_OR_0, {"tokens": shard.tokens})
        problems += wrong_values(TEXT, {"sha256": shard.sha256})
    if problems:
        raise SurgeryError(f"{path} is damaged: {first_problems(problems)}")
    return header


def write_header(folder: Path, header: TokenHeader) -> None:
    """Finishes a folder whose files are complete."""
    write_json(folder / HEADER, asdict(header))
    flush_place(folder / HEADER)


def verify_tokens(folder: str | Path) -> None:
    """Reads every byte of a folder and compares the hash of each shard.

    Raises:
        SurgeryError: a shard has changed since it was written, or as `open_tokens`.
    """
    folder = Path(folder)
    header = open_tokens(folder).header
    for split in SPLITS:
        path = folder / f"{split}.bin"
        with path.open("rb") as file:
            for number, shard in enumerate(getattr(header, split)):
                if _hash(file, shard.tokens * DTYPES[header.dtype]) != shard.sha256:
                    raise SurgeryError(
                        f"{path} has changed since it was written: shard {number} of "
                        f"{len(getattr(header, split))} differs in its sha256",
                        "restore it from a copy, or delete the folder and prepare it anew",
                    )


def _hash(file: Any, size: int) -> str:
    digest = hashlib.sha256()
    while size and (data := file.read(min(size, _AT_ONCE))):
        digest.update(data)
        size -= len(data)
    return digest.hexdigest()
