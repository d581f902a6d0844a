"""The journal of a folder: `operations/journal.jsonl`, a line for each thing that happened.

FOLDER/
  config.json, model.safetensors, …   the model as it is now
  operations/
    journal.jsonl                     done, undone, done again: the oldest first
    <sha256>                          a file that the folder had, or would have, under its hash

A line says when, what, on which base, with which result, and the sha256 of every file of the model
before and after. `read_journal` plays the lines through: what can be undone, what can be redone,
and which hashes the files should have now.
"""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass, field, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from nanogpt_surgery.errors import SurgeryError
from nanogpt_surgery.files.json_files import replace_text
from nanogpt_surgery.files.manifest import file_hash
from nanogpt_surgery.files.writing import flush
from nanogpt_surgery.report import Report

RUN = "run.json"  # what a training was asked for; a folder with it is a run
OPERATIONS, JOURNAL = "operations", "journal.jsonl"
DONE, UNDONE, AGAIN = "done", "undone", "done again"
SHOWN = 12  # digits of a hash in a table
_SUFFIXES = {".json", ".safetensors", ".txt", ".jinja", ".model"}
_HASH = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Entry:
    """One operation on a folder.

    Attributes:
        operation: in words, as for `surgery log`.
        base: the fingerprint of the weights that it was done on.
        before: the sha256 of each file of the model, by name.
        after: the same afterwards, read again from the disk.
        originals: "kept", so that it can be undone, "dropped", or "none" where it made the folder.
        planned: what was expected of it.
        measured: what it did.
        number: in the journal.
        when: in UTC, to the second.
    """

    operation: str
    base: str
    before: dict[str, str]
    after: dict[str, str]
    originals: str = "kept"
    planned: dict[str, Any] = field(default_factory=dict)
    measured: dict[str, Any] = field(default_factory=dict)
    number: int = 0
    when: str = ""

    def changes(self) -> str:
        """The files that changed, with the first digits of their sha256 before and after."""
        names = [n for n in self.before | self.after if self.before.get(n) != self.after.get(n)]
        return ", ".join(
            f"{n} {self.before.get(n, '-')[:SHOWN]} → {self.after.get(n, '-')[:SHOWN]}"
            for n in sorted(names)
        )


@dataclass
class FolderJournal:
    """The lines of a journal, played through.

    Attributes:
        lines: as they were written.
        settled: done, and not to be undone any more.
        done: can be undone, the last one first.
        undone: can be done again, the last one first.
        lapsed: undone, and followed by something else.
        files: the sha256 that each file of the model should have now.
    """

    lines: list[dict[str, Any]] = field(default_factory=list)
    settled: list[Entry] = field(default_factory=list)
    done: list[Entry] = field(default_factory=list)
    undone: list[Entry] = field(default_factory=list)
    lapsed: list[Entry] = field(default_factory=list)
    files: dict[str, str] = field(default_factory=dict)

    def add(self, entry: Entry) -> Entry:
        """A new operation, numbered and dated; ends what could be redone."""
        entry = Entry(**(asdict(entry) | {"number": self._next(), "when": _now()}))
        self._play({"event": DONE, **asdict(entry)})
        return entry

    def turn(self, event: str) -> None:
        """The last operation undone, or the one undone last done again."""
        entry = self.done[-1] if event == UNDONE else self.undone[-1]
        self._play({"event": event, "number": entry.number, "when": _now()})

    def _next(self) -> int:
        return 1 + [line["event"] for line in self.lines].count(DONE)

    def _play(self, line: dict[str, Any]) -> None:
        if line["event"] == DONE:
            entry = Entry(**{f.name: line[f.name] for f in fields(Entry)})
            _check_names(entry)
            self.lapsed += self.undone
            self.undone.clear()
            if entry.originals != "kept":
                self.settled += [*self.done, entry]
                self.done.clear()
            else:
                self.done.append(entry)
            self.files = entry.after
        elif line["event"] == UNDONE:
            self.undone.append(self.done.pop())
            self.files = self.undone[-1].before
        else:
            self.done.append(self.undone.pop())
            self.files = self.done[-1].after
        self.lines.append(line)

    def needed(self) -> set[str]:
        """The hashes of the files to keep: all that an undo or a redo would bring back."""
        states = [entry.before for entry in self.done] + [entry.after for entry in self.undone]
        files = {file for state in states for file in state.items()} - set(self.files.items())
        return {digest for _, digest in files}


