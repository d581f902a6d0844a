"""Operations beside LoRA's own, each in the journal, measured and undone."""

from nanogpt_surgery.surgery.ablation import ablate, plan_ablate
from nanogpt_surgery.surgery.adapters import (
    combine,
    compress,
    extract,
    plan_combine,
    plan_compress,
    plan_extract,
    plan_remove_intruders,
    remove_intruders,
)
from nanogpt_surgery.surgery.direction import (
    Direction,
    mean_difference,
    plan_direction,
    steer,
)
from nanogpt_surgery.surgery.editing import edit, plan_edit
from nanogpt_surgery.surgery.models import combine_models, plan_combine_models
from nanogpt_surgery.surgery.rank_planning import RankPlan, plan_ranks
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
    "plan_ablate",
    "plan_add_tokens",
    "plan_combine",
    "plan_combine_models",
    "plan_compress",
    "plan_direction",
    "plan_drop_unused_tokens",
    "plan_duplicate",
    "plan_edit",
    "plan_extract",
    "plan_prune",
    "plan_ranks",
    "plan_remove_intruders",
    "prune_layers",
    "remove_intruders",
    "steer",
]
