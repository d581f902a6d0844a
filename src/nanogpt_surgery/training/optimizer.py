"""The optimizer over what can be trained, with weight decay on matrices only.

A group may carry `rate_ratio`: its learning rate is the schedule's times that.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from nanogpt_surgery.errors import SurgeryError
from nanogpt_surgery.lora.checks import linear_b_matrices
from nanogpt_surgery.lora.targets import output_layer
from nanogpt_surgery.training.muon import Muon
from nanogpt_surgery.training.settings import FitSettings

# Beside Muon's rate, that of what AdamW trains (docs/training.md).
EMBEDDING_RATIO, OTHER_RATIO = 1.5, 0.5


def make_optimizer(model: nn.Module, settings: FitSettings) -> torch.optim.Optimizer:
    """AdamW (arXiv:1711.05101), or Muon with AdamW beside it, over what can be trained.

    AdamW is PyTorch's fused one. Its matrices decay, biases and norms do not; beside Muon
    only Muon's matrices decay: neither the embeddings nor the head do. With LoRA+
    (arXiv:2402.12354) the B of each Linear's update is in a group of its own, which learns
    `settings.lora_plus_ratio` times faster.

    Raises:
        SurgeryError: the model has no parameter that can be trained, or Muon no matrix.
    """
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not trainable:
        raise SurgeryError(
            "the model has no parameter that can be trained",
            "inject_lora(model, …), or model.requires_grad_(True)",
        )
    if settings.muon:
        return _muon(model, trainable, settings)
    groups = [group for group in _adamw_groups(model, trainable, settings) if group["params"]]
    betas = (settings.beta1, settings.beta2)
    adamw, _ = _optimizers(settings.fast)
    return adamw(groups, lr=settings.learning_rate, betas=betas, fused=True)


def _optimizers(fast: bool) -> tuple[type[torch.optim.AdamW], type[Muon]]:
    """AdamW and Muon; the fast ones do not load PyTorch's compiler."""
    if not fast:
        return torch.optim.AdamW, Muon
    from nanogpt_surgery.training.fast import uncompiled

    return uncompiled.AdamW, uncompiled.Muon


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


def _muon(model: nn.Module, trainable: list[nn.Parameter], settings: FitSettings) -> Muon:
    """Muon for the matrices of Linears but the head's; tables learn faster than the rest."""
    modules, output = dict(model.named_modules()), output_layer(model)
    linears = [m for name, m in modules.items() if isinstance(m, nn.Linear) and name != output]
    tables = {id(m.weight) for m in modules.values() if isinstance(m, nn.Embedding)}
    matrices = {id(m.weight) for m in linears if m.weight.requires_grad} - tables
    if not matrices:
        raise SurgeryError(
            "muon trains the matrices of a model, and none of them can be trained",
            "a LoRA is trained by AdamW: leave muon away",
        )
    rest = [p for p in trainable if id(p) not in matrices | tables]
    groups: list[dict[str, Any]] = [
        {
            "params": [p for p in trainable if id(p) in matrices],
            "muon": True,
            "weight_decay": settings.weight_decay,
        },
        {"params": [p for p in trainable if id(p) in tables], "rate_ratio": EMBEDDING_RATIO},
        {"params": rest, "rate_ratio": OTHER_RATIO},
    ]
    groups = [{"muon": False} | group for group in groups if group["params"]]
    betas = (settings.beta1, settings.beta2)
    _, muon = _optimizers(settings.fast)
    return muon(groups, settings.learning_rate, settings.momentum, betas)


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Sets each group's rate, `rate_ratio` times the schedule's where it carries one."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group.get("rate_ratio", 1.0)


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
