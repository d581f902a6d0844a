"""The whole model: embeddings, a stack of blocks, a norm, a head.

    ids ── embed_tokens ── lags ── positions ── layers × n_layer ── norm ── lm_head ── logits

Submodules and Linears carry Hugging Face's names. There is one model for every family: what
differs is settled by the constructors of its parts, from `GPTConfig`.

Legend: B batch, T tokens, C width, V vocabulary.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn

from nanogpt_surgery.errors import SurgeryError
from nanogpt_surgery.model.config import GPTConfig
from nanogpt_surgery.model.initialisation import initialise
from nanogpt_surgery.model.kv_cache import KVCache
from nanogpt_surgery.model.lags import make_lags
from nanogpt_surgery.model.layout import Layout
from nanogpt_surgery.model.norm import make_norm
from nanogpt_surgery.model.positions import make_positions
from nanogpt_surgery.model.transformer_encoder_layer import TransformerEncoderLayer


class SimpleGPT(nn.Module):
    """A decoder-style GPT. Called on ids (B, T) it gives logits (B, T, V), and nothing else.

    Args:
        vocab_size: number of token ids, V.
        n_embd: width, C.
        n_head: query heads, H.
        n_layer: blocks.
        block_size: longest context in tokens.
        **axes: any other field of `GPTConfig`; the default is GPT-2's anatomy.

    Raises:
        SurgeryError: the values contradict each other (all contradictions at once).
    """

    def __init__(
        self,
        vocab_size: int,
        n_embd: int = 128,
        n_head: int = 4,
        n_layer: int = 4,
        block_size: int = 256,
        **axes: Any,
    ):
        super().__init__()
        config = GPTConfig(vocab_size, n_embd, n_head, n_layer, block_size, **axes)
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.n_embd)
        self.embed_lags: Any = make_lags(config)
        self.embed_positions = make_positions(config)
        self.dropout = nn.Dropout(config.dropout)
        self.layers = nn.ModuleList(TransformerEncoderLayer(config) for _ in range(config.n_layer))
        self.norm = make_norm(config)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        if config.tie_head:
            self.lm_head.weight = self.embed_tokens.weight
        initialise(self, config)

    @classmethod
    def from_config(cls, config: GPTConfig) -> SimpleGPT:
        """A new model of this config, freshly initialised."""
        values = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
        return cls(**values)

    @property
    def n_parameters(self) -> int:
        """Number of distinct weights of the model as built, before any surgery."""
        return self.config.n_parameters

    def forward(
        self, ids: Tensor, cache: KVCache | None = None, layout: Layout | None = None
    ) -> Tensor:
        """Logits (B, T, V) for ids (B, T); with a cache, the ids follow the tokens it holds.

        A layout says so where a row is not one text from its first column on.

        Raises:
            SurgeryError: the context is longer than `block_size`, or than the cache has room for.
        """
        logits: Tensor = self.lm_head(self.hidden(ids, cache, layout))
        return logits

    def hidden(
        self, ids: Tensor, cache: KVCache | None = None, layout: Layout | None = None
    ) -> Tensor:
        """What the head reads: (B, T, C), after the final norm."""
        start = self._start(ids, cache)
        positions = torch.arange(start, start + ids.size(1), device=ids.device)  # (T,)
        mask = None
        if layout is not None:
            positions, mask = layout.positions, layout.mask  # (B, T), (B, 1, T, S)
        x, rotation = self.embed(ids, positions, cache)  # (B, T, C)
        x = self.dropout(x)
        for index, layer in enumerate(self.layers):
            x = layer(x, rotation, cache.layers[index] if cache is not None else None, mask)
        out: Tensor = self.norm(x)
        return out

    def embed(
        self, ids: Tensor, positions: Tensor, cache: KVCache | None = None
    ) -> tuple[Tensor, Any]:
        """What the first block reads: (B, T, C), and the rotation that blocks are given."""
        texts = ids if cache is None else cache.ids_with(ids)  # (B, S)
        x = self.embed_lags(self.embed_tokens(ids), texts, positions)  # (B, T, C)
        embedded: tuple[Tensor, Any] = self.embed_positions(x, positions)
        return embedded

    def _start(self, ids: Tensor, cache: KVCache | None) -> int:
        if ids.dim() != 2:
            raise SurgeryError(
                f"ids have the shape {tuple(ids.shape)}; the model takes (batch, tokens)",
                "a single row becomes a batch of one with ids[None]",
            )
        if cache is not None:
            cache.check_room(*ids.shape)
            return cache.length
        if ids.size(1) > self.config.block_size:
            raise SurgeryError(
                f"{ids.size(1)} tokens exceed the model's block_size of {self.config.block_size}"
            )
        return 0
