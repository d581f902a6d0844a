"""Recipes: an anatomy, a start and a way of training that were measured together.

What a recipe sets are defaults; what is named beside it counts. This module does not load torch.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

Name = Literal["fast"]


@dataclass(frozen=True)
class Recipe:
    """Sizes, start and settings that were measured together; None names those of no recipe."""

    model: dict[str, Any] = field(default_factory=dict)
    """values for `GPTConfig`"""
    training: dict[str, Any] = field(default_factory=dict)
    """values for `FitSettings`"""
    from_zero: bool = False
    """every branch starts from zero (model/initialisation.py)"""


# docs/training.md has what each of these is worth.
MUON: dict[str, Any] = {
    "muon": True,
    "momentum": 0.9,
    "learning_rate": 0.03,
    "schedule": "stable",
    "cooldown": 0.7,
    "final_learning_rate": 0.0,
    "warmup_steps": 0,
    "weight_decay": 0.0,
    "beta1": 0.8,
    "beta2": 0.95,
    "max_grad_norm": 0.0,
}
# For weights that are good already: at MUON's own rate they are worse at once.
FURTHER: dict[str, Any] = {"learning_rate": 3e-4}
FURTHER_BY_MUON: dict[str, Any] = MUON | {"learning_rate": 0.003}
RECIPES: dict[str | None, Recipe] = {
    None: Recipe(training=MUON),
    "fast": Recipe(
        model={
            "positions": "rotary",
            "norm": "rmsnorm",
            "mlp": "relu2",
            "bias": "none",
            "qk_norm": True,
            "n_prev_tokens": 3,
        },
        training=MUON,
        from_zero=True,
    ),
}


def training_values(recipe: str | None, asked: dict[str, Any]) -> dict[str, Any]:
    """Values for `FitSettings`: a recipe's, under those asked for.

    They were measured with Muon; without it `FitSettings` has its own, which are AdamW's.
    """
    return (RECIPES[recipe].training if asked.get("muon", True) else {}) | asked


def further_values(asked: dict[str, Any]) -> dict[str, Any]:
    """Defaults for continuing from a trained model; values asked for win."""
    return (FURTHER_BY_MUON if asked.get("muon") else FURTHER) | asked
