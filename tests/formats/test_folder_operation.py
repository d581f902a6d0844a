"""Operations on a folder: in one step, taken back to the byte, refused where other hands wrote."""

import fcntl
import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from operated import adapted, train_updates
from safetensors.torch import load_file, save_file
from tiny import CONFIGS, random_ids, tiny_model

from nanogpt_surgery import (
    SurgeryError,
    SurgeryWarning,
    inject_lora,
    open_model,
    save_adapter,
    save_model,
)
from nanogpt_surgery.cli.app import run as surgery
from nanogpt_surgery.files import MANIFEST, damage, file_hash, seal, write_json
from nanogpt_surgery.formats.folder_journal import folder_log, read_journal
from nanogpt_surgery.formats.folder_operation import redo_folder, undo_folder
from nanogpt_surgery.formats.merging import merge_adapter, plan_merge
from nanogpt_surgery.formats.run_folder import checkpoint_folder
from nanogpt_surgery.lora.lora_layer import lora_layers
from nanogpt_surgery.training.checkpoint import start_run


def bytes_of(folder):
    """The sha256 of every file of a folder, wherever it lies, but for what operations keep."""
    files = [p for p in sorted(folder.rglob("*")) if p.is_file() and p.name != "LOCK"]
    return {str(p.relative_to(folder)): file_hash(p) for p in files if "operations" not in p.parts}


def tied(folder):
    return json.loads((folder / "config.json").read_text())["tie_word_embeddings"]


@pytest.fixture
def place(tmp_path):
    """A sealed model folder, and an adapter on its q_proj and lm_head."""
    model = adapted(CONFIGS["llama-scaled-tied"], ["q_proj", "lm_head"])
    save_adapter(model, tmp_path / "adapter")
    save_model(tiny_model(CONFIGS["llama-scaled-tied"]), tmp_path / "model")
    (tmp_path / "model" / "README.md").write_text("mine")
    return tmp_path


def logits(folder, config=CONFIGS["llama-scaled-tied"]):
    with torch.no_grad():
        return open_model(folder)[0](random_ids(config, 2, 9))


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
    assert report.summary["same_greedy"] == 1
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
    train_updates(second)
    save_adapter(second, place / "second")
    merge_adapter(model, place / "second")
    states.append(bytes_of(model))
    undo_folder(model)
    assert bytes_of(model) == states[1]
    undo_folder(model)
    assert bytes_of(model) == states[0]
    with pytest.raises(SurgeryError, match="no operation to undo"):
        undo_folder(model)
    redo_folder(model)
    redo_folder(model)
    assert bytes_of(model) == states[2]
    with pytest.raises(SurgeryError, match="no operation to redo"):
        redo_folder(model)
    log = folder_log(model)
    assert [row["state"] for row in log.rows] == ["done", "done"]
    bases = [entry.base for entry in read_journal(model).done]
    assert bases[0] != bases[1]


def test_an_adapter_for_another_base_takes_force(place):
    merge_adapter(place / "model", place / "adapter")
    with pytest.raises(SurgeryError, match="another"):
        merge_adapter(place / "model", place / "adapter")
    with pytest.warns(SurgeryWarning):
        merge_adapter(place / "model", place / "adapter", force=True)


def test_a_new_operation_ends_what_could_be_redone(place):
    model = place / "model"
    merge_adapter(model, place / "adapter")
    undo_folder(model)
    merge_adapter(model, place / "adapter", dtype="float16", tolerance=1)
    with pytest.raises(SurgeryError, match="no operation to redo"):
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


def save_adapter_for(folder, goal):
    model, _ = open_model(folder)
    inject_lora(model, "q_proj", rank=2)
    train_updates(model)
    save_adapter(model, goal)


def test_a_kept_file_that_was_changed_is_not_put_back(place):
    model = place / "model"
    merge_adapter(model, place / "adapter")
    merged = bytes_of(model)
    kept = max((model / "operations").iterdir(), key=lambda path: path.stat().st_size)
    kept.write_bytes(kept.read_bytes()[:-1] + b"\0")
    with pytest.raises(SurgeryError, match=r"model\.safetensors has the sha256"):
        undo_folder(model)
    kept.unlink()
    with pytest.raises(SurgeryError, match=r"no longer holds model\.safetensors"):
        undo_folder(model)
    assert bytes_of(model) == merged


