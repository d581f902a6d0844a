"""The learning rate as a pure function of the step."""

from __future__ import annotations

import math

from nanogpt_surgery.training.settings import FitSettings


def learning_rate(step: int, settings: FitSettings) -> float:
    """The rate of step `step`, the first being 0: a linear rise, then down to its end.

    Down by a cosine (SGDR, arXiv:1608.03983), or held and then straight down over the last
    `cooldown` of the steps (warmup-stable-decay, arXiv:2404.06395).
    """
    warmup = min(settings.warmup_steps, settings.max_steps // 10)
    if step < warmup:
        return settings.learning_rate * (step + 1) / (warmup + 1)
    span = max(1, settings.max_steps - 1 - warmup)
    progress = min(1.0, (step - warmup) / span)
    share = _SHAPES[settings.schedule](progress, settings)
    floor = settings.final_learning_rate
    return settings.learning_rate * (floor + (1 - floor) * share)


def _cosine(progress: float, _: FitSettings) -> float:
    return 0.5 * (1 + math.cos(math.pi * progress))


def _stable(progress: float, settings: FitSettings) -> float:
    """1 until the cooldown, then a line that would reach 0 one step after the last."""
    left = (1 - progress) + progress / settings.max_steps
    return min(1.0, left / settings.cooldown) if settings.cooldown else 1.0


_SHAPES = {"cosine": _cosine, "stable": _stable}
