"""Several prompts at once, of any lengths, each continued as it would be alone.

Rows are padded on the left so that they end together; a layout keeps the padding unseen and gives
every token its position in its own text. A row that would outgrow the model's block_size is
continued by itself, where its window can slide.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from nanogpt_surgery.arguments import check_arguments
from nanogpt_surgery.errors import SurgeryError
from nanogpt_surgery.generation.checks import check_request
from nanogpt_surgery.generation.generate import (
    choose,
    last_logits,
    new_cache,
    next_logits,
)
from nanogpt_surgery.generation.settings import MOST_SEED, SamplingSettings
from nanogpt_surgery.model.finite import check_finite
from nanogpt_surgery.model.layout import Layout
from nanogpt_surgery.model.loss import eval_mode
from nanogpt_surgery.model.simple_gpt import SimpleGPT


@dataclass(frozen=True)
class Token:
    """One generated token."""

    row: int
    """which prompt it continues"""
    id: int
    log_probability: float
    """of this id in the model's own distribution, before any setting"""
    likeliest: dict[int, float] = field(default_factory=dict)
    """the log-probabilities of the likeliest ids, the first the highest"""


@check_arguments
def generate_batch(
    model: SimpleGPT,
    prompts: Sequence[Sequence[int] | Tensor],
    max_new_tokens: int,
    sampling: SamplingSettings | None = None,
    *,
    stop_ids: Collection[int] = (),
    seed: int | None = None,
    likeliest: int = 0,
    until: Callable[[Token], bool] | None = None,
) -> Iterator[Token]:
    """Continue several prompts, a token for each item taken from the iterator.

    Row i draws with the seed `seed` + i, so it draws as it does alone with that seed. Several
    samples of one prompt are that prompt several times.

    Args:
        model: left in the mode it is in; computed in eval mode.
        prompts: ids, at least one for each row.
        max_new_tokens: how many at most for each row.
        sampling: how tokens are chosen.
        stop_ids: ids after which a row ends; the one met is not yielded.
        seed: of the draws; None draws differently each time.
        likeliest: how many log-probabilities to give beside the chosen one's.
        until: called with each token as it is made; true ends the row after it.

    Raises:
        SurgeryError: no prompts, an empty one, an id outside the vocabulary, or a setting outside
            its range.
    """
    if not prompts:
        raise SurgeryError("there are no prompts")
    if likeliest < 0:
        raise SurgeryError(f"likeliest is {likeliest}; it must be at least 0")
    settings = sampling or SamplingSettings()
    rows = check_request(model, prompts, max_new_tokens, settings, seed)
    lines = [
        _Line(i, row, settings, stop_ids, seed, likeliest, until) for i, row in enumerate(rows)
    ]
    return _tokens(model, lines, max_new_tokens)


def _tokens(model: SimpleGPT, lines: list[_Line], max_new_tokens: int) -> Iterator[Token]:
    room = model.config.block_size - max_new_tokens
    together = [line for line in lines if len(line.prompt) <= room]
    shared = _Together(model, together, max_new_tokens) if together else None
    alone = [
        (line, new_cache(model, 1, model.config.block_size))
        for line in lines
        if len(line.prompt) > room
    ]
    for _ in range(max_new_tokens):
        if shared is not None:
            yield from shared.step()
        for line, cache in alone:
            if line.running:
                logits = next_logits(model, [*line.prompt, *line.answer], cache)
                yield from line.take(logits.cpu())
        if not any(line.running for line in lines):
            return


@dataclass
class _Line:
    """One row: its prompt, its answer so far, and its own draws."""

    row: int
    prompt: list[int]
    settings: SamplingSettings
    stop_ids: Collection[int]
    seed: int | None
    likeliest: int
    until: Callable[[Token], bool] | None

    def __post_init__(self) -> None:
        self.answer, self.running = list[int](), True
        self.generator = torch.Generator()
        if self.seed is None:
            self.generator.seed()
        else:
            self.generator.manual_seed((int(self.seed) + self.row) % (MOST_SEED + 1))

    def take(self, logits: Tensor) -> list[Token]:
        """Chooses from logits (V,); nothing where the choice ends the row."""
        chosen = choose(logits, self.settings, self.prompt, self.answer, self.generator)
        if chosen in self.stop_ids:
            self.running = False
            return []
        self.answer.append(chosen)
        log_probabilities = logits.float().log_softmax(-1)
        values, ids = log_probabilities.topk(min(self.likeliest, logits.numel()))
        others = dict(zip(ids.tolist(), values.tolist(), strict=True))
        token = Token(self.row, chosen, float(log_probabilities[chosen]), others)
        self.running = self.until is None or not self.until(token)
        return [token]


class _Together:
    """Rows that share a cache; each step is one pass over all of them."""

    def __init__(self, model: SimpleGPT, lines: list[_Line], max_new_tokens: int):
        longest = max(len(line.prompt) for line in lines)
        self.model, self.lines = model, lines
        self.cache = new_cache(model, len(lines), longest + max_new_tokens)
        self.padding = torch.tensor(
            [longest - len(line.prompt) for line in lines], device=self.cache.ids.device
        )
        self.new = torch.zeros(len(lines), longest, dtype=torch.long)  # (B, T)
        for row, line in zip(self.new, lines, strict=True):
            row[longest - len(line.prompt) :] = torch.tensor(line.prompt)

    def step(self) -> list[Token]:
        """The next token of every row that goes on."""
        if not any(line.running for line in self.lines):
            return []
        logits = self._logits().cpu()
        self.new = torch.zeros(len(self.lines), 1, dtype=torch.long)
        tokens = []
        for i, line in enumerate(self.lines):
            if line.running:
                check_finite(logits[i], self.model, partial(self._anew, line))
                tokens += line.take(logits[i])
                self.new[i] = line.answer[-1] if line.running else 0
        return tokens

    def _anew(self, line: _Line) -> Tensor:
        """The logits of one row by itself."""
        ids = torch.tensor([*line.prompt, *line.answer], device=self.padding.device)
        return last_logits(self.model, ids)

    def _logits(self) -> Tensor:
        """Logits (B, V) after the new columns."""
        new = self.new.to(self.padding.device)
        layout = Layout.after_padding(self.padding, self.cache.length, new.size(1))
        with eval_mode(self.model), torch.inference_mode():
            hidden = self.model.hidden(new, self.cache, layout)  # (B, T, C)
            return self.model.lm_head(hidden[:, -1])  # (B, V)
