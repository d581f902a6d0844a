"""Instruction data: prompts with answers, or whole conversations, and which tokens are trained on.

A file is JSON (a list of records) or JSONL (a record on each line). A record is one of

    {"messages": [{"role": "user", "content": …}, {"role": "assistant", "content": …}, …]}
    {"prompt": …, "completion": …}                     also "answer", "response", "output"
    {"instruction": …, "input": …, "output": …}        "input" may be empty or left out
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nanogpt_surgery.data.chat import (
    MEND_TEMPLATE,
    ChatTemplate,
    Message,
    Written,
    check_messages,
    encode_conversation,
    template_of,
    warn_of_two_bos,
)
from nanogpt_surgery.data.tokenizer import Tokenizer
from nanogpt_surgery.errors import SurgeryError

ANSWERS = ("completion", "answer", "response", "output")


@dataclass(frozen=True)
class Example:
    """The ids of a conversation, and for each whether it is trained on."""

    ids: tuple[int, ...]
    trained: tuple[bool, ...]

    def cut(self, length: int) -> Example:
        """Its first tokens, at most so many."""
        return Example(self.ids[:length], self.trained[:length])


def read_conversations(path: str | Path) -> list[list[Message]]:
    """The conversations of a JSON or JSONL file.

    Raises:
        SurgeryError: the file is missing or not JSON, or records are of no known form (all of
            them, with their number).
    """
    conversations, problems = [], []
    for number, record in enumerate(read_records(path), 1):
        messages = _messages(record)
        if messages is None:
            problems.append(f"record {number} has {_keys(record)}")
        else:
            conversations.append(messages)
    if problems or not conversations:
        shown = "; ".join(problems[:5]) or "there are no records"
        more = f"; {len(problems) - 5} more" if problems[5:] else ""
        raise SurgeryError(
            f"{path} is not instruction data: {shown}{more}",
            "records have messages, or prompt and completion, or instruction, input and output",
        )
    return conversations


def is_instruction_data(paths: Sequence[str | Path]) -> bool:
    """Whether files to learn from hold instructions, and not plain text.

    They do if each ends in .json or .jsonl and begins with a record of a known form.

    Raises:
        SurgeryError: it cannot be told: only some of them do.
    """
    files = [Path(path) for path in paths]
    known = [_is_json(file) for file in files]
    if not any(known):
        return False
    if not all(known):
        strange = f"{files[known.index(False)]} is neither .json nor .jsonl, the others are"
    else:
        unread = [file for file in files if not _begins_well(file)]
        strange = f"{unread[0]} does not begin with a record of a known form" if unread else ""
    if strange:
        raise SurgeryError(
            f"it is not clear whether this is instruction data or plain text: {strange}",
            "--data text takes everything as text; --data instructions says what is wrong",
        )
    return True


def holds_instructions(path: Path) -> bool:
    """Whether a file is JSON or JSONL, and begins with a record of a known form."""
    return _is_json(path) and _begins_well(path)


def _is_json(path: Path) -> bool:
    return path.suffix in (".json", ".jsonl") and not path.is_dir()


def _begins_well(path: Path) -> bool:
    text = _text(path)
    try:
        first = next(iter(_records(text, path)), None)
    except SurgeryError:  # no JSON
        return False
    return _messages(first) is not None


def read_records(path: str | Path) -> Iterable[Any]:
    """The records of a JSON or JSONL file.

    Raises:
        SurgeryError: the file cannot be read, or is not JSON (with the line).
    """
    return _records(_text(Path(path)), Path(path))


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise SurgeryError(f"there is no file {path}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise SurgeryError(f"cannot read {path}: {error}") from error


def _records(text: str, path: Path) -> Iterable[Any]:
    if text.lstrip().startswith("["):
        yield from _parsed(text, path, 1)
        return
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            yield _parsed(line, path, number)


def _parsed(text: str, path: Path, line: int) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise SurgeryError(f"{path}, line {line}, is not JSON: {error}") from None


def _keys(record: Any) -> str:
    return ", ".join(map(str, record)) if isinstance(record, dict) else f"no keys: {record!r:.40}"


def _messages(record: Any) -> list[Message] | None:
    if not isinstance(record, dict):
        return None
    if isinstance(record.get("messages"), list):
        messages: list[Message] = record["messages"]
        return messages
    question = record.get("instruction", record.get("prompt"))
    if isinstance(question, str) and record.get("input"):
        question = f"{question}\n\n{record['input']}"
    answer = next((record[key] for key in ANSWERS if isinstance(record.get(key), str)), None)
    if not isinstance(question, str) or answer is None:
        return None
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def encode_conversations(
    conversations: Sequence[Sequence[Message]],
    tokenizer: Tokenizer,
    template: ChatTemplate | None = None,
    *,
    answers_only: bool = True,
) -> list[Example]:
    """The ids of conversations; trained on are the assistant's answers and what ends them.

    The text of a conversation is encoded as a whole. A token that reaches over the place where an
    answer begins or ends belongs to the side of its first character.

    Args:
        conversations: lists of messages.
        tokenizer: the model's.
        template: how they are written; the tokenizer's own by default.
        answers_only: otherwise every token is trained on.

    Raises:
        SurgeryError: a conversation has no answer, or the template does not write a conversation
            as a continuation of its beginning, so that answers cannot be told from questions.
    """
    template = template or template_of(tokenizer)
    answers = [[] if not answers_only else _answers(messages) for messages in conversations]
    if answers_only:
        _check_answers(conversations, answers)
    for messages in conversations:
        check_messages(messages)
    examples, problems = [], []
    written = template.write(conversations, answers)
    for number, (messages, found) in enumerate(zip(conversations, written, strict=False), 1):
        if found.error:
            problems.append(f"{where(messages, number)}: {found.error}")
        elif not problems:
            examples.append(_example(found, tokenizer, template, answers_only))
    if problems:
        raise SurgeryError(
            f"the model's chat template fails: {listed(problems)}",
            f"{MEND_TEMPLATE}; --no-answers-only trains on every token",
        )
    for example in examples:
        warn_of_two_bos(tokenizer, example.ids)
    return examples


def where(messages: Sequence[Message], number: int) -> str:
    """The place of a conversation, for errors."""
    return getattr(messages, "where", "") or f"conversation {number}"


def listed(problems: Sequence[str]) -> str:
    """The first of several problems, and how many more there are."""
    return "; ".join(problems[:5]) + (f"; {len(problems) - 5:,} more" if problems[5:] else "")


def _check_answers(
    conversations: Sequence[Sequence[Message]], answers: Sequence[Sequence[int]]
) -> None:
    problems = [
        f"{where(messages, number)} has no answer"
        for number, (messages, found) in enumerate(zip(conversations, answers, strict=True), 1)
        if not found
    ]
    if problems:
        raise SurgeryError(f"there is nothing to train on: {listed(problems)}")


def _answers(messages: Sequence[Message]) -> list[int]:
    return [
        i for i, m in enumerate(messages) if isinstance(m, dict) and m.get("role") == "assistant"
    ]


def _example(
    written: Written, tokenizer: Tokenizer, template: ChatTemplate, answers_only: bool
) -> Example:
    ids, offsets = encode_conversation(tokenizer, template, written.text)
    if not answers_only:
        return Example(tuple(ids), (True,) * len(ids))
    borders = [place for span in written.answers for place in span]  # start, end, start, …
    within = np.searchsorted(borders, offsets, side="right") % 2 == 1  # (T,)
    return Example(tuple(ids), tuple(within.tolist()))
