import errno
import json
import os
import resource
import signal
import subprocess
import sys

import pytest
import torch

from nanogpt_surgery import SurgeryError
from nanogpt_surgery.files.atomic import (
    MANIFEST,
    check_undamaged,
    damage,
    file_hash,
    seal,
    write_folder,
)
from nanogpt_surgery.files.disk_errors import disk_refuses
from nanogpt_surgery.files.writing import (
    is_temporary,
    link_or_copy,
    read_json,
    remove_temporaries,
    replace_text,
    temporary_beside,
    write_json,
)
from nanogpt_surgery.formats.huggingface.safetensors_file import write_tensors


def written(goal, **files):
    def fill(folder):
        for name, text in (files or {"a.txt": "first", "b.txt": "second"}).items():
            (folder / name).write_text(text)

    write_folder(goal, fill)
    return goal


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_folder_appears_whole_with_its_manifest(tmp_path):
    goal = written(tmp_path / "deep" / "goal")
    assert names(goal) == [MANIFEST, "a.txt", "b.txt"]
    assert names(goal.parent) == ["goal"]
    manifest = json.loads((goal / MANIFEST).read_text())
    assert manifest["files"]["a.txt"] == {"size": 5, "sha256": file_hash(goal / "a.txt")}
    assert {"nanogpt-surgery", "torch"} <= manifest["versions"].keys()
    assert damage(goal) is None


def test_while_it_is_written_nobody_sees_it(tmp_path):
    def fill(folder):
        (folder / "a.txt").write_text("first")
        assert not (tmp_path / "goal").exists()
        return folder

    written_in = write_folder(tmp_path / "goal", fill)
    assert written_in.parent == tmp_path, "a rename must not cross file systems"


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("before", [False, True])
def test_an_error_in_the_block_leaves_nothing_behind(error, before, tmp_path):
    goal = tmp_path / "goal"
    if before:
        written(goal, **{"old.txt": "old"})

    def fill(folder):
        (folder / "a.txt").write_text("first")
        raise error

    with pytest.raises(error):
        write_folder(goal, fill)
    assert names(tmp_path) == (["goal"] if before else [])
    if before:
        assert (goal / "old.txt").read_text() == "old"
        assert damage(goal) is None


def test_a_folder_of_ours_is_replaced_whole(tmp_path):
    goal = written(tmp_path / "goal", **{"a.txt": "old"})
    written(goal, **{"a.txt": "new", "b.txt": "more"})
    assert names(goal) == [MANIFEST, "a.txt", "b.txt"]
    assert (goal / "a.txt").read_text() == "new"
    assert names(tmp_path) == ["goal"]
    assert damage(goal) is None


def test_nothing_in_a_folder_of_ours_is_lost(tmp_path):
    goal = written(tmp_path / "goal", **{"a.txt": "old"})
    (goal / "thesis.txt").write_text("years of work")
    with pytest.raises(SurgeryError, match=r"goal.*thesis\.txt"):
        written(goal, **{"a.txt": "new"})
    assert names(goal) == [MANIFEST, "a.txt", "thesis.txt"]
    assert (goal / "a.txt").read_text() == "old"
    assert names(tmp_path) == ["goal"]


def test_a_goal_below_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("a file")
    with pytest.raises(SurgeryError, match=r"file/goal.*Not a directory"):
        written(tmp_path / "file" / "goal")
    assert names(tmp_path) == ["file"]


def test_what_a_killed_process_left_is_removed_and_nothing_else(tmp_path):
    written(tmp_path / "goal")

    def fill(folder):
        (folder / "a.txt").write_text("first")
        left = tmp_path / f"{folder.name[:-1]}x"
        left.mkdir()
        (left / "a.txt").write_text("first")
        return left

    left = write_folder(tmp_path / "unfinished", fill)
    assert is_temporary(left)
    assert not is_temporary(tmp_path / "goal")
    remove_temporaries(tmp_path)
    assert names(tmp_path) == ["goal", "unfinished"]


