"""Operations beside LoRA's own, each in the journal, measured and undone."""

from nanogpt_surgery.surgery.ablation import ablate
from nanogpt_surgery.surgery.adapters import (
    combine,
    compress,
    extract,
    remove_intruders,
)
from nanogpt_surgery.surgery.direction import (
    Direction,
    mean_difference,
    plan_direction,
    steer,
)
from nanogpt_surgery.surgery.editing import edit
from nanogpt_surgery.surgery.models import combine_models
from nanogpt_surgery.surgery.rank_planning import RankPlan, plan_ranks
from nanogpt_surgery.surgery.structure import duplicate_layers, prune_layers
from nanogpt_surgery.surgery.vocabulary import (
    add_tokens,
    drop_unused_tokens,
)

__all__ = [
    "Direction",
    "RankPlan",
    "ablate",
    "add_tokens",
    "combine",
    "combine_models",
    "compress",
    "drop_unused_tokens",
    "duplicate_layers",
    "edit",
    "extract",
    "mean_difference",
    "plan_direction",
    "plan_ranks",
    "prune_layers",
    "remove_intruders",
    "steer",
]
