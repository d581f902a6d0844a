"""Text from a model, piece by piece: ids become characters, and a stop string ends the answer."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence

from nanogpt_surgery.data.tokenizers.token_text import TextStream
from nanogpt_surgery.data.tokenizers.tokenizer import Tokenizer
from nanogpt_surgery.data.tokenizers.tokenizer import stop_ids as stop_ids_of
from nanogpt_surgery.generation.cache_memory import check_rows_fit
from nanogpt_surgery.generation.generate import generate
from nanogpt_surgery.generation.settings import SamplingSettings, check_stop
from nanogpt_surgery.model.simple_gpt import SimpleGPT
from nanogpt_surgery.model.transformer_encoder_layer import KVCache


def stream_text(
    tokenizer: Tokenizer, ids: Iterable[int], stop: Sequence[str] = (), before: Sequence[int] = ()
) -> Iterator[str]:
    """Decode ids as they come, up to the stop string that is complete first; it is not shown.

    A stop string is found wherever it begins, also across the edges of tokens: what may be its
    beginning is held back until it is clear. No more ids are taken once one is found.

    Args:
        tokenizer: decodes.
        ids: taken one by one.
        stop: strings that end the text.
        before: ids of the text that is continued.

    Raises:
        SurgeryError: a stop string is empty.
    """
    return stream_until(TextUntil(tokenizer, stop, before), ids)


def stream_until(text: TextUntil, ids: Iterable[int]) -> Iterator[str]:
    """Yields the text of ids, taken one by one, up to the first stop string."""
    for index in ids:
        shown = text.push(index)
        if shown:
            yield shown
        if text.found:
            return
    rest = text.finish()
    if rest:
        yield rest


class TextUntil:
    """Ids in, text out, up to the stop string that is complete first; see `stream_text`."""

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = (), before: Sequence[int] = ()):
        check_stop(stop)
        self._stream, self._stop, self._held = TextStream(tokenizer, before), stop, ""
        self.found = False

    def push(self, index: int) -> str:
        """The text that one more id completes; sets `found` when a stop string is complete."""
        shown, self._held, self.found = _until(self._held + self._stream.push(index), self._stop)
        return shown

    def finish(self) -> str:
        """Returns the rest when no id follows."""
        shown, held, self.found = _until(self._held + self._stream.finish(), self._stop)
        return shown + ("" if self.found else held)


def _until(text: str, stop: Sequence[str]) -> tuple[str, str, bool]:
    """Splits off what may begin a stop string; says whether a whole one was found."""
    ends = [(text.find(string) + len(string), -len(string)) for string in stop if string in text]
    if ends:
        return text[: sum(min(ends))], "", True
    longest = max((_overlap(text, string) for string in stop), default=0)
    return text[: len(text) - longest], text[len(text) - longest :], False


def _overlap(text: str, string: str) -> int:
    """How many characters at the end of a text are the beginning of a string."""
    sizes = range(min(len(text), len(string) - 1), 0, -1)
    return next((size for size in sizes if text.endswith(string[:size])), 0)


def generate_text(
    model: SimpleGPT,
    tokenizer: Tokenizer,
    prompt: Sequence[int],
    max_new_tokens: int,
    sampling: SamplingSettings | None = None,
    *,
    stop: Sequence[str] = (),
    stop_ids: Collection[int] | None = None,
    seed: int | None = None,
    cache: KVCache | None = None,
) -> Iterator[str]:
    """Continue a prompt in pieces of text; see `generate` and `stream_text`.

    `stop_ids` are the tokenizer's own unless others are given. What is wrong with the arguments is
    a `SurgeryError` at the call, before anything is generated.
    """
    check_rows_fit(model, 1, len(prompt) + max_new_tokens)
    ends = stop_ids_of(tokenizer) if stop_ids is None else stop_ids
    ids = generate(
        model, prompt, max_new_tokens, sampling=sampling, stop_ids=ends, seed=seed, cache=cache
    )
    return stream_text(tokenizer, ids, stop, prompt)
