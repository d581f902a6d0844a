"""Merging: W + ΔW in the place of a layer and its updates."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from nanogpt_surgery.history.model_history import (
    get_tie_word_embeddings,
    history_of,
)
from nanogpt_surgery.lora.inject import replace_module
from nanogpt_surgery.lora.several import LoRALayer, lora_layers


def merge_layers(model: nn.Module) -> None:
    """Puts W + ΔW in the place of every wrapped layer.

    Layers that shared a weight and have the same W + ΔW share one again; where a tie is broken, a
    config that says `tie_word_embeddings` says no.
    """
    before = history_of(model).trainable_before
    trainable = None if before is None else {id(parameter) for parameter in before}
    made: dict[int, list[Any]] = {}
    for name, layer in lora_layers(model).items():
        original: Any = layer.original_layer
        merged: Any = merged_layer(layer)
        if not layer.replaces_whole:
            merged.weight.requires_grad_(trainable is None or id(original.weight) in trainable)
            twins = made.setdefault(id(original.weight), [])
            for twin in twins:
                if torch.equal(twin.weight, merged.weight):
                    merged.weight = twin.weight
            twins.append(merged)
        replace_module(model, name, merged)
    restore_requires_grad(model)
    if get_tie_word_embeddings(model) and _is_untied(model):
        config: Any = model.config
        config.tie_word_embeddings = False


def merged_layer(layer: LoRALayer) -> nn.Module:
    """A new plain layer with W + ΔW, rounded once, to W's own dtype.

    It is added in float32, to a float64 W in float64. A module that is replaced whole is the copy
    that takes part, not rounded.
    """
    if layer.replaces_whole:
        return layer.shown
    weight = layer.original_layer.weight
    merged = (widened(weight) + layer.delta_weight()).to(weight.dtype)
    return with_weight(layer.original_layer, nn.Parameter(merged.contiguous()))


def widened(weight: Tensor) -> Tensor:
    """A weight in the dtype that it is merged in, float32 or its own wider one; no gradient."""
    return weight.detach().to(torch.promote_types(weight.dtype, torch.float32))


def with_weight(original: nn.Module, weight: nn.Parameter) -> nn.Module:
    """A plain layer like the original, with another weight and the same bias."""
    layer: nn.Linear | nn.Embedding
    if isinstance(original, nn.Embedding):
        layer = nn.Embedding(
            weight.size(0),
            weight.size(1),
            padding_idx=original.padding_idx,
            scale_grad_by_freq=original.scale_grad_by_freq,
            sparse=original.sparse,
            device="meta",
        )
    else:
        assert isinstance(original, nn.Linear)
        layer = nn.Linear(original.in_features, original.out_features, bias=False, device="meta")
        layer.bias = original.bias
    layer.weight = weight
    return layer.train(original.training)


def restore_requires_grad(model: nn.Module) -> None:
    """Lets those parameters train again that could before the first injection."""
    for parameter in history_of(model).trainable_before or ():
        parameter.requires_grad_(True)
    history_of(model).trainable_before = None


def _is_untied(model: nn.Module) -> bool:
    """Whether the embedding and the head that transformers' accessors name have two weights."""
    ends = [getattr(model, f"get_{side}_embeddings", None) for side in ("input", "output")]
    weights = [getattr(end(), "weight", None) for end in ends if end is not None]
    return len(weights) == 2 and weights[0] is not weights[1]
