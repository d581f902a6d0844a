"""The logit lens: the token that each layer would answer, if the model ended there.

Residual streams go through the final norm and the head before their time (nostalgebraist, 2020,
"interpreting GPT: the logit lens"). Beside it the attention probabilities.

Legend: L layers, B batch, T tokens, S keys, C width, H heads, V vocabulary, K likeliest.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nanogpt_surgery.arguments import check_arguments
from nanogpt_surgery.errors import SurgeryError
from nanogpt_surgery.interpret.recording import checked_ids, record
from nanogpt_surgery.model.loss import eval_mode
from nanogpt_surgery.model.simple_gpt import SimpleGPT


@dataclass(frozen=True)
class Lens:
    """The answers after the embedding and after each layer, for the token after each position."""

    likeliest: Tensor
    """the K likeliest ids, the likeliest first: (L + 1, B, T, K)"""
    probabilities: Tensor
    """theirs, float32: (L + 1, B, T, K)"""
    final: Tensor
    """the id that the whole model finds likeliest, (B, T)"""
    final_rank: Tensor
    """how many ids each layer finds likelier than the final one, (L + 1, B, T)"""
    final_probability: Tensor
    """of the final id, float32: (L + 1, B, T)"""

    def first_layer(self, row: int = 0, position: int = -1) -> int:
        """Returns after how many layers the final id is the likeliest, and stays so to the end."""
        wrong = (self.final_rank[:, row, position] > 0).nonzero()
        return int(wrong[-1]) + 1 if len(wrong) else 0


@check_arguments
def logit_lens(model: SimpleGPT, ids: Tensor, top: int = 5) -> Lens:
    """Returns what each layer would answer after each of ids (B, T).

    Args:
        model: with its adapters, if it carries any; left in the mode it is in.
        ids: int64.
        top: K, how many of the likeliest ids are kept.

    Raises:
        SurgeryError: `top` is not from 1 to the size of the vocabulary, or an id is not in it.
    """
    if not 1 <= top <= model.config.vocab_size:
        raise SurgeryError(f"top is {top}; it must be from 1 to {model.config.vocab_size}")
    ids, points = checked_ids(model, ids), ["layers.0.residual_before", "layers.*.residual"]
    with eval_mode(model), torch.inference_mode():
        with record(model, points) as activations:
            final = model(ids).argmax(-1)  # (B, T)
        last = len(model.layers) - 1
        names = [points[0], *(f"layers.{i}.residual" for i in range(last + 1))]
        layers = [_answers(model, activations[name], final, top) for name in names]
    likeliest, probabilities, rank, probability = map(torch.stack, zip(*layers, strict=True))
    return Lens(likeliest, probabilities, final, rank, probability)


def _answers(
    model: SimpleGPT, residual: Tensor, final: Tensor, top: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    logits = model.lm_head(model.norm(residual)).float()  # (B, T, V)
    of_final = logits.gather(-1, final[..., None])  # (B, T, 1)
    rank = (logits > of_final).sum(-1)
    total = logits.logsumexp(-1, keepdim=True)
    values, likeliest = logits.topk(top)
    return likeliest, (values - total).exp(), rank, (of_final - total).exp()[..., 0]


@check_arguments
def attention(model: SimpleGPT, ids: Tensor) -> Tensor:
    """Returns how much each token looks at each key: (L, B, H, T, S) for ids (B, T), S = T."""
    ids = checked_ids(model, ids)
    with eval_mode(model), torch.inference_mode(), record(model, "layers.*.attention") as found:
        model.hidden(ids)
    return torch.stack([found[f"layers.{i}.attention"] for i in range(len(model.layers))])
