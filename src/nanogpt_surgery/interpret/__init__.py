"""Look inside a model, adapted or not; nothing here changes one."""

from nanogpt_surgery.interpret.attribution import Attribution, attribution
from nanogpt_surgery.interpret.comparison import Comparison, Moved, compare, forgetting
from nanogpt_surgery.interpret.examination import examine
from nanogpt_surgery.interpret.lens import Lens, attention, logit_lens
from nanogpt_surgery.interpret.patching import (
    Intervention,
    add,
    mean,
    patch,
    project_out,
    put,
    zero,
)
from nanogpt_surgery.interpret.points import points_of
from nanogpt_surgery.interpret.recording import Activations, plan_recording, record
from nanogpt_surgery.interpret.tracing import Trace, causal_trace

__all__ = [
    "Activations",
    "Attribution",
    "Comparison",
    "Intervention",
    "Lens",
    "Moved",
    "Trace",
    "add",
    "attention",
    "attribution",
    "causal_trace",
    "compare",
    "examine",
    "forgetting",
    "logit_lens",
    "mean",
    "patch",
    "plan_recording",
    "points_of",
    "project_out",
    "put",
    "record",
    "zero",
]
