"""A training that computes what is no finite number: in which step, of which rows, and where."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from nanogpt_surgery.data.gpt_dataset import Batch
from nanogpt_surgery.errors import NotFiniteError, listed
from nanogpt_surgery.model.finite import first_not_finite
from nanogpt_surgery.model.loss import count_trained, eval_mode
from nanogpt_surgery.training.evaluation import summed_loss
from nanogpt_surgery.training.hardware import Hardware

if TYPE_CHECKING:
    from nanogpt_surgery.training.fit import TrainingLoop

MOST_ROWS = 12  # whose numbers are said


def check_skipped_steps(loop: TrainingLoop, batch: Batch, step: int) -> None:
    """Raises after too many skipped steps in a row, and says where their numbers arose.

    Args:
        loop: while the gradients of its last step are still there.
        batch: the last step's.
        step: its number, the first being 0.
    """
    if loop.skipped_in_a_row < loop.settings.max_skipped_steps:
        return
    model = loop.model
    what = (
        f"{loop.skipped_in_a_row} steps in a row, the last of them step {step + 1}, had a gradient "
        "that is not finite, and were skipped: no weight was changed by them; "
        f"{_where(model, batch, _rows_of(loop, step), loop.hardware)}"
    )
    if name := _first_gradient(model):
        what += f"; the first gradient that is not finite is that of {name}"
    loop.optimizer.zero_grad()
    raise NotFiniteError(
        what, "lower the learning rate; where the precision is bfloat16, float32 may help as well"
    )


def _rows_of(loop: TrainingLoop, step: int) -> list[int]:
    """The numbers of the windows, or rows, in this process's part of a batch; [] if unknown."""
    known: Any = getattr(loop.dataset, "indices", None)
    if known is None:
        return []
    settings = loop.settings
    size = settings.batch_size * settings.grad_accum_steps
    return known(step, size, settings.seed, **loop.world.share).tolist()


def _first_gradient(model: nn.Module) -> str:
    """The first parameter, in the model's order, whose gradient is not finite; "" if all are."""
    gradients = ((name, p.grad) for name, p in model.named_parameters() if p.grad is not None)
    return next((name for name, gradient in gradients if not gradient.isfinite().all()), "")


def _where(model: nn.Module, batch: Batch, rows: list[int], hardware: Hardware) -> str:
    """Which rows it was, and the module in which the loss of the first bad one is lost."""
    for index in range(len(batch[1])):
        row = tuple(tensor[index : index + 1] for tensor in batch)
        if count_trained(row[1]) and not _loss(model, row, hardware).isfinite():
            origin = first_not_finite(model, partial(_loss, model, row, hardware))
            number = rows[index] if rows else index
            of = "row" if rows else "row, in the batch,"
            return f"the loss of {of} {number} is not finite: {origin}"
    which = f" (rows {listed(map(str, rows), MOST_ROWS)})" if rows else ""
    return f"the loss of each row is finite{which}"


def _loss(model: nn.Module, row: Batch, hardware: Hardware) -> torch.Tensor:
    with eval_mode(model), torch.no_grad(), hardware.autocast():
        return summed_loss(model, row)
