"""`surgery plan`: what an injection would do, before anything is touched."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from nanogpt_surgery.cli.framework.console import AllLayers, say, show
from nanogpt_surgery.cli.framework.options import TargetOptions, given, options_of
from nanogpt_surgery.cli.framework.output import room
from nanogpt_surgery.lora.settings import LoRASettings
from nanogpt_surgery.training.settings import FitSettings

if TYPE_CHECKING:
    from nanogpt_surgery.model.simple_gpt import SimpleGPT

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

    The memory is what surgery finetune --plan --cache-gib 0 counts; with a text, that says also
    what is kept of frozen layers, and how long a training takes.

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
    from nanogpt_surgery.formats.model_file import open_model
    from nanogpt_surgery.formats.peft.adapter_layout import plan_adapter
    from nanogpt_surgery.report import Report
    from nanogpt_surgery.training.memory_estimate import check_batch

    settings = FitSettings(batch_size=batch_size, cache_gib=0.0)  # refuses what fit would
    network = open_model(model, torch.float32)[0]  # as finetune opens it
    length = window(block_size, network.config.block_size)
    check_batch(network.config, batch_size, length)
    adapter = LoRASettings(**given(lora))
    planned = plan_adapter(network, **given(target), settings=adapter)
    sizes = ("layers", "trainable_parameters", "total_parameters", "adapter_bytes")
    summary = {name: planned.summary[name] for name in sizes}
    summary |= _memory(network, given(target), adapter, settings, length)
    show(Report("LoRA planned", planned.rows, summary), json, all_layers)
    say(f"surgery finetune {model} TEXT… --out FOLDER trains it, by the same flags")


def _memory(
    network: SimpleGPT,
    targets: dict[str, Any],
    adapter: LoRASettings,
    settings: FitSettings,
    length: int,
) -> dict[str, int]:
    """The memory of a training, as finetune --plan counts it, with the LoRA in its place.

    And what there is of memory and disk.
    """
    import torch

    from nanogpt_surgery.data.gpt_dataset import GPTDataset
    from nanogpt_surgery.lora.inject import inject_lora
    from nanogpt_surgery.training.hardware import choose_hardware
    from nanogpt_surgery.training.memory_estimate import memory_for_training
    from nanogpt_surgery.training.planning import training_memory

    inject_lora(network, **targets, settings=adapter)
    free = room(memory_for_training(network, settings), Path())
    hardware = choose_hardware(settings)
    network.to(hardware.device)
    data = GPTDataset.from_ids(torch.zeros(length + 1, dtype=torch.long), length)
    return training_memory(network, data, settings, hardware) | free
