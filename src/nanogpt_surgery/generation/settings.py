"""How the next token is chosen, with the defaults. This module does not load torch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import Any

from nanogpt_surgery.errors import SurgeryError, quoted
from nanogpt_surgery.values import Kind

MOST_SEED = 2**64 - 1  # a generator of PyTorch's takes 64 bits
_MOST = 1e30  # in float32, with a logit's size to spare


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
        wanted: dict[str, Kind] = {
            "temperature": ("a number of at least 0 and finite", lambda x: 0 <= x < math.inf),
            "top_k": ("none or a whole number of at least 1", lambda x: _whole(x) and x >= 1),
            "top_p": ("a number above 0 and at most 1", lambda x: 0 < x <= 1),
            "min_p": ("a number between 0 and 1", lambda x: 0 <= x <= 1),
            "repetition_penalty": (
                f"a number above {1 / _MOST:g} and below {_MOST:g}",
                lambda x: 1 / _MOST < x < _MOST,
            ),
            "presence_penalty": (f"a number below {_MOST:g}", lambda x: abs(x) < _MOST),
            "frequency_penalty": (f"a number below {_MOST:g}", lambda x: abs(x) < _MOST),
        }
        found = [
            f"{name} is {quoted(value)}; it must be {kind}"
            for name, (kind, holds) in wanted.items()
            if not (_number(value := getattr(self, name)) and holds(value))
            and not (name == "top_k" and value is None)
        ]
        if not _are_biases(self.logit_bias):
            found.append(
                f"logit_bias is {quoted(self.logit_bias)}; it must be numbers below {_MOST:g}, or "
                "-inf, by id"
            )
        if found:
            raise SurgeryError("; ".join(found))

    @property
    def penalises(self) -> bool:
        """Whether logits depend on what came before."""
        return (self.repetition_penalty, self.presence_penalty, self.frequency_penalty) != (1, 0, 0)


def check_stop(stop: Sequence[str]) -> None:
    """Raise `SurgeryError` if a string that is to end a text is empty."""
    if isinstance(stop, str) or not all(isinstance(text, str) for text in stop):
        raise SurgeryError(f"stop is {quoted(stop)}; it must be several texts", "stop=['text']")
    if "" in stop:
        raise SurgeryError("a stop string is empty; it would end every text at once")


def check_seed(seed: int | None) -> None:
    """Raise `SurgeryError` unless a generator takes a seed; None is one of its own choice."""
    if seed is not None and not (_whole(seed) and 0 <= seed <= MOST_SEED):
        raise SurgeryError(
            f"seed is {quoted(seed)}; it must be a whole number from 0 to {MOST_SEED}"
        )


def check_count(max_new_tokens: int, least: int = 0) -> None:
    """Raise `SurgeryError` unless it is a number of tokens to generate."""
    if not _whole(max_new_tokens) or max_new_tokens < least:
        raise SurgeryError(
            f"max_new_tokens is {quoted(max_new_tokens)}; it must be a whole number of at least "
            f"{least}"
        )


def _whole(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _are_biases(biases: Any) -> bool:
    return isinstance(biases, Mapping) and all(
        _whole(index) and _number(bias) and (bias == -math.inf or abs(bias) < _MOST)
        for index, bias in biases.items()
    )
