"""`surgery plan`: what an injection would do, before anything is touched."""

from __future__ import annotations

from typing import Annotated, Any

from cyclopts import Parameter

from nanogpt_surgery.cli.console import show
from nanogpt_surgery.cli.options import TargetOptions, given, options_of
from nanogpt_surgery.lora.settings import LoRASettings

LoraOptions: Any = options_of(LoRASettings, "LoRA", leave_out=("name",))


def plan(
    model: str,
    *,
    target: TargetOptions = None,
    lora: LoraOptions = None,
    json: Annotated[bool, Parameter(negative="")] = False,
) -> None:
    """Say which layers a LoRA would adapt, with its parameters, its file and its memory.

    Parameters
    ----------
    model
        a run, a model folder, a GGUF file or a hub name
    json
        print it as JSON
    """
    from nanogpt_surgery.formats.model_file import open_model
    from nanogpt_surgery.lora.forecast import plan_lora

    show(plan_lora(open_model(model)[0], **given(target), **given(lora)), json)
