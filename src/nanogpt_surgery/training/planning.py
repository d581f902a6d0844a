"""`plan_training`: what a training will take, from its sizes and from a few real steps."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from nanogpt_surgery.data.batches import Batch, Batches, Measured, documents_of, held_out
from nanogpt_surgery.data.mixture import passes
from nanogpt_surgery.model.simple_gpt import SimpleGPT
from nanogpt_surgery.training.checkpoint import KEPT
from nanogpt_surgery.training.compilation import CompiledBlocks
from nanogpt_surgery.training.evaluation import evaluate, windows_at_once
from nanogpt_surgery.training.frozen_head import frozen_head
from nanogpt_surgery.training.frozen_prefix import bytes_of_window, first_that_learns, prefix_for
from nanogpt_surgery.training.hardware import Hardware, choose_hardware, operations_of
from nanogpt_surgery.training.live_tensors import LiveTensors
from nanogpt_surgery.training.loss import apart, most_logits_on
from nanogpt_surgery.training.probing import probed
from nanogpt_surgery.training.settings import FitSettings

FLOAT32 = 4  # bytes
EVALUATED = 2  # batches of the held-out data
_OF_A_STEP = ("gradient_bytes", "activation_bytes", "logits_bytes")  # gone when it has ended


def plan_training(
    model: SimpleGPT,
    dataset: Batches,
    settings: FitSettings,
    validation: Batches | None = None,
) -> dict[str, Any]:
    """Sizes in bytes, numbers, and seconds; a few steps are taken and undone to the bit.

    Activations are what autograd keeps of a real batch. Where hidden states before the first part
    that learns are kept, the first pass over the windows, which computes them, is timed apart.
    Nothing is written.

    Raises:
        SurgeryError: as `fit`.
    """
    hardware = choose_hardware(settings, operations_of(model, settings, dataset.block_size))
    model.to(hardware.device)
    pace, state = probed(model, dataset, settings)
    trained = FLOAT32 * sum(p.numel() for p in model.parameters() if p.requires_grad)
    rows = settings.windows
    memory = {
        "weights_bytes": sum(p.numel() * p.element_size() for p in model.parameters()),
        "gradient_bytes": trained,
        "optimizer_bytes": state,
        "activation_bytes": _activation_bytes(model, dataset, settings, hardware),
        "logits_bytes": _logits_bytes(model, dataset, settings, hardware),
        "hidden_states_bytes": _hidden_states_bytes(model, dataset, settings),
    }
    evaluations = 0 if validation is None else _evaluations(settings)
    held = None if validation is None else held_out(validation, settings.evaluate_tokens)
    at_once = windows_at_once(model, settings)
    one = 0.0 if held is None else _seconds_of_evaluation(model, held, at_once, hardware)
    more = 0 if held is None else _evaluation_bytes(model, held, at_once, hardware)
    evaluating = sum(memory.values()) - sum(memory[part] for part in _OF_A_STEP) + more
    return {
        "computing_on": hardware.describe(),
        "parameters": sum(p.numel() for p in model.parameters()),
        "trained_parameters": trained // FLOAT32,
        **memory,
        "evaluation_bytes": more,
        "memory_bytes": max(sum(memory.values()), evaluating),
        "disk_bytes": (KEPT + 2) * (2 * trained + state),  # the best, and a new one at first
        "steps": settings.max_steps,
        "tokens": rows * dataset.block_size,
        "epochs": ", ".join(f"{share:.3g}" for share in passes(dataset, rows)),
        **pace.to_dict(),
        "evaluations": evaluations,
        "seconds_an_evaluation": one,
        "seconds": pace.seconds(settings.max_steps) + evaluations * one,
    }


def activation_bytes(
    model: SimpleGPT, dataset: Batches, settings: FitSettings, hardware: Hardware
) -> int:
    """What autograd keeps of one batch between the forward and the backward pass, in bytes."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}
    alive: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        alive.append(tensor)  # so that no other storage takes its place
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    batch = dataset.batch(0, settings.batch_size, settings.seed)
    device, mode = next(model.parameters()).device, model.training
    blocks = CompiledBlocks(model.train(), False, settings.gradient_checkpointing)
    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
    with blocks.active(), hardware.seeded(0), hardware.autocast(), hooks:
        model.hidden(batch[0].to(device), **apart(documents_of(batch), device))
    model.train(mode)
    return sum(size for place, size in kept.items() if place not in own)


def _activation_bytes(
    model: SimpleGPT, dataset: Batches, settings: FitSettings, hardware: Hardware
) -> int:
    """What autograd keeps, and of a block that is computed again what it keeps then."""
    kept = activation_bytes(model, dataset, settings, hardware)
    if not settings.gradient_checkpointing:
        return kept
    whole = replace(settings, gradient_checkpointing=False)
    blocks = max(1, len(model.layers) - (first_that_learns(model) or 0))
    return kept + activation_bytes(model, dataset, whole, hardware) // blocks


def _evaluation_bytes(
    model: SimpleGPT, validation: Measured, at_once: int, hardware: Hardware
) -> int:
    """The most that an evaluation holds at once beside the weights."""
    first = _Some(validation, at_once, 1)
    with LiveTensors([*model.parameters(), *model.buffers()]) as live, hardware.evaluating():
        evaluate(model, first, at_once)
    return int(live.most)


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


class _Some:
    """The first batches of held-out data."""

    def __init__(self, data: Measured, at_once: int, batches: int = EVALUATED):
        self.first = list(islice(data.whole(at_once), batches))

    def whole(self, batch_size: int) -> Iterator[Batch]:
        yield from self.first


def _seconds_of_evaluation(
    model: SimpleGPT, validation: Measured, at_once: int, hardware: Hardware
) -> float:
    some = _Some(validation, at_once)
    start = time.perf_counter()
    with hardware.evaluating():
        evaluate(model, some, at_once)
    took = time.perf_counter() - start
    measured, whole = (sum(y.numel() for _, y, *_ in s.whole(at_once)) for s in (some, validation))
    return float(took * whole / measured)
