"""Tensors whose numbers are packed in few bits, as they lie in a GGUF file."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize
from torch import Tensor

from nanogpt_surgery.formats.stored_tensor import PIECE, MappedFile


@dataclass(frozen=True)
class QuantisedTensor:
    """A tensor of whole numbers and their scales, in blocks along its rows."""

    name: str
    shape: tuple[int, ...]
    offset: int
    file: MappedFile
    kind: GGMLQuantizationType
    dtype: None = None

    def mapped(self) -> Tensor | None:
        """It never lies there as numbers that can be used."""
        return None

    def pieces(self) -> Iterator[tuple[int, Tensor]]:
        """Parts of about `PIECE` numbers, float32, read and dequantised one after the other."""
        width = math.prod(self.shape[1:])
        row = n_bytes(width, self.kind)
        rows = max(1, PIECE // width)
        with self.file.path.open("rb") as file:
            file.seek(self.offset)
            for start in range(0, self.shape[0], rows):
                count = min(rows, self.shape[0] - start)
                data = np.fromfile(file, np.uint8, count * row).reshape(count, row)
                with np.errstate(all="ignore"):  # a damaged scale may be infinite
                    numbers = dequantize(data, self.kind)
                yield start, torch.from_numpy(numbers).view(count, *self.shape[1:])


def n_bytes(numbers: int, kind: GGMLQuantizationType) -> int:
    """How many bytes a row of so many numbers takes."""
    block, size = GGML_QUANT_SIZES[kind]
    return numbers // block * size
