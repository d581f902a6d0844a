"""The keys and values of past tokens, kept in generation so that each is computed once.

The cache belongs to the caller and is an argument of the model, which stays stateless. Its tensors
are allocated once; appending writes into them and returns views. The ids are kept as well: a model
may add embeddings of previous tokens, and a caller can see what the cache holds.

Legend: B batch, T new tokens, S keys (past and new), G KV heads, D head width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nanogpt_surgery.arguments import check_arguments
from nanogpt_surgery.errors import SurgeryError
from nanogpt_surgery.model.config import GPTConfig


class LayerCache:
    """The keys and values of one layer."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | str):
        self.keys = torch.empty(shape, dtype=dtype, device=device)
        self.values = torch.empty(shape, dtype=dtype, device=device)
        self.length = 0

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Adds keys and values (B, G, T, D), and returns all so far, (B, G, S, D)."""
        end = self.length + keys.size(2)
        self.keys[:, :, self.length : end] = keys
        self.values[:, :, self.length : end] = values
        self.length = end
        return self.keys[:, :, :end], self.values[:, :, :end]


class KVCache:
    """One `LayerCache` for each block of a model, and the ids.

    Args:
        config: the model's config.
        batch_size: rows, B.
        max_length: tokens there is room for; `config.block_size` by default.
        dtype: of the keys and values; the model's, usually.
        device: where they lie.
    """

    @check_arguments
    def __init__(
        self,
        config: GPTConfig,
        batch_size: int = 1,
        max_length: int | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ):
        self.max_length = config.block_size if max_length is None else max_length
        if self.max_length > config.block_size:
            raise SurgeryError(
                f"a cache of {self.max_length} tokens exceeds the model's block_size of "
                f"{config.block_size}"
            )
        self.batch_size = batch_size
        self.ids = torch.zeros(batch_size, self.max_length, dtype=torch.long, device=device)
        shape = (batch_size, config.n_kv_head, self.max_length, config.head_dim)
        self.layers = [LayerCache(shape, dtype, device) for _ in range(config.n_layer)]

    @property
    def length(self) -> int:
        """Number of tokens in the cache, S: in its last layer, if a pass was interrupted."""
        return self.layers[-1].length

    def append_ids(self, new: Tensor) -> Tensor:
        """Adds ids (B, T) whose keys and values come next, and returns all so far, (B, S).

        They count in `length` once the layers have appended those keys and values.
        """
        end = self.length + new.size(1)
        self.ids[:, self.length : end] = new
        return self.ids[:, :end]

    def truncate(self, length: int) -> None:
        """Forgets every token from position `length` on."""
        assert 0 <= length <= self.length, f"cannot truncate {self.length} tokens to {length}"
        for layer in self.layers:
            layer.length = length

    def check_room(self, batch_size: int, n_tokens: int, n_layer: int | None = None) -> None:
        """Raises `SurgeryError` unless (batch_size, n_tokens) more ids fit, of so many layers."""
        if n_layer not in (None, len(self.layers)):
            raise SurgeryError(
                f"the cache was made for {len(self.layers)} layers, and the model has {n_layer}",
                "an operation on the structure needs a new KVCache(model.config)",
            )
        if batch_size != self.batch_size:
            raise SurgeryError(
                f"{batch_size} rows of ids, but the cache was made for {self.batch_size}"
            )
        if self.length + n_tokens > self.max_length:
            raise SurgeryError(
                f"{self.length} tokens in the cache and {n_tokens} new ones exceed its room for "
                f"{self.max_length}",
                "generate() slides the window; or make a larger KVCache",
            )
