"""Tensors that lie in a file and have not been read: their name, shape and type are known.

A tensor is either mapped, so that its bytes are those of the file and are read when they are used,
or read in pieces, each converted before the next is read. Neither holds the weights twice.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

PIECE = 1 << 20  # numbers read at once


class Stored(Protocol):
    """A tensor in a file, whatever the file's format."""

    @property
    def name(self) -> str:
        """As the file calls it."""
        ...

    @property
    def shape(self) -> tuple[int, ...]:
        """In the file's orientation."""
        ...

    @property
    def dtype(self) -> torch.dtype | None:
        """The dtype that its numbers are stored in; None if they are quantised."""
        ...

    def mapped(self) -> Tensor | None:
        """The tensor as it lies in the file, if it can be used as it lies there."""
        ...

    def pieces(self) -> Iterator[tuple[int, Tensor]]:
        """Parts along the first dimension, each with the index of its first row."""
        ...


@dataclass(frozen=True)
class PlainTensor:
    """A tensor whose numbers lie one after the other in a file.

    Several tensors of one file share `map`, which is made when the first of them needs it. The map
    is private: writing to a tensor does not write to the file. A file that is replaced, as every
    writer here does, stays as it was for those who have mapped it.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    offset: int
    file: MappedFile

    @property
    def n_numbers(self) -> int:
        """How many numbers it has."""
        return math.prod(self.shape)

    @property
    def aligned(self) -> bool:
        """Whether it lies at a multiple of its numbers' size."""
        return self.offset % self.dtype.itemsize == 0

    def mapped(self) -> Tensor | None:
        """The tensor as a part of the mapped file, unless it lies across its numbers' bounds."""
        size = self.n_numbers * self.dtype.itemsize
        if not self.aligned or not size:
            return None
        return self.file.map()[self.offset : self.offset + size].view(self.dtype).view(self.shape)

    def read(self) -> Tensor:
        """The tensor, mapped where it can be, or else a copy."""
        mapped = self.mapped()
        if mapped is not None:
            return mapped
        size = self.n_numbers * self.dtype.itemsize
        copy = self.file.map()[self.offset : self.offset + size].clone()
        return copy.view(self.dtype).view(self.shape)

    def pieces(self) -> Iterator[tuple[int, Tensor]]:
        """Parts of about `PIECE` numbers, read one after the other."""
        if not self.n_numbers:
            return
        width = math.prod(self.shape[1:])
        rows = max(1, PIECE // width)
        with self.file.path.open("rb") as file:
            file.seek(self.offset)
            for start in range(0, self.shape[0], rows):
                count = min(rows, self.shape[0] - start)
                data = np.fromfile(file, np.uint8, count * width * self.dtype.itemsize)
                piece = torch.from_numpy(data).view(self.dtype)
                yield start, piece.view(count, *self.shape[1:])


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
