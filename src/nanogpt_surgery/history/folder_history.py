"""The history of a folder: operations on it in place, undo and redo to the byte.

FOLDER/
  config.json, model.safetensors, …   the model as it is now
  operations/
    journal.jsonl                     a line for each thing that happened: done, undone, done again
    <sha256>                          a file that the folder had, or would have, under its hash

A line says when, what, on which base, with which result, and the sha256 of every file of the model
before and after. `read_journal` plays the lines through.

An operation puts the new state together in a twin beside the folder: links to every file that
stays, the new files, the old ones in `operations/`, the journal with one line more. Then the two
change places, in one step. Files and journal can never disagree, and a kill at any moment leaves
the old state or the new one; what it leaves behind beside the folder is removed by the next
operation.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from nanogpt_surgery.errors import SurgeryError, first_problems, listed
from nanogpt_surgery.files.atomic import MANIFEST, file_hash, seal
from nanogpt_surgery.files.disk_errors import NotFlushedError, disk_refuses, tried_again
from nanogpt_surgery.files.lock import LOCK, file_lock
from nanogpt_surgery.files.writing import (
    exchange,
    flush,
    flush_place,
    link_or_copy,
    remove_temporaries,
    replace_text,
    set_aside,
    temporary_beside,
)
from nanogpt_surgery.history.journal import (
    AGAIN,
    DONE,
    SETTLED,
    UNDONE,
    Journal,
    Operation,
    report_turn,
    shortened,
)
from nanogpt_surgery.report import SHOWN_OF_A_HASH, Report

RUN = "run.json"  # what a training was asked for; a folder with it is a run
OPERATIONS, JOURNAL = "operations", "journal.jsonl"
NEW = ".new"
_SUFFIXES = {".json", ".safetensors", ".txt", ".jinja", ".model"}
_HASH = re.compile(r"[0-9a-f]{64}")
_RESTORE = "restore it from a copy"


@dataclass
class FolderOperation(Operation):
    """One operation on a folder.

    Attributes:
        base: the fingerprint of the weights that it was done on.
        before: the sha256 of each file of the model, by name.
        after: the same afterwards, read again from the disk.
        originals: "kept", so that it can be undone, "dropped", or "none" where it made the folder.
        planned: what was expected of it.
        measured: what it did.
        when: in UTC, to the second.
        number: its place in the journal, the first being 1.
    """

    base: str
    before: dict[str, str] = field(default_factory=dict)
    after: dict[str, str] = field(default_factory=dict)
    originals: str = "kept"
    planned: dict[str, Any] = field(default_factory=dict)
    measured: dict[str, Any] = field(default_factory=dict)
    when: str = ""
    number: int = 0

    def __post_init__(self) -> None:
        for name, digest in [*self.before.items(), *self.after.items()]:  # they become paths
            if Path(name).name != name or not _HASH.fullmatch(digest):
                raise ValueError(f"{name!r} with the hash {digest!r} names no file of the folder")

    def states(self, back: bool) -> tuple[dict[str, str], dict[str, str]]:
        """The hashes from which an undo, if `back`, or a redo starts, and those that it ends at."""
        return (self.after, self.before) if back else (self.before, self.after)

    def changes(self) -> str:
        """The files that changed, with the first digits of their sha256 before and after."""
        return ", ".join(
            f"{n} {shortened(self.before.get(n))} → {shortened(self.after.get(n))}"
            for n in sorted(self.before | self.after)
            if self.before.get(n) != self.after.get(n)
        )


@dataclass
class FolderJournal(Journal[FolderOperation]):
    """The lines of a journal, played through.

    Attributes:
        lines: as they were written.
        files: the sha256 that each file of the model should have now.
    """

    lines: list[dict[str, Any]] = field(default_factory=list)
    files: dict[str, str] = field(default_factory=dict)

    def write(self, event: str, **facts: Any) -> FolderOperation:
        """Adds a line on what has happened now."""
        when = datetime.now(UTC).isoformat(timespec="seconds")
        return self.play({"event": event, **facts, "when": when})

    def add_now(self, operation: FolderOperation) -> FolderOperation:
        """Adds an operation that has just been done; returns it numbered and dated."""
        return self.write(DONE, **asdict(operation) | {"number": len(self.operations) + 1})

    def play(self, line: dict[str, Any]) -> FolderOperation:
        """Adds a line; returns the operation that it is about."""
        if line["event"] == DONE:
            operation = FolderOperation(**{f.name: line[f.name] for f in fields(FolderOperation)})
            self.add(operation)
            if operation.originals != "kept":
                self.settle()
            self.files = operation.after
        else:
            back = line["event"] == UNDONE
            operation = self.turn(back)
            _, self.files = operation.states(back)
        self.lines.append(line)
        return operation

    def needed(self) -> set[str]:
        """The hashes of the files to keep: all that an undo or a redo would bring back."""
        states = [one.before for one in self.done] + [one.after for one in self.undone]
        files = {file for state in states for file in state.items()} - set(self.files.items())
        return {digest for _, digest in files}


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
        raise SurgeryError(f"{path} is not UTF-8 at byte {error.start}", _RESTORE) from None
    for number, line in enumerate(lines, 1):
        try:
            if line:
                journal.play(json.loads(line))
        except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
            raise SurgeryError(
                f"{path}, line {number}, cannot be read: {error}", _RESTORE
            ) from None
    return journal


def write_journal(folder: Path, journal: FolderJournal) -> None:
    """Writes the journal, in one rename, and deletes the files that nothing needs any more."""
    place = folder / OPERATIONS
    place.mkdir(exist_ok=True)
    lines = (json.dumps(line, ensure_ascii=False) + "\n" for line in journal.lines)
    replace_text(place / JOURNAL, "".join(lines))
    needed = journal.needed()
    for path in _kept(folder):
        if path.name not in needed:
            path.unlink()
    flush(place)


def _kept(folder: Path) -> list[Path]:
    """The files that lie under their hash."""
    return [path for path in (folder / OPERATIONS).iterdir() if _HASH.fullmatch(path.name)]


def record(folder: Path, operation: FolderOperation) -> None:
    """Records what made a folder, such as a training; the folder itself is not touched.

    Raises:
        SurgeryError: the journal that is there cannot be read.
    """
    journal = read_journal(folder)
    journal.add_now(operation)
    write_journal(folder, journal)


def record_made(folder: Path, operation: FolderOperation) -> FolderOperation:
    """Begins the journal of a new folder with the operation that made it, and returns that."""
    made = replace(operation, after=hashes_of(folder), originals="none")
    record(folder, made)
    return made


def operations_on(folder: Path) -> list[FolderOperation]:
    """The operations, not undone, whose result a folder's own files are; the oldest first."""
    operations = read_journal(folder).operations
    return [o for o in operations if o.originals != "none" and o.state in (DONE, SETTLED)]


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
            "merge_adapter(FOLDER, ADAPTER) is an operation; training writes a line too",
        )
    kept_bytes = sum(path.stat().st_size for path in _kept(folder))
    return journal.log(f"operations on {folder}", _row, kept_bytes=kept_bytes)


