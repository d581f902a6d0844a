"""Where and in what precision to compute: chosen by what is there, and said in one line."""

from __future__ import annotations

import math
import os
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from nanogpt_surgery.errors import SurgeryError
from nanogpt_surgery.model.simple_gpt import SimpleGPT
from nanogpt_surgery.training.settings import FitSettings

# Operations of a training from which on compiling is earned back (docs/log.md).
_COMPILING_PAYS = {"cpu": 3e13, "cuda": 1e15, "mps": math.inf}
ENOUGH = 512  # the side of a matrix whose product tells a processor's rate


@dataclass(frozen=True)
class Hardware:
    """A device, the precision of its matrix products, and whether blocks are compiled."""

    device: torch.device
    precision: torch.dtype
    compile: bool

    def describe(self) -> str:
        """One line for the user."""
        if self.device.type == "cuda":
            name = torch.cuda.get_device_name(self.device)
        elif self.device.type == "cpu":
            threads = torch.get_num_threads()
            name = f"CPU, {threads} thread{'' if threads == 1 else 's'}"
        else:
            name = self.device.type
        how = "compiled blocks" if self.compile else "not compiled"
        return f"{name}, {str(self.precision).removeprefix('torch.')}, {how}"

    def autocast(self) -> AbstractContextManager[object]:
        """The context in which a forward pass computes in the chosen precision."""
        if self.precision == torch.float32:
            return nullcontext()
        return torch.autocast(self.device.type, self.precision)

    def evaluating(self) -> AbstractContextManager[object]:
        """The context of an evaluation: a GPU's precision; a CPU's is the model's own."""
        return self.autocast() if self.device.type == "cuda" else nullcontext()

    @contextmanager
    def seeded(self, seed: int) -> Iterator[None]:
        """A context in which dropout follows `seed`; the user's generators go on after it."""
        devices = [] if self.device.type == "cpu" else [self.device]
        with torch.random.fork_rng(devices, device_type=self.device.type):
            torch.default_generator.manual_seed(seed)
            if devices:
                torch.get_device_module(self.device).manual_seed(seed)
            yield


def environment_of(hardware: Hardware, processes: int) -> dict[str, Any]:
    """On what a training computes: all that its bits depend on beside what determines the run."""
    on_cuda = hardware.device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(hardware.device) if on_cuda else hardware.device.type,
        "precision": str(hardware.precision).removeprefix("torch."),
        "compiled": hardware.compile,
        "threads": torch.get_num_threads(),
        "processes": processes,
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "torch": str(torch.__version__),
    }


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor on a device. The host does not wait for a copy to CUDA, whose order keeps it apart.

    That takes pinned memory: from any other the copy would be waited for.
    """
    if device.type != "cuda" or tensor.device.type == "cuda":
        return tensor.to(device)
    return pinned(tensor).to(device, non_blocking=True)


def to_host(losses: list[Tensor], norm: Tensor) -> tuple[float, float]:
    """Returns the sum of the losses, and the norm, in one transfer."""
    dtype = torch.promote_types(norm.dtype, torch.float32)
    *parts, read = torch.stack([value.to(dtype) for value in (*losses, norm)]).tolist()
    return sum(parts), read


def pinned(tensor: Tensor) -> Tensor:
    """The same in pinned memory, dense: a strided tensor would be copied unpinned."""
    return tensor if tensor.is_pinned() else tensor.contiguous().pin_memory()


def choose_hardware(settings: FitSettings, operations: float = 0) -> Hardware:
    """The hardware for a training of so many floating-point operations.

    Blocks are compiled when the training is long enough to earn it back, judged by its size and not
    by a clock, so that a resumed run computes the same bits.

    Raises:
        SurgeryError: a device, or compiling, is asked for, and what it needs is not there.
    """
    device = choose_device(settings.device)
    lacking = lacking_to_compile(device)
    if settings.compile == "on" and lacking:
        raise SurgeryError(
            f"torch.compile cannot work here: there is no {lacking}",
            f"install {lacking}, or leave compile at auto",
        )
    pays = settings.fast and not lacking and operations > _COMPILING_PAYS[device.type]
    compiled = settings.compile == "on" or (settings.compile == "auto" and pays)
    return Hardware(device, _precision(settings.precision, device), compiled)


def operations_of(model: nn.Module, settings: FitSettings, block_size: int) -> float:
    """About how many operations a training takes, if all of the model learns.

    Three times those of a `SimpleGPT`'s forward pass, else 6 for each parameter and token.
    """
    tokens = settings.windows * block_size
    if isinstance(model, SimpleGPT):
        return 3.0 * model.config.flops_per_token(block_size) * tokens
    return 6.0 * sum(p.numel() for p in model.parameters()) * tokens


def matmul_rate(device: torch.device, dtype: torch.dtype, seconds: float = 0.3) -> float:
    """Floating-point operations a second in matrix products, measured in at most about `seconds`.

    The best of square matrices, each side twice the one before, as long as there is time; up to
    `ENOUGH` in any case, since on a busy machine small ones may be slow for another reason.
    """
    _timed_product(*torch.randn(2, 128, 128, device=device).to(dtype))  # libraries load here
    best, side, end = 0.0, 128, time.perf_counter() + seconds
    while side <= 8192:
        a, b = torch.randn(2, side, side, device=device).to(dtype)
        took = min(_timed_product(a, b) for _ in range(3))
        best = max(best, 2 * side**3 / took)
        if side >= ENOUGH and time.perf_counter() + 4 * 8 * took > end:
            break
        side *= 2
    return best


def _timed_product(a: Tensor, b: Tensor) -> float:
    start = time.perf_counter()
    (a @ b)[0, 0].item()
    return time.perf_counter() - start


def choose_device(wanted: str) -> torch.device:
    """The device of this name, or with "auto" the first of CUDA, MPS and CPU that is there.

    Raises:
        SurgeryError: it is not there.
    """
    there = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    if wanted == "auto":
        wanted = next(name for name, present in there.items() if present)
    if not there[wanted]:
        raise SurgeryError(f"there is no {wanted} device here", "leave the device at auto")
    return torch.device(wanted)


def _precision(wanted: str, device: torch.device) -> torch.dtype:
    if wanted != "auto":
        return torch.bfloat16 if wanted == "bfloat16" else torch.float32
    return torch.bfloat16 if has_bfloat16(device) else torch.float32


def has_bfloat16(device: torch.device) -> bool:
    """Whether a device multiplies bfloat16 in hardware."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return device.type == "cpu" and cpu_has_bfloat16()


def cpu_has_bfloat16() -> bool:
    """Whether the processor multiplies bfloat16 in hardware (AVX-512 BF16, AMX)."""
    return any(torch.cpu.get_capabilities().get(flag) for flag in ("avx512_bf16", "amx_bf16"))


def lacking_to_compile(device: torch.device) -> str:
    """Names the tool that `torch.compile` needs on a device and lacks; "" if none."""
    if device.type == "cpu":
        compiler = os.environ.get("CXX") or ("clang++" if sys.platform == "darwin" else "g++")
        return "" if shutil.which(compiler) else f"C++ compiler ({compiler})"
    if device.type == "cuda" and not find_spec("triton"):
        return "triton"
    return "" if shutil.which("cc") or shutil.which("gcc") else "C compiler (cc)"
