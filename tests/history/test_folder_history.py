"""The history of a folder: one step each way, to the byte; refusals where other hands wrote."""

import fcntl
import json
import os
import re
import resource
import subprocess
import sys

import pytest
import torch
from helpers.adapters import adapted
from helpers.merged_folders import bytes_of, logits, model_and_adapter, save_adapter_for, tied
from helpers.models import CONFIGS, random_ids, tiny_model, train_a_little
from safetensors.torch import load_file, save_file

from nanogpt_surgery import (
    SurgeryError,
    inject_lora,
    open_model,
    save_adapter,
    save_model,
)
from nanogpt_surgery.files.atomic import MANIFEST, damage
from nanogpt_surgery.files.writing import write_json
from nanogpt_surgery.formats.folders.merging import merge_adapter
from nanogpt_surgery.formats.folders.run_folder import checkpoint_folder
from nanogpt_surgery.history.folder_history import (
    folder_log,
    read_journal,
    redo_folder,
    undo_folder,
)
from nanogpt_surgery.runs.checkpoints import open_run_folder


@pytest.fixture
def place(tmp_path):
    return model_and_adapter(tmp_path)


def test_merge_undo_and_redo_change_the_very_bytes(place):
    model, ids = place / "model", random_ids(CONFIGS["llama-scaled-tied"], 2, 9)
    first = bytes_of(model)
    with torch.no_grad():
        wanted = adapted(CONFIGS["llama-scaled-tied"], ["q_proj", "lm_head"])(ids)
    report = merge_adapter(model, place / "adapter")
    merged = bytes_of(model)
    assert {n for n in first if first[n] != merged[n]} == {
        "model.safetensors", "config.json", MANIFEST
    }  # fmt: skip
    assert report.summary["originals"] == "kept"
    assert report.summary["kl"] < 1e-9
    assert report.summary["top_token_unchanged"] == 1
    assert not tied(model), "the head got a weight of its own"
    assert damage(model) is None
    torch.testing.assert_close(logits(model), wanted, rtol=1e-4, atol=1e-5)
    undone = undo_folder(model)
    assert bytes_of(model) == first
    assert {r["file"] for r in undone.rows if r["before"] != r["after"]} == {
        "model.safetensors", "config.json", MANIFEST
    }  # fmt: skip
    assert all(merged[r["file"]].startswith(r["before"]) for r in undone.rows)
    assert all(first[r["file"]].startswith(r["after"]) for r in undone.rows)
    redo_folder(model)
    assert bytes_of(model) == merged


def test_two_merges_are_undone_in_order(place):
    model, states = place / "model", [bytes_of(place / "model")]
    merge_adapter(model, place / "adapter")
    states.append(bytes_of(model))
    second, _ = open_model(model)
    inject_lora(second, ["v_proj", "q_proj"], rank=2)
    train_a_little(second)
    save_adapter(second, place / "second")
    merge_adapter(model, place / "second")
    states.append(bytes_of(model))
    undo_folder(model)
    assert bytes_of(model) == states[1]
    undo_folder(model)
    assert bytes_of(model) == states[0]
    with pytest.raises(SurgeryError, match="model has no operation to undo"):
        undo_folder(model)
    redo_folder(model)
    redo_folder(model)
    assert bytes_of(model) == states[2]
    with pytest.raises(SurgeryError, match="model has no operation to redo"):
        redo_folder(model)
    log = folder_log(model)
    assert [row["state"] for row in log.rows] == ["done", "done"]
    bases = [entry.base for entry in read_journal(model).done]
    assert bases[0] != bases[1]


def test_a_new_operation_ends_what_could_be_redone(place):
    model = place / "model"
    merge_adapter(model, place / "adapter")
    undo_folder(model)
    merge_adapter(model, place / "adapter", dtype="float16", tolerance=1)
    with pytest.raises(SurgeryError, match="model has no operation to redo"):
        redo_folder(model)
    states = [row["state"] for row in folder_log(model).rows]
    assert states == ["undone, cannot be redone", "done"]
    undo_folder(model)
    kept = {p.name for p in (model / "operations").iterdir()}
    assert len(kept) == 1 + 3, "what only the first merge needed is gone"


def test_a_file_changed_by_other_hands_is_named_and_nothing_is_undone(place):
    model = place / "model"
    (model / MANIFEST).unlink()  # else opening finds it
    merge_adapter(model, place / "adapter")
    tensors = load_file(model / "model.safetensors")
    tensors["model.norm.weight"][0] += 1
    save_file(tensors, model / "model.safetensors")
    before = bytes_of(model)
    for operation in (lambda: undo_folder(model), lambda: merge_adapter(model, place / "a2")):
        save_adapter_for(model, place / "a2")
        with pytest.raises(SurgeryError, match=r"other hands: model\.safetensors has the sha256"):
            operation()
        assert bytes_of(model) == before
    (model / "config.json").unlink()
    with pytest.raises(SurgeryError, match=r"config\.json is missing"):
        undo_folder(model)


def test_a_kept_file_that_was_changed_is_not_put_back(place):
    model = place / "model"
    merge_adapter(model, place / "adapter")
    merged = bytes_of(model)
    kept = max((model / "operations").iterdir(), key=lambda path: path.stat().st_size)
    kept.write_bytes(kept.read_bytes()[:-1] + b"\0")
    with pytest.raises(SurgeryError, match=r"model\.safetensors has the sha256"):
        undo_folder(model)
    kept.unlink()
    with pytest.raises(SurgeryError, match=r"model\.safetensors is missing.*operations"):
        undo_folder(model)
    assert bytes_of(model) == merged


