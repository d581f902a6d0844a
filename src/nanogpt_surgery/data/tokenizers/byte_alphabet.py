"""GPT-2's way of writing bytes as characters, in which byte-level BPE vocabularies are stored.

Each byte is one printable character: those that print stand for themselves, the other 68 are moved
to U+0100 and on, in order. A space (0x20) is written "Ġ".
"""

from __future__ import annotations

_PRINTABLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
_MOVED = [byte for byte in range(256) if byte not in set(_PRINTABLE)]

CHARACTER_OF_BYTE: dict[int, str] = {byte: chr(byte) for byte in _PRINTABLE} | {
    byte: chr(0x100 + i) for i, byte in enumerate(_MOVED)
}
BYTE_OF_CHARACTER: dict[str, int] = {
    character: byte for byte, character in CHARACTER_OF_BYTE.items()
}


def write_bytes(data: bytes) -> str:
    """Bytes as a token's written form."""
    return "".join(CHARACTER_OF_BYTE[byte] for byte in data)


def read_bytes(token: str) -> bytes:
    """The bytes of a token's written form; KeyError if a character is not of the alphabet."""
    return bytes(BYTE_OF_CHARACTER[character] for character in token)
