"""How the next token is chosen, with the defaults. This module does not load torch."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Integral
from typing import Annotated, Any, Literal

from nanogpt_surgery.errors import SurgeryError, quoted
from nanogpt_surgery.values import WEIGHT, Kind, Settings, number, raise_all, wrong_values

Engine = Literal["auto", "native", "plain"]


def _is_whole(value: Any) -> bool:
    """Returns whether it is an integer, NumPy's too, but not True or False."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def _are_biases(biases: Any) -> bool:
    return isinstance(biases, Mapping) and all(
        _is_whole(index) and (bias == -math.inf or WEIGHT.holds(bias))
        for index, bias in biases.items()
    )


AT_LEAST_1 = Kind("a whole number of at least 1", lambda x: _is_whole(x) and x >= 1)
TEMPERATURE = number("of at least 0, below 1e30", lambda x: 0 <= x < 1e30)
PENALTY = number("above 1e-30 and below 1e30", lambda x: 1e-30 < x < 1e30)
BIASES = Kind("numbers below 1e30, or -inf, by id", _are_biases)


@dataclass(frozen=True)
class SamplingSettings(Settings):
    """How the next token is drawn; all that is wrong with the values is one `SurgeryError`."""

    temperature: Annotated[float, TEMPERATURE] = 1.0
    """0 takes the likeliest token; 1 draws from the model's distribution"""
    top_k: Annotated[int, AT_LEAST_1] | None = None
    """draw among the k likeliest"""
    top_p: Annotated[float, number("above 0 and at most 1", lambda x: 0 < x <= 1)] = 1.0
    """draw among the fewest tokens whose probabilities reach p together"""
    min_p: Annotated[float, number("between 0 and 1", lambda x: 0 <= x <= 1)] = 0.0
    """draw among tokens at least this share as likely as the likeliest"""
    repetition_penalty: Annotated[float, PENALTY] = 1.0
    """divides the positive logits of tokens in the prompt or the answer, multiplies the negative"""
    presence_penalty: Annotated[float, WEIGHT] = 0.0
    """taken off the logits of tokens in the answer"""
    frequency_penalty: Annotated[float, WEIGHT] = 0.0
    """taken off the logits of tokens in the answer, as often as they are there"""
    logit_bias: Annotated[Mapping[int, float], BIASES] = field(default_factory=dict)
    """added to the logits of these ids; −inf bans one"""

    @property
    def penalises(self) -> bool:
        """Whether logits depend on what came before."""
        return (self.repetition_penalty, self.presence_penalty, self.frequency_penalty) != (1, 0, 0)


MOST_SEED = 2**64 - 1  # a generator of PyTorch's takes 64 bits
SEED = Kind(f"a whole number from 0 to {MOST_SEED}", lambda x: _is_whole(x) and 0 <= x <= MOST_SEED)


def check_seed(seed: int | None) -> None:
    """Raises `SurgeryError` unless a generator takes this seed; None leaves the choice to it."""
    raise_all([] if seed is None else wrong_values(SEED, {"seed": seed}))


def check_count(max_new_tokens: int, least: int = 0) -> None:
    """Raises `SurgeryError` unless it is a number of tokens to generate."""
    kind = Kind(f"a whole number of at least {least}", lambda x: _is_whole(x) and x >= least)
    raise_all(wrong_values(kind, {"max_new_tokens": max_new_tokens}))


def check_stop(stop: Sequence[str]) -> None:
    """Raises `SurgeryError` if a string that is to end a text is empty."""
    if isinstance(stop, str) or not all(isinstance(text, str) for text in stop):
        raise SurgeryError(f"stop is {quoted(stop)}; it must be several texts", "stop=['text']")
    if "" in stop:
        raise SurgeryError("a stop string is empty; it would end every text at once")
