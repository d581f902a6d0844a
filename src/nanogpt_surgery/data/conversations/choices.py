"""Questions with several answers, one of them right, from JSON (a list) or JSONL (one a line).

    {"prompt": …, "choices": ["…", "…"], "answer": 1}      also "question"; "answer" may be the text

A choice is the continuation of the prompt, so it begins with the space that stands between them.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nanogpt_surgery.data.conversations.record_files import read_records
from nanogpt_surgery.errors import SurgeryError


@dataclass(frozen=True)
class Question:
    """A prompt, the ways to go on, and which is right."""

    prompt: str
    choices: tuple[str, ...]
    answer: int


def has_choices(path: str | Path) -> bool:
    """Whether the first record of a file is a question with choices."""
    first = next(iter(read_records(path)), None)
    return isinstance(first, dict) and "choices" in first


def read_questions(path: str | Path) -> list[Question]:
    """The questions of a JSON or JSONL file.

    Raises:
        SurgeryError: the file cannot be read, or records are no questions (all of them, with their
            number).
    """
    found = [_question(record) for record in read_records(path)]
    wrong = [f"record {i} {q}" for i, q in enumerate(found, 1) if isinstance(q, str)]
    if wrong or not found:
        shown = "; ".join(wrong[:5]) or "there are no records"
        more = f"; {len(wrong) - 5} more" if wrong[5:] else ""
        raise SurgeryError(
            f"{path} does not hold questions: {shown}{more}",
            'a record is {"prompt": "2 + 2 =", "choices": [" 3", " 4"], "answer": 1}',
        )
    return [question for question in found if isinstance(question, Question)]


def _question(record: Any) -> Question | str:
    """A record as a question, or what is wrong with it."""
    if not isinstance(record, dict):
        return f"is {record!r:.40}"
    prompt = record.get("prompt", record.get("question"))
    if record.get("question", prompt) != prompt:
        return "has a prompt and a question, which differ"
    choices, answer = record.get("choices"), record.get("answer")
    if not isinstance(prompt, str) or not prompt:
        return "has no prompt"
    if not isinstance(choices, list) or len(choices) < 2:
        return "has not two choices or more"
    if not all(isinstance(choice, str) and choice for choice in choices):
        return "has a choice that is not a text, or empty"
    if isinstance(answer, str) and answer in choices:
        answer = choices.index(answer)
    if type(answer) is not int or not 0 <= answer < len(choices):
        return f"has the answer {answer!r:.40}, which is none of its {len(choices)} choices"
    return Question(prompt, tuple(choices), answer)
