"""`surgery doctor`: what this machine offers, measured."""

from __future__ import annotations

import os
import platform
import shutil
import sys
from importlib.metadata import version
from time import perf_counter
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from nanogpt_surgery.cli.console import show

if TYPE_CHECKING:
    import torch

PACKAGES = ("nanogpt-surgery", "torch", "tiktoken", "safetensors", "numpy", "rich", "cyclopts")
SIDE = 2048


def doctor(*, json: Annotated[bool, Parameter(negative="")] = False) -> None:
    """Say what is installed, what the hardware can do, and what training would choose.

    Parameters
    ----------
    json
        print it as JSON
    """
    import torch

    from nanogpt_surgery.lora.report import Report
    from nanogpt_surgery.training.hardware import choose_hardware, cpu_has_bfloat16
    from nanogpt_surgery.training.settings import FitSettings

    hardware = choose_hardware(FitSettings())
    summary: dict[str, Any] = {
        "python": f"{platform.python_version()} at {sys.executable}",
        "system": platform.platform(),
        **{name: version(name) for name in PACKAGES},
        "training_would_use": hardware.describe().rpartition(", ")[0],
        "cores": os.cpu_count(),
        "cpu_kernels": torch.backends.cpu.get_cpu_capability(),
        "cpu_bfloat16": cpu_has_bfloat16(),
        "compiler": shutil.which("c++") or "none: torch.compile cannot work on the CPU",
        "free_disk_GB": round(shutil.disk_usage(".").free / 1e9, 1),
        "float32_matmul_GFLOPs": _matmul_rate(hardware.device, torch.float32),
        "bfloat16_matmul_GFLOPs": _matmul_rate(hardware.device, torch.bfloat16),
    }
    report = Report("surgery doctor", [], summary)
    show(report, json)


def _matmul_rate(device: torch.device, dtype: torch.dtype) -> int:
    """Billions of operations a second in a square matrix product, the best of five."""
    import torch

    a, b = torch.randn(2, SIDE, SIDE, device=device).to(dtype)
    best = float("inf")
    for _ in range(5):
        start = perf_counter()
        (a @ b)[0, 0].item()
        best = min(best, perf_counter() - start)
    return round(2 * SIDE**3 / best / 1e9)
