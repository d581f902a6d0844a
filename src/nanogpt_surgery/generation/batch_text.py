"""Texts from several prompts at once, with the log-probability of each token."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from nanogpt_surgery.data.tokenizers.tokenizer import Tokenizer, stop_ids
from nanogpt_surgery.generation.batch import Token, generate_batch
from nanogpt_surgery.generation.cache_memory import check_rows_fit
from nanogpt_surgery.generation.settings import MOST_SEED, SamplingSettings, check_seed
from nanogpt_surgery.generation.text import TextUntil
from nanogpt_surgery.model.simple_gpt import SimpleGPT


@dataclass(frozen=True)
class Continuation:
    """How one prompt went on."""

    text: str
    """up to a stop string, which is not in it"""
    tokens: tuple[Token, ...]
    """all that were drawn, those of a stop string among them"""
    ended: Literal["stop", "length"]
    """by a stop string or a token that ends a text, or because max_new_tokens were drawn"""


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
) -> Iterator[Continuation]:
    """Continue prompts, `batch_size` at a time, each as it is continued alone; in their order.

    Row i draws with the seed `seed` + i; see `generate_batch`.

    Raises:
        SurgeryError: as `generate_batch`, or a stop string is empty.
    """
    check_seed(seed)
    check_rows_fit(model, min(batch_size, len(prompts)), 1 + max_new_tokens)
    for first in range(0, len(prompts), batch_size):
        chunk = prompts[first : first + batch_size]
        texts = [_Text(TextUntil(tokenizer, stop, prompt)) for prompt in chunk]
        drawn = generate_batch(
            model,
            chunk,
            max_new_tokens,
            sampling,
            stop_ids=stop_ids(tokenizer),
            seed=None if seed is None else (int(seed) + first) % (MOST_SEED + 1),
            likeliest=likeliest,
            until=lambda token, texts=texts: texts[token.row].add(token),  # type: ignore[misc]
        )
        for _ in drawn:
            continue
        yield from (text.finished(max_new_tokens) for text in texts)


class _Text:
    """One row as it grows."""

    def __init__(self, until: TextUntil):
        self.until, self.pieces, self.tokens = until, list[str](), list[Token]()

    def add(self, token: Token) -> bool:
        """Take a token; whether the text is over."""
        self.tokens.append(token)
        self.pieces.append(self.until.push(token.id))
        return self.until.found

    def finished(self, max_new_tokens: int) -> Continuation:
        if not self.until.found:
            self.pieces.append(self.until.finish())
        cut = len(self.tokens) == max_new_tokens and not self.until.found
        return Continuation("".join(self.pieces), tuple(self.tokens), "length" if cut else "stop")
