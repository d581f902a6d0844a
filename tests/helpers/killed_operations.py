"""Run as a program: kill an operation on a folder before every call that changes a directory.

Prints, for each operation, how often the folder was found in its old state, in its new one, and set
aside in its old one, as the error then says; anything else ends the program. With "renames" the two
folders change places by three of them. It loads no torch, so that forking is cheap and safe.
"""

import itertools
import json
import os
import shutil
import sys
from pathlib import Path

from nanogpt_surgery.errors import SurgeryError
from nanogpt_surgery.files import writing
from nanogpt_surgery.files.atomic import damage, seal
from nanogpt_surgery.history.folder_history import (
    FolderOperation,
    hashes_of,
    operate,
    read_journal,
    redo_folder,
    undo_folder,
)

KILLED = 9
EVENTS = {"os.rename", "os.link", "os.remove", "os.mkdir", "os.rmdir", "ctypes.dlsym"}


def write(new: Path) -> FolderOperation:
    (new / "model.safetensors").write_bytes(b"merged")
    (new / "config.json").write_text('{"untied": true}')
    return FolderOperation("merge", "base")


def prepare(folder: Path, steps: list) -> None:
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"original")
    (folder / "config.json").write_text("{}")
    (folder / "tokenizer.json").write_text("{}")
    (folder / "deeper").mkdir()
    (folder / "deeper" / "notes.md").write_text("years of work")
    seal(folder)
    for step in steps:
        step(folder)


def merge(folder: Path) -> None:
    operate(folder, write)


def status_when_killed_at(call: int, action) -> int:
    pid = os.fork()
    if pid:
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    calls = itertools.count()

    def kill(event: str, _: tuple) -> None:
        if event in EVENTS and next(calls) == call:
            os._exit(KILLED)

    sys.addaudithook(kill)
    action()
    os._exit(0)


def brought_back(folder: Path) -> bool:
    """Whether a kill left the folder under another name; it has its own again."""
    if folder.exists():
        return False
    try:
        undo_folder(folder)
    except SurgeryError as error:
        _, aside, goal = error.hint.split()
    Path(aside).rename(goal)
    return True


def state(folder: Path) -> tuple:
    assert damage(folder) is None, damage(folder)
    assert (folder / "deeper" / "notes.md").read_text() == "years of work"
    return hashes_of(folder), len(read_journal(folder).lines)


def kill_everywhere(place: Path, steps: list, action) -> dict:
    start = place / "start"
    prepare(start, steps)
    goal = place / "goal"
    shutil.copytree(start, goal)
    old = state(goal)
    action(goal)
    new = state(goal)
    found = {"old": 0, "new": 0, "aside": 0}
    for call in itertools.count():
        here = place / "here"
        shutil.copytree(start, here)
        status = status_when_killed_at(call, lambda: action(here))  # noqa: B023
        if status == 0:
            break
        assert status == KILLED, status
        was_aside = brought_back(here)
        now = state(here)
        assert now in (old, new), f"half a state at call {call}"
        found["aside" if was_aside else "old" if now == old else "new"] += 1
        following = action if now == old else redo_folder if action is undo_folder else undo_folder
        following(here)
        assert not list(place.glob(".tmp-*")), "what was left behind is removed"
        for old_state in writing.set_aside(here):  # the kill came when the new one was there
            assert now == new
            shutil.rmtree(old_state)
        shutil.rmtree(here)
    return found


if __name__ == "__main__":
    os.fsync = lambda _: None  # a kill leaves what the system holds; this is not a power cut
    if sys.argv[2:] == ["renames"]:
        writing._in_one_step = lambda *_: False
    results = {}
    for name, (steps, action) in {
        "merge": ([merge], merge),
        "undo": ([merge], undo_folder),
        "redo": ([merge, undo_folder], redo_folder),
    }.items():
        place = Path(sys.argv[1]) / name
        place.mkdir()
        results[name] = kill_everywhere(place, steps, action)
    print(json.dumps(results))
