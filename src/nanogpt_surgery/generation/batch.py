"""Several prompts at once, of any lengths, each continued as it would be alone.

On the CPU a row is to the bit what it is alone: the compiled decoder computes the new tokens of all
rows in one step, and where it cannot be used, PyTorch computes row after row, since the sums of its
products depend on how many rows there are.

On other devices all rows share each pass, which is right up to rounding. They are padded on the
left then, so that they end together; a layout keeps the padding unseen and gives every token its
position in its own text, and a row that would outgrow the model's block_size is continued alone.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

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
from nanogpt_surgery.generation.settings import MOST_SEED, Engine, SamplingSettings
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


def token_of(logits: Tensor, chosen: int, likeliest: int, row: int = 0) -> Token:
    """Returns an id with its log-probability by logits (V,), and with so many of the likeliest."""
    log_probabilities = logits.float().log_softmax(-1)
    values, ids = log_probabilities.topk(min(likeliest, logits.numel()))
    others = dict(zip(ids.tolist(), values.tolist(), strict=True))
    return Token(row, chosen, float(log_probabilities[chosen]), others)


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
    engine: Engine = "auto",
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
        engine: what computes the tokens, as in `generate`; see above.

    Raises:
        SurgeryError: no prompts, an empty one, an id outside the vocabulary, a setting outside its
            range, or a model that the native engine does not compute.
    """
    if not prompts:
        raise SurgeryError("there are no prompts")
    if likeliest < 0:
        raise SurgeryError(f"likeliest is {likeliest}; it must be at least 0")
    settings = sampling or SamplingSettings()
    rows = check_request(model, prompts, max_new_tokens, settings, seed)
    lines = [Line(i, row, settings, stop_ids, seed, likeliest, until) for i, row in enumerate(rows)]
    return _tokens(lines, max_new_tokens, _rows(model, rows, max_new_tokens, engine))


def _tokens(lines: list[Line], max_new_tokens: int, rows: _Rows) -> Iterator[Token]:
    for _ in range(max_new_tokens):
        running = {line.row: line for line in lines if line.running}
        if not running:
            return
        texts = {row: [*line.prompt, *line.answer] for row, line in running.items()}
        for line, logits in zip(running.values(), rows.logits(texts), strict=True):
            yield from line.take(logits.cpu())


class _Rows(Protocol):
    """The logits of several texts as they grow."""

    def logits(self, texts: Mapping[int, list[int]]) -> Sequence[Tensor]:
        """Returns the logits (V,) after each of some rows' ids, by row."""


def _rows(model: SimpleGPT, prompts: list[list[int]], max_new_tokens: int, engine: Engine) -> _Rows:
    """Returns what computes the rows of a batch."""
    length = max(map(len, prompts)) + max_new_tokens
    if engine == "native" or next(model.parameters()).device.type == "cpu":
        from nanogpt_surgery.generation.native.rows import SeparateRows

        return SeparateRows(model, len(prompts), length, engine)
    return _Padded(model, prompts, max_new_tokens)


@dataclass
class Line:
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
        token = token_of(logits, chosen, self.likeliest, self.row)
        self.running = self.until is None or not self.until(token)
        return [token]


class _Padded:
    """Rows that share a cache, each pass over all of them; but those that outgrow the context."""

    def __init__(self, model: SimpleGPT, prompts: list[list[int]], max_new_tokens: int):
        room = model.config.block_size - max_new_tokens
        self.together = [row for row, prompt in enumerate(prompts) if len(prompt) <= room]
        longer = [row for row, prompt in enumerate(prompts) if len(prompt) > room]
        self.model = model
        self.alone = {row: new_cache(model, 1, model.config.block_size) for row in longer}
        self.longest = max((len(prompts[row]) for row in self.together), default=0)
        length = self.longest + max_new_tokens if self.together else 0
        self.cache = new_cache(model, len(self.together), length)
        self.padding = torch.tensor(
            [self.longest - len(prompts[row]) for row in self.together],
            device=self.cache.ids.device,
        )

    def logits(self, texts: Mapping[int, list[int]]) -> list[Tensor]:
        """Returns the logits (V,) after each of some rows' ids, by row."""
        found = {}
        if texts.keys() & set(self.together):
            for row, logits in zip(self.together, self._pass(texts), strict=True):
                if row in texts:
                    ids = torch.tensor(texts[row], device=self.padding.device)
                    check_finite(logits, self.model, partial(last_logits, self.model, ids))
                    found[row] = logits
        for row in texts.keys() - found:
            found[row] = next_logits(self.model, texts[row], self.alone[row])
        return [found[row] for row in texts]

    def _pass(self, texts: Mapping[int, list[int]]) -> Tensor:
        """Returns logits (B, V) after the new columns; those of a row that has ended are of 0."""
        count = 1 if self.cache.length else self.longest
        new = torch.zeros(len(self.together), count, dtype=torch.long)  # (B, T)
        for place, row in zip(new, self.together, strict=True):
            if ids := texts.get(row, [])[-count:]:
                place[count - len(ids) :] = torch.tensor(ids)
        new = new.to(self.padding.device)
        layout = Layout.after_padding(self.padding, self.cache.length, count)
        with eval_mode(self.model), torch.inference_mode():
            hidden = self.model.hidden(new, self.cache, layout)  # (B, T, C)
            return self.model.lm_head(hidden[:, -1])  # (B, V)
