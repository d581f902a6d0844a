"""Kinds of update, each a small part around or inside another.

rsLoRA   s = α / √R                                arXiv:2312.03732
PiSSA    ΔW = s · (B A − B₀ A₀), from W's principal directions B₀ A₀          arXiv:2404.02948
DoRA     W' = m · (W + ΔW) / ‖W + ΔW‖, a length m for each output             arXiv:2402.09353
bias     y = W x + b + s · (B A x + b'), PEFT's `lora_bias`
whole    a trained copy in the place of a module, PEFT's `modules_to_save`

A length is that of a row of the matrix (out, in). Legend: R rank.
"""

from __future__ import annotations

import copy
import math
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn

from nanogpt_surgery.errors import SurgeryError
from nanogpt_surgery.lora.active import WeightedAdapters
from nanogpt_surgery.lora.embedding import LoRAEmbeddingUpdate
from nanogpt_surgery.lora.layer import LoRALayer
from nanogpt_surgery.lora.linear import LoRAUpdate
from nanogpt_surgery.lora.settings import LoRASettings


def as_matrix(layer: nn.Module) -> Tensor:
    """A layer's weight as a matrix (out, in), float32, without gradient.

    A Linear's is laid out so; an Embedding's is (in, out), a row for each id.
    """
    weight: Any = layer.weight
    return as_laid_out(weight.detach().float(), layer)


def as_laid_out(matrix: Tensor, layer: nn.Module) -> Tensor:
    """A matrix (out, in) in the layout of the layer's weight; it is its own inverse."""
    return matrix.t() if isinstance(layer, nn.Embedding) else matrix


class PartUpdate(LoRAUpdate):
    """An update made of another one, whose A, B and scale it shows as its own."""

    def __init__(self, inner: LoRAUpdate):
        nn.Module.__init__(self)
        self.rank, self.alpha, self.scaling = inner.rank, inner.alpha, inner.scaling
        self.dropout = nn.Dropout(inner.dropout.p)
        self.inner = inner

    lora_A: Any = property(attrgetter("inner.lora_A"))  # noqa: N815
    lora_B: Any = property(attrgetter("inner.lora_B"))  # noqa: N815

    def factors(self) -> tuple[Tensor, Tensor]:
        """Those of the part inside."""
        return self.inner.factors()

    def delta_weight(self, layer: nn.Module) -> Tensor:
        """ΔW in the layout of the layer's weight, float32."""
        return as_laid_out(self.product(), layer)

    def trainable(self) -> list[nn.Parameter]:
        """Those of the part inside."""
        return self.inner.trainable()

    def moved(self) -> bool:
        """Whether the part inside has."""
        return self.inner.moved()

    def wrapper(self) -> type[LoRALayer]:
        """That of the part inside."""
        return self.inner.wrapper()


class PiSSAUpdate(PartUpdate):
    """An update that starts at the principal directions of W, minus its initial self.

    The paper moves B₀ A₀ out of W; here W stays as it is and B₀ A₀ is subtracted beside it, so not
    a bit of the base changes, and at first nothing is added. `inner` is as it is at the start.
    """

    def __init__(self, inner: LoRAUpdate):
        super().__init__(inner)
        self.initial = copy.deepcopy(inner).requires_grad_(False)
        self.initial.dropout.p = 0.0

    def forward(self, x: Tensor, y: Tensor, layer: nn.Module) -> Tensor:
        """Returns what is added to the layer's output: s · (B A − B₀ A₀) x."""
        return self.inner(x, y, layer) - self.initial(x, y, layer)

    def factors(self) -> tuple[Tensor, Tensor]:
        """[A; A₀] (2R, in) and [B, −B₀] (out, 2R): the same update as a plain one."""
        (a, b), (a0, b0) = self.inner.factors(), self.initial.factors()
        return torch.cat((a, a0)), torch.cat((b, -b0), dim=1)

    def moved(self) -> bool:
        """Whether A or B is elsewhere than at the start."""
        pairs = zip(self.inner.trainable(), self.initial.trainable(), strict=True)
        return any(not torch.equal(now, then) for now, then in pairs)


