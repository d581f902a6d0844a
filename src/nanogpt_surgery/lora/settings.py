"""Settings of a new adapter, with their defaults: the only place where they stand.

The command line's flags and the keys of a config file are made from these fields. This module does
not load torch.
"""

from dataclasses import dataclass
from typing import Annotated, Literal, TypeAlias

from nanogpt_surgery.values import POSITIVE, SHARE, SIZE, Settings

Tied: TypeAlias = Literal["refuse", "untie", "both"]


@dataclass(frozen=True)
class LoRASettings(Settings):
    """Settings of `inject_lora`; all that is wrong with them is one `SurgeryError`."""

    rank: Annotated[int, SIZE] = 8
    """rank of each update"""
    alpha: Annotated[float, POSITIVE] = 16
    """each update is scaled by alpha / rank"""
    dropout: Annotated[float, SHARE] = 0.0
    """on the input of each update, in training"""
    name: str = "default"
    """of the adapter"""
    rslora: bool = False
    """scale by alpha / √rank instead (arXiv:2312.03732)"""
    dora: bool = False
    """learn the length of each output's row of the weight too (arXiv:2402.09353)"""
    pissa: bool = False
    """start at the weight's principal directions instead of at random (arXiv:2404.02948)"""
    rank_pattern: dict[str, Annotated[int, SIZE]] | None = None
    """other ranks, by layer name or its ending"""
    alpha_pattern: dict[str, Annotated[float, POSITIVE]] | None = None
    """other alphas, by layer name or its ending"""
    tied: Tied = "refuse"
    """a target that shares its weight, as a tied head: refuse, let a merge untie, or adapt both"""
