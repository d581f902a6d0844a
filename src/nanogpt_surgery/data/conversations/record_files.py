"""Files of records: JSON (a list), JSONL (a record on each line), CSV and TSV (under a header).

Questions with several answers, one of them right, are records of their own kind:

    {"prompt": …, "choices": ["…", "…"], "answer": 1}      also "question"; "answer" may be the text

A choice is the continuation of the prompt, so it begins with the space that stands between them.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nanogpt_surgery.data.text.corpus import files_of, read_texts
from nanogpt_surgery.errors import SurgeryError, first_problems, foreign_file, quoted, warn

JSON, TABLES = (".json", ".jsonl", ".ndjson"), (".csv", ".tsv")
LONGEST_CELL = 1 << 24  # characters
_SAMPLE = 1 << 14  # characters by which a text is told from data


def holds_records(path: str | Path) -> bool:
    """Whether a file's name says that it holds records, and not text."""
    return Path(path).suffix.lower() in JSON + TABLES and not Path(path).is_dir()


def read_records(path: str | Path) -> Iterator[Any]:
    """The records of a file; those of a table are dicts, by the names of its columns.

    Raises:
        SurgeryError: the file cannot be read, or is not what its name says (with the line), or a
            record has a field twice and the two differ.
    """
    path = Path(path)
    if not path.exists():
        raise SurgeryError(f"there is no file {path}")
    with foreign_file(path):
        text = path.read_bytes().decode("utf-8-sig")  # line ends in cells are kept
    read = _rows if path.suffix.lower() in TABLES else _values
    for number, record in enumerate(read(text, path), 1):
        if field := field_twice(record):
            raise SurgeryError(
                f"{path}, record {number}, has {field} twice, and the two say different things"
            )
        yield record


class _Twice(dict[str, Any]):
    """An object in which a key stands twice with different values."""

    key = ""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) == len(pairs):
        return found
    differ = [key for key, value in pairs if value != found[key]]
    if not differ:
        return found
    twice = _Twice(found)
    twice.key = differ[0]
    return twice


def from_json(text: str) -> Any:
    """The value of a text in JSON; `field_twice` finds a key that stands twice in it.

    Raises:
        ValueError: the text is not JSON.
        RecursionError: it is nested too deeply.
    """
    return json.loads(text, object_pairs_hook=_object)


def field_twice(value: Any) -> str:
    """The first field of what `from_json` gave that stands twice with different values, or "" ."""
    left = [("", value)]
    while left:
        place, found = left.pop()
        if isinstance(found, _Twice):
            return f"{place}.{quoted(found.key)[1:-1]}".removeprefix(".")
        if isinstance(found, dict):
            inner = [(f"{place}.{quoted(key)[1:-1]}".lstrip("."), v) for key, v in found.items()]
        elif isinstance(found, list):
            inner = [(f"{place}[{i}]", v) for i, v in enumerate(found)]
        else:
            continue
        left += [pair for pair in reversed(inner) if isinstance(pair[1], dict | list)]
    return ""


def _values(text: str, path: Path) -> Iterator[Any]:
    begin = text.lstrip()
    if begin.startswith("["):
        found = _parsed(text, path, 1)
        yield from found
    elif begin.startswith("{") and not _is_json(begin.partition("\n")[0]):
        yield _parsed(text, path, 1)  # one record over several lines
    else:
        for number, line in enumerate(text.split("\n"), 1):
            if line.strip():
                yield _parsed(line, path, number)


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def _parsed(text: str, path: Path, line: int) -> Any:
    try:
        return from_json(text)
    except (ValueError, RecursionError) as error:
        raise SurgeryError(f"{path}, line {line}, is not JSON: {error}") from None


