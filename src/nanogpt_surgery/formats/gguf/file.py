"""GGUF files (version 3), read by hand and checked before anything is allocated.

    "GGUF" | version | number of tensors | number of metadata | metadata | tensor infos | data

Every number in it is a claim of whoever wrote the file: a length is compared with the bytes
left before it is believed. `docs/gguf.md` of the ggml repository describes the format.
"""

from __future__ import annotations

import mmap
import re
import struct
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from nanogpt_surgery.errors import SurgeryError, foreign_file, quoted
from nanogpt_surgery.formats.huggingface.safetensors_file import MAX_TENSORS
from nanogpt_surgery.formats.placing import MappedFile, StoredTensor

MAGIC = b"GGUF"
MAX_METADATA = 10_000
MAX_NAME = 64  # bytes of a tensor's name, as ggml has it
MAX_STRINGS = 2_000_000  # in all arrays; Gemma 3 has 262,144 tokens and 514,906 merges
MAX_HEADER = 48 << 20  # bytes of metadata; that of Gemma 3 has 16
_MAX_KEY = 1 << 16
_MAX_ALIGNMENT = 1 << 20
_STRING, _ARRAY, _BOOL = 8, 9, 7
_NUMBERS = {
    0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "B", 10: "Q", 11: "q", 12: "d"
}  # fmt: skip

PLAIN = {
    GGMLQuantizationType.F32: torch.float32,
    GGMLQuantizationType.F16: torch.float16,
    GGMLQuantizationType.BF16: torch.bfloat16,
}
_QUANTISED = [GGMLQuantizationType[n] for n in "Q8_0 Q4_0 Q4_1 Q5_0 Q5_1 Q4_K Q5_K Q6_K".split()]


@dataclass(frozen=True)
class GGUFFile:
    """The metadata and the tensors of a file; arrays of numbers are numpy's."""

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, StoredTensor]


