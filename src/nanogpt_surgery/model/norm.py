"""The two normalisations: LayerNorm is PyTorch's, RMSNorm is written out."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from nanogpt_surgery.model.config import GPTConfig


class RMSNorm(nn.Module):
    """Divide by the root mean square, multiply by a learned weight (arXiv:1910.07467).

    Works in float32 and casts back before the weight, as Llama's does. Shape (…, width) → same.
    """

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last dimension."""
        y = x.float()
        y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * y.to(x.dtype)

    def extra_repr(self) -> str:
        """What `print(model)` shows."""
        return f"{self.weight.numel()}, eps={self.eps}"


def make_norm(config: GPTConfig) -> nn.Module:
    """The config's norm over the residual stream, (…, C) → (…, C)."""
    if config.norm == "rmsnorm":
        return RMSNorm(config.n_embd, config.norm_eps)
    return nn.LayerNorm(config.n_embd, config.norm_eps, bias=config.bias == "all")
