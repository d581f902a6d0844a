"""How the next token is chosen, with the defaults. This module does not load torch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from nanogpt_surgery.errors import SurgeryError


def check_stop(stop: Sequence[str]) -> None:
    """Raise `SurgeryError` if a string that is to end a text is empty."""
    if "" in stop:
        raise SurgeryError("a stop string is empty; it would end every text at once")


@dataclass(frozen=True)
class SamplingSettings:
    """Settings of a draw; what is out of range is reported all at once, as a `SurgeryError`."""

    temperature: float = 1.0
    """0 takes the likeliest token; 1 draws from the model's distribution"""
    top_k: int | None = None
    """draw among the k likeliest"""
    top_p: float = 1.0
    """draw among the fewest tokens whose probabilities reach p together"""
    min_p: float = 0.0
    """draw among tokens at least this share as likely as the likeliest"""
    repetition_penalty: float = 1.0
    """divides the positive logits of tokens in the prompt or the answer, multiplies the negative"""
    presence_penalty: float = 0.0
    """taken off the logits of tokens in the answer"""
    frequency_penalty: float = 0.0
    """taken off the logits of tokens in the answer, as often as they are there"""
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    """added to the logits of these ids; −inf bans one"""

    def __post_init__(self) -> None:
        ranges = {
            "temperature": (0 <= self.temperature < math.inf, "at least 0 and finite"),
            "top_k": (self.top_k is None or self.top_k >= 1, "at least 1"),
            "top_p": (0 < self.top_p <= 1, "above 0 and at most 1"),
            "min_p": (0 <= self.min_p <= 1, "between 0 and 1"),
            "logit_bias": (not any(map(math.isnan, self.logit_bias.values())), "numbers"),
            "repetition_penalty": (self.repetition_penalty > 0, "above 0"),
        }
        found = [
            f"{name} is {getattr(self, name)}; it must be {wanted}"
            for name, (holds, wanted) in ranges.items()
            if not holds
        ]
        if found:
            raise SurgeryError("; ".join(found))

    @property
    def penalises(self) -> bool:
        """Whether logits depend on what came before."""
        return (self.repetition_penalty, self.presence_penalty, self.frequency_penalty) != (1, 0, 0)
