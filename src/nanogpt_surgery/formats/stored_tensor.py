"""Tensors that lie in a file and have not been read: their name, shape and type are known.

A tensor is either mapped, so that its bytes are those of the file and are read when they are used,
or read in pieces, each converted before the next is read. Neither holds the weights twice.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

if TYPE_CHECKING:
    from gguf import GGMLQuantizationType

PIECE = 1 << 20  # numbers read at once


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a safetensors or GGUF file, whose numbers lie one after the other.

    Several tensors of one file share its map, which is made when the first of them needs it. The
    map is private: writing to a tensor does not write to the file. A file that is replaced, as
    every writer here does, stays as it was for those who have mapped it.

    Attributes:
        name: as the file calls it.
        shape: in the file's orientation.
        dtype: that its numbers are stored in; None if they are quantised.
        offset: in the file, in bytes.
        file: that it lies in.
        quantised: how its numbers are packed in few bits, in blocks along its rows; else None.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype | None
    offset: int
    file: MappedFile
    quantised: GGMLQuantizationType | None = None

    @property
    def n_numbers(self) -> int:
        """How many numbers it has."""
        return math.prod(self.shape)

    def n_bytes(self, rows: int | None = None) -> int:
        """How many bytes it takes, or so many of its rows."""
        numbers = self.n_numbers if rows is None else rows * math.prod(self.shape[1:])
        if self.dtype is not None:
            return numbers * self.dtype.itemsize
        from gguf import GGML_QUANT_SIZES  # takes a quarter of a second, and few files need it

        assert self.quantised is not None
        block, size = GGML_QUANT_SIZES[self.quantised]
        return numbers // block * size

    def mapped(self) -> Tensor | None:
        """The tensor as a part of the mapped file, where it can be used as it lies there."""
        if self.dtype is None or self.offset % self.dtype.itemsize:
            return None
        return self._bytes().view(self.dtype).view(self.shape)

    def read(self) -> Tensor:
        """The tensor, mapped where it can be, or else a copy."""
        mapped = self.mapped()
        if mapped is not None:
            return mapped
        return self._numbers(self._bytes().clone().numpy()).view(self.shape)

    def _bytes(self) -> Tensor:
        return self.file.map()[self.offset : self.offset + self.n_bytes()]

    def pieces(self) -> Iterator[tuple[int, Tensor]]:
        """Parts of about `PIECE` numbers, each with the index of its first row; read in turn.

        Numbers that are quantised become float32.
        """
        if not self.n_numbers:
            return
        rows = max(1, PIECE * self.shape[0] // self.n_numbers)
        with self.file.path.open("rb") as file:
            file.seek(self.offset)
            for start in range(0, self.shape[0], rows):
                count = min(rows, self.shape[0] - start)
                data = np.fromfile(file, np.uint8, self.n_bytes(count))
                yield start, self._numbers(data.reshape(count, -1)).view(count, *self.shape[1:])

    def _numbers(self, data: NDArray[Any]) -> Tensor:
        if self.dtype is not None:
            return torch.from_numpy(data).view(self.dtype)
        from gguf.quants import dequantize

        assert self.quantised is not None
        with np.errstate(all="ignore"):  # a damaged scale may be infinite
            return torch.from_numpy(dequantize(data, self.quantised))


class MappedFile:
    """A file that is mapped into memory once, when first asked."""

    def __init__(self, path: Path, size: int):
        self.path = path
        self.size = size
        self._map: Tensor | None = None

    def map(self) -> Tensor:
        """Its bytes, (size,) uint8."""
        if self._map is None:
            self._map = torch.from_file(
                str(self.path), shared=False, size=self.size, dtype=torch.uint8
            )
        return self._map
