"""An embedding with a low-rank update beside it.

The row of an id is its one-hot vector times the table, so the update is the same B A, with a lookup
in the place of the first product:

    y = E[id]  +  s · B A[:, id]        A (R, V), B (C, R), s = α / R; E (V, C) frozen

Here A is zero at first and B is drawn at random, as PEFT has it. The column of the table's
`padding_idx` takes no gradient, as its row takes none. Legend: R rank, V ids, C width.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanogpt_surgery.lora.layer import LoRALayer
from nanogpt_surgery.lora.linear import LoRAUpdate


class LoRAEmbeddingUpdate(LoRAUpdate):
    """ΔE = (s · B A)ᵀ; the arguments are those of `LoRAUpdate`."""

    def initial_factors(self, layer: Any) -> tuple[Tensor, Tensor]:
        """A zero and B at random, so that ΔE is zero."""
        (ids, width), device = layer.weight.shape, layer.weight.device
        a = torch.zeros(self.rank, ids, device=device)
        return a, torch.randn(width, self.rank, device=device)

    def forward(self, x: Tensor, y: Tensor, layer: nn.Module) -> Tensor:
        """Returns what is added to the rows y (…, C) of the ids x (…)."""
        a, b = self.factors()
        padding: Any = layer.padding_idx
        down = F.embedding(x, a.t().to(y.dtype), padding_idx=padding)  # (…) → (…, R)
        kept = self.dropout(torch.ones_like(down[..., :1]))  # an input is a whole id
        return self.scaling * F.linear(down * kept, b.to(y.dtype))  # (…, R) → (…, C)

    def delta_weight(self, layer: nn.Module) -> Tensor:
        """ΔE, (V, C), float32."""
        return self.product().t()

    def wrapper(self) -> type[LoRALayer]:
        """The class of layer that it is put in."""
        return LoRAEmbedding


class TiedEmbeddingUpdate(LoRAEmbeddingUpdate):
    """The update of a head, for the embedding that shares its matrix: the same A and B.

    The head's ΔW is s · B A, (V, C), and so is the embedding's.
    """

    def __init__(self, of: LoRAUpdate):
        nn.Module.__init__(self)
        self.rank, self.alpha, self.scaling = of.rank, of.alpha, of.scaling
        self.dropout = nn.Dropout(of.dropout.p)
        self.lora_A, self.lora_B = of.lora_A, of.lora_B

    def factors(self) -> tuple[Tensor, Tensor]:
        """Bᵀ (R, V) and Aᵀ (C, R) of the head."""
        return self.lora_B.t(), self.lora_A.t()

    def delta_weight(self, layer: nn.Module) -> Tensor:
        """The head's ΔW, to the bit, so that a merge leaves the two tied."""
        return self.scaling * (self.lora_B.detach().float() @ self.lora_A.detach().float())


class LoRAEmbedding(LoRALayer):
    """Wraps an `nn.Embedding`, which it freezes and leaves as it is."""

    def forward(self, ids: Tensor) -> Tensor:
        """Returns y = E[id] + s · B A[:, id], (…) → (…, C)."""
        y: Tensor = self.original_layer(ids)
        return self.active(self, ids, y) if self.enabled else y
