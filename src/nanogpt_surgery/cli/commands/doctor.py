"""`surgery doctor`: what this machine offers, measured."""

from __future__ import annotations

import os
import platform
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

from nanogpt_surgery.cli.framework.console import Json, say, show
from nanogpt_surgery.files.disk_errors import free_bytes
from nanogpt_surgery.memory import available_memory

PACKAGES = ("nanogpt-surgery", "torch", "tiktoken", "safetensors", "numpy", "rich", "cyclopts")


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
