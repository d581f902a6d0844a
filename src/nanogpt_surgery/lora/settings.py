"""Settings of a new adapter, with their defaults: the only place where they stand.

The command line's flags and the keys of a config file are made from these fields. This module does
not load torch.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal, TypeAlias, get_args

from nanogpt_surgery.values import (
    POSITIVE,
    SHARE,
    SIZE,
    SWITCH,
    TABLE,
    TEXT,
    raise_all,
    wrong,
    wrong_values,
)

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
        found = wrong(self, TABLE, "rank_pattern", "alpha_pattern")
        if not found:
            found = wrong_values(SIZE, _values("rank", self.rank, self.rank_pattern))
            found += wrong_values(POSITIVE, _values("alpha", self.alpha, self.alpha_pattern))
        found += wrong(self, SHARE, "dropout")
        found += wrong(self, TEXT, "name")
        found += wrong(self, SWITCH, "rslora", "dora", "pissa")
        if self.tied not in get_args(Tied):
            found.append(f"tied is {self.tied!r}; it must be one of {', '.join(get_args(Tied))}")
        raise_all("there is no such LoRA", found)

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain values, for JSON."""
        return asdict(self)


def _values(name: str, value: Any, pattern: dict[str, Any] | None) -> dict[str, Any]:
    """A setting and its exceptions, each under the name that says where it stands."""
    return {name: value} | {f"{name}_pattern of {k!r}": v for k, v in (pattern or {}).items()}
