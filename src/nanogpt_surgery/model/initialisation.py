"""Another start, from which Muon learns faster (docs/training.md).

The embeddings set the scale of the residual stream, and every branch and the head add nothing until
they have learned to.

| weight                                    | drawn from                                          |
|-------------------------------------------|-----------------------------------------------------|
| embeddings of tokens, positions           | normal, deviation 1                                 |
| embeddings of previous tokens             | normal, deviation 0.5                               |
| `o_proj`, `down_proj`, an untied head     | 0                                                   |
| all embeddings, where the head is tied    | as in `initialise`: with one of deviation 1 for a   |
|                                           | head the first loss would be far over ln V          |
| the rest                                  | as in `initialise`                                  |
"""

from __future__ import annotations

from torch import nn

from nanogpt_surgery.model.config import GPTConfig
from nanogpt_surgery.model.simple_gpt import initialise


def start_from_zero(model: nn.Module, config: GPTConfig) -> None:
    """Draws the weights of a `SimpleGPT` anew, in place, by the table above."""
    initialise(model, config)
    for name, parameter in model.named_parameters():
        if name.startswith("embed_") and not config.tie_head:
            nn.init.normal_(parameter, std=0.5 if name.startswith("embed_prev_tokens") else 1.0)
        elif name.endswith(("o_proj.weight", "down_proj.weight", "lm_head.weight")):
            nn.init.zeros_(parameter)
