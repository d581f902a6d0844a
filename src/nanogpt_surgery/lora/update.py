"""What every kind of update has: A, B and a scale; some have more, in `kinds.py`.

Legend: R rank; in and out are those of the matrix product B A.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


class Update(nn.Module):
    """A change of a layer's weight by a matrix of low rank: ΔW = s · B A.

    Called with the layer's input x, its own output y and the layer itself, an update gives what is
    to be added to y.
    """

    lora_A: nn.Parameter  # noqa: N815
    lora_B: nn.Parameter  # noqa: N815

    def __init__(self, rank: int, alpha: float, dropout: float):
        super().__init__()
        assert rank >= 1, "LoRASettings, or the reader of a file, has seen to it"
        self.rank = rank
        self.alpha = alpha
        self.scaling = alpha / rank
        self.dropout = nn.Dropout(dropout)

    def factors(self) -> tuple[Tensor, Tensor]:
        """A (R, in) and B (out, R), such that ΔW = s · B A."""
        return self.lora_A, self.lora_B

    def product(self) -> Tensor:
        """The matrix s · B A, (out, in), float32, without gradient."""
        a, b = (factor.detach().float() for factor in self.factors())
        return self.scaling * (b @ a)

    def delta_weight(self, layer: nn.Module) -> Tensor:
        """What the update adds to the layer's weight, in the weight's own layout, float32."""
        return as_laid_out(self.product(), layer)

    def gain(self, layer: nn.Module) -> Tensor | None:
        """The factor by which the update scales each output, (out), if it is of a kind that does.

        The layer then gives gain · (W + s · B A) x + b.
        """
        return None

    def trained(self) -> list[nn.Parameter]:
        """The parameters that training moves."""
        return [self.lora_A, self.lora_B]

    def moved(self) -> bool:
        """Whether training has taken the update away from where it was born, doing nothing."""
        return bool(self.lora_B.detach().any())

    def extra_repr(self) -> str:
        """What `print(model)` shows."""
        return f"rank={self.rank}, alpha={self.alpha}, scaling={self.scaling:.4g}"


def as_matrix(layer: nn.Module) -> Tensor:
    """A layer's weight as a matrix (out, in), float32, without gradient.

    A Linear's is laid out so; an Embedding's is (in, out), a row for each id.
    """
    weight: Any = layer.weight
    return as_laid_out(weight.detach().float(), layer)


def as_laid_out(matrix: Tensor, layer: nn.Module) -> Tensor:
    """A matrix (out, in) in the layout of the layer's weight; it is its own inverse."""
    return matrix.t() if isinstance(layer, nn.Embedding) else matrix
