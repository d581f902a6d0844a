"""A scaling of the rotary wavelengths, by which a model trained on short texts reads long ones.

This module does not load torch.
"""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

from nanogpt_surgery.values import POSITIVE, SIZE, Settings

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class RopeScaling(Settings):
    """A scaling of the rotary wavelengths: Llama 3's, or the same for all ("linear").

    `linear` makes every wavelength `factor` times longer and reads nothing else. `llama3`:
    wavelengths under `original_max_position_embeddings / high_freq_factor` tokens stay, those over
    `original_max_position_embeddings / low_freq_factor` become `factor` times longer, and those
    between are interpolated.
    """

    factor: Annotated[float, POSITIVE]
    low_freq_factor: Annotated[float, POSITIVE] = 1.0
    high_freq_factor: Annotated[float, POSITIVE] = 4.0
    original_max_position_embeddings: Annotated[int, SIZE] = 8192
    rope_type: Literal["llama3", "linear"] = "llama3"

    def contradictions(self) -> list[str]:
        """Returns a sentence for each contradiction."""
        found = []
        if self.rope_type == "llama3" and self.factor < 1:
            found.append(f"factor is {self.factor}; it must be at least 1 in llama3")
        if self.low_freq_factor >= self.high_freq_factor:
            found.append(
                f"low_freq_factor {self.low_freq_factor} must be below high_freq_factor "
                f"{self.high_freq_factor}"
            )
        return found


def scale_rope_frequencies(frequencies: "Tensor", scaling: RopeScaling) -> "Tensor":
    """Divides frequencies (D/2,) by `factor`, so that a model trained on short texts reads long.

    "linear" divides all of them alike. "llama3" keeps the waves that turn often within the original
    context, divides those that hardly turn, and goes from one to the other by a ramp.
    """
    if scaling.rope_type == "linear":
        return frequencies / scaling.factor
    turns = scaling.original_max_position_embeddings * frequencies / (2 * math.pi)
    kept = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    kept = kept.clamp(0, 1)
    return frequencies * (kept + (1 - kept) / scaling.factor)
