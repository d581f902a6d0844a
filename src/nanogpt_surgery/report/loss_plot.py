"""The losses of a run as a PNG."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def plot_losses(metrics: Sequence[dict[str, Any]], goal: Path, title: str) -> None:
    """Draw training loss (faint, and smoothed) and validation loss against steps.

    Args:
        metrics: rows with `step`, `loss` and `validation_loss` (or None), losses in nats a token.
        goal: the PNG to write.
        title: above the picture.
    """
    from matplotlib.figure import Figure

    steps = [row["step"] for row in metrics]
    losses = [row["loss"] for row in metrics]
    evaluated = [row for row in metrics if row["validation_loss"] is not None]
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    axes.plot(steps, losses, color="tab:blue", alpha=0.25, linewidth=0.8)
    axes.plot(steps, list(_smoothed(losses)), color="tab:blue", label="training, smoothed")
    axes.plot(
        [row["step"] for row in evaluated],
        [row["validation_loss"] for row in evaluated],
        color="tab:orange",
        marker="o",
        label="validation",
    )
    axes.set(xlabel="step", ylabel="loss, nats a token", title=title)
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(goal, dpi=120)


def _smoothed(values: Iterable[float], keep: float = 0.95) -> Iterable[float]:
    """The running mean with exponentially fading memory, unbiased at its start (as Adam's)."""
    mean, weight = 0.0, 0.0
    for value in values:
        mean = keep * mean + (1 - keep) * value
        weight = keep * weight + 1 - keep
        yield mean / weight
