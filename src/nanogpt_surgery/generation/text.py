"""Text from a model, piece by piece: ids become characters, and a stop string ends the answer."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from nanogpt_surgery.arguments import check_arguments
from nanogpt_surgery.data.tokenizers.token_text import TextStream
from nanogpt_surgery.data.tokenizers.tokenizer import Tokenizer, stop_ids
from nanogpt_surgery.generation.batch import Token, generate_batch
from nanogpt_surgery.generation.checks import check_rows_fit
from nanogpt_surgery.generation.engine import EngineChoice, chosen_engine
from nanogpt_surgery.generation.settings import (
    MOST_SEED,
    Engine,
    SamplingSettings,
    check_seed,
    check_stop,
)
from nanogpt_surgery.generation.speculative import Draft, generator_with, speculative_tokens
from nanogpt_surgery.model.simple_gpt import SimpleGPT


class TextUntil:
    """Ids in, text out, up to the stop string that is complete first; it is not shown.

    A stop string is found wherever it begins, also across the edges of tokens: what may be its
    beginning is held back until it is clear.

    Args:
        tokenizer: decodes.
        stop: strings that end the text.
        before: ids of the text that is continued.

    Raises:
        SurgeryError: a stop string is empty.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = (), before: Sequence[int] = ()):
        check_stop(stop)
        self._stream, self._stop, self._held = TextStream(tokenizer, before), stop, ""
        self.found = False  # whether a stop string is complete

    def push(self, index: int) -> str:
        """The text that one more id completes."""
        return self._shown(self._stream.push(index))

    def finish(self) -> str:
        """Returns the rest when no id follows."""
        return "" if self.found else self._shown(self._stream.finish()) + self._held

    def stream(self, ids: Iterable[int]) -> Iterator[str]:
        """Yields the pieces of the text of ids; no more are taken once a stop string is found."""
        for index in ids:
            if piece := self.push(index):
                yield piece
            if self.found:
                return
        if rest := self.finish():
            yield rest

    def _shown(self, new: str) -> str:
        """Adds to the text; what may begin a stop string is held back."""
        text, stop = self._held + new, self._stop
        ends = [(text.find(s) + len(s), text.find(s)) for s in stop if s in text]
        if ends:
            self.found, self._held = True, ""
            return text[: min(ends)[1]]
        shown = len(text) - max((_overlap(text, string) for string in stop), default=0)
        self._held = text[shown:]
        return text[:shown]


def _overlap(text: str, string: str) -> int:
    """How many characters at the end of a text are the beginning of a string."""
    sizes = range(min(len(text), len(string) - 1), 0, -1)
    return next((size for size in sizes if text.endswith(string[:size])), 0)


@check_arguments
def generate_text(
    model: SimpleGPT,
    tokenizer: Tokenizer,
    prompt: Sequence[int],
    max_new_tokens: int,
    sampling: SamplingSettings | None = None,
    *,
    stop: Sequence[str] = (),
    seed: int | None = None,
    engine: Engine = "auto",
    draft: Draft | None = None,
) -> Iterator[str]:
    """Continues a prompt in pieces of text, up to a stop string or a token that ends a text.

    With a `draft` one pass verifies several tokens (speculative.py); the text stays the same.

    Raises:
        SurgeryError: as `generate`, at the call; or a stop string is empty.
    """
    ends = stop_ids(tokenizer)
    ids = generator_with(draft)(
        model, prompt, max_new_tokens, sampling=sampling, stop_ids=ends, seed=seed, engine=engine
    )
    return TextUntil(tokenizer, stop, prompt).stream(ids)


@dataclass(frozen=True)
class Continuation:
    """How one prompt went on."""

    text: str
    """up to a stop string, which is not in it"""
    tokens: tuple[Token, ...]
    """all that were drawn, those of a stop string among them"""
    ended: Literal["stop", "length"]
    """by a stop string or a token that ends a text, or because max_new_tokens were drawn"""
    engine: EngineChoice
    """what computed the tokens"""


def continue_texts(
    model: SimpleGPT,
    tokenizer: Tokenizer,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    sampling: SamplingSettings | None = None,
    *,
    stop: Sequence[str] = (),
    seed: int | None = None,
    likeliest: int = 0,
    batch_size: int = 8,
    engine: Engine = "auto",
    draft: Draft | None = None,
) -> Iterator[Continuation]:
    """Continue prompts, `batch_size` at a time, each as it is continued alone; in their order.

    Row i draws with the seed `seed` + i; see `generate_batch`. With a `draft` it is one at a time,
    in fewer passes where it guesses well (speculative.py); the texts stay the same.

    Raises:
        SurgeryError: as `generate_batch`, or a stop string is empty.
    """
    check_seed(seed)
    size = batch_size if draft is None else 1
    check_rows_fit(model, min(size, len(prompts)), 1 + max_new_tokens)
    for first in range(0, len(prompts), size):
        chunk = prompts[first : first + size]
        choice = chosen_engine(model, engine, len(chunk))
        rows = [TextUntil(tokenizer, stop, prompt) for prompt in chunk]
        pieces, tokens = [list[str]() for _ in chunk], [list[Token]() for _ in chunk]
        settings: dict[str, Any] = {
            "sampling": sampling,
            "stop_ids": stop_ids(tokenizer),
            "seed": None if seed is None else (int(seed) + first) % (MOST_SEED + 1),
            "likeliest": likeliest,
            "until": partial(_add, rows, pieces),
            "engine": engine,
        }
        found = (
            generate_batch(model, chunk, max_new_tokens, **settings)
            if draft is None
            else speculative_tokens(model, chunk[0], max_new_tokens, draft, **settings)
        )
        for token in found:
            tokens[token.row].append(token)
        for row, shown, drawn in zip(rows, pieces, tokens, strict=True):
            text = "".join(shown) + row.finish()
            cut = len(drawn) == max_new_tokens and not row.found
            yield Continuation(text, tuple(drawn), "length" if cut else "stop", choice)


def _add(rows: Sequence[TextUntil], pieces: Sequence[list[str]], token: Token) -> bool:
    """Adds a token to the text of its row; whether a stop string ends it."""
    pieces[token.row].append(rows[token.row].push(token.id))
    return rows[token.row].found
