"""An adapter away from any model: plain tensors and numbers, as they lie in a file."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from nanogpt_surgery.lora.embedding import LoRAEmbeddingUpdate
from nanogpt_surgery.lora.linear import LoRAUpdate
from nanogpt_surgery.lora.variants import DoRAUpdate, PiSSAUpdate

# The names of PEFT's file: the prefix, the layer's path, and what it is.
PREFIX = "base_model.model."
FACTOR_A, FACTOR_B = ".lora_A.weight", ".lora_B.weight"
EMBEDDING_A, EMBEDDING_B = ".lora_embedding_A", ".lora_embedding_B"
MAGNITUDE = ".lora_magnitude_vector"

RankAndAlpha: TypeAlias = tuple[int, float]
FusedParts: TypeAlias = tuple[tuple[int, float, RankAndAlpha | None] | None, ...]


@dataclass(frozen=True)
class LowRankUpdate:
    """ΔW = s · B A for one layer, s = alpha / R, or alpha / √R with rsLoRA; all tensors float32.

    Attributes:
        A: (R, in).
        B: (out, R).
        alpha: the numerator of the scale.
        rslora: the scale's denominator is √R.
        magnitude: DoRA's length for each output, (out), or None.
        embedding: the layer is an Embedding; its in are ids.
        dropout: on the input, in training.
        initial: PiSSA: how many of the last rows of A and columns of B are the initial update,
            negated, and alpha without them. A reader that does not know it loses nothing but the
            knowledge of what was trained.
        fused_parts: for a fused matrix, rank, alpha and initial of the updates it was
            put together from (None where there was none).
    """

    A: Tensor
    B: Tensor
    alpha: float
    rslora: bool = False
    magnitude: Tensor | None = None
    embedding: bool = False
    dropout: float = 0.0
    initial: RankAndAlpha | None = None
    fused_parts: FusedParts | None = None

    @property
    def rank(self) -> int:
        """R."""
        return self.A.size(0)

    @property
    def scaling(self) -> float:
        """s, the factor of B A."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    def finite(self) -> bool:
        """Whether each of its tensors is, in every number."""
        tensors = (self.A, self.B, self.magnitude)
        return all(bool(tensor.isfinite().all()) for tensor in tensors if tensor is not None)

    @property
    def delta_weight(self) -> Tensor:
        """The product s · B A, (out, in), float32: ΔW, but for DoRA, which needs the base."""
        return self.scaling * (self.B @ self.A)


def singular_values(updates: Sequence[LowRankUpdate]) -> Tensor:
    """Those of s · B A that can be other than zero, largest first; the product is never built.

    Args:
        updates: of one shape; of any floating-point dtype.

    Returns:
        (N, R) for N updates, float32; NaN for an update that is not finite.
    """
    scales = torch.tensor([abs(update.scaling) for update in updates])
    a = torch.stack([update.A.float().t() for update in updates])  # (N, in, R)
    b = torch.stack([update.B.float() for update in updates])  # (N, out, R)
    (_, r_a), (_, r_b) = torch.linalg.qr(a, mode="r"), torch.linalg.qr(b, mode="r")
    small = r_b @ r_a.mT  # (N, R, R)
    scales[~small.isfinite().all(2).all(1)] = torch.nan
    values: Tensor = torch.linalg.svdvals(small.nan_to_num(0, 0, 0))  # (N, R)
    return scales[:, None] * values


Updates: TypeAlias = dict[str, LowRankUpdate]


@dataclass(frozen=True)
class StoredAdapter:
    """The contents of an adapter folder.

    Attributes:
        updates: by the layer's name.
        whole: whole tensors that replace those of the base, by name (PEFT's modules_to_save).
        base_copies: copies of base tensors that PEFT wrote beside an embedding's update, by name.
        fingerprint: the sha256 of each adapted weight, by the layer's name; empty if unknown.
        tied: what was chosen for targets that share a weight; None if unknown.
    """

    updates: Updates
    whole: dict[str, Tensor] = field(default_factory=dict)
    base_copies: dict[str, Tensor] = field(default_factory=dict)
    fingerprint: dict[str, str] = field(default_factory=dict)
    tied: str | None = None

    def in_float32(self) -> StoredAdapter:
        """A copy in float32: an adapter that was read is mapped, in the dtypes of its file."""
        updates = {
            name: replace(u, A=_float(u.A), B=_float(u.B), magnitude=_float(u.magnitude))
            for name, u in self.updates.items()
        }
        whole = {name: _float(tensor) for name, tensor in self.whole.items()}
        copies = {name: _float(tensor) for name, tensor in self.base_copies.items()}
        return replace(self, updates=updates, whole=whole, base_copies=copies)

    def inside(self, module: str) -> StoredAdapter:
        """The same for a model that holds the other under this name."""
        return replace(
            self,
            updates={f"{module}.{name}": update for name, update in self.updates.items()},
            whole={f"{module}.{name}": tensor for name, tensor in self.whole.items()},
            base_copies={f"{module}.{name}": copy for name, copy in self.base_copies.items()},
        )


