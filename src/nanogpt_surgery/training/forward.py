"""A call of a model in a training, whatever kind of model and batch it is.

Beside it: where in the model training begins (nothing before the first trainable stage has a
gradient), how many operations a step needs from there on, and blocks that keep only their input and
are computed again for their gradient (arXiv:1604.06174), for less memory and more time.

Legend: B rows in a batch, T tokens in a row, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from nanogpt_surgery.data.gpt_dataset import Batch, documents_of
from nanogpt_surgery.errors import SurgeryError
from nanogpt_surgery.model.layout import Layout
from nanogpt_surgery.model.simple_gpt import SimpleGPT
from nanogpt_surgery.training.hardware import to_device
from nanogpt_surgery.training.settings import FitSettings


def logits_of(model: nn.Module, ids: Tensor, documents: Tensor | None = None) -> Tensor:
    """Returns the logits (B, T, V) of ids (B, T); documents that share a row are kept apart."""
    device = next(model.parameters()).device
    out: Any = model(to_device(ids, device), **layout_of(documents, device))
    return out if isinstance(out, Tensor) else out.logits  # transformers wraps them


def layout_of(documents: Tensor | None, device: torch.device) -> dict[str, Any]:
    """Returns the argument by which a `SimpleGPT` keeps documents (B, T) in a row apart."""
    if documents is None:
        return {}
    return {"layout": Layout.of_documents(to_device(documents, device))}


def check_not_packed(model: nn.Module, batch: Batch) -> None:
    """Raises where documents share rows and the model cannot keep them apart."""
    if not isinstance(model, SimpleGPT) and documents_of(batch) is not None:
        raise SurgeryError(
            "the dataset packs several documents into a row, and a model that is no SimpleGPT "
            "would let them see each other",
            "make it with pack=False",
        )


class CheckpointedBlocks:
    """The blocks of a model (its `layers`), called through `checkpoint` within `active()`.

    PyTorch has no public way to change how a module is called, compiled or not, and to take it
    back; so the attribute that `Module.compile` sets is set here.

    Args:
        model: a model with `layers`; one without is left as it is.
        wanted: if false, nothing changes.
    """

    def __init__(self, model: nn.Module, wanted: bool):
        self.blocks = blocks_of(model) if wanted else []
        if self.blocks:
            import_module("torch._dynamo")  # `checkpoint` loads it: before a step's clock runs

    def active(self) -> AbstractContextManager[None]:
        """Computes the blocks again in the backward pass of what is computed within."""
        calls = {block: block._compiled_call_impl or block._call_impl for block in self.blocks}
        again = {b: partial(checkpoint, call, use_reentrant=False) for b, call in calls.items()}
        return attributes_set("_compiled_call_impl", again)


def blocks_of(model: nn.Module) -> list[Any]:
    """The modules of a model's `layers`; none where it has no such list."""
    layers = getattr(model, "layers", None)
    return list(layers) if isinstance(layers, nn.ModuleList) else []


@contextmanager
def attributes_set(name: str, values: Mapping[Any, Any]) -> Iterator[None]:
    """Within, an attribute of each of these modules has the value that stands beside it."""
    before = {module: getattr(module, name) for module in values}
    try:
        for module, value in values.items():
            setattr(module, name, value)
        yield
    finally:
        for module, value in before.items():
            setattr(module, name, value)


def first_trainable_stage(model: SimpleGPT) -> int | None:
    """Returns the first of the layers and the norm, in this order, with a trainable parameter.

    Their number if none has one (the head alone learns), and None if the embedding learns.
    """
    if any(p.requires_grad for name, p in model.named_parameters() if name.startswith("embed_")):
        return None
    stages = [*model.layers, model.norm]
    return next((i for i, stage in enumerate(stages) if is_trainable(stage)), len(stages))


def is_trainable(module: nn.Module) -> bool:
    """Returns whether a module has a parameter that is trained."""
    return any(parameter.requires_grad for parameter in module.parameters())


def can_keep(model: SimpleGPT, settings: FitSettings) -> bool:
    """Returns whether hidden states before the first trainable stage may be kept between steps."""
    return (
        model.config.dropout == 0 and settings.cache_gib > 0 and bool(first_trainable_stage(model))
    )


def training_flops_per_token(model: SimpleGPT, context: int, prefix_kept: bool = False) -> int:
    """About how many operations a step needs for each token of windows of `context` tokens.

    A frozen weight has no gradient, and nothing before the first part that learns has one; with
    `prefix_kept` what lies there is not even computed. With every parameter trained it is three
    times `GPTConfig.flops_per_token`.
    """
    first = first_trainable_stage(model)
    first = 0 if first is None else first
    config = model.config
    attention = 4 * config.n_head * config.head_dim * context
    head = 2 * _weights(model.lm_head)
    # What the head reads has a gradient if a layer, or the norm behind the last, learns.
    total = head * (2 if first <= len(model.layers) else 1)
    for index, layer in enumerate(model.layers):
        matrices = 2 * _weights(layer)
        if index >= first or not prefix_kept:
            total += matrices + attention
        if index >= first:
            total += matrices + 2 * attention
    learning = [*model.layers, model.lm_head]
    return total + 2 * sum(_weights(stage, learning=True) for stage in learning)


def _weights(stage: nn.Module, learning: bool = False) -> int:
    """The sizes of a stage's matrices."""
    matrices = [p for p in stage.parameters() if p.dim() >= 2]
    return sum(p.numel() for p in matrices if p.requires_grad or not learning)
