"""A step of a training: what it did, and the ways to compute it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from torch import Tensor

    from nanogpt_surgery.data.gpt_dataset import Batch


@dataclass(frozen=True)
class Step:
    """The record of one optimizer step."""

    step: int
    """steps done so far, this one included"""
    loss: float
    """mean over the step's tokens before its update, in nats a token"""
    learning_rate: float
    gradient_norm: float
    """before clipping"""
    tokens: int
    """in the step's windows or rows, those that are not trained on included"""
    seconds: float
    """wall time of the step, its evaluation apart"""
    validation_loss: float | None = None
    """in nats a token, over `evaluate_tokens` of the validation data, after the update"""
    trained_tokens: int = 0
    """of them those whose prediction is trained on"""
    processes: int = 1
    """how many shared the step's batch"""
    skipped: bool = False
    """whether loss or gradient was not finite, so that no weight was changed"""

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain values, for a line of metrics: None for a number that is not finite.

        JSON has none such.
        """
        return {name: _finite(value) for name, value in asdict(self).items()}


def _finite(value: Any) -> Any:
    return value if not isinstance(value, float) or math.isfinite(value) else None


class Way(Protocol):
    """How steps are computed: as in fit.py, or the same, faster."""

    def batches(self, first_step: int) -> Iterator[Batch]:
        """Yields the batch of each step, or this process's share."""
        ...

    def computing(self) -> AbstractContextManager[None]:
        """The context in which a step's forward and backward passes are computed."""
        ...

    def forward_backward(self, rows: Batch, share: float) -> Tensor:
        """Adds the gradients of `share` times the mean loss over some rows; returns that loss."""
        ...