def tensors_of(adapter: StoredAdapter) -> dict[str, Tensor]:
    """The tensors of an adapter under the names that they have in PEFT's file."""
    tensors = {}
    for name, update in adapter.updates.items():
        keys = (EMBEDDING_A, EMBEDDING_B) if update.embedding else (FACTOR_A, FACTOR_B)
        tensors[f"{PREFIX}{name}{keys[0]}"] = update.A.contiguous()
        tensors[f"{PREFIX}{name}{keys[1]}"] = update.B.contiguous()
        if update.magnitude is not None:
            tensors[f"{PREFIX}{name}{MAGNITUDE}"] = update.magnitude.contiguous()
    whole = {f"{PREFIX}{name}": tensor.contiguous() for name, tensor in adapter.whole.items()}
    return tensors | whole


def _float(tensor: Any) -> Any:
    return None if tensor is None else tensor.to(torch.float32, copy=True)


def alpha_for(scaling: float, rank: int, rslora: bool) -> float:
    """The alpha that makes this scale at this rank."""
    return scaling * (math.sqrt(rank) if rslora else rank)


def store(update: LoRAUpdate, layer: nn.Module, rslora: bool) -> LowRankUpdate:
    """A copy of an update as plain tensors; `rslora` says how its adapter writes scales."""
    plain: Any = update.inner if isinstance(update, DoRAUpdate) else update
    a, b = (_copy(factor) for factor in plain.factors())
    initial, alpha = None, update.alpha
    if not math.isclose(alpha_for(update.scaling, update.rank, rslora), alpha, rel_tol=1e-12):
        alpha = alpha_for(update.scaling, update.rank, rslora)  # not how this one was made
    if isinstance(plain, PiSSAUpdate):
        initial, alpha = (update.rank, alpha), alpha_for(update.scaling, a.size(0), rslora)
    return LowRankUpdate(
        a,
        b,
        alpha,
        rslora,
        magnitude=_copy(update.lora_magnitude) if isinstance(update, DoRAUpdate) else None,
        embedding=isinstance(layer, nn.Embedding),
        dropout=update.dropout.p,
        initial=initial,
    )


def is_rslora(update: LoRAUpdate) -> bool:
    """Whether the scale is alpha / √R and not alpha / R, which at rank 1 is the same."""
    return update.rank > 1 and math.isclose(update.scaling, update.alpha / math.sqrt(update.rank))


def _copy(tensor: Tensor) -> Tensor:
    return tensor.detach().float().cpu().clone().contiguous()


def restore(stored: LowRankUpdate, layer: nn.Module) -> LoRAUpdate:
    """The update as it was stored, ready to take part in a layer and to be trained on."""
    weight: Any = layer.weight
    a, b = stored.A.to(weight.device), stored.B.to(weight.device)
    rank, alpha = stored.rank, stored.alpha
    if stored.initial is not None:
        initial_rank, alpha = stored.initial
        rank -= initial_rank
    kind: Any = LoRAEmbeddingUpdate if stored.embedding else LoRAUpdate
    update: LoRAUpdate = kind(layer, rank, alpha, stored.dropout)
    update.scaling = stored.scaling
    if stored.initial is not None:
        update.lora_A.data, update.lora_B.data = a[rank:].clone(), -b[:, rank:]
        update = PiSSAUpdate(update)
    update.lora_A.data, update.lora_B.data = a[:rank].clone(), b[:, :rank].clone()
    if stored.magnitude is not None:
        update = DoRAUpdate(update, layer)
        update.lora_magnitude.data = stored.magnitude.to(weight.device).clone()
    return update


def same(one: LowRankUpdate, other: LowRankUpdate) -> bool:
    """Whether two stored updates are the same to the bit, dropout aside."""
    return (
        torch.equal(one.A, other.A)
        and torch.equal(one.B, other.B)
        and _equal(one.magnitude, other.magnitude)
        and (one.scaling, one.embedding, one.initial, one.fused_parts)
        == (other.scaling, other.embedding, other.initial, other.fused_parts)
    )


def _equal(one: Tensor | None, other: Tensor | None) -> bool:
    if one is None or other is None:
        return one is other
    return torch.equal(one, other)
