"""Windows of a text, and which of them make a batch.

Legend: N ids in the text, B windows in a batch, T tokens in a window.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from nanogpt_surgery.data.tokenizers.tokenizer import Tokenizer, encode_text
from nanogpt_surgery.errors import SurgeryError

Ids: TypeAlias = NDArray[np.int64]

_ORDERED = 2048  # rows whose windows are worked out at a time


class GPTDataset(Dataset[tuple[Tensor, Tensor]]):
    """Overlapping windows of (input, target) ids, the target shifted by one.

    Args:
        text: what is cut into windows.
        tokenizer: turns it into ids.
        block_size: tokens in a window, T.
        stride: ids from the start of one window to the start of the next.

    Raises:
        SurgeryError: the text is shorter than one window and its last target.
    """

    fingerprint: str | None = None

    def __init__(self, text: str, tokenizer: Tokenizer, block_size: int, stride: int = 1):
        self._set_ids(encode_text(tokenizer, text), block_size, stride)

    @classmethod
    def from_ids(
        cls, ids: Tensor, block_size: int, stride: int = 1, fingerprint: str | None = None
    ) -> GPTDataset:
        """The windows of ids (N,) that a tokenizer has made already; integers of any width.

        A `fingerprint` that is known of ids in a file saves reading them all.
        """
        dataset = cls.__new__(cls)
        dataset._set_ids(ids, block_size, stride)
        dataset.fingerprint = fingerprint
        return dataset

    def with_stride(self, stride: int) -> GPTDataset:
        """The windows of the same ids that begin every `stride` of them."""
        return GPTDataset.from_ids(self.ids, self.block_size, stride, self.fingerprint)

    def _set_ids(self, ids: Tensor, block_size: int, stride: int) -> None:
        if block_size < 1 or stride < 1:
            raise SurgeryError(f"block_size {block_size} and stride {stride} must be at least 1")
        if len(ids) <= block_size:
            raise SurgeryError(
                f"the text has {len(ids)} tokens; a window of block_size {block_size} and its "
                f"last target need {block_size + 1}",
                "give a longer text or a smaller block_size",
            )
        self.ids = ids.contiguous()
        self.block_size = block_size
        self.stride = stride

    def __len__(self) -> int:
        return (len(self.ids) - self.block_size - 1) // self.stride + 1

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """Window `index`: input and target, (T,) int64 each."""
        if not -len(self) <= index < len(self):
            raise IndexError(f"window {index} of {len(self)}")
        start = index % len(self) * self.stride
        window = self.ids[start : start + self.block_size + 1].long()  # (T + 1,)
        return window[:-1], window[1:]

    def windows(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Several windows in one gather: indices (B,) → inputs and targets, (B, T) int64 each."""
        windows = torch.from_numpy(self.gather(indices.numpy()))
        return windows[:, :-1], windows[:, 1:]

    def gather(self, indices: Ids) -> Ids:
        """Several windows, each with its last target: indices (B,) → (B, T + 1)."""
        ids = self.ids.numpy()  # where the ids lie in a file, only these windows are read of it
        strides = (self.stride * ids.itemsize, ids.itemsize)
        shape = (len(self), self.block_size + 1)
        overlapping = np.ndarray(shape, ids.dtype, ids, strides=strides)  # no copy
        return overlapping[indices].astype(np.int64)

    def batch(
        self, step: int, batch_size: int, seed: int = 0, *, rank: int = 0, world_size: int = 1
    ) -> tuple[Tensor, Tensor]:
        """The batch of a step, (B, T) inputs and targets: a pure function of (seed, step, rank).

        Batches run through all windows in an order drawn for each epoch, so every window is seen
        once before any is seen again, and there is nothing to fast-forward when a run resumes.
        Of a batch that `world_size` processes share, each has its part, and the parts in the order
        of the ranks are the batch of one process.

        Raises:
            SurgeryError: the batch cannot be shared evenly.
        """
        return self.windows(self.rows_of(step, batch_size, seed, rank=rank, world_size=world_size))

    def rows_of(
        self, step: int, batch_size: int, seed: int = 0, *, rank: int = 0, world_size: int = 1
    ) -> Tensor:
        """Which windows make the batch of a step, (B,), as `batch` takes them."""
        rows = rows_of(step, batch_size, rank, world_size)
        return torch.from_numpy(visited(rows, len(self), seed))

    @property
    def tokens(self) -> int:
        """How many targets `whole` has."""
        return len(self.ids) - 1

    def whole(self, batch_size: int, every: int = 1) -> Iterator[tuple[Tensor, Tensor]]:
        """Windows side by side, the last one shorter: each token but the first is a target once.

        With `every` above 1 only each so many windows one, the first among them.
        """
        length = self.block_size
        rows = (len(self.ids) - 1) // length
        full = rows * length
        inputs, targets = self.ids[:full].view(-1, length), self.ids[1 : full + 1].view(-1, length)
        pairs = (part[::every].split(batch_size) for part in (inputs, targets))  # nothing is read
        for x, y in zip(*pairs, strict=True):
            yield x.long(), y.long()
        if full < len(self.ids) - 1 and rows % every == 0:
            yield self.ids[None, full:-1].long(), self.ids[None, full + 1 :].long()


