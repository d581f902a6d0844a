"""The learning rate as a pure function of the step."""

from __future__ import annotations

import math

from nanogpt_surgery.training.settings import FitSettings


def learning_rate(step: int, settings: FitSettings) -> float:
    """The rate of step `step`, the first being 0: a linear rise, then a cosine to its end.

    The cosine is SGDR's, arXiv:1608.03983.
    """
    warmup = min(settings.warmup_steps, settings.max_steps // 10)
    if step < warmup:
        return settings.learning_rate * (step + 1) / (warmup + 1)
    span = max(1, settings.max_steps - 1 - warmup)
    progress = min(1.0, (step - warmup) / span)
    share = 0.5 * (1 + math.cos(math.pi * progress))
    floor = settings.final_learning_rate
    return settings.learning_rate * (floor + (1 - floor) * share)
