"""The loss of a model on data that it does not learn from."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from itertools import islice
from typing import Protocol

import torch
from torch import Tensor, nn

from nanogpt_surgery.arguments import check_arguments
from nanogpt_surgery.data.gpt_dataset import Batch, Batches, GPTDataset, documents_of
from nanogpt_surgery.errors import SurgeryError
from nanogpt_surgery.model.loss import count_trained, cross_entropy, eval_mode
from nanogpt_surgery.model.simple_gpt import SimpleGPT
from nanogpt_surgery.training.distributed import ALONE, World, world
from nanogpt_surgery.training.forward import check_not_packed, first_trainable_stage, logits_of
from nanogpt_surgery.training.hardware import Hardware, to_device
from nanogpt_surgery.training.settings import FitSettings

EVALUATED_AT_ONCE = 16  # windows: more of them leave the processor's caches
LITTLE = 2**20  # numbers in hidden states that are no burden


@check_arguments
def evaluate(
    model: nn.Module, dataset: EvalData, batch_size: int = EVALUATED_AT_ONCE, fast: bool = True
) -> float:
    """The mean loss over every target of a dataset that counts, in nats a token.

    A text is cut into windows that do not overlap, the last one shorter, so each token but the
    first is predicted once; of conversations only what is trained on counts. Computed in the
    model's own precision, in eval mode, on its device; weights in bfloat16 are cast for their
    products on a processor that has no bfloat16 arithmetic. `fast` makes the logits of some
    positions at a time.

    Raises:
        SurgeryError: rows hold several documents, and the model is no `SimpleGPT`; nothing counts;
            or the batch_size is below 1.
    """
    if batch_size < 1:
        raise SurgeryError(f"batch_size is {batch_size}; it must be at least 1")
    return mean_loss(model, dataset, batch_size, ALONE, fast)


def validation_loss(
    model: nn.Module,
    eval_data: EvalData,
    settings: FitSettings,
    hardware: Hardware,
) -> float:
    """The loss on held-out data as a training measures it: in its precision, by all processes."""
    windows = windows_at_once(model, settings)
    with hardware.evaluating():
        return mean_loss(model, eval_data, windows, world(), settings.fast)


def mean_loss(
    model: nn.Module, dataset: EvalData, batch_size: int, processes: World, fast: bool
) -> float:
    """The loss of `evaluate`; of several processes each reads a share, and all return the same."""
    losses: list[Tensor] = []
    count: float = 0
    with eval_mode(model), torch.inference_mode(), _way(model, fast) as summed:
        for batch in islice(dataset.iter_all(batch_size), processes.rank, None, processes.size):
            check_not_packed(model, batch)
            losses.append(summed(model, batch))
            count += count_trained(batch[1])
    total, count = processes.all_reduce_sum(
        sum(torch.stack(losses).tolist()) if losses else 0.0, count
    )
    if not count:
        raise SurgeryError(
            "nothing of what an evaluation reads is trained on", "evaluate_tokens=0 reads all"
        )
    return total / count


def windows_at_once(model: nn.Module, settings: FitSettings) -> int:
    """How many windows an evaluation reads at a time, so that it needs no more than a step.

    It holds the tensors of one block, and a step those of all that learn or come after one. A small
    model needs little anyway.
    """
    if not isinstance(model, SimpleGPT) or not settings.fast:
        return min(EVALUATED_AT_ONCE, settings.batch_size)
    blocks = len(model.layers) - (first_trainable_stage(model) or 0)
    if settings.gradient_checkpointing:
        blocks = 1
    little = LITTLE // (model.config.block_size * model.config.n_embd)
    return min(EVALUATED_AT_ONCE, max(1, blocks) * settings.batch_size + little)


def summed_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Returns the loss summed over what counts, float32, a scalar."""
    logits = logits_of(model, batch[0], documents_of(batch))  # (B, T, V)
    return cross_entropy(logits, to_device(batch[1], logits.device), "sum")


def _way(
    model: nn.Module, fast: bool
) -> AbstractContextManager[Callable[[nn.Module, Batch], Tensor]]:
    """The way to a batch's loss: as above, or the same, faster."""
    if not fast:
        return nullcontext(summed_loss)
    from nanogpt_surgery.training.fast.accelerate import accelerate_evaluation

    return accelerate_evaluation(model)


class EvalData(Protocol):
    """Data that a loss is measured on."""

    def iter_all(self, batch_size: int) -> Iterator[Batch]:
        """Yields batches, each target at most once."""
        ...


class Subsampled:
    """Validation data that is measured in part: one in `every` rows, the same ones each time."""

    def __init__(self, data: GPTDataset, every: int):
        self.data, self.every = data, every

    def iter_all(self, batch_size: int) -> Iterator[Batch]:
        """Yields batches of the rows whose number is a multiple of `every`."""
        return self.data.iter_all(batch_size, self.every)


def subsample(data: Batches, most: int) -> EvalData:
    """Returns all of the data, or about `most` of its tokens, spread over it (0: all).

    Data without a number of `tokens` is read whole.
    """
    tokens = getattr(data, "tokens", 0) if most else 0
    return Subsampled(data, -(-tokens // most)) if tokens > most else data  # type: ignore[arg-type]
