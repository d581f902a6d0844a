"""Operations beside LoRA's own, each in the journal, measured and undone."""

from nanogpt_surgery.surgery.ablation import ablate
from nanogpt_surgery.surgery.adapters import combine, compress, extract
from nanogpt_surgery.surgery.structure import (
    duplicate_layers,
    plan_duplicate,
    plan_prune,
    prune_layers,
)

__all__ = [
    "ablate",
    "combine",
    "compress",
    "duplicate_layers",
    "extract",
    "plan_duplicate",
    "plan_prune",
    "prune_layers",
]
