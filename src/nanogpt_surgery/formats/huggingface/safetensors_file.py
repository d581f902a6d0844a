"""Safetensors files: the header is read and checked before anything is allocated.

    8 bytes: length N of the header | N bytes of JSON | the tensors, one after the other

The header says of each tensor its dtype, shape and place: claims of whoever wrote the file. Within
our limits the safetensors library checks them; the tensors are mapped or read as
`placing.py` does it for every format, since the library has no way to read without a map, nor
one to write without all tensors in memory.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from nanogpt_surgery.errors import SurgeryError, quoted
from nanogpt_surgery.files.disk_errors import UnwrittenError
from nanogpt_surgery.files.writing import read_json
from nanogpt_surgery.formats.placing import MappedFile, StoredTensor

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
# The library writes tensors in this order, so that each lies at a multiple of its numbers' size.
_ORDER = ("I64", "F64", "F32", "I32", "BF16", "F16", "I16", "I8", "U8", "BOOL")
_RANKS = {DTYPES[name]: rank for rank, name in enumerate(_ORDER)}


def stored_tensors(folder: Path, file_name: str = "model.safetensors") -> dict[str, StoredTensor]:
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


def _sharded(folder: Path) -> dict[str, StoredTensor]:
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


def read_header(path: Path) -> dict[str, StoredTensor]:
    """The tensors of one file, by name.

    Raises:
        SurgeryError: the file is missing, cut short, goes beyond the limits, or its header
            contradicts itself.
    """
    if not path.is_file():
        raise SurgeryError(f"{path} is missing")
    size = path.stat().st_size
    text = _header(path, size)
    try:
        with safe_open(path, "np"):  # refuses gaps, overlaps, and sizes that are not the file's
            header = json.loads(text, object_pairs_hook=_without_repetition)
    except (SafetensorError, OSError, ValueError, RecursionError) as error:
        raise _wrong(path, quoted(str(error))) from None
    header.pop("__metadata__", None)
    if len(header) > MAX_TENSORS:
        raise _wrong(path, f"{len(header):,} tensors are over the limit of {MAX_TENSORS:,}")
    start, file = 8 + len(text), MappedFile(path, size)
    return {name: _tensor(name, entry, start, file) for name, entry in header.items()}


def read_metadata(path: Path) -> dict[str, str]:
    """The texts in the header of a file that `read_header` has read."""
    with safe_open(path, "np") as file:
        return dict(file.metadata() or {})


def _header(path: Path, size: int) -> bytes:
    """The header, of a length and a number of lists and tables that any parser can take."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > size - 8:
            raise _wrong(path, f"{size:,} bytes, and a header of {length:,} announced")
        if length > MAX_HEADER:
            raise _wrong(path, f"a header of {length:,} bytes is over the limit of {MAX_HEADER:,}")
        text = file.read(length)
    if text.count(b"{") + text.count(b"[") > _MAX_BRACKETS:
        raise _wrong(path, f"its header has more than {_MAX_BRACKETS:,} lists and tables")
    return text


def _without_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = dict(pairs)
    if len(names) < len(pairs):
        raise ValueError("a name is there twice")
    return names


def _tensor(name: str, entry: dict[str, Any], start: int, file: MappedFile) -> StoredTensor:
    """A tensor of a header whose values safetensors has found to be of their kinds."""
    dtype, shape = DTYPES.get(entry["dtype"]), entry["shape"]
    if not name or len(entry) != 3:
        raise _wrong(file.path, f"{quoted(name)} is not described by dtype, shape and data_offsets")
    if dtype is None:
        raise _wrong(file.path, f"{quoted(name)} has the dtype {entry['dtype']}, which is not read")
    if len(shape) > _MAX_DIMS or max(shape, default=0) >= 1 << 48:
        raise _wrong(file.path, f"{quoted(name)} has the shape {quoted(shape)}")
    return StoredTensor(name, tuple(shape), dtype, start + entry["data_offsets"][0], file)


def _wrong(path: Path, what: str) -> SurgeryError:
    return SurgeryError(f"{path} is not a safetensors file that can be trusted: {what}")


def write_tensors(
    tensors: Mapping[str, Tensor],
    path: Path,
    make: Callable[[Iterable[str]], Iterable[Tensor]] | None = None,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Writes a file, to the byte as the library does; what the disk refuses is an `OSError`.

    Args:
        tensors: by name; if `make` is given only their shapes and dtypes count.
        path: made, or replaced.
        make: gives the tensors of some names, one after the other, so that not all need be in
            memory.
        metadata: texts that stand in the header.
    """
    text, names = header_of(tensors, metadata)
    try:
        with path.open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for tensor in make(names) if make else (tensors[name] for name in names):
                flat: Any = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
                file.write(flat.numpy())
    except OSError as error:
        raise UnwrittenError(error, path, file_size(tensors, metadata)) from error


def header_of(
    tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> tuple[bytes, list[str]]:
    """The JSON that a file of these tensors begins with, and their names in the file's order."""
    names = sorted(tensors, key=lambda name: (_RANKS[tensors[name].dtype], name))
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    end = 0
    for name in names:
        start, end = end, end + tensors[name].nbytes
        entry = {"dtype": _ORDER[_RANKS[tensors[name].dtype]], "shape": list(tensors[name].shape)}
        header[name] = entry | {"data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    return text + b" " * (-len(text) % 8), names


def file_size(tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> int:
    """The bytes of a file of these tensors, of which only the shapes and dtypes count."""
    text, _ = header_of(tensors, metadata)
    return 8 + len(text) + sum(tensor.nbytes for tensor in tensors.values())
