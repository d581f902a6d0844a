"""`surgery inspect`, `plan`, `doctor`: look, and touch nothing."""

from __future__ import annotations

import os
import platform
import sys
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from nanogpt_surgery.cli.framework.console import say, show
from nanogpt_surgery.cli.framework.options import (
    AllLayers,
    Json,
    Model,
    TargetOptions,
    given,
    options_of,
)
from nanogpt_surgery.data.text.corpus import read_texts
from nanogpt_surgery.errors import SurgeryError
from nanogpt_surgery.files.disk_errors import free_bytes
from nanogpt_surgery.files.writing import replace_text
from nanogpt_surgery.lora.settings import LoRASettings
from nanogpt_surgery.memory import available_memory
from nanogpt_surgery.report import Report

if TYPE_CHECKING:
    from nanogpt_surgery.data.tokenizers.tokenizer import Tokenizer
    from nanogpt_surgery.model.simple_gpt import SimpleGPT
    from nanogpt_surgery.surgery import RankPlan

LoraOptions: Any = options_of(LoRASettings, "LoRA", leave_out=("name",))
GRADIENT_TOKENS = 256  # of a window whose gradient is taken
PACKAGES = ("nanogpt-surgery", "torch", "tiktoken", "safetensors", "numpy", "rich", "cyclopts")


def inspect(path: str, *, all_layers: AllLayers = False, json: Json = False) -> None:
    """Show the tree of a model's modules, or the updates of an adapter.

    Args:
        path: a run, a model folder, a GGUF file, a hub name or an adapter folder
    """
    from nanogpt_surgery.formats.inspection import describe_adapter, describe_model

    is_adapter = (Path(path) / "adapter_config.json").is_file()
    show((describe_adapter if is_adapter else describe_model)(path), json, all_layers)


@Parameter(name="*", group="Ranks")
@dataclass(frozen=True)
class RankOptions:
    """A rank for each layer, from the gradients of a text."""

    rank_budget: int | None = None
    """give ranks out under this number of parameters, each where it helps most"""
    text: Annotated[list[str] | None, Parameter(consume_multiple=True)] = None
    """with --rank-budget: files or folders of the text to be trained on"""
    out: Path | None = None
    """with --rank-budget: a TOML file for the ranks, which finetune takes with --config"""

    def check(self) -> None:
        """Raises `SurgeryError` unless what is given belongs together."""
        if (self.rank_budget is None) != (self.text is None):
            raise SurgeryError("--rank-budget and --text belong together", "give both, or none")
        if self.out is not None and self.rank_budget is None:
            raise SurgeryError("--out is for the ranks of --rank-budget, which is not given")
        if self.out is not None and self.out.exists():
            raise SurgeryError(f"{self.out} is there already", "choose a new --out")

    def plan(
        self,
        network: SimpleGPT,
        tokenizer: Tokenizer | None,
        adapter: LoRASettings,
        target: dict[str, Any],
    ) -> RankPlan:
        """Returns the ranks that the gradients of the text give out."""
        from nanogpt_surgery.data.gpt_dataset import GPTDataset
        from nanogpt_surgery.data.tokenizers.tokenizer import required_tokenizer
        from nanogpt_surgery.surgery.rank_planning import batches_of, plan_ranks

        tokenizer = required_tokenizer(tokenizer, "the model")
        length = min(GRADIENT_TOKENS, network.config.block_size)
        batches = batches_of(GPTDataset(read_texts(self.text or []), tokenizer, block_size=length))
        return plan_ranks(network, batches, self.rank_budget or 0, **target, settings=adapter)


def plan(
    model: Model,
    *,
    target: TargetOptions | None = None,
    lora: LoraOptions = None,
    ranks: RankOptions = RankOptions(),
    all_layers: AllLayers = False,
    json: Json = False,
) -> None:
    """Say which layers a LoRA would adapt, their shapes, its parameters and the size of its file.

    What a training takes in memory and time, surgery finetune --plan says. With --rank-budget the
    layers (all-linear, unless --targets says otherwise) get ranks by the gradients of a text.
    """
    import torch

    from nanogpt_surgery.formats.model_file import open_model
    from nanogpt_surgery.formats.peft.writing import plan_lora

    ranks.check()
    network, tokenizer = open_model(model, torch.float32)  # as finetune opens it
    adapter = LoRASettings(**given(lora))
    if ranks.rank_budget is not None:
        found = ranks.plan(network, tokenizer, adapter, given(target))
        options = {"rank_pattern": found.rank_pattern, "alpha_pattern": found.alpha_pattern}
        report = found.report
        show(Report(report.title, report.rows, report.summary | (options if json else {})), json)
        if ranks.out is not None:
            replace_text(ranks.out, _toml(found))
            say(f"wrote {ranks.out}; finetune takes it with --config {ranks.out}")
        return
    show(plan_lora(network, **given(target), settings=adapter), json, all_layers)
    say(f"surgery finetune {model} TEXT… --out FOLDER trains it, by the same flags")


def _toml(plan: RankPlan) -> str:
    """Returns a plan of ranks as a config file."""
    import json

    lines = [f"targets = {json.dumps(plan.targets)}"]
    for name in ("rank_pattern", "alpha_pattern"):
        pairs = getattr(plan, name).items()
        lines += ["", f"[{name}]", *(f"{json.dumps(layer)} = {value}" for layer, value in pairs)]
    return "\n".join(lines) + "\n"


def doctor(*, json: Json = False) -> None:
    """Say what is installed, what the hardware can do, and what training would choose."""
    import torch

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
