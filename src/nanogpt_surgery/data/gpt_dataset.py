"""Windows of a text, and batches of them.

A window begins at each id of a text but the last T; its input and target overlap in all but one:

    ids      7  3  9  4  1  8  …
    input    7  3  9  4            window 0, T = 4
    target      3  9  4  1         the next id of each

Training reads one window for each row of a batch, in a random order. `iter_all` reads the windows
0, T, 2T, …, which do not overlap, to measure a loss.

Legend: N ids in the text, B rows in a batch, T tokens in a row.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Protocol, TypeAlias

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from nanogpt_surgery.arguments import check_arguments
from nanogpt_surgery.data.shuffling import IntArray, rows_of_step, visited
from nanogpt_surgery.errors import SurgeryError

if TYPE_CHECKING:
    from nanogpt_surgery.data.tokenizers.tokenizer import Tokenizer

Batch: TypeAlias = tuple[Tensor, ...]
"""Inputs and targets, (B, T) int64 each, in the host's memory: the target of a token is the next
one, or −100 where nothing is trained on. Where rows hold several documents there is a third tensor,
(B, T): numbers, the same for the tokens of one document."""


def documents_of(batch: Sequence[Tensor]) -> Tensor | None:
    """Returns which tokens of a batch belong together, (B, T); None if each row is one document."""
    return batch[2] if len(batch) > 2 else None


class Batches(Protocol):
    """Data to train on: `GPTDataset`, `InstructionDataset`, or your own with these methods."""

    block_size: int

    def __len__(self) -> int:
        """Returns how many windows, or rows, there are."""
        ...

    def batch(
        self, step: int, batch_size: int, seed: int = 0, *, rank: int = 0, world_size: int = 1
    ) -> Batch:
        """Returns the batch of a step: a pure function of (seed, step, rank).

        Several processes share a batch: process `rank` of `world_size` gets its part, and the parts
        in the order of the ranks are the batch that a single process gets.
        """
        ...

    def iter_all(self, batch_size: int) -> Iterator[Batch]:
        """Yields batches in which every target comes once, to measure a loss on."""
        ...


class GPTDataset(Dataset[tuple[Tensor, Tensor]]):
    """Overlapping windows of (input, target) ids, the target shifted by one.

    Args:
        text: cut into windows.
        tokenizer: turns it into ids; anything with `encode` and `decode`. If it has
            `encode_to_numpy` too (tiktoken's name), a large text needs no Python list.
        block_size: tokens in a window, T.
        stride: ids from the start of one window to the start of the next.

    Raises:
        SurgeryError: the text is shorter than one window and its last target.
    """

    fingerprint: str | None = None  # a hash of ids that lie in a file, if it is known already

    @check_arguments
    def __init__(self, text: str, tokenizer: Tokenizer, block_size: int, stride: int = 1):
        encode = getattr(tokenizer, "encode_to_numpy", tokenizer.encode)
        ids = np.asarray(encode(text)).astype(np.int32, copy=False)  # (N,)
        self._set_ids(torch.from_numpy(ids), block_size, stride)

    @classmethod
    def from_ids(
        cls, ids: Tensor, block_size: int, stride: int = 1, fingerprint: str | None = None
    ) -> GPTDataset:
        """Returns the windows of ids (N,), of any integer dtype, that a tokenizer has made already.

        A run stores a hash of its data. Where the `fingerprint` of ids in a file is given, they
        need not all be read to compute it.
        """
        dataset = cls.__new__(cls)
        dataset._set_ids(ids, block_size, stride)
        dataset.fingerprint = fingerprint
        return dataset

    def with_stride(self, stride: int) -> GPTDataset:
        """Returns windows of the same ids, `stride` ids from one start to the next."""
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
        self.ids, self.block_size = ids.contiguous(), block_size
        self.stride = min(stride, len(ids))  # a longer one means the same: one window

    def __len__(self) -> int:
        return (len(self.ids) - self.block_size - 1) // self.stride + 1

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """Returns window `index`: input and target, (T,) int64 each."""
        if not -len(self) <= index < len(self):
            raise IndexError(f"window {index} of {len(self)}")
        start = index % len(self) * self.stride
        window = self.ids[start : start + self.block_size + 1].long()  # (T + 1,)
        return window[:-1], window[1:]

    def batch(
        self, step: int, batch_size: int, seed: int = 0, *, rank: int = 0, world_size: int = 1
    ) -> tuple[Tensor, Tensor]:
        """Returns the batch of a step, (B, T) inputs and targets; for the arguments see `Batches`.

        Each epoch has its own random order of all windows, so every window is seen once before any
        is seen again. The order is computed from (seed, step): a resumed run needs no other state.

        Raises:
            SurgeryError: the batch cannot be shared evenly.
        """
        indices = self.indices(step, batch_size, seed, rank=rank, world_size=world_size)
        windows = torch.from_numpy(self.gather(indices))  # (B, T + 1)
        return windows[:, :-1], windows[:, 1:]

    def indices(
        self, step: int, batch_size: int, seed: int = 0, *, rank: int = 0, world_size: int = 1
    ) -> IntArray:
        """Returns which windows make the batch of a step, (B,), as `batch` takes them."""
        return visited(rows_of_step(step, batch_size, rank, world_size), len(self), seed)

    def gather(self, indices: IntArray) -> IntArray:
        """Returns several windows, each with its last target: indices (B,) → (B, T + 1)."""
        places = indices[:, None] * self.stride + np.arange(self.block_size + 1)  # (B, T + 1)
        # The ids may be a memory-mapped file, of which only these are read.
        return self.ids.numpy()[places].astype(np.int64)

    @property
    def tokens(self) -> int:
        """Number of targets in `iter_all`."""
        return len(self.ids) - 1

    def iter_all(self, batch_size: int, every: int = 1) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields windows side by side, the last one shorter: all ids but the first are targets.

        With `every` n above 1 only windows 0, n, 2n, … are taken.
        """
        length = self.block_size
        rows = (len(self.ids) - 1) // length
        full = rows * length
        inputs, targets = self.ids[:full].view(-1, length), self.ids[1 : full + 1].view(-1, length)
        pairs = (part[::every].split(batch_size) for part in (inputs, targets))  # views
        for x, y in zip(*pairs, strict=True):
            yield x.long(), y.long()
        if full < len(self.ids) - 1 and rows % every == 0:
            yield self.ids[None, full:-1].long(), self.ids[None, full + 1 :].long()
