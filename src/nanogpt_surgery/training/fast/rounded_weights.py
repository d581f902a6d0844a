"""Frozen float32 weights in bfloat16, cast once for all steps of a training.

Autocast keeps what it casts of weights that learn, and casts one that does not each time it is
used. The copies need no room that a step has not needed before: autograd holds a cast of every
frozen weight that a gradient goes through, from the forward pass to the backward.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from nanogpt_surgery.lora.linear import LoRALinear
from nanogpt_surgery.model.simple_gpt import SimpleGPT
from nanogpt_surgery.training.fast.fused_lora import frozen_linear
from nanogpt_surgery.training.forward import attributes_set, first_trainable_stage

LOOKED_AT = 64  # numbers of a weight that are compared before each step


@dataclass(frozen=True)
class Rounded:
    """A copy of a weight, and what the weight was when it was made."""

    weight: Tensor
    version: int
    address: int
    sample: Tensor
    copy: nn.Parameter

    @classmethod
    def of(cls, weight: Tensor) -> Rounded:
        """Makes the copy."""
        copy = nn.Parameter(weight.detach().bfloat16(), requires_grad=False)
        return cls(weight, weight._version, weight.data_ptr(), sampled(weight).clone(), copy)

    def is_of(self, weight: Tensor) -> bool:
        """Whether a weight is the one that was copied, and was not written to since.

        Writes through `.data` are counted by no version; they show in the sample.
        """
        return (
            self.weight is weight
            and self.version == weight._version
            and self.address == weight.data_ptr()
            and torch.equal(self.sample, sampled(weight))
        )


def sampled(weight: Tensor) -> Tensor:
    """Some numbers of a tensor, evenly spaced."""
    return weight.detach().flatten()[:: max(1, weight.numel() // LOOKED_AT)]


class RoundedWeights:
    """The copies for a model, of the layers that gradients go through."""

    def __init__(self) -> None:
        self.kept: dict[nn.Module, Rounded] = {}

    def active(self, model: nn.Module) -> AbstractContextManager[None]:
        """Within, the copies stand in the places of their weights.

        What is no longer frozen, there or the same is forgotten.
        """
        before, self.kept = self.kept, {}
        for layer in frozen_float32(model):
            old = before.get(layer)
            new = old if old and old.is_of(layer.weight) else Rounded.of(layer.weight)
            self.kept[layer] = new
        return attributes_set("weight", {layer: one.copy for layer, one in self.kept.items()})


def frozen_float32(model: nn.Module) -> Iterator[nn.Linear]:
    """The frozen Linears in the blocks of a model that gradients go through.

    Not those that an update reads beside multiplying by them, as DoRA's does.
    """
    first = first_trainable_stage(model) if isinstance(model, SimpleGPT) else None
    layers = model.layers[first or 0 :] if isinstance(model, SimpleGPT) else ()
    modules = [module for layer in layers for module in layer.modules()]
    lora = [m for m in modules if isinstance(m, LoRALinear)]
    read = {m.original_layer for m in lora if m.enabled and m.plain_update is None}
    frozen = (m for m in modules if isinstance(m, nn.Linear) and frozen_linear(m))
    for linear in frozen:
        if linear not in read and linear.weight.dtype == torch.float32:
            yield linear
