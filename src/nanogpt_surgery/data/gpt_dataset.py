"""Windows of a text, and batches of them.

A text of N ids holds a window at each of its ids but the last T; input and target overlap in all
but one id:

    ids      7  3  9  4  1  8  …
    input    7  3  9  4            window 0, T = 4
    target      3  9  4  1         the next id of each

Legend: N ids in the text, B rows in a batch, T tokens in a row.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Protocol, TypeAlias

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from nanogpt_surgery.data.shuffling import Ids, rows_of_step, visited
from nanogpt_surgery.errors import SurgeryError
from nanogpt_surgery.values import check_arguments

if TYPE_CHECKING:
    from nanogpt_surgery.data.tokenizers.tokenizer import Tokenizer

Batch: TypeAlias = tuple[Tensor, ...]
"""Inputs and targets, (B, T) int64 each, in the host's memory: the target of a token is the next
one, or −100 where nothing is trained on. Where rows hold several documents there is a third tensor,
(B, T): numbers, the same for the tokens of one document."""


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

    fingerprint: str | None = None

    @check_arguments
    def __init__(self, text: str, tokenizer: Tokenizer, block_size: int, stride: int = 1):
        encode = getattr(tokenizer, "encode_to_numpy", tokenizer.encode)
        ids = np.asarray(encode(text)).astype(np.int32, copy=False)  # (N,)
        self._set_ids(torch.from_numpy(ids), block_size, stride)

    @classmethod
    def from_ids(
        cls, ids: Tensor, block_size: int, stride: int = 1, fingerprint: str | None = None
    ) -> GPTDataset:
        """Returns the windows of ids (N,) that a tokenizer has made already; of any integer dtype.

        A `fingerprint` that is known of ids in a file saves reading them all.
        """
        dataset = cls.__new__(cls)
        dataset._set_ids(ids, block_size, stride)
        dataset.fingerprint = fingerprint
        return dataset

    def with_stride(self, stride: int) -> GPTDataset:
        """Returns the windows of the same ids that begin every `stride` of them."""
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
        self.stride = min(stride, len(ids))  # from there on there is one window

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
        """Returns the batch of a step, (B, T) inputs and targets, as `Batches.batch` says.

        Batches run through all windows in an order drawn for each epoch, so every window is seen
        once before any is seen again, and there is nothing to fast-forward when a run resumes.

        Raises:
            SurgeryError: the batch cannot be shared evenly.
        """
        indices = self.indices(step, batch_size, seed, rank=rank, world_size=world_size)
        windows = torch.from_numpy(self.gather(indices))  # (B, T + 1)
        return windows[:, :-1], windows[:, 1:]

    def indices(
        self, step: int, batch_size: int, seed: int = 0, *, rank: int = 0, world_size: int = 1
    ) -> Ids:
        """Returns which windows make the batch of a step, (B,), as `batch` takes them."""
        return visited(rows_of_step(step, batch_size, rank, world_size), len(self), seed)

    def gather(self, indices: Ids) -> Ids:
        """Returns several windows, each with its last target: indices (B,) → (B, T + 1)."""
        places = indices[:, None] * self.stride + np.arange(self.block_size + 1)  # (B, T + 1)
        # Where the ids lie in a file, only these are read of it.
        return self.ids.numpy()[places].astype(np.int64)

    @property
    def tokens(self) -> int:
        """How many targets `iter_all` has."""
        return len(self.ids) - 1

    def iter_all(self, batch_size: int, every: int = 1) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields windows side by side, the last one shorter: every id but the first once.

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

        Of a batch that several processes share, each has its part, and the parts in the order of
        the ranks are the batch of one process. (Where there is one, `fit` leaves both out.)
        """
        ...

    def iter_all(self, batch_size: int) -> Iterator[Batch]:
        """Yields batches in which every target comes once, to measure a loss on."""
        ...


def documents_of(batch: Sequence[Tensor]) -> Tensor | None:
    """Returns which tokens of a batch belong together, (B, T); None if each row is one document."""
    return batch[2] if len(batch) > 2 else None
