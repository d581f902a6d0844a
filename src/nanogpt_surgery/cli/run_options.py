"""The flags that `train` and `finetune` share."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter


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
    epochs: float | None = None
    """passes over the data, in the place of --max-steps; 3 for instruction data by default"""
    patience: int = 0
    """evaluations in a row without improvement after which the training stops (0: never)"""
    save_every: str = "10m"
    """steps (500) or time (90s, 10m, 2h) from one checkpoint to the next, beside evaluations'"""
    sample_every: int | None = None
    """steps from one sample answer to the next; by default at evaluations (0: none)"""
    plan: Annotated[bool, Parameter(negative="")] = False
    """say what it will take, by a few real steps, and touch nothing"""
    json: Annotated[bool, Parameter(negative="")] = False
    """print the result as JSON"""
