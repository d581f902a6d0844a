"""A linear layer with a low-rank update beside it (LoRA, arXiv:2106.09685).

    y = W x + b  +  s · B A x        A (R, in), B (out, R), s = α / R; W (out, in) and b frozen

A is drawn at random and B is zero, so at first nothing changes; training moves A and B alone.
`LoRAUpdate` is the last term, `LoRALinear` the whole line. In files of their own are the layer that
can carry several updates (layer.py, active.py), embeddings (embedding.py), and other kinds of
update, such as DoRA, PiSSA and modules trained whole (variants.py).

Legend: R rank.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanogpt_surgery.errors import SurgeryError
from nanogpt_surgery.lora.active import WeightedAdapters
from nanogpt_surgery.lora.layer import LoRALayer
from nanogpt_surgery.lora.settings import LoRASettings


class LoRAUpdate(nn.Module):
    """ΔW = s · B A: two thin matrices and a scale.

    Args:
        layer: the layer it belongs to, which gives shape and device.
        rank: R.
        alpha: α; the scale is α / R.
        dropout: probability of zeroing an input of the update in training.
    """

    def __init__(self, layer: nn.Module, rank: int, alpha: float, dropout: float = 0.0):
        super().__init__()
        self.rank, self.alpha, self.scaling = rank, alpha, alpha / rank
        self.dropout = nn.Dropout(dropout)
        a, b = self.initial_factors(layer)
        self.lora_A = nn.Parameter(a)  # (R, in)
        self.lora_B = nn.Parameter(b)  # (out, R)

    def initial_factors(self, layer: Any) -> tuple[Tensor, Tensor]:
        """Returns A at random and B zero, so that ΔW is zero."""
        (out_features, in_features), device = layer.weight.shape, layer.weight.device
        a = torch.empty(self.rank, in_features, device=device)
        nn.init.kaiming_uniform_(a, a=math.sqrt(5))  # as `nn.Linear` begins its weight
        return a, torch.zeros(out_features, self.rank, device=device)

    def low_rank(self, x: Tensor) -> Tensor:
        """Returns B A x, (…, in) → (…, out)."""
        down = F.linear(self.dropout(x), self.lora_A.to(x.dtype))  # (…, R)
        return F.linear(down, self.lora_B.to(x.dtype))  # (…, out)

    def forward(self, x: Tensor, y: Tensor, layer: nn.Module) -> Tensor:
        """Returns what is added to the layer's output y (…, out) for its input x: (…, out).

        A plain update needs x alone; DoRA's depends on y and on the layer's weight too.
        """
        return self.scaling * self.low_rank(x)

    # The rest is asked by merging, saving and the checks; other kinds of update answer otherwise.

    def factors(self) -> tuple[Tensor, Tensor]:
        """Returns A (R, in) and B (out, R), such that ΔW = s · B A."""
        return self.lora_A, self.lora_B

    def product(self) -> Tensor:
        """Returns the matrix s · B A, (out, in), float32, without gradient."""
        a, b = (factor.detach().float() for factor in self.factors())
        return self.scaling * (b @ a)

    def delta_weight(self, layer: nn.Module) -> Tensor:
        """Returns ΔW in the layout of the layer's weight, float32."""
        return self.product()

    def trainable(self) -> list[nn.Parameter]:
        """Returns the parameters that training moves; other kinds hold frozen ones besides."""
        return [self.lora_A, self.lora_B]

    def moved(self) -> bool:
        """Returns whether the update adds anything, as it does not before training."""
        return bool(self.lora_A.detach().any() and self.lora_B.detach().any())

    def wrapper(self) -> type[LoRALayer]:
        """Returns the class that wraps a layer to hold such an update."""
        return LoRALinear

    def extra_repr(self) -> str:
        """Returns the text that `print(model)` shows."""
        return f"rank={self.rank}, alpha={self.alpha}, scaling={self.scaling:.4g}"


class LoRALinear(LoRALayer):
    """Wraps an `nn.Linear`, which it freezes and leaves as it is.

    From `LoRALayer` it has `original_layer`; `updates`, one for each adapter by its name; `active`,
    which says which of them take part; and `enabled`. A new one has one update, named "default".

    Args:
        original_layer: the layer to adapt; it keeps its own tensors.
        rank: R, the rank of the update.
        alpha: α; the update is scaled by α / R.
        dropout: probability of zeroing an input of the update (not of the layer) in training.

    Raises:
        SurgeryError: there are no `LoRASettings` with this rank, alpha or dropout, or the layer is
            not an `nn.Linear`. The layer is untouched then.
    """

    def __init__(
        self,
        original_layer: nn.Linear,
        rank: int = LoRASettings.rank,
        alpha: float = LoRASettings.alpha,
        dropout: float = LoRASettings.dropout,
    ):
        if not isinstance(original_layer, nn.Linear):
            raise SurgeryError(
                f"LoRALinear wraps an nn.Linear, not a {type(original_layer).__name__}"
            )
        LoRASettings(rank, alpha, dropout)  # which checks them
        update = LoRAUpdate(original_layer, rank, alpha, dropout)
        super().__init__(original_layer)  # freezes it, so nothing may fail after this
        self.updates[LoRASettings.name] = update  # "default", and `active` is that one alone

    def forward(self, x: Tensor) -> Tensor:
        """Returns y = W x + b + s · B A x, (…, in) → (…, out)."""
        y: Tensor = self.original_layer(x)  # W x + b
        if (update := self.plain_update) is None:  # disabled, several adapters, DoRA, …
            return self.active(self, x, y) if self.enabled else y
        return y + update.scaling * update.low_rank(x)  # + s · B A x

    @property
    def plain_update(self) -> LoRAUpdate | None:
        """The update, if just one takes part, and it is a plain one with the weight 1; or None."""
        if not self.enabled or not isinstance(self.active, WeightedAdapters):
            return None
        here = {name: w for name, w in self.active.weights.items() if name in self.updates}
        if list(here.values()) != [1.0]:
            return None
        update = self.updates[next(iter(here))]
        return update if type(update) is LoRAUpdate else None
