"""An embedding with a low-rank update beside it.

The row of an id is its one-hot vector times the table, so the update is the same B A, with a lookup
in the place of the first product:

    y = E[id]  +  s · B A[:, id]        A (R, V), B (C, R), s = α / R; E (V, C) frozen

Here A is zero at birth and B is drawn at random, as PEFT has it. The column of the table's
`padding_idx` takes no gradient, as its row takes none. Legend: R rank, V ids, C width.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanogpt_surgery.lora.layer import MatrixLayer
from nanogpt_surgery.lora.linear import LoRAUpdate
from nanogpt_surgery.lora.update import Update


class LoRAEmbeddingUpdate(Update):
    """ΔE = (s · B A)ᵀ; the arguments are those of `LoRAUpdate`."""

    def __init__(self, layer: nn.Embedding, rank: int, alpha: float, dropout: float):
        super().__init__(rank, alpha, dropout)
        ids, width = layer.weight.shape
        self.lora_A = nn.Parameter(torch.zeros(rank, ids, device=layer.weight.device))
        self.lora_B = nn.Parameter(torch.randn(width, rank, device=layer.weight.device))

    def forward(self, x: Tensor, y: Tensor, layer: nn.Module) -> Tensor:
        """What is added to the rows y (…, C) of the ids x (…)."""
        a, b = self.factors()
        padding: Any = layer.padding_idx
        down = F.embedding(x, a.t().to(y.dtype), padding_idx=padding)  # (…) → (…, R)
        kept = self.dropout(torch.ones_like(down[..., :1]))  # an input is a whole id
        return self.scaling * F.linear(down * kept, b.to(y.dtype))  # (…, R) → (…, C)

    def moved(self) -> bool:
        """Whether A, which is zero at birth, is not."""
        return bool(self.lora_A.detach().any())


class TiedEmbeddingUpdate(LoRAEmbeddingUpdate):
    """The update of a head, seen from the embedding that shares its matrix: the same A and B.

    The head's ΔW is s · B A, (V, C), and so is the embedding's.
    """

    def __init__(self, of: LoRAUpdate):
        Update.__init__(self, of.rank, of.alpha, of.dropout.p)
        self.lora_A, self.lora_B, self.scaling = of.lora_A, of.lora_B, of.scaling

    def factors(self) -> tuple[Tensor, Tensor]:
        """Bᵀ (R, V) and Aᵀ (C, R) of the head."""
        return self.lora_B.t(), self.lora_A.t()

    def delta_weight(self, layer: nn.Module) -> Tensor:
        """The head's ΔW, to the bit, so that a merge leaves the two tied."""
        return self.scaling * (self.lora_B.detach().float() @ self.lora_A.detach().float())

    def moved(self) -> bool:
        """Whether B, which is zero at birth, is not."""
        return Update.moved(self)


class LoRAEmbedding(MatrixLayer):
    """Wraps an `nn.Embedding`, which it freezes and leaves as it is."""

    def forward(self, ids: Tensor) -> Tensor:
        """(…) → (…, C)."""
        y: Tensor = self.original_layer(ids)
        return self.mixture(self, ids, y) if self.enabled else y

    def down_by_row(self, x: Tensor, a: Tensor, index: Tensor) -> Tensor:
        """The columns of the ids (B, …) in the A of each row's adapter, (N, R, V) → (B, …, R)."""
        which = index.view(-1, *[1] * (x.dim() - 1)).expand_as(x)
        down = a.transpose(1, 2)[which, x]
        padding = self.original_layer.padding_idx
        if padding is None:
            return down
        return torch.where((x == padding)[..., None], down.detach(), down)

    def with_weight(self, weight: nn.Parameter) -> nn.Embedding:
        """A plain embedding like the original, with another table."""
        original = self.original_layer
        layer = nn.Embedding(
            weight.size(0),
            weight.size(1),
            padding_idx=original.padding_idx,
            scale_grad_by_freq=original.scale_grad_by_freq,
            sparse=original.sparse,
            device="meta",
        )
        layer.weight = weight
        return layer.train(original.training)
