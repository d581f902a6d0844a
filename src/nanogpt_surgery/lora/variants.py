"""Kinds of update, each a small part around or inside another.

rsLoRA   s = α / √R                                arXiv:2312.03732
PiSSA    ΔW = s · (B A − B₀ A₀), born at W's principal directions B₀ A₀       arXiv:2404.02948
DoRA     W' = m · (W + ΔW) / ‖W + ΔW‖, a length m for each output             arXiv:2402.09353

A length is that of a row of the matrix (out, in). Legend: R rank.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from nanogpt_surgery.errors import SurgeryError
from nanogpt_surgery.lora.embedding import LoRAEmbeddingUpdate, TiedEmbeddingUpdate
from nanogpt_surgery.lora.linear import LoRAUpdate
from nanogpt_surgery.lora.settings import LoRASettings
from nanogpt_surgery.lora.update import Update, as_laid_out, as_matrix


class PartUpdate(Update):
    """An update made of another one, whose A, B and scale it shows as its own."""

    def __init__(self, inner: Update):
        super().__init__(inner.rank, inner.alpha, inner.dropout.p)
        self.inner = inner
        self.scaling = inner.scaling

    @property
    def lora_A(self) -> nn.Parameter:  # type: ignore[override]  # noqa: N802
        """A of the part inside."""
        return self.inner.lora_A

    @property
    def lora_B(self) -> nn.Parameter:  # type: ignore[override]  # noqa: N802
        """B of the part inside."""
        return self.inner.lora_B

    def factors(self) -> tuple[Tensor, Tensor]:
        """Those of the part inside."""
        return self.inner.factors()

    def trained(self) -> list[nn.Parameter]:
        """Those of the part inside."""
        return self.inner.trained()

    def moved(self) -> bool:
        """Whether the part inside has."""
        return self.inner.moved()


class PiSSAUpdate(PartUpdate):
    """An update that starts at the principal directions of W, minus itself at birth.

    The paper moves B₀ A₀ out of W; here W stays as it is and B₀ A₀ is subtracted beside it, so not
    a bit of the base changes and the layer is born changing nothing. `inner` is at its birth.
    """

    def __init__(self, inner: Update):
        super().__init__(inner)
        self.birth = copy.deepcopy(inner).requires_grad_(False)
        self.birth.dropout.p = 0.0

    def forward(self, x: Tensor, y: Tensor, layer: nn.Module) -> Tensor:
        """What is added to the layer's output: s · (B A − B₀ A₀) x."""
        change: Tensor = self.inner(x, y, layer) - self.birth(x, y, layer)
        return change

    def factors(self) -> tuple[Tensor, Tensor]:
        """[A; A₀] (2R, in) and [B, −B₀] (out, 2R): the same update as a plain one."""
        (a, b), (a0, b0) = self.inner.factors(), self.birth.factors()
        return torch.cat((a, a0)), torch.cat((b, -b0), dim=1)

    def moved(self) -> bool:
        """Whether A or B is elsewhere than at birth."""
        pairs = zip(self.inner.trained(), self.birth.trained(), strict=True)
        return any(not torch.equal(now, then) for now, then in pairs)


class DoRAUpdate(PartUpdate):
    """An update that also learns the length of each output's row of the weight.

    The norm in the denominator takes no gradient, as the paper proposes in section 4.3.
    """

    def __init__(self, inner: Update, layer: nn.Module):
        super().__init__(inner)
        for part in inner.modules():
            if isinstance(part, nn.Dropout):
                part.p = 0.0  # one mask, here, for all that is added
        self.lora_magnitude = nn.Parameter(self.lengths(layer))

    def lengths(self, layer: nn.Module) -> Tensor:
        """‖W + ΔW‖ for each row of the matrix, (out), float32, without gradient."""
        return row_lengths(layer, self.inner.product())

    def gain(self, layer: nn.Module) -> Tensor:
        """M / ‖W + ΔW‖, (out)."""
        return self.lora_magnitude / self.lengths(layer)

    def forward(self, x: Tensor, y: Tensor, layer: nn.Module) -> Tensor:
        """What is added to the layer's output: (gain − 1) · W x + gain · ΔW x.

        In training with dropout, x is here the input after it, also beside W, as in PEFT.
        """
        gain = self.gain(layer).to(y.dtype)
        dropping = self.training and self.dropout.p > 0
        kept: Tensor | float = 1.0
        if dropping and isinstance(layer, nn.Embedding):
            kept = self.dropout(torch.ones_like(y[..., :1]))  # an input is a whole id
        elif dropping:
            x = self.dropout(x)
            y = layer(x)
        bias = getattr(layer, "bias", None)
        without_bias = y if bias is None else y - bias
        change: Tensor = (gain - 1) * without_bias + gain * self.inner(x, y, layer)
        return kept * change if dropping else change

    def delta_weight(self, layer: nn.Module) -> Tensor:
        """Gain · (W + ΔW) − W in the layout of the weight, float32."""
        matrix = as_matrix(layer)
        gain = self.gain(layer).detach()[:, None]
        return as_laid_out(gain * (matrix + self.inner.product()) - matrix, layer)

    def trained(self) -> list[nn.Parameter]:
        """A, B and the lengths."""
        return [*self.inner.trained(), self.lora_magnitude]


