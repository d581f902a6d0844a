"""W + ΔW in the place of each adapted weight, with what that does measured, and refused if wrong.

A merge into a folder and one into a file for other programs share it: both say what is left of ΔW
after their rounding, and hold what they wrote against the adapted model.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor

from nanogpt_surgery.formats.folders.merge_preparation import Merge
from nanogpt_surgery.lora.layer import lora_layers
from nanogpt_surgery.lora.merge_metrics import (
    RoundingOf,
    check_effect,
    check_weights,
    compare_logits,
    logits_of,
    merge_rows,
)
from nanogpt_surgery.lora.ties import check_undecided
from nanogpt_surgery.lora.wrapping import merge_layers
from nanogpt_surgery.model.finite import check_finite
from nanogpt_surgery.model.simple_gpt import SimpleGPT

WIDER = "surgery merge into --dtype float32, or surgery export with --form F32"


@dataclass(frozen=True)
class Merged:
    """What a merge did to the weights, a row a layer, and what its file is to be held against."""

    rows: list[dict[str, Any]]
    adapted: Tensor
    probe: Tensor
    probed_on: str
    tolerance: float | None

    def measure(self, again: SimpleGPT) -> dict[str, Any]:
        """The effect on the logits of a model that was read again; it becomes float32.

        Raises:
            SurgeryError: it exceeds the tolerance, or the logits are not finite.
        """
        merged = logits_of(again.float(), self.probe)
        check_finite(merged, again, partial(logits_of, again, self.probe), "the merged model")
        effect = compare_logits(self.adapted, merged)
        if self.tolerance is not None:
            check_effect(effect, self.tolerance)
        largest = {"largest_logit": float(self.adapted.abs().max())}
        return {**effect, **largest, "measured_on": self.probed_on}


def add_in(merge: Merge, rounding: RoundingOf, tolerance: float, force: bool) -> Merged:
    """Merge the adapter of a prepared model, in float32; the model no longer carries it then.

    Args:
        merge: changed in place.
        rounding: what the file will make of a layer's weight, by name and weight, and its name.
        tolerance: largest mean KL divergence that `Merged.measure` lets pass.
        force: let pass whatever is measured.

    Raises:
        SurgeryError: every weight would be the number that it is without the adapter, or one would
            be NaN or infinite.
    """
    adapted, layers = logits_of(merge.model, merge.probe), lora_layers(merge.model)
    again = partial(logits_of, merge.model, merge.probe)
    check_finite(adapted, merge.model, again, f"the model with {merge.adapter}")
    rows = merge_rows(layers, rounding)
    if not force:
        check_weights(
            rows, layers, str(merge.adapter), WIDER, "train the adapter first, or --force"
        )
    check_undecided(merge.model, layers)
    merge_layers(merge.model)  # the model is only here to be written: nothing is journaled
    return Merged(rows, adapted, merge.probe, merge.probed_on, None if force else tolerance)
