"""Several sources in fixed proportions, as one stream of windows.

A group of rows holds each source in exactly its share, in an order drawn for the group, so after
every group the proportions are exact. Which source and which window a row has follows from
(seed, number of the row), and each source runs through its own windows epoch by epoch.

Legend: B windows in a batch, T tokens in a window, K rows in a group.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from fractions import Fraction
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from nanogpt_surgery.arguments import check_arguments
from nanogpt_surgery.data.gpt_dataset import Batches, GPTDataset
from nanogpt_surgery.data.shuffling import IntArray, rows_of_step, shuffled, visited
from nanogpt_surgery.errors import SurgeryError

LEAST_GROUP, MOST_SHARES = 1024, 20_000
FINEST = 10_000  # the largest denominator that a weight is rounded to


class Mixture:
    """Windows of several datasets, drawn in proportion to their weights.

    Read whole, as an evaluation does, each counts by its own size instead: the loss of a mixture is
    the mean over all of its tokens, whatever the weights.

    Args:
        sources: datasets of one `block_size`.
        weights: how often each is drawn, against the others; only their ratios matter.

    Raises:
        SurgeryError: the numbers of sources and weights, or the sizes of windows, differ; or a
            weight is not above 0, or too small beside the others.
    """

    @check_arguments
    def __init__(self, sources: Sequence[GPTDataset], weights: Sequence[float]):
        self.sources = list(sources)
        self.block_size = _one_block_size(self.sources)
        shares = whole_shares(weights, len(self.sources))
        groups = math.ceil(LEAST_GROUP / sum(shares))
        self.counts = [groups * share for share in shares]  # rows of each source in a group
        self._group = lru_cache(maxsize=8)(self._draw)

    def __len__(self) -> int:
        return sum(map(len, self.sources))

    def with_stride(self, stride: int) -> Mixture:
        """The same proportions of windows that begin every `stride` ids."""
        return Mixture([source.with_stride(stride) for source in self.sources], self.counts)

    def passes(self, rows: int) -> list[float]:
        """How often a training of so many rows reads each source's tokens: its epochs."""
        share = rows / sum(self.counts)
        pairs = zip(self.counts, self.sources, strict=True)
        return [share * count / rows_in_epoch(source) for count, source in pairs]

    def batch(
        self, step: int, batch_size: int, seed: int = 0, *, rank: int = 0, world_size: int = 1
    ) -> tuple[Tensor, Tensor]:
        """The batch of a step, (B, T) inputs and targets: a pure function of (seed, step, rank).

        Raises:
            SurgeryError: the batch cannot be shared evenly by the processes.
        """
        sources, places = self.drawn(rows_of_step(step, batch_size, rank, world_size), seed)  # (B,)
        windows = np.empty((len(sources), self.block_size + 1), np.int64)
        for index, source in enumerate(self.sources):
            mine = sources == index
            windows[mine] = source.gather(places[mine])
        ids = torch.from_numpy(windows)
        return ids[:, :-1], ids[:, 1:]

    @property
    def tokens(self) -> int:
        """How many targets `iter_all` has."""
        return sum(source.tokens for source in self.sources)

    def iter_all(self, batch_size: int, every: int = 1) -> Iterator[tuple[Tensor, Tensor]]:
        """Each source whole, or every so many of its windows, whatever its weight."""
        for source in self.sources:
            yield from source.iter_all(batch_size, every)

    def drawn(self, rows: range, seed: int) -> tuple[IntArray, IntArray]:
        """Which source each row comes from, and which of its windows it is: (B,), (B,)."""
        size = sum(self.counts)
        first = rows.start // size
        groups = [self._group(i, seed) for i in range(first, (rows.stop - 1) // size + 1)]
        start = rows.start - first * size
        part = slice(start, start + len(rows))
        return (
            np.concatenate([sources for sources, _ in groups])[part],
            np.concatenate([places for _, places in groups])[part],
        )

    def _draw(self, number: int, seed: int) -> tuple[IntArray, IntArray]:
        """The sources and windows of a group's rows, (K,) each."""
        size = sum(self.counts)
        order = shuffled(np.arange(size), size, np.full(size, number + seed * 1_000_003))
        sources = np.searchsorted(np.cumsum(self.counts), order, side="right")
        places = np.empty(size, np.int64)
        for index, (source, count) in enumerate(zip(self.sources, self.counts, strict=True)):
            rows = range(number * count, (number + 1) * count)
            places[sources == index] = visited(rows, len(source), seed + index)
        return sources, places


def passes(dataset: Batches, rows: int) -> list[float]:
    """How often a training of so many rows reads what there is, for each source: its epochs."""
    if isinstance(dataset, Mixture):
        return dataset.passes(rows)
    return [rows / rows_in_epoch(dataset)]


def rows_in_epoch(dataset: Batches) -> float:
    """How many rows a training reads in one epoch: as many tokens of text as there are, or rows."""
    if isinstance(dataset, Mixture):
        return sum(rows_in_epoch(source) for source in dataset.sources)
    if isinstance(dataset, GPTDataset):
        return (len(dataset.ids) - 1) / dataset.block_size
    return len(dataset)


def whole_shares(weights: Sequence[float], sources: int) -> list[int]:
    """The smallest whole numbers in the proportion of the weights.

    Raises:
        SurgeryError: see `Mixture`.
    """
    if len(weights) != sources:
        raise SurgeryError(
            f"{sources} sources have {len(weights)} weights", "give one weight for each source"
        )
    bad = [w for w in weights if not (math.isfinite(w) and w > 0)]
    if bad:
        raise SurgeryError(f"a weight of {bad[0]} draws nothing", "give weights above 0")
    exact = [Fraction(w).limit_denominator(FINEST) for w in weights]
    common = math.lcm(*(part.denominator for part in exact))
    whole = [int(part * common) for part in exact]
    shares = [number // (math.gcd(*whole) or 1) for number in whole]
    if 0 in shares or sum(shares) > MOST_SHARES:
        raise SurgeryError(
            f"the weights {', '.join(f'{w:g}' for w in weights)} lie too far apart, or are too "
            f"fine: no group of {MOST_SHARES:,} rows has them exactly",
            "round them, as in 3:1",
        )
    return shares


def _one_block_size(sources: Sequence[GPTDataset]) -> int:
    sizes = sorted({source.block_size for source in sources})
    if len(sizes) != 1:
        found = f"windows of {', '.join(map(str, sizes))} tokens" if sizes else "no source at all"
        raise SurgeryError(f"a mixture needs sources of one block_size; there are {found}")
    return sizes[0]