def _rows(text: str, path: Path) -> Iterator[dict[str, str | None]]:
    csv.field_size_limit(LONGEST_CELL)
    mark = _delimiter(text, path)
    lines = csv.reader(io.StringIO(text, newline=""), delimiter=mark, strict=True)
    try:
        rows = (row for row in lines if any(cell.strip() for cell in row))
        columns = [cell.strip().lower() for cell in next(rows, [])]
        twice = [name for name in columns if name and columns.count(name) > 1]
        if twice:
            raise SurgeryError(f"{path} has the column {quoted(twice[0])} twice")
        for number, row in enumerate(rows, 1):
            if len(row) != len(columns):
                raise SurgeryError(
                    f"{path}, record {number} (line {lines.line_num}), has {len(row)} cells under "
                    f"{len(columns)} columns",
                    "a cell that holds a comma, a quote or a line break stands in double quotes",
                )
            yield dict(zip(columns, (cell or None for cell in row), strict=True))
    except csv.Error as error:
        raise SurgeryError(f"{path}, line {lines.line_num}, cannot be read: {error}") from None


def _delimiter(text: str, path: Path) -> str:
    """A tab in TSV; in CSV what parts the names in the header, as some spreadsheets have it."""
    if path.suffix.lower() == ".tsv":
        return "\t"
    header = text.lstrip().partition("\n")[0]
    return max(",;\t", key=header.count)


def warn_of_records(paths: Sequence[str]) -> None:
    """Warns of files that are read as text and look like data, by their name or beginning."""
    for path in map(Path, paths):
        if path.is_dir():
            found = [file for file in files_of([path]) if holds_records(file)]
            what = f"holds {len(found):,} files of data ({found[0].name})" if found else ""
        elif path.exists():
            with foreign_file(path), path.open(encoding="utf-8", errors="replace") as file:
                kind = looks_like_data(file.read(_SAMPLE + 1))
            what = f"looks like {kind}" if kind else ""
        else:
            continue
        if what:
            warn(
                f"{path} {what}; it is learned as text, its marks and names of fields too "
                "(questions with answers belong in a .csv, .json or .jsonl file)"
            )


def looks_like_data(text: str) -> str:
    """A word for what the beginning of a text looks like where it is no prose, else nothing."""
    lines = [line for line in text[:_SAMPLE].split("\n") if line.strip()]
    whole = lines if len(text) <= _SAMPLE else lines[:-1]
    few = whole[:50]
    if few and few[0].lstrip()[0] in "{[" and (_is_json(few[0]) or _is_json(text.strip())):
        return "JSON"
    for mark, least in (("\t", 1), (",", 2), (";", 2)):
        counts = {_cells(line, mark) for line in few}
        if len(few) >= 4 and len(counts) == 1 and min(counts) > least:
            return f"a table of {min(counts)} columns"
    return ""


def _cells(line: str, mark: str) -> int:
    try:
        return len(next(csv.reader([line], delimiter=mark)))
    except csv.Error:
        return 0


def keys_of(record: Any) -> str:
    """The fields of a record that is not understood, for a message."""
    if not isinstance(record, dict):
        return f"is {quoted(record)}, not an object with fields"
    names = ", ".join(quoted(str(key))[1:-1] for key in list(record)[:20])
    return f"has the fields {names}" if record else "has no fields"


@dataclass(frozen=True)
class Question:
    """A prompt, the ways to go on, and which is right."""

    prompt: str
    choices: tuple[str, ...]
    answer: int


def read_prompts(path: str | Path) -> list[str]:
    """The prompts of a file: a line each, or the `prompt` of each record, or records of text alone.

    Raises:
        SurgeryError: the file cannot be read, holds none, or a record has none.
    """
    if holds_records(path):
        found = [r.get("prompt") if isinstance(r, dict) else r for r in read_records(path)]
    else:
        lines = read_texts([path]).replace("\r\n", "\n").split("\n")
        found = list(filter(None, lines))
    wrong = [number for number, text in enumerate(found, 1) if not isinstance(text, str)]
    if wrong or not found:
        what = f"record {wrong[0]} has no prompt" if wrong else "there are none"
        raise SurgeryError(
            f"{path} does not hold prompts: {what}", 'a line each, or {"prompt": "Once"} in JSONL'
        )
    return [str(text) for text in found]


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
        raise SurgeryError(
            f"{path} does not hold questions: {first_problems(wrong) or 'there are no records'}",
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
