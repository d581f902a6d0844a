"""When to stop because nothing is gained any more."""

from __future__ import annotations

from collections.abc import Iterable


class EarlyStopping:
    """Counts the evaluations since the best one.

    Args:
        patience: how many in a row without improvement are enough; 0 for no number.
        losses: of the evaluations so far, so that a resumed run goes on counting.
    """

    def __init__(self, patience: int, losses: Iterable[float] = ()):
        self.patience = patience
        self.best = float("inf")
        self.without_improvement = 0
        for loss in losses:
            self.add(loss)

    def add(self, loss: float) -> None:
        """Count an evaluation; a loss that is no number is no improvement."""
        if loss < self.best:
            self.best, self.without_improvement = loss, 0
        else:
            self.without_improvement += 1

    @property
    def enough(self) -> bool:
        """Whether to stop."""
        return 0 < self.patience <= self.without_improvement
