"""The memory of a training step, part by part, and the part of a batch that it is measured on."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from nanogpt_surgery.data.conversations.instruction_dataset import UNTRAINED
from nanogpt_surgery.data.gpt_dataset import Batch, Batches, documents_of
from nanogpt_surgery.model.simple_gpt import SimpleGPT
from nanogpt_surgery.training.fast.chunked_logits import most_logits_on
from nanogpt_surgery.training.fast.cpu_kernels import cpu_kernels
from nanogpt_surgery.training.fast.frozen_head import frozen_head
from nanogpt_surgery.training.fast.frozen_prefix import bytes_of_window, prefix_for
from nanogpt_surgery.training.forward import layout_of
from nanogpt_surgery.training.gradient_checkpointing import CheckpointedBlocks
from nanogpt_surgery.training.hardware import Hardware
from nanogpt_surgery.training.settings import FitSettings
from nanogpt_surgery.training.trainable_stages import first_trainable_stage

FLOAT32 = 4  # bytes


@dataclass
class Part:
    """The first rows of the first batches of some data, cut short, which come again and again."""

    data: Batches
    rows: int
    block_size: int
    batches: int = 1

    def __len__(self) -> int:
        return self.rows * self.batches

    @property
    def tokens(self) -> int:
        """Of a batch."""
        return self.rows * self.block_size

    def batch(
        self, step: int, batch_size: int, seed: int = 0, *, rank: int = 0, world_size: int = 1
    ) -> Batch:
        """As the data's own, cut short."""
        assert world_size == 1, "a plan is made by one process"
        return cut(self.data.batch(step % self.batches, batch_size, seed), self.block_size)

    def iter_all(self, batch_size: int) -> Iterator[Batch]:
        """As the data's own, cut short."""
        return (cut(batch, self.block_size) for batch in self.data.iter_all(batch_size))

    def half(self) -> Part:
        """Half of its rows, or where there is one, half of its length."""
        if self.rows > 1:
            return replace(self, rows=self.rows // 2)
        return replace(self, block_size=max(1, self.block_size // 2))


def cut(batch: Batch, length: int) -> Batch:
    """So many of a batch's columns, those that most is learned from."""
    trained = (batch[1] != UNTRAINED).sum(0).cumsum(0)
    before = torch.cat((trained.new_zeros(1), trained[:-length]))
    start = int((trained[length - 1 :] - before).argmax()) if trained.numel() > length else 0
    return tuple(tensor[:, start : start + length] for tensor in batch)


def training_memory(
    model: SimpleGPT,
    part: Part,
    settings: FitSettings,
    hardware: Hardware,
    optimizer_bytes: int,
) -> dict[str, int]:
    """The bytes that a step of a training needs, part by part and in all.

    Activations are what autograd keeps of the `part` of a batch, scaled by its tokens; of hidden
    states as many are kept at most, since windows that are alike are kept once.
    """
    prefix = prefix_for(model, part.data, settings)
    one = bytes_of_window(model, part.data.block_size, settings)
    trained = FLOAT32 * sum(p.numel() for p in model.parameters() if p.requires_grad)
    memory = {
        "weights_bytes": sum(p.numel() * p.element_size() for p in model.parameters()),
        "gradient_bytes": trained,
        "optimizer_bytes": optimizer_bytes,
        "activation_bytes": _activation_bytes(model, part, settings, hardware),
        "logits_bytes": _logits_bytes(model, part.data, settings, hardware, prefix is not None),
        "hidden_states_bytes": prefix.windows * one if prefix else 0,
    }
    return memory | {"memory_bytes": sum(memory.values())}


def _saved_bytes(model: SimpleGPT, part: Part, settings: FitSettings, hardware: Hardware) -> int:
    """Returns the bytes that autograd keeps of a part of a batch until the backward pass."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}
    alive: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        alive.append(tensor)  # so that no other storage takes its place
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    batch = part.batch(0, part.rows, settings.seed)
    device, mode = next(model.parameters()).device, model.training
    blocks = CheckpointedBlocks(model.train(), settings.gradient_checkpointing)
    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
    kernels = cpu_kernels(model) if settings.fast else nullcontext()
    with blocks.active(), kernels, hardware.seeded(0), hardware.autocast(), hooks:
        model.hidden(batch[0].to(device), **layout_of(documents_of(batch), device))
    model.train(mode)
    return sum(size for place, size in kept.items() if place not in own)


def _activation_bytes(
    model: SimpleGPT, part: Part, settings: FitSettings, hardware: Hardware
) -> int:
    """Returns the bytes kept of a batch, and those of a block that is computed again."""
    kept = _saved_bytes(model, part, settings, hardware)
    if settings.gradient_checkpointing:
        whole = replace(settings, gradient_checkpointing=False)
        blocks = max(1, len(model.layers) - (first_trainable_stage(model) or 0))
        kept += _saved_bytes(model, part, whole, hardware) // blocks
    return kept * settings.batch_size * part.data.block_size // part.tokens


def _logits_bytes(
    model: SimpleGPT, dataset: Batches, settings: FitSettings, hardware: Hardware, kept: bool
) -> int:
    """Returns the bytes of tensors as wide as the vocabulary, held at once.

    Logits, their logarithms, and the gradients of both; over a frozen head the exponentials alone,
    and on a GPU, which has them in one piece, what its products make of them.
    """
    whole = settings.batch_size * dataset.block_size * model.config.vocab_size
    if not settings.fast:
        return 4 * FLOAT32 * whole
    most = most_logits_on(hardware.device)
    if (whole <= most and not kept) or frozen_head(model.lm_head, hardware.precision) is None:
        return 4 * FLOAT32 * min(whole, most)
    beside = hardware.precision.itemsize if hardware.device.type == "cuda" else 0
    return (FLOAT32 + beside) * min(whole, 2 * most)


class LiveTensors(TorchDispatchMode):
    """A context that counts what operations allocate and keep; kernels' own room is not seen.

    Args:
        own: tensors that are not counted.
    """

    def __init__(self, own: Iterable[Tensor] = ()):
        super().__init__()  # type: ignore[no-untyped-call]
        self.now: int = 0
        self.most: int = 0
        self.sizes = {tensor.untyped_storage()._cdata: 0 for tensor in own}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """One operation; one that is made of others is counted as these."""
        kwargs = kwargs or {}
        with self:
            out = func.decompose(*args, **kwargs)
        if out is NotImplemented:
            out = func(*args, **kwargs)
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._count(tensor)
        return out

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata in self.sizes:
            return
        self.sizes[storage._cdata] = storage.nbytes()
        self.now += storage.nbytes()
        self.most = max(self.most, self.now)
        weakref.finalize(storage, self._gone, storage._cdata)

    def _gone(self, key: int) -> None:
        self.now -= self.sizes.pop(key)
