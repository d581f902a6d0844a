"""Tokens as they are told to a client: their text, their bytes, and their log-probabilities."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from nanogpt_surgery.data.tokenizers.token_text import BYTE_OF_CHARACTER, read_bytes
from nanogpt_surgery.data.tokenizers.tokenizer import Tokenizer
from nanogpt_surgery.generation.batch import Token

_INCOMPLETE = "\ufffd"
_BYTE = re.compile("<0x([0-9A-F]{2})>")  # how SentencePiece writes the token of a single byte
_SPACE = "▁"  # how SentencePiece writes a space
LEAST = -9999.0  # JSON has no infinity


def text_of(tokenizer: Tokenizer, index: int) -> str:
    """Returns a token's text; U+FFFD stands for bytes that are no whole character."""
    text, written = tokenizer.decode([index]), _written(tokenizer, index)
    drops_space = written.startswith(_SPACE) and not text.startswith(" ")
    return f" {text}" if drops_space else text


def bytes_of(tokenizer: Tokenizer, index: int) -> bytes:
    """Returns the bytes that a token stands for, also where they are a part of a character."""
    text = text_of(tokenizer, index)
    if _INCOMPLETE in text:
        written = _written(tokenizer, index)
        if byte := _BYTE.fullmatch(written):
            return bytes.fromhex(byte[1])
        if written and set(written) <= BYTE_OF_CHARACTER.keys():
            return read_bytes(written)
    return text.encode()


def _written(tokenizer: Tokenizer, index: int) -> str:
    token_of: Callable[[int], str | None] = getattr(tokenizer, "token_of", lambda _: None)
    return token_of(index) or ""


def completion_logprobs(
    tokenizer: Tokenizer, tokens: Iterable[Token | int], offset: int
) -> dict[str, Any]:
    """Returns the log-probabilities of tokens in the form of completions.

    The likeliest are by their text; where two ids have one text, the likelier counts, so that the
    chosen token was the likeliest if it is as likely as the highest.

    Args:
        tokenizer: the model's.
        tokens: an id alone has no probability.
        offset: in the text of the choice, of the first token.
    """
    found: dict[str, Any] = {"tokens": [], "token_logprobs": [], "top_logprobs": []}
    found["text_offset"] = offsets = list[int]()
    for token in tokens:
        text = text_of(tokenizer, token if isinstance(token, int) else token.id)
        offsets.append(offset)
        offset += len(text)
        found["tokens"].append(text)
        if isinstance(token, int):
            found["token_logprobs"].append(None)
            found["top_logprobs"].append(None)
            continue
        found["token_logprobs"].append(_finite(token.log_probability))
        likeliest: dict[str, float] = {}
        for index, value in (*token.likeliest.items(), (token.id, token.log_probability)):
            likeliest.setdefault(text_of(tokenizer, index), _finite(value))
        found["top_logprobs"].append(likeliest)
    return found


def chat_logprobs(tokenizer: Tokenizer, tokens: Sequence[Token]) -> dict[str, Any]:
    """Returns the log-probabilities of tokens in the form of chats."""

    def shown(index: int, value: float) -> dict[str, Any]:
        data = bytes_of(tokenizer, index)
        text = text_of(tokenizer, index)
        return {"token": text, "logprob": _finite(value), "bytes": list(data)}

    return {
        "content": [
            shown(token.id, token.log_probability)
            | {"top_logprobs": [shown(*pair) for pair in token.likeliest.items()]}
            for token in tokens
        ],
        "refusal": None,
    }


def _finite(value: float) -> float:
    return max(LEAST, value)
