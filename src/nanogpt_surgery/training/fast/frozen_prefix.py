"""Hidden states before the first part that learns never change: computed once, and kept.

    ids ─ embedding ─ layer 0 ─ … ─ layer k − 1 ┊ layer k ─ … ─ norm ─ head
                        frozen: kept            ┊ learns: computed

With LoRA on the head alone that is the whole model but the head. Each window is computed by itself,
so that its bits do not depend on which others were in its batch, and a resumed run, which has kept
nothing yet, computes the same.

Legend: B windows in a batch, T tokens, C width, N windows that there is room for.
"""

from __future__ import annotations

import errno
import os
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any

import torch
from torch import Tensor, nn

from nanogpt_surgery.data.gpt_dataset import Batches
from nanogpt_surgery.errors import SurgeryError
from nanogpt_surgery.files.disk_errors import disk_refuses
from nanogpt_surgery.model.layout import Layout
from nanogpt_surgery.model.simple_gpt import SimpleGPT
from nanogpt_surgery.training.distributed import world
from nanogpt_surgery.training.fast.fused_lora import stored_in_bfloat16
from nanogpt_surgery.training.forward import can_keep, first_trainable_stage
from nanogpt_surgery.training.hardware import choose_hardware, to_device
from nanogpt_surgery.training.settings import FitSettings

MIB, GIB = 2**20, 2**30
LEAST_VISITS = 1.5  # of each window in a training, on average, for keeping it to pay


class FrozenPrefix:
    """The hidden states of a model before its first part that learns, by window.

    Args:
        model: its frozen part must not change while this lives, and have no dropout.
        windows: how many windows to keep, N; others are computed each time.
        folder: keep them in a file here instead of in memory; it goes with the process.
    """

    def __init__(self, model: SimpleGPT, windows: int, folder: Path | None = None):
        self.model = model
        self.device = model.embed_tokens.weight.device
        self.stages: list[nn.Module] = [*model.layers, model.norm]
        first = first_trainable_stage(model)
        assert first is not None, "the embedding learns, so nothing is frozen before it"
        self.first = first
        self.windows = windows
        self.folder = folder
        self.places: dict[bytes, int] = {}
        self.kept: Tensor | None = None

    def hidden(self, ids: Tensor, documents: Tensor | None = None) -> Tensor:
        """Returns the head's input for ids (B, T): (B, T, C), as `SimpleGPT.hidden` does.

        Documents (B, T) that share a row are kept apart. Both lie in the host's memory, where
        windows are distinguished without waiting for a GPU.
        """
        batch = (ids,) if documents is None else (ids, documents)
        x = torch.stack([self._before(*rows) for rows in zip(*batch, strict=True)])  # (B, T, C)
        documents = None if documents is None else to_device(documents, self.device)
        return self._through(x, self.first, len(self.stages), documents)

    def _before(self, *row: Tensor) -> Tensor:
        """The states (T, C) before the first part that learns, of ids (T,) and their documents."""
        key = b"".join(tensor.numpy().tobytes() for tensor in row)
        if key in self.places:
            assert self.kept is not None
            return to_device(self.kept[self.places[key]], self.device)  # a file's are the host's
        on_device = [to_device(tensor, self.device)[None] for tensor in row]  # (1, T) each
        ids, documents = on_device[0], on_device[1] if len(row) > 1 else None
        with torch.no_grad():
            x = self.model.embed(ids, _layout(ids, documents)[0])[0]
            x = self._through(x, 0, self.first, documents)[0]
        if len(self.places) < self.windows:
            self._keep(key, x)
        return x

    def _keep(self, key: bytes, x: Tensor) -> None:
        if self.kept is None:
            self.kept = self._room(x)
        if x.shape != self.kept.shape[1:]:  # a batch of shorter rows
            return
        self.places[key] = len(self.places)
        self.kept[self.places[key]] = x

    def _room(self, x: Tensor) -> Tensor:
        """Room for N windows; the system gives memory only to what is written, a disk all of it."""
        shape = (self.windows, *x.shape)
        if self.folder is None:
            return torch.empty(shape, dtype=x.dtype, device=x.device)
        return mapped_file(self.folder, self.windows * x.numel(), x.dtype).view(shape)

    def _through(self, x: Tensor, start: int, end: int, documents: Tensor | None) -> Tensor:
        """Through the stages from `start` to before `end`; the norm is the last stage."""
        positions, mask = _layout(x[..., 0], documents)
        rotation: Any = self.model.embed_positions(x, positions)[1]
        for index, stage in enumerate(self.stages[start:end], start):
            x = stage(x) if index == len(self.stages) - 1 else stage(x, rotation, None, mask)
        return x


def mapped_file(folder: Path, size: int, dtype: torch.dtype) -> Tensor:
    """A tensor (size,) of zeros in a file that has no name any more; it goes with the tensor.

    The disk has given every byte of it: a write into the mapping of one that it has not, once the
    disk is full, is no error but the end of the process.

    Raises:
        SurgeryError: the disk refuses (what is needed and what is free). Nothing is left behind.
    """
    needed = size * dtype.itemsize
    try:
        with NamedTemporaryFile(dir=folder, prefix="hidden-states-", suffix=".tmp") as file:
            _reserve(file.fileno(), needed)
            return torch.from_file(file.name, shared=True, size=size, dtype=dtype)
    except OSError as error:
        refused = disk_refuses(folder / "hidden-states.tmp", error)
        raise SurgeryError(
            f"the hidden states that are kept need {needed:,} bytes: {refused.what}",
            "lower cache_gib, or choose another cache_dir, or none: then they are kept in memory",
        ) from error


def _reserve(descriptor: int, size: int) -> None:
    """Let the disk give an empty file so many bytes, now."""
    try:
        os.posix_fallocate(descriptor, 0, size)
        return
    except AttributeError:  # not every system has the call,
        written = 0
    except OSError as error:  # and not every file system
        if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
            raise
        written = 0
    while written < size:
        written += os.write(descriptor, bytes(min(MIB, size - written)))


def _layout(ids: Tensor, documents: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """The positions of ids (B, T), and the mask where documents share a row."""
    if documents is None:
        return torch.arange(ids.size(1), device=ids.device), None
    layout = Layout.of_documents(documents)
    return layout.positions, layout.mask


def prefix_for(
    model: nn.Module, dataset: Batches, settings: FitSettings, folder: Path | None = None
) -> FrozenPrefix | None:
    """A `FrozenPrefix` for a training where keeping pays, or None.

    It pays where something lies before the first part that learns and windows come again, to the
    same process where there are several.
    """
    if not isinstance(model, SimpleGPT) or not settings.fast or not can_keep(model, settings):
        return None
    if settings.windows < LEAST_VISITS * len(dataset) * world().size:
        return None
    room = int(settings.cache_gib * GIB) // bytes_of_window(model, dataset.block_size, settings)
    windows = min(len(dataset), room)
    return FrozenPrefix(model, windows, folder) if windows else None


def bytes_of_window(model: SimpleGPT, tokens: int, settings: FitSettings) -> int:
    """Returns the bytes of the hidden states of one window (T, C), in the embedding's dtype."""
    size = model.embed_tokens.weight.element_size()
    if stored_in_bfloat16(model) and choose_hardware(settings).precision == torch.float32:
        size = torch.float32.itemsize
    return tokens * model.config.n_embd * size
