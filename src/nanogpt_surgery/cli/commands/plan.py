"""`surgery plan`: which layers a LoRA would adapt, before anything is touched."""

from __future__ import annotations

from typing import Any

from nanogpt_surgery.cli.framework.console import AllLayers, Json, say, show
from nanogpt_surgery.cli.framework.options import TargetOptions, given, options_of
from nanogpt_surgery.cli.model_options import Model
from nanogpt_surgery.lora.settings import LoRASettings

LoraOptions: Any = options_of(LoRASettings, "LoRA", leave_out=("name",))


def plan(
    model: Model,
    *,
    target: TargetOptions | None = None,
    lora: LoraOptions = None,
    all_layers: AllLayers = False,
    json: Json = False,
) -> None:
    """Say which layers a LoRA would adapt, their shapes, its parameters and the size of its file.

    What a training takes in memory and time, surgery finetune --plan says.
    """
    import torch

    from nanogpt_surgery.formats.model_file import open_model
    from nanogpt_surgery.formats.peft.writing import plan_lora

    network = open_model(model, torch.float32)[0]  # as finetune opens it
    adapter = LoRASettings(**given(lora))
    show(plan_lora(network, **given(target), settings=adapter), json, all_layers)
    say(f"surgery finetune {model} TEXT… --out FOLDER trains it, by the same flags")
