"""The state that all pages share, and the events that tell of it."""

import asyncio
import json

from helpers.rooms import operated, posted

from nanogpt_surgery import tensor_hashes
from nanogpt_surgery.history.model_history import combined, history_of
from nanogpt_surgery.serving import server as server_module
from nanogpt_surgery.serving.engine import Request


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


def test_the_journal_says_what_is_in_force_and_its_hashes_join(room):
    client, _ = room
    base = client.get("/api/state").json()["model"]["hash"]
    operated(client, "inject", name="one", targets=["q_proj"])
    for rank in (2, 3):  # the second, of the same title, ends what could be redone
        operated(client, "inject", name="two", targets=["v_proj"], rank=rank)
        if rank == 2:
            posted(client, "/api/undo")
    operated(client, "blend", weights={"one": 1, "two": 2})
    posted(client, "/api/undo")
    state = client.get("/api/state").json()
    rows = state["journal"]
    assert [row["number"] for row in rows] == [1, 2, 3, 4]
    assert [row["undone"] for row in rows] == [False, True, False, True]
    assert rows[0]["hash_before"] == base
    assert rows[0]["hash_after"] == rows[1]["hash_before"] == rows[2]["hash_before"]
    assert rows[1]["hash_after"] != rows[2]["hash_after"]
    assert rows[2]["hash_after"] == rows[3]["hash_before"]
    assert (state["can_undo"], state["can_redo"]) == (True, True)


def test_what_is_told_of_a_change_is_already_so(room):
    client, server = room
    answers = []
    wanted = Request((1, 2), 3, adapters={"one": 1.0})
    server.listeners.append(lambda: answers.append(server.engine.submit(wanted)))
    operated(client, "inject", name="one", targets=["q_proj"])
    [answer] = answers
    assert len(answer.result(60)) == 3


def test_two_pages_see_the_same_and_a_new_one_gets_the_newest(room):
    client, server = room
    operated(client, "inject", name="one", targets=["q_proj"])
    [shown] = [listener.__self__ for listener in server.listeners]

    async def first_events() -> list[str]:
        return [await anext(shown.events()) for _ in range(2)]

    one, other = asyncio.run(first_events())
    assert one == other
    assert json.loads(one.partition("data: ")[2]) == client.get("/api/state").json()


def test_the_journal_of_a_server_does_not_grow_for_ever(room, monkeypatch):
    monkeypatch.setattr(server_module, "MOST_OPERATIONS", 3)
    client, server = room
    for number in range(1, 7):
        operated(client, "inject", name=f"a{number}", targets=["q_proj"])
    shown = client.get("/api/state").json()
    assert [row["number"] for row in shown["journal"]] == [4, 5, 6]
    assert len(history_of(server.model).operations) == 3
    before = shown["journal"][0]["hash_before"]
    for _ in range(3):
        posted(client, "/api/undo")
    last = client.get("/api/state").json()
    assert not last["can_undo"] and last["can_redo"]
    assert before == combined(tensor_hashes(server.model).values())
    assert [row["name"] for row in last["adapters"]] == ["a1", "a2", "a3"]