class BiasUpdate(PartUpdate):
    """An update that also adds a vector to the layer's output: s · (B A x + b')."""

    def __init__(self, inner: LoRAUpdate, bias: Tensor):
        super().__init__(inner)
        self.lora_bias = nn.Parameter(bias)  # (out)

    def forward(self, x: Tensor, y: Tensor, layer: nn.Module) -> Tensor:
        """Returns what is added to the layer's output."""
        added: Tensor = self.inner(x, y, layer)
        return added + self.delta_bias().to(y.dtype)

    def delta_bias(self) -> Tensor:
        """Returns s · b', (out), float32: what a merge adds to the layer's bias."""
        return self.scaling * self.lora_bias.float()

    def trainable(self) -> list[nn.Parameter]:
        """A, B and the bias."""
        return [*self.inner.trainable(), self.lora_bias]

    def moved(self) -> bool:
        """Whether the part inside has, or there is a bias."""
        return self.inner.moved() or bool(self.lora_bias.detach().any())


class DoRAUpdate(PartUpdate):
    """An update that also learns the length of each output's row of the weight.

    The norm in the denominator takes no gradient, as the paper proposes in section 4.3.
    """

    def __init__(self, inner: LoRAUpdate, layer: nn.Module):
        super().__init__(inner)
        for part in inner.modules():
            if isinstance(part, nn.Dropout):
                part.p = 0.0  # one mask, here, for all that is added
        self.lora_magnitude = nn.Parameter(row_norms(layer, inner.product()))

    def dora_scale(self, layer: nn.Module) -> Tensor:
        """The factor of each output, m / ‖W + ΔW‖, (out)."""
        return self.lora_magnitude / row_norms(layer, self.inner.product())

    def forward(self, x: Tensor, y: Tensor, layer: nn.Module) -> Tensor:
        """Returns what is added to the layer's output: (scale − 1) · W x + scale · ΔW x.

        In training with dropout, x is here the input after it, also beside W, as in PEFT.
        """
        scale = self.dora_scale(layer).to(y.dtype)
        dropping = self.training and self.dropout.p > 0
        kept: Tensor | float = 1.0
        if dropping and isinstance(layer, nn.Embedding):
            kept = self.dropout(torch.ones_like(y[..., :1]))  # an input is a whole id
        elif dropping:
            x = self.dropout(x)
            y = layer(x)
        change = dora_change(layer, y, self.inner(x, y, layer), scale)
        return kept * change if dropping else change

    def delta_weight(self, layer: nn.Module) -> Tensor:
        """Scale · (W + ΔW) − W in the layout of the weight, float32."""
        matrix = as_matrix(layer)
        scale = self.dora_scale(layer).detach()[:, None]
        return as_laid_out(scale * (matrix + self.inner.product()) - matrix, layer)

    def trainable(self) -> list[nn.Parameter]:
        """A, B and the lengths."""
        return [*self.inner.trainable(), self.lora_magnitude]


def dora_change(layer: nn.Module, y: Tensor, change: Tensor, scale: Tensor) -> Tensor:
    """(scale − 1) · W x + scale · ΔW x, for the layer's output y = W x + b and the change ΔW x."""
    bias = getattr(layer, "bias", None)
    return (scale - 1) * (y if bias is None else y - bias) + scale * change


def row_norms(layer: nn.Module, change: Tensor | float = 0.0) -> Tensor:
    """‖W + ΔW‖ for each row of the matrix (out, in), (out), float32, without gradient."""
    return torch.linalg.vector_norm(as_matrix(layer) + change, dim=1)


