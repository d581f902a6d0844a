"""Trainings of the page: `surgery finetune` in a process of its own."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers.rooms import folders_page, model_with, operated, posted, streamed

from nanogpt_surgery import (
    SurgeryError,
    generate,
    inject_lora,
    load_adapter,
    open_model,
    save_adapter,
    tensor_hashes,
)
from nanogpt_surgery.history.folder_history import FolderOperation, hashes_of, record
from nanogpt_surgery.lora.several import adapter_weights
from nanogpt_surgery.serving.room.runs import NewSteps, state_of_run
from nanogpt_surgery.serving.room.train import MOST_TOLD, Process, Trainer, take_adapter

TEXT = "the quick brown fox jumps over the lazy dog.\n" * 40


def test_without_a_folder_of_runs_nothing_is_written(tmp_path):
    with folders_page(tmp_path, runs_folder=None) as (client, _):
        now = client.get("/api/state").json()
        assert not now["can_save"] and not now["can_train"]
        posted(client, "/api/save", 403, what="model", name="whole")
        values = {"kind": "text", "content": TEXT, "name": "one"}
        posted(client, "/api/train/start", 403, **values)
        assert client.get("/api/runs").status_code == 403


def test_a_preview_marks_what_is_trained_on(room, tmp_path):
    client, _ = room
    talk = json.dumps({"prompt": "why?", "completion": "because."}) + "\n"
    found = posted(client, "/api/train/preview", kind="jsonl", content=talk * 5)
    assert found["count"] == 5 and len(found["examples"]) == 3
    trained = [piece["text"] for piece in found["examples"][0]["pieces"] if piece["answer"]]
    assert "because." in "".join(trained) and "why?" not in "".join(trained)
    found = posted(client, "/api/train/preview", kind="text", content=TEXT)
    assert found["tokens"] == len(TEXT)
    many = posted(client, "/api/train/preview", kind="text", content='[,"{\\' * 200_000)
    assert many["tokens"] == 1_000_000
    posted(client, "/api/train/preview", 400, kind="jsonl", content="{no json")
    posted(client, "/api/train/preview", 400, kind="text", path="../secret")
    posted(client, "/api/train/preview", 404, kind="text", path="absent.txt")
    assert not list((tmp_path / "runs").iterdir())


def until(client, happened, seconds=120):
    """The state, once something of it has happened."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if happened(now := client.get("/api/state").json()):
            return now
        time.sleep(0.1)
    raise AssertionError(now)


TRAINING = {
    "kind": "text",
    "content": TEXT,
    "name": "fox",
    "targets": ["q_proj", "v_proj"],
    "rank": 2,
    "max_steps": 100_000,
    "batch_size": 2,
    "block_size": 16,
    "evaluate_every": 20,
    "sample_prompt": "the ",
}


def test_a_training_answers_while_it_runs_is_paused_and_goes_on(room, tmp_path):
    client, server = room
    assert posted(client, "/api/train/start", **TRAINING) == {"run": "fox"}
    posted(client, "/api/train/start", 409, **TRAINING | {"name": "second"})
    now = until(client, lambda state: any(a["name"] == "fox" for a in state["adapters"]))
    assert now["training"]["state"] == "running" and now["training"]["max_steps"] == 100_000
    first = now["adapters"][0]["hash"]
    now = until(client, lambda state: state["adapters"][0]["hash"] != first)
    assert [row["title"] for row in now["journal"]] == ["load fox"]
    posted(client, "/api/train/pause")
    now = until(client, lambda state: state["training"]["state"] == "paused")
    found = client.get("/api/runs/fox").json()
    assert found["step"] > 0 and found["here"] and found["config"]["batch_size"] == 2
    told, _ = trainer_of(server).since(0)
    steps = sorted({row["step"] for row in told if "loss" in row})
    assert steps[0] <= 1 or len(told) == MOST_TOLD
    assert steps == list(range(steps[0], found["step"] + 1)), "none is left out"
    [sample, *_] = [s for row in told for s in row.get("samples", [])]
    assert sample["prompt"] == "the "
    assert len(sample["base_text"]) == 48
    check_that_it_answers_as_on_the_disk(client, tmp_path)
    posted(client, "/api/train/resume", name="fox")
    until(client, lambda state: state["training"]["step"] > found["step"])
    posted(client, "/api/train/stop")
    until(client, lambda state: state["training"]["state"] == "stopped")
    [row] = client.get("/api/runs").json()["runs"]
    assert row["state"] == "stopped" and row["step"] > found["step"]
    load_adapter(open_model(tmp_path / "tiny")[0], tmp_path / "runs" / "fox")


