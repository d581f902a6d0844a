"""The memory of a training step: what it holds at once, part by part, in bytes."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace

import torch
from torch import Tensor

from nanogpt_surgery.data.gpt_dataset import Batches, documents_of
from nanogpt_surgery.model.simple_gpt import SimpleGPT
from nanogpt_surgery.training.estimates.timing import Part, affordable_part
from nanogpt_surgery.training.fast.chunked_logits import most_logits_on
from nanogpt_surgery.training.fast.cpu_kernels import cpu_kernels
from nanogpt_surgery.training.fast.frozen_head import frozen_head
from nanogpt_surgery.training.fast.frozen_prefix import bytes_of_window, prefix_for
from nanogpt_surgery.training.forward import layout_of
from nanogpt_surgery.training.gradient_checkpointing import CheckpointedBlocks
from nanogpt_surgery.training.hardware import Hardware
from nanogpt_surgery.training.settings import FitSettings
from nanogpt_surgery.training.trainable_stages import first_trainable_stage

FLOAT32 = 4  # bytes
ADAMW = 2  # numbers of state for each parameter


def training_memory(
    model: SimpleGPT,
    dataset: Batches,
    settings: FitSettings,
    hardware: Hardware,
    part: Part | None = None,
    optimizer_bytes: int | None = None,
) -> dict[str, int]:
    """The bytes that a step of a training needs, part by part and in all.

    Activations are what autograd keeps of a real batch, or of the `part` of one that is affordable,
    scaled by its tokens. `optimizer_bytes` are AdamW's where they are not known.
    """
    part = part or affordable_part(model, dataset, settings)
    trained = FLOAT32 * sum(p.numel() for p in model.parameters() if p.requires_grad)
    memory = {
        "weights_bytes": sum(p.numel() * p.element_size() for p in model.parameters()),
        "gradient_bytes": trained,
        "optimizer_bytes": ADAMW * trained if optimizer_bytes is None else optimizer_bytes,
        "activation_bytes": _activation_bytes(model, part, settings, hardware),
        "logits_bytes": _logits_bytes(model, dataset, settings, hardware),
        "hidden_states_bytes": _hidden_states_bytes(model, dataset, settings),
    }
    return memory | {"memory_bytes": sum(memory.values())}


def activation_bytes(
    model: SimpleGPT, dataset: Part, settings: FitSettings, hardware: Hardware
) -> int:
    """Returns the bytes that autograd keeps of a part of a batch until the backward pass."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}
    alive: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        alive.append(tensor)  # so that no other storage takes its place
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    batch = dataset.batch(0, dataset.rows, settings.seed)
    device, mode = next(model.parameters()).device, model.training
    blocks = CheckpointedBlocks(model.train(), settings.gradient_checkpointing)
    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
    kernels = cpu_kernels(model) if settings.fast else nullcontext()
    with blocks.active(), kernels, hardware.seeded(0), hardware.autocast(), hooks:
        model.hidden(batch[0].to(device), **layout_of(documents_of(batch), device))
    model.train(mode)
    return sum(size for place, size in kept.items() if place not in own)


def _activation_bytes(
    model: SimpleGPT, part: Part, settings: FitSettings, hardware: Hardware
) -> int:
    """Returns the bytes kept of a batch, and those of a block that is computed again."""
    kept = activation_bytes(model, part, settings, hardware)
    if settings.gradient_checkpointing:
        whole = replace(settings, gradient_checkpointing=False)
        blocks = max(1, len(model.layers) - (first_trainable_stage(model) or 0))
        kept += activation_bytes(model, part, whole, hardware) // blocks
    return kept * settings.batch_size * part.data.block_size // part.tokens


def _logits_bytes(
    model: SimpleGPT, dataset: Batches, settings: FitSettings, hardware: Hardware
) -> int:
    """Returns the bytes of tensors as wide as the vocabulary, held at once.

    Logits, their logarithms, and the gradients of both; over a frozen head the exponentials alone,
    and on a GPU, which has them in one piece, what its products make of them.
    """
    whole = settings.batch_size * dataset.block_size * model.config.vocab_size
    if not settings.fast:
        return 4 * FLOAT32 * whole
    most = most_logits_on(hardware.device)
    kept = prefix_for(model, dataset, settings) is not None
    if (whole <= most and not kept) or frozen_head(model.lm_head, hardware.precision) is None:
        return 4 * FLOAT32 * min(whole, most)
    beside = hardware.precision.itemsize if hardware.device.type == "cuda" else 0
    return (FLOAT32 + beside) * min(whole, 2 * most)


def _hidden_states_bytes(model: SimpleGPT, dataset: Batches, settings: FitSettings) -> int:
    """The hidden states that will be kept, at most: windows that are alike are kept once."""
    prefix = prefix_for(model, dataset, settings)
    one = bytes_of_window(model, dataset.block_size, settings)
    return prefix.windows * one if prefix else 0