def test_dropped_originals_cannot_come_back(place):
    model = place / "model"
    report = merge_adapter(model, place / "adapter", keep_originals=False)
    assert report.summary["originals"] == "dropped"
    assert [path.name for path in (model / "operations").iterdir()] == ["journal.jsonl"]
    with pytest.raises(SurgeryError, match="cannot be taken back"):
        undo_folder(model)
    assert folder_log(model).rows[0]["state"] == "done, cannot be undone"


def test_a_kill_at_any_call_leaves_the_old_state_or_the_new(tmp_path):
    program = [sys.executable, Path(__file__).with_name("killed.py"), tmp_path]
    done = subprocess.run(program, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    for found in json.loads(done.stdout).values():
        assert found["old"] > 10
        assert found["new"] > 2


def test_where_the_system_cannot_exchange_renames_do(place, monkeypatch):
    monkeypatch.setattr("nanogpt_surgery.exchange._in_one_step", lambda *_: False)
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


def test_a_run_gives_the_merged_model_and_goes_on_only_after_the_undo(place):
    run, checkpoint = place / "run", checkpoint_folder(place / "run", 5)
    save_model(tiny_model(CONFIGS["llama-scaled-tied"]), checkpoint)
    write_json(run / "run.json", {"kind": "train"})
    for name in ("config.json", "model.safetensors"):
        (run / name).hardlink_to(checkpoint / name)
    first, plain = bytes_of(run), logits(run)
    merge_adapter(run, place / "adapter")
    assert not torch.equal(logits(run), plain)
    assert damage(checkpoint) is None
    with (
        pytest.raises(SurgeryError, match="surgery undo"),
        start_run(run, {"kind": "train"}, resume=True),
    ):
        raise AssertionError("never begun")
    undo_folder(run)
    assert bytes_of(run) == first
    assert torch.equal(logits(run), plain)
    with start_run(run, {"kind": "train"}, resume=True) as going:
        assert going.first_step == 5


def test_the_files_of_a_foreign_folder_stay_but_for_the_weights(place):
    """Shards become one file, and come back; a config keeps what it says."""
    model = place / "model"
    tensors = load_file(model / "model.safetensors")
    names = sorted(tensors)
    index = {"weight_map": {}}
    for number, part in enumerate((names[::2], names[1::2])):
        file = f"model-0000{number + 1}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, model / file)
        index["weight_map"] |= dict.fromkeys(part, file)
    (model / "model.safetensors").unlink()
    (model / MANIFEST).unlink()
    write_json(model / "model.safetensors.index.json", index)
    config = json.loads((model / "config.json").read_text())
    config |= {"transformers_version": "4.1", "torch_dtype": config.pop("dtype")}
    write_json(model / "config.json", config)
    first = bytes_of(model)
    merge_adapter(model, place / "adapter", dtype="bfloat16", force=True)
    assert {n for n in bytes_of(model) if "safetensors" in n} == {"model.safetensors"}
    now = json.loads((model / "config.json").read_text())
    assert now == config | {"tie_word_embeddings": False, "torch_dtype": "bfloat16"}
    assert not (model / MANIFEST).exists()
    undo_folder(model)
    assert bytes_of(model) == first


def test_the_precision_is_chosen_and_its_loss_is_told(place):
    model = place / "model"
    whole = merge_adapter(model, place / "adapter", place / "whole")
    half = merge_adapter(model, place / "adapter", place / "half", dtype="bfloat16", tolerance=1)
    assert {t.dtype for t in load_file(place / "half" / "model.safetensors").values()} == {
        torch.bfloat16
    }
    assert half.summary["kl"] > 1000 * whole.summary["kl"]
    assert all(row["largest error"] > 0 and row["energy left"] < 1 for row in half.rows)
    exact = adapted(CONFIGS["llama-scaled-tied"], ["q_proj", "lm_head"])
    layer = lora_layers(exact)["lm_head"]
    wanted = (layer.original_layer.weight + layer.delta_weight()).bfloat16()
    assert torch.equal(open_model(place / "half")[0].lm_head.weight, wanted), "rounded once"
    first = bytes_of(model)
    with pytest.raises(SurgeryError, match="nats"):
        merge_adapter(model, place / "adapter", dtype="bfloat16", tolerance=1e-9)
    assert bytes_of(model) == first
    assert folder_log(place / "half").rows[0]["state"] == "done, cannot be undone"


def test_a_plan_says_what_survives_and_writes_nothing(place):
    first = bytes_of(place)
    plan = plan_merge(place / "model", place / "adapter", dtype="float16")
    assert bytes_of(place) == first
    assert not (place / "model" / "operations").exists()
    assert {"bfloat16", "float16", "int8", "int4"} <= plan.rows[0].keys()
    merge_adapter(place / "model", place / "adapter", dtype="float16", tolerance=1)
    header = 4096
    size = (place / "model" / "model.safetensors").stat().st_size
    assert abs(size - header - plan.summary["model_bytes"]) < header
    kept = folder_log(place / "model").summary["kept_bytes"]
    assert abs(kept - plan.summary["kept_originals_bytes"]) < header


def test_where_it_cannot_be_done_in_place_it_says_so(place, monkeypatch):
    model = place / "model"
    with pytest.raises(SurgeryError, match="--out"):
        merge_adapter("owner/name", place / "adapter")
    monkeypatch.chdir(model)
    with pytest.raises(SurgeryError, match="you stand in"):
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


def test_other_folders_of_ours_are_sealed_without_the_folders_in_them(tmp_path):
    (tmp_path / "deeper").mkdir()
    (tmp_path / "a.txt").write_text("a")
    seal(tmp_path)
    assert list(json.loads((tmp_path / MANIFEST).read_text())["files"]) == ["a.txt"]


def test_from_the_command_line(place, capsys):
    model, first = str(place / "model"), bytes_of(place / "model")
    (place / "probe.txt").write_text("text")
    surgery(["merge", model, str(place / "adapter"), "--plan", "--json"])
    assert "lowest_int4" in json.loads(capsys.readouterr().out)
    with pytest.raises(SystemExit):
        surgery(["merge", model, str(place / "adapter"), "--probe", str(place / "probe.txt")])
    assert "no tokenizer" in capsys.readouterr().err
    surgery(["merge", model, str(place / "adapter"), "--json"])
    assert json.loads(capsys.readouterr().out)["measured_on"] == "76 random tokens"
    surgery(["undo", model])
    assert bytes_of(place / "model") == first
    surgery(["redo", model, "--json"])
    surgery(["undo", model])
    capsys.readouterr()
    surgery(["log", model])
    out = capsys.readouterr().out
    assert "can redo: merge" in out
    with pytest.raises(SystemExit):
        surgery(["undo", model])
    assert "no operation to undo" in capsys.readouterr().err
    surgery(["merge", model, str(place / "adapter"), "--drop-originals"])
    assert "cannot be undone" in capsys.readouterr().err


@pytest.mark.parametrize("out", ["model", "other/../model", "link"])
def test_merging_over_the_model_itself_is_refused_since_it_has_no_undo(place, out):
    (place / "other").mkdir()
    (place / "link").symlink_to(place / "model")
    before = bytes_of(place / "model")
    for merging in (plan_merge, merge_adapter):
        with pytest.raises(SurgeryError, match=r"(?s)the model itself.*leave out --out"):
            merging(place / "model", place / "adapter", place / out)
    assert bytes_of(place / "model") == before


def test_a_journal_is_split_at_line_ends_alone_and_one_in_latin_1_is_refused(place):
    adapter = place / "a\u2028b\x85c"
    (place / "adapter").rename(adapter)
    merge_adapter(place / "model", adapter)
    assert str(adapter) in folder_log(place / "model").rows[-1]["operation"]
    journal = place / "model" / "operations" / "journal.jsonl"
    journal.write_bytes("é".encode("latin-1") + journal.read_bytes())
    with pytest.raises(SurgeryError, match=r"journal\.jsonl is not UTF-8 at byte 0"):
        read_journal(place / "model")
