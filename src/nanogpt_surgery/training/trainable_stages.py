"""Where in a model training begins, and how many operations a step needs from there on.

Nothing before the first trainable stage has a gradient.

Legend: H heads, D head width.
"""

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


def training_flops_per_token(model: SimpleGPT, context: int, prefix_kept: bool = False) -> int:
    """About how many operations a step needs for each token of windows of `context` tokens.

    A frozen weight has no gradient, and nothing before the first part that learns has one; with
    `prefix_kept` what lies there is not even computed. With every parameter trained it is three
    times `GPTConfig.flops_per_token`.
    """
    first = first_trainable_stage(model)
    first = 0 if first is None else first
    config = model.config
    attention = 4 * config.n_head * config.head_dim * context
    head = 2 * _weights(model.lm_head)
    # What the head reads has a gradient if a layer, or the norm behind the last, learns.
    total = head * (2 if first <= len(model.layers) else 1)
    for index, layer in enumerate(model.layers):
        matrices = 2 * _weights(layer)
        if index >= first or not prefix_kept:
            total += matrices + attention
        if index >= first:
            total += matrices + 2 * attention
    learning = [*model.layers, model.lm_head]
    return total + 2 * sum(_weights(stage, learning=True) for stage in learning)


def _weights(stage: nn.Module, learning: bool = False) -> int:
    """The sizes of a stage's matrices."""
    matrices = [p for p in stage.parameters() if p.dim() >= 2]
    return sum(p.numel() for p in matrices if p.requires_grad or not learning)
