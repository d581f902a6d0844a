"""Causal tracing: in which layers the feed-forward calls up what a model answers about a subject.

The subject's embeddings are drowned in noise, so that the answer is lost; then the feed-forwards of
a few layers give, at the subject's last token, what they gave without the noise. How much of the
answer's probability that brings back is the layer's indirect effect (arXiv:2202.05262, section 2).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nanogpt_surgery.arguments import check_arguments
from nanogpt_surgery.errors import SurgeryError
from nanogpt_surgery.interpret.patching import Intervention, patch, put
from nanogpt_surgery.interpret.recording import checked_ids, record
from nanogpt_surgery.lora.merging import logits_of
from nanogpt_surgery.model.loss import eval_mode
from nanogpt_surgery.model.simple_gpt import SimpleGPT

SAMPLES, DEVIATIONS = 8, 3.0


@dataclass(frozen=True)
class Trace:
    """The measurements of a causal trace; probabilities are of the answer."""

    clean: float
    """probability of the answer"""
    corrupted: float
    """the same with noise on the subject"""
    restored: list[float]
    """for each layer, with noise, and its feed-forward and those near it as without"""
    answer: int
    """an id"""

    @property
    def best(self) -> int:
        """The layer that brings back most."""
        return max(range(len(self.restored)), key=self.restored.__getitem__)


@check_arguments
def causal_trace(
    model: SimpleGPT,
    ids: Tensor,
    subject: tuple[int, int],
    answer: int | None = None,
    *,
    window: int = 1,
    seed: int = 0,
) -> Trace:
    """Traces the answer to ids (1, T), the next token, back to feed-forwards.

    Args:
        model: left as it is.
        ids: of the text.
        subject: the positions of its first and last token.
        answer: an id; the likeliest one by default.
        window: of how many layers together, around each.
        seed: of the noise: 8 draws, of 3 standard deviations of the embeddings.

    Raises:
        SurgeryError: the subject or the answer is not there.
    """
    ids = checked_ids(model, ids)
    first, last = subject
    if ids.size(0) != 1 or not 0 <= first <= last < ids.size(1):
        raise SurgeryError(f"ids are {tuple(ids.shape)}; the subject is tokens {first} to {last}")
    points = [f"layers.{number}.mlp" for number in range(len(model.layers))]
    with record(model, [*points, "embed_tokens"]) as clean:
        logits = logits_of(model, ids)[0, -1]
    answer = int(logits.argmax()) if answer is None else answer
    spread = DEVIATIONS * model.embed_tokens.weight.float().std()
    draw = torch.Generator().manual_seed(seed)
    count = last - first + 1
    noise = spread.cpu() * torch.randn(SAMPLES, count, model.config.n_embd, generator=draw)
    drown = Intervention(lambda part: part + noise.to(part), positions=range(first, last + 1))
    rows = ids.expand(SAMPLES, -1)

    def probability(layers: range) -> float:
        given = {
            points[i]: put(clean[points[i]][:, last : last + 1], positions=[last]) for i in layers
        }
        with eval_mode(model), torch.no_grad(), patch(model, {"embed_tokens": drown} | given):
            return float(model(rows)[:, -1].float().softmax(-1)[:, answer].mean())

    before = (window - 1) // 2
    near = [
        range(max(0, i - before), min(len(points), i - before + window)) for i in range(len(points))
    ]
    restored = [probability(layers) for layers in near]
    return Trace(float(logits.softmax(-1)[answer]), probability(range(0)), restored, answer)
