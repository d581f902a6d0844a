"""`plan_training`: what a training will take, from its sizes and from a few real steps."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from nanogpt_surgery.data.batches import Batch, Batches, Measured, documents_of, held_out
from nanogpt_surgery.data.text.mixture import passes
from nanogpt_surgery.model.simple_gpt import SimpleGPT
from nanogpt_surgery.runs.checkpoints import KEPT
from nanogpt_surgery.training.evaluation import evaluate, windows_at_once
from nanogpt_surgery.training.fast.chunked_logits import most_logits_on
from nanogpt_surgery.training.fast.cpu_kernels import cpu_kernels
from nanogpt_surgery.training.fast.frozen_head import frozen_head
from nanogpt_surgery.training.fast.frozen_prefix import (
    bytes_of_window,
    prefix_for,
)
from nanogpt_surgery.training.forward import layout_of
from nanogpt_surgery.training.gradient_checkpointing import CheckpointedBlocks
from nanogpt_surgery.training.hardware import Hardware, choose_hardware, operations_of
from nanogpt_surgery.training.live_tensors import LiveTensors
from nanogpt_surgery.training.probing import Part, affordable_part, cut, probed
from nanogpt_surgery.training.settings import FitSettings
from nanogpt_surgery.training.trainable_stages import first_trainable_stage

FLOAT32 = 4  # bytes
ADAMW = 2  # numbers of state for each parameter
EVALUATED = 2  # batches of the held-out data
_OF_A_STEP = ("gradient_bytes", "activation_bytes", "logits_bytes")  # gone when it has ended


def plan_training(
    model: SimpleGPT,
    dataset: Batches,
    settings: FitSettings,
    validation: Batches | None = None,
) -> dict[str, Any]:
    """Sizes in bytes, numbers, and seconds; a few steps are taken and undone to the bit.

    Steps and evaluations are measured on as few tokens as take about two seconds, and scaled.
    Where hidden states before the first part that learns are kept, the first pass over the windows,
    which computes them, is timed apart. Nothing is written.

    Raises:
        SurgeryError: as `fit`.
    """
    hardware = choose_hardware(settings, operations_of(model, settings, dataset.block_size))
    model.to(hardware.device)
    part = affordable_part(model, dataset, settings)
    pace, state = probed(model, dataset, settings, part)
    memory = training_memory(model, dataset, settings, hardware, part, state)
    trained = memory["gradient_bytes"]
    rows = settings.windows
    evaluations = 0 if validation is None else _evaluations(settings)
    one, more = 0.0, 0
    if validation is not None:
        held = held_out(validation, settings.evaluate_tokens)
        one, more = _evaluation(model, held, settings, hardware, part)
    evaluating = memory["memory_bytes"] - sum(memory[part] for part in _OF_A_STEP) + more
    return {
        "computing_on": hardware.describe(),
        "parameters": sum(p.numel() for p in model.parameters()),
        "trained_parameters": trained // FLOAT32,
        **memory,
        "evaluation_bytes": more,
        "memory_bytes": max(memory["memory_bytes"], evaluating),
        "disk_bytes": (KEPT + 2) * (2 * trained + state),  # the best, and a new one at first
        "steps": settings.max_steps,
        "tokens": rows * dataset.block_size,
        "epochs": ", ".join(f"{share:.3g}" for share in passes(dataset, rows)),
        **pace.to_dict(),
        "evaluations": evaluations,
        "seconds_an_evaluation": one,
        "seconds": pace.seconds(settings.max_steps) + evaluations * one,
    }


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
    """What autograd keeps of a part of a batch between forward and backward pass, in bytes."""
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
    seeded = hardware.seeded(0)
    with blocks.active(), cpu_kernels(model), seeded, hardware.autocast(), hooks:
        model.hidden(batch[0].to(device), **layout_of(documents_of(batch), device))
    model.train(mode)
    return sum(size for place, size in kept.items() if place not in own)


def _activation_bytes(
    model: SimpleGPT, part: Part, settings: FitSettings, hardware: Hardware
) -> int:
    """What autograd keeps of a batch, and of a block that is computed again what it keeps then."""
    kept = activation_bytes(model, part, settings, hardware)
    if settings.gradient_checkpointing:
        whole = replace(settings, gradient_checkpointing=False)
        blocks = max(1, len(model.layers) - (first_trainable_stage(model) or 0))
        kept += activation_bytes(model, part, whole, hardware) // blocks
    return kept * settings.batch_size * part.data.block_size // part.tokens


def _logits_bytes(
    model: SimpleGPT, dataset: Batches, settings: FitSettings, hardware: Hardware
) -> int:
    """What is as wide as the vocabulary, held at once.

    Logits, their logarithms, and the gradients of both; over a frozen head the exponentials alone,
    and on a GPU, which has them in one piece, what its products make of them.
    """
    whole = settings.batch_size * dataset.block_size * model.config.vocab_size
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


def _evaluations(settings: FitSettings) -> int:
    every = settings.evaluate_every
    return -(-settings.max_steps // every) if every else 1


@dataclass(frozen=True)
class _Some:
    """The first batches of held-out data, cut short."""

    first: list[Batch]

    def whole(self, batch_size: int) -> Iterator[Batch]:
        yield from self.first


def _evaluation(
    model: SimpleGPT, held: Measured, settings: FitSettings, hardware: Hardware, part: Part
) -> tuple[float, int]:
    """The seconds of an evaluation, and the most bytes that it holds beside the weights.

    Two batches of as many rows as an evaluation reads at once are measured, or of a part's.
    """
    at_once = windows_at_once(model, settings)
    rows = at_once if part.tokens == part.data.block_size * settings.batch_size else part.rows
    some = [cut(batch, part.block_size) for batch in islice(held.whole(rows), EVALUATED)]
    start = time.perf_counter()
    with hardware.evaluating():
        evaluate(model, _Some(some), rows)
    took = time.perf_counter() - start
    with LiveTensors([*model.parameters(), *model.buffers()]) as live, hardware.evaluating():
        evaluate(model, _Some(some[:1]), rows)
    measured = sum(batch[1].numel() for batch in some)
    whole = sum(batch[1].numel() for batch in held.whole(at_once))
    largest = min(whole, at_once * part.data.block_size)
    return took * whole / measured, int(live.most * max(1.0, largest / some[0][1].numel()))
