"""The sha256 of tensors, by which an operation shows that bits stayed or came back."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor, nn

from nanogpt_surgery.arguments import check_arguments

UPDATES = ".updates."


@check_arguments
def tensor_hashes(model: nn.Module, seen: dict[Tensor, str] | None = None) -> dict[str, str]:
    """The sha256 of every parameter and buffer, by name; a wrapped layer keeps its plain name.

    A tensor that several layers share appears under each of their names.

    Args:
        model: any module.
        seen: hashes of tensors that nothing can have written to since, which are not hashed again;
            the new ones are added. A tensor's version counter would not do: writing to `.data`, or
            to an array that shares its memory, leaves it as it was.
    """
    seen = {} if seen is None else seen
    named: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
    named |= dict(model.named_buffers(remove_duplicate=False))
    new = list({id(tensor): tensor for tensor in named.values() if tensor not in seen}.values())
    with ThreadPoolExecutor(max_workers=max(1, torch.get_num_threads())) as pool:
        seen.update(zip(new, pool.map(tensor_hash, new), strict=True))
    return {plain_name(name): seen[tensor] for name, tensor in named.items()}


def plain_name(name: str) -> str:
    """A tensor's name as if its layer were not wrapped."""
    return f".{name}".replace(".original_layer.", ".")[1:]


def tensor_hash(tensor: Tensor) -> str:
    """The sha256 of a tensor's dtype, shape and bytes."""
    flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    digest = hashlib.sha256(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
    array: Any = flat.numpy()
    digest.update(array)
    return digest.hexdigest()


def frozen_hashes(model: nn.Module) -> dict[str, str]:
    """The hashes of the parameters that no training may move: those without a gradient."""
    frozen = {plain_name(n) for n, p in model.named_parameters() if not p.requires_grad}
    return {name: digest for name, digest in tensor_hashes(model).items() if name in frozen}


def combined(hashes: Iterable[str]) -> str:
    """One hash for many, whatever their order."""
    return hashlib.sha256("".join(sorted(hashes)).encode()).hexdigest()
