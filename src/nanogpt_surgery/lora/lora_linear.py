"""A linear layer with a low-rank update beside it (LoRA, arXiv:2106.09685).

    y = W x + b  +  (α / r) · B A x            A (R, in), B (out, R), W (out, in) and b frozen

A is drawn at random and B is zero, so the layer is born changing nothing; training moves A and B
alone. Legend: R rank.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanogpt_surgery.errors import SurgeryError


class LoRALinear(nn.Module):
    """Wraps an `nn.Linear`, which it freezes and leaves as it is.

    Args:
        original_layer: the layer to adapt; it keeps its own tensors.
        rank: R, the rank of the update.
        alpha: α; the update is scaled by α / R.
        dropout: probability of zeroing an input of the update (not of the layer) in training.

    Raises:
        SurgeryError: the rank is below 1, the dropout is not a probability, or the layer is not an
            `nn.Linear`. The layer is untouched then.
    """

    def __init__(
        self, original_layer: nn.Linear, rank: int = 8, alpha: float = 16, dropout: float = 0.0
    ):
        super().__init__()
        if not isinstance(original_layer, nn.Linear):
            raise SurgeryError(
                f"LoRALinear wraps an nn.Linear, not a {type(original_layer).__name__}"
            )
        if rank < 1:
            raise SurgeryError(f"the rank of a LoRA is {rank}; it must be at least 1")
        if not 0 <= dropout < 1:
            raise SurgeryError(f"the dropout of a LoRA is {dropout}; it must be in [0, 1)")
        weight = original_layer.weight
        self.original_layer = original_layer.requires_grad_(False)
        self.lora_A = nn.Parameter(torch.empty(rank, weight.size(1), device=weight.device))
        self.lora_B = nn.Parameter(torch.zeros(weight.size(0), rank, device=weight.device))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        self.rank = rank
        self.alpha = alpha
        self.scaling = alpha / rank
        self.dropout = nn.Dropout(dropout)
        self.enabled = True

    def forward(self, x: Tensor) -> Tensor:
        """(…, in) → (…, out)."""
        y: Tensor = self.original_layer(x)
        if not self.enabled:
            return y
        down = F.linear(self.dropout(x), self.lora_A.to(x.dtype))  # (…, in) → (…, R)
        return y + self.scaling * F.linear(down, self.lora_B.to(x.dtype))  # (…, R) → (…, out)

    def delta_weight(self) -> Tensor:
        """ΔW = (α / R) · B A, what the update adds to the weight: (out, in), float32."""
        return self.scaling * (self.lora_B.detach().float() @ self.lora_A.detach().float())

    def merged_layer(self) -> nn.Linear:
        """A new `nn.Linear` with W + ΔW, added in float32 and rounded once to W's dtype."""
        original = self.original_layer
        merged = nn.Linear(original.in_features, original.out_features, bias=False, device="meta")
        weight = (original.weight.detach().float() + self.delta_weight()).to(original.weight.dtype)
        merged.weight = nn.Parameter(weight)
        merged.bias = original.bias
        return merged.train(original.training)

    def extra_repr(self) -> str:
        """What `print(model)` shows."""
        return f"rank={self.rank}, alpha={self.alpha}" + ("" if self.enabled else ", disabled")
