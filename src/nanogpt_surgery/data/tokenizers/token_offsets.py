"""Where in a text each of its tokens begins."""

from __future__ import annotations

from collections.abc import Callable

from nanogpt_surgery.data.text.text_stream import TextStream
from nanogpt_surgery.data.tokenizers.tokenizer import Tokenizer
from nanogpt_surgery.errors import SurgeryError


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
