"""How the weights of a new model are drawn. Constructors draw nothing that stays.

| weight                                    | drawn from                                          |
|-------------------------------------------|-----------------------------------------------------|
| embeddings of tokens, lags and positions  | normal, deviation 0.02 (GPT-2)                      |
| projections into attention, feed-forward  | normal, deviation 0.5 / √C: GPT-2's 0.02 at its     |
|                                           | width, and in proportion at others (docs/log.md)    |
| `o_proj`, `down_proj`                     | the same / √(2 · layers): 2 · layers branches add   |
|                                           | up in the residual stream (GPT-2)                   |
| the head, and the embedding tied to it    | normal, deviation min(0.02, 0.2 / √C): logits       |
|                                           | start near 0, so the first loss is near ln V        |
| biases                                    | 0                                                   |
| weights of norms                          | 1                                                   |

Where Muon trains, another start learns faster (docs/training.md): the embeddings set the scale of
the residual stream, and every branch and the head add nothing until they have learned to.

| weight                                    | drawn from                                          |
|-------------------------------------------|-----------------------------------------------------|
| embeddings of tokens, positions           | normal, deviation 1                                 |
| embeddings of lags                        | normal, deviation 0.5                               |
| `o_proj`, `down_proj`, an untied head     | 0                                                   |
| all embeddings, where the head is tied    | as above: with one of deviation 1 for a head the    |
|                                           | first loss would be far over ln V                   |
| the rest                                  | as above                                            |
"""

from __future__ import annotations

import math

from torch import nn

from nanogpt_surgery.model.config import GPTConfig

EMBEDDING = 0.02
LAG = 0.5


def initialise(model: nn.Module, config: GPTConfig) -> None:
    """Draw every weight of a `SimpleGPT` anew, in place, from torch's global generator."""
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.zeros_(parameter)
        elif parameter.dim() == 1:
            nn.init.ones_(parameter)
        else:
            nn.init.normal_(parameter, std=_deviation(name, config))


def start_from_zero(model: nn.Module, config: GPTConfig) -> None:
    """Draw the weights of a `SimpleGPT` anew, in place, by the second table."""
    initialise(model, config)
    for name, parameter in model.named_parameters():
        if name.startswith("embed_") and not config.tie_head:
            nn.init.normal_(parameter, std=LAG if name.startswith("embed_lags") else 1.0)
        elif name.endswith(("o_proj.weight", "down_proj.weight", "lm_head.weight")):
            nn.init.zeros_(parameter)


def _deviation(name: str, config: GPTConfig) -> float:
    if name == "lm_head.weight" or (config.tie_head and name == "embed_tokens.weight"):
        return min(EMBEDDING, 0.2 / math.sqrt(config.n_embd))
    if name.startswith("embed_"):
        return EMBEDDING
    matrix = 0.5 / math.sqrt(config.n_embd)
    if name.endswith(("o_proj.weight", "down_proj.weight")):
        return matrix / math.sqrt(2 * config.n_layer)
    return matrix
