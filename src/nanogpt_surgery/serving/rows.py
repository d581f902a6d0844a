"""The texts that run, and what computes their next logits."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from torch import Tensor

from nanogpt_surgery.errors import SurgeryError
from nanogpt_surgery.generation.batch import Line
from nanogpt_surgery.generation.generate import new_cache, next_logits
from nanogpt_surgery.lora.active import WeightedAdapters
from nanogpt_surgery.lora.several import active_adapters, has_lora, set_active
from nanogpt_surgery.model.simple_gpt import SimpleGPT
from nanogpt_surgery.model.transformer_encoder_layer import KVCache
from nanogpt_surgery.serving.request import Answer, Request


@dataclass(eq=False)
class Row:
    """A text that runs: the answer as its client sees it, its draws, its cache."""

    answer: Answer
    line: Line
    cache: KVCache

    @property
    def ids(self) -> list[int]:
        """The prompt, and the answer so far."""
        return [*self.line.prompt, *self.line.answer]


def places_of(request: Request) -> int:
    """Returns how many tokens a request's cache has room for: the last new one needs none."""
    return max(1, len(request.prompt) + request.max_new_tokens - 1)


def bytes_per_token(model: SimpleGPT) -> int:
    """Returns the bytes of a token's keys and values in all layers."""
    config = model.config
    numbers = 2 * config.n_layer * config.n_kv_head * config.head_dim
    return numbers * next(model.parameters()).dtype.itemsize


class Rows:
    """Computes rows by the model itself, one after another."""

    def __init__(self, model: SimpleGPT):
        self.model = model

    def begin(self, answer: Answer) -> Row:
        """Returns a new row."""
        of = answer.request
        line = Line(
            *(0, list(of.prompt), of.sampling, of.stop_ids, of.seed, of.likeliest, of.until)
        )
        return Row(answer, line, new_cache(self.model, 1, places_of(of)))

    def logits(self, rows: list[Row]) -> Iterator[tuple[Row, Tensor | SurgeryError]]:
        """Yields each row with its next logits (V,), or with the error that it ends with."""
        for row in rows:
            with weighted(self.model, row.answer.request.adapters):
                try:
                    logits = next_logits(self.model, row.ids, row.cache)
                except SurgeryError as error:
                    yield row, error
                else:
                    yield row, logits.cpu()


@contextmanager
def weighted(model: SimpleGPT, weights: Mapping[str, float]) -> Iterator[None]:
    """Within the block, these adapters take part and no others; not an operation."""
    if not has_lora(model):
        yield
        return
    before = active_adapters(model)
    set_active(model, WeightedAdapters(weights))
    try:
        yield
    finally:
        set_active(model, before)
