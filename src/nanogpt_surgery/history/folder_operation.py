"""Operating on a folder in place, and taking it back to the bit.

The new state is put together in a twin beside the folder: links to every file that stays, the new
files, the old ones under their hash in `operations/`, the journal with one line more. Then the two
change places, in one step. Files and journal can never disagree, and a kill at any moment leaves
the old state or the new one; what it leaves behind beside the folder is removed by the next
operation.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from nanogpt_surgery.errors import SurgeryError
from nanogpt_surgery.files.disk_errors import NotFlushedError, disk_refuses, tried_again
from nanogpt_surgery.files.exchange import exchange, set_aside
from nanogpt_surgery.files.lock import LOCK, file_lock
from nanogpt_surgery.files.manifest import MANIFEST, seal
from nanogpt_surgery.files.temporary import remove_temporaries, temporary_beside
from nanogpt_surgery.files.writing import flush, flush_place, link_or_copy
from nanogpt_surgery.history.folder_journal import (
    AGAIN,
    OPERATIONS,
    RUN,
    SHOWN,
    UNDONE,
    Entry,
    FolderJournal,
    hashes_of,
    read_journal,
    write_journal,
)
from nanogpt_surgery.report import Report

NEW = ".new"
T = TypeVar("T")


def operate(
    folder: Path,
    write: Callable[[Path], Entry],
    keep_originals: bool = True,
    gone: Collection[str] = (),
) -> Entry:
    """Replaces files of a folder, in one step, with a line in its journal.

    Args:
        folder: a run or a model folder.
        write: gets an empty folder and writes the new files into it; returns the entry without
            hashes.
        keep_originals: so that it can be undone. Without, nothing before it can be either.
        gone: names of files that the new ones stand for, whatever their names; others stay.

    Raises:
        SurgeryError: the folder was changed by other hands since its last operation, holds links to
            elsewhere, is being written, or the disk refuses; it is untouched then. Or what `write`
            raises.
    """
    return _tried_again(lambda: _operate(folder, write, keep_originals, gone))


def _operate(
    folder: Path, write: Callable[[Path], Entry], keep_originals: bool, gone: Collection[str]
) -> Entry:
    with _twin(folder) as (twin, journal):
        before = hashes_of(twin)
        new = twin / NEW
        new.mkdir()
        entry = write(new)
        written = {path.name for path in new.iterdir()}
        for name in before.keys() & {*written, *gone, MANIFEST}:
            _put_by(twin, name, before[name])
        for name in written:
            (new / name).rename(twin / name)
        new.rmdir()
        if MANIFEST in before:
            seal(twin)
        originals = "kept" if keep_originals else "dropped"
        after = hashes_of(twin)
        entry = journal.add(replace(entry, before=before, after=after, originals=originals))
        write_journal(twin, journal)
    return entry


def undo_folder(folder: str | Path) -> Report:
    """Takes the last operation on a folder back: every file has the bytes it had.

    Raises:
        SurgeryError: there is none, its originals were dropped, or a file is not what the operation
            left, or not what was kept (all of them named). The folder is untouched then.
    """
    return _tried_again(lambda: _turn(Path(folder), UNDONE))


def redo_folder(folder: str | Path) -> Report:
    """Does the operation on a folder again that was undone last: every file has the bytes it got.

    Raises:
        SurgeryError: as `undo_folder`.
    """
    return _tried_again(lambda: _turn(Path(folder), AGAIN))


def _tried_again(change: Callable[[], T]) -> T:
    """A change, tried again as long as it has not happened: a second one would be another."""
    return tried_again(change, never=(NotFlushedError,))


def _turn(folder: Path, event: str) -> Report:
    with _twin(folder) as (twin, journal):
        entry = _last(folder, journal, event)
        now, goal = (entry.after, entry.before) if event == UNDONE else (entry.before, entry.after)
        for name in now:
            if now[name] != goal.get(name):
                _put_by(twin, name, now[name])
        for name in goal:
            if now.get(name) != goal[name]:
                kept = twin / OPERATIONS / goal[name]
                if not kept.is_file():
                    raise SurgeryError(
                        f"{folder}/{OPERATIONS} no longer holds {name} as it was, {goal[name]}",
                        "restore it from a copy",
                    )
                link_or_copy(kept, twin / name)
        _check_changes(
            twin, folder, goal, f"{OPERATIONS} should hold what '{entry.operation}' put by"
        )
        journal.turn(event)
        write_journal(twin, journal)
    rows = [
        {"file": n, "before": now.get(n, "-")[:SHOWN], "after": goal.get(n, "-")[:SHOWN]}
        for n in sorted({*now, *goal})
    ]
    changed = sum(row["before"] != row["after"] for row in rows)
    as_it_was = "as_before_the_operation" if event == UNDONE else "as_after_the_operation"
    summary = {"folder": str(folder), "files_changed": changed, as_it_was: len(goal)}
    return Report(f"{event}: {entry.operation} (sha256 of each file)", rows, summary)


def _last(folder: Path, journal: FolderJournal, event: str) -> Entry:
    entries = journal.done if event == UNDONE else journal.undone
    if entries:
        return entries[-1]
    word = "undo" if event == UNDONE else "redo"
    settled = journal.settled if event == UNDONE else journal.lapsed
    last = f"; '{settled[-1].operation}' cannot be taken back" if settled else ""
    raise SurgeryError(
        f"{folder} has no operation to {word}{last}", f"surgery log {folder} lists what was done"
    )


@contextmanager
def _twin(folder: Path) -> Iterator[tuple[Path, FolderJournal]]:
    """A copy of a folder made of links, to be changed; at the end it takes the folder's place.

    Nothing may be written into its files: they are the folder's. They are replaced.
    """
    _check_place(folder)
    folder = folder.resolve()
    with file_lock(folder / LOCK if (folder / RUN).is_file() else folder):
        remove_temporaries(folder.parent, of=folder.name)
        journal = read_journal(folder)
        _check_links(folder)
        since = journal.lines[-1]["when"] if journal.lines else ""
        _check_changes(folder, folder, journal.files, f"it should be as it was left at {since}")
        twin = temporary_beside(folder)
        try:
            shutil.copytree(folder, twin, copy_function=_link)
            yield twin, journal
            _flush_all(twin)
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
            f"{folder} holds links to files elsewhere ({', '.join(sorted(links)[:4])}), so it "
            "cannot be operated on in place",
            "out=FOLDER writes a new one",
        )


def _check_changes(place: Path, folder: Path, wanted: dict[str, str], because: str) -> None:
    """Raises `SurgeryError` if files are not what they should be, and name them."""
    there = hashes_of(place)
    wrong = [
        f"{name} has the sha256 {there[name][:SHOWN]} instead of {digest[:SHOWN]}"
        if name in there
        else f"{name} is missing"
        for name, digest in wanted.items()
        if there.get(name) != digest
    ]
    if wrong:
        raise SurgeryError(
            f"{folder} was changed by other hands: {'; '.join(wrong[:8])} ({because})",
            "restore it from a copy, or leave it alone and write elsewhere",
        )


def _put_by(twin: Path, name: str, digest: str) -> None:
    """Moves a file of the twin into its operations, under its hash."""
    (twin / OPERATIONS).mkdir(exist_ok=True)
    (twin / name).replace(twin / OPERATIONS / digest)


def _flush_all(folder: Path) -> None:
    """Flushes the twin's own files to the disk; what is linked lies there already."""
    for path in [*folder.rglob("*"), folder]:
        if path.is_dir() or path.stat().st_nlink == 1:
            flush(path)


def _link(source: str, goal: str) -> None:
    link_or_copy(Path(source), Path(goal))