def check_that_it_answers_as_on_the_disk(client, folder):
    """The side of a run is the base with the newest checkpoint, though it was changed in place."""
    newest = sorted((folder / "runs" / "fox" / "checkpoints").iterdir())[-1]
    until(client, lambda state: state["training"]["checkpoint"] == newest.name)
    asked = {"prompt": "the ", "temperature": 0, "max_new_tokens": 12}
    events = streamed(client, "/api/talk", **asked, sides=[{"adapters": {"fox": 1}}])
    model, tokenizer = open_model(folder / "tiny")
    load_adapter(model, newest)
    alone = list(generate(model, tokenizer.encode("the "), 12, temperature=0))
    assert [event["id"] for event in events if "id" in event] == alone


def trainer_of(server):
    [room] = [one.__self__ for one in server.listeners]
    return room.trainer


def ended_process(status):
    process = subprocess.Popen([sys.executable, "-c", f"raise SystemExit({status})"])
    assert process.wait(60) == status
    return process


def test_what_is_late_to_tell_of_a_run_that_goes_on_again_says_how_it_is_now(room, tmp_path):
    trainer, run = trainer_of(room[1]), tmp_path / "runs" / "fox"
    paused = Process(run, ended_process(143), NewSteps(run), state="paused")
    trainer.current = Process(run, ended_process(143), NewSteps(run))
    trainer._tell(paused, samples=["late"])
    [row], _ = trainer.since(0)
    assert (row["state"], row["samples"]) == ("running", ["late"])


@pytest.mark.parametrize(
    ("status", "asked", "state"),
    [(0, None, "ended"), (0, "paused", "ended"), (143, "stopped", "stopped"), (1, None, "failed")],
)
def test_the_state_of_a_training_at_its_end(room, tmp_path, status, asked, state):
    run = tmp_path / "runs" / "fox"
    current = Process(run, ended_process(status), NewSteps(run), asked=asked)
    trainer_of(room[1])._end(current, ["said"])
    assert (current.state, current.error) == (state, "said" if state == "failed" else None)


def test_a_server_that_stops_ends_its_training_with_a_checkpoint(room, tmp_path):
    client, server = room
    posted(client, "/api/train/start", **TRAINING)
    until(client, lambda state: (state["training"] or {}).get("step", 0) > 0)
    server.stopping.set()
    assert trainer_of(server).current.process.wait(120) != 0
    assert list((tmp_path / "runs" / "fox" / "checkpoints").glob("step-*/training.safetensors"))


def test_a_plan_is_that_of_the_command_and_writes_nothing(room, tmp_path):
    client, _ = room
    found = posted(client, "/api/train/plan", **TRAINING | {"max_steps": 20})
    assert found["summary"]["memory_bytes"] > 0
    assert not list((tmp_path / "runs").iterdir())


def test_what_was_there_is_not_written_over(room, tmp_path):
    client, _server = room
    (tmp_path / "runs" / "fox.txt").write_text("somebody's")
    posted(client, "/api/train/start", **TRAINING | {"content": "x", "max_steps": 3})
    until(client, lambda state: state["training"]["state"] == "failed")
    assert (tmp_path / "runs" / "fox.txt").read_text() == "somebody's"
    assert not (tmp_path / "runs" / "fox-2.txt").exists(), "no run has come of it"
    assert client.get("/api/state").json()["training"]["error"]


def test_names_and_fields_are_checked_before_anything_begins(room, tmp_path):
    client, server = room
    operated(client, "inject", name="one", targets=["q_proj"])
    for status, values in (
        (409, {"name": "one"}),  # an adapter of that name answers already
        (409, {"name": "tiny"}),
        (400, {"name": "a.b"}),
        (400, {"name": "a/b"}),
        (400, {"name": "../a"}),
        (400, {"name": "--config"}),
        (400, {"name": None}),
        (400, {"kind": "binary"}),
        (400, {"content": None}),
        (400, {"targets": ["--cache-dir", "x"]}),
        (400, {"rank": 0}),
        (400, {"max_steps": 0}),
        (400, {"learning_rate": -1}),
        (400, {"batch_size": True}),
        (400, {"block_size": 0}),
        (400, {"evaluate_every": 0.5}),
        (400, {"sample_prompt": "é"}),
        (404, {"path": "absent.txt"}),
        (400, {"path": "/etc/passwd"}),
        (400, {"path": "a/../../b"}),
    ):
        posted(client, "/api/train/start", status, **TRAINING | values)
    assert server.stopping.is_set() is False
    assert client.get("/api/state").json()["training"] is None
    assert not list((tmp_path / "runs").iterdir())


