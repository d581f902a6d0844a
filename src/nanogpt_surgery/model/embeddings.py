"""How a model knows the order of its tokens: positions, and the tokens just before each one.

Learned positions are added to the embedding once. Rotary positions (RoFormer, arXiv:2104.09864)
turn each pair of numbers in a query or key by an angle proportional to its position, so that the
product of a query and a key depends on their distance alone:

    angle(position, pair i) = position · θ^(−2i / D)         pair i = numbers i and i + D/2

A model may also add embeddings of the previous tokens to each token's, with a table for each
distance, so that its first layers need not find out which tokens came just before. (That is a
causal convolution over one-hot ids, done by lookups.)

    x(t) = E₀[id(t)] + E₁[id(t − 1)] + E₂[id(t − 2)] + …

Legend: B batch, T tokens, S tokens so far (past and new), C width, H heads, D head width.
"""

from __future__ import annotations

from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanogpt_surgery.model.config import GPTConfig
from nanogpt_surgery.model.rope_scaling import scale_rope_frequencies

Rotation: TypeAlias = tuple[Tensor, Tensor]  # cosines and sines, (T, D) or (B, 1, T, D) each


def make_positions(config: GPTConfig) -> nn.Module:
    """Returns the kind of positions that a config chooses.

    The module is called on embeddings (B, T, C) and positions, (T,) for all rows or (B, T). It
    returns the embeddings, and the rotation of queries and keys, or None.
    """
    return RotaryPositions(config) if config.positions == "rotary" else LearnedPositions(config)


class LearnedPositions(nn.Embedding):
    """A table with a row for each position, added to the token embedding; it rotates nothing."""

    def __init__(self, config: GPTConfig):
        super().__init__(config.block_size, config.n_embd)

    def forward(self, x: Tensor, positions: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        """Adds the rows of the positions; see `make_positions`."""
        return x + super().forward(positions), None  # (B, T, C)


class RotaryPositions(nn.Module):
    """The angles by which attention turns queries and keys; the embedding passes unchanged."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        # No buffer: `model.to(torch.bfloat16)` would round it.
        self.frequencies = rotary_frequencies(config)  # (D/2,)
        self._on_device: dict[torch.device, Tensor] = {}  # copied once: a copy makes a GPU wait

    def forward(self, x: Tensor, positions: Tensor) -> tuple[Tensor, Rotation]:
        """Computes cosines and sines in float32, and gives them in x's dtype."""
        if x.device not in self._on_device:
            self._on_device[x.device] = self.frequencies.to(x.device)
        angles = positions.float()[..., None] * self._on_device[x.device]  # (T, D/2)
        angles = torch.cat((angles, angles), dim=-1)  # (T, D)
        if positions.dim() == 2:
            angles = angles[:, None]  # (B, 1, T, D), the same for every head
        return x, (angles.cos().to(x.dtype), angles.sin().to(x.dtype))


def rotate(x: Tensor, rotation: Rotation) -> Tensor:
    """Turns each pair of (B, H, T, D) queries or keys by its angle."""
    cos, sin = rotation
    first, second = x.chunk(2, dim=-1)  # (B, H, T, D/2) each
    return x * cos + torch.cat((-second, first), dim=-1) * sin  # (B, H, T, D)


def rotary_frequencies(config: GPTConfig) -> Tensor:
    """Returns θ^(−2i / D), radians a token, for each pair i: (D/2,) float32."""
    # On the CPU, even where the model is made without numbers (on the meta device).
    even = torch.arange(0, config.head_dim, 2, device="cpu").float()  # 2i, (D/2,)
    frequencies = 1.0 / config.rope_theta ** (even / config.head_dim)
    if config.rope_scaling:
        return scale_rope_frequencies(frequencies, config.rope_scaling)
    return frequencies


class PrevTokenEmbeddings(nn.ModuleList):
    """Adds embeddings of the previous n tokens to each token's embedding."""

    def __init__(self, config: GPTConfig):
        n, size = config.n_prev_tokens, (config.vocab_size, config.n_embd)
        super().__init__(nn.Embedding(*size) for _ in range(n))

    def forward(self, x: Tensor, ids: Tensor, positions: Tensor) -> Tensor:
        """Adds to x (B, T, C) the embeddings of the tokens before each of its T tokens.

        `ids` (B, S) are all so far; the last T are those of x, at `positions` (T,) or (B, T).
        Before position 0 there is no token, and nothing is added.
        """
        new = slice(ids.size(1) - x.size(1), ids.size(1))
        for distance, table in enumerate(self, 1):
            previous = F.pad(ids, (distance, 0))[:, new]  # (B, T)
            is_there = (positions >= distance).to(x.dtype).unsqueeze(-1)  # (T, 1) or (B, T, 1)
            x = x + table(previous) * is_there  # (B, T, C)
        return x


def identity(x: Tensor, *_: object) -> Tensor:
    """Returns x: where a config chooses no rotation, or no previous tokens."""
    return x
