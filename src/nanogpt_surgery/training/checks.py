"""Checks before a training begins."""

from __future__ import annotations

import torch
from torch import nn

from nanogpt_surgery.data.gpt_dataset import Batches
from nanogpt_surgery.errors import SurgeryError
from nanogpt_surgery.training.estimates.memory_check import check_training
from nanogpt_surgery.training.forward import check_not_packed
from nanogpt_surgery.training.settings import FitSettings


def check_fit(model: nn.Module, dataset: Batches, settings: FitSettings) -> None:
    """Raises where weights are float16, memory is short, or documents in a row see each other."""
    check_no_float16(model)
    check_training(model, dataset, settings)
    check_not_packed(model, dataset)


def check_no_float16(model: nn.Module) -> None:
    """Raises if weights are float16, in which small gradients become 0."""
    half = [name for name, p in model.named_parameters() if p.dtype == torch.float16]
    if half:
        raise SurgeryError(
            f"{len(half)} parameters are float16 ({half[0]}, …): the gradients of such a model are "
            "often too small for float16, and become 0",
            "open_model(path, torch.float32), or model.float(); bfloat16 where memory is short",
        )