def check_row_norms(
    path: str, layer: nn.Module, change: Tensor | float = 0.0, hint: str = "leave dora out"
) -> None:
    """Raises `SurgeryError` if a row of W + ΔW has no length, by which DoRA would divide."""
    norms = row_norms(layer, change)
    zero = int((norms == 0).sum())
    if zero:
        raise SurgeryError(
            f"there is no DoRA of {path}: {zero} of its {len(norms)} outputs have a row of "
            "zeros for a weight, and DoRA divides by the row's length",
            hint,
        )


def principal_factors(weight: Tensor, rank: int, scaling: float) -> tuple[Tensor, Tensor]:
    """A₀ (R, in) and B₀ (out, R) such that s · B₀ A₀ is the best approximation of rank R to W.

    From the eigenvectors of W's smaller Gram matrix, which for a large vocabulary is much faster
    than a singular value decomposition.
    """
    assert rank <= min(weight.shape), "check_settings has seen to it"
    if weight.size(0) < weight.size(1):
        a, b = principal_factors(weight.t(), rank, scaling)
        return b.t().contiguous(), a.t().contiguous()
    squares, directions = torch.linalg.eigh(weight.t() @ weight)  # ascending
    v = directions[:, -rank:].flip(1)  # (in, R)
    size = squares[-rank:].flip(0).clamp_min(1e-20).sqrt()  # (R), the singular values
    root = (size / scaling).sqrt()
    u = weight @ v / size  # (out, R)
    return (v * root).t().contiguous(), (u * root).contiguous()


def new_update(layer: nn.Module, settings: LoRASettings) -> LoRAUpdate:
    """Makes an update for a Linear or an Embedding; the settings' patterns count no more."""
    kind = LoRAEmbeddingUpdate if isinstance(layer, nn.Embedding) else LoRAUpdate
    update: LoRAUpdate = kind(layer, settings.rank, settings.alpha, settings.dropout)
    if settings.rslora:
        update.scaling = settings.alpha / math.sqrt(settings.rank)
    if settings.pissa:
        a, b = principal_factors(as_matrix(layer), settings.rank, update.scaling)
        update.lora_A.data, update.lora_B.data = a, b
        update = PiSSAUpdate(update)
    if settings.dora:
        update = DoRAUpdate(update, layer)
    return update


class WholeUpdate(nn.Module):
    """A trained copy of a module, in the place of an update.

    Args:
        module: the original.
        tensors: its parameters and buffers by name; those not given are the original's.
    """

    def __init__(self, module: nn.Module, tensors: dict[str, Tensor]):
        super().__init__()
        self.module = copy.deepcopy(module)
        self.module.load_state_dict({**module.state_dict(), **tensors})

    def forward(self, *inputs: Any) -> Any:
        """Returns what the copy gives."""
        return self.module(*inputs)

    def trainable(self) -> list[nn.Parameter]:
        """All its parameters."""
        return list(self.module.parameters())

    def wrapper(self) -> type[LoRALayer]:
        """The class of layer that it is put in."""
        return ReplacedLayer


class ReplacedLayer(LoRALayer):
    """A module and the copies that named adapters put in its place."""

    replaces_whole = True

    def forward(self, *inputs: Any) -> Any:
        """Returns what the copy that takes part gives, or else the original."""
        return self._chosen()(*inputs)

    def _chosen(self) -> nn.Module:
        """The copy that takes part, or else the original.

        Raises:
            SurgeryError: the copy's adapter does not take part alone, with the weight 1.
        """
        found = [name for name in self.active.names() if name in self.updates]
        if not self.enabled or not found:
            return self.original_layer
        if self.active != WeightedAdapters({found[0]: 1.0}):
            raise SurgeryError(
                f"the adapter {found[0]!r} replaces whole modules, so it can only take part alone",
                f"swap_lora(model, {found[0]!r})",
            )
        return self.updates[found[0]]

    @property
    def shown(self) -> nn.Module:
        """The module that takes part, bare."""
        chosen = self._chosen()
        return chosen.module if isinstance(chosen, WholeUpdate) else chosen
