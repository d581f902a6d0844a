"""How many operations a training step needs, to be compared with what the machine can do.

Counted are the matrix products that training cannot do without, two operations for each weight and
token: all of them forward, again for the gradient of what went into a layer, and again for the
gradient of its weight, where these are needed. What is computed a second time to save memory does
not count (PaLM, arXiv:2204.02311, appendix B, which calls the share model FLOPs utilisation).

Legend: H heads, D head width.
"""

from __future__ import annotations

from torch import nn

from nanogpt_surgery.model.simple_gpt import SimpleGPT
from nanogpt_surgery.training.trainable_stages import first_trainable_stage


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
