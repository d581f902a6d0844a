"""Batches: the interface between data of every kind and training.

Legend: B rows in a batch, T tokens in a row.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol, TypeAlias

from torch import Tensor

Batch: TypeAlias = tuple[Tensor, ...]
"""Inputs and targets, (B, T) int64 each, in the host's memory: the target of a token is the next
one, or −100 where nothing is trained on. Where rows hold several documents there is a third tensor,
(B, T): numbers, the same for the tokens of one document."""


class Batches(Protocol):
    """`GPTDataset` and `InstructionDataset` are such; others with these methods serve as well."""

    block_size: int

    def __len__(self) -> int:
        """How many windows, or rows, there are."""
        ...

    def batch(
        self, step: int, batch_size: int, seed: int = 0, *, rank: int = 0, world_size: int = 1
    ) -> Batch:
        """The batch of a step: a pure function of (seed, step, rank).

        Of a batch that several processes share, each has its part, and the parts in the order of
        the ranks are the batch of one process. (Where there is one, `fit` leaves both out.)
        """
        ...

    def whole(self, batch_size: int) -> Iterator[Batch]:
        """Batches in which every target comes once, to measure a loss on."""
        ...


class Measured(Protocol):
    """Data that a loss is measured on."""

    def whole(self, batch_size: int) -> Iterator[Batch]:
        """Batches, each target at most once."""
        ...


class Thinned(Protocol):
    """Data of which every so many rows can be read without the others; all of ours is such."""

    tokens: int

    def whole(self, batch_size: int, every: int = 1) -> Iterator[Batch]:
        """Batches of the rows whose number is a multiple of `every`."""
        ...


class Spread:
    """Held-out data that is measured in part: every so many rows one, the same ones each time."""

    def __init__(self, data: Thinned, every: int):
        self.data, self.every = data, every

    def whole(self, batch_size: int) -> Iterator[Batch]:
        """Batches of the rows whose number is a multiple of `every`."""
        return self.data.whole(batch_size, self.every)


def held_out(data: Batches, most: int) -> Measured:
    """Returns what an evaluation reads: all, or about `most` tokens spread over all (0: all).

    Data that has no number of `tokens` is read whole.
    """
    some: Any = data
    tokens = getattr(data, "tokens", 0) if most else 0
    return Spread(some, -(-tokens // most)) if tokens > most else data


def documents_of(batch: Sequence[Tensor]) -> Tensor | None:
    """Which tokens of a batch belong together, (B, T); None where each row is one document."""
    return batch[2] if len(batch) > 2 else None
