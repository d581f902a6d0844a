"""Instruction data: prompts with answers, or whole conversations, and which tokens are trained on.

`record_files.py` reads files of records, `record_forms.py` says which forms a record may have.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from nanogpt_surgery.arguments import check_arguments
from nanogpt_surgery.data.conversations.chat import (
    MEND_TEMPLATE,
    ChatTemplate,
    Message,
    Messages,
    Written,
    check_messages,
    encode_conversation,
    named_template,
    shown,
    template_of,
    warn_of_two_bos,
)
from nanogpt_surgery.data.conversations.record_files import holds_records, read_records
from nanogpt_surgery.data.conversations.record_forms import EXPECTED, RecordError, conversation_of
from nanogpt_surgery.data.tokenizers.tokenizer import Tokenizer
from nanogpt_surgery.errors import SurgeryError, first_problems, quoted, warn


@dataclass(frozen=True)
class Example:
    """The ids of a conversation, and for each whether it is trained on."""

    ids: tuple[int, ...]
    trained: tuple[bool, ...]

    def cut(self, length: int) -> Example:
        """Its first tokens, at most so many."""
        return Example(self.ids[:length], self.trained[:length])


@check_arguments
def read_conversations(path: str | Path) -> list[Messages]:
    """The conversations of a JSON, JSONL, CSV or TSV file.

    Fields of records that are of no use are listed in a `SurgeryWarning`.

    Raises:
        SurgeryError: the file is missing or not what its name says, or records are of no known
            form, or say what cannot be honoured (all of them, with their number and field).
    """
    conversations, problems = [], []
    unused: Counter[str] = Counter()
    for number, record in enumerate(read_records(path), 1):
        try:
            messages, beside = conversation_of(record)
        except RecordError as error:
            problems.append(f"record {number}, {error}")
            continue
        messages.where = f"{path}, record {number}"
        conversations.append(messages)
        unused.update(beside)
    if problems or not conversations:
        problem = first_problems(problems) or "there are no records"
        raise SurgeryError(f"{path} is not instruction data: {problem}", EXPECTED)
    if unused:
        warn(f"{path} has fields that are not used: {counted(unused)}")
    return conversations


def read_conversation(path: str | Path) -> Messages:
    """The one conversation of a file, in which the model spoke last, so that it can go on.

    Raises:
        SurgeryError: as `read_conversations`, or there are several, or nothing to go on with.
    """
    found = read_conversations(path)
    check_messages(found[0])
    roles = [message["role"] for message in found[0]]
    if len(found) != 1:
        what = f"{len(found)} conversations"
    elif "user" not in roles:
        what = "one in which no user says anything"
    elif roles[-1] != "assistant":
        what = "one that ends in a question"
    else:
        return found[0]
    raise SurgeryError(f"{path} holds {what}, not one that can be gone on with")


def counted(fields: Counter[str]) -> str:
    """Names of fields, each with how many records have it."""
    named = [f"{quoted(name)[1:-1]} ({count:,} records)" for name, count in fields.most_common(20)]
    return ", ".join(named) + (f" and {len(fields) - 20} more" if len(fields) > 20 else "")


def is_instruction_data(paths: Sequence[str | Path]) -> bool:
    """Whether files to learn from hold instructions, and not plain text.

    They do if each is JSON, JSONL, CSV or TSV, by its name, and begins with a record of a known
    form.

    Raises:
        SurgeryError: only some of them are, or one of them begins with no such record.
    """
    files = [Path(path) for path in paths]
    known = [holds_records(file) for file in files]
    if not any(known):
        return False
    if not all(known):
        text, data = files[known.index(False)], files[known.index(True)]
        raise SurgeryError(
            "it is not clear whether this is instruction data or plain text: "
            f"{data} holds records, {text} does not",
            "name either alone",
        )
    for file in files:
        check_first_record(file)
    return True


def check_first_record(path: str | Path) -> None:
    """Raises `SurgeryError` unless a file begins with a record of a known form."""
    first = next(iter(read_records(path)), None)
    if first is None:
        raise SurgeryError(f"{path} holds no records", EXPECTED)
    try:
        conversation_of(first)
    except RecordError as error:
        prose = isinstance(first, dict) and isinstance(first.get("text"), str)
        hint = "; prose is learned from a text file: write the fields named text to a .txt file"
        raise SurgeryError(
            f"{path} is not instruction data: record 1, {error}", EXPECTED + hint * prose
        ) from None


def read_examples(
    paths: Sequence[str | Path],
    tokenizer: Tokenizer,
    template: str | ChatTemplate = "model",
    answers_only: bool = True,
) -> list[Example]:
    """The conversations of all files, as ids.

    They are written by a template or by one of this name: "model" is the tokenizer's own, or
    "chatml", "plain". Unless `answers_only`, every token is trained on.

    Raises:
        SurgeryError: no file is named, or as `read_conversations` and `encode_conversations`.
    """
    if not paths:
        raise SurgeryError(
            "no file of instruction data is named", "name a JSON, JSONL, CSV or TSV file"
        )
    if isinstance(template, str):
        template = named_template(tokenizer, template)
    conversations = [found for path in paths for found in read_conversations(path)]
    check_conversations(conversations, tokenizer)
    return encode_conversations(conversations, tokenizer, template, answers_only=answers_only)


@check_arguments
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
        answers_only: otherwise every token is trained on, but for answers of weight 0.

    Raises:
        SurgeryError: a conversation has no answer, or the template does not write a conversation
            as a continuation of its beginning, so that answers and questions look alike.
    """
    template = template or template_of(tokenizer)
    talks = [_plain(messages, number) for number, messages in enumerate(conversations, 1)]
    answers = [_answers(messages, answers_only) for messages in talks]
    if answers_only:
        _check_answers(talks, answers)
    _check_fields(talks, template)
    examples, problems = [], []
    for messages, found in zip(talks, template.write(talks, answers), strict=False):
        if found.error:
            problems.append(f"{messages.where}: {found.error}")
        elif not problems:
            examples.append(_example(found, tokenizer, template, answers_only))
    if problems:
        raise SurgeryError(
            f"the model's chat template fails: {first_problems(problems)}",
            f"{MEND_TEMPLATE}; answers_only=False trains on every token",
        )
    for example in examples:
        warn_of_two_bos(tokenizer, example.ids)
    return examples


