"""The loss of a model on data that it does not learn from."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import islice

import torch
from torch import Tensor, nn

from nanogpt_surgery.data.batches import Measured
from nanogpt_surgery.errors import SurgeryError
from nanogpt_surgery.model.simple_gpt import SimpleGPT
from nanogpt_surgery.training.distributed import ALONE, World
from nanogpt_surgery.training.fast.frozen_prefix import first_that_learns
from nanogpt_surgery.training.fast.frozen_products import QuickProducts, stored_in_bfloat16
from nanogpt_surgery.training.hardware import Hardware, cpu_has_bfloat16
from nanogpt_surgery.training.loss import check_documents, n_trained, summed_loss
from nanogpt_surgery.training.settings import FitSettings

EVALUATED_AT_ONCE = 64  # windows
LITTLE = 2**20  # numbers in hidden states that are no burden


def evaluate(
    model: nn.Module,
    dataset: Measured,
    batch_size: int = EVALUATED_AT_ONCE,
    together: World = ALONE,
) -> float:
    """The mean loss over every target of a dataset that counts, in nats a token.

    A text is cut into windows that do not overlap, the last one shorter, so each token but the
    first is predicted once; of conversations only what is trained on counts. Computed in the
    model's own precision, in eval mode, on its device; weights in bfloat16 are cast for their
    products on a processor that has no bfloat16 arithmetic. Processes that are `together` read
    each its share of the batches, and all return the same.

    Raises:
        SurgeryError: rows hold several documents, and the model is no `SimpleGPT`.
    """
    device = next(model.parameters()).device
    losses: list[Tensor] = []
    count: float = 0
    with eval_mode(model), torch.inference_mode(), _quick_products(model, device):
        for batch in islice(dataset.whole(batch_size), together.rank, None, together.size):
            check_documents(model, batch)
            losses.append(summed_loss(model, batch))
            count += n_trained(batch[1])
    total, count = together.all_reduce_sum(
        sum(torch.stack(losses).tolist()) if losses else 0.0, count
    )
    if not count:
        raise SurgeryError(
            "nothing of what an evaluation reads is trained on", "evaluate_tokens=0 reads all"
        )
    return total / count


def validation_loss(
    model: nn.Module, held: Measured, settings: FitSettings, hardware: Hardware, together: World
) -> float:
    """The loss on held-out data as a training measures it: in its precision, by all processes."""
    with hardware.evaluating():
        return evaluate(model, held, windows_at_once(model, settings), together)


def windows_at_once(model: nn.Module, settings: FitSettings) -> int:
    """How many windows an evaluation reads at a time, so that it needs no more than a step.

    It holds the tensors of one block, and a step those of all that learn or come after one. A small
    model needs little anyway.
    """
    if not isinstance(model, SimpleGPT):
        return min(EVALUATED_AT_ONCE, settings.batch_size)
    blocks = len(model.layers) - (first_that_learns(model) or 0)
    if settings.gradient_checkpointing:
        blocks = 1
    little = LITTLE // (model.config.block_size * model.config.n_embd)
    return min(EVALUATED_AT_ONCE, max(1, blocks) * settings.batch_size + little)


def _quick_products(model: nn.Module, device: torch.device) -> AbstractContextManager[None]:
    """Products in float32 with weights in bfloat16, where that is quicker."""
    if device.type != "cpu" or cpu_has_bfloat16() or not stored_in_bfloat16(model):
        return nullcontext()
    return QuickProducts(model, torch.float32).active()


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Eval mode for the block; the model's own mode after it."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
