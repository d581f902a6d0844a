"""Which bytes and characters of a text a token stands for."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from nanogpt_surgery.data.tokenizers.tokenizer import Tokenizer
from nanogpt_surgery.errors import SurgeryError

# GPT-2's way of writing bytes as characters, in which byte-level BPE vocabularies are stored: those
# that print stand for themselves, the other 68 are moved to U+0100 and on, in order; a space
# (0x20) is written "Ġ".
_PRINTABLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
_MOVED = [byte for byte in range(256) if byte not in set(_PRINTABLE)]

CHARACTER_OF_BYTE: dict[int, str] = {byte: chr(byte) for byte in _PRINTABLE} | {
    byte: chr(0x100 + i) for i, byte in enumerate(_MOVED)
}
BYTE_OF_CHARACTER = {character: byte for byte, character in CHARACTER_OF_BYTE.items()}


def read_bytes(token: str) -> bytes:
    """The bytes of a token's written form; KeyError if a character is not of the alphabet."""
    return bytes(BYTE_OF_CHARACTER[character] for character in token)


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
        """Keeps the last ids alone; as many characters as before are still to be shown."""
        waiting = length - self._shown
        self._shown = max(0, len(self.tokenizer.decode(kept)) - waiting)
        self._ids, self._new = kept, len(kept)


def encode_with_offsets(tokenizer: Tokenizer, text: str) -> tuple[list[int], list[int]]:
    """The ids of a text, and for each the position in the text of its first character.

    A token that is a part of a character has the position of that character. A tokenizer says it
    with a method of this name; of one without, the offsets are those at which its tokens decode.

    Raises:
        SurgeryError: the tokenizer does not say, and its ids do not decode to the text.
    """
    method: Callable[[str], tuple[list[int], list[int]]] | None = getattr(
        tokenizer, "encode_with_offsets", None
    )
    if method is not None:
        return method(text)
    ids, stream = tokenizer.encode(text), TextStream(tokenizer)
    offsets: list[int] = []
    written = ""
    for index in ids:
        offsets.append(len(written))
        written += stream.push(index)
    if written + stream.finish() != text:
        raise SurgeryError(
            f"a {type(tokenizer).__name__} does not say where in a text its tokens begin, and its "
            "ids do not decode to the text",
            "give it a method encode_with_offsets(text) that returns ids and offsets",
        )
    return ids, offsets


_BYTE = re.compile("<0x[0-9A-F]{2}>")  # how SentencePiece writes the token of a single byte


def bytes_of_first(tokenizer: Tokenizer, text: str, index: int) -> int:
    """For how many bytes of a text its first token stands, also where it is part of a character."""
    shown = tokenizer.decode([index])
    if text.startswith(shown):
        return len(shown.encode())
    token_of: Callable[[int], str | None] = getattr(tokenizer, "token_of", lambda _: None)
    written = token_of(index) or ""
    if _BYTE.fullmatch(written):
        return 1
    if written and set(written) <= BYTE_OF_CHARACTER.keys():
        return len(written)  # the alphabet has a character for each byte
    return len(text[0].encode())
