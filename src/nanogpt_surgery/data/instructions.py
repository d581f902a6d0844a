"""Instruction data: prompts with answers, or whole conversations, and which tokens are trained on.

A file is JSON (a list of records) or JSONL (a record on each line). A record is one of

    {"messages": [{"role": "user", "content": …}, {"role": "assistant", "content": …}, …]}
    {"prompt": …, "completion": …}                     also "answer", "response", "output"
    {"instruction": …, "input": …, "output": …}        "input" may be empty or left out
"""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nanogpt_surgery.data.chat import (
    ChatTemplate,
    Message,
    Render,
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
    if answers_only:
        examples = _with_answers(conversations, tokenizer, template)
    else:
        texts = template.render_many([(messages, False) for messages in conversations])
        rows = [encode_conversation(tokenizer, template, text)[0] for text in texts]
        examples = [Example(tuple(ids), (True,) * len(ids)) for ids in rows]
    for example in examples:
        warn_of_two_bos(tokenizer, example.ids)
    return examples


def _with_answers(
    conversations: Sequence[Sequence[Message]], tokenizer: Tokenizer, template: ChatTemplate
) -> list[Example]:
    ends = [_answers(messages) for messages in conversations]
    empty = [number for number, found in enumerate(ends, 1) if not found]
    if empty:
        raise SurgeryError(f"conversation {empty[0]} has no answer ({len(empty)} such in all)")
    renders: list[Render] = []
    for messages, found in zip(conversations, ends, strict=True):
        renders += [
            part for i in found for part in ((messages[:i], True), (messages[: i + 1], False))
        ]
        renders.append((messages, False))
    texts = iter(template.render_many(renders))
    return [
        _example([next(texts) for _ in range(2 * len(found) + 1)], tokenizer, template, number)
        for number, found in enumerate(ends, 1)
    ]


def _answers(messages: Sequence[Message]) -> list[int]:
    return [
        i for i, m in enumerate(messages) if isinstance(m, dict) and m.get("role") == "assistant"
    ]


def _example(
    texts: list[str], tokenizer: Tokenizer, template: ChatTemplate, number: int
) -> Example:
    *prefixes, whole = texts
    if not all(whole.startswith(prefix) for prefix in prefixes):
        raise SurgeryError(
            f"in conversation {number} the template rewrites what came before an answer, so "
            "answers cannot be told from questions",
            "use the template chatml or plain, or train on every token (answers_only=False)",
        )
    borders = [len(prefix) for prefix in prefixes]  # question, answer, question, …
    ids, offsets = encode_conversation(tokenizer, template, whole)
    trained = tuple(bisect_right(borders, offset) % 2 == 1 for offset in offsets)
    return Example(tuple(ids), trained)
