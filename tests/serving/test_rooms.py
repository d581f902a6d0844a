"""The page's routes: the state that all pages share, operations, and a real training."""

import json
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
from helpers.commands import write_model
from starlette.testclient import TestClient

from nanogpt_surgery import open_model
from nanogpt_surgery.formats.peft.reading import load_adapter
from nanogpt_surgery.serving.engine import Engine
from nanogpt_surgery.serving.server import Server, make_app

TEXT = "the quick brown fox jumps over the lazy dog.\n" * 40


@contextmanager
def opened(folder: Path, **options):
    """A client of a server of a tiny model; adapters and runs below the folder."""
    write_model(folder / "tiny", block_size=64)
    model, tokenizer = open_model(folder / "tiny")
    for name in ("adapters", "runs"):
        (folder / name).mkdir()
    options = {
        "adapters_folder": folder / "adapters",
        "runs_folder": folder / "runs",
        "source": str(folder / "tiny"),
    } | options
    server = Server(Engine(model), model, tokenizer, "tiny", **options)
    client = TestClient(
        make_app(server), base_url="http://127.0.0.1", raise_server_exceptions=False
    )
    try:
        yield client, server
    finally:
        server.stopping.set()
        server.engine.close()


@pytest.fixture
def room(tmp_path):
    with opened(tmp_path) as found:
        yield found


def posted(client, path, status=200, /, **body):
    answer = client.post(path, json=body)
    assert answer.status_code == status, answer.text
    return answer.json()


def operated(client, operation, status=200, **values):
    return posted(client, "/api/operate", status, operation=operation, **values)


def test_all_operations_undone_give_the_first_hash(room):
    client, _ = room
    first = client.get("/api/state").json()
    assert first["model"]["layers"] == 2 and first["can_train"] and not first["can_undo"]
    plan = posted(client, "/api/operate/plan", operation="inject", targets=["q_proj"], rank=3)
    assert plan["summary"]["trainable_parameters"] == 2 * 3 * (16 + 16)
    operated(client, "inject", name="one", targets=["q_proj"], rank=3, alpha=6)
    operated(client, "ablate", layer=1, head=0)
    layers = {row["path"]: row for row in client.get("/api/layers").json()["layers"]}
    assert layers["layers.1.self_attn"]["ablated"] == [0]
    assert layers["layers.0.self_attn.q_proj"]["adapter"]["rank"] == 3
    assert layers["layers.1.self_attn.o_proj"]["adapter"]["relative"] > 0
    operated(client, "disable", name="one")
    operated(client, "blend", weights={"one": 0.5, "ablate-1-0": 1})
    operated(client, "merge", name="ablate-1-0")
    now = client.get("/api/state").json()
    assert now["after_operations"] and now["model"]["hash"] != first["model"]["hash"]
    assert now["journal"][-1]["hash_after"] != now["journal"][-1]["hash_before"]
    assert now["revision"] > first["revision"] and now["adapters"] == []
    while client.get("/api/state").json()["can_undo"]:
        posted(client, "/api/undo")
    last = client.get("/api/state").json()
    assert last["model"] == first["model"] and last["can_redo"]
    assert all(row["undone"] for row in last["journal"])
    assert last["journal"][0]["hash_before"] == last["model"]["hash"]
    posted(client, "/api/redo")
    assert [row["name"] for row in client.get("/api/state").json()["adapters"]] == ["one"]


def test_what_is_refused_leaves_the_model_as_it_was(room):
    client, _ = room
    before = client.get("/api/state").json()
    for values in (
        {"operation": "grow"},
        {"operation": "inject", "rank": 0},
        {"operation": "inject", "targets": ["nothing_proj"]},
        {"operation": "inject", "name": "<script>"},
        {"operation": "merge", "name": "absent"},
        {"operation": "ablate", "layer": 7, "head": 0},
        {"operation": "ablate", "layer": 0},
        {"operation": "blend", "weights": {"absent": 1}},
    ):
        error = posted(client, "/api/operate", 400, **values)["error"]
        assert error["message"] and error["type"] == "invalid_request_error"
    posted(client, "/api/undo", 400)
    after = client.get("/api/state").json()
    assert (after["model"], after["journal"]) == (before["model"], [])


