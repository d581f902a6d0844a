"""Settings of the data of a LoRA's training. This module does not load torch."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from nanogpt_surgery.values import Settings


@dataclass(frozen=True)
class DataSettings(Settings):
    """How text, or conversations, become rows to train on."""

    mix: str | None = None
    """draw from each source of text in proportion, as in 3:1 for two of them"""
    block_size: int | None = None
    """tokens in a window of text, or of an example; the model's own by default, at most 256"""
    stride: int | None = None
    """tokens from the start of one window of text to the next; by default the whole window where
    layers before the first that learns are computed once (see cache_gib), else 1"""
    cache_dir: Path | None = None
    """a folder for the hidden states that are kept (cache_gib), instead of memory"""
    data: Literal["auto", "text", "instructions"] = "auto"
    """what the files hold; auto: instructions where all are JSON, JSONL, CSV or TSV"""
    template: Literal["model", "chatml", "plain"] = "model"
    """how conversations are written: as the model's own template does, or as one of ours"""
    answers_only: bool = True
    """train on answers and what ends them, or on every token"""
    pack: bool = False
    """put several conversations in a row; they do not see each other"""
