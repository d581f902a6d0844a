"""Text from ids that come one at a time, never a part of a character."""

from __future__ import annotations

from collections.abc import Sequence

from nanogpt_surgery.data.tokenizer import Tokenizer

_INCOMPLETE = "\ufffd"  # what decoding puts in the place of bytes that are not yet a character
_LONGEST = 4  # bytes of a character in UTF-8, and so tokens that one can be spread over


class TextStream:
    """Ids in, text out: the pieces joined are the text of all ids.

    A character whose bytes are spread over several tokens appears with the last of them. What a
    token looks like may depend on the one before it (SentencePiece drops the first space of a
    text), so the last ones that were shown are decoded again with each new one.

    Args:
        tokenizer: decodes.
        before: ids of the text that the stream continues.
    """

    def __init__(self, tokenizer: Tokenizer, before: Sequence[int] = ()):
        self.tokenizer = tokenizer
        self._shown = list(before)[-_LONGEST * 2 :]
        self._waiting: list[int] = []

    def push(self, index: int) -> str:
        """The text that one more id completes; empty while a character is incomplete."""
        self._waiting.append(index)
        text = self._text_of_waiting()
        if not text.endswith(_INCOMPLETE):
            return self._show(len(self._waiting), text)
        if len(self._waiting) < _LONGEST:
            return ""
        # Four tokens and still no character: the first begins none.
        return self._show(1, None)

    def finish(self) -> str:
        """What is left when no id follows; an incomplete character is shown as U+FFFD."""
        return self._show(len(self._waiting), None)

    def _text_of_waiting(self) -> str:
        before = self.tokenizer.decode(self._shown)
        return self.tokenizer.decode(self._shown + self._waiting)[len(before) :]

    def _show(self, count: int, text: str | None) -> str:
        if text is None:
            kept, self._waiting = self._waiting[count:], self._waiting[:count]
            text = self._text_of_waiting()
        else:
            kept = []
        if self._waiting:
            self._shown = self._waiting[-_LONGEST:]
        self._waiting = kept
        return text
