"""Operations beside LoRA's own, each in the journal, measured and undone."""

from nanogpt_surgery.surgery.ablation import ablate
from nanogpt_surgery.surgery.adapters import combine, compress, extract
from nanogpt_surgery.surgery.structure import (
    duplicate_layers,
    plan_duplicate,
    plan_prune,
    prune_layers,
)
from nanogpt_surgery.surgery.vocabulary import (
    add_tokens,
    drop_unused_tokens,
    plan_add_tokens,
    plan_drop_unused_tokens,
)

__all__ = [
    "ablate",
    "add_tokens",
    "combine",
    "compress",
    "drop_unused_tokens",
    "duplicate_layers",
    "extract",
    "plan_add_tokens",
    "plan_drop_unused_tokens",
    "plan_duplicate",
    "plan_prune",
    "prune_layers",
]
