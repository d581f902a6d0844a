"""A training that computes what is no finite number: in which step, of which rows, and where."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import nn

from nanogpt_surgery.data.batches import Batch, Batches
from nanogpt_surgery.errors import NotFiniteError
from nanogpt_surgery.model.finite import first_not_finite
from nanogpt_surgery.training.evaluation import eval_mode
from nanogpt_surgery.training.hardware import Hardware
from nanogpt_surgery.training.loss import n_trained, summed_loss
from nanogpt_surgery.training.settings import FitSettings

MOST_ROWS = 12  # whose numbers are said


def rows_in_batch(
    dataset: Batches, step: int, settings: FitSettings, share: Mapping[str, int]
) -> list[int]:
    """The numbers of the windows, or rows, in this process's part of a batch; [] if unknown."""
    known: Any = getattr(dataset, "rows_of", None)
    if known is None:
        return []
    size = settings.batch_size * settings.grad_accum_steps
    numbers: list[int] = known(step, size, settings.seed, **share).tolist()
    return numbers


def not_finite(
    model: nn.Module, batch: Batch, rows: list[int], step: int, skipped: int, hardware: Hardware
) -> NotFiniteError:
    """The error that ends a training, while the gradients of its last step are still there.

    Args:
        model: what is trained.
        batch: the last step's.
        rows: the numbers of its rows in the data, [] if unknown.
        step: its number, the first being 1.
        skipped: how many steps in a row were skipped, this one included.
        hardware: in whose precision to compute.
    """
    where = _where(model, batch, rows, hardware)
    what = (
        f"{skipped} steps in a row, the last of them step {step}, had a gradient that is not "
        f"finite, and were skipped: no weight was changed by them; {where}"
    )
    if name := _first_gradient(model):
        what += f"; the first gradient that is not finite is that of {name}"
    return NotFiniteError(
        what, "lower the learning rate; where the precision is bfloat16, float32 may help as well"
    )


def _first_gradient(model: nn.Module) -> str:
    """The first parameter, in the model's order, whose gradient is not finite; "" if all are."""
    gradients = ((name, p.grad) for name, p in model.named_parameters() if p.grad is not None)
    return next((name for name, gradient in gradients if not gradient.isfinite().all()), "")


def _where(model: nn.Module, batch: Batch, rows: list[int], hardware: Hardware) -> str:
    """Which rows it was, and the module in which the loss of the first bad one is lost."""
    for index in range(len(batch[1])):
        row = tuple(tensor[index : index + 1] for tensor in batch)
        if n_trained(row[1]) and not _finite_loss(model, row, hardware):
            origin = first_not_finite(model, partial(_loss, model, row, hardware))
            number = rows[index] if rows else index
            of = "row" if rows else "row, in the batch,"
            return f"the loss of {of} {number} is not finite: {origin}"
    return f"the loss of each row is finite ({_numbers(rows)})" if rows else "each loss is finite"


def _numbers(rows: list[int]) -> str:
    more = len(rows) - MOST_ROWS
    return (
        "rows " + ", ".join(map(str, rows[:MOST_ROWS])) + (f" and {more} more" if more > 0 else "")
    )


def _loss(model: nn.Module, row: Batch, hardware: Hardware) -> torch.Tensor:
    with eval_mode(model), torch.no_grad(), hardware.autocast():
        return summed_loss(model, row)


def _finite_loss(model: nn.Module, row: Batch, hardware: Hardware) -> bool:
    return bool(_loss(model, row, hardware).isfinite())
