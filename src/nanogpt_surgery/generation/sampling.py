"""Choosing the next token from its logits.

The order is transformers': penalties and biases, then the temperature, then top-k, top-p and min-p,
each on what the one before has left.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from nanogpt_surgery.errors import SurgeryError
from nanogpt_surgery.generation.settings import SamplingSettings


def sample(
    logits: Tensor,
    temperature: float = 1.0,
    top_k: int | None = None,
    generator: torch.Generator | None = None,
) -> int:
    """One id drawn from logits (V,).

    Temperature 0 is the largest logit. Otherwise the `top_k` largest (all of them, if there are no
    more) are divided by the temperature, and one is drawn by their softmax.
    """
    return choose(logits, SamplingSettings(temperature, top_k), (), (), generator)


def choose(
    logits: Tensor,
    settings: SamplingSettings,
    prompt: Sequence[int],
    answer: Sequence[int],
    generator: torch.Generator | None = None,
) -> int:
    """One id drawn from logits (V,), given the ids of the prompt and of the answer so far."""
    logits = adjusted(logits, settings, prompt, answer)
    if settings.logit_bias and float(logits.max()) == -math.inf:
        raise SurgeryError("logit_bias bans every id", "leave one that can be drawn")
    if settings.temperature == 0:
        return int(logits.argmax())
    logits = logits.float()
    # Relative to the largest, so that no temperature, however small, makes infinities.
    temperature = max(settings.temperature, torch.finfo(logits.dtype).tiny)
    logits, ids = kept((logits - logits.max()) / temperature, settings)
    return int(ids[torch.multinomial(torch.softmax(logits, -1), 1, generator=generator)])


def adjusted(
    logits: Tensor, settings: SamplingSettings, prompt: Sequence[int], answer: Sequence[int]
) -> Tensor:
    """Logits (V,) after penalties and biases; the argument is left as it is."""
    if not settings.penalises and not settings.logit_bias:
        return logits
    logits = logits.float().clone()
    seen = torch.tensor(sorted({*prompt, *answer}), dtype=torch.long)
    values = logits[seen]
    penalty = settings.repetition_penalty
    logits[seen] = torch.where(values > 0, values / penalty, values * penalty)
    counts = torch.bincount(torch.tensor(answer, dtype=torch.long), minlength=logits.numel())
    logits -= settings.frequency_penalty * counts + settings.presence_penalty * (counts > 0)
    for index, bias in settings.logit_bias.items():
        logits[index] += bias
    return logits


def kept(logits: Tensor, settings: SamplingSettings) -> tuple[Tensor, Tensor]:
    """The logits among which to draw, and their ids, both (K,)."""
    ids = torch.arange(logits.numel(), device=logits.device)
    if settings.top_k is not None and settings.top_k < logits.numel():
        logits, ids = logits.topk(settings.top_k)
    if settings.top_p < 1:
        logits, order = logits.sort(descending=True)
        ids = ids[order]
        probabilities = torch.softmax(logits, -1)
        before = probabilities.cumsum(-1) - probabilities  # of all that are likelier
        count = int((before < settings.top_p).sum())
        logits, ids = logits[:count], ids[:count]
    if settings.min_p > 0:
        probabilities = torch.softmax(logits, -1)
        likely = probabilities >= settings.min_p * probabilities.max()
        logits, ids = logits[likely], ids[likely]
    return logits, ids
