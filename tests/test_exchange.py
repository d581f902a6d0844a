import itertools
import os
from pathlib import Path

import pytest

from nanogpt_surgery import SurgeryError
from nanogpt_surgery.files.atomic import write_file, write_folder
from nanogpt_surgery.files.disk_errors import disk_refuses
from nanogpt_surgery.files.writing import SetAsideError, exchange, remove_temporaries, set_aside
from nanogpt_surgery.history.folder_history import FolderOperation, operate, undo_folder

IN_ONE_STEP = "nanogpt_surgery.files.writing._in_one_step"


@pytest.fixture
def pair(tmp_path):
    for name in ("new", "old"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "what").write_text(name)
    return tmp_path / "new", tmp_path / "old"


def contents(pair):
    return [(path / "what").read_text() for path in pair]


@pytest.mark.parametrize("by_renames", [False, True])
def test_two_folders_change_places(pair, by_renames, monkeypatch):
    if by_renames:
        monkeypatch.setattr(IN_ONE_STEP, lambda *_: False)
    exchange(*pair)
    assert contents(pair) == ["old", "new"]
    assert len(list(pair[0].parent.iterdir())) == 2


def test_in_one_step_where_this_system_can(pair, monkeypatch):
    monkeypatch.setattr(Path, "rename", None)  # not one of ours is needed
    exchange(*pair)
    assert contents(pair) == ["old", "new"]


@pytest.mark.parametrize("failing", [0, 1, 2])
def test_a_refused_rename_leaves_both_where_they_were(pair, failing, monkeypatch):
    monkeypatch.setattr(IN_ONE_STEP, lambda *_: False)
    renames, rename = [], Path.rename

    def refusing(path, goal):
        renames.append(path)
        if len(renames) == failing + 1:
            raise OSError(5, "injected")
        return rename(path, goal)

    monkeypatch.setattr(Path, "rename", refusing)
    with pytest.raises(OSError, match="injected"):
        exchange(*pair)
    assert contents(pair) == ["new", "old"]


def test_a_kill_between_two_renames_leaves_the_old_one_where_nobody_cleans_up(pair, monkeypatch):
    monkeypatch.setattr(IN_ONE_STEP, lambda *_: False)
    renames, rename = [], Path.rename

    def killed(path, goal):
        renames.append(path)
        if len(renames) == 2:
            raise KeyboardInterrupt
        return rename(path, goal)

    monkeypatch.setattr(Path, "rename", killed)
    with pytest.raises(KeyboardInterrupt):
        exchange(*pair)
    remove_temporaries(pair[1].parent, of="old")
    remove_temporaries(pair[1].parent)
    (aside,) = set_aside(pair[1])
    assert (aside / "what").read_text() == "old"
    with pytest.raises(SurgeryError, match=rf"a kill left it as {aside}[\s\S]*mv {aside}"):
        undo_folder(pair[1])


def test_what_the_system_says_is_told(pair):
    with pytest.raises(FileNotFoundError):
        exchange(pair[0] / "nowhere", pair[1])
    assert contents(pair) == ["new", "old"]


@pytest.mark.parametrize("failing", [{1, 2}, {2, 3}, {2, 4}])
def test_a_folder_that_cannot_be_put_back_is_named_with_where_it_lies(pair, failing, monkeypatch):
    """The second or third rename is refused, and so is one that would bring the old state back."""
    monkeypatch.setattr(IN_ONE_STEP, lambda *_: False)
    calls, rename = itertools.count(), Path.rename

    def refusing(path, goal):
        if next(calls) in failing:
            raise OSError(5, "injected")
        return rename(path, goal)

    monkeypatch.setattr(Path, "rename", refusing)
    with pytest.raises(SetAsideError, match="injected") as caught:
        exchange(*pair)
    monkeypatch.undo()
    (aside,) = set_aside(pair[1])
    assert caught.value.aside == aside
    assert (aside / "what").read_text() == "old"
    told = disk_refuses(pair[1], caught.value)
    assert f"untouched, at {aside}" in told.what
    assert told.hint.endswith(f"mv {aside} {pair[1]}")
    assert told.hint.startswith("mv") != pair[1].exists()


def rewrite_folder(goal):
    write_folder(goal, lambda folder: (folder / "what").write_text("newer"))


def rewrite_file(goal):
    write_file(goal / "what", lambda path: path.write_text("newer"), magic=b"")


def operate_on_folder(goal):
    def write(new):
        (new / "what").write_text("newer")
        return FolderOperation("write", "base")

    operate(goal, write)


@pytest.mark.parametrize("write", [rewrite_folder, rewrite_file, operate_on_folder])
def test_a_new_state_whose_name_cannot_be_flushed_is_there_and_that_is_said(
    write, tmp_path, monkeypatch
):
    goal = tmp_path / "goal"
    write_folder(goal, lambda folder: (folder / "what").write_text("old"))
    parent, fsync = (goal if write is rewrite_file else tmp_path).stat().st_ino, os.fsync

    def refusing(descriptor):
        if os.fstat(descriptor).st_ino == parent:
            raise OSError(5, "injected")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", refusing)
    with pytest.raises(SurgeryError, match=r"in its place, but .* injected"):
        write(goal)
    assert (goal / "what").read_text() == "newer"
    assert list(tmp_path.iterdir()) == [goal]
