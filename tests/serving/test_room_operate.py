"""Operations on the model that is served: each undone as one, each refused whole."""

import asyncio
import json
import threading
from pathlib import Path

import pytest
from helpers.rooms import model_with, operated, page_of, posted

from nanogpt_surgery import open_model, tensor_hashes
from nanogpt_surgery.formats.peft.reading import load_adapter
from nanogpt_surgery.lora.several import adapter_weights
from nanogpt_surgery.serving.http import ApiError
from nanogpt_surgery.serving.server import MOST_WAITING


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


def test_one_click_is_one_line_of_the_journal_and_one_undo():
    model = model_with("one", "two")
    with page_of(model) as (client, _):
        operated(client, "blend", weights={"one": 0.5, "two": 2})
        hashes, weights, length = tensor_hashes(model), adapter_weights(model), 3
        for number, (operation, values) in enumerate(
            (
                ("ablate", {"layer": 1, "head": 2}),
                ("merge", {"name": "one"}),
                ("disable", {"name": "two"}),
                ("remove", {"name": "two"}),
            ),
            length + 1,
        ):
            operated(client, operation, **values)
            assert len(client.get("/api/state").json()["journal"]) == number
            posted(client, "/api/undo")
            assert (tensor_hashes(model), adapter_weights(model)) == (hashes, weights)
            posted(client, "/api/redo")
            assert adapter_weights(model) != weights
            posted(client, "/api/undo")


def test_a_head_is_taken_away_beside_the_adapters_that_take_part():
    model = model_with("one")
    with page_of(model) as (client, _):
        operated(client, "ablate", layer=0, head=3)
        operated(client, "ablate", layer=0, head=1)
        assert adapter_weights(model) == {"one": 1, "ablate-0-3": 1, "ablate-0-1": 1}
        rows = {row["path"]: row for row in client.get("/api/layers").json()["layers"]}
        assert rows["layers.0.self_attn"]["ablated"] == [1, 3]


def test_a_merge_that_fails_leaves_adapters_journal_and_what_can_be_redone():
    model = model_with("one")
    with page_of(model) as (client, _):
        operated(client, "inject", name="new", targets=["v_proj"])  # learned nothing: no merge
        operated(client, "enable", name="one")
        operated(client, "disable", name="new")
        posted(client, "/api/undo")
        before, weights = client.get("/api/state").json(), adapter_weights(model)
        operated(client, "merge", 400, name="new")
        after = client.get("/api/state").json()
        assert after["journal"] == before["journal"]
        assert after["can_redo"]
        assert adapter_weights(model) == weights


@pytest.mark.parametrize(
    ("operation", "values", "layers", "parameters"),
    [
        ("inject", {"targets": ["v_proj"], "rank": 2, "name": "n"}, 2, 2 * 2 * (24 + 8)),
        ("ablate", {"layer": 1, "head": 0}, 1, 4 * (24 + 24)),
        ("merge", {"name": "one"}, 4, None),
        ("remove", {"name": "one"}, 4, None),
        ("blend", {"weights": {"one": 1, "two": 1}}, 4, None),
    ],
)
def test_a_plan_says_what_the_operation_takes_and_touches_nothing(
    operation, values, layers, parameters
):
    model = model_with("one", "two")
    with page_of(model) as (client, _):
        before = client.get("/api/state").json()
        plan = posted(client, "/api/operate/plan", operation=operation, **values)["summary"]
        assert plan["layers"] == layers
        if operation == "merge":
            sizes = [model.get_submodule(f"layers.0.self_attn.{n}").weight for n in ("q_proj",) * 2]
            assert plan["memory_bytes"] == 2 * sum(size.nbytes for size in sizes)
        if parameters:
            assert plan.get("trainable_parameters", plan.get("parameters")) == parameters
            assert plan["memory_bytes"] == 4 * parameters
            count = sum(p.numel() for p in model.parameters())
            operated(client, operation, **values)
            assert sum(p.numel() for p in model.parameters()) == count + parameters
        else:
            assert client.get("/api/state").json() == before


def test_a_plan_of_what_is_not_there_is_refused(room):
    client, _ = room
    for values in (
        {"operation": "merge", "name": "absent"},
        {"operation": "ablate", "layer": 2, "head": 0},
        {"operation": "ablate", "layer": 0, "head": 2},
    ):
        posted(client, "/api/operate/plan", 400, **values)


def test_targets_are_names_of_layers_and_nothing_else(room):
    client, server = room
    for targets in (["--config"], ["q_proj", "-x"], ["(a+)+$"], "q_proj", [""], ["a" * 300], [5]):
        error = operated(client, "inject", 400, name="one", targets=targets)["error"]
        assert error["param"] == "targets"
    assert operated(client, "inject", 400, name=server.name)["error"]["param"] == "name"


def test_a_saved_model_keeps_what_lay_beside_the_weights(room, tmp_path):
    client, _ = room
    (tmp_path / "tiny" / "generation_config.json").write_text('{"temperature": 0.7}')
    operated(client, "inject", name="one", targets=["q_proj"])
    where = posted(client, "/api/save", what="adapter", name="kept", adapter="one")["path"]
    config = json.loads(Path(where, "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(tmp_path / "tiny")
    posted(client, "/api/undo")
    where = posted(client, "/api/save", what="model", name="whole")["path"]
    assert Path(where, "generation_config.json").is_file()


def test_half_of_a_character_is_refused(room):
    client, _ = room
    for path in ("/api/look", "/api/talk", "/api/train/preview", "/v1/completions"):
        headers = {"content-type": "application/json"}
        answer = client.post(path, content=b'{"text": "\\ud800", "kind": "text"}', headers=headers)
        assert answer.status_code == 400
        assert "surrogate" in answer.json()["error"]["message"]


def test_what_waits_for_the_engine_has_a_limit():
    with page_of(model_with("one")) as (_, server):

        async def ask() -> list[object]:
            held = threading.Event()
            first = server.engine.look(lambda _: held.wait(60))
            waiting = [asyncio.create_task(server.look(len_of)) for _ in range(MOST_WAITING + 3)]
            await asyncio.sleep(0)
            refused = [task for task in waiting if task.done()]
            held.set()
            first.result()
            return [len(refused), *await asyncio.gather(*waiting, return_exceptions=True)]

        count, *found = asyncio.run(ask())
        assert count == 3
        assert sum(isinstance(one, ApiError) and one.status == 429 for one in found) == 3
        assert found.count(2) == MOST_WAITING


def len_of(model):
    """How many layers it has."""
    return len(model.layers)


def test_an_adapter_has_the_folder_that_it_came_from_and_no_other(room, tmp_path):
    client, server = room

    def folders() -> dict[str, str | None]:
        return {row["name"]: row["folder"] for row in client.get("/api/state").json()["adapters"]}

    operated(client, "inject", name="one", targets=["q_proj"])
    assert folders() == {"one": None}
    posted(client, "/api/save", what="adapter", name="kept")  # the only one
    kept = str(tmp_path / "adapters" / "kept")
    assert server.folders == {"one": Path(kept)}
    posted(client, "/v1/load_lora_adapter", lora_name="two", lora_path="kept")
    assert folders()["two"] == kept
    posted(client, "/v1/unload_lora_adapter", lora_name="two")
    posted(client, "/api/undo")
    assert folders()["two"] == kept
    operated(client, "remove", name="two")
    operated(client, "inject", name="two", targets=["q_proj"])
    assert folders()["two"] is None and "two" not in server.folders
