"""`surgery plan`: what an injection would do, before anything is touched."""

from __future__ import annotations

from typing import Annotated, Any

from cyclopts import Parameter

from nanogpt_surgery.cli.console import AllLayers, say, show
from nanogpt_surgery.cli.options import TargetOptions, given, options_of
from nanogpt_surgery.lora.settings import LoRASettings
from nanogpt_surgery.training.settings import FitSettings

LoraOptions: Any = options_of(LoRASettings, "LoRA", leave_out=("name",))


def plan(
    model: str,
    *,
    target: TargetOptions = None,
    lora: LoraOptions = None,
    batch_size: int = FitSettings.batch_size,
    block_size: int | None = None,
    all_layers: AllLayers = False,
    json: Annotated[bool, Parameter(negative="")] = False,
) -> None:
    """Say which layers a LoRA would adapt, with its parameters, its file and its memory.

    The memory is that of a plain training in float32, which needs the gradient of all logits at
    once; surgery finetune --plan measures what a training here takes.

    Parameters
    ----------
    model
        a run, a model folder, a GGUF file or a hub name
    batch_size
        windows in a batch of the training
    block_size
        tokens in a window; the model's own by default, at most 256
    json
        print it as JSON
    """
    import torch

    from nanogpt_surgery.cli.instruction_data import window
    from nanogpt_surgery.formats.adapter_layout import plan_adapter
    from nanogpt_surgery.formats.model_file import open_model
    from nanogpt_surgery.memory import available_memory
    from nanogpt_surgery.training.memory_estimate import check_batch

    available = available_memory()  # before the model takes its part
    rows = FitSettings(batch_size=batch_size).batch_size  # refuses what fit would
    network = open_model(model, torch.float32)[0]  # as finetune opens it
    check_batch(network.config, rows, window(block_size, network.config.block_size))
    probe = torch.zeros(rows, window(block_size, network.config.block_size), dtype=torch.long)
    report = plan_adapter(network, probe=probe, **given(target), **given(lora))
    if available is not None:
        report.summary["available_bytes"] = available
    show(report, json, all_layers)
    say(f"surgery finetune {model} TEXT… --out FOLDER trains it, by the same flags")