def test_saved_is_only_what_is_asked_for_and_only_below_the_folders(room, tmp_path):
    client, _ = room
    operated(client, "inject", name="one", targets=["q_proj"])
    assert not list((tmp_path / "adapters").iterdir())
    where = posted(client, "/api/save", what="adapter", name="kept", adapter="one")["path"]
    assert Path(where) == tmp_path / "adapters" / "kept"
    model, _ = open_model(tmp_path / "tiny")
    load_adapter(model, where)
    posted(client, "/api/save", 409, what="adapter", name="kept", adapter="one")
    posted(client, "/api/save", 400, what="model", name="whole")  # it carries an adapter
    operated(client, "remove", name="one")
    where = posted(client, "/api/save", what="model", name="whole")["path"]
    assert open_model(where)[0].n_parameters
    for name in ("../out", "/etc/out", ".hidden", "a" * 10_000, "a\0b", ""):
        posted(client, "/api/save", 400, what="model", name=name)


def test_without_a_folder_of_runs_nothing_is_written(tmp_path):
    with opened(tmp_path, runs_folder=None) as (client, _):
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
    assert len(now["journal"]) == 1, "what it learns on the way is no operation"
    posted(client, "/api/train/pause")
    now = until(client, lambda state: state["training"]["state"] == "paused")
    found = client.get("/api/runs/fox").json()
    assert found["step"] > 0 and found["here"] and found["config"]["batch_size"] == 2
    told, _ = server_rows(server)
    assert {row["step"] for row in told} >= set(range(1, found["step"]))
    [sample, *_] = [s for row in told for s in row.get("samples", [])]
    assert sample["prompt"] == "the " and len(sample["base_text"]) == 48
    posted(client, "/api/train/resume", name="fox")
    until(client, lambda state: state["training"]["step"] > found["step"])
    posted(client, "/api/train/stop")
    until(client, lambda state: state["training"]["state"] == "stopped")
    [row] = client.get("/api/runs").json()["runs"]
    assert row["state"] == "stopped" and row["step"] > found["step"]
    load_adapter(open_model(tmp_path / "tiny")[0], tmp_path / "runs" / "fox")


def server_rows(server):
    [room] = [one.__self__ for one in server.listeners]
    return room.trainer.since(0)


def test_a_server_that_stops_ends_its_training_with_a_checkpoint(room, tmp_path):
    client, server = room
    posted(client, "/api/train/start", **TRAINING)
    until(client, lambda state: (state["training"] or {}).get("step", 0) > 0)
    [room_] = [one.__self__ for one in server.listeners]
    server.stopping.set()
    assert room_.trainer.current.process.wait(120) != 0
    assert list((tmp_path / "runs" / "fox" / "checkpoints").glob("step-*/training.safetensors"))


def test_a_training_that_fails_says_why(room):
    client, _ = room
    posted(client, "/api/train/start", **TRAINING | {"content": "x", "max_steps": 3})
    now = until(client, lambda state: state["training"]["state"] == "failed")
    assert now["training"]["error"]


def test_a_plan_is_that_of_the_command_and_writes_nothing(room, tmp_path):
    client, _ = room
    found = posted(client, "/api/train/plan", **TRAINING | {"max_steps": 20})
    assert found["summary"]["memory_bytes"] > 0
    assert not list((tmp_path / "runs").iterdir())


def test_events_begin_with_the_state_and_tell_of_changes(room):
    client, server = room
    with client.stream("GET", "/api/events") as stream:
        lines = stream.iter_lines()
        assert next(lines) == "event: state"
        assert json.loads(next(lines).removeprefix("data: "))["adapters"] == []
        operated(client, "inject", name="one", targets=["q_proj"])
        told = next(line for line in lines if line.startswith("data: "))
        assert [row["name"] for row in json.loads(told.removeprefix("data: "))["adapters"]] == [
            "one"
        ]
        server.stopping.set()
        assert not [line for line in lines if line.startswith("event")]
