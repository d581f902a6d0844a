"""Looking for characters that a vocabulary lacks, while it is known where a text comes from."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from nanogpt_surgery.data.corpus import files_of
from nanogpt_surgery.data.instructions import ANSWERS, read_records
from nanogpt_surgery.data.tokenizer import Tokenizer


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


def check_records(path: str | Path, tokenizer: Tokenizer) -> None:
    """Look for characters that a vocabulary lacks in what records say.

    Raises:
        SurgeryError: there is one (the first, with its record, field and place there).
    """
    check: Callable[[str, str], None] | None = getattr(tokenizer, "check", None)
    if check is None:
        return
    for number, record in enumerate(read_records(path), 1):
        for field, text in _fields(record):
            check(text, f"{path}, record {number}, {field}")


def _fields(record: Any) -> Iterable[tuple[str, str]]:
    """The texts of a record that `_messages` takes, with the names of their fields."""
    messages = record.get("messages")
    if isinstance(messages, list):
        found = [
            (f"message {i} ({m.get('role')})", m.get("content"))
            for i, m in enumerate(messages, 1)
            if isinstance(m, dict)
        ]
    else:
        answer = [key for key in ANSWERS if isinstance(record.get(key), str)][:1]
        question = "instruction" if "instruction" in record else "prompt"
        found = [(key, record.get(key)) for key in (question, "input", *answer)]
    return [(name, text) for name, text in found if isinstance(text, str)]
