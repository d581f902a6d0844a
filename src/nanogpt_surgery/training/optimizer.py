"""AdamW over what can be trained, with weight decay on matrices only."""

from __future__ import annotations

import torch
from torch import nn

from nanogpt_surgery.errors import SurgeryError
from nanogpt_surgery.training.settings import FitSettings


def make_optimizer(model: nn.Module, settings: FitSettings) -> torch.optim.AdamW:
    """AdamW (arXiv:1711.05101), fused where the device has it; biases and norms do not decay.

    Raises:
        SurgeryError: the model has no parameter that can be trained.
    """
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not trainable:
        raise SurgeryError(
            "the model has no parameter that can be trained",
            "inject_lora(model, …), or model.requires_grad_(True)",
        )
    matrices = [parameter for parameter in trainable if parameter.dim() >= 2]
    vectors = [parameter for parameter in trainable if parameter.dim() < 2]
    groups = [
        {"params": matrices, "weight_decay": settings.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    betas = (settings.beta1, settings.beta2)
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=settings.learning_rate,
        betas=betas,
        fused=True,
    )
