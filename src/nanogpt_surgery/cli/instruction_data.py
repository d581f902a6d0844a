"""How instruction data is read and written, with the defaults. This module does not load torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

DataKind = Literal["auto", "text", "instructions"]
TemplateName = Literal["model", "chatml", "plain"]


@dataclass(frozen=True)
class InstructionSettings:
    """Which files are instruction data, and what of them is trained on."""

    data: DataKind = "auto"
    """what the files hold; auto: instructions where all are JSON, JSONL, CSV or TSV"""
    template: TemplateName = "model"
    """how conversations are written: as the model's own template does, or as one of ours"""
    answers_only: bool = True
    """train on answers and what ends them, or on every token"""
    pack: bool = False
    """put several conversations in a row; they do not see each other"""