def _row(done: FolderOperation) -> dict[str, Any]:
    unchanged = done.measured.get("top_token_unchanged", done.measured.get("same_greedy"))
    return {
        "": done.number,
        "when": done.when,
        "operation": done.operation,
        "on base": done.base[:SHOWN_OF_A_HASH],
        "files": done.changes(),
        "kl": done.measured.get("kl"),
        "top token unchanged": unchanged,  # under another name in folders of before
        "validation loss": done.measured.get("validation_loss"),
    }


def operate(
    folder: Path,
    write: Callable[[Path], FolderOperation],
    keep_originals: bool = True,
    gone: Collection[str] = (),
    opened_at: list[dict[str, Any]] | None = None,
) -> FolderOperation:
    """Replaces files of a folder, in one step, with a line in its journal.

    Args:
        folder: a run or a model folder.
        write: gets an empty folder and writes the new files into it; returns the operation without
            hashes.
        keep_originals: so that it can be undone. Without, nothing before it can be either.
        gone: names of files that the new ones stand for, whatever their names; others stay.
        opened_at: the lines of the folder's journal when what `write` goes by was read.

    Raises:
        SurgeryError: the folder was changed by other hands since its last operation, or by another
            operation since `opened_at`, holds links to elsewhere, is being written, or the disk
            refuses; it is untouched then. Or what `write` raises.
    """

    def change() -> FolderOperation:
        with _twin(folder) as (twin, journal, before):
            _check_lines(folder, journal.lines, opened_at)
            new = twin / NEW
            new.mkdir()
            done = write(new)
            written = {path.name for path in new.iterdir()}
            for name in before.keys() & {*written, *gone, MANIFEST}:
                _put_by(twin, name, before[name])
            for name in written:
                (new / name).rename(twin / name)
            new.rmdir()
            if MANIFEST in before:
                seal(twin)
            originals = "kept" if keep_originals else "dropped"
            done = replace(done, before=before, after=hashes_of(twin), originals=originals)
            done = journal.add_now(done)
            write_journal(twin, journal)
        return done

    return tried_again(change, never=(NotFlushedError,))  # once it has happened, not once more


def _check_lines(
    folder: Path, lines: list[dict[str, Any]], opened_at: list[dict[str, Any]] | None
) -> None:
    """Raises `SurgeryError` if a folder's journal is not what it was when the folder was opened."""
    if opened_at is not None and lines != opened_at:
        raise SurgeryError(
            f"{folder} was changed since it was opened: its journal had {len(opened_at)} lines and "
            f"now has {len(lines)}",
            "run this operation again: it starts from what is there now",
        )