def row_lengths(layer: nn.Module, change: Tensor | float = 0.0) -> Tensor:
    """‖W + ΔW‖ for each row of the matrix (out, in), (out), float32, without gradient."""
    lengths: Tensor = torch.linalg.vector_norm(as_matrix(layer) + change, dim=1)
    return lengths


def check_lengths(
    path: str, layer: nn.Module, change: Tensor | float = 0.0, hint: str = "leave dora out"
) -> None:
    """Raise `SurgeryError` if a row of W + ΔW has no length, by which DoRA would divide."""
    lengths = row_lengths(layer, change)
    zero = int((lengths == 0).sum())
    if zero:
        raise SurgeryError(
            f"there is no DoRA of {path}: {zero} of its {len(lengths)} outputs have a row of "
            "zeros for a weight, and DoRA divides by the row's length",
            hint,
        )


def principal_factors(weight: Tensor, rank: int, scaling: float) -> tuple[Tensor, Tensor]:
    """A₀ (R, in) and B₀ (out, R) such that s · B₀ A₀ is the best approximation of rank R to W.

    From the eigenvectors of W's smaller Gram matrix, which for a large vocabulary is much faster
    than a singular value decomposition.
    """
    assert rank <= min(weight.shape), "check_kind has seen to it"
    if weight.size(0) < weight.size(1):
        a, b = principal_factors(weight.t(), rank, scaling)
        return b.t().contiguous(), a.t().contiguous()
    squares, directions = torch.linalg.eigh(weight.t() @ weight)  # ascending
    v = directions[:, -rank:].flip(1)  # (in, R)
    size = squares[-rank:].flip(0).clamp_min(1e-20).sqrt()  # (R), the singular values
    root = (size / scaling).sqrt()
    u = weight @ v / size  # (out, R)
    return (v * root).t().contiguous(), (u * root).contiguous()


def check_kind(path: str, layer: Any, partners: Iterable[nn.Module], plan: LoRASettings) -> None:
    """Raise `SurgeryError` unless there is such an update for a layer and those that follow it."""
    directions = min(layer.weight.shape)
    if plan.rank > directions:
        kind = "PiSSA" if plan.pissa else "an update"
        raise SurgeryError(
            f"{kind} with rank {plan.rank} on {path}, a matrix of {tuple(layer.weight.shape)}: "
            f"there are only {directions} directions",
            f"rank={directions} or less, or rank_pattern={{{path!r}: {directions}}}",
        )
    if plan.dora:
        check_lengths(path, layer)
    plain = isinstance(layer, nn.Linear) and not (plan.dora or plan.pissa)
    for partner in partners:
        _check_seen(partner, plain)


def _check_seen(partner: nn.Module, plain: bool) -> None:
    if isinstance(partner, nn.Embedding) and not plain:
        raise SurgeryError(
            "tied='both' is for plain LoRA and rsLoRA: DoRA's lengths are those of the head's rows "
            "and of the embedding's columns, and PiSSA's birth is kept by one layer",
            "tied='untie', or leave dora and pissa out",
        )


def new_update(layer: nn.Module, settings: LoRASettings) -> Update:
    """A newborn update for a Linear or an Embedding; the patterns in the settings count no more."""
    kind: Any = LoRAEmbeddingUpdate if isinstance(layer, nn.Embedding) else LoRAUpdate
    update: Update = kind(layer, settings.rank, settings.alpha, settings.dropout)
    if settings.rslora:
        update.scaling = settings.alpha / math.sqrt(settings.rank)
    if settings.pissa:
        a, b = principal_factors(as_matrix(layer), settings.rank, update.scaling)
        update.lora_A.data, update.lora_B.data = a, b
        update = PiSSAUpdate(update)
    if settings.dora:
        update = DoRAUpdate(update, layer)
    return update


def seen_from(update: Update, partner: nn.Module) -> Update:
    """An update of a Linear for the layer that shares its weight: the same A and B, once more.

    Raises:
        SurgeryError: the kind has no such view.
    """
    _check_seen(partner, isinstance(update, LoRAUpdate))
    if not isinstance(partner, nn.Embedding):
        return update
    assert isinstance(update, LoRAUpdate), "checked"
    return TiedEmbeddingUpdate(update)
