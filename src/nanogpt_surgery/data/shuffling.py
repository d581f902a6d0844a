"""The order in which a training visits windows or rows: a pure function of (seed, place).

Nothing of the size of the data is ever built, and there is nothing to fast-forward when a training
goes on.

Legend: B rows in a batch.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from nanogpt_surgery.errors import SurgeryError

IntArray: TypeAlias = NDArray[np.int64]

_ORDERED = 2048  # rows whose windows are worked out at a time


def rows_of_step(step: int, batch_size: int, rank: int = 0, world_size: int = 1) -> range:
    """Returns the rows that a process has in a step, in a training's endless list of rows.

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


def visited(rows: range, length: int, seed: int) -> IntArray:
    """Returns which of `length` windows each row has, (B,) int64.

    Epoch follows epoch, each in its own order. Orders are worked out for many rows at a time and
    remembered, which changes no number.
    """
    first = rows.start // _ORDERED
    parts = [_order(i, length, seed) for i in range(first, (rows.stop - 1) // _ORDERED + 1)]
    start = rows.start - first * _ORDERED
    return np.concatenate(parts)[start : start + len(rows)]


@lru_cache(maxsize=64)
def _order(part: int, length: int, seed: int) -> IntArray:
    places = np.arange(part * _ORDERED, (part + 1) * _ORDERED)
    epochs, places = np.divmod(places, length)
    return shuffled(places, length, epochs + seed * 1_000_003)


def shuffled(places: IntArray, length: int, keys: IntArray) -> IntArray:
    """Returns where each place of 0 … `length` − 1 goes in a random order, which its key names.

    A Feistel network of four rounds is a bijection on the next power of four; a result beyond
    `length` is sent through again until it falls inside (cycle walking; Black and Rogaway, 2002).
    Nothing of size `length` is ever built. Shapes (B,), (B,) → (B,), int64.
    """
    half_bits = max(1, ((length - 1).bit_length() + 1) // 2)
    result = _feistel(places, keys, half_bits)
    while (outside := np.flatnonzero(result >= length)).size:
        result[outside] = _feistel(result[outside], keys[outside], half_bits)
    return result


def _feistel(places: IntArray, keys: IntArray, half_bits: int, rounds: int = 4) -> IntArray:
    mask = (1 << half_bits) - 1
    left, right = places >> half_bits, places & mask
    for i in range(rounds):
        left, right = right, left ^ (_mix(right + _mix(keys * rounds + i)) & mask)
    return (left << half_bits) | right


def _mix(x: IntArray) -> IntArray:
    """Returns a well-mixed 31-bit number for each number: multiply and fold, twice."""
    x = (x & 0x7FFFFFFF) * 0x45D9F3B
    x = ((x >> 16) ^ x) & 0x7FFFFFFF
    x = x * 0x45D9F3B
    return ((x >> 16) ^ x) & 0x7FFFFFFF