def is_gguf(path: Path) -> bool:
    """Whether a file begins as a GGUF file does."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(4) == MAGIC


def read_gguf(path: str | Path) -> GGUFFile:
    """Reads the header of a file, or of all parts of a split one; tensors are read when used.

    Args:
        path: a file, or any part of a split one (NAME-00001-of-00003.gguf): the others lie beside
            it, and the first has the metadata.

    Raises:
        SurgeryError: the file is cut short, contradicts itself, goes beyond the limits, or holds a
            kind of tensor that is not read; a part is missing, or is not of this model.
    """
    part = _read_file(Path(path))
    count = part.metadata.get(_COUNT, 1)
    if type(count) is not int or not 0 <= count <= MAX_TENSORS:
        raise _untrusted(part.path, f"{_COUNT} is {quoted(count)}")
    parts = [part] if count <= 1 else _all_parts(part, count)
    tensors: dict[str, StoredTensor] = {}
    for part in parts:
        for name in part.tensors.keys() & tensors.keys():
            raise _untrusted(part.path, f"the tensor {quoted(name)} is in an earlier part too")
        tensors |= part.tensors
    total = parts[0].metadata.get(_TOTAL, len(tensors))
    if type(total) is not int or total != len(tensors):
        said = f"{_TOTAL} is {quoted(total)}, and there are {len(tensors):,} tensors"
        raise _untrusted(parts[0].path, said)
    return GGUFFile(parts[0].path, parts[0].metadata, tensors)


_COUNT, _NUMBER, _TOTAL = "split.count", "split.no", "split.tensors.count"


def _all_parts(part: GGUFFile, count: int) -> list[GGUFFile]:
    """The parts of a split file in their order, each of the number that its name says."""
    name = re.fullmatch(r"(.*)-\d{5}-of-\d{5}\.gguf", part.path.name, re.DOTALL)
    number = part.metadata.get(_NUMBER)
    if name is None or type(number) is not int or not 0 <= number < count:
        raise _untrusted(
            part.path,
            f"it is part {quoted(number)} (from 0) of {count:,}, and such a file is named "
            f"NAME-00001-of-{count:05}.gguf",
        )
    paths = [
        part.path.with_name(f"{name[1]}-{i:05}-of-{count:05}.gguf") for i in range(1, count + 1)
    ]
    if part.path != paths[number]:
        raise _untrusted(part.path, f"inside it says that it is {paths[number].name}")
    missing = [path.name for path in paths if not path.is_file()]
    if missing:
        more = f" and {len(missing) - 8:,} more" if missing[8:] else ""
        raise SurgeryError(
            f"{part.path} is one of {count:,} parts, of which {len(missing):,} are not beside it: "
            f"{', '.join(missing[:8])}{more}",
            "put all parts into one folder, with the names they had",
        )
    parts = [part if i == number else _read_file(path) for i, path in enumerate(paths)]
    for i, other in enumerate(parts):
        _check_part(other, {_COUNT: count, _NUMBER: i}, parts[0])
    return parts


def _check_part(part: GGUFFile, place: dict[str, int], first: GGUFFile) -> None:
    """Raises `SurgeryError` unless a part is in its place and says only what the first one says."""
    expected = first.metadata | place
    for key, value in part.metadata.items():
        if key != "general.alignment" and not _is_same(value, expected.get(key)):
            raise _untrusted(
                part.path,
                f"its {quoted(key)} is {quoted(value)}, where {quoted(expected.get(key))} belongs "
                f"beside {first.path.name}",
            )
    lacking = [key for key in place if key not in part.metadata]
    if lacking:
        raise _untrusted(part.path, f"it lacks {', '.join(lacking)}")


def _is_same(value: Any, other: Any) -> bool:
    return type(value) is type(other) and bool(np.array_equal(value, other))


def _untrusted(path: Path, what: str) -> SurgeryError:
    return SurgeryError(f"{path} is not a GGUF file that can be trusted: {what}")


def _read_file(path: Path) -> GGUFFile:
    size = path.stat().st_size
    if size < 24:
        raise SurgeryError(f"{path} has {size} bytes; a GGUF file has at least 24")
    with (
        foreign_file(path, "its header"),
        path.open("rb") as file,
        mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data,
    ):
        reader = _Reader(path, data, size)
        n_tensors, n_metadata = _counts(reader)
        metadata = _metadata(reader, n_metadata)
        tensors = _tensors(reader, n_tensors, metadata)
    return GGUFFile(path, metadata, tensors)


class _Reader:
    """A place in the header, which moves on as things are read."""

    def __init__(self, path: Path, data: mmap.mmap, size: int):
        self.path, self.data, self.size, self.place = path, data, size, 0
        self.strings_left = MAX_STRINGS

    def wrong(self, what: str) -> SurgeryError:
        return _untrusted(self.path, what)

    def take(self, count: int, what: str) -> int:
        """Moves over `count` bytes if they are there; returns the place where they begin."""
        left = self.size - self.place
        if count > left:
            raise self.wrong(
                f"{what} of {count:,} bytes at {self.place:,}, where {left:,} are left"
            )
        if self.place + count > MAX_HEADER:
            raise self.wrong(
                f"{what} ends at {self.place + count:,}, beyond the limit of {MAX_HEADER:,} for a "
                "header"
            )
        self.place += count
        return self.place - count

    def number(self, code: str, what: str) -> Any:
        start = self.take(struct.calcsize(code), what)
        return struct.unpack_from("<" + code, self.data, start)[0]

    def string(self, what: str, longest: int | None = None) -> str:
        length = self.number("Q", f"the length of {what}")
        if longest is not None and length > longest:
            raise self.wrong(f"{what} of {length:,} bytes is over the limit of {longest:,}")
        start = self.take(length, what)
        try:
            return self.data[start : start + length].decode("utf-8")
        except UnicodeDecodeError:
            raise self.wrong(f"{what} at {start:,} is not UTF-8") from None

    def strings(self, count: int, what: str) -> list[str]:
        """So many strings, one after the other: a vocabulary."""
        if count > self.strings_left:
            raise self.wrong(
                f"{what} announces {count:,} strings; the limit for a file is {MAX_STRINGS:,}"
            )
        self.strings_left -= count
        data, place, length_at = self.data, self.place, struct.Struct("<Q").unpack_from
        end, texts = min(self.size, MAX_HEADER), list[str]()
        try:
            while len(texts) < count and place + 8 <= end:
                start = place + 8
                place = start + length_at(data, place)[0]
                if place > end:
                    break
                texts.append(data[start:place].decode("utf-8"))
                self.place = place
        except UnicodeDecodeError:
            raise self.wrong(f"a string of {what} at {start:,} is not UTF-8") from None
        if len(texts) < count:
            self.string(f"a string of {what}")  # raises: it says where it goes beyond the end
        return texts


def _counts(reader: _Reader) -> tuple[int, int]:
    start = reader.take(4, "the magic")
    magic, version = reader.data[start : start + 4], reader.number("I", "the version")
    if magic != MAGIC:
        raise reader.wrong(f"it begins with {magic!r}")
    if version != 3:
        raise reader.wrong(f"it is of version {version}; version 3, little-endian, is read")
    n_tensors, n_metadata = reader.number("Q", "a count"), reader.number("Q", "a count")
    if n_tensors > MAX_TENSORS or n_metadata > MAX_METADATA:
        raise reader.wrong(
            f"{n_tensors:,} tensors and {n_metadata:,} metadata are over the limits of "
            f"{MAX_TENSORS:,} and {MAX_METADATA:,}"
        )
    return n_tensors, n_metadata


def _metadata(reader: _Reader, count: int) -> dict[str, Any]:
    metadata: dict[str, Any] = {}
    for _ in range(count):
        key = reader.string("a key", _MAX_KEY)
        if key in metadata:
            raise reader.wrong(f"the key {quoted(key)} is there twice")
        metadata[key] = _value(reader, key, reader.number("I", f"the type of {quoted(key)}"))
    return metadata


def _value(reader: _Reader, key: str, kind: int) -> Any:
    if kind == _STRING:
        return reader.string(f"the value of {quoted(key)}")
    if kind == _ARRAY:
        return _array(reader, key)
    if kind not in _NUMBERS:
        raise reader.wrong(f"{quoted(key)} has the type {kind}, which there is not")
    value = reader.number(_NUMBERS[kind], f"the value of {quoted(key)}")
    if kind == _BOOL and value > 1:
        raise reader.wrong(f"{quoted(key)} is a bool of {value}")
    return bool(value) if kind == _BOOL else value


def _array(reader: _Reader, key: str) -> Any:
    kind = reader.number("I", f"the type in {quoted(key)}")
    length = reader.number("Q", quoted(key))
    if kind == _STRING:
        if length > (reader.size - reader.place) // 8:
            raise reader.wrong(
                f"{quoted(key)} announces {length:,} strings, more than there is room for"
            )
        return reader.strings(length, quoted(key))
    if kind not in _NUMBERS:
        raise reader.wrong(f"{quoted(key)} is an array of the type {kind}, which is not read")
    dtype = np.dtype(_NUMBERS[kind]).newbyteorder("<")
    start = reader.take(length * dtype.itemsize, f"the array {quoted(key)}")
    return np.frombuffer(reader.data[start : reader.place], dtype)


def _tensors(reader: _Reader, count: int, metadata: dict[str, Any]) -> dict[str, StoredTensor]:
    """The tensors by name, each aligned, inside the file, and of no byte that is another's."""
    alignment = metadata.get("general.alignment", 32)
    if type(alignment) is not int or not 0 < alignment <= _MAX_ALIGNMENT:
        raise reader.wrong(f"general.alignment is {quoted(alignment)}")
    if alignment & (alignment - 1):
        raise reader.wrong(f"general.alignment {alignment} is not a power of two")
    file, tensors = MappedFile(reader.path, reader.size), dict[str, StoredTensor]()
    for tensor in [_tensor(reader, file) for _ in range(count)]:
        if tensor.name in tensors:
            raise reader.wrong(f"the tensor {quoted(tensor.name)} is there twice")
        tensors[tensor.name] = tensor
    data, end = -(-reader.place // alignment) * alignment, 0
    for tensor in sorted(tensors.values(), key=lambda tensor: tensor.offset):
        name = quoted(tensor.name)
        if tensor.offset % alignment:
            raise reader.wrong(
                f"{name} lies at {tensor.offset:,}, not at a multiple of {alignment}"
            )
        if tensor.offset < end:
            raise reader.wrong(f"{name} at {tensor.offset:,} overlaps the tensor before it")
        end = tensor.offset + tensor.n_bytes()
        if data + end > reader.size:
            raise reader.wrong(f"{name} ends at {data + end:,}, the file at {reader.size:,}")
    return {name: replace(tensor, offset=data + tensor.offset) for name, tensor in tensors.items()}


def _tensor(reader: _Reader, file: MappedFile) -> StoredTensor:
    """The next tensor of the header; its offset is that from the first."""
    name = reader.string("a tensor's name", MAX_NAME)
    n_dims = reader.number("I", f"the dimensions of {quoted(name)}")
    if not 1 <= n_dims <= 4:
        raise reader.wrong(f"{quoted(name)} has {n_dims} dimensions")
    shape = tuple(reader.number("Q", f"the shape of {quoted(name)}") for _ in range(n_dims))[::-1]
    if not all(0 < side < 1 << 48 for side in shape):
        raise reader.wrong(f"{quoted(name)} has the shape {shape}")
    number, offset = reader.number("I", f"{quoted(name)}"), reader.number("Q", f"{quoted(name)}")
    if number not in (*PLAIN, *_QUANTISED):
        known = [kind.name for kind in GGMLQuantizationType if kind == number]
        raise reader.wrong(
            f"{quoted(name)} is stored as {(known or [number])[0]}, which is not read"
        )
    kind = GGMLQuantizationType(number)
    block = GGML_QUANT_SIZES[kind][0]
    if shape[-1] % block:
        raise reader.wrong(
            f"{quoted(name)} has rows of {shape[-1]}, and {kind.name} blocks of {block}"
        )
    if kind in PLAIN:
        return StoredTensor(name, shape, PLAIN[kind], offset, file)
    return StoredTensor(name, shape, None, offset, file, kind)
