"""The whole model: embeddings, a stack of blocks, a norm, a head.

    ids ─ embed_tokens ─ embed_prev_tokens ─ embed_positions ─ layers ─ norm ─ lm_head ─ logits

Submodules and Linears carry Hugging Face's names. There is one model for every family: what
differs is settled by the constructors of its parts, from `GPTConfig`.

Legend: B batch, T tokens, S tokens so far (past and new), C width, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from nanogpt_surgery.errors import SurgeryError
from nanogpt_surgery.model.config import GPTConfig
from nanogpt_surgery.model.embeddings import (
    PrevTokenEmbeddings,
    Rotation,
    identity,
    make_positions,
)
from nanogpt_surgery.model.transformer_encoder_layer import TransformerEncoderLayer, make_norm

if TYPE_CHECKING:
    from nanogpt_surgery.model.kv_cache import KVCache
    from nanogpt_surgery.model.layout import Layout


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

    journaled = ("config",)  # operations on the structure replace it, and undo brings it back

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
        self.embed_prev_tokens = PrevTokenEmbeddings(config) if config.n_prev_tokens else identity
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
        """Returns a new model of this config, freshly initialised."""
        values = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
        return cls(**values)

    @property
    def n_parameters(self) -> int:
        """Number of distinct weights of the model as built, before any surgery."""
        return self.config.n_parameters

    def forward(
        self, ids: Tensor, cache: KVCache | None = None, layout: Layout | None = None
    ) -> Tensor:
        """Returns logits (B, T, V) for ids (B, T).

        Args:
            ids: token ids, int64.
            cache: the ids follow the tokens that it holds, and are added to it.
            layout: positions (B, T) and a mask (B, 1, T, S), for rows that are not one text each
                from the first column on: several texts in a row, or padding before one.

        Raises:
            SurgeryError: the context is longer than `block_size`, or than the cache has room for,
                or the cache has another number of layers.
        """
        return self.lm_head(self.hidden(ids, cache, layout))  # (B, T, V)

    def hidden(
        self, ids: Tensor, cache: KVCache | None = None, layout: Layout | None = None
    ) -> Tensor:
        """Returns the head's input, (B, T, C), after the final norm; see `forward`.

        Generation takes this and puts the last token alone through the head.
        """
        self._check_ids(ids, cache)
        start = 0 if cache is None else cache.length
        if layout is None:
            positions, mask = torch.arange(start, start + ids.size(1), device=ids.device), None
        else:
            positions, mask = layout.positions, layout.mask  # (B, T), (B, 1, T, S)
        x, rotation = self.embed(ids, positions, cache)  # (B, T, C)
        x = self.dropout(x)
        for index, layer in enumerate(self.layers):
            x = layer(x, rotation, cache.layers[index] if cache is not None else None, mask)
        return self.norm(x)

    def embed(
        self, ids: Tensor, positions: Tensor, cache: KVCache | None = None
    ) -> tuple[Tensor, Rotation | None]:
        """Returns the first block's input, (B, T, C), and the rotation that all blocks use."""
        so_far = ids if cache is None else cache.append_ids(ids)  # (B, S)
        x = self.embed_prev_tokens(self.embed_tokens(ids), so_far, positions)  # (B, T, C)
        return self.embed_positions(x, positions)

    def _check_ids(self, ids: Tensor, cache: KVCache | None) -> None:
        if ids.dim() != 2:
            raise SurgeryError(
                f"ids have the shape {tuple(ids.shape)}; the model takes (batch, tokens)",
                "a single row becomes a batch of one with ids[None]",
            )
        if cache is not None:
            cache.check_room(ids.size(0), ids.size(1), len(self.layers))
        elif ids.size(1) > self.config.block_size:
            raise SurgeryError(
                f"{ids.size(1)} tokens exceed the model's block_size of {self.config.block_size}"
            )


def initialise(model: nn.Module, config: GPTConfig) -> None:
    """Draws every weight of a `SimpleGPT` anew, in place, from torch's global generator.

    | weight                                    | drawn from                                      |
    |-------------------------------------------|-------------------------------------------------|
    | embeddings                                | normal, deviation 0.02 (GPT-2)                  |
    | projections into attention, feed-forward  | normal, deviation 0.5 / √C: GPT-2's 0.02 at its |
    |                                           | width, in proportion at others (docs/log.md)    |
    | `o_proj`, `down_proj`                     | the same / √(2 · layers): 2 · layers branches   |
    |                                           | add up in the residual stream (GPT-2)           |
    | the head, and the embedding tied to it    | normal, deviation min(0.02, 0.2 / √C): logits   |
    |                                           | start near 0, so the first loss is near ln V    |
    | biases                                    | 0                                               |
    | weights of norms                          | 1                                               |
    """
    # A tied head is named once, as `embed_tokens.weight`.
    matrix_std = 0.5 / math.sqrt(config.n_embd)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.zeros_(parameter)
        elif parameter.dim() == 1:
            nn.init.ones_(parameter)
        elif name == "lm_head.weight" or (config.tie_head and name == "embed_tokens.weight"):
            nn.init.normal_(parameter, std=min(0.02, 0.2 / math.sqrt(config.n_embd)))
        elif name.startswith("embed_"):
            nn.init.normal_(parameter, std=0.02)
        elif name.endswith(("o_proj.weight", "down_proj.weight")):
            nn.init.normal_(parameter, std=matrix_std / math.sqrt(2 * config.n_layer))
        else:
            nn.init.normal_(parameter, std=matrix_std)
