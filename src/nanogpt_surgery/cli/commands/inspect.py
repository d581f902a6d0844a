"""`surgery inspect`, `plan`, `doctor`: look, and touch nothing."""

from __future__ import annotations

import os
import platform
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

from nanogpt_surgery.cli.framework.console import say, show
from nanogpt_surgery.cli.framework.options import (
    AllLayers,
    Json,
    Model,
    TargetOptions,
    given,
    options_of,
)
from nanogpt_surgery.files.disk_errors import free_bytes
from nanogpt_surgery.lora.settings import LoRASettings
from nanogpt_surgery.memory import available_memory

LoraOptions: Any = options_of(LoRASettings, "LoRA", leave_out=("name",))
PACKAGES = ("nanogpt-surgery", "torch", "tiktoken", "safetensors", "numpy", "rich", "cyclopts")


def inspect(path: str, *, all_layers: AllLayers = False, json: Json = False) -> None:
    """Show the tree of a model's modules, or the updates of an adapter.

    Parameters
    ----------
    path
        a run, a model folder, a GGUF file, a hub name or an adapter folder
    """
    from nanogpt_surgery.formats.inspection import describe_adapter, describe_model

    is_adapter = (Path(path) / "adapter_config.json").is_file()
    show((describe_adapter if is_adapter else describe_model)(path), json, all_layers)


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


def doctor(*, json: Json = False) -> None:
    """Say what is installed, what the hardware can do, and what training would choose."""
    import torch

    from nanogpt_surgery.report import Report
    from nanogpt_surgery.training.hardware import (
        choose_hardware,
        cpu_has_bfloat16,
        lacking_to_compile,
        matmul_rate,
    )
    from nanogpt_surgery.training.settings import FitSettings

    hardware = choose_hardware(FitSettings())
    lacking = lacking_to_compile(hardware.device)
    summary: dict[str, Any] = {
        "python": f"{platform.python_version()} at {sys.executable}",
        "system": platform.platform(),
        **{name: version(name) for name in PACKAGES},
        "training_would_use": hardware.describe().rpartition(", ")[0],
        "cores": os.cpu_count(),
        "cpu_kernels": torch.backends.cpu.get_cpu_capability(),
        "cpu_bfloat16": cpu_has_bfloat16(),
        "torch_compile": f"cannot work: there is no {lacking}" if lacking else "can work",
        "available_bytes": available_memory(),
        "free_bytes": free_bytes(Path()),
        "float32_matmul_GFLOPs": round(matmul_rate(hardware.device, torch.float32) / 1e9),
        "bfloat16_matmul_GFLOPs": round(matmul_rate(hardware.device, torch.bfloat16) / 1e9),
    }
    report = Report("surgery doctor", [], summary)
    show(report, json)
    say("surgery train --out FOLDER trains a model here; with --plan it says what that takes")
