"""Windows of a text, and which of them make a batch.

Legend: N ids in the text, B windows in a batch, T tokens in a window.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from nanogpt_surgery.data.tokenizer import Tokenizer, encode_text
from nanogpt_surgery.errors import SurgeryError

Ids: TypeAlias = NDArray[np.int64]


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

    def __init__(self, text: str, tokenizer: Tokenizer, block_size: int, stride: int = 1):
        self._set_ids(encode_text(tokenizer, text), block_size, stride)

    @classmethod
    def from_ids(cls, ids: Tensor, block_size: int, stride: int = 1) -> GPTDataset:
        """The windows of ids (N,) that a tokenizer has made already; integers of any width."""
        dataset = cls.__new__(cls)
        dataset._set_ids(ids, block_size, stride)
        return dataset

    def _set_ids(self, ids: Tensor, block_size: int, stride: int) -> None:
        if block_size < 1 or stride < 1:
            raise SurgeryError(f"block_size {block_size} and stride {stride} must be at least 1")
        if len(ids) <= block_size:
            raise SurgeryError(
                f"the text has {len(ids)} tokens; a window of block_size {block_size} and its "
                f"last target need {block_size + 1}",
                "give a longer text or a smaller block_size",
            )
        self.ids = ids
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
        places = indices[:, None] * self.stride + torch.arange(self.block_size + 1)  # (B, T + 1)
        windows = self.ids[places].long()
        return windows[:, :-1], windows[:, 1:]

    def batch(self, step: int, batch_size: int, seed: int = 0) -> tuple[Tensor, Tensor]:
        """The batch of a step, (B, T) inputs and targets: a pure function of (seed, step).

        Batches run through all windows in an order drawn for each epoch, so every window is seen
        once before any is seen again, and there is nothing to fast-forward when a run resumes.
        """
        places = np.arange(step * batch_size, (step + 1) * batch_size)
        epochs, places = np.divmod(places, len(self))
        return self.windows(
            torch.from_numpy(shuffled(places, len(self), epochs + seed * 1_000_003))
        )

    def whole(self, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Windows side by side, the last one shorter: each token but the first is a target once."""
        length = self.block_size
        full = (len(self.ids) - 1) // length * length
        inputs, targets = self.ids[:full].view(-1, length), self.ids[1 : full + 1].view(-1, length)
        for x, y in zip(inputs.split(batch_size), targets.split(batch_size), strict=True):
            yield x.long(), y.long()
        if full < len(self.ids) - 1:
            yield self.ids[None, full:-1].long(), self.ids[None, full + 1 :].long()


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