def _plain(messages: Sequence[Message], number: int) -> Messages:
    """A conversation as `read_conversations` gives it."""
    if isinstance(messages, Messages):
        return messages
    place = f"conversation {number}"
    try:
        found, _ = conversation_of({"messages": list(messages)})
    except RecordError as error:
        raise SurgeryError(f"{place}, {error}") from None
    found.where = place
    return found


def _check_answers(conversations: Sequence[Messages], answers: Sequence[Sequence[int]]) -> None:
    problems = []
    for messages, found in zip(conversations, answers, strict=True):
        if not found:
            weightless = any(m["role"] == "assistant" for m in messages)
            what = "answers of weight 0 alone" if weightless else "no answer"
            problems.append(f"{messages.where} has {what}")
    if problems:
        raise SurgeryError(
            f"there is nothing to train on: {first_problems(problems)}",
            "an answer is a message of the role assistant (ShareGPT's gpt)",
        )


def _answers(messages: Messages, trained: bool) -> list[int]:
    """The answers that are trained on, or those that are not."""
    return [
        i
        for i, m in enumerate(messages)
        if m["role"] == "assistant" and bool(m.get("weight", 1)) == trained
    ]


_MEANING = ("tools", "tool_calls", "name")  # what a model must see to learn from an answer


def _check_fields(conversations: Sequence[Messages], template: ChatTemplate) -> None:
    """Finds fields that a template does not write: rendered without them its text is the same.

    Raises:
        SurgeryError: one of them changes what an answer means. Others are a warning.
    """
    counts: Counter[str] = Counter()
    first: dict[str, Messages] = {}
    for messages in conversations:
        found = {key for key, value in messages.variables.items() if value}
        found |= {f"{m['role']}.{key}" for m in messages for key in shown(m).keys() - _ALWAYS}
        counts.update(found)
        first |= dict.fromkeys(found - first.keys(), messages)
    if not first:
        return
    without = [_without(messages, name) for name, messages in first.items()]
    before, after = (list(template.write(talks)) for talks in (list(first.values()), without))
    same = {
        name: messages
        for (name, messages), one, other in zip(first.items(), before, after, strict=False)
        if one == other and not one.error
    }
    for name, messages in same.items():
        role, _, field = name.rpartition(".")
        if field in _MEANING and role != "tool":
            raise SurgeryError(
                f"{messages.where}: {template.name.removeprefix('the ')} template does not write "
                f"{name}, which {counts[name]:,} records have",
                "take the field out of the records, or use a model whose template writes it",
            )
    if same:
        unwritten = Counter({name: counts[name] for name in same})
        warn(f"the chat template does not write {counted(unwritten)}")


_ALWAYS = {"role", "content"}


def _without(messages: Messages, name: str) -> Messages:
    """A conversation without a variable, or without a field in messages of a role."""
    role, _, field = name.rpartition(".")
    said = [
        {key: value for key, value in m.items() if m["role"] != role or key != field}
        for m in messages
    ]
    return Messages(said, {k: v for k, v in messages.variables.items() if k != name})


def _example(
    written: Written, tokenizer: Tokenizer, template: ChatTemplate, answers_only: bool
) -> Example:
    ids, offsets = encode_conversation(tokenizer, template, written.text)
    borders = [place for span in written.answers for place in span]  # start, end, start, …
    within = np.searchsorted(borders, offsets, side="right") % 2 == 1  # (T,)
    return Example(tuple(ids), tuple((within == answers_only).tolist()))


def check_conversations(conversations: Sequence[Messages], tokenizer: Tokenizer) -> None:
    """Looks for characters that a vocabulary lacks in what records say.

    Raises:
        SurgeryError: there is one (the first, with its record, field and place there).
    """
    check: Callable[[str, str], None] | None = getattr(tokenizer, "check", None)
    if check is None:
        return
    for messages in conversations:
        for field, message in zip(messages.fields, messages, strict=True):
            check(message["content"] or "", f"{messages.where}, {field}")
