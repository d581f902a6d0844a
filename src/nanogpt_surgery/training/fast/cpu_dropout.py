"""Dropout (arXiv:1207.0580) as a CPU does it fast.

PyTorch draws a float for each number on a CPU, one after another; here an int64 decides over four
numbers, by 16 bits each.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

LEVELS = 2**16


class Dropout(nn.Dropout):
    """`nn.Dropout` with the probability rounded to a multiple of 1/65536."""

    def forward(self, x: Tensor) -> Tensor:
        """(…) → (…), in training with some numbers zero and the others larger."""
        if not self.training or not self.p:
            return super().forward(x)
        return x.masked_fill(dropped(x, self.p), 0) * gain(self.p)


def dropped(x: Tensor, probability: float) -> Tensor:
    """Which numbers of a tensor to drop, bool, drawn from PyTorch's global generator."""
    return random_bits(x.shape) < level_of(probability)


def random_bits(shape: torch.Size, generator: torch.Generator | None = None) -> Tensor:
    """Draws integers from −32768 to 32767."""
    size = shape.numel()
    drawn = torch.randint(-(2**63), 2**63 - 1, (-(-size // 4),), generator=generator)
    return drawn.view(torch.int16)[:size].view(shape)


def level_of(probability: float) -> int:
    """Returns below which of the random integers a number is dropped."""
    return min(round(probability * LEVELS), LEVELS - 1) - LEVELS // 2


def gain(probability: float) -> float:
    """Returns the factor of the numbers that stay, which keeps the expected sum."""
    return LEVELS / (LEVELS // 2 - level_of(probability))
