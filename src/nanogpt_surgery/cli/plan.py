"""`surgery plan`: what an injection would do, before anything is touched."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from nanogpt_surgery.cli.console import show
from nanogpt_surgery.cli.options import TargetOptions, given, options_of
from nanogpt_surgery.lora.settings import LoRASettings
from nanogpt_surgery.training.settings import FitSettings

if TYPE_CHECKING:
    from nanogpt_surgery.model.config import GPTConfig

LoraOptions: Any = options_of(LoRASettings, "LoRA", leave_out=("name",))


def plan(
    model: str,
    *,
    target: TargetOptions = None,
    lora: LoraOptions = None,
    batch_size: int = FitSettings.batch_size,
    block_size: int | None = None,
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
    from nanogpt_surgery.formats.model_file import open_model
    from nanogpt_surgery.lora.forecast import plan_lora

    rows = FitSettings(batch_size=batch_size).batch_size  # refuses what fit would
    network = open_model(model, torch.float32)[0]  # as finetune opens it
    probe = torch.zeros(rows, window(block_size, network.config.block_size), dtype=torch.long)
    report = plan_lora(network, probe=probe, **given(target), **given(lora))
    fused = sorted(_fused(network.config, {row["layer"] for row in report.rows}))
    if fused:
        report.summary["adapter_bytes_are_more"] = (
            f"the file fuses {', '.join(fused)}: one B for all of them, with zeros between theirs"
        )
    show(report, json)


def _fused(config: GPTConfig, planned: set[str]) -> set[str]:
    """The endings of planned layers that the family's checkpoints hold as parts of one matrix."""
    from nanogpt_surgery.formats.huggingface import OWN, family_of
    from nanogpt_surgery.formats.name_map import rows

    family = family_of(config)
    if family == OWN:
        return set()
    fused = (
        [row.ours for row in rows(family, config.n_layer) if len(row.ours) > 1] if family else []
    )
    return {name.rpartition(".")[2] for parts in fused for name in parts if name in planned}
