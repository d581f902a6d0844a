"""A frozen layer, the named updates beside it, and which of them take part."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor, nn

from nanogpt_surgery.errors import SurgeryError
from nanogpt_surgery.lora.mixture import Blend, Mixture
from nanogpt_surgery.lora.settings import LoRASettings
from nanogpt_surgery.lora.update import Update

DEFAULT = LoRASettings.name


def _shown(name: str) -> Any:
    """An attribute of the layer inside, if that has it: read only, no parameter of the wrapper."""
    return property(lambda layer: getattr(layer.shown(), name))


class LoRALayer(nn.Module, ABC):
    """What all wrappers share: those around a matrix, and of modules that are replaced whole.

    Models that read a layer's weight, bias or sizes find the original's. Where a model multiplies
    by that weight itself, instead of calling the layer, the updates take no part; no gradient
    reaches them then, and `fit` says so after the first step.

    Attributes:
        original_layer: frozen, and never written to.
        updates: by the name of the adapter that each belongs to.
        mixture: which updates take part, and how.
        enabled: off, the layer computes as if it had no update.
        unties: the choice was made that this layer may part from the one it shares a weight with.
    """

    journaled = ("mixture", "enabled", "unties")  # what an operation may change

    def __init__(self, original_layer: nn.Module):
        super().__init__()
        self.original_layer: Any = original_layer.requires_grad_(False)
        self.updates = nn.ModuleDict()
        self.mixture: Mixture = Blend({DEFAULT: 1.0})
        self.enabled = True
        self.unties = False

    @classmethod
    def around(cls, original_layer: nn.Module) -> LoRALayer:
        """The layer wrapped, without an update yet."""
        layer = cls.__new__(cls)
        LoRALayer.__init__(layer, original_layer)
        return layer.train(original_layer.training)

    @abstractmethod
    def merged_layer(self) -> nn.Module:
        """A new plain module with what takes part in it."""

    weight = _shown("weight")
    bias = _shown("bias")
    in_features = _shown("in_features")
    out_features = _shown("out_features")
    num_embeddings = _shown("num_embeddings")
    embedding_dim = _shown("embedding_dim")
    padding_idx = _shown("padding_idx")

    def __setattr__(self, name: str, value: Any) -> None:
        if isinstance(getattr(type(self), name, None), property):
            raise SurgeryError(
                f"{name} of a {type(self).__name__} is only shown there: what is inside has it",
                "set it before inject_lora, or after remove_lora(model) or merge_lora(model)",
            )
        super().__setattr__(name, value)

    def shown(self) -> nn.Module:
        """The layer that others see."""
        return self.original_layer  # type: ignore[no-any-return]

    @property
    def update(self) -> Update:
        """The one update that takes part.

        Raises:
            SurgeryError: none does, or several do.
        """
        names = [name for name in self.mixture.adapters() if name in self.updates]
        if len(names) != 1:
            raise SurgeryError(
                f"{len(names)} updates take part in this layer ({', '.join(names) or 'none'})",
                "layer.updates[NAME] is one of them",
            )
        return self.updates[names[0]]  # type: ignore[return-value]

    @property
    def lora_A(self) -> nn.Parameter:  # noqa: N802
        """A of the one update that takes part, (R, in)."""
        return self.update.lora_A

    @property
    def lora_B(self) -> nn.Parameter:  # noqa: N802
        """B of the one update that takes part, (out, R)."""
        return self.update.lora_B

    @property
    def scaling(self) -> float:
        """The scale of the one update that takes part."""
        return self.update.scaling

    @property
    def rank(self) -> int:
        """R of the one update that takes part."""
        return self.update.rank

    @property
    def alpha(self) -> float:
        """α of the one update that takes part."""
        return self.update.alpha

    @property
    def dropout(self) -> nn.Dropout:
        """The dropout on the input of the one update that takes part."""
        return self.update.dropout

    def extra_repr(self) -> str:
        """What `print(model)` shows."""
        return f"{self.mixture}" + ("" if self.enabled else ", disabled")


class MatrixLayer(LoRALayer):
    """What `LoRALinear` and `LoRAEmbedding` share: a weight W, to which updates add ΔW."""

    @abstractmethod
    def down_by_row(self, x: Tensor, a: Tensor, index: Tensor) -> Tensor:
        """Each row of a batch times the A of its own adapter."""

    @abstractmethod
    def with_weight(self, weight: nn.Parameter) -> nn.Module:
        """A plain layer like the original, with another weight."""

    def delta_weight(self) -> Tensor:
        """What the updates that take part add to the weight, in its layout, float32."""
        return self.mixture.delta_weight(self)

    def merged_layer(self) -> nn.Module:
        """A new plain layer with W + ΔW, rounded once, to W's own dtype.

        It is added in float32, to a float64 W in float64.
        """
        weight = self.original_layer.weight
        merged = (widened(weight) + self.delta_weight()).to(weight.dtype)
        return self.with_weight(nn.Parameter(merged.contiguous()))


def widened(weight: Tensor) -> Tensor:
    """A weight in the dtype that it is merged in, float32 or its own wider one; no gradient."""
    return weight.detach().to(torch.promote_types(weight.dtype, torch.float32))


def lora_layers(model: nn.Module) -> dict[str, LoRALayer]:
    """The wrapped layers by name.

    Raises:
        SurgeryError: there are none.
    """
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, LoRALayer)}
    if not layers:
        raise SurgeryError("the model carries no LoRA", "inject_lora(model, targets=…) first")
    return layers


def has_lora(model: nn.Module) -> bool:
    """Whether any layer is wrapped."""
    return any(isinstance(module, LoRALayer) for module in model.modules())


def adapter_names(model: nn.Module) -> list[str]:
    """The names of the adapters on a model, the oldest first."""
    layers = [layer for layer in model.modules() if isinstance(layer, LoRALayer)]
    return list(dict.fromkeys(name for layer in layers for name in layer.updates))


def active_mixture(model: nn.Module) -> Mixture:
    """Which adapters take part, the same on every layer; a blend of nothing without a LoRA."""
    layers = [layer for layer in model.modules() if isinstance(layer, LoRALayer)]
    return layers[0].mixture if layers else Blend({})
