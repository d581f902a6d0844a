"""Several prompts at once, of any lengths, each continued as it would be alone.

Rows are padded on the left so that they end together; a layout keeps the padding unseen and gives
every token its position in its own text. A row that would outgrow the model's block_size is
continued by itself, where its window can slide.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from nanogpt_surgery.errors import SurgeryError
from nanogpt_surgery.generation.cache_memory import check_cache_fits
from nanogpt_surgery.generation.generate import (
    Window,
    check_bias,
    check_model,
    check_prompt,
    last_logits,
    prompt_ids,
)
from nanogpt_surgery.generation.sampling import choose
from nanogpt_surgery.generation.settings import MOST_SEED, SamplingSettings, check_count, check_seed
from nanogpt_surgery.model.finite import check_finite
from nanogpt_surgery.model.kv_cache import KVCache
from nanogpt_surgery.model.layout import Layout
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
    check_model(model)
    check_count(max_new_tokens)
    check_seed(seed)
    if not prompts:
        raise SurgeryError("there are no prompts")
    check_rows_fit(model, len(prompts), max_new_tokens)
    rows = [prompt_ids(prompt).flatten() for prompt in prompts]
    for row in rows:
        check_prompt(model, row)
    settings = sampling or SamplingSettings()
    check_bias(model, settings)
    lines = [
        _Line(i, row, settings, stop_ids, seed, likeliest, until) for i, row in enumerate(rows)
    ]
    return _tokens(model, lines, max_new_tokens)


def check_rows_fit(model: SimpleGPT, rows: int, max_new_tokens: int) -> None:
    """Raise `SurgeryError` where so many rows cannot be continued at once, whatever they hold."""
    weight = next(model.parameters())
    tokens = min(model.config.block_size, 1 + max_new_tokens)
    check_cache_fits(model.config, rows, tokens, weight.dtype, weight.device)


def _tokens(model: SimpleGPT, lines: list[_Line], max_new_tokens: int) -> Iterator[Token]:
    room = model.config.block_size - max_new_tokens
    together = [line for line in lines if len(line.prompt) <= room]
    engines = [_Together(model, together, max_new_tokens)] if together else []
    alone = [line for line in lines if len(line.prompt) > room]
    windows = [(line, Window(model, line.prompt, max_new_tokens)) for line in alone]
    for _ in range(max_new_tokens):
        for engine in engines:
            yield from engine.step()
        for line, window in windows:
            if line.running:
                token = line.take(window.next_logits().cpu())
                if token is not None:
                    window.append(token.id)
                    yield token
        if not any(line.running for line in lines):
            return


class _Line:
    """One row: its prompt, its answer so far, and its own draws."""

    def __init__(
        self,
        row: int,
        prompt: Tensor,
        settings: SamplingSettings,
        stop_ids: Collection[int],
        seed: int | None,
        likeliest: int,
        until: Callable[[Token], bool] | None,
    ):
        self.row, self.prompt, self.settings = row, prompt, settings
        self.stop_ids, self.likeliest, self.until = stop_ids, likeliest, until
        self.answer: list[int] = []
        self.running = True
        self.generator = torch.Generator()
        if seed is None:
            self.generator.seed()
        else:
            self.generator.manual_seed((int(seed) + row) % (MOST_SEED + 1))

    def take(self, logits: Tensor) -> Token | None:
        """Choose from logits (V,); None ends the row."""
        chosen = choose(logits, self.settings, self.prompt.tolist(), self.answer, self.generator)
        if chosen in self.stop_ids:
            self.running = False
            return None
        self.answer.append(chosen)
        log_probabilities = logits.float().log_softmax(-1)
        values, ids = log_probabilities.topk(min(self.likeliest, logits.numel()))
        others = dict(zip(ids.tolist(), values.tolist(), strict=True))
        token = Token(self.row, chosen, float(log_probabilities[chosen]), others)
        if self.until is not None and self.until(token):
            self.running = False
        return token


class _Together:
    """Rows that share a cache; each step is one pass over all of them."""

    def __init__(self, model: SimpleGPT, lines: list[_Line], max_new_tokens: int):
        weight = next(model.parameters())  # the embedding, which surgery may have wrapped
        longest = max(len(line.prompt) for line in lines)
        self.model, self.lines = model, lines
        self.padding = torch.tensor(
            [longest - len(line.prompt) for line in lines], device=weight.device
        )
        self.new = torch.zeros(len(lines), longest, dtype=torch.long)  # (B, T)
        for row, line in zip(self.new, lines, strict=True):
            row[longest - len(line.prompt) :] = line.prompt
        self.cache = KVCache(
            model.config, len(lines), longest + max_new_tokens, weight.dtype, weight.device
        )

    def step(self) -> list[Token]:
        """The next token of every row that goes on."""
        if not any(line.running for line in self.lines):
            return []
        logits = self._logits().cpu()
        self.new = torch.zeros(len(self.lines), 1, dtype=torch.long)
        tokens = []
        for i, line in enumerate(self.lines):
            if not line.running:
                continue
            check_finite(logits[i], self.model, lambda line=line: self._anew(line))  # type: ignore[misc]
            token = line.take(logits[i])
            if token is not None:
                self.new[i] = token.id
                tokens.append(token)
        return tokens

    def _anew(self, line: _Line) -> Tensor:
        """The logits of one row by itself."""
        ids = torch.tensor([*line.prompt.tolist(), *line.answer], device=self.padding.device)
        return last_logits(self.model, ids)

    def _logits(self) -> Tensor:
        """Logits (B, V) after the new columns."""
        new = self.new.to(self.padding.device)
        layout = Layout.after_padding(self.padding, self.cache.length, new.size(1))
        training = self.model.training
        self.model.eval()
        try:
            with torch.inference_mode():
                hidden = self.model.hidden(new, self.cache, layout)  # (B, T, C)
                logits: Tensor = self.model.lm_head(hidden[:, -1])  # (B, V)
        finally:
            self.model.train(training)
        return logits
