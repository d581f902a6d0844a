"""What a training asks of its data, of whatever kind it is.

Legend: B rows in a batch, T tokens in a row.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Protocol, TypeAlias

from torch import Tensor

Batch: TypeAlias = tuple[Tensor, ...]
"""Inputs and targets, (B, T) int64 each: the target of a token is the next one, or −100 where
nothing is trained on. Where rows hold several documents there is a third tensor, (B, T): numbers,
the same for the tokens of one document."""


class Batches(Protocol):
    """`GPTDataset` and `InstructionDataset` are such; others with these methods serve as well."""

    block_size: int

    def __len__(self) -> int:
        """How many windows, or rows, there are."""
        ...

    def batch(self, step: int, batch_size: int, seed: int = 0) -> Batch:
        """The batch of a step: a pure function of (seed, step)."""
        ...

    def whole(self, batch_size: int) -> Iterator[Batch]:
        """Batches in which every target comes once, to measure a loss on."""
        ...


class Measured(Protocol):
    """What a loss is measured on."""

    def whole(self, batch_size: int) -> Iterator[Batch]:
        """Batches, each target at most once."""
        ...


class Spread:
    """Held-out data that is measured in part: every so many rows some, the same ones each time.

    Args:
        data: of which a part is read.
        share: one group of rows in so many.
    """

    ROWS = 16

    def __init__(self, data: Batches, share: int):
        self.data, self.share, self.block_size = data, share, data.block_size

    def whole(self, batch_size: int) -> Iterator[Batch]:
        """Groups of at most `ROWS` rows, the first of each `share` of them."""
        return islice(self.data.whole(min(batch_size, self.ROWS)), 0, None, self.share)


def held_out(data: Batches, most: int) -> Measured:
    """What an evaluation reads: all, or about `most` tokens spread over all (0: all)."""
    tokens = sum(batch[1].numel() for batch in data.whole(1024)) if most else 0
    return Spread(data, -(-tokens // most)) if tokens > most else data


def documents_of(batch: Sequence[Tensor]) -> Tensor | None:
    """Which tokens of a batch belong together, (B, T); None where each row is one document."""
    return batch[2] if len(batch) > 2 else None
