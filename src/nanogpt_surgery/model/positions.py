"""How a model knows the order of its tokens: a learned table, or a rotation.

Learned positions are added to the embedding once. Rotary positions (RoFormer, arXiv:2104.09864)
turn each pair of numbers in a query or key by an angle proportional to its position, so that the
product of a query and a key depends on their distance alone:

    angle(position, pair i) = position · θ^(−2i / D)         pair i = numbers i and i + D/2

Legend: B batch, T tokens, C width, H heads, D head width.
"""

from __future__ import annotations

import math
from typing import TypeAlias

import torch
from torch import Tensor, nn

from nanogpt_surgery.model.config import GPTConfig, RopeScaling

Rotation: TypeAlias = tuple[Tensor, Tensor]  # cosines and sines, (T, D) or (B, 1, T, D) each


class LearnedPositions(nn.Embedding):
    """A table with a row for each position, added to the token embedding; it rotates nothing."""

    def __init__(self, config: GPTConfig):
        super().__init__(config.block_size, config.n_embd)

    def forward(self, x: Tensor, positions: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        """(B, T, C) embeddings and (T,) positions → (B, T, C) and no rotation."""
        return x + super().forward(positions), None


class RotaryPositions(nn.Module):
    """The angles by which attention turns queries and keys; the embedding passes unchanged."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        # A plain attribute: `.to(bfloat16)` must not round it, nor a meta device swallow it.
        self.frequencies = rotary_frequencies(config)
        self._there: dict[torch.device, Tensor] = {}  # copied once: each copy makes a GPU wait

    def forward(self, x: Tensor, positions: Tensor) -> tuple[Tensor, Rotation]:
        """(B, T, C) embeddings and positions → (B, T, C) and the rotation, in x's dtype.

        Positions (T,) are those of every row; those of (B, T) are each row's own.
        """
        if x.device not in self._there:
            self._there[x.device] = self.frequencies.to(x.device)
        angles = positions.float()[..., None] * self._there[x.device]  # (T, D/2)
        angles = torch.cat((angles, angles), dim=-1)  # (T, D)
        if positions.dim() == 2:
            angles = angles[:, None]  # (B, 1, T, D), the same for every head
        return x, (angles.cos().to(x.dtype), angles.sin().to(x.dtype))


def make_positions(config: GPTConfig) -> nn.Module:
    """The config's way of telling positions."""
    return RotaryPositions(config) if config.positions == "rotary" else LearnedPositions(config)


def rotary_frequencies(config: GPTConfig) -> Tensor:
    """Radians a token for each pair, (D/2) float32, on the CPU."""
    exponents = torch.arange(0, config.head_dim, 2, device="cpu").float() / config.head_dim
    frequencies = 1.0 / config.rope_theta**exponents
    return stretch(frequencies, config.rope_scaling) if config.rope_scaling else frequencies


def stretch(frequencies: Tensor, scaling: RopeScaling) -> Tensor:
    """Linear scaling slows all waves by `factor`, Llama 3's long ones, with a ramp between."""
    if scaling.rope_type == "linear":
        return frequencies / scaling.factor
    turns = scaling.original_max_position_embeddings * frequencies / (2 * math.pi)
    kept = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    kept = kept.clamp(0, 1)
    return frequencies * (kept + (1 - kept) / scaling.factor)


def rotate(x: Tensor, rotation: Rotation) -> Tensor:
    """Turn each pair of (B, H, T, D) queries or keys by its angle."""
    cos, sin = rotation
    first, second = x.chunk(2, dim=-1)  # (B, H, T, D/2) each
    return x * cos + torch.cat((-second, first), dim=-1) * sin


def leave(x: Tensor, rotation: None) -> Tensor:
    """The rotation of a model with learned positions: none."""
    return x
