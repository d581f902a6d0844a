"""The state that all pages share, and the events that tell of it."""

import json

from helpers.rooms import operated


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