def _check_names(entry: Entry) -> None:
    """Names and hashes become paths."""
    for name, digest in [*entry.before.items(), *entry.after.items()]:
        if Path(name).name != name or not _HASH.fullmatch(digest):
            raise ValueError(f"{name!r} with the hash {digest!r} names no file of the folder")


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def read_journal(folder: Path) -> FolderJournal:
    """The journal of a folder; an empty one where there is none.

    Raises:
        SurgeryError: it is not UTF-8, or a line cannot be read (its number).
    """
    journal, path = FolderJournal(), folder / OPERATIONS / JOURNAL
    if not path.is_file():
        return journal
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise SurgeryError(
            f"{path} is not UTF-8 at byte {error.start}", "restore it from a copy"
        ) from None
    for number, line in enumerate(lines, 1):
        try:
            if line:
                journal._play(json.loads(line))
        except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
            raise SurgeryError(
                f"{path}, line {number}, cannot be read: {error}", "restore it from a copy"
            ) from None
    return journal


def write_journal(folder: Path, journal: FolderJournal) -> None:
    """Writes the journal, in one rename, and deletes the files that nothing needs any more."""
    place = folder / OPERATIONS
    place.mkdir(exist_ok=True)
    lines = (json.dumps(line, ensure_ascii=False) + "\n" for line in journal.lines)
    replace_text(place / JOURNAL, "".join(lines))
    needed = journal.needed()
    for path in place.iterdir():
        if _HASH.fullmatch(path.name) and path.name not in needed:
            path.unlink()
    flush(place)


def record(folder: Path, entry: Entry) -> None:
    """Records what made a folder, such as a training; the folder itself is not touched.

    Raises:
        SurgeryError: the journal that is there cannot be read.
    """
    journal = read_journal(folder)
    journal.add(entry)
    write_journal(folder, journal)


def is_operated(folder: Path) -> bool:
    """Whether a folder's own files are the result of an operation that is not undone."""
    journal = read_journal(folder)
    return any(e.originals != "none" for e in [*journal.settled, *journal.done])


def hashes_of(folder: Path) -> dict[str, str]:
    """The sha256 of each file that a model or an adapter is made of, at the top of a folder."""
    found = [path for path in folder.iterdir() if path.suffix in _SUFFIXES and path.is_file()]
    return {path.name: file_hash(path) for path in sorted(found) if path.name != RUN}


def folder_log(folder: str | Path) -> Report:
    """The operations done to a folder, the oldest first.

    Raises:
        SurgeryError: there is no such folder, it has no journal, or it cannot be read.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise SurgeryError(f"there is no folder {folder}", "name a run, a model or an adapter")
    journal = read_journal(folder)
    if not journal.lines:
        raise SurgeryError(
            f"nothing was done to {folder} yet",
            "surgery merge FOLDER ADAPTER is an operation; training writes a line too",
        )
    states = [
        ("done, cannot be undone", journal.settled),
        ("done", journal.done),
        ("undone", journal.undone),
        ("undone, cannot be redone", journal.lapsed),
    ]
    stated = [(entry, state) for state, entries in states for entry in entries]
    rows = [_row(entry, state) for entry, state in sorted(stated, key=lambda pair: pair[0].number)]
    kept = [p for p in (folder / OPERATIONS).iterdir() if _HASH.fullmatch(p.name)]
    summary = {
        "can_undo": journal.done[-1].operation if journal.done else None,
        "can_redo": journal.undone[-1].operation if journal.undone else None,
        "kept_bytes": sum(path.stat().st_size for path in kept),
    }
    return Report(f"operations on {folder}", rows, summary)


def _row(entry: Entry, state: str) -> dict[str, Any]:
    unchanged = entry.measured.get("top_token_unchanged", entry.measured.get("same_greedy"))
    return {
        "": entry.number,
        "when": entry.when,
        "operation": entry.operation,
        "on base": entry.base[:SHOWN],
        "files": entry.changes(),
        "kl": entry.measured.get("kl"),
        "top token unchanged": unchanged,  # under another name in folders of before
        "validation loss": entry.measured.get("validation_loss"),
        "state": state,
    }
