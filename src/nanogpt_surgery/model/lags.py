"""The tokens just before each one, told to the model at its entrance.

A language model's first layers spend themselves on finding out which tokens came just before. Here
a token's embedding is joined by those of its predecessors, each distance having a table of its own:
a causal convolution over one-hot ids, that costs lookups and no products.

    x(t) = E₀[id(t)] + E₁[id(t − 1)] + E₂[id(t − 2)] + …

Legend: B batch, T tokens, S tokens so far (past and new), C width.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from nanogpt_surgery.model.config import GPTConfig


class LaggedEmbeddings(nn.ModuleList):
    """A table for each distance; what lies before position 0 adds nothing."""

    def __init__(self, config: GPTConfig):
        tables = (nn.Embedding(config.vocab_size, config.n_embd) for _ in range(config.n_lags))
        super().__init__(tables)

    def forward(self, x: Tensor, ids: Tensor, positions: Tensor) -> Tensor:
        """(B, T, C), the ids (B, S) so far and the positions of the last T → (B, T, C).

        Positions (T,) or (B, T) count from the beginning of each text.
        """
        new = slice(ids.size(1) - x.size(1), ids.size(1))
        for lag, table in enumerate(self, 1):
            earlier = F.pad(ids, (lag, 0))[:, new]  # (B, T)
            x = x + table(earlier) * (positions >= lag).to(x.dtype).unsqueeze(-1)  # (B, T, C)
        return x


def tell_nothing(x: Tensor, ids: Tensor, positions: Tensor) -> Tensor:
    """The entrance of a model that is told each token alone."""
    return x


def make_lags(config: GPTConfig) -> Any:
    """The config's way of telling earlier tokens."""
    return LaggedEmbeddings(config) if config.n_lags else tell_nothing
