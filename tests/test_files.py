import json
import subprocess
import sys

import pytest

from nanogpt_surgery import SurgeryError
from nanogpt_surgery.atomic import whole_folder
from nanogpt_surgery.files import (
    MANIFEST,
    damage,
    file_hash,
    is_temporary,
    link_or_copy,
    read_json,
    refuse_damage,
    remove_temporaries,
    replace_text,
    seal,
    write_json,
)


def written(goal, **files):
    with whole_folder(goal) as folder:
        for name, text in (files or {"a.txt": "first", "b.txt": "second"}).items():
            (folder / name).write_text(text)
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
    with whole_folder(tmp_path / "goal") as folder:
        (folder / "a.txt").write_text("first")
        assert not (tmp_path / "goal").exists()
        assert folder.parent == tmp_path, "a rename must not cross file systems"


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("before", [False, True])
def test_an_error_in_the_block_leaves_nothing_behind(error, before, tmp_path):
    goal = tmp_path / "goal"
    if before:
        written(goal, **{"old.txt": "old"})
    with pytest.raises(error), whole_folder(goal) as folder:
        (folder / "a.txt").write_text("first")
        raise error
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
    with pytest.raises(SurgeryError, match=r"holds thesis\.txt, which replacing it would lose"):
        written(goal, **{"a.txt": "new"})
    assert names(goal) == [MANIFEST, "a.txt", "thesis.txt"]
    assert (goal / "a.txt").read_text() == "old"
    assert names(tmp_path) == ["goal"]


def test_a_goal_below_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("a file")
    with pytest.raises(SurgeryError, match=r"could not write .*goal: Not a directory"):
        written(tmp_path / "file" / "goal")
    assert names(tmp_path) == ["file"]


def test_what_a_killed_process_left_is_removed_and_nothing_else(tmp_path):
    written(tmp_path / "goal")
    with whole_folder(tmp_path / "unfinished") as folder:
        (folder / "a.txt").write_text("first")
        left = tmp_path / f"{folder.name[:-1]}x"
        left.mkdir()
        (left / "a.txt").write_text("first")
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
    with pytest.raises(SurgeryError, match="was not written by this program"):
        written(tmp_path / "goal")
    assert names(tmp_path) == ["goal"]
    assert names(tmp_path / "goal") == ["thesis.txt"]


def test_a_file_in_the_place_of_the_folder_is_refused(tmp_path):
    (tmp_path / "goal").write_text("a file")
    with pytest.raises(SurgeryError, match="was not written by this program"):
        written(tmp_path / "goal")
    assert (tmp_path / "goal").read_text() == "a file"


def test_a_full_disk_is_named_and_the_old_folder_stays(tmp_path):
    goal = written(tmp_path / "goal", **{"old.txt": "old"})
    code = """
import resource, sys
from nanogpt_surgery.atomic import whole_folder
# A write beyond the limit fails, as on a full disk.
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
with whole_folder(sys.argv[1]) as folder:
    (folder / "big.bin").write_bytes(bytes(10_000))
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
    refuse_damage(goal)
    (goal / "a.txt").write_text("other")
    with pytest.raises(SurgeryError, match=r"goal is damaged: a\.txt has changed"):
        refuse_damage(goal)
    (goal / MANIFEST).unlink()
    refuse_damage(goal)


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
    link_or_copy(first, second)
    first.unlink()
    assert second.read_text() == "contents"
    assert names(tmp_path) == ["second"]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b'{"a": 1,\n oops}', r"x\.json is not JSON: .* at line 2, column 2"),
        (b"", r"x\.json is not JSON: .* at line 1, column 1"),
        (b'{"a": "\xff"}', r"x\.json is not UTF-8 at byte 7"),
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
