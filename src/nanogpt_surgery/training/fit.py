"""The one training loop. It yields a `Step` after each step; it never prints and never saves.

Fine-tuning is the same loop on a model with fewer trainable parameters. Everything random follows
from (seed, step), so going on from a checkpoint needs the weights, the optimizer and a number.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nanogpt_surgery.data.batches import Batch, Batches, Measured, documents_of, held_out
from nanogpt_surgery.errors import SurgeryError
from nanogpt_surgery.lora.learning import Examiner
from nanogpt_surgery.training.compilation import CompiledBlocks
from nanogpt_surgery.training.evaluation import evaluate, windows_at_once
from nanogpt_surgery.training.frozen_prefix import FrozenPrefix, prefix_for
from nanogpt_surgery.training.frozen_products import QuickProducts
from nanogpt_surgery.training.hardware import Hardware, choose_hardware, operations_of, sent
from nanogpt_surgery.training.loss import (
    backward_from_hidden,
    backward_of_loss,
    n_trained,
    refuse_packed,
)
from nanogpt_surgery.training.optimizer import make_optimizer
from nanogpt_surgery.training.prefetch import batches
from nanogpt_surgery.training.schedule import learning_rate
from nanogpt_surgery.training.settings import FitSettings
from nanogpt_surgery.values import chosen


@dataclass(frozen=True)
class Step:
    """What one optimizer step did."""

    step: int
    """steps done so far, this one included"""
    loss: float
    """mean over the step's tokens before its update, in nats a token"""
    learning_rate: float
    gradient_norm: float
    """before clipping"""
    tokens: int
    """in the step's windows or rows, those that are not trained on included"""
    seconds: float
    """wall time of the step, its evaluation apart"""
    validation_loss: float | None = None
    """in nats a token, over `evaluate_tokens` of the validation data, after the update"""
    trained_tokens: int = 0
    """of them those whose prediction is trained on"""

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain values, for a line of metrics."""
        return asdict(self)


def fit(
    model: nn.Module,
    dataset: Batches,
    settings: FitSettings | None = None,
    *,
    validation: Batches | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    first_step: int = 0,
    examine: bool = True,
    keep_in: Path | None = None,
    **changes: Any,
) -> Iterator[Step]:
    """Train what can be trained in a model, a step for each item taken from the iterator.

    Args:
        model: called on ids (B, T) it gives logits (B, T, V), or an output of transformers that has
            them; trained in place, on the device that `settings` choose.
        dataset: the windows, or rows, to learn from; documents that share a row are kept apart.
        settings: see `FitSettings`; its defaults if None.
        validation: evaluated every `evaluate_every` steps and at the end, on the same
            `evaluate_tokens` of it.
        optimizer: to go on with; if None a new one, AdamW or Muon. The schedule sets its rates.
        first_step: steps done already.
        examine: check that the optimizer holds every trainable parameter, after the first and the
            last step that each update of a LoRA got a gradient and has moved, and at the end that
            no frozen parameter did, by hash.
        keep_in: a folder for the hidden states that are kept (`keep_hidden`), instead of memory.
        **changes: fields of `FitSettings` by name, over those of `settings`.

    Yields:
        A `Step` after each optimizer step.

    Raises:
        SurgeryError: nothing can be trained, the weights are float16, documents share rows and the
            model is no `SimpleGPT`, a gradient is not finite (it changes no weight), or a part of
            a LoRA does not learn (its name).
    """
    settings = chosen(FitSettings, settings, changes)
    _refuse_float16(model)
    refuse_packed(model, dataset)
    operations = operations_of(model, settings, dataset.block_size)
    hardware = choose_hardware(settings, operations)
    model.to(hardware.device)
    optimizer = optimizer or make_optimizer(model, settings)
    examiner = Examiner(model, optimizer, first_step, settings.max_steps - 1) if examine else None
    prefix = prefix_for(model, dataset, settings, keep_in)
    held = None if validation is None else held_out(validation, settings.evaluate_tokens)
    return _steps(model, dataset, settings, held, optimizer, first_step, examiner, prefix, hardware)


def _refuse_float16(model: nn.Module) -> None:
    half = [name for name, p in model.named_parameters() if p.dtype == torch.float16]
    if half:
        raise SurgeryError(
            f"{len(half)} parameters are float16 ({half[0]}, …): the gradients of such a model are "
            "often too small for float16, and become 0",
            "open_model(path, torch.float32), or model.float(); bfloat16 where memory is short",
        )


def _steps(
    model: nn.Module,
    dataset: Batches,
    settings: FitSettings,
    validation: Measured | None,
    optimizer: torch.optim.Optimizer,
    first_step: int,
    examiner: Examiner | None,
    prefix: FrozenPrefix | None,
    hardware: Hardware,
) -> Iterator[Step]:
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    blocks = CompiledBlocks(model, hardware.compile, settings.gradient_checkpointing)
    products = QuickProducts(model, hardware.precision)
    optimizer.zero_grad()  # what the caller's own backward passes may have left
    coming = batches(dataset, settings, first_step, hardware.device)
    for step in range(first_step, settings.max_steps):
        start = time.perf_counter()
        if not model.training:  # at the start, or after a look at the model between two steps
            model.train()
        rate = learning_rate(step, settings)
        with products.active(), blocks.active():
            batch = next(coming)
            losses = _accumulate(model, batch, settings, step, prefix, hardware)
        if examiner is not None:
            examiner.after_backward(step)
        whole = nn.utils.get_total_norm([p.grad for p in trained if p.grad is not None])
        loss, norm = _read(losses, whole)
        if not math.isfinite(norm):
            optimizer.zero_grad()
            raise _not_finite(step + 1)
        _update(trained, optimizer, rate, settings.clip, whole)
        if examiner is not None:
            examiner.after_update(step)
        done = Step(
            step=step + 1,
            loss=loss,
            learning_rate=rate,
            gradient_norm=norm,
            tokens=batch[1].numel(),
            trained_tokens=n_trained(batch[1]),
            seconds=time.perf_counter() - start,
        )
        if validation is not None and _evaluates(step + 1, settings):
            with hardware.evaluating():
                at_once = windows_at_once(model, settings)
                done = replace(done, validation_loss=evaluate(model, validation, at_once))
        yield done


def _accumulate(
    model: nn.Module,
    batch: Batch,
    settings: FitSettings,
    step: int,
    prefix: FrozenPrefix | None,
    hardware: Hardware,
) -> list[Tensor]:
    """Gradients of the mean loss over the step's windows; returns what adds up to that loss.

    The batch stays in the host's memory but for what the model reads, and the losses on the device:
    what a GPU is not asked for it is not waited for.
    """
    parts = settings.accumulation
    losses, whole = [], n_trained(batch[1])
    for part, piece in enumerate(zip(*(tensor.chunk(parts) for tensor in batch), strict=True)):
        if counted := n_trained(piece[1]):
            with hardware.seeded(hash((settings.seed, step, part))):
                losses.append(_backward(model, piece, counted / whole, prefix, hardware))
    return losses


def _backward(
    model: nn.Module,
    batch: Batch,
    share: float,
    prefix: FrozenPrefix | None,
    hardware: Hardware,
) -> Tensor:
    x, y, documents = batch[0], batch[1], documents_of(batch)
    if prefix is None:
        x = sent(x, hardware.device)
        return backward_of_loss(model, x, y, share, hardware.autocast, documents=documents)
    with hardware.autocast():
        hidden = prefix.hidden(x, documents)
    return backward_from_hidden(prefix.model, hidden, y, share, hardware.autocast)


def _read(losses: list[Tensor], norm: Tensor) -> tuple[float, float]:
    """The sum of the losses and the norm: all that the host waits for in a step."""
    dtype = torch.promote_types(norm.dtype, torch.float32)
    *parts, read = torch.stack([value.to(dtype) for value in (*losses, norm)]).tolist()
    return sum(parts), read


def _not_finite(step: int) -> SurgeryError:
    return SurgeryError(
        f"the gradient of step {step} is not finite; no weight was changed by it",
        "lower the learning rate; where the precision is bfloat16, float32 may help as well",
    )


def _update(
    trained: list[nn.Parameter],
    optimizer: torch.optim.Optimizer,
    rate: float,
    clip: float,
    norm: Tensor,
) -> None:
    """Clip, step, clear."""
    if clip:
        nn.utils.clip_grads_with_norm_(trained, clip, norm)
    for group in optimizer.param_groups:
        group["lr"] = rate * group.get("rate_ratio", 1.0)
    optimizer.step()
    optimizer.zero_grad()


def _evaluates(steps: int, settings: FitSettings) -> bool:
    every = settings.evaluate_every
    return steps == settings.max_steps or (every > 0 and steps % every == 0)