def test_an_empty_folder_is_taken(tmp_path):
    (tmp_path / "goal").mkdir()
    assert damage(written(tmp_path / "goal")) is None


def test_a_foreign_folder_is_refused_before_anything_is_written(tmp_path):
    (tmp_path / "goal").mkdir()
    (tmp_path / "goal" / "thesis.txt").write_text("years of work")
    with pytest.raises(SurgeryError, match=r"goal.*not written by this program"):
        written(tmp_path / "goal")
    assert names(tmp_path) == ["goal"]
    assert names(tmp_path / "goal") == ["thesis.txt"]


def test_a_file_in_the_place_of_the_folder_is_refused(tmp_path):
    (tmp_path / "goal").write_text("a file")
    with pytest.raises(SurgeryError, match=r"goal.*not written by this program"):
        written(tmp_path / "goal")
    assert (tmp_path / "goal").read_text() == "a file"


def test_a_full_disk_is_named_and_the_old_folder_stays(tmp_path):
    goal = written(tmp_path / "goal", **{"old.txt": "old"})
    code = """
import resource, sys
from nanogpt_surgery.files.atomic import write_folder
# A write beyond the limit fails, as on a full disk.
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
write_folder(sys.argv[1], lambda folder: (folder / "big.bin").write_bytes(bytes(10_000)))
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(goal)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    message = done.stderr.splitlines()[-2]
    assert f"SurgeryError: could not write {goal}: File too large" in message
    assert "bytes free there" in message
    assert names(tmp_path) == ["goal"]
    assert damage(goal) is None


@pytest.mark.parametrize("name", ["a.txt", "b.txt"])
def test_damage_is_told_in_words(name, tmp_path):
    goal = written(tmp_path / "goal")
    path = goal / name
    data = bytearray(path.read_bytes())
    data[2] ^= 1
    path.write_bytes(data)
    assert damage(goal) == f"{name} has changed since it was written (its sha256 differs)"
    path.write_bytes(data[:-1])
    assert damage(goal) == f"{name} has {len(data) - 1} bytes instead of {len(data)}"
    path.unlink()
    assert damage(goal) == f"{name} is missing"


def test_a_manifest_that_is_missing_or_torn_is_damage(tmp_path):
    goal = written(tmp_path / "goal")
    whole = (goal / MANIFEST).read_text()
    for text in (whole[:-9], "", "[]", "{}", "null"):
        (goal / MANIFEST).write_text(text)
        assert damage(goal) == f"{MANIFEST} cannot be read"
    (goal / MANIFEST).unlink()
    assert damage(goal) == f"{MANIFEST} is missing"


def test_damage_is_refused_only_where_a_manifest_can_tell(tmp_path):
    goal = written(tmp_path / "goal")
    check_undamaged(goal)
    (goal / "a.txt").write_text("other")
    with pytest.raises(SurgeryError, match=r"goal.*a\.txt"):
        check_undamaged(goal)
    (goal / MANIFEST).unlink()
    check_undamaged(goal)


def test_file_hash_is_sha256(tmp_path):
    path = tmp_path / "abc"
    path.write_bytes(b"abc")
    expected = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert file_hash(path) == expected


def test_json_is_written_in_one_rename(tmp_path):
    path = tmp_path / "x.json"
    write_json(path, {"a": [1, "é"]})
    write_json(path, {"b": None})
    assert read_json(path) == {"b": None}
    assert names(tmp_path) == ["x.json"]


def test_text_is_replaced_in_one_rename(tmp_path):
    path = tmp_path / "LATEST"
    replace_text(path, "step-1")
    replace_text(path, "Schritt-2 ✓")
    assert path.read_text(encoding="utf-8") == "Schritt-2 ✓"
    assert names(tmp_path) == ["LATEST"]


def test_a_file_at_a_second_place_stays_when_the_first_goes(tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    first.write_text("contents")
    second.write_text("old")
    for _ in range(2):  # the second time both are one file, which a rename leaves alone
        link_or_copy(first, second)
    assert names(tmp_path) == ["first", "second"]
    first.unlink()
    assert second.read_text() == "contents"
    assert names(tmp_path) == ["second"]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b'{"a": 1,\n oops}', r"x\.json.*line 2 column 2"),
        (b"", r"x\.json.*line 1 column 1"),
        (b'{"a": "\xff"}', r"x\.json.*0xff in position 7"),
    ],
)
def test_json_that_cannot_be_read_says_where(data, message, tmp_path):
    path = tmp_path / "x.json"
    path.write_bytes(data)
    with pytest.raises(SurgeryError, match=message):
        read_json(path)


def test_json_that_is_missing_says_so(tmp_path):
    with pytest.raises(SurgeryError, match=r"x\.json is missing"):
        read_json(tmp_path / "x.json")


def test_other_folders_of_ours_are_sealed_without_the_folders_in_them(tmp_path):
    (tmp_path / "deeper").mkdir()
    (tmp_path / "a.txt").write_text("a")
    seal(tmp_path)
    assert list(json.loads((tmp_path / MANIFEST).read_text())["files"]) == ["a.txt"]


REFUSALS = {
    errno.ENOSPC: "bytes free there",
    errno.EDQUOT: "bytes free there",
    errno.EFBIG: "bytes free there",
    errno.EACCES: "no permission for {folder}",
    errno.EROFS: "{folder} is on a read-only file system",
    errno.ENOENT: "there is no folder {folder}/deep",
    errno.EIO: "tried 3 times",
    errno.EBUSY: "",
}


@pytest.mark.parametrize("number", REFUSALS, ids=errno.errorcode.get)
def test_a_refusal_says_what_it_was_and_speaks_of_space_only_where_it_was_that(number, tmp_path):
    told = disk_refuses(tmp_path / "deep" / "goal", OSError(number, os.strerror(number)), 12345)
    assert str(tmp_path / "deep" / "goal") in told.what
    assert os.strerror(number) in told.what
    assert REFUSALS[number].format(folder=tmp_path) in told.what
    of_space = number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    assert ("12,345" in told.what) == ("bytes free" in told.what) == of_space
    assert ("space" in told.hint) == (number == errno.ENOSPC)


def test_a_file_where_a_folder_should_be_and_the_reverse_are_named(tmp_path):
    (tmp_path / "file").write_text("a file")
    with pytest.raises(OSError, match="directory") as caught:
        (tmp_path / "file" / "goal").mkdir()
    told = disk_refuses(tmp_path / "file" / "goal", caught.value)
    assert f"{tmp_path / 'file'} is a file, not a folder" in told.what
    with pytest.raises(OSError, match="directory") as caught:
        tmp_path.write_text("text")
    assert f"{tmp_path} is a folder, not a file" in disk_refuses(tmp_path, caught.value).what


def test_a_name_that_is_too_long_is_counted_and_a_long_one_has_room(tmp_path):
    with pytest.raises(SurgeryError, match=r"\b300\b"):
        written(tmp_path / ("x" * 300))
    longest = written(tmp_path / ("é" * 127))
    assert names(tmp_path) == [longest.name]
    left = temporary_beside(longest)
    left.mkdir()
    remove_temporaries(tmp_path, of=longest.name)
    assert names(tmp_path) == [longest.name]


def test_a_full_disk_under_tensors_says_how_many_bytes_are_needed(tmp_path):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill(folder):
        (folder / "a.txt").write_text("ab")
        resource.setrlimit(resource.RLIMIT_FSIZE, (8192, before[1]))
        write_tensors({"weight": torch.zeros(10_000)}, folder / "x.safetensors")

    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        with pytest.raises(SurgeryError, match=r"File too large.*\b40,114 bytes"):
            write_folder(tmp_path / "goal", fill)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)
    assert names(tmp_path) == []
