"""The flags that `train` and `finetune` share."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from nanogpt_surgery.cli.console import AllLayers


@Parameter(name="*")
@dataclass(frozen=True)
class RunOptions:
    """Where a training goes, and whether it begins."""

    out: Path
    """the folder to make: what was trained, checkpoints, metrics.jsonl, loss.png"""
    resume: bool = False
    """go on with the run that is there"""
    strict: Annotated[bool, Parameter(negative="")] = False
    """with --resume: stop where the newest checkpoint is damaged, instead of passing over it"""
    allow_changes: Annotated[bool, Parameter(negative="")] = False
    """with --resume: go on although settings, data or tokenizer differ, and say in what"""
    plan: Annotated[bool, Parameter(negative="")] = False
    """say what it will take, by a few real steps, and touch nothing"""
    all_layers: AllLayers = False
    json: Annotated[bool, Parameter(negative="")] = False
    """print the result as JSON"""
