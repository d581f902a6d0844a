"""What a training asks of its data, of whatever kind it is.

Legend: B rows in a batch, T tokens in a row.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
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


def documents_of(batch: Sequence[Tensor]) -> Tensor | None:
    """Which tokens of a batch belong together, (B, T); None where each row is one document."""
    return batch[2] if len(batch) > 2 else None
