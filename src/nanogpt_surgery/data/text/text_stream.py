"""Text from ids that come one at a time, never a part of a character."""

from __future__ import annotations

from collections.abc import Sequence

from nanogpt_surgery.data.tokenizers.tokenizer import Tokenizer

_INCOMPLETE = "\ufffd"  # what decoding puts in the place of bytes that are not yet a character
_LONGEST = 4  # bytes of a character in UTF-8, and so tokens that one can be spread over
_WINDOW = 32  # tokens that are decoded together where none ends with a character


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
        self._ids = list(before)[-_LONGEST * 2 :]
        self._new = len(self._ids)  # those before it end with a character
        self._shown = len(tokenizer.decode(self._ids))  # characters
        self._waited = 0  # tokens since the last whole character

    def push(self, index: int) -> str:
        """The text that one more id completes; empty while a character is incomplete."""
        self._ids.append(index)
        text = self.tokenizer.decode(self._ids)
        whole = len(text.rstrip(_INCOMPLETE))
        if whole > self._shown or whole == len(text):
            piece = text[self._shown : whole]
            self._waited = int(whole < len(text))
        else:
            self._waited += 1
            # Four tokens and still no character: the first begins none.
            piece = text[self._shown :][: self._waited // _LONGEST]
            self._waited = min(self._waited, _LONGEST - 1)
        self._shown += len(piece)
        if whole == len(text):
            self._forget(self._ids[self._new :][-_LONGEST:], len(text))
        elif len(self._ids) > _WINDOW:
            self._forget(self._ids[-2 * _LONGEST :], len(text))
        return piece

    def finish(self) -> str:
        """Returns the rest when no id follows; an incomplete character is shown as U+FFFD."""
        text = self.tokenizer.decode(self._ids)[self._shown :]
        self._shown += len(text)
        return text

    def _forget(self, kept: list[int], length: int) -> None:
        """Keep the last ids alone; as many characters as before are still to be shown."""
        waiting = length - self._shown
        self._shown = max(0, len(self.tokenizer.decode(kept)) - waiting)
        self._ids, self._new = kept, len(kept)
