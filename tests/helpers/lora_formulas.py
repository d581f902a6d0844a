"""What an update of any kind is, by the formulas of the papers and no code of ours."""

import torch
from hypothesis import strategies as st
from torch import nn

from nanogpt_surgery import inject_lora, plan_lora
from nanogpt_surgery.lora.several import lora_layers

KINDS = st.fixed_dictionaries(
    {
        "rank": st.integers(1, 4),
        "alpha": st.sampled_from([1, 3.5, 16]),
        "rslora": st.booleans(),
        "dora": st.booleans(),
        "pissa": st.booleans(),
        "tied": st.sampled_from(["refuse", "untie", "both"]),
    }
)

KINDS_OF = "_kinds"  # on an update: what it was asked to be


def inject(model: nn.Module, targets: str | list[str], name: str, kinds: dict) -> None:
    planned = plan_lora(model, targets, name=name, **kinds).summary
    done = inject_lora(model, targets, name=name, **kinds).summary
    assert done["trainable_parameters"] == planned["trainable_parameters"]
    for layer in lora_layers(model).values():
        if name in layer.updates:
            setattr(layer.updates[name], KINDS_OF, kinds)


def delta_by_formula(update: nn.Module, layer: nn.Module) -> torch.Tensor:
    """ΔW from A and B and what was asked for, in the layout of the weight; no code of ours.

    An embedding tied to a head has the head's A and B, whose product is laid out as the table is.
    """
    kinds = getattr(update, KINDS_OF)
    scale = kinds["alpha"] / (kinds["rank"] ** 0.5 if kinds["rslora"] else kinds["rank"])
    across = isinstance(layer, nn.Embedding) and len(update.lora_B) == layer.embedding_dim
    weight = layer.weight.double().T if across else layer.weight.double()
    change = scale * update.lora_B.double() @ update.lora_A.double()
    if kinds["pissa"]:
        born = (update.inner if kinds["dora"] else update).initial
        change = change - scale * born.lora_B.double() @ born.lora_A.double()
    if kinds["dora"]:
        length = (weight + change).detach().norm(dim=1, keepdim=True)
        change = update.lora_magnitude.double()[:, None] * (weight + change) / length - weight
    return change.T if across else change


def merged_by_formula(model: nn.Module) -> dict[str, torch.Tensor]:
    """W + Σ w ΔW of each wrapped layer."""
    merged = {}
    for name, layer in lora_layers(model).items():
        merged[name] = layer.original_layer.weight.double()
        for adapter, weight in layer.active.weights.items():
            if adapter in layer.updates:
                update = layer.updates[adapter]
                merged[name] = merged[name] + weight * delta_by_formula(
                    update, layer.original_layer
                )
    return merged