def rows_of(step: int, batch_size: int, rank: int = 0, world_size: int = 1) -> range:
    """The numbers of the rows that a process has in a step, in a training's endless list of rows.

    Raises:
        SurgeryError: the batch cannot be shared evenly.
    """
    if batch_size % world_size:
        raise SurgeryError(
            f"a batch of {batch_size} windows cannot be shared evenly by {world_size} processes",
            f"give a batch_size that is a multiple of {world_size}",
        )
    share = batch_size // world_size
    first = step * batch_size + rank * share
    return range(first, first + share)


def visited(rows: range, length: int, seed: int) -> Ids:
    """Which of `length` windows each row has: (B,) int64. Epoch follows epoch, each in its order.

    Orders are worked out for many rows at a time and remembered, which changes no number.
    """
    first = rows.start // _ORDERED
    parts = [_order(i, length, seed) for i in range(first, (rows.stop - 1) // _ORDERED + 1)]
    start = rows.start - first * _ORDERED
    return np.concatenate(parts)[start : start + len(rows)]


@lru_cache(maxsize=64)
def _order(part: int, length: int, seed: int) -> Ids:
    places = np.arange(part * _ORDERED, (part + 1) * _ORDERED)
    epochs, places = np.divmod(places, length)
    return shuffled(places, length, epochs + seed * 1_000_003)


def shuffled(places: Ids, length: int, keys: Ids) -> Ids:
    """Where each place of 0 … `length` − 1 goes in a random order of them all; keys name the order.

    A Feistel network of four rounds is a bijection on the next power of four; a result beyond
    `length` is sent through again until it falls inside (cycle walking; Black and Rogaway, 2002).
    Nothing of size `length` is ever built. Shapes (B,), (B,) → (B,), int64.
    """
    half_bits = max(1, ((length - 1).bit_length() + 1) // 2)
    result = _feistel(places, keys, half_bits)
    while (outside := np.flatnonzero(result >= length)).size:
        result[outside] = _feistel(result[outside], keys[outside], half_bits)
    return result


def _feistel(places: Ids, keys: Ids, half_bits: int, rounds: int = 4) -> Ids:
    mask = (1 << half_bits) - 1
    left, right = places >> half_bits, places & mask
    for i in range(rounds):
        left, right = right, left ^ (_mix(right + _mix(keys * rounds + i)) & mask)
    return (left << half_bits) | right


def _mix(x: Ids) -> Ids:
    """A well-mixed 31-bit number for each number: multiply and fold, twice."""
    x = (x & 0x7FFFFFFF) * 0x45D9F3B
    x = ((x >> 16) ^ x) & 0x7FFFFFFF
    x = x * 0x45D9F3B
    return ((x >> 16) ^ x) & 0x7FFFFFFF
