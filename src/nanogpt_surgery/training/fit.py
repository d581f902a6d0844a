"""The one training loop. It yields a `Step` after each step; it never prints and never saves.

Fine-tuning is the same loop on a model with fewer trainable parameters. Everything random follows
from (seed, step), so going on from a checkpoint needs the weights, the optimizer and a number.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nanogpt_surgery.data.batches import Batch, Batches, held_out
from nanogpt_surgery.errors import SurgeryError
from nanogpt_surgery.lora.checks import TrainingChecks
from nanogpt_surgery.training.distributed import world
from nanogpt_surgery.training.evaluation import validation_loss
from nanogpt_surgery.training.fast.compilation import CompiledBlocks
from nanogpt_surgery.training.fast.cpu_kernels import cpu_kernels
from nanogpt_surgery.training.fast.frozen_prefix import prefix_for
from nanogpt_surgery.training.fast.frozen_products import QuickProducts
from nanogpt_surgery.training.fast.prefetch import batches
from nanogpt_surgery.training.gradients import accumulate
from nanogpt_surgery.training.hardware import choose_hardware, operations_of
from nanogpt_surgery.training.loss import check_not_packed, n_trained
from nanogpt_surgery.training.memory_estimate import check_training
from nanogpt_surgery.training.nonfinite import not_finite, rows_in_batch
from nanogpt_surgery.training.optimizer import make_optimizer, update
from nanogpt_surgery.training.schedule import learning_rate
from nanogpt_surgery.training.settings import FitSettings
from nanogpt_surgery.training.step import Step
from nanogpt_surgery.values import chosen


def fit(
    model: nn.Module,
    dataset: Batches,
    settings: FitSettings | None = None,
    *,
    validation: Batches | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    first_step: int = 0,
    skipped_before: int = 0,
    examine: bool = True,
    cache_dir: Path | None = None,
    **changes: Any,
) -> Iterator[Step]:
    """Train what can be trained in a model, a step for each item taken from the iterator.

    Where `torch.distributed` has joined several processes, all call this alike: each takes its
    share of every batch, and all begin with the first one's weights (`distributed.py`).

    Args:
        model: called on ids (B, T) it gives logits (B, T, V), or an output of transformers that has
            them; trained in place, on the device that `settings` choose.
        dataset: the windows, or rows, to learn from; documents that share a row are kept apart.
        settings: see `FitSettings`; its defaults if None.
        validation: evaluated every `evaluate_every` steps and at the end, on the same
            `evaluate_tokens` of it.
        optimizer: to go on with; if None a new one, AdamW or Muon. The schedule sets its rates.
        first_step: steps done already.
        skipped_before: how many of the last of them were skipped in a row.
        examine: check that the optimizer holds every trainable parameter, after the first and the
            last step that each update of a LoRA got a gradient and has moved, and at the end that
            no frozen parameter did, by hash.
        cache_dir: a folder for the hidden states that are kept (`cache_gib`), instead of memory.
        **changes: fields of `FitSettings` by name, over those of `settings`.

    Yields:
        A `Step` after each optimizer step.

    Raises:
        SurgeryError: nothing can be trained, the weights are float16, documents share rows and the
            model is no `SimpleGPT`, or a part of a LoRA does not learn (its name).
        NotFiniteError: the loss or the gradient of `max_skipped_steps` steps in a row was not
            finite. Each was skipped, and changed no weight.
    """
    settings = chosen(FitSettings, settings, changes)
    _check_no_float16(model)
    check_training(model, dataset, settings)
    check_not_packed(model, dataset)
    loop = _Loop(model, dataset, settings, validation, optimizer, cache_dir)
    loop.skipped = skipped_before
    return loop.steps(first_step, examine)


def _check_no_float16(model: nn.Module) -> None:
    half = [name for name, p in model.named_parameters() if p.dtype == torch.float16]
    if half:
        raise SurgeryError(
            f"{len(half)} parameters are float16 ({half[0]}, …): the gradients of such a model are "
            "often too small for float16, and become 0",
            "open_model(path, torch.float32), or model.float(); bfloat16 where memory is short",
        )


class _Loop:
    """What the steps of a training share."""

    def __init__(
        self,
        model: nn.Module,
        dataset: Batches,
        settings: FitSettings,
        validation: Batches | None,
        optimizer: torch.optim.Optimizer | None,
        cache_dir: Path | None,
    ):
        self.model, self.dataset, self.settings = model, dataset, settings
        operations = operations_of(model, settings, dataset.block_size)
        self.hardware = choose_hardware(settings, operations)
        model.to(self.hardware.device)
        self.together = world()
        self.together.broadcast_parameters(model)
        self.optimizer = optimizer or make_optimizer(model, settings)
        self.trained = [p for group in self.optimizer.param_groups for p in group["params"]]
        self.skipped = 0  # steps in a row up to now
        self.prefix = prefix_for(model, dataset, settings, cache_dir)
        most = settings.evaluate_tokens
        self.held = None if validation is None else held_out(validation, most)

    def steps(self, first_step: int, examine: bool) -> Iterator[Step]:
        """Checks at once what can be, and gives the steps from the first on."""
        last = self.settings.max_steps - 1
        examiner = TrainingChecks(self.model, self.optimizer, first_step, last) if examine else None
        return self._steps(first_step, examiner)

    def _steps(self, first_step: int, examiner: TrainingChecks | None) -> Iterator[Step]:
        settings, hardware = self.settings, self.hardware
        blocks = CompiledBlocks(self.model, hardware.compile, settings.gradient_checkpointing)
        products = QuickProducts(self.model, hardware.precision)
        self.optimizer.zero_grad()  # what the caller's own backward passes may have left
        coming = batches(self.dataset, settings, first_step, hardware.device, self.together.share)
        for step in range(first_step, settings.max_steps):
            start = time.perf_counter()
            if not self.model.training:  # at the start, or after a look between two steps
                self.model.train()
            batch = next(coming)
            with products.active(), blocks.active(), cpu_kernels(self.model):
                losses, tokens, learned = self._gradients(batch, step)
            if examiner is not None:
                examiner.after_backward(step)
            loss, norm, rate = self._update(losses, step)
            if self.skipped:
                self._skip(batch, step)
            if examiner is not None:
                examiner.after_skip(step) if self.skipped else examiner.after_update(step)
            seconds = time.perf_counter() - start
            yield Step(
                step=step + 1,
                loss=loss,
                learning_rate=rate,
                gradient_norm=norm,
                tokens=tokens,
                seconds=seconds,
                validation_loss=self._validation_loss(step + 1),
                trained_tokens=learned,
                processes=self.together.size,
                skipped=self.skipped > 0,
            )

    def _gradients(self, batch: Batch, step: int) -> tuple[list[Tensor], int, int]:
        """The gradients of a step, of all processes; this one's losses, and all tokens."""
        counts = batch[1].numel(), n_trained(batch[1])
        tokens, learned = map(int, self.together.all_reduce_sum(*counts))
        losses = accumulate(
            self.model,
            batch,
            self.settings,
            step,
            self.prefix,
            self.hardware,
            learned,
            self.together.rank,
        )
        self.together.all_reduce_gradients(self.trained)
        return losses, tokens, learned

    def _update(self, losses: list[Tensor], step: int) -> tuple[float, float, float]:
        """One update of the weights, unless loss or gradient is not finite; all processes alike.

        Returns the loss, the norm of its gradient and the rate.
        """
        whole = nn.utils.get_total_norm([p.grad for p in self.trained if p.grad is not None])
        own_loss, norm = _read(losses, whole)
        loss = self.together.all_reduce_sum(own_loss)[0]
        rate = learning_rate(step, self.settings)
        if math.isfinite(loss) and math.isfinite(norm):
            update(self.trained, self.optimizer, rate, self.settings.max_grad_norm, whole)
            self.skipped = 0
        else:
            self.skipped += 1
        return loss, norm, rate

    def _skip(self, batch: Batch, step: int) -> None:
        """Forget the gradients of a step, or stop after too many in a row."""
        error = None
        if self.skipped >= self.settings.max_skipped_steps:
            rows = rows_in_batch(self.dataset, step, self.settings, self.together.share)
            error = not_finite(self.model, batch, rows, step + 1, self.skipped, self.hardware)
        self.optimizer.zero_grad()
        if error is not None:
            raise error

    def _validation_loss(self, steps: int) -> float | None:
        """After so many steps, where it is time for it."""
        if self.held is None or not _evaluates(steps, self.settings):
            return None
        return validation_loss(self.model, self.held, self.settings, self.hardware, self.together)


def _read(losses: list[Tensor], norm: Tensor) -> tuple[float, float]:
    """The sum of the losses and the norm: all that the host waits for in a step."""
    dtype = torch.promote_types(norm.dtype, torch.float32)
    *parts, read = torch.stack([value.to(dtype) for value in (*losses, norm)]).tolist()
    return sum(parts), read


def _evaluates(steps: int, settings: FitSettings) -> bool:
    every = settings.evaluate_every
    return steps == settings.max_steps or (every > 0 and steps % every == 0)
