"""The one training loop: batch, loss, backward, clip, step, yield.

It yields a `Step` after each update; it never prints and never saves: the caller decides.
Fine-tuning is the same loop on a model with fewer trainable parameters. Everything random follows
from (seed, step), so going on from a checkpoint needs the weights, the optimizer and a number.

Legend: B windows in a batch, T tokens, V vocabulary.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nanogpt_surgery.arguments import check_arguments
from nanogpt_surgery.data.gpt_dataset import Batch, Batches, documents_of
from nanogpt_surgery.model.loss import count_trained, cross_entropy
from nanogpt_surgery.training.checks import TrainingChecks, check_fit, check_skipped_steps
from nanogpt_surgery.training.distributed import world
from nanogpt_surgery.training.evaluation import subsample, validation_loss
from nanogpt_surgery.training.forward import CheckpointedBlocks, logits_of
from nanogpt_surgery.training.hardware import choose_hardware, operations_of, to_device, to_host
from nanogpt_surgery.training.optimizer import learning_rate, make_optimizer, set_learning_rate
from nanogpt_surgery.training.settings import FitSettings
from nanogpt_surgery.training.step import Step, Way
from nanogpt_surgery.values import chosen


@check_arguments
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
    """Trains what can be trained in a model, a step for each item taken from the iterator.

    Every process that `torch.distributed` has joined calls this alike; they share each batch.

    Args:
        model: called on ids (B, T) it gives logits (B, T, V), or an output of transformers that has
            them; trained in place, on the device that `settings` choose.
        dataset: the windows, or rows, to learn from; documents in one row do not see each other.
        settings: see `FitSettings`; its defaults if None.
        validation: evaluated every `evaluate_every` steps and at the end.
        optimizer: to continue with; if None a new one, AdamW or Muon. The schedule sets its rates.
        first_step: steps done already.
        skipped_before: how many of the last of them were skipped in a row.
        examine: check that the optimizer holds every trainable parameter, that each update of a
            LoRA learns in the first and last step, and by hash that no frozen parameter moves.
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
    check_fit(model, dataset, settings)
    loop = TrainingLoop(model, dataset, settings, validation, optimizer, cache_dir)
    loop.skipped_in_a_row = skipped_before
    last = settings.max_steps - 1
    checks = TrainingChecks(model, loop.optimizer, first_step, last) if examine else None
    return loop.steps(first_step, checks)


class TrainingLoop:
    """The parts of a training, and its steps."""

    computing = nullcontext  # nothing to set up; the fast way changes the model while it computes

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
        # The FLOPs of the training, by which is judged whether compiling pays.
        operations = operations_of(model, settings, dataset.block_size)
        self.hardware = choose_hardware(settings, operations)
        model.to(self.hardware.device)
        self.world = world()  # the processes that share each batch, or this one alone
        self.world.broadcast_parameters(model)  # all processes begin with the first one's weights
        self.optimizer = optimizer or make_optimizer(model, settings)
        self.parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        self.skipped_in_a_row = 0
        tokens = settings.evaluate_tokens
        self.eval_data = None if validation is None else subsample(validation, tokens)
        self.checkpointed = CheckpointedBlocks(model, settings.gradient_checkpointing)
        # The plain way to the batches and gradients of a step: `computing`, `batches` and
        # `forward_backward` of this class. The fast way has the same methods, and the same numbers.
        self.way: Way = self
        if settings.fast:
            from nanogpt_surgery.training.fast.accelerate import accelerate

            self.way = accelerate(model, settings, dataset, self.hardware, self.world, cache_dir)

    def steps(self, first_step: int, checks: TrainingChecks | None) -> Iterator[Step]:
        """Takes the steps from `first_step` on, and yields after each."""
        self.optimizer.zero_grad()  # what the caller's own backward passes may have left
        batches = self.way.batches(first_step)
        for step in range(first_step, self.settings.max_steps):
            done = self._step(step, batches, checks)
            loss = None
            if self.eval_data is not None and self.settings.evaluates_after(step + 1):
                loss = validation_loss(self.model, self.eval_data, self.settings, self.hardware)
            yield replace(done, validation_loss=loss)

    def _step(self, step: int, batches: Iterator[Batch], checks: TrainingChecks | None) -> Step:
        """Batch, loss, backward, clip, step."""
        start = time.perf_counter()
        if not self.model.training:  # at the start, or after a look between two steps
            self.model.train()
        # This process's share of the batch: inputs and targets, (B, T) each.
        batch = next(batches)
        counts = batch[1].numel(), count_trained(batch[1])
        tokens, trained = map(int, self.world.all_reduce_sum(*counts))

        # The gradients of the mean loss over all that is trained on in it, of all processes.
        losses = self._accumulate_gradients(batch, step, trained)
        self.world.all_reduce_gradients(self.parameters)
        if checks:
            checks.after_backward(step)

        # Their norm. Here, once in a step, the host waits for the device.
        total_norm = nn.utils.get_total_norm(p.grad for p in self.parameters if p.grad is not None)
        own_loss, norm = to_host(losses, total_norm)
        loss = self.world.all_reduce_sum(own_loss)[0]

        # Clip and update at the schedule's rate; if a number is not finite, no weight changes.
        rate = learning_rate(step, self.settings)
        if math.isfinite(loss) and math.isfinite(norm):
            if limit := self.settings.max_grad_norm:
                nn.utils.clip_grads_with_norm_(self.parameters, limit, total_norm)
            set_learning_rate(self.optimizer, rate)
            self.optimizer.step()
            self.skipped_in_a_row = 0
        else:
            self.skipped_in_a_row += 1
            check_skipped_steps(self, batch, step)
        self.optimizer.zero_grad()
        if checks:
            checks.after_skip(step) if self.skipped_in_a_row else checks.after_update(step)

        return Step(
            step=step + 1,
            loss=loss,
            learning_rate=rate,
            gradient_norm=norm,
            tokens=tokens,
            seconds=time.perf_counter() - start,
            trained_tokens=trained,
            processes=self.world.size,
            skipped=self.skipped_in_a_row > 0,
        )

    def batches(self, first_step: int) -> Iterator[Batch]:
        """Yields the batch of each step: a pure function of (seed, step, rank)."""
        rows = self.settings.batch_size * self.settings.grad_accum_steps
        for step in range(first_step, self.settings.max_steps):
            share = self.world.share  # rank and world_size, where several processes share a batch
            yield self.dataset.batch(step, rows, self.settings.seed, **share)

    def _accumulate_gradients(self, batch: Batch, step: int, trained: int) -> list[Tensor]:
        """Adds up the gradients, some rows at a time; returns the parts of the mean loss."""
        parts = self.settings.grad_accum_steps
        split = zip(*(tensor.chunk(parts) for tensor in batch), strict=True)
        losses = []
        with self.way.computing(), self.checkpointed.active():
            # Parts are numbered through all processes, so dropout draws what a single one would.
            for part, rows in enumerate(split, self.world.rank * parts):
                if counted := count_trained(rows[1]):
                    # For dropout. Python's hash of integers is the same on every machine.
                    with self.hardware.seeded(hash((self.settings.seed, step, part))):
                        losses.append(self.way.forward_backward(rows, counted / trained))
        return losses

    def forward_backward(self, rows: Batch, share: float) -> Tensor:
        """Adds the gradients of `share` times the mean loss over some rows; returns that loss."""
        with self.hardware.autocast():
            logits = logits_of(self.model, rows[0], documents_of(rows))  # (B, T, V)
        loss = cross_entropy(logits, to_device(rows[1], logits.device)) * share
        loss.backward()
        return loss.detach()