def test_dropped_originals_cannot_come_back(place):
    model = place / "model"
    report = merge_adapter(model, place / "adapter", keep_originals=False)
    assert report.summary["originals"] == "dropped"
    assert [path.name for path in (model / "operations").iterdir()] == ["journal.jsonl"]
    [row] = folder_log(model).rows
    assert row["state"] == "done, cannot be undone"
    with pytest.raises(SurgeryError, match=re.escape(f"'{row['operation']}'")):
        undo_folder(model)


@pytest.mark.parametrize("way", [[], ["renames"]])
def test_a_kill_at_any_call_leaves_the_old_state_or_the_new(tmp_path, way):
    program = [sys.executable, "-m", "helpers.killed_operations", tmp_path, *way]
    done = subprocess.run(program, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    for found in json.loads(done.stdout).values():
        assert found["old"] > 10
        assert found["new"] > 2
        assert found["aside"] == len(way), "between the first rename and the second"


def test_where_the_system_cannot_exchange_renames_do(place, monkeypatch):
    monkeypatch.setattr("nanogpt_surgery.files.writing._in_one_step", lambda *_: False)
    model, first = place / "model", bytes_of(place / "model")
    merge_adapter(model, place / "adapter")
    assert bytes_of(model) != first
    undo_folder(model)
    assert bytes_of(model) == first
    assert not list(place.glob(".tmp-*"))


def test_a_full_disk_loses_nothing(place):
    model, first = place / "model", bytes_of(place / "model")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        with pytest.raises(SurgeryError, match=r"could not write .*model.*untouched"):
            merge_adapter(model, place / "adapter")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert bytes_of(model) == first
    assert {path.name for path in place.iterdir()} == {"model", "adapter"}


def test_where_it_cannot_be_done_in_place_it_says_so(place, monkeypatch):
    model = place / "model"
    with pytest.raises(SurgeryError, match="out="):
        merge_adapter("owner/name", place / "adapter")
    monkeypatch.chdir(model)
    with pytest.raises(SurgeryError, match=re.escape(str(model))):
        merge_adapter(model, place / "adapter")
    monkeypatch.undo()
    (model / "link.md").symlink_to(place / "adapter" / "adapter_config.json")
    with pytest.raises(SurgeryError, match=r"links to files elsewhere \(link\.md\)"):
        merge_adapter(model, place / "adapter")
    (model / "link.md").unlink()
    descriptor = os.open(model, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    with pytest.raises(SurgeryError, match="another process"):
        merge_adapter(model, place / "adapter")
    os.close(descriptor)
    merge_adapter(model, place / "adapter")


def test_a_run_gives_the_merged_model_and_goes_on_only_after_the_undo(place):
    run, checkpoint = place / "run", checkpoint_folder(place / "run", 5)
    save_model(tiny_model(CONFIGS["llama-scaled-tied"]), checkpoint)
    write_json(run / "run.json", {"kind": "train"})
    (run / "metrics.jsonl").write_text("".join(f'{{"step": {i}}}\n' for i in range(1, 6)))
    for name in ("config.json", "model.safetensors"):
        (run / name).hardlink_to(checkpoint / name)
    first, plain = bytes_of(run), logits(run)
    merge_adapter(run, place / "adapter")
    assert not torch.equal(logits(run), plain)
    assert damage(checkpoint) is None
    with (
        pytest.raises(SurgeryError, match="undo_folder"),
        open_run_folder(run, {"kind": "train"}, resume=True),
    ):
        raise AssertionError("never begun")
    undo_folder(run)
    assert bytes_of(run) == first
    assert torch.equal(logits(run), plain)
    with open_run_folder(run, {"kind": "train"}, resume=True) as going:
        assert going.first_step == 5


def test_a_share_under_its_older_name_is_shown(place):
    merge_adapter(place / "model", place / "adapter")
    journal = next(place.rglob("journal.jsonl"))
    text = journal.read_text()
    assert "top_token_unchanged" in text
    shown = folder_log(place / "model").rows[0]["top token unchanged"]
    journal.write_text(text.replace("top_token_unchanged", "same_greedy"))
    assert folder_log(place / "model").rows[0]["top token unchanged"] == shown is not None


@pytest.mark.parametrize(
    "line",
    [
        "{",
        "[]",
        '{"event": "done"}',
        '{"event": "undone", "number": 1}',
        json.dumps(
            {
                **dict.fromkeys(("operation", "base", "originals", "when"), ""),
                "event": "done",
                "number": 1,
                "planned": {},
                "measured": {},
                "before": {},
                "after": {"../thesis": "0" * 64},
            }
        ),
    ],
)
def test_a_journal_that_cannot_be_read_is_named_with_its_line(place, line):
    model = place / "model"
    merge_adapter(model, place / "adapter")
    undo_folder(model)
    with (model / "operations" / "journal.jsonl").open("a") as file:
        file.write(line + "\n")
    with pytest.raises(SurgeryError, match=r"journal\.jsonl, line 3"):
        redo_folder(model)


def test_a_journal_is_split_at_line_ends_alone_and_one_in_latin_1_is_refused(place):
    adapter = place / "a\u2028b\x85c"
    (place / "adapter").rename(adapter)
    merge_adapter(place / "model", adapter)
    assert str(adapter) in folder_log(place / "model").rows[-1]["operation"]
    journal = place / "model" / "operations" / "journal.jsonl"
    journal.write_bytes("é".encode("latin-1") + journal.read_bytes())
    with pytest.raises(SurgeryError, match=r"journal\.jsonl is not UTF-8 at byte 0"):
        read_journal(place / "model")
