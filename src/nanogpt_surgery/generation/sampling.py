"""Choosing the next token from its logits."""

from __future__ import annotations

import torch
from torch import Tensor


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
    if temperature == 0:
        return int(logits.argmax())
    logits = logits.float()
    if top_k is not None and top_k < logits.numel():
        values, ids = logits.topk(top_k)  # (top_k,)
    else:
        values, ids = logits, torch.arange(logits.numel(), device=logits.device)
    # Relative to the largest, so that no temperature, however small, makes infinities.
    scaled = (values - values.max()) / max(temperature, torch.finfo(values.dtype).tiny)
    probabilities = torch.softmax(scaled, dim=-1)
    return int(ids[torch.multinomial(probabilities, 1, generator=generator)])
