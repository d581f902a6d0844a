"""The optimizer over what can be trained, with weight decay on matrices only.

A group may carry `rate_ratio`: its learning rate is the schedule's times that.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from nanogpt_surgery.errors import SurgeryError
from nanogpt_surgery.lora.several import linear_b_matrices
from nanogpt_surgery.training.muon import Muon, muon_groups
from nanogpt_surgery.training.settings import FitSettings


def make_optimizer(model: nn.Module, settings: FitSettings) -> torch.optim.Optimizer:
    """Returns AdamW (arXiv:1711.05101), or Muon with AdamW beside it, over what can be trained.

    With AdamW matrices decay, biases and norms do not. With Muon only the matrices that it trains
    decay; AdamW trains the rest, embeddings and head among it. With LoRA+ (arXiv:2402.12354) the B
    of each Linear's update is in a group of its own, which learns `settings.lora_plus_ratio` times
    faster.

    Raises:
        SurgeryError: the model has no parameter that can be trained, or Muon no matrix.
    """
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not trainable:
        raise SurgeryError(
            "the model has no parameter that can be trained",
            "inject_lora(model, …), or model.requires_grad_(True)",
        )
    betas = (settings.beta1, settings.beta2)
    adamw, muon = torch.optim.AdamW, Muon
    if settings.fast:  # the same two, but they do not load PyTorch's compiler
        from nanogpt_surgery.training.fast import uncompiled

        adamw, muon = uncompiled.AdamW, uncompiled.Muon
    if settings.muon:
        groups = muon_groups(model, trainable, settings.weight_decay)
        return muon(groups, settings.learning_rate, settings.momentum, betas)
    groups = [group for group in _adamw_groups(model, trainable, settings) if group["params"]]
    # Fused: all weights in one pass, on a CPU too.
    return adamw(groups, lr=settings.learning_rate, betas=betas, fused=True)


def _adamw_groups(
    model: nn.Module, trainable: list[nn.Parameter], settings: FitSettings
) -> list[dict[str, Any]]:
    ratio, decay = settings.lora_plus_ratio, settings.weight_decay
    b_matrices = {id(p) for p in linear_b_matrices(model)} if ratio != 1 else set()
    return [
        {
            "params": [p for p in trainable if p.dim() >= 2 and id(p) not in b_matrices],
            "weight_decay": decay,
        },
        {"params": [p for p in trainable if p.dim() < 2], "weight_decay": 0.0},
        {
            "params": [p for p in trainable if id(p) in b_matrices],
            "weight_decay": decay,
            "rate_ratio": ratio,
            "lr": ratio * settings.learning_rate,  # for a loop of one's own, without the schedule
        },
    ]


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Sets each group's rate, `rate_ratio` times the schedule's where it carries one."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group.get("rate_ratio", 1.0)


def learning_rate(step: int, settings: FitSettings) -> float:
    """Returns the rate of step `step`, the first being 0: a linear rise, then down to its end.

    Down by a cosine (SGDR, arXiv:1608.03983), or held and then straight down over the last
    `cooldown` of the steps (warmup-stable-decay, arXiv:2404.06395).
    """
    warmup = min(settings.warmup_steps, settings.max_steps // 10)
    if step < warmup:
        return settings.learning_rate * (step + 1) / (warmup + 1)
    span = max(1, settings.max_steps - 1 - warmup)
    progress = min(1.0, (step - warmup) / span)
    if settings.schedule == "cosine":
        share = 0.5 * (1 + math.cos(math.pi * progress))
    else:  # 1 until the cooldown, then a line that would reach 0 one step after the last
        left = (1 - progress) + progress / settings.max_steps
        share = min(1.0, left / settings.cooldown) if settings.cooldown else 1.0
    floor = settings.final_learning_rate
    return settings.learning_rate * (floor + (1 - floor) * share)
