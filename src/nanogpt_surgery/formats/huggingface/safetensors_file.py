"""Safetensors files: the header is read and checked before anything is allocated.

    8 bytes: length N of the header | N bytes of JSON | the tensors, one after the other

The header says of each tensor its dtype, shape and place. Every one of these is a claim of whoever
wrote the file.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch

from nanogpt_surgery.errors import SurgeryError, quoted
from nanogpt_surgery.files.json_files import read_json
from nanogpt_surgery.formats.stored_tensor import MappedFile, PlainTensor

INDEX = "model.safetensors.index.json"
MAX_HEADER = 16 << 20  # bytes
MAX_TENSORS = 50_000
_MAX_DIMS = 8
_MAX_BRACKETS = 1_000_000  # three a tensor, and what its metadata quotes

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


def stored_tensors(folder: Path, file_name: str = "model.safetensors") -> dict[str, PlainTensor]:
    """The tensors of a model folder, in one file or in the shards that its index names.

    Raises:
        SurgeryError: a file is missing, damaged, or says what cannot be.
    """
    if (folder / file_name).is_file():
        return read_header(folder / file_name)
    if (folder / INDEX).is_file():
        return _sharded(folder)
    pickles = [path.name for path in folder.glob("*.bin")] + [p.name for p in folder.glob("*.pth")]
    if pickles:
        raise SurgeryError(
            f"{folder} has its weights in {', '.join(sorted(pickles)[:3])}: pickle, which can run "
            "any code and is never loaded",
            "look for a copy of the model in safetensors",
        )
    raise SurgeryError(f"{folder / file_name} is missing")


def weight_files(folder: Path, file_name: str = "model.safetensors") -> set[str]:
    """The names of the files that a model folder's tensors lie in, the index among them.

    Raises:
        SurgeryError: the index says what cannot be.
    """
    index = {INDEX, *_places(folder).values()} if (folder / INDEX).is_file() else set()
    return {name for name in {file_name, *index} if (folder / name).is_file()}


def _sharded(folder: Path) -> dict[str, PlainTensor]:
    places = _places(folder)
    shards = {name: read_header(folder / name) for name in sorted(set(places.values()))}
    missing = [name for name, file in places.items() if name not in shards[file]]
    if missing:
        raise SurgeryError(
            f"{folder / INDEX} promises {missing[0]!r} in {places[missing[0]]}, which has no such "
            f"tensor ({len(missing)} missing in all)"
        )
    return {name: shards[file][name] for name, file in places.items()}


def _places(folder: Path) -> dict[str, str]:
    """The file of each tensor, as the index has it."""
    index = read_json(folder / INDEX)
    places = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(places, dict) or not all(isinstance(name, str) for name in places.values()):
        raise SurgeryError(f"{folder / INDEX} has no weight_map from tensors to files")
    files = sorted(set(places.values()))
    strange = [name for name in files if Path(name).name != name or name in (".", "..")]
    if strange:
        raise SurgeryError(f"{folder / INDEX} names files outside its folder: {strange[0]!r}")
    return places


def read_header(path: Path) -> dict[str, PlainTensor]:
    """The tensors of one file, by name.

    Raises:
        SurgeryError: the file is missing, cut short, or its header contradicts itself.
    """
    if not path.is_file():
        raise SurgeryError(f"{path} is missing")
    size = path.stat().st_size
    header = _header(path, size)
    start = 8 + header.pop("", 0)
    file = MappedFile(path, size)
    tensors = {name: _tensor(name, entry, file, start) for name, entry in header.items()}
    _check_places(tensors, start, size, path)
    return tensors


def _header(path: Path, size: int) -> dict[str, Any]:
    """The header without its metadata; its length stands under the empty name."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > size - 8:
            raise _wrong(path, f"{size:,} bytes, and a header of {length:,} announced")
        if length > MAX_HEADER:
            raise _wrong(path, f"a header of {length:,} bytes is over the limit of {MAX_HEADER:,}")
        text = file.read(length)
    if text.count(b"{") + text.count(b"[") > _MAX_BRACKETS:
        raise _wrong(path, f"its header has more than {_MAX_BRACKETS:,} lists and tables")
    try:
        header = json.loads(text.decode("utf-8"), object_pairs_hook=_without_repetition)
    except (ValueError, RecursionError) as error:
        raise _wrong(path, f"its header is not JSON: {quoted(str(error))}") from None
    if not isinstance(header, dict) or "" in header:
        raise _wrong(path, "its header is not a JSON object of named tensors")
    header.pop("__metadata__", None)
    if len(header) > MAX_TENSORS:
        raise _wrong(path, f"{len(header):,} tensors are over the limit of {MAX_TENSORS:,}")
    return header | {"": length}


def _without_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = dict(pairs)
    if len(names) < len(pairs):
        raise ValueError("a name is there twice")
    return names


def _tensor(name: str, entry: Any, file: MappedFile, start: int) -> PlainTensor:
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise _wrong(file.path, f"{quoted(name)} is not described by dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise _wrong(
            file.path, f"{quoted(name)} has the dtype {quoted(dtype)}, which is not one we have"
        )
    if not _naturals(shape) or len(shape) > _MAX_DIMS:
        raise _wrong(file.path, f"{quoted(name)} has the shape {quoted(shape)}")
    if not _naturals(offsets) or len(offsets) != 2:
        raise _wrong(file.path, f"{quoted(name)} lies at {quoted(offsets)}")
    size = math.prod(shape) * DTYPES[dtype].itemsize
    if offsets[1] - offsets[0] != size:
        raise _wrong(
            file.path,
            f"{quoted(name)} takes {size:,} bytes and is given {offsets[1] - offsets[0]:,}",
        )
    return PlainTensor(name, tuple(shape), DTYPES[dtype], start + offsets[0], file)


def _naturals(values: Any) -> bool:
    """Whether it is a list of numbers that can be sizes."""
    return isinstance(values, list) and all(
        type(value) is int and 0 <= value < 1 << 48 for value in values
    )


def _check_places(tensors: dict[str, PlainTensor], start: int, size: int, path: Path) -> None:
    """The tensors follow each other without a gap and end with the file."""
    end = start
    for tensor in sorted(tensors.values(), key=lambda t: (t.offset, t.n_numbers)):
        if tensor.offset != end:
            raise _wrong(path, f"{quoted(tensor.name)} begins at {tensor.offset:,}, not at {end:,}")
        end += tensor.n_numbers * tensor.dtype.itemsize
    if end != size:
        raise _wrong(path, f"its tensors end at byte {end:,}, the file at {size:,}")


def _wrong(path: Path, what: str) -> SurgeryError:
    return SurgeryError(f"{path} is not a safetensors file that can be trusted: {what}")
