"""What an adapter is told at its birth, with its defaults: the only place where they stand.

The command line's flags and the keys of a config file are made from these fields. This module does
not load torch.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal, TypeAlias, get_args

from nanogpt_surgery.errors import SurgeryError

Tied: TypeAlias = Literal["refuse", "untie", "both"]


@dataclass(frozen=True)
class LoRASettings:
    """Settings of `inject_lora`; contradictions are reported all at once, as a `SurgeryError`."""

    rank: int = 8
    """rank of each update"""
    alpha: float = 16
    """each update is scaled by alpha / rank"""
    dropout: float = 0.0
    """on the input of each update, in training"""
    name: str = "default"
    """of the adapter"""
    rslora: bool = False
    """scale by alpha / √rank instead (arXiv:2312.03732)"""
    dora: bool = False
    """learn the length of each output's row of the weight too (arXiv:2402.09353)"""
    pissa: bool = False
    """start at the weight's principal directions instead of at random (arXiv:2404.02948)"""
    rank_pattern: dict[str, int] | None = None
    """other ranks, by layer name or its ending"""
    alpha_pattern: dict[str, float] | None = None
    """other alphas, by layer name or its ending"""
    tied: Tied = "refuse"
    """a target that shares its weight: refuse it, let a merge untie it, or adapt both"""

    def __post_init__(self) -> None:
        found = [
            f"{name} is {value}; it must be at least 1"
            for name, value in _values("rank", self.rank, self.rank_pattern)
            if not value >= 1
        ]
        found += [
            f"{name} is {value}; it must be above 0"
            for name, value in _values("alpha", self.alpha, self.alpha_pattern)
            if not value > 0
        ]
        if not 0 <= self.dropout < 1:
            found.append(f"dropout is {self.dropout}; it must be at least 0 and below 1")
        if self.tied not in get_args(Tied):
            found.append(f"tied is {self.tied!r}; it must be one of {', '.join(get_args(Tied))}")
        if found:
            raise SurgeryError("there is no such LoRA: " + "; ".join(found))

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain values, for JSON."""
        return asdict(self)


def _values(name: str, value: float, pattern: dict[str, Any] | None) -> list[tuple[str, float]]:
    """A setting and its exceptions, each under the name that says where it stands."""
    return [(name, value), *((f"{name}_pattern of {k!r}", v) for k, v in (pattern or {}).items())]
