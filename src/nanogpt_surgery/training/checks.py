"""Checks of a training: before it begins, that it learns, and that its numbers are finite."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from nanogpt_surgery.data.gpt_dataset import Batch, Batches, GPTDataset
from nanogpt_surgery.data.text.mixture import Mixture
from nanogpt_surgery.errors import NotFiniteError, SurgeryError, listed
from nanogpt_surgery.lora.several import frozen_hashes, has_lora, trained_updates
from nanogpt_surgery.memory import available_memory, check_memory
from nanogpt_surgery.model.config import GPTConfig
from nanogpt_surgery.model.finite import first_not_finite
from nanogpt_surgery.model.loss import count_trained, eval_mode
from nanogpt_surgery.model.simple_gpt import SimpleGPT
from nanogpt_surgery.training.distributed import world
from nanogpt_surgery.training.evaluation import summed_loss
from nanogpt_surgery.training.forward import check_not_packed
from nanogpt_surgery.training.hardware import Hardware, choose_device
from nanogpt_surgery.training.settings import FitSettings

if TYPE_CHECKING:
    from nanogpt_surgery.training.fit import TrainingLoop


FLOAT32, ID = 4, 8  # bytes
SHORTEST = 2  # tokens that a row of a conversation has at least
MOST_ROWS = 12  # of a batch, whose numbers are said
LOWER_MODEL = "a smaller model fits: lower n_embd, n_layer or the vocabulary"
LOWER_BATCH = "lower batch_size (and raise grad_accum_steps by as much), or block_size"
_MAKE_IT_AFTER = "make the optimizer after inject_lora, from the parameters that can be trained"


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
    if choose_device(settings.device).type == "cuda":
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
    kind = choose_device(settings.device).type
    free = _free_on_device(settings) if kind == "cuda" else available_memory()
    own = (p for p in model.parameters() if p.device.type == kind)
    return None if free is None else free + sum(p.numel() * p.element_size() for p in own)


def _free_on_device(settings: FitSettings) -> int | None:
    """Bytes that a GPU has free; None where the processor computes."""
    device = choose_device(settings.device)
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else None


class TrainingChecks:
    """Checks a training after its first and its last step.

    The optimizer is checked at once for holding every trainable parameter; `first` and `last` are
    the numbers of steps.

    Raises:
        SurgeryError: from any of its methods, with the names of what does not learn or stay.
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, first: int, last: int):
        check_optimizer(model, optimizer)
        self.model = model
        self.steps = {first, last}
        self.last = last
        self.frozen = frozen_hashes(model) if has_lora(model) else {}

    def after_backward(self, step: int) -> None:
        """Checks that a gradient has reached every update."""
        if step in self.steps:
            check_gradients(self.model)

    def after_update(self, step: int) -> None:
        """Checks that every update has moved, and, at the end, that no frozen parameter has."""
        if step in self.steps:
            check_moved(self.model)
        if step == self.last:
            check_frozen(self.model, self.frozen)

    def after_skip(self, step: int) -> None:
        """A step that changed no weight shows nothing: the next one is looked at in its place."""
        if step == self.last:
            check_frozen(self.model, self.frozen)
        elif step in self.steps:
            self.steps.add(step + 1)


def check_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Raises `SurgeryError` unless every trainable parameter is in the optimizer.

    All that are missing are named.
    """
    optimised = {id(p) for group in optimizer.param_groups for p in group["params"]}
    missing = [n for n, p in model.named_parameters() if p.requires_grad and id(p) not in optimised]
    _check_none(missing, "{} trainable parameters are not in the optimizer", _MAKE_IT_AFTER)


def check_gradients(model: nn.Module) -> None:
    """Raises `SurgeryError` unless each update that is trained got a gradient.

    To be called after a backward pass, before the gradients are cleared. A gradient that is zero in
    all its parameters is none; all updates without are named.
    """
    silent = [
        name
        for name, update in trained_updates(model).items()
        if not any(p.grad is not None and p.grad.any() for p in update.trainable())
    ]
    hint = "is the layer used in the forward pass, enabled, and the loss made from its output?"
    _check_none(silent, "no gradient reaches {} of the adapter's updates", hint)


def check_moved(model: nn.Module) -> None:
    """Raises `SurgeryError` unless each update that is trained has left its start, where ΔW is 0.

    For most that means ‖B‖ > 0; all that have not are named.
    """
    still = [name for name, update in trained_updates(model).items() if not update.moved()]
    what = "{} of the adapter's updates have not moved, ΔW is zero"
    _check_none(still, what, "is the learning rate above 0?")


def check_frozen(model: nn.Module, before: Mapping[str, str]) -> None:
    """Raises `SurgeryError` unless every frozen parameter has the hash it had; all are named.

    `before` is from `frozen_hashes`.
    """
    now = frozen_hashes(model)
    moved = [name for name, digest in before.items() if now.get(name) != digest]
    _check_none(moved, "{} frozen parameters have changed in training", _MAKE_IT_AFTER)


def _check_none(names: list[str], what: str, hint: str) -> None:
    if names:
        raise SurgeryError(f"{what.format(len(names))}: {listed(names)}", hint)


def check_skipped_steps(loop: TrainingLoop, batch: Batch, step: int) -> None:
    """Raises after too many skipped steps in a row, and says where their numbers arose.

    The gradients of the last step are still there; `step` is its number, the first being 0.
    """
    if loop.skipped_in_a_row < loop.settings.max_skipped_steps:
        return
    model = loop.model
    what = (
        f"{loop.skipped_in_a_row} steps in a row, the last of them step {step + 1}, had a gradient "
        "that is not finite, and were skipped: no weight was changed by them; "
        f"{_where(model, batch, _rows_of(loop, step), loop.hardware)}"
    )
    for name, parameter in model.named_parameters():
        if parameter.grad is not None and not parameter.grad.isfinite().all():
            what += f"; the first gradient that is not finite is that of {name}"
            break
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
