"""One id drawn from logits, as `generate` draws it."""

import torch
from torch import Tensor

from nanogpt_surgery import SamplingSettings
from nanogpt_surgery.generation.generate import choose


def sample(
    logits: Tensor,
    temperature: float = 1.0,
    top_k: int | None = None,
    generator: torch.Generator | None = None,
) -> int:
    return choose(logits, SamplingSettings(temperature, top_k), (), (), generator)
