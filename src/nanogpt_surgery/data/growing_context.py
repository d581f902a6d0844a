"""Short windows first: what is near is learned first, and costs less attention.

Legend: B windows in a batch, T tokens in the longest window.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from nanogpt_surgery.data.batches import Batch, Batches
from nanogpt_surgery.data.gpt_dataset import GPTDataset
from nanogpt_surgery.data.mixture import Mixture

SHARES = (4, 2, 1)  # of the block, one after the other


class GrowingContext:
    """One dataset after the other over a training, each for an equal share of its steps.

    Every batch has as many tokens: B windows of T, 2 B of T / 2, 4 B of T / 4.

    Args:
        datasets: the same text in windows of growing length; each length divides the last.
        max_steps: of the training, which the lengths are spread over.
    """

    def __init__(self, datasets: Sequence[Batches], max_steps: int):
        self.datasets, self.max_steps = datasets, max_steps
        self.block_size = datasets[-1].block_size
        for dataset in datasets:
            assert self.block_size % dataset.block_size == 0, "no whole number of windows fits"

    def __len__(self) -> int:
        return len(self.datasets[-1])

    def batch(self, step: int, batch_size: int, seed: int = 0) -> Batch:
        """The batch of a step: a pure function of (seed, step)."""
        stage = min(step * len(self.datasets) // self.max_steps, len(self.datasets) - 1)
        dataset = self.datasets[stage]
        return dataset.batch(step, batch_size * (self.block_size // dataset.block_size), seed)

    def whole(self, batch_size: int) -> Iterator[Batch]:
        """The text in its longest windows."""
        return self.datasets[-1].whole(batch_size)


def growing(dataset: GPTDataset | Mixture, max_steps: int) -> GrowingContext:
    """Windows of a quarter, of half and of the whole length, where that gives whole numbers."""
    lengths = [dataset.block_size // n for n in SHARES if dataset.block_size % n == 0]
    return GrowingContext([dataset.resized(length) for length in lengths], max_steps)
