"""The learning rate as a pure function of the step."""

from __future__ import annotations

import math

from nanogpt_surgery.training.settings import FitSettings


def learning_rate(step: int, settings: FitSettings) -> float:
    """The rate of step `step`, the first being 0: a linear rise, then a cosine to its end.

    The cosine is SGDR's, arXiv:1608.03983.
    """
    if step < settings.warmup_steps:
        return settings.learning_rate * (step + 1) / (settings.warmup_steps + 1)
    span = max(1, settings.max_steps - 1 - settings.warmup_steps)
    progress = min(1.0, (step - settings.warmup_steps) / span)
    share = 0.5 * (1 + math.cos(math.pi * progress))
    floor = settings.final_learning_rate
    return settings.learning_rate * (floor + (1 - floor) * share)
