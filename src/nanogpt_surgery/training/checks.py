"""Checks before a training begins: weights, data, and the memory that it is certain to need."""

from __future__ import annotations

import torch
from torch import nn

from nanogpt_surgery.data.gpt_dataset import Batches, GPTDataset
from nanogpt_surgery.data.text.mixture import Mixture
from nanogpt_surgery.errors import SurgeryError
from nanogpt_surgery.memory import available_memory, check_memory
from nanogpt_surgery.model.config import GPTConfig
from nanogpt_surgery.model.simple_gpt import SimpleGPT
from nanogpt_surgery.training.distributed import world
from nanogpt_surgery.training.forward import check_not_packed
from nanogpt_surgery.training.hardware import choose_hardware
from nanogpt_surgery.training.settings import FitSettings

FLOAT32, ID = 4, 8  # bytes
SHORTEST = 2  # tokens that a row of a conversation has at least
LOWER_MODEL = "a smaller model fits: lower n_embd, n_layer or the vocabulary"
LOWER_BATCH = "lower batch_size (and raise grad_accum_steps by as much), or block_size"


def check_fit(model: nn.Module, dataset: Batches, settings: FitSettings) -> None:
    """Raises where weights are float16, memory is short, or documents in a row see each other."""
    check_no_float16(model)
    check_training(model, dataset, settings)
    check_not_packed(model, dataset.batch(0, 1))


def check_no_float16(model: nn.Module) -> None:
    """Raises if weights are float16, in which small gradients become 0."""
    half = [name for name, p in model.named_parameters() if p.dtype == torch.float16]
    if half:
        raise SurgeryError(
            f"{len(half)} parameters are float16 ({half[0]}, …): the gradients of such a model are "
            "often too small for float16, and become 0",
            "open_model(path, torch.float32), or model.float(); bfloat16 where memory is short",
        )


def check_new_model(config: GPTConfig, settings: FitSettings) -> None:
    """Raise `SurgeryError` where a model that is yet to be made cannot be made and trained here."""
    size = FLOAT32 * config.n_parameters
    parts = {"weights": size} | _learning(config.n_parameters, settings)
    rows = _of_a_batch(config.n_embd, settings, config.block_size)
    hint = LOWER_BATCH if sum(rows.values()) > sum(parts.values()) else LOWER_MODEL
    if choose_hardware(settings).device.type == "cuda":
        check_memory("the model", {"weights": size}, hint)  # it is made in the host's memory
    check_memory("this training", parts | rows, hint, _free_on_device(settings))


def check_training(model: nn.Module, dataset: Batches, settings: FitSettings) -> None:
    """Raise `SurgeryError` where the training of a model that is there cannot fit."""
    learning = sum(p.numel() for p in model.parameters() if p.requires_grad)
    windows = isinstance(dataset, GPTDataset | Mixture)
    length = dataset.block_size if windows else SHORTEST
    width = model.config.n_embd if isinstance(model, SimpleGPT) else 0
    parts = _learning(learning, settings) | _of_a_batch(width, settings, length)
    check_memory("this training", parts, LOWER_BATCH, _free_on_device(settings))


def _learning(parameters: int, settings: FitSettings) -> dict[str, int]:
    """Gradients, and what the optimizer keeps: two numbers with AdamW, at least one with Muon."""
    state = 1 if settings.muon else 2
    return {"gradients": FLOAT32 * parameters, "optimizer": state * FLOAT32 * parameters}


def _of_a_batch(width: int, settings: FitSettings, length: int) -> dict[str, int]:
    """The ids of a step, and what enters a block for a micro-batch: as it is, and normed."""
    rows = -(-settings.batch_size // world().size)
    return {
        "ids of a batch": ID * rows * settings.grad_accum_steps * length,
        "hidden states": 2 * FLOAT32 * rows * length * width,
    }


def memory_for_training(model: nn.Module, settings: FitSettings) -> int | None:
    """Bytes that the training of an opened model may take in all, its weights among them.

    None where the system does not say. Weights that lie where the training computes count as free,
    since a plan's memory counts them too.
    """
    device = choose_hardware(settings).device
    free = _free_on_device(settings) if device.type == "cuda" else available_memory()
    own = (p for p in model.parameters() if p.device.type == device.type)
    return None if free is None else free + sum(p.numel() * p.element_size() for p in own)


def _free_on_device(settings: FitSettings) -> int | None:
    """Bytes that a GPU has free; None where the processor computes."""
    device = choose_hardware(settings).device
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else None
