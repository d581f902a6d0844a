"""Where in a model training begins: nothing before its first trainable stage has a gradient."""

from __future__ import annotations

from torch import nn

from nanogpt_surgery.model.simple_gpt import SimpleGPT
from nanogpt_surgery.training.settings import FitSettings


def first_trainable_stage(model: SimpleGPT) -> int | None:
    """Returns the first of the layers and the norm, in this order, with a trainable parameter.

    Their number if none has one (the head alone learns), and None if the embedding learns.
    """
    if any(p.requires_grad for name, p in model.named_parameters() if name.startswith("embed_")):
        return None
    stages = [*model.layers, model.norm]
    return next((i for i, stage in enumerate(stages) if is_trainable(stage)), len(stages))


def is_trainable(module: nn.Module) -> bool:
    """Returns whether a module has a parameter that is trained."""
    return any(parameter.requires_grad for parameter in module.parameters())


def can_keep(model: SimpleGPT, settings: FitSettings) -> bool:
    """Returns whether hidden states before the first trainable stage may be kept between steps."""
    return (
        model.config.dropout == 0 and settings.cache_gib > 0 and bool(first_trainable_stage(model))
    )