def undo_folder(folder: str | Path) -> Report:
    """Takes the last operation on a folder back: every file has the bytes it had.

    Raises:
        SurgeryError: there is none, its originals were dropped, or a file is not what the operation
            left, or not what was kept (all of them named). The folder is untouched then.
    """
    return _turn(Path(folder), back=True)


def redo_folder(folder: str | Path) -> Report:
    """Does the operation on a folder again that was undone last: every file has the bytes it got.

    Raises:
        SurgeryError: as `undo_folder`.
    """
    return _turn(Path(folder), back=False)


def _turn(folder: Path, back: bool) -> Report:
    def change() -> FolderOperation:
        with _twin(folder) as (twin, journal, _):
            done = journal.last(back, str(folder), f"folder_log({folder}) lists what was done")
            now, goal = done.states(back)
            for name in now:
                if now[name] != goal.get(name):
                    _put_by(twin, name, now[name])
            for name in goal:
                kept = twin / OPERATIONS / goal[name]
                if now.get(name) != goal[name] and kept.is_file():
                    link_or_copy(kept, twin / name)
            because = f"{OPERATIONS} should hold what '{done.operation}' put by"
            _check_files(hashes_of(twin), folder, goal, because)
            journal.write(UNDONE if back else AGAIN, number=done.number)
            write_journal(twin, journal)
        return done

    done = tried_again(change, never=(NotFlushedError,))
    now, goal = done.states(back)
    summary = {
        "folder": str(folder),
        "files_changed": sum(now.get(name) != goal.get(name) for name in now | goal),
        f"as_{'before' if back else 'after'}_the_operation": len(goal),
    }
    return report_turn(done, back, "file", now, goal, summary)


@contextmanager
def _twin(folder: Path) -> Iterator[tuple[Path, FolderJournal, dict[str, str]]]:
    """A copy of a folder made of links, to be changed; at the end it takes the folder's place.

    Beside it come the folder's journal and `hashes_of` it. Nothing may be written into the copy's
    files: they are the folder's. They are replaced.
    """
    _check_place(folder)
    folder = folder.resolve()
    with file_lock(folder / LOCK if (folder / RUN).is_file() else folder):
        remove_temporaries(folder.parent, of=folder.name)
        journal = read_journal(folder)
        _check_links(folder)
        since = journal.lines[-1]["when"] if journal.lines else ""
        there = hashes_of(folder)
        _check_files(there, folder, journal.files, f"it should be as it was left at {since}")
        twin = temporary_beside(folder)
        try:
            shutil.copytree(folder, twin, copy_function=lambda a, b: link_or_copy(Path(a), Path(b)))
            yield twin, journal, there
            for path in [*twin.rglob("*"), twin]:
                if path.is_dir() or path.stat().st_nlink == 1:  # a link lies on the disk already
                    flush(path)
            exchange(twin, folder)
            flush_place(folder)
        except OSError as error:
            raise disk_refuses(folder, error) from error
        finally:
            shutil.rmtree(twin, ignore_errors=True)


def _check_place(folder: Path) -> None:
    if not folder.is_dir():
        aside = ", ".join(str(path) for path in set_aside(folder))
        raise SurgeryError(
            f"there is no folder {folder}" + (f"; a kill left it as {aside}" if aside else ""),
            f"mv {aside} {folder}"
            if aside
            else "an operation in place needs a run or a model folder",
        )
    if Path.cwd().is_relative_to(folder.resolve()):
        raise SurgeryError(
            f"you stand in {folder}, which is about to change places with its new state",
            "cd out of it, and name it from there",
        )


def _check_links(folder: Path) -> None:
    links = [str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_symlink()]
    if links:
        raise SurgeryError(
            f"{folder} holds links to files elsewhere ({listed(sorted(links), 4)}), so it "
            "cannot be operated on in place",
            "out=FOLDER writes a new one",
        )


def _check_files(there: dict[str, str], folder: Path, wanted: dict[str, str], because: str) -> None:
    """Raises `SurgeryError` if files are not what they should be, and names them."""
    wrong = [
        f"{name} has the sha256 {shortened(there[name])} instead of {shortened(digest)}"
        if name in there
        else f"{name} is missing"
        for name, digest in wanted.items()
        if there.get(name) != digest
    ]
    if wrong:
        raise SurgeryError(
            f"{folder} was changed by other hands: {first_problems(wrong, 8)} ({because})",
            f"{_RESTORE}, or leave it alone and write elsewhere",
        )


def _put_by(twin: Path, name: str, digest: str) -> None:
    """Moves a file of the twin into its operations, under its hash."""
    (twin / OPERATIONS).mkdir(exist_ok=True)
    (twin / name).replace(twin / OPERATIONS / digest)
