"""Looking for characters that a vocabulary lacks, while it is known where a text comes from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from nanogpt_surgery.data.conversations.chat import Messages
from nanogpt_surgery.data.text.corpus import files_of
from nanogpt_surgery.data.tokenizers.tokenizer import Tokenizer


def check_characters(tokenizer: Tokenizer, paths: Sequence[str | Path], text: str) -> None:
    """Look for characters that a vocabulary lacks, before a text is cut into parts.

    Args:
        tokenizer: one without a vocabulary of characters knows all of them.
        paths: where the text was read from.
        text: what `read_texts` made of them.

    Raises:
        SurgeryError: there is one (the first, with its file and its place there).
    """
    check: Callable[[str, str], None] | None = getattr(tokenizer, "check", None)
    if check is None:
        return
    if "-" in map(str, paths):  # what was read is gone
        check(text, "the text")
        return
    for file in files_of(paths):
        check(file.read_bytes().decode("utf-8-sig"), str(file))


def check_conversations(conversations: Sequence[Messages], tokenizer: Tokenizer) -> None:
    """Look for characters that a vocabulary lacks in what records say.

    Raises:
        SurgeryError: there is one (the first, with its record, field and place there).
    """
    check: Callable[[str, str], None] | None = getattr(tokenizer, "check", None)
    if check is None:
        return
    for messages in conversations:
        for field, message in zip(messages.fields, messages, strict=True):
            check(message["content"] or "", f"{messages.where}, {field}")
