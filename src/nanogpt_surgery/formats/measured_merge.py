"""W + ΔW in the place of each adapted weight, with what that does measured, and refused if wrong.

A merge into a folder and one into a file for other programs share it: both say what is left of ΔW
after their rounding, and hold what they wrote against the adapted model.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from nanogpt_surgery.formats.merge_preparation import Merge
from nanogpt_surgery.lora.examination import (
    Rounding,
    compare_logits,
    logits_of,
    matrix_layers,
    refuse_effect,
    refuse_no_change,
    what_arrives,
)
from nanogpt_surgery.lora.lora_layer import lora_layers
from nanogpt_surgery.lora.operations import merge_lora
from nanogpt_surgery.model.simple_gpt import SimpleGPT

WIDER = "surgery merge into --dtype float32, or surgery export with --form F32"
RoundingOf = Callable[[str, Tensor], tuple[str, Rounding]]


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
            SurgeryError: it exceeds the tolerance.
        """
        effect = compare_logits(self.adapted, logits_of(again.float(), self.probe))
        if self.tolerance is not None:
            refuse_effect(effect, self.tolerance)
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
        SurgeryError: every weight would be the number that it is without the adapter.
    """
    adapted = logits_of(merge.model, merge.probe)
    layers = lora_layers(merge.model)
    matrices = matrix_layers(layers)
    rows = []
    for name, layer in matrices.items():
        kind, rounded = rounding(name, layer.original_layer.weight)
        rows.append({"layer": name, "dtype": kind, **what_arrives(layer, rounded)})
    if not force:
        refuse_no_change(
            rows, len(layers), str(merge.adapter), WIDER, "train the adapter first, or --force"
        )
    merge_lora(merge.model, keep_originals=False, force=True)  # judged above, as the file rounds
    return Merged(rows, adapted, merge.probe, merge.probed_on, None if force else tolerance)