def test_a_run_is_gone_on_with_only_as_this_server_would_begin_it(room, tmp_path):
    client, server = room
    run, base = tmp_path / "runs" / "old", server.source
    run.mkdir()
    for words in (
        None,
        ["train", "a.txt", "--out", str(run)],
        ["finetune", base, "a.txt"],
        ["finetune", base, "a.txt", "--out"],
        ["finetune", base, "a.txt", "--out", str(run), "--out", "/elsewhere"],
        ["finetune", base, "a.txt", "--out", str(run), "--out=/elsewhere"],
        ["finetune", base, "a.txt", "--out", str(run), "--config", "/etc/passwd"],
        ["finetune", base, "a.txt", "--out", str(run), "--cache-dir", "/elsewhere"],
        ["finetune", base, "a.txt", "--out", "/elsewhere"],
        ["finetune", "somebody/else", "a.txt", "--out", str(run)],
        ["finetune", base, 5, "--out", str(run)],
    ):
        typed = {"arguments": words, "folder": str(tmp_path)}
        (run / "run.json").write_text(json.dumps({"kind": "finetune", "typed": typed}))
        posted(client, "/api/train/resume", 400, name="old")
    assert client.get("/api/state").json()["training"] is None
    posted(client, "/api/train/pause", 404)


def test_a_run_of_a_terminal_is_watched_to_its_newest_whole_line(room, tmp_path):
    client, _ = room
    run = tmp_path / "runs" / "far"
    run.mkdir()
    (run / "run.json").write_text(json.dumps({"kind": "train", "settings": {"max_steps": 9000}}))
    lines = [
        {"step": i, "loss": 1 / (i + 1), "tokens": 50, "seconds": 0.5, "validation_loss": None}
        for i in range(5001)
    ]
    lines[7]["validation_loss"] = 0.25
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (run / "metrics.jsonl").write_text(text + '{"step": 5001, "lo')
    (run / "LOCK").write_text(str(os.getpid()))
    [row] = client.get("/api/runs").json()["runs"]
    assert (row["state"], row["step"], row["max_steps"]) == ("running", 5000, 9000)
    found = client.get("/api/runs/far").json()
    steps = [one["step"] for one in found["metrics"]]
    assert len(steps) < 2010
    assert steps[-1] == 5000
    assert {one["step"] for one in found["metrics"] if one["validation_loss"]} == {7}
    assert found["metrics"][-1]["tokens_per_second"] == 100
    assert client.get("/api/runs/absent").status_code == 404


def test_new_steps_are_told_once_also_where_a_run_goes_on(tmp_path):
    path = tmp_path / "metrics.jsonl"
    line = '{{"step": {}}}\n'.format
    path.write_text(line(0) + line(1))
    steps = NewSteps(tmp_path)
    assert steps.read() == []
    with path.open("a") as file:
        file.write(line(2) + '{"st')
        file.flush()
        assert steps.read() == [{"step": 2}]
        file.write('ep": 3}\n[]\nnothing\n')
        file.flush()
        assert steps.read() == [{"step": 3}]
    anew = tmp_path / "anew"
    anew.write_text("".join(map(line, range(5))))
    anew.replace(path)
    assert steps.read() == [{"step": 4}]
    assert NewSteps(tmp_path / "absent").read() == []


def test_an_adapter_of_another_form_is_not_written_over(tmp_path):
    model = model_with("one")
    save_adapter(model, tmp_path / "one")
    weights = adapter_weights(model)
    take_adapter(model, tmp_path / "one", "second")
    assert adapter_weights(model) == weights | {"second": None}
    inject_lora(model, ["v_proj"], name="third")
    before = tensor_hashes(model)
    with pytest.raises(SurgeryError, match="third"):
        take_adapter(model, tmp_path / "one", "third")
    assert tensor_hashes(model) == before


def test_a_checkpoint_never_overwrites_another_adapter_of_its_name(room, tmp_path):
    client, server = room
    run, trainer = tmp_path / "runs" / "style", Trainer(server)
    operated(client, "inject", name="style", rank=3)
    server.engine.operate(lambda model: save_adapter(model, run, name="style")).result()
    operated(client, "remove", name="style")

    def taken(current):
        before = client.get("/api/state").json()["adapters"]
        trainer.take_checkpoint(current, run)
        assert client.get("/api/state").json()["adapters"] == before
        return current.not_taken

    current = Process(run, None, NewSteps(run))
    trainer.take_checkpoint(current, run)
    assert current.not_taken is None and server.folders["style"] == run
    assert taken(current) is None, "the same once more"
    for _ in range(2):  # the load, and the removal of the one made by hand
        posted(client, "/api/undo")
    assert "style" in taken(current)
    operated(client, "remove", name="style")
    operated(client, "inject", name="style", rank=3)
    assert "style" in taken(Process(run, None, NewSteps(run)))


def test_a_run_that_has_signed_off_has_ended(tmp_path):
    run = tmp_path / "run"
    shutil.copytree(Path(__file__).parents[1] / "kept" / "806b6a1" / "trained", run)
    assert state_of_run(run) == "stopped", "it was killed at step 4 of 8"
    record(run, FolderOperation("train, 4 steps", "", {}, hashes_of(run), "none"))
    assert state_of_run(run) == "ended"
