"""Calls a model on a batch, whatever kind of model and batch it is.

Legend: B rows in a batch, T tokens in a row, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from nanogpt_surgery.data.gpt_dataset import Batch, documents_of
from nanogpt_surgery.errors import SurgeryError
from nanogpt_surgery.model.layout import Layout
from nanogpt_surgery.model.simple_gpt import SimpleGPT
from nanogpt_surgery.training.hardware import to_device


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
