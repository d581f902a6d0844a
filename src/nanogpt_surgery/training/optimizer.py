"""AdamW over what can be trained, with weight decay on matrices only.

A group may carry `rate_ratio`: its learning rate is the schedule's times that.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from nanogpt_surgery.errors import SurgeryError
from nanogpt_surgery.lora.learning import linear_b_matrices
from nanogpt_surgery.training.settings import FitSettings


def make_optimizer(model: nn.Module, settings: FitSettings) -> torch.optim.AdamW:
    """AdamW (arXiv:1711.05101), fused where the device has it; biases and norms do not decay.

    With LoRA+ (arXiv:2402.12354) the B of each Linear's update is in a group of its own, which
    learns `settings.lora_plus_ratio` times faster.

    Raises:
        SurgeryError: the model has no parameter that can be trained.
    """
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not trainable:
        raise SurgeryError(
            "the model has no parameter that can be trained",
            "inject_lora(model, …), or model.requires_grad_(True)",
        )
    ratio, decay = settings.lora_plus_ratio, settings.weight_decay
    fast = {id(parameter) for parameter in linear_b_matrices(model)} if ratio != 1 else set()
    matrices = [p for p in trainable if p.dim() >= 2 and id(p) not in fast]
    vectors = [p for p in trainable if p.dim() < 2]
    groups: list[dict[str, Any]] = [
        {"params": matrices, "weight_decay": decay},
        {"params": vectors, "weight_decay": 0.0},
        {"params": [p for p in trainable if id(p) in fast], "weight_decay": decay}
        | {"rate_ratio": ratio, "lr": ratio * settings.learning_rate},
    ]
    betas = (settings.beta1, settings.beta2)
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=settings.learning_rate,
        betas=betas,
        fused=True,
    )
