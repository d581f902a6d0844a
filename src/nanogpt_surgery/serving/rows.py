"""The texts that run, and what computes their next logits: the compiled decoder, or the model.

With the decoder all texts share a step, each with its own adapters, and a token is to the bit the
same whichever tokens are computed with it: so a prompt may be computed in any pieces, and its
beginning taken from any text that begins alike. PyTorch's sums depend on how many tokens share a
product. Where the model itself computes, it is therefore called for one text after another, and a
prompt is cut at every `PIECE` tokens, wherever its computing begins; beginnings are shared in whole
pieces.

Legend: T new tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from time import monotonic
from typing import Protocol

import torch
from torch import Tensor

from nanogpt_surgery.errors import NotFiniteError, SurgeryError
from nanogpt_surgery.generation.batch import Line, Token, token_of
from nanogpt_surgery.generation.engine import chosen_engine
from nanogpt_surgery.generation.generate import last_logits, new_cache
from nanogpt_surgery.generation.native.decoder import (
    NativeDecoder,
    NewTokens,
    TextCache,
    unsupported_reason,
)
from nanogpt_surgery.generation.settings import Engine
from nanogpt_surgery.lora.active import WeightedAdapters
from nanogpt_surgery.lora.several import active_adapters, has_lora, set_active
from nanogpt_surgery.model.finite import not_finite
from nanogpt_surgery.model.kv_cache import KVCache
from nanogpt_surgery.model.loss import eval_mode
from nanogpt_surgery.model.simple_gpt import SimpleGPT
from nanogpt_surgery.serving.request import Answer

PIECE = 256  # tokens of a prompt that the model itself computes at once
MOST_TOKENS = 256  # of a step of the decoder
STEP = 32  # of those, tokens of prompts while other rows wait for their next
MOST_ADAPTERS = 32  # kinds of rows that a decoder knows, beside those that run

Weights = tuple[tuple[str, float], ...]
Computed = tuple["Row", Tensor | Exception]


@dataclass(eq=False)
class Row:
    """A text that runs.

    Attributes:
        answer: as its client sees it.
        weights: of the adapters that take part.
        key: the hash of all weights that compute it, and the engine that does.
        line: its prompt, its answer, and how its tokens are chosen.
        cache: the keys and values of its first tokens.
        begun: when.
        looked_up: whether tokens of a text that begins alike have been looked for.
    """

    answer: Answer
    weights: Weights
    key: str
    line: Line
    cache: KVCache
    begun: float = field(default_factory=monotonic)
    looked_up: bool = False
    prompt_tokens: list[Token] = field(default_factory=list)
    text: TextCache | None = None

    @property
    def left(self) -> int:
        """How many tokens of the prompt and the answer are not in the cache yet."""
        return len(self.line.prompt) + len(self.line.answer) - self.cache.length

    def new_ids(self, count: int) -> list[int]:
        """Returns the next ids that are to be computed."""
        start, n_prompt = self.cache.length, len(self.line.prompt)
        return self.line.prompt[start : start + count] or self.line.answer[start - n_prompt :]


class Rows(Protocol):
    """Computes rows.

    Attributes:
        name: of the engine.
    """

    name: str

    def shareable(self, row: Row, length: int) -> int:
        """Returns how many of the first `length` tokens of a row another text may take."""

    def compute(self, rows: Sequence[Row]) -> Iterator[Computed]:
        """Yields each row that is ready for its next token: its logits (V,), or why it fails.

        The others have come nearer to that. Where log-probabilities of a prompt are wanted, they
        are added to the row.
        """


def make_rows(model: SimpleGPT, engine: Engine) -> Rows:
    """Returns what computes the rows of a model as it stands, with the engine that is asked for."""
    if chosen_engine(model, engine).name == "native":
        return NativeRows(model)
    return PlainRows(model)


class NativeRows:
    """All rows share each step of the compiled decoder."""

    name = "native"

    def __init__(self, model: SimpleGPT):
        self.model, self.known = model, dict[Weights, int]()
        self._make([()])

    def _make(self, weights: Iterable[Weights]) -> None:
        self.known = {of_some: number for number, of_some in enumerate(weights)}
        like, adapters = new_cache(self.model, 1, 1), [dict(of_some) for of_some in self.known]
        if reason := unsupported_reason(self.model, like):
            raise SurgeryError(f"the compiled decoder is not used: {reason}", "engine='plain'")
        self.decoder = NativeDecoder(self.model, like, adapters=adapters, most=MOST_TOKENS)

    def shareable(self, row: Row, length: int) -> int:
        """Returns how many of the first `length` tokens of a row another text may take: all."""
        return length

    def compute(self, rows: Sequence[Row]) -> Iterator[Computed]:
        """Yields each row that is ready for its next token; see `Rows`."""
        new = {row: n for row, n in self._counts(rows).items() if n}
        self._know(row.weights for row in new)
        parts = [self._tokens(row, count) for row, count in new.items()]
        starts = [row.cache.length for row in new]
        for row, start, logits in zip(new, starts, self.decoder.step_texts(parts), strict=True):
            yield from taken(self.model, row, start, logits)

    def _counts(self, rows: Sequence[Row]) -> dict[Row, int]:
        """Returns how many tokens of each row a step computes.

        Those of prompts, the oldest first, are few where other rows wait for them.
        """
        counts = {row: 1 for row in rows if row.left == 1}
        room = MOST_TOKENS if not counts else min(STEP, MOST_TOKENS - len(counts))
        for row in rows:
            if row not in counts:
                counts[row] = max(0, min(row.left, room))
                room -= counts[row]
        return counts

    def _know(self, weights: Iterable[Weights]) -> None:
        """Makes the decoder anew where it does not know some weights of adapters."""
        wanted = {*weights, ()}
        if not wanted <= self.known.keys():
            kept = self.known if len(self.known) < MOST_ADAPTERS else ()
            self._make([*dict.fromkeys((*wanted, *kept))])

    def _tokens(self, row: Row, count: int) -> NewTokens:
        row.text = row.text or TextCache(row.cache)
        start = row.cache.length
        row.text.ids[start : start + count] = row.new_ids(count)
        wanted = count if wants_prompt(row) else int(count == row.left)
        return NewTokens(row.text, count, wanted, self.known[row.weights])


class PlainRows:
    """The model itself computes one row after another."""

    name = "plain"

    def __init__(self, model: SimpleGPT):
        self.model = model

    def shareable(self, row: Row, length: int) -> int:
        """Returns how many of the first `length` tokens another text may take: whole pieces."""
        return min(length, len(row.line.prompt)) // PIECE * PIECE

    def compute(self, rows: Sequence[Row]) -> Iterator[Computed]:
        """Yields each row that is ready for its next token; see `Rows`.

        A step computes one piece of one prompt.
        """
        in_prompt = [row for row in rows if row.left > 1]
        for row in rows:
            if row.left == 1 or row is in_prompt[0]:
                start = row.cache.length
                try:
                    logits = self._logits(row, min(row.left, PIECE - start % PIECE))
                except Exception as error:
                    yield row, error
                else:
                    yield from taken(self.model, row, start, logits)

    def _logits(self, row: Row, count: int) -> Tensor:
        """Returns the logits (wanted, V) after the last of the next tokens."""
        new = torch.tensor([row.new_ids(count)], device=row.cache.ids.device)  # (1, T)
        with weighted(self.model, row.weights), eval_mode(self.model), torch.inference_mode():
            hidden = self.model.hidden(new, row.cache)[0]  # (T, C)
            if wants_prompt(row):
                return self.model.lm_head(hidden).cpu()  # (T, V)
            return self.model.lm_head(hidden[-1])[None].cpu()  # (1, V)


def wants_prompt(row: Row) -> bool:
    """Returns whether logits after each token of the prompt are wanted."""
    return row.answer.request.prompt_log_probabilities and not row.line.answer


def taken(model: SimpleGPT, row: Row, start: int, logits: Tensor) -> Iterator[Computed]:
    """Takes the logits (wanted, V) after tokens from position `start` on; yields as `Rows` does."""
    if wants_prompt(row):
        count = row.answer.request.likeliest
        for position, of_next in enumerate(row.line.prompt[start + 1 :][: len(logits)]):
            row.prompt_tokens.append(token_of(logits[position], of_next, count))
    if row.left == 0:
        last = logits[-1]
        yield row, last if bool(last.isfinite().all()) else origin(model, row)


def origin(model: SimpleGPT, row: Row) -> NotFiniteError:
    """Returns the error that says where the number arose that is not finite."""
    ids = torch.tensor([*row.line.prompt, *row.line.answer], device=row.cache.ids.device)
    with weighted(model, row.weights):
        return not_finite(model, partial(last_logits, model, ids))


@contextmanager
def weighted(model: SimpleGPT, weights: Weights) -> Iterator[None]:
    """Within the block, these adapters take part and no others; not an operation."""
    if not has_lora(model):
        yield
        return
    before = active_adapters(model)
    set_active(model, WeightedAdapters(dict(weights)))
    try:
        yield
    finally:
        set_active(model, before)
